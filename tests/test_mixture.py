"""A step on prompt sets with rewards of their own, against numpy: scores, advantages, metrics, calls, one program."""

import bigram
import jax
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.config import ObjectiveConfig
from grpo_jax.data.mixture import build_mixture
from grpo_jax.data.prompts import PromptSet, make_batch
from grpo_jax.metrics import CompileCounter, divide
from grpo_jax.ops.advantages import advantages
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.step import Program, train_step

NAMES = ("odd", "long", "judged", "kind")
SETS = (
    {"name": "sums", "path": "a", "rewards": ("odd", "long")},
    {"name": "talk", "path": "b", "rewards": ("judged", "long", "kind"), "reward_weights": (2.0, -1.0, 0.7)},
)
FIELDS = {
    "data.sets": SETS,
    "model.path": "somewhere",
    "rewards.names": NAMES,
    "rewards.weights": (1.0, 0.5, 1.0, 1.0),
    "rewards.late_names": ("kind",),
    "rewards.late_from": 2.0,
    "data.prompts_per_step": 4,
    "sampler.max_new_tokens": 4,
    "train.steps": 4,
    "optim.clip_norm": 0.0,
}
ROWS = [{**row, "set": name} for name in ("sums", "talk") for row in tiny.ROWS]


class Rewards:
    """Host rewards that remember the ids of what they were asked about."""

    def __init__(self):
        self.asked = {"judged": [], "kind": []}

    def judged(self, completions, completion_ids, set, **_):
        assert {*set} <= {"talk"}
        self.asked["judged"] += [tuple(ids) for ids in completion_ids]
        return [None if len(ids) == 2 else len(ids) * 0.1 for ids in completion_ids]

    def kind(self, completion_ids, **_):
        self.asked["kind"] += [tuple(ids) for ids in completion_ids]
        return [ids[0] / 10 for ids in completion_ids]


