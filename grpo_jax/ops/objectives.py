"""The losses of the GRPO family: a per-token objective, a KL term, and an aggregation over tokens.

    loss = sum_bt w_bt (l_bt + beta k3_bt)

A quantity to minimise. `OBJECTIVES` holds l by `loss_type`, `AGGREGATIONS` holds w. w is cut in two: a factor that a
row knows by itself, inside the numerator, and a denominator that is computed before the batch is split. So numerators
of micro-batches add up to the loss of their minibatch, however it is cut.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.masked import masked_select, safe_divide

LOG_RATIO_LIMIT = 20.0  # e^20 = 4.9e8; float32 overflows at e^88.7, and a sum of squared gradients at half of that


class Terms(NamedTuple):
    """What some rows add to a loss: a numerator, and metrics as (sum, count); terms of several batches are added."""

    numerator: Float[Array, ""]
    metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def policy_loss(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    ref_logps: Float[Array, "B T"] | None,
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Float[Array, "B T"],
    config: ObjectiveConfig,
    weight: Float[Array, "B"] | None = None,
    max_completion_length: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss and mean metrics of a rollout that is one minibatch, by any `loss_type`, in float32 or float64.

    The arguments are those of `policy_loss_terms` and `denominators`; advantages may be one number a row.
    """
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], logps.shape)
    terms = policy_loss_terms(logps, old_logps, ref_logps, advantages, mask, config, weight)
    denominator = denominators(mask, mask, config, weight, weight, max_completion_length)
    return safe_divide(terms.numerator, denominator), mean_metrics(terms.metrics)


def policy_loss_terms(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    ref_logps: Float[Array, "b T"] | None,
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
    weight: Float[Array, "b"] | None = None,
) -> Terms:
    """Numerator sum_bt u_bt (l_bt + beta k3_bt) and metric sums of any rows of a minibatch.

    u is `AGGREGATIONS[loss_type].token_weights` of the mask (0 or 1, holes allowed). Rows of `weight` 0 and masked
    cells add nothing, whatever stands there. Only `logps` carries a gradient. Metrics are sums over tokens:
    those of the objective, and `kl` (k3) where `ref_logps` is given, which beta > 0 asks for.
    """
    chex.assert_equal_shape([logps, old_logps, advantages, mask])
    if config.beta and ref_logps is None:
        raise ValueError(f"{config.beta=} needs ref_logps")
    mask = _row_mask(mask, weight).astype(logps.dtype)
    advantages = jax.lax.stop_gradient(masked_select(advantages.astype(logps.dtype), mask))
    old_logps, ref_logps = jax.lax.stop_gradient((old_logps, ref_logps))
    losses, metrics = OBJECTIVES[config.loss_type](logps, old_logps, advantages, mask, config)
    if ref_logps is not None:
        kl = k3(logps, ref_logps, mask)
        metrics = metrics | {"kl": kl}
        losses = losses + config.beta * kl if config.beta else losses
    token_weights = AGGREGATIONS[config.loss_type].token_weights(mask)
    tokens = jnp.sum(mask)
    sums = {name: (jnp.sum(masked_select(value.astype(mask.dtype), mask)), tokens) for name, value in metrics.items()}
    return Terms(jnp.sum(token_weights * masked_select(losses, mask)), jax.lax.stop_gradient(sums))


def denominators(
    mask: Float[Array, "b T"],
    rollout_mask: Float[Array, "B T"],
    config: ObjectiveConfig,
    weight: Float[Array, "b"] | None = None,
    rollout_weight: Float[Array, "B"] | None = None,
    max_completion_length: int | None = None,
) -> Float[Array, ""]:
    """What divides the summed numerators of one optimizer minibatch (`mask`, `weight`) of a rollout.

    - `grpo`: rows of the minibatch, those with no token included (TRL's convention; filler rows are not).
    - `bnpo`: tokens of the minibatch.
    - `dapo`: tokens of the whole rollout / number of minibatches (B / b). One update a rollout divides by all its
      tokens; with M updates each divides by an M-th of them, so that a step is as long as bnpo's in expectation, and
      the same for every token of the rollout, in whichever minibatch it falls.
    - `dr_grpo`: rows of the minibatch x `max_completion_length` (T, the budget of the sampler, unless given).

    It may be 0 (all masked): divide with `safe_divide`.
    """
    chex.assert_equal_shape_suffix([mask, rollout_mask], 1)
    rows = jnp.ones(mask.shape[0], mask.dtype) if weight is None else weight
    batch = _Batch(
        mask=_row_mask(mask, weight),
        weight=rows,
        rollout_mask=_row_mask(rollout_mask, rollout_weight),
        max_completion_length=mask.shape[1] if max_completion_length is None else max_completion_length,
    )
    return AGGREGATIONS[config.loss_type].denominator(batch)


def add_terms(a: Terms, b: Terms) -> Terms:
    """The terms of the rows of both."""
    return jax.tree.map(jnp.add, a, b)


def mean_metrics(metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]) -> dict[str, Float[Array, ""]]:
    """Each (sum, count) divided, 0 where nothing was counted."""
    return {name: safe_divide(total, count) for name, (total, count) in metrics.items()}


