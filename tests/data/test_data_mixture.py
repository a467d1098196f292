"""Prompt sets side by side: who is drawn when, what counts for whom, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from grpo_jax.config import PromptSetConfig, from_dict, to_config_dict, to_json
from grpo_jax.data import mixture
from grpo_jax.data.prompts import build_prompt_set, make_batch, make_eval_batches
from grpo_jax.errors import InputError

SETS = (
    {"name": "sums", "weight": 3.0, "path": "a.jsonl", "rewards": ("odd", "long")},
    {"name": "talk", "weight": 1.0, "path": "b.jsonl", "rewards": ("nice",), "reward_weights": (2.0,)},
    {"name": "safe", "weight": 2.0, "path": "c.jsonl", "late": True},
)
FIELDS = {
    "data.sets": SETS,
    "model.path": "somewhere",
    "rewards.names": ("odd", "long", "nice"),
    "rewards.weights": (1.0, 0.5, -0.25),
    "rewards.late_names": ("nice",),
    "rewards.late_from": 0.5,
    "data.prompts_per_step": 6,
}
ROWS = [
    {"prompt": f"{name}{i}", "answer": "", "set": name}
    for name, n in (("sums", 7), ("talk", 5), ("safe", 4))
    for i in range(n)
]
LATE = 5  # of train.steps=10


def made(**fields) -> mixture.Mixture:
    found = mixture.build_mixture(tiny.config(**{**FIELDS, **fields}), ROWS)
    assert found is not None
    return found


def test_sets_are_dealt_by_weight_and_each_row_comes_once_an_epoch():
    mix, draws = made(), np.arange(400 * 6)
    owner, rank = mix.dealt(draws, seed=3)
    for number in range(3):
        assert sorted(rank[owner == number]) == list(range((owner == number).sum()))
    by_step = np.stack([np.bincount(step, minlength=3) for step in owner.reshape(-1, 6)])
    assert not by_step[:LATE, 2].any(), "a late set is not drawn before its step"
    early, late = np.array([4.5, 1.5, 0]), np.array([3.0, 1.0, 2.0])
    assert np.abs(by_step[:LATE] - early).max() <= 0.5 and (by_step[LATE:] == late).all()
    assert len({tuple(step) for step in owner.reshape(-1, 6)[LATE:]}) > 20, "places are shuffled"
    rows = mix.order(draws, 3, True)
    assert (mix.member[rows] == owner).all()
    for number, size in enumerate((7, 5, 4)):
        own = rows[owner == number]
        by_rank = own[np.argsort(rank[owner == number])]
        epochs = by_rank[: len(own) // size * size].reshape(-1, size)
        assert all(len(set(epoch)) == size for epoch in epochs) and len(epochs) > 20
        assert len({tuple(epoch) for epoch in epochs}) > 5


def test_the_order_is_a_function_of_seed_and_draw_number():
    mix = made()
    together = mix.order(np.arange(90), 9, True)
    assert [int(mix.order(np.array([d]), 9, True)[0]) for d in range(90)] == together.tolist()
    assert (made().order(np.arange(90)[::-1], 9, True)[::-1] == together).all()
    assert (mix.order(np.arange(90), 10, True) != together).mean() > 0.5
    in_order = mix.order(np.arange(30), 9, False)
    owner, rank = mix.dealt(np.arange(30), 9)
    assert (in_order[owner == 1] == 7 + rank[owner == 1] % 5).all() and rank[owner == 1].max() > 5


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.001, 5.0, 1.0), (1 / 3, 1 / 3, 1 / 3), (7.0,)])
def test_a_cycle_holds_every_set_by_its_share(shares):
    dealt = mixture.deal(np.array(shares))
    counts = np.bincount(dealt.owner, minlength=len(shares))
    assert counts.sum() == mixture.CYCLE and (counts >= 1).all() and (dealt.before[-1] == counts).all()
    assert np.abs(counts / mixture.CYCLE - np.array(shares) / sum(shares)).max() <= 1 / mixture.CYCLE
    for place in (0, 1, 17, 999):
        assert (dealt.before[place] == np.bincount(dealt.owner[:place], minlength=len(shares))).all()


def test_what_counts_for_a_row_and_when():
    mix, rows = made(), np.array([0, 7, 12])
    early, late, last = (
        mix.rewards(rows, np.full(3, LATE * 6 - 1)),
        mix.rewards(rows, np.full(3, LATE * 6)),
        mix.rewards(rows),
    )
    np.testing.assert_array_equal(late.member, [0, 1, 2])
    np.testing.assert_array_equal(late.applies, [[1, 1, 0], [0, 0, 1], [1, 1, 1]])
    np.testing.assert_array_equal(late.weights, [[1, 0.5, 0], [0, 0, 2], [1, 0.5, -0.25]])
    np.testing.assert_array_equal(early.applies, [[1, 1, 0], [0, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(early.weights, [[1, 0.5, 0], [0, 0, 0], [1, 0.5, 0]])
    for name in ("applies", "weights"):
        np.testing.assert_array_equal(getattr(last, name), getattr(late, name))
    assert mix.graded().tolist() == [True] * 7 + [False] * 5 + [True] * 4
    alone = made(**{"data.sets": (), "model.path": ""}, **{"rewards.late_from": 3.0})
    np.testing.assert_array_equal(
        alone.rewards(np.array([0, 0]), np.array([17, 18])).weights, [[1, 0.5, 0], [1, 0.5, -0.25]]
    )


def test_batches_bring_the_rewards_of_their_rows():
    encode = lambda prompt: tiny.encode("1")  # noqa: E731
    plain = build_prompt_set(ROWS, encode, 3, lambda rows: {})
    mixed = build_prompt_set(ROWS, encode, 3, lambda rows: {}, made())
    assert make_batch(plain, 0, 6, 1, True, 3).rewards is None
    for step in (0, LATE):
        batch = make_batch(mixed, 6 * step, 6, 1, True, 3)
        want = made().rewards(batch.row, batch.draw)
        assert batch.rewards is not None and batch.row.tolist() == made().order(batch.draw, 1, True).tolist()
        np.testing.assert_array_equal(batch.rewards.weights, want.weights)
        part = make_batch(mixed, 6 * step, 6, 1, True, 3, only=np.array([4, 5]))
        np.testing.assert_array_equal(part.row, batch.row[4:])
    (held,) = make_eval_batches(mixed, 16, 3)
    assert held.rewards is not None
    np.testing.assert_array_equal(held.rewards.applies, made().rewards(held.row).applies)


def test_every_round_of_a_pool_holds_all_sets():
    mix = made(**{"data.pool_factor": 2, "data.prompts_per_step": 8})
    owner, _ = mix.dealt(np.arange(160 * 20, 160 * 40), 0)
    for number in (0, 1):
        rounds = owner.reshape(-1, 8, 2)[:, :, number]
        assert np.abs(np.bincount(rounds.reshape(-1), minlength=3) / rounds.size - np.array([3, 1, 2]) / 6).max() < 0.03


def write(tmp_path, name: str, rows: list[dict]) -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def test_rows_of_all_sets(tmp_path):
    sums = write(tmp_path, "sums.jsonl", [{"question": f"s{i}", "answer": str(i)} for i in range(20)])
    talk = write(tmp_path, "talk.jsonl", [{"text": f"t{i}"} for i in range(40)])
    sets = (
        {"name": "sums", "path": sums, "weight": 1.0},
        {
            "name": "talk",
            "path": talk,
            "weight": 2.0,
            "prompt_column": "text",
            "answer_column": "",
            "rewards": ("nice",),
        },
    )
    config = tiny.config(**{**FIELDS, "data.sets": sets, "rewards.late_names": (), "rewards.late_from": 0.0})
    rows = mixture.load_all_rows(config.data, "train", 0)
    assert [row["set"] for row in rows] == ["sums"] * 18 + ["talk"] * 36 and rows[18]["answer"] == ""
    held = mixture.load_all_rows(config.data, "eval", 0)
    assert [row["prompt"] for row in held] == ["t36", "s18", "t37", "t38", "s19", "t39"]
    taken = write(tmp_path, "taken.jsonl", [{"question": "q", "answer": "1", "set": "mine"}] * 3)
    for path, says in (
        (str(tmp_path / "none.jsonl"), r"data.sets\[1\] \(talk\): data.path='.*none.jsonl' is not a file"),
        (write(tmp_path, "empty.jsonl", []), r"data.sets\[1\] \(talk\): data.path='.*' is empty: no row in it"),
        (taken, r"data.sets\[1\] \(talk\): row 0 has set='mine', the column that names the prompt set: rename"),
    ):
        data = dataclasses.replace(config.data, sets=(config.data.sets[0], PromptSetConfig(name="talk", path=path)))
        with pytest.raises(InputError, match=says):
            mixture.load_all_rows(data, "train", 0)


def test_rows_that_no_set_claims_and_sets_without_rows():
    config = tiny.config(**FIELDS)
    assert mixture.build_mixture(tiny.config(), ROWS) is None
    with pytest.raises(InputError, match="dataset row 1: column set='other' is none of data.sets: sums, talk, safe"):
        mixture.build_mixture(config, [ROWS[0], {"prompt": "x", "set": "other"}])
    with pytest.raises(InputError, match=r"data.sets\[1\] \(talk\): has no row to draw prompts from"):
        mixture.build_mixture(config, ROWS[:7] + ROWS[12:])
    assert mixture.build_mixture(config, ROWS[:7], drawn=False) is not None


def changed(number: int, **fields) -> dict:
    sets = [dict(each) for each in SETS]
    sets[number] |= fields
    return {"data.sets": tuple(sets)}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (changed(1, weight=0.0), "tiny: data.sets[1].weight=0.0 must be positive"),
        (changed(1, weight=-1), "tiny: data.sets[1].weight=-1.0 must be positive"),
        (
            changed(0, rewards=("odd", "lang")),
            "data.sets[0].rewards=('odd', 'lang') has 'lang', which is not in rewards.names=",
        ),
        (changed(0, rewards=("odd", "lng")), "did you mean 'long'?"),
        (changed(0, rewards=("odd", "odd")), "data.sets[0].rewards=('odd', 'odd') names a reward twice"),
        (
            changed(2, reward_weights=(1.0,)),
            "data.sets[2].reward_weights=(1.0,) must hold one weight for each of ('odd',",
        ),
        (changed(1, name="two words"), "data.sets[1].name='two words' must be a word of letters, digits, _ and -"),
        (changed(1, name="sums"), "data.sets.name=('sums', 'sums', 'safe') names two sets alike"),
        (changed(1, path=""), "data.sets[1].path='' is empty: source='jsonl' needs it"),
        (changed(1, source="json"), "data.sets[1].source='json' is not one of arithmetic, tasks, jsonl, tfds, hf; did"),
        (changed(1, wieght=1.0), "unknown field data.sets[1].wieght; did you mean data.sets.weight?"),
        ({"data.sets": "sums"}, "data.sets='sums' must be a list of sections"),
        ({"data.sets": (3,)}, "data.sets[0]=3 must be a section of fields: name, weight"),
        (changed(0, late=True), "which says what is right, in no set drawn from the start"),
        ({"data.sets": (SETS[2],)}, "data.sets.late=(True,) leaves nothing to draw at the start"),
        ({"data.path": "x"}, "data.path='x' is not read: each of data.sets names its own"),
        ({"model.path": ""}, "model.path='' is empty, and data.sets are no sums to make a base from: name a model"),
        ({"cold_start.enabled": True}, "cold_start.enabled=True samples one dataset"),
        (
            {"rewards.late_names": ("odd",)},
            "rewards.late_names=('odd',) must be of those after the first of rewards.names",
        ),
        ({"rewards.late_from": 0.0}, "rewards.late_from=0.0 must be a number of steps below train.steps=10"),
        ({"rewards.late_from": 10.0}, "rewards.late_from=10.0 must be a number of steps below train.steps=10"),
        ({"rewards.late_from": 1.5}, "rewards.late_from=1.5 must be a number of steps"),
        ({"rewards.late_names": (), "data.sets": SETS[:2]}, "rewards.late_from=0.5 has no effect: nothing is in"),
    ],
)
def test_what_is_refused(fields, says):
    with pytest.raises(InputError) as caught:
        tiny.config(**{**FIELDS, **fields})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_sets_travel_through_files():
    config = tiny.config(**FIELDS)
    assert from_dict(json.loads(to_json(config))) == config == from_dict(to_config_dict(config))
    assert config.data.sets[1] == PromptSetConfig("talk", 1.0, ("nice",), (2.0,), path="b.jsonl")
    assert config.late_step == LATE and config.draws_per_step == 6
