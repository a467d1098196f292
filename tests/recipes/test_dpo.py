"""Direct preference optimisation: what is read, the loss and gradient of the decoder, and a run that learns."""

import dataclasses
import json

import jax
import numpy as np
import numpy_decoder
import pytest
import tiny

from grpo_jax.config import Config, DpoConfig, TextConfig, from_dict
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import LoadedModel, load_model
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import dpo
from grpo_jax.recipes.loop import Stopped
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, train_sentencepiece

ROWS = [
    {"prompt": f"{a}+{b}=", "chosen": f"<answer>{a + b}</answer>", "rejected": f"{a + b}"}
    for a in range(4)
    for b in range(4)
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    """A decoder of one layer with random weights, in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    path = str(folder / "tokenizer.model")
    train_sentencepiece(["".join(row.values()) for row in ROWS], 40, ("<answer>", "</answer>"), path)
    tokenizer = Tokenizer.from_sentencepiece(path)
    architecture = tiny.architecture(layers=1, vocabulary=tokenizer.vocabulary)
    write_folder(str(folder / "tiny"), architecture, tiny.params(architecture), tokenizer)
    return load_model(str(folder / "tiny"))


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_jax.recipes.supervised.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def leaves(model: LoadedModel) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(model.params)]


def test_all_forms_of_a_row_give_the_same_pair(tmp_path, model):
    row = {"prompt": "1+2=", "chosen": "<answer>3</answer>", "rejected": "3"}
    chat = {"prompt": [user("1+2=")], **{name: [assistant(row[name])] for name in ("chosen", "rejected")}}
    whole = {name: [user("1+2="), assistant(row[name])] for name in ("chosen", "rejected")}
    path = write(tmp_path / "rows.jsonl", [row, chat, whole])
    pairs = dpo.read_preferences(path, TextConfig(), model.tokenizer, 40)
    assert pairs[0] == pairs[1] == pairs[2]
    (chosen, mask), (rejected, _) = pairs[0]
    prompt = model.tokenizer.encode("1+2=", special=False)
    answer = model.tokenizer.encode("<answer>3</answer>", special=False)
    assert chosen == [*prompt, *answer, model.tokenizer.end_ids[0]]
    assert mask == [0] * len(prompt) + [1] * (len(answer) + 1), "the end token is learned too"
    assert rejected[: len(prompt)] == prompt and rejected != chosen


def test_earlier_turns_of_the_assistant_do_not_count(tmp_path, model):
    talk = [user("1+1="), assistant("2"), user("1+2=")]
    rows = [{"prompt": talk, "chosen": "3", "rejected": "4"}]
    ((ids, mask), _), *_ = dpo.read_preferences(write(tmp_path / "a.jsonl", rows), TextConfig(), model.tokenizer, 40)
    assert model.tokenizer.decode([i for i, counted in zip(ids, mask, strict=True) if counted]) == "3"
    assert sum(mask) == len(model.tokenizer.encode("3", special=False)) + 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1=", "chosen": "2"}, r"row 2: has \['chosen', 'prompt'\], not 'chosen' and 'rejected'"),
        ({**ROWS[0], "rejected": ROWS[0]["chosen"]}, "row 2: chosen and rejected are the same.*remove it"),
        ({"chosen": "a", "rejected": "b"}, "row 2: 'chosen' and 'rejected' must be conversations .*add 'prompt'"),
        ({"chosen": [user("1"), assistant("2")], "rejected": [user("2"), assistant("3")]}, "row 2: .*but the last"),
        ({**ROWS[0], "chosen": 7}, "row 2: 'chosen' is int: must be a text or a list of messages"),
        ({**ROWS[0], "chosen": "1" * 60}, r"row 2 has \d+ tokens, more than dpo.max_length=40"),
    ],
)
def test_rows_that_prefer_nothing_are_named(tmp_path, model, row, message):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(InputError, match=message) as info:
        dpo.read_preferences(path, TextConfig(), model.tokenizer, 40)
    assert path in str(info.value) and "\n" not in str(info.value)


def test_files_without_rows(tmp_path, model):
    with pytest.raises(InputError, match=r"dpo\.path='nowhere\.jsonl': no such file"):
        dpo.read_preferences("nowhere.jsonl", TextConfig(), model.tokenizer, 40)
    with pytest.raises(InputError, match="has no rows"):
        dpo.read_preferences(write(tmp_path / "a.jsonl", []), TextConfig(), model.tokenizer, 40)


PAIRS = [
    (([5, 9, 4, 7, 2], [0, 0, 1, 1, 1]), ([5, 9, 8, 2], [0, 0, 1, 1])),
    (([10, 3, 2], [0, 1, 1]), ([10, 6, 6, 12, 2], [0, 1, 1, 1, 1])),
]


def numpy_logps(params, architecture, example):
    ids, mask = example
    place = np.arange(len(ids))
    logits = numpy_decoder.forward(params, architecture, np.array(ids), place, np.ones_like(place))
    logps = numpy_decoder.log_softmax(logits[:-1])[place[:-1], ids[1:]]
    return np.sum(logps * np.array(mask[1:]))


def test_loss_and_gradient_of_the_decoder():
    """The loss against the numpy decoder; its gradient along a direction against a difference of that loss."""
    architecture = tiny.architecture(layers=1)
    params, reference = (tiny.params(architecture, seed) for seed in (0, 1))
    module, config = Decoder(architecture), DpoConfig(beta=0.4, label_smoothing=0.1)
    batch = dpo.make_preference_batch(PAIRS, 6)
    fixed = [[numpy_logps(reference, architecture, example) for example in pair] for pair in PAIRS]

    def loss_by_hand(params):
        margins = []
        for pair, (ref_chosen, ref_rejected) in zip(PAIRS, fixed, strict=True):
            chosen, rejected = (numpy_logps(params, architecture, example) for example in pair)
            margins.append((chosen - ref_chosen) - (rejected - ref_rejected))
        right, wrong = (np.logaddexp(0, -sign * 0.4 * np.array(margins)) for sign in (1, -1))
        return np.mean(0.9 * right + 0.1 * wrong)

    program = jax.jit(
        jax.value_and_grad(
            lambda p, b: dpo.dpo_loss(module, {"params": p}, {"params": reference}, b, config), has_aux=True
        )
    )
    (loss, means), gradient = program(params, batch)
    assert float(loss) == pytest.approx(loss_by_hand(params), rel=1e-5)
    assert means["dpo/loss"][0] / means["dpo/loss"][1] == pytest.approx(float(loss), rel=1e-6)
    direction = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(0, 1, x.shape), params)
    step = 1e-5
    up, down = (
        jax.tree.map(lambda p, d: np.float64(p) + sign * step * d, params, direction)  # noqa: B023
        for sign in (1, -1)
    )
    slope = (loss_by_hand(up) - loss_by_hand(down)) / (2 * step)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradient, direction)))
    assert along == pytest.approx(slope, rel=1e-3) and abs(slope) > 0.1
    # Padding has no influence.
    junk = batch.tokens.copy()
    junk[np.arange(6) >= batch.lengths[..., None]] = 13
    (other, _), same = program(params, dataclasses.replace(batch, tokens=junk))
    assert other == loss
    jax.tree.map(np.testing.assert_array_equal, gradient, same)


def config_of(model, file, **fields) -> Config:
    config = from_dict({"model": {"path": model.source}, "mesh": {"data": 1}, "checkpoint": {"every": 2}})
    given = {"steps": 12, "batch_size": 4, "max_length": 24, "lr": 4e-2, "path": file}
    return dataclasses.replace(config, dpo=DpoConfig(**(given | fields)))


def test_a_run_learns_to_prefer_and_goes_on_where_it_was_stopped(tmp_path, model, monkeypatch, one_device):
    config = config_of(model, write(tmp_path / "rows.jsonl", ROWS))
    whole = dpo.run(config, tmp_path / "whole", Terminal())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    # At the first step policy and reference are one: no margin, and the loss is log 2.
    assert lines[0]["dpo/margin"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["dpo/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert lines[-1]["dpo/accuracy"] == 1
    assert lines[-1]["dpo/margin"] > 0.5 and lines[-1]["dpo/loss"] < 0.5
    assert lines[-1]["dpo/chosen"] > lines[-1]["dpo/rejected"]
    trained = load_model(whole)
    assert any(np.any(a != b) for a, b in zip(leaves(trained), leaves(model), strict=True))

    said = Terminal.step

    def step(self, done, *rest):
        said(self, done, *rest)
        if done == 4:
            monkeypatch.setattr("grpo_jax.recipes.loop.Stop.reason", lambda *_: "SIGTERM")

    monkeypatch.setattr(Terminal, "step", step)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step \d of 12; saved"):
        dpo.run(config, tmp_path / "parts")
    monkeypatch.undo()
    monkeypatch.setattr("grpo_jax.recipes.supervised.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    resumed = load_model(dpo.run(config, tmp_path / "parts"))
    assert all(np.array_equal(a, b) for a, b in zip(leaves(resumed), leaves(trained), strict=True))
    again = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["dpo/loss"] for line in again] == [line["dpo/loss"] for line in lines]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"dpo\.path='nowhere\.jsonl': no such file"),
        ({"batch_size": 3}, "dpo.batch_size=3 must divide by the 2 devices"),
    ],
)
def test_bad_input_leaves_no_folder(tmp_path, model, fields, message, monkeypatch):
    monkeypatch.setattr("grpo_jax.recipes.supervised.make_mesh", lambda config: make_mesh(config, jax.devices()[:2]))
    config = config_of(model, write(tmp_path / "rows.jsonl", ROWS), **fields)
    with pytest.raises(InputError, match=message):
        dpo.run(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2)), tmp_path / "run")
    with pytest.raises(InputError, match="model.path='' names no model to train"):
        dpo.run(dataclasses.replace(config, model=dataclasses.replace(config.model, path="")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_are_trained_on_a_frozen_base(tmp_path, model, one_device):
    """The reference is the base then; PEFT's folder lies beside the merged model."""
    config = config_of(model, write(tmp_path / "rows.jsonl", ROWS), steps=2)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=2, base_dtype="float32"))
    merged = load_model(dpo.run(config, tmp_path / "run", Terminal()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["dpo/margin"] == pytest.approx(0, abs=1e-5) and lines[1]["dpo/margin"] > 0.001
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    moved = [np.any(a != b) for a, b in zip(leaves(merged), leaves(model), strict=True)]
    assert {bool(x) for x in moved} == {True, False}, "dense layers moved, embedding and norms did not"
