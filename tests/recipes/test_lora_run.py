"""Whole runs with adapters: what they save, that they go on where they stopped, that what they leave is the policy."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from grpo_jax.config import Config, LoraConfig, from_dict, read_config_file
from grpo_jax.errors import InputError
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.models.lora import freeze, merge, split_variables
from grpo_jax.models.peft import read_adapters
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import grpo, sft, supervised
from grpo_jax.rewards.verifiers import byte_table
from grpo_jax.text import Tokenizer, train_sentencepiece

MICRO = pathlib.Path(__file__).with_name("micro_config.py")
LORA = LoraConfig(rank=2, alpha=4.0, base_dtype="int8")
ROWS = [f"{a}+{b}=<answer>{a + b}</answer>" for a in range(10) for b in range(10)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A tiny model of sums that was never trained, one layer, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("base")
    path = str(folder / "tokenizer.model")
    train_sentencepiece(ROWS, 40, ("<answer>", "</answer>"), path)
    tokenizer = Tokenizer.from_sentencepiece(path)
    of = tiny.architecture(layers=1, vocabulary=tokenizer.vocabulary)
    write_folder(str(folder / "model"), of, tiny.params(of), tokenizer)
    return str(folder / "model")


@pytest.fixture(scope="module")
def small():
    """One device, rewards of a few operations, and no evaluation: the step is all that is compiled."""

    def scorer(config, token_bytes, rows, decode, mesh, *more, **named):
        return tiny.TinyScorer(config.names, config.weights, byte_table(token_bytes), None, mesh, {}, tiny.REWARDS)

    with pytest.MonkeyPatch.context() as patch:
        for recipe in (grpo, supervised):
            patch.setattr(recipe, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        patch.setattr(grpo, "build_scorer", scorer)
        patch.setattr(grpo.Session, "measure_once", lambda *_: {})
        patch.setattr(grpo.Session, "finish", lambda *_: {})
        yield


def config_of(base: str, **sections) -> Config:
    config = from_dict(read_config_file(MICRO))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=base),
        objective=dataclasses.replace(config.objective, reference_every=0),
        rewards=dataclasses.replace(config.rewards, names=("odd", "long"), weights=(1.0, 0.5)),
        train=dataclasses.replace(config.train, steps=4),
        eval=dataclasses.replace(config.eval, every=0),
        checkpoint=dataclasses.replace(config.checkpoint, keep=4),
        lora=LORA,
        mesh=dataclasses.replace(config.mesh, data=1),
        **sections,
    )


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory, small) -> pathlib.Path:
    """A finished run with adapters on an int8 base."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    grpo.run(config_of(base), workdir)
    return workdir


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_hold_adapters_and_no_base(lora_run):
    layout = json.loads((lora_run / "checkpoints" / "4" / "meta" / "metadata").read_text())["layout"]
    tops = {name.partition("/")[0] for name in layout}
    assert "trainable" in tops and not tops & {"frozen", "reference"}
    assert not any("kernel" in name or "embedding" in name for name in layout)
    told = lines(lora_run)
    assert abs(told[0]["kl"]) < 1e-9 < told[-1]["kl"], "the reference is the base"
    assert all(line["sampler_gap/max"] < 1e-5 for line in told)


def test_what_a_run_leaves_is_its_policy(lora_run, base):
    """The run's folder, its newest checkpoint and the PEFT folder: base and adapters of the last step."""
    loaded = load_model(base)
    policy = load_model(str(lora_run), keep_adapters=True)
    assert policy.adapters is not None
    jax.tree.map(np.testing.assert_array_equal, policy.params, merge(freeze(loaded.params, "int8"), NOTHING))
    adapters = policy.adapters["adapters"]
    fresh = split_variables(loaded.params, LORA, 0)[0]["adapters"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), adapters, fresh)
    assert all(jax.tree.leaves(moved))
    for other in (str(lora_run / "checkpoints"), str(lora_run / "checkpoints" / "4")):
        again = load_model(other, keep_adapters=True).adapters
        assert again is not None
        jax.tree.map(np.testing.assert_array_equal, again, policy.adapters)
    early = load_model(str(lora_run / "checkpoints" / "2"), keep_adapters=True).adapters
    assert early is not None
    layer = ("stack_0", "mlp", "up", "b")
    pick = [tree[layer[0]][layer[1]][layer[2]][layer[3]] for tree in (early["adapters"], adapters)]
    assert (pick[0] != pick[1]).any()
    written = read_adapters(str(lora_run / "adapter"), loaded.architecture)
    jax.tree.map(np.testing.assert_array_equal, written, policy.adapters)
    peft = load_model(str(lora_run / "adapter"), keep_adapters=True)
    jax.tree.map(np.testing.assert_array_equal, peft.params, loaded.params)
    merged = load_model(str(lora_run))
    jax.tree.map(np.testing.assert_array_equal, merged.params, merge(policy.params, policy.adapters))
    assert merged.adapters is None


NOTHING = {"adapters": {}, "adapter_scales": {}}


def cut_back(run: pathlib.Path, copy: pathlib.Path, step: int) -> None:
    """A copy of a finished run as it was after `step`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    for folder in (copy / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)


def test_a_run_goes_on_where_it_stopped(lora_run, base, tmp_path):
    cut_back(lora_run, tmp_path / "run", 2)
    grpo.run(config_of(base), tmp_path / "run")
    clock = ("seconds/", "tokens_per_second", "compiles")
    told = [
        [{name: x for name, x in line.items() if not name.startswith(clock)} for line in lines(workdir)]
        for workdir in (lora_run, tmp_path / "run")
    ]
    assert told[0] == told[1]
    one, two = (
        (workdir / "adapter" / "adapter_model.safetensors").read_bytes() for workdir in (lora_run, tmp_path / "run")
    )
    assert one == two


def test_other_weights_under_the_same_path_are_refused(lora_run, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    cut_back(lora_run, tmp_path / "run", 2)
    config = config_of(str(tmp_path / "base"))
    (tmp_path / "run" / "config.json").write_text(
        (lora_run / "config.json").read_text().replace(base, str(tmp_path / "base"))
    )
    weights = tmp_path / "base" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    size = int.from_bytes(raw[:8], "little") + 8
    raw[size:] = bytes(len(raw) - size)
    weights.write_bytes(raw)
    with pytest.raises(InputError, match=r"holds other weights than those that .*run was trained on"):
        grpo.run(config, tmp_path / "run")
    with pytest.raises(InputError, match=r"its adapters were trained on other weights than .*base holds"):
        load_model(str(tmp_path / "run"))


def test_supervised_training_of_adapters(base, tmp_path, small):
    """It learns, leaves the base alone, and its merged folder is base plus PEFT folder."""
    chats = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": f"<answer>{a + b}</answer>"} for a in range(4) for b in range(4)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = dataclasses.replace(Config().sft, path=str(chats), steps=6, batch_size=2, max_length=32, lr=0.1)
    config = config_of(base, sft=section)
    merged = load_model(sft.run(config, tmp_path / "run"))
    told = lines(tmp_path / "run")
    assert told[-1]["sft/loss"] < told[0]["sft/loss"] - 0.2
    added = read_adapters(str(tmp_path / "run" / "adapter"), merged.architecture)
    frozen = freeze(load_model(base).params, "int8")
    jax.tree.map(np.testing.assert_array_equal, merged.params, merge(frozen, added))
    policy = load_model(str(tmp_path / "run" / "checkpoints"), keep_adapters=True)
    jax.tree.map(np.testing.assert_array_equal, policy.adapters, added)
