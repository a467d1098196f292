"""Corrections between the sampling law and the training law: weights against numpy, and what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracle import correction_weights as oracle

from grpo_jax.config import ObjectiveConfig, SamplerConfig
from grpo_jax.ops.corrections import correction_weights
from grpo_jax.sampler.draw import draw_tokens

KINDS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BOUNDS = [(3.0, 0.0), (5.0, 0.5), (0.0, 0.0)]  # TRL's, IcePop's, none
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], float)


def laws(seed=0, junk=True):
    random = np.random.default_rng(seed)
    logps, sampled = (-random.exponential(1.0, MASK.shape) for _ in range(2))
    if junk:
        for x in (logps, sampled):
            x[MASK == 0] = random.choice([np.nan, np.inf, -np.inf, 1e30], (MASK == 0).sum())
    return logps, sampled


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_numpy(kind, dtype):
    for seed, (high, low) in enumerate(BOUNDS):
        config = ObjectiveConfig(correction=kind, correction_max=high, correction_min=low)
        logps, sampled = laws(seed)
        want = oracle(logps, sampled, MASK, config)
        free = oracle(
            np.nan_to_num(logps),
            np.nan_to_num(sampled),
            MASK,
            ObjectiveConfig(correction=kind.split("_")[0] + "_truncate", correction_max=0.0),
        )
        with jax.enable_x64(dtype == "float64"):
            given = [jnp.array(x, dtype) for x in (logps, sampled, MASK)]
            got, metrics = correction_weights(*given, config)
        assert got.dtype == dtype
        tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
        counted = MASK != 0
        outside = ((free < low) | (free > (high or np.inf)))[counted]
        means = {name: total / count for name, (total, count) in metrics.items()}
        assert means["correction/weight"] == pytest.approx(want[counted].mean(), rel=1e-4)
        assert means["correction/outside"] == pytest.approx(outside.mean())
        d = logps[counted] - sampled[counted]
        assert means["correction/kl"] == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_are_finite_and_equal_laws_have_weight_one(kind):
    config = ObjectiveConfig(correction=kind)
    x = jnp.full((2, 3), -0.7)
    np.testing.assert_array_equal(correction_weights(x, x, jnp.ones((2, 3)), config)[0], np.ones((2, 3)))
    far = jnp.array([[100.0, -100.0, 0.0], [1000.0, 1000.0, 1000.0]])
    for high in (3.0, 0.0):
        config = ObjectiveConfig(correction=kind, correction_max=high)
        weights, metrics = correction_weights(far, far * 0, jnp.ones((2, 3)), config)
        assert np.all(np.isfinite(weights)) and np.all(np.asarray(weights) >= 0)
        assert all(np.isfinite(value) for pair in metrics.values() for value in pair)
        assert not high or np.max(weights) <= high


def test_no_gradient_reaches_either_law():
    config = ObjectiveConfig(correction="token_truncate")
    x = jnp.full((2, 3), -0.7)
    grads = jax.grad(lambda a, b: jnp.sum(correction_weights(a, b, jnp.ones((2, 3)), config)[0]), (0, 1))(x, x * 2)
    assert all(np.all(np.asarray(g) == 0) for g in grads)


def mean_under_training_law(sampled_from, config, f):
    """Mean of w f over draws from a law, given by logits, for the training law that LOGITS give; and that of f."""

    @jax.jit
    def means():
        noise = jax.random.uniform(jax.random.key(0), (20_000, 2))
        logits = jnp.broadcast_to(sampled_from, (len(noise), len(LOGITS)))
        tokens, _, sampled = draw_tokens(logits, noise, SamplerConfig(**config))
        logps = jax.nn.log_softmax(LOGITS)[tokens][:, None]
        free = ObjectiveConfig(correction="token_truncate", correction_max=0.0)
        weights, _ = correction_weights(logps, sampled[:, None], jnp.ones_like(logps), free)
        return jnp.mean(weights[:, 0] * f[tokens]), jnp.mean(f[tokens])

    return tuple(map(float, means()))


LOGITS = jnp.array([1.0, 0.3, -0.2, 0.0, -2.0])
VALUES = jnp.array([1.0, -2.0, 0.5, 3.0, 0.0])


def test_a_stale_policy_is_corrected_in_expectation():
    stale = LOGITS + jnp.array([0.5, -0.4, 0.0, 0.6, -0.3])
    corrected, raw = mean_under_training_law(stale, {}, VALUES)
    want = float(jnp.sum(jax.nn.softmax(LOGITS) * VALUES))
    assert abs(corrected - want) < 0.05 < 0.2 < abs(raw - want)


def test_top_p_is_corrected_to_the_training_law_inside_its_nucleus():
    """What top-p never draws cannot be weighted: the mean over the kept tokens is theirs under the training law."""
    law = jax.nn.softmax(LOGITS)
    kept = law >= law[3]  # 0.45, 0.22 and 0.17: three tokens make 0.8
    corrected, raw = mean_under_training_law(LOGITS, {"top_p": 0.8}, VALUES)
    want = float(jnp.sum(jnp.where(kept, law * VALUES, 0)))
    assert abs(corrected - want) < 0.05 and abs(raw - want) > 0.05
