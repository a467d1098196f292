"""Advantages against the golden numbers and a numpy oracle; ties are exactly 0; filler rows have no influence."""

import functools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.advantages import advantages, group_statistics

CONVENTIONS = {
    "std_ddof1_eps1e-4": ObjectiveConfig(scale_rewards="group", advantage_epsilon=1e-4),
    "std_ddof1_eps1e-6": ObjectiveConfig(scale_rewards="group", advantage_epsilon=1e-6),
    "batch_std_ddof1_eps1e-4": ObjectiveConfig(scale_rewards="batch", advantage_epsilon=1e-4),
    "std_ddof0_eps1e-8": ObjectiveConfig(scale_rewards="group", advantage_epsilon=1e-8, advantage_ddof=0),
    "mean_only": ObjectiveConfig(scale_rewards="none"),
    "leave_one_out": ObjectiveConfig(scale_rewards="none", baseline="leave_one_out"),
}
DTYPES = {"float32": (2e-4, 2e-6), "float64": (1e-9, 1e-12)}
compute = advantages  # not jitted: a compile for each config adds up
compiled = jax.jit(advantages, static_argnums=(1, 2))


def oracle(rewards, group_size, scale_rewards="group", epsilon=1e-4, baseline="group", ddof=1, normalize=False):
    """Plain numpy; a tie is told by set(), not by max == min."""
    r = np.asarray(rewards, np.float64)
    groups = r.reshape(-1, group_size)
    out = np.zeros_like(groups)
    for n, group in enumerate(groups):
        for i, x in enumerate(group):
            others = np.delete(group, i)
            taken = {"group": group.mean(), "leave_one_out": others.mean(), "batch": r.mean(), "none": 0.0}[baseline]
            divisor = {"group": group.std(ddof=ddof) + epsilon, "batch": r.std(ddof=ddof) + epsilon, "none": 1.0}
            out[n, i] = (x - taken) / (divisor[scale_rewards] or 1.0)
        if len(set(group)) == 1 and baseline in ("group", "leave_one_out"):
            out[n] = 0
    if normalize:
        out = (out - out.mean()) / (out.std(ddof=ddof) + epsilon)
    return out.reshape(-1)


ESTIMATORS = {
    "group": {},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "deepseekmath": {"advantage_epsilon": 0.0, "advantage_ddof": 0},
    "rloo": {"baseline": "leave_one_out", "scale_rewards": "none"},
    "leave_one_out_scaled": {"baseline": "leave_one_out", "scale_rewards": "group"},
    "reinforce": {"baseline": "none", "scale_rewards": "none"},
    "reinforce_plus_plus": {"baseline": "batch", "scale_rewards": "batch"},
    "reinforce_plus_plus_normalized": {"baseline": "none", "scale_rewards": "none", "normalize_advantages": True},
    "reinforce_plus_plus_baseline": {"scale_rewards": "none", "normalize_advantages": True},
}


def estimator(name, **more):
    return ObjectiveConfig(**{"advantage_epsilon": 1e-3, **ESTIMATORS[name], **more})


