"""Losses on pairs against float64 numpy: values, gradients, and what stands in masked cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.errors import InputError
from grpo_jax.ops.preference import dpo_losses, sequence_logps

RANDOM = np.random.default_rng(0)
PAIRS = [RANDOM.normal(-5, 3, 6) for _ in range(4)]
PAIRS[0][5], PAIRS[1][5] = -2000.0, -10.0  # a margin far beyond what float32 can exponentiate


def by_hand(pairs, beta, kind, smoothing):
    """(losses, slope by the margin, implicit rewards of both answers), float64."""
    chosen, rejected, ref_chosen, ref_rejected = pairs
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "ipo":
        losses, slope = (margins - 1 / (2 * beta)) ** 2, 2 * (margins - 1 / (2 * beta))
    else:
        right, wrong = (np.logaddexp(0, -sign * beta * margins) for sign in (1, -1))  # -log sigmoid
        losses = (1 - smoothing) * right + smoothing * wrong
        slope = beta * (-(1 - smoothing) * (1 - np.exp(-right)) + smoothing * (1 - np.exp(-wrong)))
    return losses, slope, beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)


@pytest.mark.parametrize(
    ("beta", "kind", "smoothing"), [(0.1, "sigmoid", 0.0), (0.5, "sigmoid", 0.2), (0.1, "ipo", 0.0), (0.7, "ipo", 0.0)]
)
def test_losses_and_gradients(beta, kind, smoothing):
    fields = {"dpo.beta": beta, "dpo.loss_type": kind, "dpo.label_smoothing": smoothing}
    config = tiny.config(**fields).dpo
    losses, slope, chosen, rejected = by_hand(PAIRS, beta, kind, smoothing)

    def total(*pairs):
        losses, metrics = dpo_losses(*pairs, config)
        return jnp.sum(losses), (losses, metrics)

    given = [jnp.asarray(x, jnp.float32) for x in PAIRS]
    gradients, (got, metrics) = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*given)
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], slope, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradients[1], -slope, rtol=1e-4, atol=1e-7)
    assert not np.asarray(gradients[2]).any() and not np.asarray(gradients[3]).any(), "the reference is fixed"
    np.testing.assert_allclose(metrics["chosen"], chosen, rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected"], rejected, rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], chosen - rejected, rtol=1e-4)
    assert metrics["accuracy"].tolist() == (chosen > rejected).astype(float).tolist()
    assert 0 < metrics["accuracy"].mean() < 1


def test_sequences_are_summed_and_for_ipo_averaged():
    logps, mask = RANDOM.normal(-1, 1, (3, 4)).astype(np.float32), np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0] * 4])
    junk = np.where(mask, logps, np.nan)
    want = (logps * mask).sum(1)
    np.testing.assert_allclose(sequence_logps(junk, mask, "sigmoid"), want, rtol=1e-6)
    np.testing.assert_allclose(sequence_logps(junk, mask, "ipo"), want / [3, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["label_smoothing", "beta"])
def test_values_that_make_no_loss_are_refused(name):
    with pytest.raises(InputError, match=f"dpo.{name}="):
        tiny.config(**{f"dpo.{name}": {"label_smoothing": 0.5, "beta": 0.0}[name]})
