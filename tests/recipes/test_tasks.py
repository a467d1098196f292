"""Files of generated tasks, and a base model made from worked ones."""

import io
import json

import jax
import pytest
import tiny

from grpo_jax.data.benchmarks import read_benchmark
from grpo_jax.errors import InputError
from grpo_jax.models.loading import load_model
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import base, tasks
from grpo_jax.terminal import Terminal

PATH = "sums,countdown,general:en,ru"


def quiet():
    return Terminal(out=io.StringIO())


def test_files(tmp_path):
    few = {"tasks.prompts": 30, "tasks.held_out": 12, "tasks.chats": 6, "tasks.pairs": 20, "tasks.points": 20}
    config = tiny.config(**few, **{"data.source": "tasks", "data.path": PATH})
    summary = tasks.run(config, tmp_path, quiet())
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    counts = {
        **{"train": 30, "eval": 12, "eval_sums": 12, "eval_countdown": 12, "general": 30, "eval_general": 12},
        **{"chats": 6, "helpful": 20, "eval_helpful": 2, "harmless": 20, "eval_harmless": 2},
    }
    assert summary["rows"] == {f"{name}.jsonl": count for name, count in counts.items()}
    for name, count in counts.items():
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == count and {json.loads(line)["language"] for line in lines} == {"en", "ru"}
    kinds = [problem["kind"] for problem in read_benchmark("jsonl", str(tmp_path / "eval.jsonl"))]
    assert kinds == ["math", "exact"] * 6
    with pytest.raises(InputError, match="data.source='arithmetic' makes no tasks"):
        tasks.run(tiny.config(), tmp_path, quiet())


def test_a_base_of_both_scripts(tmp_path, monkeypatch):
    """At micro sizes: the folder is there, its tokenizer spells both scripts, and a second start makes nothing anew."""
    monkeypatch.setattr(base, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    fields = {"data.source": "tasks", "data.path": PATH, "data.max_prompt_length": 60, "base.vocabulary": 300}
    sizes = {"base.layers": 1, "base.width": 16, "base.heads": 2, "base.kv_heads": 1, "base.mlp_width": 16}
    learns = {"base.worked_sums": 400, "base.sft.steps": 2, "base.sft.batch_size": 2, "base.sft.max_length": 160}
    config = tiny.config(**fields, **sizes, **learns, **{"model.path": ""})
    folder = base.run(config, tmp_path, quiet())
    tokenizer = load_model(folder).tokenizer
    for text in ("<think>ones 7+8=15 перенос 1</think><answer>75</answer>", "Привет, Анна, рад вас видеть."):
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert tokenizer.id_of("<think>") is not None
    made = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert base.run(config, tmp_path, quiet()) == folder
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == made
