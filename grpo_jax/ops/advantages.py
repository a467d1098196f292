"""Advantages of groups: how much better a completion did than the others of its prompt."""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.masked import masked_mean, masked_select, safe_divide


def advantages(
    rewards: Float[Array, "B"],
    group_size: int,
    config: ObjectiveConfig,
    weight: Float[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Rewards relative to their group, A = (r - mean_g) / (s + advantage_epsilon).

    s is, by `scale_rewards`: `group`, the standard deviation of the group (DeepSeekMath, arXiv 2402.03300, 4.1.2);
    `batch`, that of all rewards (Lite-PPO, 2508.08221); `none`, A = r - mean_g undivided (Dr. GRPO, 2503.20783).
    Standard deviations have ddof 1. A group whose rewards tie has advantages of exactly 0. Rows of weight 0 get 0
    and influence nothing. Rows of a group are adjacent.
    """
    groups, present = _by_group(rewards, group_size, weight)
    statistics = group_statistics(rewards, group_size, weight)
    centred = masked_select(groups - statistics["mean"][:, None], present)
    if config.scale_rewards == "none":
        scaled = centred
    else:
        deviation = {
            "group": statistics["std"][:, None],
            "batch": _standard_deviation(groups, present, axis=(0, 1)),
        }[config.scale_rewards]
        scaled = safe_divide(centred, deviation + config.advantage_epsilon)
    # By the formula alone a tie is not 0 in float32: eight rewards of 0.1 give -0.41 with epsilon 1e-8.
    return masked_select(scaled, ~statistics["tied"][:, None]).reshape(-1)


def group_statistics(
    rewards: Float[Array, "B"], group_size: int, weight: Float[Array, "B"] | None = None
) -> dict[str, Float[Array, "N"] | Bool[Array, "N"]]:
    """Mean, standard deviation (`std`, ddof 1) and `tied` (all rewards equal) of each group of adjacent rows.

    Rows of weight 0 are left out; a group that has only such rows has mean 0, deviation 0 and is not tied, so that
    counts of tied groups hold real prompts only.
    """
    groups, present = _by_group(rewards, group_size, weight)
    highest = jnp.max(groups, axis=1, where=present, initial=-jnp.inf)
    lowest = jnp.min(groups, axis=1, where=present, initial=jnp.inf)
    return {
        "mean": masked_mean(groups, present, axis=1),
        "std": _standard_deviation(groups, present, axis=(1,)),
        "tied": highest == lowest,
    }


def _by_group(
    rewards: Float[Array, "B"], group_size: int, weight: Float[Array, "B"] | None
) -> tuple[Float[Array, "N G"], Bool[Array, "N G"]]:
    """Rewards as one row a group, and which of them count."""
    chex.assert_rank(rewards, 1)
    if rewards.shape[0] % group_size:
        raise ValueError(f"{group_size=} must divide the {rewards.shape[0]} rewards")
    weight = jnp.ones_like(rewards) if weight is None else weight
    chex.assert_equal_shape([rewards, weight])
    return rewards.reshape(-1, group_size), weight.reshape(-1, group_size) != 0


def _standard_deviation(
    x: Float[Array, "N G"], present: Bool[Array, "N G"], axis: tuple[int, ...]
) -> Float[Array, "..."]:
    """Over the present ones, ddof 1; 0 for fewer than two."""
    mean = masked_mean(x, present, axis=axis)
    squares = masked_select(jnp.square(x - jnp.expand_dims(mean, axis)), present)
    count = jnp.sum(present, axis=axis, dtype=x.dtype)
    return jnp.sqrt(safe_divide(jnp.sum(squares, axis=axis), jnp.maximum(count - 1, 0)))