def oracle_of(rewards, group_size, c):
    return oracle(
        rewards, group_size, c.scale_rewards, c.advantage_epsilon, c.baseline, c.advantage_ddof, c.normalize_advantages
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(shared_dir, dtype):
    relative, absolute = DTYPES[dtype]
    cases = json.loads((shared_dir / "golden" / "golden_grpo.json").read_text())["cases"]
    assert len(cases) >= 15
    for case in cases:
        with jax.enable_x64(dtype == "float64"):
            rewards = jnp.array(case["inputs"]["rewards"], dtype)
            got = by_convention(rewards, case["inputs"]["group_size"])
        for convention in CONVENTIONS:
            assert got[convention].dtype == dtype
            want = np.array(case["expected"]["advantages"][convention])
            tolerance = relative * abs(want) + absolute * max(1.0, abs(want).max())
            error = abs(np.asarray(got[convention], np.float64) - want)
            assert np.all(error <= tolerance), (case["name"], convention)


@functools.partial(jax.jit, static_argnums=1)
def by_convention(rewards, group_size):
    return {name: advantages(rewards, group_size, config) for name, config in CONVENTIONS.items()}


@pytest.mark.parametrize(("name", "group_size"), [*((name, 4) for name in ESTIMATORS), ("group", 2), ("rloo", 2)])
def test_against_numpy(name, group_size):
    rewards = np.random.default_rng(group_size).choice([0.0, 0.2, 1.0, 1.2], 12)
    rewards[:group_size], rewards[group_size] = 0.2, 5.0
    config = estimator(name)
    want = oracle_of(rewards, group_size, config)
    with jax.enable_x64(True):
        got = compute(jnp.array(rewards), group_size, config)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)
    got = compute(jnp.array(rewards, jnp.float32), group_size, config)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    if config.baseline in ("group", "leave_one_out"):
        assert np.all(np.asarray(got)[:group_size] == 0)  # it ties


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "reinforce"])
def test_a_batch_that_ties_is_exactly_zero(name):
    """Plain REINFORCE has no baseline: there rewards of 0.1 are advantages of 0.1."""
    rewards = jnp.full(12, 0.1)
    got = compiled(rewards, 4, estimator(name, advantage_epsilon=1e-8))
    np.testing.assert_array_equal(got, np.zeros(12))
    np.testing.assert_array_equal(compute(rewards, 4, estimator("reinforce")), rewards)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_tie_is_exactly_zero_in_float32(scale_rewards):
    def formula(r):  # what ties would give without the rule
        return (r - jnp.mean(r)) / (jnp.std(r, ddof=1) + 1e-8)

    assert jnp.any(formula(jnp.full(8, 0.1)) != 0)
    config = ObjectiveConfig(scale_rewards=scale_rewards, advantage_epsilon=1e-8)
    values = np.array([0.1, 0.9, 1 / 3, 1.2, -0.7, 1e6, 0.0], np.float32)
    for group_size in (3, 8):
        rewards = np.concatenate([values.repeat(group_size), np.arange(group_size, dtype=np.float32)])
        got = np.asarray(compiled(rewards, group_size, config))
        np.testing.assert_array_equal(got[:-group_size], 0.0)
        assert np.all(np.isfinite(got)) and got[-1] > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_filler_rows_influence_nothing(name):
    config = estimator(name)
    rewards = jnp.array([0.0, 1.0, 0.2, 1.2, 1.2, 0.0])
    want = compute(rewards, 3, config)
    filler = jnp.array([np.nan, 1e30, -np.inf])
    mixed = jnp.concatenate([rewards[:3], filler, rewards[3:], filler])
    weight = jnp.array([1.0] * 3 + [0.0] * 3 + [1.0] * 3 + [0.0] * 3)
    got = compute(mixed, 3, config, weight)
    np.testing.assert_array_equal(got[weight == 0], 0.0)
    np.testing.assert_allclose(got[weight == 1], want, rtol=1e-5, atol=1e-7)


def test_advantages_of_zero_epsilon_and_of_filler_only_are_finite():
    config = ObjectiveConfig(scale_rewards="group", advantage_epsilon=0.0)
    np.testing.assert_allclose(compute(jnp.array([0.0, 1.0, 5.0, 5.0]), 2, config), [-(0.5**0.5), 0.5**0.5, 0, 0])
    np.testing.assert_array_equal(compute(jnp.ones(4), 2, config, jnp.zeros(4)), np.zeros(4))


def test_the_epsilon_is_added_to_the_deviation():
    got = compute(jnp.array([0.0, 1.0]), 2, ObjectiveConfig(advantage_epsilon=1.0))
    np.testing.assert_allclose(got, np.array([-0.5, 0.5]) / (0.5**0.5 + 1), rtol=1e-6)


def test_group_statistics():
    rewards = jnp.array([1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 0.1, 0.1, 0.1, np.nan, 7.0, 7.0])
    got = jax.jit(group_statistics, static_argnums=1)(rewards, 3, jnp.array([1.0] * 9 + [0.0] * 3))
    np.testing.assert_array_equal(got["tied"], [True, False, True, False])
    np.testing.assert_allclose(got["mean"], [1.0, 0.5, 0.1, 0.0], rtol=1e-6)
    np.testing.assert_allclose(got["std"], [0.0, 0.5, 0.0, 0.0], atol=1e-7)
    assert got["mean"].shape == got["std"].shape == got["tied"].shape == (4,)


