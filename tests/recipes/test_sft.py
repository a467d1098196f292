"""Supervised fine-tuning: the loss in float64, what it may learn from, what it refuses, and a run of it."""

import dataclasses
import json

import jax
import numpy as np
import numpy_decoder
import pytest
import tiny

from grpo_jax.config import Config, SftConfig, TextConfig, from_dict
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.loading import load_model
from grpo_jax.recipes import sft
from grpo_jax.recipes.loop import Stopped
from grpo_jax.terminal import Terminal

EXAMPLES = [
    ([5, 9, 4, 7, 11, 2], [0, 0, 1, 1, 1, 1]),
    ([8, 6, 1], [0, 1, 1]),
    ([10, 3, 12, 4, 5, 6, 7, 2], [0, 0, 0, 0, 1, 1, 0, 1]),
    ([4, 2], [1, 1]),
]
PACKS = [[0, 1], [2, 3]]


@pytest.fixture(scope="module")
def loss_and_gradient():
    """(loss, number of counted tokens, gradient by logits) of EXAMPLES in two packs, compiled once."""
    architecture = tiny.architecture()
    module, params = Decoder(architecture), tiny.params(architecture)
    batch = sft.make_sft_batch(EXAMPLES, PACKS, 10)

    def program(params, batch):
        (loss, means), gradient = jax.value_and_grad(
            lambda p: sft.sft_loss(module, {"params": p}, batch), has_aux=True
        )(params)
        return loss, means["sft/loss"], gradient

    return params, batch, jax.jit(program)


def test_the_loss_is_the_mean_over_learned_tokens_of_separate_rows(loss_and_gradient):
    params, batch, program = loss_and_gradient
    loss, (total, count), _ = program(params, batch)
    logps = []
    for ids, mask in EXAMPLES:
        place = np.arange(len(ids))
        logits = numpy_decoder.forward(params, tiny.architecture(), np.array(ids), place, np.ones_like(place))
        by_token = numpy_decoder.log_softmax(logits[:-1])[place[:-1], ids[1:]]
        logps += [logp for logp, learned in zip(by_token, mask[1:], strict=True) if learned]
    assert count == len(logps) == 10
    assert loss == pytest.approx(-np.mean(logps), rel=1e-5)
    assert total == pytest.approx(-np.sum(logps), rel=1e-5)


def test_padding_has_no_influence_and_no_mask_no_gradient(loss_and_gradient):
    params, batch, program = loss_and_gradient
    loss, _, gradient = program(params, batch)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0.01
    assert batch.segments[:, -1].tolist() == [0, 2], "the first pack ends in padding"
    padded = batch.tokens.copy()
    padded[0, -1] = 13
    other_loss, _, other = program(params, dataclasses.replace(batch, tokens=padded))
    assert other_loss == loss
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), gradient, other))
    loss, (_, count), zero = program(params, dataclasses.replace(batch, mask=np.zeros_like(batch.mask)))
    assert loss == count == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(zero))


def test_examples_of_a_pack_do_not_see_each_other(loss_and_gradient):
    """Only the pack's second example is learned: another first one changes neither loss nor gradient by a bit."""
    params, batch, program = loss_and_gradient
    second = batch.segments == 2
    batch = dataclasses.replace(batch, mask=batch.mask * second)
    loss, (_, count), gradient = program(params, batch)
    changed = np.where(batch.segments == 1, (batch.tokens + 3) % 13 + 1, batch.tokens)
    assert count == 3 and (changed != batch.tokens).any(axis=1).all()
    other_loss, _, other = program(params, dataclasses.replace(batch, tokens=changed))
    assert other_loss == loss
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), gradient, other))
    own = np.where(second, (batch.tokens + 3) % 13 + 1, batch.tokens)
    assert program(params, dataclasses.replace(batch, tokens=own))[0] != loss


def test_an_untied_head_gets_gradient_from_learned_tokens_alone():
    """The head's gradient is softmax minus one-hot, averaged over the places that predict learned tokens."""
    architecture = tiny.architecture(tied=False, layers=1)
    module, params = Decoder(architecture), tiny.params(architecture)
    ids, mask = [5, 9, 4, 7, 2], [0, 0, 1, 0, 1]
    batch = sft.make_sft_batch([(ids, mask)], [[0]], 8)
    gradient = jax.jit(jax.grad(lambda p: sft.sft_loss(module, {"params": p}, batch)[0]))(params)["head"]["kernel"]
    place = np.arange(5)
    whole = numpy_decoder._float64(params)
    hidden = numpy_decoder.forward(
        {**whole, "head": {"kernel": np.eye(architecture.width)}}, architecture, np.array(ids), place, place * 0 + 1
    )
    expected = np.zeros_like(whole["head"]["kernel"])
    for at in (1, 3):  # they predict places 2 and 4
        law = np.exp(numpy_decoder.log_softmax(hidden[at] @ whole["head"]["kernel"]))
        law[ids[at + 1]] -= 1
        expected += np.outer(hidden[at], law) / 2
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(("epochs", "packs", "steps"), [(0, 7, 100), (1, 8, 2), (2, 7, 4), (3, 1, 1)])
def test_epochs_make_steps(epochs, packs, steps):
    """As many batches of four as hold all packs so often; the last one is filled up."""
    assert sft.steps_of(SftConfig(epochs=epochs, batch_size=4), packs) == steps


