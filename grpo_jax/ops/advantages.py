"""Advantages: how much better a completion, or a step of it, did than what it is compared with."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.masked import masked_mean, masked_select, safe_divide


def advantages(
    rewards: Float[Array, "B"] | Float[Array, "B C"] | Float[Array, "B T"],
    group_size: int,
    config: ObjectiveConfig,
    weight: Float[Array, "B"] | None = None,
    *,
    component_weights: Float[Array, "C"] | Float[Array, "B C"] | tuple[float, ...] | None = None,
    valid: Float[Array, "B C"] | None = None,
    step_ends: Float[Array, "B T"] | None = None,
) -> Float[Array, "B"] | Float[Array, "B T"]:
    """Advantages of rewards [B], of several rewards [B, C], or of step rewards [B, T] with `step_ends`.

    One reward: A = (r - b) / (s + advantage_epsilon), b by `baseline`, s by `scale_rewards` (standard deviation with
    `advantage_ddof`); with `normalize_advantages` then (A - mean) / (std + advantage_epsilon) over the batch.
    Several: their sum by `component_weights` (1 each; or each row's own), or with `normalize_then_sum` (GDPO, arXiv
    2601.05242) A of each by itself, the weighted sum of those, normalised over the batch. `valid` 0 is where a
    component does not apply; a row where none does counts as filler. Steps: DeepSeekMath, arXiv 2402.03300, 4.1.3: A of
    every step reward among those of its group, and at each token the sum over the steps that end there or later.

    Rows of a group are adjacent. Rewards that tie with all that they are compared with give exactly 0. Rows of weight 0
    get 0 and influence nothing.
    """
    if config.baseline == "value":
        raise ValueError("objective.baseline='value' needs values by token: see grpo_jax.ops.gae")
    weight = jnp.ones(rewards.shape[0], rewards.dtype) if weight is None else weight
    chex.assert_shape(weight, rewards.shape[:1])
    if rewards.shape[0] % group_size:
        raise ValueError(f"{group_size=} must divide the {rewards.shape[0]} rewards")
    if step_ends is not None:
        return _step_advantages(rewards, step_ends, group_size, config, weight)
    if rewards.ndim == 1:
        return _grouped(rewards, weight != 0, group_size, config)
    return _component_advantages(rewards, group_size, config, weight, component_weights, valid)


def group_statistics(
    rewards: Float[Array, "B"], group_size: int, weight: Float[Array, "B"] | None = None
) -> dict[str, Float[Array, "N"] | Bool[Array, "N"]]:
    """Mean, standard deviation (`std`, ddof 1) and `tied` (all rewards equal) of each group of adjacent rows.

    Rows of weight 0 are left out; a group that has only such rows has mean 0, deviation 0 and is not tied, so that
    counts of tied groups hold real prompts only.
    """
    weight = jnp.ones_like(rewards) if weight is None else weight
    groups, present = rewards.reshape(-1, group_size), weight.reshape(-1, group_size) != 0
    return {
        "mean": masked_mean(groups, present, axis=1),
        "std": _standard_deviation(groups, present, 1)[:, 0],
        "tied": _tied(groups, present)[:, 0],
    }


def _grouped(
    rewards: Float[Array, "B"], present: Bool[Array, "B"], group_size: int, config: ObjectiveConfig
) -> Float[Array, "B"]:
    """Outcome advantages of one reward."""
    return _relative(rewards.reshape(-1, group_size), present.reshape(-1, group_size), config).reshape(-1)


def _component_advantages(
    rewards: Float[Array, "B C"],
    group_size: int,
    config: ObjectiveConfig,
    weight: Float[Array, "B"],
    component_weights: Float[Array, "C"] | Float[Array, "B C"] | tuple[float, ...] | None,
    valid: Float[Array, "B C"] | None,
) -> Float[Array, "B"]:
    """Sum then normalise, or GDPO."""
    count = rewards.shape[1]
    factors = jnp.ones(count) if component_weights is None else jnp.asarray(component_weights)
    factors = factors.astype(rewards.dtype)
    present = jnp.broadcast_to((weight != 0)[:, None], rewards.shape)
    present = present if valid is None else present & (valid != 0)
    scorable = jnp.any(present, axis=1)
    if config.multi_objective_aggregation == "sum_then_normalize":
        return _grouped(jnp.sum(masked_select(rewards, present) * factors, axis=1), scorable, group_size, config)
    alone = dataclasses.replace(config, normalize_advantages=False)  # the sum is
    each = jax.vmap(lambda r, p: _grouped(r, p, group_size, alone), in_axes=1, out_axes=1)(rewards, present)
    total = jnp.sum(each * factors, axis=1)
    # A group in which every component ties: 0 before the mean of the batch, a rounding, is taken off.
    signal = jnp.any((each != 0).reshape(-1, group_size, count), axis=(1, 2))
    return masked_select(_normalized(total, scorable, config), jnp.repeat(signal, group_size))


def _step_advantages(
    rewards: Float[Array, "B T"],
    step_ends: Float[Array, "B T"],
    group_size: int,
    config: ObjectiveConfig,
    weight: Float[Array, "B"],
) -> Float[Array, "B T"]:
    """Process supervision: the steps of a group are compared with each other, and summed from each token on."""
    chex.assert_equal_shape([rewards, step_ends])
    present = (step_ends != 0) & (weight != 0)[:, None]
    groups = rewards.shape[0] // group_size
    steps = _relative(rewards.reshape(groups, -1), present.reshape(groups, -1), config).reshape(rewards.shape)
    return jnp.cumsum(steps[:, ::-1], axis=1)[:, ::-1]


def _relative(x: Float[Array, "N K"], present: Bool[Array, "N K"], config: ObjectiveConfig) -> Float[Array, "N K"]:
    """(x - baseline) / (deviation + epsilon) of the present ones, 0 elsewhere and where all that is compared ties.

    By the formula alone a tie is not 0 in float32: eight rewards of 0.1 give -0.41 with epsilon 1e-8.
    """
    by_group = config.baseline in ("group", "leave_one_out")
    count = jnp.sum(present, axis=1, keepdims=True, dtype=x.dtype)
    baseline = {
        "group": lambda: masked_mean(x, present, axis=1)[:, None],
        "leave_one_out": lambda: _mean_of_others(x, present, count),
        "batch": lambda: masked_mean(x, present),
        "none": lambda: jnp.zeros((), x.dtype),
    }[config.baseline]()
    out = masked_select(x - baseline, present)
    if config.scale_rewards == "group":
        out = safe_divide(out, _standard_deviation(x, present, config.advantage_ddof) + config.advantage_epsilon)
    elif config.scale_rewards == "batch":
        deviation = _standard_deviation(x.reshape(1, -1), present.reshape(1, -1), config.advantage_ddof)
        out = safe_divide(out, deviation + config.advantage_epsilon)
    if config.normalize_advantages:
        out = _normalized(out, present, config)
    if config.baseline == config.scale_rewards == "none":
        return out  # compared with nothing
    tied = _tied(x, present) if by_group else _tied(x.reshape(1, -1), present.reshape(1, -1))
    return masked_select(out, present & ~tied)


def _mean_of_others(
    x: Float[Array, "N K"], present: Bool[Array, "N K"], count: Float[Array, "N 1"]
) -> Float[Array, "N K"]:
    """Leave one out, RLOO (arXiv 2402.14740): the mean of the group's other present ones; of a lone one, itself."""
    kept = masked_select(x, present)
    others = safe_divide(jnp.sum(kept, axis=1, keepdims=True) - kept, jnp.maximum(count - 1, 0))
    return jnp.where(count > 1, others, kept)