def test_groups_must_divide_the_rewards():
    with pytest.raises(ValueError, match=r"group_size=4 must divide the 6 rewards"):
        advantages(jnp.ones(6), 4, ObjectiveConfig())


# Several rewards.


def gdpo(values, valid, weights, group_size, epsilon):
    """Each reward normalised in its group over the rows that it applies to; their weighted sum over the batch."""
    total = np.zeros(len(values))
    for c, factor in enumerate(weights):
        for start in range(0, len(values), group_size):
            rows = [b for b in range(start, start + group_size) if valid[b, c]]
            group = values[rows, c]
            if len(set(group)) > 1:
                total[rows] += factor * (group - group.mean()) / (group.std(ddof=1) + epsilon)
    scorable = valid.any(axis=1)
    known = total[scorable]
    return np.where(scorable, (total - known.mean()) / (known.std(ddof=1) + epsilon), 0)


def several(seed=0):
    random = np.random.default_rng(seed)
    values = random.choice([0.0, 0.5, 1.0], (12, 3))
    values[:4] = 0.3  # a group that ties in every component
    valid = (random.random((12, 3)) < 0.8).astype(float)
    valid[:4], valid[5] = 1, 0  # and a row to which none applies
    return values, valid, (1.0, 0.2, -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_rewards_against_numpy(dtype):
    relative, absolute = DTYPES[dtype]
    values, valid, weights = several()
    with jax.enable_x64(dtype == "float64"):
        given = jnp.array(np.where(valid, values, np.nan), dtype)
        got = {
            way: advantages(
                given,
                4,
                ObjectiveConfig(multi_objective_aggregation=way),
                component_weights=weights,
                valid=jnp.array(valid, dtype),
            )
            for way in ("sum_then_normalize", "normalize_then_sum")
        }
        assert all(x.dtype == dtype and np.all(np.asarray(x)[:4] == 0) and x[5] == 0 for x in got.values())
    want = gdpo(values, valid, weights, 4, 1e-4)
    np.testing.assert_allclose(got["normalize_then_sum"], want, rtol=relative, atol=10 * absolute)
    total = (values * valid * np.array(weights)).sum(axis=1)
    rest = np.delete(total[4:8], 1)  # the row without a reward has no say in its group
    want = np.concatenate([np.zeros(4), np.zeros(4), oracle(total[8:], 4)])
    want[[4, 6, 7]] = (rest - rest.mean()) / (rest.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(got["sum_then_normalize"], want, rtol=relative, atol=10 * absolute)


def test_several_rewards_that_collapse_in_their_sum_do_not_in_gdpo():
    """Two binary rewards: (1, 0) and (0, 1) have one sum, though the first is rarer (arXiv 2601.05242)."""
    values = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    of_sum, of_each = (
        np.asarray(advantages(values, 4, ObjectiveConfig(multi_objective_aggregation=way)))
        for way in ("sum_then_normalize", "normalize_then_sum")
    )
    assert of_sum[0] == of_sum[1] and of_each[0] > of_each[1] + 0.1
    np.testing.assert_allclose(
        advantages(values[:, :1], 4, ObjectiveConfig()), compute(values[:, 0], 4, ObjectiveConfig())
    )


# Process supervision.


def process_oracle(rewards, ends, group_size, epsilon=1e-4, ddof=1):
    """DeepSeekMath 4.1.3: normalise all step rewards of the group, sum those of the steps that end at t or later."""
    out = np.zeros(rewards.shape)
    for start in range(0, len(rewards), group_size):
        rows = range(start, start + group_size)
        steps = [rewards[b, t] for b in rows for t in np.nonzero(ends[b])[0]]
        if len(set(steps)) < 2:
            continue
        for b in rows:
            for t in range(rewards.shape[1]):
                later = [rewards[b, s] for s in np.nonzero(ends[b])[0] if s >= t]
                out[b, t] = sum((r - np.mean(steps)) / (np.std(steps, ddof=ddof) + epsilon) for r in later)
    return out


def test_process_supervision_against_numpy():
    random = np.random.default_rng(3)
    rewards, ends = random.choice([0.1, 0.4, 0.9], (9, 5)), random.random((9, 5)) < 0.5
    rewards[3:6], ends[3] = 0.1, False  # a group whose steps tie, with a row of no step
    ends[0] = [True, False, False, False, False]  # one step, of one token
    with jax.enable_x64(True):
        given = jnp.array(np.where(ends, rewards, np.nan)), jnp.array(ends, float)
        got = advantages(given[0], 3, ObjectiveConfig(), step_ends=given[1])
        plain = advantages(given[0], 3, ObjectiveConfig(advantage_epsilon=0.0, advantage_ddof=0), step_ends=given[1])
        weight = jnp.array([1.0] * 6 + [0.0] * 3)
        filled = advantages(given[0], 3, ObjectiveConfig(), weight, step_ends=given[1])
    np.testing.assert_allclose(got, process_oracle(rewards, ends, 3), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(plain, process_oracle(rewards, ends, 3, 0.0, 0), rtol=1e-10, atol=1e-12)
    assert np.all(np.asarray(got)[3:6] == 0) and np.all(np.asarray(got)[0, 1:] == 0)
    np.testing.assert_array_equal(filled, np.where(np.arange(9)[:, None] < 6, got, 0))


def test_one_step_at_the_end_is_outcome_supervision():
    rewards = jnp.array([0.0, 1.0, 0.5, 0.2, 0.2, 0.2])
    at_end = jnp.zeros((6, 4)).at[:, 3].set(1)
    for name in ("group", "rloo", "batch", "reinforce_plus_plus_baseline"):
        got = advantages(rewards[:, None] * at_end, 3, estimator(name), step_ends=at_end)
        want = compute(rewards, 3, estimator(name))
        np.testing.assert_allclose(got, np.tile(np.asarray(want)[:, None], 4), rtol=1e-5, atol=1e-7)


# Properties.

REWARDS = strategies.lists(strategies.integers(-20, 20).map(lambda n: n / 8), min_size=12, max_size=12)
CENTRED = strategies.sampled_from([n for n in ESTIMATORS if n != "reinforce" and not n.endswith("_normalized")])
SETTINGS = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


def exact(rewards, config, group_size=4):
    with jax.enable_x64(True):
        return np.asarray(compute(jnp.array(rewards, jnp.float64), group_size, config))


@SETTINGS
@hypothesis.given(REWARDS, CENTRED, strategies.sampled_from([-3.0, 0.5, 100.0]))
def test_a_shift_of_all_rewards_changes_nothing(rewards, name, shift):
    config = estimator(name)
    np.testing.assert_allclose(exact(np.array(rewards) + shift, config), exact(rewards, config), rtol=1e-8, atol=1e-9)


@SETTINGS
@hypothesis.given(REWARDS, strategies.sampled_from(sorted(ESTIMATORS)), strategies.sampled_from([0.25, 3.0, 1000.0]))
def test_a_scale_of_all_rewards_cancels_where_a_deviation_divides(rewards, name, scale):
    config = estimator(name, advantage_epsilon=0.0)
    divided = config.scale_rewards != "none" or config.normalize_advantages
    hypothesis.assume(not divided or len(set(rewards)) > 1)
    want = exact(rewards, config) * (1.0 if divided else scale)
    np.testing.assert_allclose(exact(np.array(rewards) * scale, config), want, rtol=1e-8, atol=1e-9)


@SETTINGS
@hypothesis.given(REWARDS, strategies.sampled_from(sorted(ESTIMATORS)), strategies.data())
def test_a_permutation_inside_a_group_permutes_its_advantages(rewards, name, data):
    order = np.concatenate([4 * g + np.array(data.draw(strategies.permutations(range(4)))) for g in range(3)])
    config = estimator(name)
    got = exact(np.array(rewards)[order], config)
    np.testing.assert_allclose(got, exact(rewards, config)[order], rtol=1e-9, atol=1e-10)


@SETTINGS
@hypothesis.given(REWARDS, CENTRED)
def test_advantages_of_a_group_or_batch_sum_to_zero(rewards, name):
    config = estimator(name)
    got = exact(rewards, config).reshape(3, 4)
    by = got.sum(axis=1) if config.baseline in ("group", "leave_one_out") else got.sum()
    np.testing.assert_allclose(by, np.zeros_like(by), atol=1e-8)