@pytest.fixture(scope="module")
def ran():
    """Four steps, fused and staged: rewards that were asked, rollouts, metrics, how often a step was made."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "ROWS", ROWS)
        for mode in ("fused", "staged"):
            config = tiny.config(**FIELDS, **{"step.mode": mode})
            rewards = Rewards()
            callables = {"judged": rewards.judged, "kind": rewards.kind}
            parts = bigram.parts(config, optimizer=optax.sgd(0.5), callables=callables)
            tokens = tuple(np.asarray(tiny.encode(row["prompt"]), np.int32) for row in ROWS)
            prompts = PromptSet(tuple(ROWS), tokens, {}, build_mixture(config, ROWS))
            state, out = tiny.state(parts, {"params": bigram.params()}), []
            program = Program(parts, state)
            with CompileCounter() as counter:
                for step in range(4):
                    batch = tiny.on_mesh(make_batch(prompts, 4 * step, 4, 0, True, 7), parts.mesh)
                    with jax.transfer_guard("disallow"):
                        state, metrics, rollout = program(state, batch)
                    out.append((divide(jax.device_get(metrics.means)), jax.device_get(rollout)))
                    before = {name: list(ids) for name, ids in rewards.asked.items()}
                    out[-1] += (before,)
            assert parts.scorer.host is not None and parts.scorer.host.take_error() is None
            found[mode] = (out, counter.traces["train_step"], parts, prompts)
    return found


def by_hand(rollout, step):
    """(values, applies, weights) [B, C] from the tokens and the set of each row."""
    talk = np.asarray(rollout.scores.rewards.member) == 1
    ids = [line[:n] for line, n in zip(rollout.tokens, rollout.lengths, strict=True)]
    values = np.array([[np.mean(x % 2), len(x) / 4, len(x) * 0.1, x[0] / 10] for x in ids])
    answered = np.array([len(x) != 2 for x in ids])
    late = step >= 2
    applies = np.stack([~talk, np.ones_like(talk), talk & answered, talk & late], axis=1)
    weights = np.where(talk[:, None], [0, -1.0, 2.0, 0.7 * late], [1.0, 0.5, 0, 0])
    return values * applies, applies, weights, talk


@pytest.mark.parametrize("mode", ["fused", "staged"])
def test_scores_advantages_and_metrics_against_numpy(ran, mode):
    out, _, parts, prompts = ran[mode]
    seen = 0
    for step, (metrics, rollout, _) in enumerate(out):
        values, applies, weights, talk = by_hand(rollout, step)
        order = prompts.mixture.order(np.arange(4 * step, 4 * step + 4), 0, True)
        assert (talk.reshape(4, 4)[:, 0] == (order >= 5)).all() and talk.sum() == 8
        np.testing.assert_allclose(rollout.scores.values, values, atol=1e-6)
        np.testing.assert_array_equal(rollout.scores.valid, applies)
        totals = (values * weights).sum(1)
        np.testing.assert_allclose(parts.scorer.total(rollout.scores), totals, atol=1e-6)
        groups = totals.reshape(4, 4)
        spread = groups.std(1, ddof=1, keepdims=True)
        want = np.where(spread > 1e-6, (groups - groups.mean(1, keepdims=True)) / (spread + 1e-4), 0).reshape(-1)
        np.testing.assert_allclose(rollout.advantages[:, 0], want, atol=1e-4)
        right = (values[:, 0] >= 1) & ~talk
        told = {
            "reward/total": totals.mean(),
            "solve_rate": right[~talk].mean(),
            "groups/all_wrong": (~right).reshape(4, 4)[~talk.reshape(4, 4)[:, 0]].all(1).sum(),
            "set_reward/sums": totals[~talk].mean(),
            "set_reward/talk": totals[talk].mean(),
            "set_solve_rate/sums": right[~talk].mean(),
            "set_length/talk": rollout.lengths[talk].mean(),
            "set_share/talk": 0.5,
            "reward/odd": values[~talk, 0].mean(),
            "reward/long": values[:, 1].mean(),
            "length/wrong": rollout.lengths[~talk & ~right].mean(),
        }
        if applies[:, 2].any():
            told["reward/judged"] = values[applies[:, 2], 2].mean()
        for name, value in told.items():
            assert metrics[name] == pytest.approx(value, abs=1e-5), name
        assert "set_solve_rate/talk" not in metrics and ("reward/kind" in metrics) == (step >= 2)
        seen += (applies[:, 2] != talk).sum()
    assert seen > 0, "some completion of `talk` had no verdict"


@pytest.mark.parametrize("mode", ["fused", "staged"])
def test_a_host_reward_is_asked_once_about_its_own_rows(ran, mode):
    out = ran[mode][0]
    want = {"judged": [], "kind": []}
    for step, (_, rollout, asked) in enumerate(out):
        talk = np.flatnonzero(np.asarray(rollout.scores.rewards.member) == 1)
        ids = [tuple(rollout.tokens[i, : rollout.lengths[i]].tolist()) for i in talk]
        want["judged"] += ids
        want["kind"] += ids if step >= 2 else []
        assert {name: sorted(found) for name, found in asked.items()} == {n: sorted(x) for n, x in want.items()}


def test_fused_is_staged_and_a_run_is_one_program(ran):
    (fused, traces, _, _), (staged, _, _, _) = ran["fused"], ran["staged"]
    assert traces == 1, "what begins late is data of the same program"
    for (metrics, rollout, _), (other, again, _) in zip(fused, staged, strict=True):
        np.testing.assert_array_equal(rollout.tokens, again.tokens)
        np.testing.assert_allclose(rollout.advantages, again.advantages, atol=1e-5)
        assert metrics["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_with_weights_by_row(aggregation):
    """GDPO normalises a component over the rows of a group that have it; one loop, no arrays."""
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (12, 3)).astype(np.float32)
    weights = np.repeat([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0], [0.3, 0.0, 1.0]], 4, axis=0).astype(np.float32)
    valid = (weights != 0).astype(np.float32)
    valid[5, 1] = valid[9] = 0
    config = ObjectiveConfig(multi_objective_aggregation=aggregation)
    got = jax.jit(lambda *x: advantages(x[0], 4, config, component_weights=x[1], valid=x[2]))(values, weights, valid)
    want = np.zeros(12)

    def relative(x):
        return (x - x.mean()) / (x.std(ddof=1) + 1e-4) if len(x) > 1 else 0 * x

    for group in range(3):
        rows = [i for i in range(4 * group, 4 * group + 4) if valid[i].any()]
        if aggregation == "sum_then_normalize":
            want[rows] = relative((np.float64(values) * weights * valid).sum(1)[rows])
        else:
            for c in range(3):
                own = [i for i in rows if valid[i, c]]
                want[own] += weights[own, c] * relative(np.float64(values[own, c]))
    if aggregation == "normalize_then_sum":
        rows = valid.any(1)
        want[rows] = (want[rows] - want[rows].mean()) / (want[rows].std(ddof=1) + 1e-4)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("fields", [{"data.pool_factor": 2}, {"objective.baseline": "value"}, {"mesh.data": 2}])
def test_other_steps_take_a_mixture(fields):
    """Traced, not compiled: pools, value models and several devices carry the rewards of rows."""
    config = tiny.config(
        **{**FIELDS, **fields, "rewards.names": ("odd", "long"), "rewards.weights": (1.0, 1.0)}
        | {
            "data.sets": tuple({**each, "rewards": ("odd", "long"), "reward_weights": ()} for each in SETS),
            "rewards.late_names": ("long",),
        }
    )
    parts = bigram.parts(config)
    tokens = tuple(np.asarray(tiny.encode(row["prompt"]), np.int32) for row in ROWS)
    prompts = PromptSet(tuple(ROWS), tokens, {}, build_mixture(config, ROWS))
    batch = make_batch(prompts, 0, config.draws_per_step, 0, True, 7)
    state = tiny.state(parts, {"params": bigram.params()})
    _, metrics, rollout = jax.eval_shape(lambda s, p: train_step(parts, s, p), state, batch)
    assert rollout.scores.rewards.weights.shape == (16, 2) and "set_reward/talk" in metrics.means


def test_held_out_scores_are_those_of_graded_rows_and_by_set(ran):
    _, _, parts, prompts = ran["staged"]
    evaluator = Evaluator(parts, prompts, parts.scorer, None)  # pyright: ignore[reportArgumentType]
    scores = ((1.0, 0.5, None, None), (None, 0.5, 1.0, 0.1), (None, 0.5, None, 0.3))
    records = [
        {
            "problem": problem,
            "rewards": dict(zip(NAMES, values, strict=True)),
            "language": problem / 10 if problem < 8 else None,
            "length": problem,
        }
        for problem, values in zip((0, 7, 8), scores, strict=True)
    ]
    assert evaluator.graded(records) == records[:1]
    told = evaluator.by_set(records)["sets"]
    assert told["sums"]["rewards"] == {"odd": 1.0, "long": 0.5}
    assert (told["sums"]["total"], told["sums"]["completions"]) == (1.25, 1)
    assert (told["talk"]["language"], told["talk"]["mean_length"]) == (0.7, 7.5), "row 8 has no words"
    assert told["talk"]["rewards"] == {"long": 0.5, "judged": 1.0, "kind": pytest.approx(0.2)}
    assert told["talk"]["total"] == pytest.approx(((-0.5 + 2 + 0.07) + (-0.5 + 0.21)) / 2)
