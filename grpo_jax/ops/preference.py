"""Losses on pairs of a chosen and a rejected answer (direct preference optimisation)."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.config import DpoConfig
from grpo_jax.ops.masked import masked_select, safe_divide


def sequence_logps(logps: Float[Array, "B T"], mask: Float[Array, "B T"], loss_type: str) -> Float[Array, "B"]:
    """Log-probability of each answer: the sum over its tokens, for `ipo` their mean (as TRL has it)."""
    total = jnp.sum(masked_select(logps, mask), axis=1)
    return safe_divide(total, jnp.sum(mask, axis=1)) if loss_type == "ipo" else total


def dpo_losses(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"],
    config: DpoConfig,
) -> tuple[Float[Array, "B"], dict[str, Float[Array, "B"]]]:
    """Loss and metrics of each pair, from log-probabilities of its answers under policy and reference.

    With m = (chosen - ref_chosen) - (rejected - ref_rejected), by `loss_type`:

    - `sigmoid`: -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), arXiv 2305.18290 eq. 7, with label smoothing e
      (conservative DPO).
    - `ipo`: (m - 1 / (2 beta))^2, arXiv 2310.12036 eq. 17.

    Metrics: the implicit rewards beta (log pi - log pi_ref) of both answers, their margin, and whether it is above 0.
    The reference carries no gradient.
    """
    chex.assert_equal_shape([chosen, rejected, ref_chosen, ref_rejected])
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    rewards = config.beta * (chosen - ref_chosen), config.beta * (rejected - ref_rejected)
    losses = PAIR_LOSSES[config.loss_type]((chosen - ref_chosen) - (rejected - ref_rejected), config)
    margins = rewards[0] - rewards[1]
    metrics = {
        "chosen": rewards[0],
        "rejected": rewards[1],
        "margin": margins,
        "accuracy": (margins > 0).astype(margins.dtype),
    }
    return losses, jax.lax.stop_gradient(metrics)


def _sigmoid(margins: Float[Array, "B"], config: DpoConfig) -> Float[Array, "B"]:
    smoothing = config.label_smoothing
    right = jax.nn.log_sigmoid(config.beta * margins)
    return -(1.0 - smoothing) * right - smoothing * jax.nn.log_sigmoid(-config.beta * margins)


def _squared(margins: Float[Array, "B"], config: DpoConfig) -> Float[Array, "B"]:
    return jnp.square(margins - 1.0 / (2.0 * config.beta))


PAIR_LOSSES: dict[str, Callable[[Float[Array, "B"], DpoConfig], Float[Array, "B"]]] = {
    "sigmoid": _sigmoid,
    "ipo": _squared,
}
