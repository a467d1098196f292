"""Dynamic sampling: rounds over a pool, in the program, against a plain loop of the host over the same functions."""

import dataclasses
import functools
import types

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.errors import InputError
from grpo_jax.metrics import divide
from grpo_jax.sampler.pool import STEP_TOTALS, empty, round_prompts
from grpo_jax.sampler.types import Rollout
from grpo_jax.step import Program, filled_batch, sample_rollout, score_rollout, update

GROUPS, SIZE, FACTOR = 4, 2, 3
FIELDS = {
    "data.prompts_per_step": GROUPS,
    "sampler.group_size": SIZE,
    "sampler.max_new_tokens": 4,
    "rewards.names": ("chosen",),
    "rewards.weights": (1.0,),
    "optim.clip_norm": 0.0,
}


def chosen(prompts, rollout):
    """The sum of the ids, a hundredth each, for the prompts whose column says 1; a tie of 0.1 for the others."""
    ids = jnp.sum(rollout.tokens * rollout.mask, axis=1) / 100
    return jnp.where(prompts.columns["signal"][rollout.group] > 0, ids, 0.1)


def parts_of(factor=FACTOR, **fields):
    config = tiny.config(**{**FIELDS, "data.pool_factor": factor, **fields})
    return bigram.parts(config, optimizer=optax.sgd(1.0), rewards={"chosen": chosen})


def pool_of(parts, signal, weight=None):
    """K x N prompts from draw 0 on; `signal` by round and place says which groups may differ in reward."""
    factor = len(signal)
    config = tiny.config(**{**FIELDS, "data.prompts_per_step": GROUPS * factor})
    by_pool = np.asarray(signal, np.float32).T.reshape(-1)  # round k has every K-th prompt, from the k-th on
    prompts = tiny.prompts(config).replace(columns={"signal": by_pool})
    return prompts if weight is None else prompts.replace(weight=np.asarray(weight, np.float32).T.reshape(-1))


def state_of(parts):
    return tiny.state(parts, {"params": bigram.params()})


@functools.cache
def program_of(factor=FACTOR, mode="fused", data=1):
    parts = parts_of(factor, **{"step.mode": mode, "mesh.data": data})
    return parts, Program(parts, state_of(parts))


def step(signal, factor=FACTOR, mode="fused", data=1, weight=None):
    """(state, metrics, rollout) of a step over the pool, on the host."""
    parts, program = program_of(factor, mode, data)
    pool = tiny.on_mesh(pool_of(parts, signal, weight), parts.mesh)
    with jax.transfer_guard("disallow"):
        state, metrics, rollout = program(state_of_guarded(parts), pool)
    state, metrics, rollout = jax.device_get((state, metrics, rollout))
    return types.SimpleNamespace(state=state, means=divide(metrics.means), rollout=rollout)


def state_of_guarded(parts):
    with jax.transfer_guard("allow"):
        return state_of(parts)


@functools.cache
def one_round():
    """A jitted plain round, (prompts) -> scored rollout, and a jitted plain update: what the oracle is made of."""
    parts = parts_of(1)
    state = state_of(parts)
    sampled = jax.jit(lambda prompts: score_rollout(parts, prompts, sample_rollout(parts, state, prompts)))
    return sampled, jax.jit(lambda rollout: update(parts, state, rollout))


def oracle(signal, weight=None):
    """The batch that a loop of the host fills, round by round and group by group, and what it counted."""
    pool = pool_of(None, signal, weight)
    factor = len(signal)
    kept: list[Rollout] = []
    told = {"rounds": 0, "sampled": 0, "without_signal": 0, "surplus": 0}
    rewards = []
    for k in range(factor):
        if len(kept) == GROUPS:
            break
        told["rounds"] += 1
        rows = np.arange(GROUPS) * factor + k
        rollout = jax.device_get(one_round()[0](jax.tree.map(lambda x: x[rows], pool)))  # noqa: B023
        for n in range(GROUPS):
            group = jax.tree.map(lambda x: x[n * SIZE : (n + 1) * SIZE], rollout)  # noqa: B023
            if not group.weight.any():
                continue
            told["sampled"] += 1
            rewards += group.scores.values[:, 0].tolist()
            if np.ptp(group.scores.values[:, 0]) == 0:
                told["without_signal"] += 1
            elif len(kept) == GROUPS:
                told["surplus"] += 1
            else:
                kept.append(group)
    told |= {"empty": GROUPS - len(kept), "unused": pool.weight.sum() - told["sampled"]}
    return kept, told, np.mean(rewards)


def batch_of(kept):
    """The kept groups as one rollout; empty places are filler of weight 0 made from the first group's prompt."""
    filler = jax.tree.map(np.zeros_like, kept[0]).replace(
        prompt_tokens=kept[0].prompt_tokens, prompt_lengths=kept[0].prompt_lengths
    )
    groups = kept + [filler] * (GROUPS - len(kept))
    return jax.tree.map(lambda *x: np.concatenate(x), *groups)