def _normalized(x: Float[Array, "..."], present: Bool[Array, "..."], config: ObjectiveConfig) -> Float[Array, "..."]:
    """(x - mean) / (std + epsilon) over all present ones; 0 elsewhere, and where all tie."""
    every, counted = x.reshape(1, -1), present.reshape(1, -1)
    deviation = _standard_deviation(every, counted, config.advantage_ddof) + config.advantage_epsilon
    out = safe_divide(every - masked_mean(every, counted), deviation)
    return masked_select(out, counted & ~_tied(every, counted)).reshape(x.shape)


def _tied(x: Float[Array, "N K"], present: Bool[Array, "N K"]) -> Bool[Array, "N 1"]:
    """True where all present ones are equal; not where none is."""
    highest = jnp.max(x, axis=1, where=present, initial=-jnp.inf, keepdims=True)
    lowest = jnp.min(x, axis=1, where=present, initial=jnp.inf, keepdims=True)
    return highest == lowest


def _standard_deviation(x: Float[Array, "N K"], present: Bool[Array, "N K"], ddof: int) -> Float[Array, "N 1"]:
    """Of the present ones of each row; 0 for no more than `ddof`."""
    mean = masked_mean(x, present, axis=1)[:, None]
    squares = masked_select(jnp.square(x - mean), present)
    count = jnp.sum(present, axis=1, keepdims=True, dtype=x.dtype)
    return jnp.sqrt(safe_divide(jnp.sum(squares, axis=1, keepdims=True), jnp.maximum(count - ddof, 0)))