def clipped_surrogate(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, "b T"], dict[str, Array]]:
    """PPO's surrogate by token, l = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) with r = exp(new - old).

    d l / d new = -r A, and 0 where A > 0 and r > 1 + epsilon_high or A < 0 and r < 1 - epsilon. PPO is arXiv
    1707.06347 eq. 7, GRPO 2402.03300 eq. 3, the two bounds DAPO 2503.14476 eq. 10. Metrics by token: the clip
    fractions, the share of ratios outside the bounds whatever the sign of A, the ratio, and `approx_kl`, k3 of the
    policy that sampled to the policy now (zero at the first update of a rollout).
    """
    ratio = bounded_exp(log_ratios(logps, old_logps, mask))
    low, high = 1.0 - config.epsilon, 1.0 + config.epsilon_high
    clipped_low = (advantages < 0) & (ratio < low)
    clipped_high = (advantages > 0) & (ratio > high)
    # Chosen by `where` and not by `min`: at r = 1 both arms are equal, and the gradient of a tie is a matter of taste.
    bounded = jnp.where(clipped_low, low, jnp.where(clipped_high, high, ratio))
    return -bounded * advantages, {
        "clip_fraction": clipped_low | clipped_high,
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "ratio_outside_fraction": (ratio < low) | (ratio > high),
        "ratio": ratio,
        "approx_kl": k3(old_logps, logps, mask),
    }


def k3(logps: Float[Array, "b T"], ref_logps: Float[Array, "b T"], mask: Float[Array, "b T"]) -> Float[Array, "b T"]:
    """Schulman's estimate of KL(new || ref), exp(ref - new) - (ref - new) - 1, never negative; 0 in masked cells.

    http://joschu.net/blog/kl-approx.html and arXiv 2402.03300 eq. 4. Its gradient is 1 - exp(ref - new), with exp
    bounded as `bounded_exp` says.
    """
    difference = log_ratios(ref_logps, logps, mask)
    near = jnp.minimum(difference, LOG_RATIO_LIMIT)
    # expm1: in float32 exp(d) - 1 of d = 1e-7 is wrong by d itself, and equal policies must read a KL below 1e-9.
    return jnp.expm1(near) + jnp.exp(near) * (difference - near) - difference


def bounded_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) up to LOG_RATIO_LIMIT, beyond it the tangent there: finite, rising, with a gradient of the right sign.

    A clamp of x has no gradient beyond the limit, and would leave the tokens that are furthest off untouched.
    """
    near = jnp.minimum(x, LOG_RATIO_LIMIT)
    return jnp.exp(near) * (1.0 + (x - near))


def log_ratios(
    logps: Float[Array, "b T"], old_logps: Float[Array, "b T"], mask: Float[Array, "b T"]
) -> Float[Array, "b T"]:
    """The differences logps - old_logps, and 0 in masked cells before anything is exponentiated."""
    return masked_select(logps - old_logps, mask)


class _Batch(NamedTuple):
    """What a denominator may be made of; the masks are 0 in rows of weight 0."""

    mask: Float[Array, "b T"]
    weight: Float[Array, "b"]
    rollout_mask: Float[Array, "B T"]
    max_completion_length: int


class Aggregation(NamedTuple):
    """How token losses become a loss: a weight that each row knows by itself, and what divides the sum."""

    token_weights: Callable[[Float[Array, "b T"]], Float[Array, "b T"]]
    denominator: Callable[[_Batch], Float[Array, ""]]


def _row_mask(mask: Float[Array, "b T"], weight: Float[Array, "b"] | None) -> Float[Array, "b T"]:
    return mask if weight is None else mask * weight[:, None]


def _every_token(mask: Float[Array, "b T"]) -> Float[Array, "b T"]:
    return mask


def _row_mean(mask: Float[Array, "b T"]) -> Float[Array, "b T"]:
    """By row m / n_b, 0 in a row without tokens."""
    return safe_divide(mask, jnp.sum(mask, axis=1, keepdims=True))


def _rows(batch: _Batch) -> Float[Array, ""]:
    return jnp.sum(batch.weight)


def _minibatch_tokens(batch: _Batch) -> Float[Array, ""]:
    return jnp.sum(batch.mask)


def _rollout_tokens_by_minibatch(batch: _Batch) -> Float[Array, ""]:
    return jnp.sum(batch.rollout_mask) * (batch.mask.shape[0] / batch.rollout_mask.shape[0])


def _row_budget(batch: _Batch) -> Float[Array, ""]:
    return jnp.sum(batch.weight) * batch.max_completion_length


OBJECTIVES: dict[str, Callable[..., tuple[Float[Array, "b T"], dict[str, Array]]]] = {
    "grpo": clipped_surrogate,
    "bnpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
}

AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": Aggregation(_row_mean, _rows),
    "bnpo": Aggregation(_every_token, _minibatch_tokens),
    "dapo": Aggregation(_every_token, _rollout_tokens_by_minibatch),
    "dr_grpo": Aggregation(_every_token, _row_budget),
}
