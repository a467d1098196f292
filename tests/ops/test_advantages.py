"""Advantages against the golden numbers and a numpy oracle; ties are exactly 0; filler rows have no influence."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.advantages import advantages, group_statistics

CONVENTIONS = {
    "std_ddof1_eps1e-4": ObjectiveConfig(scale_rewards="group", advantage_epsilon=1e-4),
    "std_ddof1_eps1e-6": ObjectiveConfig(scale_rewards="group", advantage_epsilon=1e-6),
    "batch_std_ddof1_eps1e-4": ObjectiveConfig(scale_rewards="batch", advantage_epsilon=1e-4),
    "mean_only": ObjectiveConfig(scale_rewards="none"),
}
DTYPES = {"float32": (2e-4, 2e-6), "float64": (1e-9, 1e-12)}
compute = jax.jit(advantages, static_argnums=(1, 2))


def oracle(rewards, group_size, scale_rewards, epsilon):
    """Plain numpy; a tie is told by set(), not by max == min."""
    groups = np.asarray(rewards, np.float64).reshape(-1, group_size)
    out = np.zeros_like(groups)
    for n, group in enumerate(groups):
        if len(set(group)) > 1:
            deviation = {"group": group.std(ddof=1), "batch": groups.std(ddof=1), "none": None}[scale_rewards]
            centred = group - group.mean()
            out[n] = centred if deviation is None else centred / (deviation + epsilon)
    return out.reshape(-1)


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


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [2, 5])
def test_against_numpy(scale_rewards, group_size):
    rewards = np.random.default_rng(group_size).choice([0.0, 0.2, 1.0, 1.2], 6 * group_size)
    rewards[:group_size] = 0.2
    config = ObjectiveConfig(scale_rewards=scale_rewards, advantage_epsilon=1e-3)
    want = oracle(rewards, group_size, scale_rewards, 1e-3)
    with jax.enable_x64(True):
        np.testing.assert_allclose(compute(jnp.array(rewards), group_size, config), want, rtol=1e-12, atol=1e-14)
    got = compute(jnp.array(rewards, jnp.float32), group_size, config)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_tie_is_exactly_zero_in_float32(scale_rewards):
    def formula(r):  # what ties would give without the rule
        return (r - jnp.mean(r)) / (jnp.std(r, ddof=1) + 1e-8)

    assert jnp.any(formula(jnp.full(8, 0.1)) != 0)
    config = ObjectiveConfig(scale_rewards=scale_rewards, advantage_epsilon=1e-8)
    values = np.array([0.1, 0.9, 1 / 3, 1.2, -0.7, 1e6, 0.0], np.float32)
    for group_size in (3, 8):
        rewards = np.concatenate([values.repeat(group_size), np.arange(group_size, dtype=np.float32)])
        got = np.asarray(compute(rewards, group_size, config))
        np.testing.assert_array_equal(got[:-group_size], 0.0)
        assert np.all(np.isfinite(got)) and got[-1] > 0


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_filler_rows_influence_nothing(scale_rewards):
    config = ObjectiveConfig(scale_rewards=scale_rewards)
    rewards = jnp.array([0.0, 1.0, 0.2, 1.2, 1.2, 0.0])
    want = compute(rewards, 3, config)
    filler = jnp.array([np.nan, 1e30, -np.inf])
    mixed = jnp.concatenate([rewards[:3], filler, rewards[3:], filler])
    weight = jnp.array([1.0] * 3 + [0.0] * 3 + [1.0] * 3 + [0.0] * 3)
    got = compute(mixed, 3, config, weight)
    np.testing.assert_array_equal(got[weight == 0], 0.0)
    np.testing.assert_allclose(got[weight == 1], want, rtol=1e-6)


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