ALL, NONE, SOME = [1] * 4, [0] * 4, [0, 1, 0, 1]
CASES = {
    "two rounds": [SOME, ALL, ALL],
    "surplus": [SOME, [1, 1, 1, 0], NONE],
    "late": [NONE, NONE, ALL],
    "places stay empty": [[0, 1, 0, 0], SOME, NONE],
}


@pytest.mark.parametrize(
    "case", [case if case in ("two rounds", "late") else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_loop_in_the_program_keeps_what_a_loop_of_the_host_keeps(case):
    got = step(CASES[case])
    kept, told, reward = oracle(CASES[case])
    want = batch_of(kept)
    rows = len(kept) * SIZE
    for name in ("tokens", "lengths", "ended", "mask", "draw", "prompt_tokens"):
        np.testing.assert_array_equal(getattr(got.rollout, name)[:rows], getattr(want, name)[:rows], err_msg=name)
    for name in ("logps", "sampled_logps", "advantages"):
        np.testing.assert_allclose(getattr(got.rollout, name)[:rows], getattr(want, name)[:rows], atol=1e-5)
    np.testing.assert_allclose(got.rollout.scores.values[:rows], want.scores.values[:rows], rtol=1e-6)
    assert got.rollout.weight.tolist() == want.weight.tolist()
    assert (got.rollout.advantages[:rows] != 0).any() and not got.rollout.mask[rows:].any()
    assert {name: got.means[f"pool/{name}"] for name in told} == told
    assert got.means["reward/chosen"] == pytest.approx(reward), "means are over all that was sampled, kept or not"
    state, metrics, _ = jax.device_get(one_round()[1](want))
    means = divide(metrics.means)
    assert got.means["loss"] == pytest.approx(means["loss"], abs=1e-6) and means["grad_norm"] > 0.01
    np.testing.assert_allclose(got.state.trainable["params"]["table"], state.trainable["params"]["table"], atol=1e-6)


def test_groups_keep_the_order_of_their_rounds_and_count_as_one_batch():
    got = step(CASES["two rounds"])
    # Places 1 and 3 of round 0 (draws 0, 3, 6, 9), then 0 and 1 of round 1 (draws 1, 4, 7, 10).
    assert got.rollout.draw[::SIZE].tolist() == [3, 9, 1, 4]
    assert got.rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert got.means["pool/rounds"] == 2 and got.means["pool/unused"] == 4
    _, told, _ = oracle(CASES["two rounds"])
    sampled = one_round()[0](jax.tree.map(lambda x: x[np.arange(GROUPS) * FACTOR], pool_of(None, CASES["two rounds"])))
    assert got.means["tokens"] > float(jnp.sum(sampled.lengths)), "tokens of both rounds"
    assert told["sampled"] == 8


def test_a_pool_without_any_signal_teaches_nothing():
    got = step([NONE, NONE, NONE])
    assert got.means["pool/empty"] == GROUPS and got.means["loss"] == 0 and got.means["grad_norm"] == 0
    assert not got.rollout.weight.any() and got.means["pool/unused"] == 0 and got.state.skipped == 0
    np.testing.assert_array_equal(got.state.trainable["params"]["table"], bigram.params()["table"])


def test_the_whole_pool_counts_as_drawn_but_not_its_filler():
    weight = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    got = step([SOME, ALL, ALL], weight=weight)
    _, told, _ = oracle([SOME, ALL, ALL], weight)
    assert got.state.draws == 9 and {name: got.means[f"pool/{name}"] for name in told} == told
    assert got.means["pool/unused"] == 2


def test_a_full_first_round_is_the_plain_step():
    """With signal in every group of round 0 the others are not sampled, and the step is that without a pool."""
    got = step([ALL, ALL, ALL])
    parts, program = program_of(1)
    pool = pool_of(parts, [ALL, ALL, ALL])
    prompts = tiny.on_mesh(jax.tree.map(np.asarray, round_prompts(pool, jnp.int32(0), 3)), parts.mesh)
    state, metrics, rollout = jax.device_get(program(state_of(parts), prompts))
    assert (np.abs(rollout.advantages[:, 0]) > 0).all() and got.means["pool/rounds"] == 1
    np.testing.assert_array_equal(got.rollout.tokens, rollout.tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got.rollout, rollout)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got.state.trainable, state.trainable)
    plain = divide(metrics.means)
    assert {name: got.means[name] for name in plain} == pytest.approx(plain, abs=1e-6)
    assert {name for name in got.means if name not in plain} == {
        f"pool/{name}" for name in ("rounds", "sampled", "without_signal", "surplus", "empty", "unused")
    }


def test_a_factor_of_one_is_the_program_without_a_pool():
    parts, program = program_of(1)
    text = str(program.fused.trace(state_of(parts), pool_of(parts, [ALL])).jaxpr)
    assert text.count("while[") == 2, "decoding and packs alone"
    parts, program = program_of()
    text = str(program.fused.trace(state_of(parts), pool_of(parts, [ALL] * FACTOR)).jaxpr)
    assert text.count("while[") >= 3


@pytest.mark.parametrize("other", [{"mode": "staged"}, {"data": 4}], ids=["staged", "4 devices"])
def test_staged_mode_and_more_devices_keep_the_same_groups(other):
    for case in ("two rounds", "places stay empty"):
        one, got = step(CASES[case]), step(CASES[case], **other)
        for name in ("tokens", "lengths", "draw", "weight", "group", "ended"):
            np.testing.assert_array_equal(getattr(got.rollout, name), getattr(one.rollout, name), err_msg=name)
        for name, value in one.means.items():
            assert got.means[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        np.testing.assert_allclose(
            got.state.trainable["params"]["table"], one.state.trainable["params"]["table"], atol=1e-6
        )


def test_advantages_by_the_batch_are_those_of_the_kept_groups():
    """Signal is found round by round; a deviation over the batch is that of the batch which is learnt from."""
    parts = parts_of(**{"objective.scale_rewards": "batch"})
    got = step(CASES["surplus"]).rollout
    filling = empty(got, dict.fromkeys(STEP_TOTALS, (jnp.zeros(()), jnp.zeros(())))).replace(kept=got)
    rollout, _ = filled_batch(parts, filling, pool_of(parts, CASES["surplus"]))
    rewards = got.scores.values.reshape(GROUPS, SIZE)
    centred = rewards - rewards.mean(1, keepdims=True)
    want = centred.ravel() / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(rollout.advantages[:, 0], want, rtol=1e-4)
    assert not np.allclose(rollout.advantages, got.advantages, rtol=1e-2)


class Judge:
    """A host reward that ties the groups of some dataset rows, counts what it scored, and fails when told to."""

    def __init__(self):
        self.scored, self.fail = [], False

    def __call__(self, prompts, completion_ids, **columns):
        if self.fail:
            raise RuntimeError("told to")
        self.scored += [tuple(ids) for ids in completion_ids]
        ties = {tiny.ROWS[0]["prompt"], tiny.ROWS[1]["prompt"]}
        return [0.0 if p in ties else sum(ids) / 50 for p, ids in zip(prompts, completion_ids, strict=True)]


@pytest.mark.parametrize(
    ("mode", "data"),
    [("fused", 1), *(pytest.param(*other, marks=pytest.mark.slow) for other in (("fused", 2), ("staged", 1)))],
)
def test_host_rewards_inside_the_loop(mode, data):
    config = tiny.config(
        **{**FIELDS, "data.pool_factor": 2, "rewards.names": ("referee",), "step.mode": mode, "mesh.data": data}
    )
    judge = Judge()
    parts = bigram.parts(config, callables={"referee": judge})
    program = Program(parts, state_of(parts))
    pool = tiny.prompts(dataclasses.replace(config, data=dataclasses.replace(config.data, prompts_per_step=8)))
    _, metrics, rollout = jax.device_get(program(state_of(parts), tiny.on_mesh(pool, parts.mesh)))
    means = divide(metrics.means)
    tied = np.isin(pool.row, (0, 1)).reshape(GROUPS, 2).T  # by round
    assert means["pool/rounds"] == 2 and means["pool/sampled"] == 8 and means["pool/without_signal"] >= tied.sum()
    assert len(judge.scored) == 16 and not metrics.failed, "each completion is scored once"
    filled = int(rollout.weight.sum())
    want = [sum(t[:n].tolist()) / 50 for t, n in zip(rollout.tokens, rollout.lengths, strict=True)]
    np.testing.assert_allclose(rollout.scores.values[:filled, 0], want[:filled], rtol=1e-5)
    judge.fail = True
    state, metrics, _ = jax.device_get(program(state_of(parts), tiny.on_mesh(pool, parts.mesh)))
    assert metrics.failed and state.skipped == 1 and divide(metrics.means)["pool/rounds"] == 1
    assert "told to" in str(parts.scorer.host.take_error())


def test_resumed_equals_uninterrupted():
    """Two steps, a trip through host memory, one step: the bits of three. A step's pool is a function of its number."""
    parts, program = program_of()

    def pool(number):
        config = tiny.config(**{**FIELDS, "data.prompts_per_step": GROUPS * FACTOR})
        prompts = tiny.prompts(config, number * GROUPS * FACTOR)
        return tiny.on_mesh(prompts.replace(columns={"signal": (prompts.draw % 5 > 2).astype(np.float32)}), parts.mesh)

    def run(state, numbers):
        for number in numbers:
            state, metrics, rollout = program(state, pool(number))
        return state, metrics, rollout

    whole = jax.device_get(run(state_of(parts), range(3)))
    layout = jax.tree.map(lambda x: x.sharding, state_of(parts))
    half = jax.device_put(jax.device_get(run(state_of(parts), range(2))[0]), layout)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run(half, [2])), whole)
    assert whole[0].draws == 3 * GROUPS * FACTOR


def test_what_cannot_be_selected_is_refused():
    with pytest.raises(InputError, match="data.pool_factor=2 selects groups by their advantages.*set it to 1"):
        parts_of(2, **{"objective.baseline": "value"})
    with pytest.raises(InputError, match="data.pool_factor=0 must be positive"):
        parts_of(0)
