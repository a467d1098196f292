"""Token rewards, generalized advantages and the value loss against float64 numpy, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gae
import pytest

from grpo_jax.ops.gae import explained_variance, gae, token_rewards, value_losses, whiten

# Ragged rows, a hole, one token, none.
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.float32)
RANDOM = np.random.default_rng(0)
VALUES, OLD, RETURNS = (RANDOM.normal(0, 1, MASK.shape).astype(np.float32) for _ in range(3))
REWARDS = RANDOM.normal(0, 1, len(MASK)).astype(np.float32)


def junk(x):
    """What stands in masked cells reaches nothing."""
    return np.where(MASK != 0, x, np.where(np.arange(5) % 2, np.nan, np.inf)).astype(np.float32)


def test_rewards_by_token_are_the_penalty_and_the_outcome_at_the_last():
    penalty = RANDOM.normal(0, 0.1, MASK.shape).astype(np.float32)
    np.testing.assert_allclose(
        token_rewards(REWARDS, MASK, junk(penalty)), numpy_gae.token_rewards(REWARDS, MASK, penalty), atol=1e-6
    )
    np.testing.assert_allclose(
        token_rewards(REWARDS, MASK), numpy_gae.token_rewards(REWARDS, MASK, 0 * penalty), atol=1e-6
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.0, 1.0)])
def test_generalized_advantages_against_the_sum_of_their_definition(gamma, lam):
    rewards = numpy_gae.token_rewards(REWARDS, MASK, np.full(MASK.shape, 0.01))
    advantages, returns = jax.jit(lambda *given: gae(*given, gamma, lam))(junk(rewards), junk(VALUES), MASK)
    want = numpy_gae.gae(rewards, VALUES, MASK, gamma, lam)
    np.testing.assert_allclose(advantages, want, atol=2e-6)
    np.testing.assert_allclose(returns, np.where(MASK != 0, want + VALUES, 0), atol=2e-6)


def test_with_lambda_and_gamma_of_1_the_return_is_the_outcome():
    _, returns = gae(token_rewards(REWARDS, MASK), VALUES, MASK, 1.0, 1.0)
    np.testing.assert_allclose(returns, REWARDS[:, None] * MASK, atol=1e-5)


def test_advantages_and_returns_carry_no_gradient():
    def total(values):
        return sum(jnp.sum(x) for x in gae(token_rewards(REWARDS, MASK), values, jnp.asarray(MASK), 1.0, 0.9))

    assert not np.asarray(jax.jit(jax.grad(total))(jnp.asarray(VALUES))).any()


@pytest.mark.parametrize("clip", [0.0, 0.2, 1.0])
def test_value_loss_and_its_gradient(clip):
    far = VALUES.copy()
    far[0, 0], far[1, 1] = 1e6, OLD[1, 1]  # huge, and a tie of clipped and free
    v, o, r = (np.float64(x) for x in (far, OLD, RETURNS))
    bounded = (np.clip(v, o - clip, o + clip) - r) ** 2 if clip else np.zeros_like(v)
    want = np.where(MASK != 0, np.maximum((v - r) ** 2, bounded) / 2, 0)
    slope = np.where((MASK != 0) & ((v - r) ** 2 >= bounded), v - r, 0)

    def total(values):
        losses, clipped = value_losses(values, junk(OLD), junk(RETURNS), jnp.asarray(MASK), clip)
        return jnp.sum(losses), (losses, clipped)

    (_, (losses, clipped)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(junk(far)))
    np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped, (bounded > (v - r) ** 2) & (MASK != 0))
    assert clipped.any() == (clip > 0)


def test_whitened_advantages_have_mean_0_and_deviation_1_where_they_count():
    compute = jax.jit(whiten)
    white = np.asarray(compute(junk(VALUES), MASK))
    chosen = VALUES[MASK != 0]
    np.testing.assert_allclose(white[MASK != 0], (chosen - chosen.mean()) / chosen.std(ddof=1), rtol=1e-5, atol=1e-6)
    assert not white[MASK == 0].any()
    assert np.abs(compute(np.full(MASK.shape, 0.1, np.float32), MASK)).max() < 1e-3, "a tie, rounded"
    assert not np.asarray(compute(VALUES, np.zeros_like(MASK))).any()


def test_explained_variance():
    chosen = MASK != 0
    want = 1 - (RETURNS - VALUES)[chosen].var() / RETURNS[chosen].var()
    compute = jax.jit(explained_variance)
    assert float(compute(junk(VALUES), junk(RETURNS), MASK)) == pytest.approx(want, rel=1e-4)
    assert float(compute(RETURNS, RETURNS, MASK)) == 1.0
    assert float(compute(VALUES, np.ones_like(VALUES), MASK)) == 0.0
