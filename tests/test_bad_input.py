"""Bad input: one line on stderr that names file, field, value and fix; exit code 2; nothing overwritten or compiled."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
import time

import bigram
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from grpo_jax import cli, parallel
from grpo_jax.errors import InputError
from grpo_jax.metrics import CompileCounter, RunWriter
from grpo_jax.models.architecture import llama
from grpo_jax.models.huggingface import write_folder
from grpo_jax.recipes import grpo
from grpo_jax.recipes.grpo import Recorder, Session
from grpo_jax.recipes.loop import Stop
from grpo_jax.step import Program
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, train_sentencepiece

SYMBOLS = ("<think>", "</think>", "<answer>", "</answer>")
ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 5) for b in range(1, 6)]
FIELDS = {
    "data.source": "jsonl",
    "data.max_prompt_length": 6,
    "data.prompts_per_step": 8,
    "sampler.group_size": 2,
    "sampler.max_new_tokens": 3,
    "rewards.names": '("answer",)',
    "rewards.weights": "(1.0,)",
    "objective.micro_batch_size": 0,
    "train.steps": 1,
    "eval.problems": 2,
    "eval.final_problems": 2,
    "eval.samples": 2,
    "eval.majority": 0,
    "log.tensorboard": "false",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> pathlib.Path:
    """A model of a few hundred parameters with a tokenizer of its own, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models")
    train_sentencepiece([r["question"] + r["answer"] for r in ROWS], 40, SYMBOLS, str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_sentencepiece(str(folder / "tokenizer.model"))
    sizes = dict(width=16, heads=4, kv_heads=2, head_size=4, mlp_width=24)
    architecture = llama(1, vocabulary=tokenizer.vocabulary, **sizes)
    write_folder(str(folder / "tiny"), architecture, tiny.params(architecture), tokenizer)
    return folder / "tiny"


@pytest.fixture
def workplace(tmp_path, monkeypatch, model_folder) -> pathlib.Path:
    """The current folder, with model/ and rows.jsonl in it; what a command adds to sys.path is taken off again."""
    shutil.copytree(model_folder, tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(command: str = "train", workdir: str = "run", **fields) -> list[str]:
    given = {"model.path": "model", "data.path": "rows.jsonl", **FIELDS, **fields}
    return [command, "--workdir", workdir, *(f"--config.{name}={value}" for name, value in given.items())]


def snapshot(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Time of the last change and digest of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


def refused(capsys, given: list[str]) -> str:
    """The one line of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert cli.main(given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("grpo-jax: "), lines
    return lines[0].removeprefix("grpo-jax: ")


def refused_before_anything(capsys, folder: pathlib.Path, given: list[str], *says: str) -> None:
    """Refused with these words, nothing compiled and no file made, changed or removed; a dry run says the same."""
    before = snapshot(folder)
    with CompileCounter() as counter:
        line = refused(capsys, given)
    for words in says:
        assert words in line, line
    assert counter.compiles == 0 and snapshot(folder) == before and not (folder / "run").exists()
    if "--workdir " not in line:
        assert refused(capsys, [*given, "--dry_run"]) == line


def test_the_input_that_the_others_spoil_is_good(workplace, capsys):
    assert cli.main([*arguments(), "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert "8 prompts x 2 = 16 completions" in out and not err


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optim.lrr": 1}, ("--config: unknown field optim.lrr", "did you mean optim.lr?")),
        ({"sampler.group_size": 1}, ("arithmetic.py: sampler.group_size=1 must be at least 2",)),
        (
            {"data.prompts_per_step": 6},
            ("config: data.prompts_per_step=6 must divide by the 8 devices of mesh.data x mesh.fsdp",),
        ),
        ({"objective.micro_batch_size": -1}, ("objective.micro_batch_size=-1 must not be negative",)),
        ({"objective.minibatches": 3}, ("objective.minibatches=3 must divide the 8 prompts of a step, or set",)),
        ({"objective.minibatches": 2}, ("objective.minibatches=2 must divide the 1 prompts of each of the 8 devices",)),
        (
            {"objective.minibatches": 3, "train.share_prefix": False},
            ("objective.minibatches=3 must divide the 16 completions of a step",),
        ),
        ({"cold_start.enabled": True, "cold_start.sft.batch_size": 6}, ("cold_start.sft.batch_size=6 must divide",)),
        ({"mesh.data": 3}, ("mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 is not the 8 devices there are",)),
        ({"data.max_prompt_length": 3}, ("the prompt of row 0", "4 tokens", "data.max_prompt_length=3", "4 would fit")),
        ({"data.path": "nowhere.jsonl"}, ("data.path='nowhere.jsonl' is not a file",)),
        ({"data.answer_column": "anser"}, ("data.answer_column='anser' is not a column; did you mean 'answer'?",)),
        ({"model.path": "nowhere"}, ("model.path='nowhere' does not exist", "give a Hugging Face folder")),
        ({"model.path": "rows.jsonl"}, ("model.path='rows.jsonl' is neither a folder nor a .gguf file",)),
        ({"rewards.names": '("anser",)'}, ("rewards.names='anser'", "did you mean 'answer'?")),
        ({"rewards.names": '("my_rewards:f",)'}, ("no module 'my_rewards'; put its folder on PYTHONPATH",)),
        ({"text.template": "chatt"}, ("text.template='chatt' is not plain, r1_zero, chat or a .jinja file",)),
        ({"text.template": "chat"}, ("text.template='chat', but the model has none",)),
        ({"text.end_tokens": "('<eos>',)"}, ("text.end_tokens: '<eos>' is no single token",)),
        ({"train.time_budget": "soon"}, ("train.time_budget='soon' is not a time such as 300s, 55m or 2h",)),
        ({"data.source": "memory"}, ("data.source='memory' is for grpo_jax.train(dataset=...)",)),
    ],
)
def test_fields(workplace, capsys, fields, says):
    refused_before_anything(capsys, workplace, arguments(**fields), *says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ("data.path='rows.jsonl' is empty: no row in it",)),
        ('{"question": "1+1=", "answer": "2"}\n', ("rows.jsonl' has one row", "data.eval_path")),
        (
            '{"question": "1+1=", "answer": "2"}\n{"question": "1+2=", "answer": " "}\n',
            ("rows.jsonl: line 2: answer=' ' is a row without an answer: fill it in or leave the row out",),
        ),
        (
            '{"question": "1+1=", "answer": "2"}\n{"question": "1+2="}\n',
            ("rows.jsonl: line 2: data.answer_column='answer' is not a column",),
        ),
        ('{"question": "1+1=", "answer": "2"}\n{"question": "1+2=\n', ("rows.jsonl: line 2 is not JSON",)),
        ('{"question": "1+1=", "answer": "2"}\n{"question": "", "answer": "2"}\n', ("line 2: question=''",)),
        (
            '{"question": "1+1=", "answer": "2"}\n{"question": "x+1=", "answer": "2"}\n',
            ("the tokenizer cannot spell 'x'",),
        ),
    ],
)
def test_data(workplace, capsys, text, says):
    (workplace / "rows.jsonl").write_text(text)
    refused_before_anything(capsys, workplace, arguments(), *says)


def no_weights(model: pathlib.Path) -> None:
    (model / "model.safetensors").unlink()


def truncated_weights(model: pathlib.Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def truncated_header(model: pathlib.Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f{")


def edit_weights(model: pathlib.Path, edit) -> None:
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, model / "model.safetensors")


def wrong_shape(model: pathlib.Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(model, lambda t: t.update({name: np.ascontiguousarray(t[name][:-1])}))


def missing_tensor(model: pathlib.Path) -> None:
    edit_weights(model, lambda t: t.pop("model.norm.weight"))


def nan_weight(model: pathlib.Path) -> None:
    edit_weights(model, lambda t: t["model.norm.weight"].__setitem__(0, np.nan))


def larger_tokenizer(model: pathlib.Path) -> None:
    letters = ["".join(chr(ord("a") + i) for i in range(26))]
    (model / "tokenizer.model").unlink()
    train_sentencepiece(letters + [r["question"] for r in ROWS], 60, SYMBOLS, str(model / "tokenizer.model"))


def no_tokenizer(model: pathlib.Path) -> None:
    (model / "tokenizer.model").unlink()


def no_config(model: pathlib.Path) -> None:
    (model / "config.json").unlink()


def other_model_type(model: pathlib.Path) -> None:
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"model_type": "mamba"}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_weights, ("model/model.safetensors: no such file", "give a folder with safetensors weights")),
        (truncated_weights, ("model/model.safetensors: size=", "is no whole safetensors file", "get it again")),
        (truncated_header, ("model/model.safetensors: size=9 bytes is no whole safetensors file",)),
        (
            wrong_shape,
            (
                "model: tensor model.layers.0.mlp.up_proj.weight has shape [23, 16]",
                "ask for [24, 16]",
                "belong together",
            ),
        ),
        (missing_tensor, ("model: tensor model.norm.weight of shape [16] is missing: use a complete checkpoint",)),
        (nan_weight, ("model: tensor model.norm.weight holds NaN or infinite values",)),
        (larger_tokenizer, ("model: the tokenizer has", "the embedding", "use the tokenizer that the weights")),
        (no_tokenizer, ("model: holds neither tokenizer.json nor tokenizer.model: copy it there",)),
        (no_config, ("model/config.json: cannot be read", "give a complete Hugging Face folder")),
        (other_model_type, ("model/config.json: model_type='mamba' is not supported: use one of llama, mistral",)),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_model_files(workplace, capsys, spoil, says):
    spoil(workplace / "model")
    refused_before_anything(capsys, workplace, arguments(), *says)


def another_run(workdir: pathlib.Path) -> None:
    grpo.open_workdir(workdir, tiny.config(seed=7))
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')


def a_thesis(workdir: pathlib.Path) -> None:
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("years of work")


def a_file(workdir: pathlib.Path) -> None:
    workdir.write_text("years of work")


def a_model(workdir: pathlib.Path) -> None:
    shutil.copytree("model", workdir)


def torn_config(workdir: pathlib.Path) -> None:
    workdir.mkdir()
    (workdir / "config.json").write_text('{"seed": ')


@pytest.mark.parametrize(
    ("fill", "says"),
    [
        (another_run, ("--workdir kept: holds a run with seed=7, this one has 0", "name another --workdir")),
        (a_thesis, ("--workdir kept: holds files but no config.json", "name another")),
        (a_file, ("--workdir kept: is a file: name a folder",)),
        (a_model, ("kept/config.json: is not the config of a run: name another --workdir",)),
        (torn_config, ("kept/config.json: is not JSON", "name another --workdir")),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_folder_that_holds_something_else(workplace, capsys, command, fill, says):
    fill(workplace / "kept")
    fields = {}
    if command == "sft":
        (workplace / "chats.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
        fields = {"sft.path": "chats.jsonl"}
    before = snapshot(workplace)
    with CompileCounter() as counter:
        line = refused(capsys, arguments(command, "kept", **fields))
    assert all(words in line for words in says), line
    assert counter.compiles == 0 and snapshot(workplace) == before


def test_a_mended_command_goes_on_in_the_same_folder(workplace, capsys, monkeypatch):
    """A refused start leaves nothing behind that would stand in the way of the next one."""
    refused(capsys, arguments(**{"data.max_prompt_length": 3}))
    monkeypatch.setattr(grpo, "starting_model", lambda *_: (_ for _ in ()).throw(InputError("got through")))
    assert refused(capsys, arguments()) == "got through"
    assert (workplace / "run" / "config.json").is_file()


def test_the_base_checks_rewards_and_prompts_before_it_learns(workplace, capsys):
    given = arguments(**{"model.path": "", "data.source": "arithmetic", "data.path": "", "rewards.names": '("anser",)'})
    refused_before_anything(capsys, workplace, given, "rewards.names='anser'")
    given = arguments(**{"model.path": "", "data.source": "arithmetic", "data.path": "", "data.max_prompt_length": 3})
    with CompileCounter() as counter:
        line = refused(capsys, given)
    assert "data.max_prompt_length=3" in line and counter.compiles == 0


# Rewards that fail. What each does is switched by MODE, so that one compiled program serves all.

BAD_REWARDS = {
    "raises": "reward 'flagged' raised ValueError: no way",
    "hangs": "reward 'flagged' did not return within rewards.timeout=0.3 seconds",
    "count": "reward 'flagged' returned 1 scores for",
    "nan": "reward 'flagged' returned nan (float)",
    "string": "reward 'flagged' returned '1' (str)",
}


def misbehave(mode: str, completions: list[str]) -> list:
    if mode == "raises":
        raise ValueError("no\nway")
    if mode == "hangs":
        time.sleep(5)
    scores = [float(len(c)) for c in completions]
    return {"count": [1.0], "nan": [float("nan"), *scores[1:]], "string": ["1", *scores[1:]]}.get(mode, scores)


@pytest.fixture(scope="module")
def flagged():
    """(switch, parts, program, state holder) of a fused step whose only reward does what the switch says."""
    switch = {"mode": "good"}
    config = tiny.config(
        **{
            "rewards.names": ("flagged",),
            "rewards.weights": (1.0,),
            "rewards.timeout": 0.3,
            "sampler.max_new_tokens": 3,
            "log.tensorboard": False,
        }
    )
    parts = bigram.parts(config, callables={"flagged": lambda completions: misbehave(switch["mode"], completions)})
    state = tiny.state(parts, {"params": bigram.params()})
    program = Program(parts, state)
    return switch, parts, program, [state]


@pytest.mark.parametrize("mode", BAD_REWARDS)
def test_a_failing_reward_in_the_step_skips_the_update_and_ends_the_run(flagged, tmp_path, mode):
    switch, parts, program, held = flagged
    prompts = tiny.on_mesh(tiny.prompts(parts.config), parts.mesh)
    before = jax.device_get(held[0].trainable)
    switch["mode"] = mode
    state, metrics, rollout = program(held[0], prompts)
    held[0] = state
    assert bool(metrics.failed)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.trainable))
    session = Session(parts, None, None, tmp_path, Stop(None), Terminal(), CompileCounter())
    with RunWriter(tmp_path, parts.config.log) as writer, pytest.raises(InputError) as caught:
        Recorder(session, writer, program)(1, metrics, rollout, {}, 1.0)
    assert BAD_REWARDS[mode] in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    switch["mode"] = "good"
    held[0], metrics, _ = program(held[0], prompts)
    assert not metrics.failed and program.traces == 1 and parts.scorer.host.take_error() is None
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(held[0].trainable))
    assert any(jax.tree.leaves(changed))


@contextlib.contextmanager
def one_device(monkeypatch):
    """Commands on one of the fake devices: shorter to compile."""
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "make_mesh", lambda config: parallel.make_mesh(config, jax.devices()[:1]))
        yield


@pytest.mark.parametrize(
    "mode",
    [mode if mode == "raises" else pytest.param(mode, marks=pytest.mark.slow) for mode in BAD_REWARDS],
)
def test_a_failing_reward_from_the_command_line(workplace, capsys, monkeypatch, mode):
    code = (
        "from test_bad_input import misbehave\n\n\n"
        f"def flagged(completions, **_):\n    return misbehave({mode!r}, completions)\n"
    )
    (workplace / f"my_rewards_{mode}.py").write_text(code)
    name = f"my_rewards_{mode}:flagged"
    given = arguments(**{"rewards.names": f'("{name}",)', "rewards.timeout": 0.3, "data.prompts_per_step": 1})
    with one_device(monkeypatch):
        line = refused(capsys, given)
    assert BAD_REWARDS[mode].replace("flagged", name) in line
    left = {path.name for path in (workplace / "run").iterdir()}
    assert left == {"config.json"}, left  # the mended reward starts in the same folder
    sys.modules.pop(f"my_rewards_{mode}")


def test_a_reward_with_columns_that_are_not_there(workplace, capsys):
    (workplace / "my_columns.py").write_text("def f(completions, solution):\n    return [0.0] * len(completions)\n")
    given = arguments(**{"rewards.names": '("my_columns:f",)'})
    refused_before_anything(capsys, workplace, given, "reward 'my_columns:f' wants the column 'solution'")
    sys.modules.pop("my_columns")


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ([], "dataset: has 0 rows; at least 2 are needed"),
        (ROWS[:1], "dataset: has 1 rows; at least 2 are needed"),
        ([{"quest": "1+1="}] * 3, "dataset row 0: has no column data.prompt_column='question', only ['quest']"),
        ([{"question": "1+1="}] * 3, "dataset row 0: column 'answer' is empty, and the reward 'answer' needs it"),
    ],
)
def test_rows_from_python(workplace, dataset, says):
    config = dataclasses.replace(
        tiny.config(**{"mesh.data": -1, "data.prompts_per_step": 8}),
        rewards=dataclasses.replace(tiny.config().rewards, names=("answer",), weights=(1.0,)),
        model=dataclasses.replace(tiny.config().model, path="model"),
    )
    with CompileCounter() as counter, pytest.raises(InputError) as caught:
        grpo.train(config, dataset=dataset, workdir="run")
    assert says in str(caught.value) and counter.compiles == 0 and not pathlib.Path("run").exists()