def test_packs_hold_every_example_once_and_nothing_too_long():
    random = np.random.default_rng(0)
    examples = [([1] * n, [1] * n) for n in random.integers(1, 20, 300).tolist()]
    packs = sft.pack(examples, 24, seed=5)
    assert sorted(number for numbers in packs for number in numbers) == list(range(300))
    assert all(sum(len(examples[number][0]) for number in numbers) <= 24 for numbers in packs)
    tokens = sum(len(ids) for ids, _ in examples)
    assert len(packs) < 1.15 * tokens / 24, "first fit wastes little"
    assert packs == sft.pack(examples, 24, seed=5) != sft.pack(examples, 24, seed=6)


def test_an_example_in_a_pack_starts_at_position_0_and_its_first_token_is_not_learned():
    batch = sft.make_sft_batch(EXAMPLES, PACKS, 10)
    assert batch.tokens.tolist() == [[5, 9, 4, 7, 11, 2, 8, 6, 1, 0], [10, 3, 12, 4, 5, 6, 7, 2, 4, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]]
    assert batch.segments.tolist() == [[1] * 6 + [2] * 3 + [0], [1] * 8 + [2] * 2]
    assert batch.mask.tolist() == [[0, 0, 1, 1, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0, 1, 0, 1]]


@pytest.fixture(scope="module")
def base(micro_base):
    return load_model(micro_base)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHAT = {"messages": [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "<answer>3</answer>"}]}


def test_both_kinds_of_rows_give_the_same_example(tmp_path, base):
    pair = {"prompt": "1+2=", "completion": "<answer>3</answer>"}
    path = write(tmp_path / "chats.jsonl", [CHAT, pair])
    (one, other) = sft.read_chats(path, TextConfig(), base.tokenizer, 32)
    assert one == other
    ids, mask = one
    prompt = base.tokenizer.encode("1+2=", special=False)
    answer = base.tokenizer.encode("<answer>3</answer>", special=False)
    assert ids == [*prompt, *answer, base.tokenizer.end_ids[0]]
    assert mask == [0] * len(prompt) + [1] * (len(answer) + 1), "the end token is learned too"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "has no rows"),
        ([CHAT, {"question": "1+2=", "answer": "3"}], r"row 2 has \['answer', 'question'\], not 'messages' nor"),
        ([{"messages": CHAT["messages"][:1]}], "row 1: .*assistant"),
        ([CHAT, {"prompt": "1+1=", "completion": "2" * 40}], r"row 2 has \d\d tokens, more than max_length=20"),
    ],
    ids=["no-rows", "wrong-columns", "no-assistant", "too-long"],
)
def test_rows_that_cannot_be_learned_are_named(tmp_path, base, rows, message):
    path = write(tmp_path / "chats.jsonl", rows)
    with pytest.raises(InputError, match=message) as info:
        sft.read_chats(path, TextConfig(), base.tokenizer, 20)
    assert path in str(info.value) and "\n" not in str(info.value)


def test_a_file_that_is_not_there_is_named(base):
    with pytest.raises(InputError, match=r"sft\.path='nowhere\.jsonl': no such file"):
        sft.read_chats("nowhere.jsonl", TextConfig(), base.tokenizer, 20)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    rows = [{"prompt": f"{a}+{b}=", "completion": f"<answer>{a + b}</answer>"} for a in range(4) for b in range(4)]
    return write(tmp_path_factory.mktemp("sft") / "chats.jsonl", rows)


def sft_config(micro_base: str, **fields) -> Config:
    config = from_dict({"model": {"path": micro_base}, "mesh": {"data": 1}, "checkpoint": {"every": 1}})
    given = {"steps": 6, "batch_size": 2, "max_length": 32, "lr": 0.03}
    return dataclasses.replace(config, sft=SftConfig(**(given | fields)))


def leaves(path: str) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(load_model(path).params)]


def test_a_run_learns_and_goes_on_where_it_was_stopped(tmp_path, micro_base, chats, monkeypatch, one_device):
    config = sft_config(micro_base, path=chats)
    whole = sft.run(config, tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["sft/loss"] < lines[0]["sft/loss"] - 0.2
    assert any((a != b).any() for a, b in zip(leaves(whole), leaves(micro_base), strict=True))

    said = Terminal.step

    def step(self, done, *rest):
        said(self, done, *rest)
        if done == 3:
            monkeypatch.setattr("grpo_jax.recipes.loop.Stop.reason", lambda *_: "SIGTERM")

    monkeypatch.setattr(Terminal, "step", step)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step [34] of 6; saved"):
        sft.run(config, tmp_path / "parts")
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "model").exists()
    parts = sft.run(config, tmp_path / "parts")
    assert all((a == b).all() for a, b in zip(leaves(whole), leaves(parts), strict=True))
    again = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["sft/loss"] for line in again] == [line["sft/loss"] for line in lines]
    assert sft.run(config, tmp_path / "parts") == parts, "a finished run is left as it is"


@pytest.mark.parametrize(
    "model, fields, message",
    [
        (False, {}, "model.path='' names no model to train"),
        (True, {"path": "nowhere.jsonl"}, r"sft\.path='nowhere\.jsonl': no such file"),
        (True, {"max_length": 5}, r"row 1 has \d+ tokens, more than max_length=5"),
    ],
    ids=["no-model", "no-file", "too-long"],
)
def test_bad_input_leaves_no_folder(tmp_path, micro_base, chats, model, fields, message, one_device):
    config = sft_config(micro_base if model else "", **({"path": chats} | fields))
    with pytest.raises(InputError, match=message):
        sft.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
