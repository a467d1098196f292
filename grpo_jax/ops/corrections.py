"""Corrections between the law that sampled and the law that is trained: importance weights, truncated or masked.

The sampler may draw from another law than the trainer differentiates: after top-k and top-p, with a bfloat16 cache, or
from parameters that are some updates old. The weight of a token is w = pi_old / pi_sampler, pi_old by the trainer's own
pass before its first update. It multiplies the policy term (truncated: https://fengyao.notion.site/off-policy-rl;
masked: arXiv 2510.18855).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.masked import masked_select
from grpo_jax.ops.objectives import bounded_exp, k3, log_ratios


def correction_weights(
    logps: Float[Array, "*rows T"],
    sampled_logps: Float[Array, "*rows T"],
    mask: Float[Array, "*rows T"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, "*rows T"], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """Weights by `config.correction`, and metrics as (sum, count); no gradient, 0 in masked cells.

    w is exp(logps - sampled_logps) of the token, or of the whole row for `sequence_*`, the same for all its tokens.
    `*_truncate` holds it within correction_min and correction_max (0: no bound above), `*_mask` makes it 0 outside:
    that by token is IcePop. Metrics are means over tokens: the weight, the share outside the bounds, and k3 of the
    sampling law to the training law.
    """
    scale, _, kind = config.correction.partition("_")
    difference = jax.lax.stop_gradient(log_ratios(logps, sampled_logps, mask))
    if scale == "sequence":
        difference = jnp.broadcast_to(jnp.sum(difference, axis=-1, keepdims=True), difference.shape)
    ratio = bounded_exp(difference)
    above = ratio > config.correction_max if config.correction_max else jnp.zeros_like(ratio, bool)
    below = ratio < config.correction_min
    if kind == "truncate":
        weights = jnp.where(above, config.correction_max, jnp.where(below, config.correction_min, ratio))
    else:
        weights = jnp.where(above | below, 0.0, ratio)
    weights = masked_select(weights.astype(logps.dtype), mask)
    by_token = {
        "correction/weight": weights,
        "correction/outside": (above | below).astype(logps.dtype),
        "correction/kl": k3(sampled_logps, logps, mask),
    }
    count = jnp.sum(mask != 0, dtype=logps.dtype)
    metrics = {name: (jnp.sum(masked_select(value, mask)), count) for name, value in by_token.items()}
    return weights, jax.lax.stop_gradient(metrics)
