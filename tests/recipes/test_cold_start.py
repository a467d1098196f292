"""The cold start learns the model's own right samples and nothing else, and a person may edit them."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from grpo_jax.config import ColdStartConfig, Config, LoraConfig, SftConfig, from_dict
from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl
from grpo_jax.models.loading import load_model
from grpo_jax.models.lora import split_variables
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import cold_start, grpo
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.recipes.loop import Stop, Stopped
from grpo_jax.terminal import Terminal

ROWS = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(5)]


def record(problem: int, completion: str, right: bool, ended: bool = True) -> dict:
    row = ROWS[problem]
    values = {"number": float(right)}
    made = {"problem": problem, "completion": completion, "rewards": values, "right": right, "ended": ended}
    return {**row, **made, "length": len(completion)}


RECORDS = [
    record(0, "zero plus zero is 0", True),
    record(0, " 0\n", True),
    record(1, "it is 7", False),
    record(1, "<answer>7</answer>", False),
    record(2, "2 and 2 is 4", True),
    record(2, "4, and so on 4", True, ended=False),
    record(3, "6", True, ended=False),
    record(4, "4 + 4 = 8", True),
]


@dataclasses.dataclass
class Start:
    """make_cold_start with canned samples and without training."""

    config: Config
    model: object
    mesh: object
    asked: list = dataclasses.field(default_factory=list)
    learned: list = dataclasses.field(default_factory=list)

    def sample(self, _, variables, problems, samples, temperature, top_p, step, between) -> list[dict]:
        between()
        self.asked.append((problems, samples, temperature, top_p))
        return RECORDS

    def fit(self, config, sft, module, collections, examples, mesh, workdir, stop, terminal, name, about, save_last):
        assert not save_last, "the model is written right after: a state of three times its size would stay beside it"
        self.learned.append((sft, examples))
        return jax.tree.map(lambda x: np.asarray(x) + 1, collections[0])

    def run(self, workdir) -> str:
        with Stop(None) as stop:
            rows = {"train": ROWS, "eval": []}
            return cold_start.make_cold_start(self.config, self.model, rows, self.mesh, workdir, stop, Terminal())  # pyright: ignore


@pytest.fixture
def start(micro_base, monkeypatch) -> Start:
    config = from_dict({"model": {"path": micro_base}, "mesh": {"data": 1}, "sampler": {"group_size": 2}})
    sft = SftConfig(steps=3, batch_size=2, max_length=64)
    config = dataclasses.replace(config, cold_start=ColdStartConfig(enabled=True, prompts=5, rows=48, sft=sft))
    made = Start(config, load_model(micro_base), make_mesh(config.mesh, jax.devices()[:1]))
    monkeypatch.setattr(Evaluator, "sample", lambda self, *given: made.sample(self, *given))
    monkeypatch.setattr(cold_start, "fit", made.fit)
    monkeypatch.setattr(cold_start, "read_chats", lambda path, *_: read_jsonl(path))  # the base has no word for words
    return made


def read(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "cold_start" / "samples.jsonl").read_text().splitlines()]


def test_the_shortest_right_sample_of_each_prompt_is_kept_in_the_answer_format(start, tmp_path):
    start.run(tmp_path)
    assert start.asked == [(5, 2, 1.0, 1.0)]
    kept = {row["messages"][0]["content"]: row["messages"] for row in read(tmp_path)}
    assert {prompt: messages[-1]["content"] for prompt, messages in kept.items()} == {
        "0+0=": "0\n<answer>0</answer>",
        "2+2=": "2 and 2 is 4\n<answer>4</answer>",
        "4+4=": "4 + 4 = 8\n<answer>8</answer>",
    }
    assert all([m["role"] for m in messages] == ["user", "assistant"] for messages in kept.values())
    ((sft, examples),) = start.learned
    assert sft is start.config.cold_start.sft and len(examples) == 3


def test_with_adapters_the_base_stays_and_grpo_goes_on_with_them(start, tmp_path):
    """The folder is PEFT's; the run's model is the same base with the adapters that were learned."""
    lora = LoraConfig(rank=2, alpha=4.0)
    start.config = dataclasses.replace(start.config, lora=lora)
    path = start.run(tmp_path)
    assert {p.name for p in pathlib.Path(path).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    fresh = split_variables(start.model.params, lora, 0)[0]["adapters"]
    rows = {"train": ROWS, "eval": []}
    with Stop(None) as stop:
        given = (rows, start.mesh, tmp_path, stop, Terminal())
        model = grpo.starting_model(start.config, start.model, *given)  # pyright: ignore
    assert model.params is start.model.params and model.adapters is not None
    jax.tree.map(np.testing.assert_array_equal, model.adapters["adapters"], jax.tree.map(lambda x: x + 1, fresh))
    parts = SimpleNamespace(config=start.config, mesh=start.mesh, optimizer=optax.sgd(1.0))
    config = dataclasses.replace(start.config, objective=dataclasses.replace(start.config.objective, beta=0.1))
    parts.config = config
    state = grpo.initial_state(parts, model)  # pyright: ignore
    jax.tree.map(np.testing.assert_array_equal, state.reference, state.trainable)


def test_at_most_so_many_rows_are_kept(start, tmp_path):
    fewer = dataclasses.replace(start.config.cold_start, rows=2)
    start.config = dataclasses.replace(start.config, cold_start=fewer)
    start.run(tmp_path)
    assert [row["messages"][0]["content"] for row in read(tmp_path)] == ["0+0=", "4+4="]


def test_samples_that_are_there_are_used_as_they_are(start, tmp_path):
    """Written by hand, or by an earlier start that was killed while it learned them."""
    path = tmp_path / "cold_start" / "samples.jsonl"
    path.parent.mkdir()
    text = json.dumps({"prompt": "1+1=", "completion": "<answer>2</answer>"}) + "\n\n"
    path.write_text(text)
    start.run(tmp_path)
    assert path.read_text() == text and start.asked == []
    assert len(start.learned[0][1]) == 1


def test_a_finished_cold_start_is_not_made_again(start, tmp_path):
    folder = start.run(tmp_path)
    before = load_model(start.config.model.path).params
    after = load_model(folder).params
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a) + 1, np.asarray(b)), before, after))
    )
    assert start.run(tmp_path) == folder
    assert len(start.asked) == len(start.learned) == 1


def test_a_model_that_is_never_right_cannot_start(start, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "sample", lambda *_: [record(1, "it is 7", False), record(3, "6", True, False)])
    with pytest.raises(InputError, match=r"cold_start\.prompts=5: none of 2 samples was right"):
        start.run(tmp_path)
    assert not (tmp_path / "cold_start" / "samples.jsonl").exists()


def test_a_stop_while_sampling_leaves_nothing_half_done(start, tmp_path, monkeypatch):
    monkeypatch.setattr(Stop, "reason", lambda *_: "SIGTERM")
    with pytest.raises(Stopped, match="stopped by SIGTERM while sampling for the cold start"):
        start.run(tmp_path)
    assert list((tmp_path / "cold_start").iterdir()) == []


def test_a_prompt_of_messages_stays_one():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "4+4="}]
    row = cold_start.chat({"prompt": messages, "completion": "8", "answer": "8"})
    assert row["messages"] == [*messages, {"role": "assistant", "content": "8\n<answer>8</answer>"}]
