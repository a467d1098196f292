"""The losses of the GRPO family: a per-token objective, a KL term, an entropy bonus, and an aggregation over tokens.

    loss = sum_bt w_bt (c_bt l_bt + beta kl_bt - entropy_coef H_bt)

A quantity to minimise. `OBJECTIVES` holds l by `loss_type`, `KL_ESTIMATORS` kl, `AGGREGATIONS` w; c is 1, or the
correction of `grpo_jax.ops.corrections` where that token is selected. w is cut in two: a factor that a row knows by
itself, inside the numerator, and a denominator that is computed before the batch is split. So numerators of
micro-batches add up to the loss of their minibatch, however it is cut. docs/objectives.md has the equations.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.masked import masked_select, safe_divide

LOG_RATIO_LIMIT = 20.0  # e^20 = 4.9e8; float32 overflows at e^88.7, and a sum of squared gradients at half of that
SMALLEST_WEIGHT = 1e-8  # of a sequence in VESPO: below it the weight is 0 to float32 anyway


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
    *,
    entropies: Float[Array, "B T"] | None = None,
    corrections: Float[Array, "B T"] | None = None,
    selected: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss and mean metrics of a rollout that is one minibatch, by any `loss_type`, in float32 or float64.

    The arguments are those of `policy_loss_terms` and `denominators`; advantages may be one number a row. Where the
    config asks for tokens of high entropy and `selected` is not given, they are chosen here, from `entropies`.
    """
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], logps.shape)
    if config.top_entropy_quantile < 1 and selected is None:
        if entropies is None:
            raise ValueError(f"{config.top_entropy_quantile=} needs entropies or selected")
        selected = top_entropy_mask(entropies, _row_mask(mask, weight), config.top_entropy_quantile)
    terms = policy_loss_terms(
        logps,
        old_logps,
        ref_logps,
        advantages,
        mask,
        config,
        weight,
        entropies=entropies,
        corrections=corrections,
        selected=selected,
    )
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
    *,
    entropies: Float[Array, "b T"] | None = None,
    corrections: Float[Array, "b T"] | None = None,
    selected: Float[Array, "b T"] | None = None,
) -> Terms:
    """Numerator sum_bt u_bt (c_bt l_bt + beta kl_bt - entropy_coef H_bt) and metric sums of any rows of a minibatch.

    u is `AGGREGATIONS[loss_type].token_weights` of the mask (0 or 1, holes allowed). Rows of `weight` 0 and masked
    cells add nothing, whatever stands there. c is `corrections` (importance weights) times `selected` (0 or 1): they
    touch the policy term alone, and no denominator. Only `logps` and `entropies` carry a gradient. Metrics are sums
    over tokens: those of the objective, and `kl` where `ref_logps` is given, which beta > 0 asks for.
    """
    chex.assert_equal_shape([logps, old_logps, advantages, mask])
    if config.beta and ref_logps is None:
        raise ValueError(f"{config.beta=} needs ref_logps")
    if config.entropy_coef and entropies is None:
        raise ValueError(f"{config.entropy_coef=} needs entropies")
    mask = _row_mask(mask, weight).astype(logps.dtype)
    advantages = jax.lax.stop_gradient(masked_select(advantages.astype(logps.dtype), mask))
    old_logps, ref_logps = jax.lax.stop_gradient((old_logps, ref_logps))
    losses, metrics = _policy_term(logps, old_logps, advantages, mask, config, corrections, selected)
    if ref_logps is not None:
        kl = kl_term(logps, ref_logps, mask, config)
        metrics = metrics | {"kl": kl}
        losses = losses + config.beta * kl if config.beta else losses
    if config.entropy_coef and entropies is not None:
        losses = losses - config.entropy_coef * masked_select(entropies.astype(logps.dtype), mask)
    tokens = jnp.sum(mask)
    sums = {name: (jnp.sum(masked_select(value.astype(mask.dtype), mask)), tokens) for name, value in metrics.items()}
    return Terms(weighted_sum(losses, mask, config), jax.lax.stop_gradient(sums))


def weighted_sum(
    losses: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
    weight: Float[Array, "b"] | None = None,
) -> Float[Array, ""]:
    """sum_bt u_bt l_bt with the weights u of `loss_type`: a numerator of `denominators`, for losses of any kind."""
    mask = _row_mask(mask, weight).astype(losses.dtype)
    return jnp.sum(AGGREGATIONS[config.loss_type].token_weights(mask) * masked_select(losses, mask))


def denominators(
    mask: Float[Array, "b T"],
    rollout_mask: Float[Array, "B T"],
    config: ObjectiveConfig,
    weight: Float[Array, "b"] | None = None,
    rollout_weight: Float[Array, "B"] | None = None,
    max_completion_length: int | None = None,
) -> Float[Array, ""]:
    """What divides the summed numerators of one optimizer minibatch (`mask`, `weight`) of a rollout.

    - `grpo`, `sapo`, `gmpo`, `luspo`: rows of the minibatch, those with no token included (TRL's convention; filler
      rows are not).
    - `bnpo`: tokens of the minibatch.
    - `dapo`, `cispo`, `vespo`: tokens of the whole rollout / number of minibatches (B / b). One update a rollout
      divides by all its tokens; with M updates each divides by an M-th of them, so that a step is as long as bnpo's in
      expectation, and the same for every token of the rollout, in whichever minibatch it falls.
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


def _policy_term(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
    corrections: Float[Array, "b T"] | None,
    selected: Float[Array, "b T"] | None,
) -> tuple[Float[Array, "b T"], dict[str, Array]]:
    """The objective by token, times its correction, 0 where a token is not selected."""
    if corrections is not None and config.loss_type == "vespo":
        # Its weight is that of the policy over the law that sampled: the correction belongs inside the product.
        inside = jax.lax.stop_gradient(masked_select(corrections, mask))
        old_logps, corrections = old_logps - jnp.log(jnp.maximum(inside, SMALLEST_WEIGHT)), None
    losses, metrics = OBJECTIVES[config.loss_type](logps, old_logps, advantages, mask, config)
    if corrections is not None:
        losses = losses * jax.lax.stop_gradient(masked_select(corrections.astype(logps.dtype), mask))
    if selected is not None:
        losses = masked_select(losses, selected)
        metrics = metrics | {"selected_fraction": selected}
    return losses, metrics


def clipped_surrogate(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, "b T"], dict[str, Array]]:
    """PPO's surrogate by token, l = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r by `importance_ratios`.

    d l / d log r = -r A, and 0 where A > 0 and r > 1 + epsilon_high, or A < 0 and r < 1 - epsilon or r > delta (if
    above 0), where l = -delta A. PPO is arXiv 1707.06347 eq. 7, GRPO 2402.03300 eq. 3, the two bounds DAPO 2503.14476
    eq. 10, delta the dual clip of 1912.09729 and 2505.07291. Metrics by token: the clip fractions, the share of ratios
    outside the bounds whatever the sign of A, and those of `_ratio_metrics`.
    """
    ratio = importance_ratios(logps, old_logps, mask, config.importance_sampling_level)
    low, high = 1.0 - config.epsilon, 1.0 + config.epsilon_high
    clipped_low = (advantages < 0) & (ratio < low)
    clipped_high = (advantages > 0) & (ratio > high)
    # Chosen by `where` and not by `min`: at r = 1 both arms are equal, and the gradient of a tie is a matter of taste.
    bounded = jnp.where(clipped_low, low, jnp.where(clipped_high, high, ratio))
    metrics = {
        "clip_fraction": clipped_low | clipped_high,
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "ratio_outside_fraction": (ratio < low) | (ratio > high),
    }
    if config.delta:
        clipped_delta = (advantages < 0) & (ratio > config.delta)
        bounded = jnp.where(clipped_delta, config.delta, bounded)
        metrics["clip_fraction_delta"] = clipped_delta
    return -bounded * advantages, metrics | _ratio_metrics(ratio, logps, old_logps, mask)


def clipped_weight(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, "b T"], dict[str, Array]]:
    """CISPO, l = -sg(min(r, cispo_max_ratio)) A log pi, arXiv 2506.13585; every token keeps a gradient."""
    ratio = importance_ratios(logps, old_logps, mask, config.importance_sampling_level)
    above = ratio > config.cispo_max_ratio
    weights = jax.lax.stop_gradient(jnp.minimum(ratio, config.cispo_max_ratio))
    clipped = above & (advantages > 0)
    metrics = {"clip_fraction": clipped, "clip_fraction_high": clipped, "ratio_outside_fraction": above}
    losses = -weights * advantages * masked_select(logps, mask)
    return losses, metrics | _ratio_metrics(ratio, logps, old_logps, mask)


def soft_gate(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, "b T"], dict[str, Array]]:
    """SAPO, l = -(4 / tau) sigmoid(tau (r - 1)) A, arXiv 2511.20347; tau is one of two, by the sign of A.

    d l / d log r = -4 p (1 - p) r A with p the sigmoid: -A at r = 1, falling off smoothly on both sides.
    """
    ratio = importance_ratios(logps, old_logps, mask, config.importance_sampling_level)
    temperature = jnp.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    temperature = temperature.astype(logps.dtype)
    gate = jax.nn.sigmoid(temperature * (ratio - 1.0))
    losses = -gate * (4.0 / temperature) * advantages
    return losses, {"gate": 4.0 * gate * (1.0 - gate)} | _ratio_metrics(ratio, logps, old_logps, mask)


def gamma_weight(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, "b T"], dict[str, Array]]:
    """VESPO, l = -sg(phi(W)) A log pi with phi(W) = W^k exp(lambda (1 - W)), arXiv 2602.10693.

    W is the ratio of the whole sequence, the product over its tokens, held within 1e-8 and e^20; k and lambda are one
    of two each, by the sign of A.
    """
    log_weight = jnp.sum(log_ratios(logps, old_logps, mask), axis=1, keepdims=True)
    log_weight = jnp.clip(log_weight, math.log(SMALLEST_WEIGHT), LOG_RATIO_LIMIT)
    k = jnp.where(advantages < 0, config.vespo_k_neg, config.vespo_k_pos)
    decay = jnp.where(advantages < 0, config.vespo_lambda_neg, config.vespo_lambda_pos)
    phi = jnp.exp(decay + k * log_weight - decay * jnp.exp(log_weight)).astype(logps.dtype)
    losses = -jax.lax.stop_gradient(phi) * advantages * masked_select(logps, mask)
    ratio = importance_ratios(logps, old_logps, mask, "token")
    return losses, {"sequence_weight": phi} | _ratio_metrics(ratio, logps, old_logps, mask)


def geometric_mean(
    logps: Float[Array, "b T"],
    old_logps: Float[Array, "b T"],
    advantages: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, "b T"], dict[str, Array]]:
    """GMPO, l = -A exp(mean_t x_t), the same for every token of a row, arXiv 2507.20673.

    x_t is the log ratio of a token, clipped in log space on the side that its advantage pushes to: above at
    epsilon_high where A > 0, below at -epsilon where A < 0. d l / d log r_t = l / n, and 0 for a clipped token.
    """
    ratios = log_ratios(logps, old_logps, mask)
    clipped_low = (advantages < 0) & (ratios < -config.epsilon)
    clipped_high = (advantages > 0) & (ratios > config.epsilon_high)
    bounded = jnp.where(clipped_low, -config.epsilon, jnp.where(clipped_high, config.epsilon_high, ratios))
    bounded = masked_select(bounded, mask)
    mean = safe_divide(jnp.sum(bounded, axis=1), jnp.sum(mask, axis=1))[:, None]
    return -bounded_exp(mean) * advantages, {
        "clip_fraction": clipped_low | clipped_high,
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "ratio_outside_fraction": (ratios < -config.epsilon) | (ratios > config.epsilon_high),
    } | _ratio_metrics(bounded_exp(ratios), logps, old_logps, mask)


def importance_ratios(
    logps: Float[Array, "b T"], old_logps: Float[Array, "b T"], mask: Float[Array, "b T"], level: str
) -> Float[Array, "b T"]:
    """r = pi / pi_old by `importance_sampling_level`, as `bounded_exp` has it; 1 in masked cells and empty rows.

    - `token`: of each token.
    - `sequence`: (prod_t r_t)^(1/n), one for the row: GSPO, arXiv 2507.18071.
    - `sequence_token`: that value with the gradient of the token's own ratio, sg(s) pi_t / sg(pi_t): GSPO-token.
    """
    ratios = log_ratios(logps, old_logps, mask)
    if level == "token":
        return bounded_exp(ratios)
    mean = safe_divide(jnp.sum(ratios, axis=1), jnp.sum(mask, axis=1))[:, None]
    if level == "sequence":
        return bounded_exp(jnp.broadcast_to(mean, ratios.shape))
    own = masked_select(logps - jax.lax.stop_gradient(logps), mask)  # 0, with the token's gradient
    return bounded_exp(jax.lax.stop_gradient(mean) + own)


def _ratio_metrics(
    ratio: Float[Array, "b T"], logps: Float[Array, "b T"], old_logps: Float[Array, "b T"], mask: Float[Array, "b T"]
) -> dict[str, Array]:
    """The ratio, and `approx_kl`, k3 of the policy that sampled to the policy now (zero at the first update)."""
    return {"ratio": ratio, "approx_kl": k3(old_logps, logps, mask)}


def top_entropy_mask(entropies: Float[Array, "..."], mask: Float[Array, "..."], quantile: float) -> Float[Array, "..."]:
    """1 for the `quantile` share of unmasked tokens with the highest entropy, ties included; arXiv 2506.01939.

    The threshold interpolates between the two entropies beside it, as torch.quantile and numpy.quantile do.
    """
    counted, entropies = mask != 0, jax.lax.stop_gradient(entropies)
    threshold = jnp.nanquantile(jnp.where(counted, entropies, jnp.nan), 1.0 - quantile)
    return (counted & (entropies >= threshold)).astype(mask.dtype)


def kl_term(
    logps: Float[Array, "b T"], ref_logps: Float[Array, "b T"], mask: Float[Array, "b T"], config: ObjectiveConfig
) -> Float[Array, "b T"]:
    """The estimate of KL(new || ref) by token, with its own gradient or, if `kl_gradient` says so, that of k2.

    k2's gradient, (new - ref) times that of log pi, is on policy an unbiased one of the KL itself; those of k1 (of
    expectation 0) and k3 are not (arXiv 2510.01555).
    """
    value = KL_ESTIMATORS[config.kl_estimator](logps, ref_logps, mask)
    if config.kl_gradient == "estimator":
        return value
    slope = k2(logps, ref_logps, mask)
    return jax.lax.stop_gradient(value) + (slope - jax.lax.stop_gradient(slope))


def k1(logps: Float[Array, "b T"], ref_logps: Float[Array, "b T"], mask: Float[Array, "b T"]) -> Float[Array, "b T"]:
    """Schulman's k1, new - ref: unbiased, of either sign; 0 in masked cells."""
    return log_ratios(logps, ref_logps, mask)


def k2(logps: Float[Array, "b T"], ref_logps: Float[Array, "b T"], mask: Float[Array, "b T"]) -> Float[Array, "b T"]:
    """Schulman's k2, (new - ref)^2 / 2: never negative, biased; 0 in masked cells."""
    return jnp.square(log_ratios(logps, ref_logps, mask)) / 2


def k3(logps: Float[Array, "b T"], ref_logps: Float[Array, "b T"], mask: Float[Array, "b T"]) -> Float[Array, "b T"]:
    """Schulman's k3, exp(ref - new) - (ref - new) - 1: unbiased, never negative; 0 in masked cells.

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


Objective = Callable[..., tuple[Float[Array, "b T"], dict[str, Array]]]

OBJECTIVES: dict[str, Objective] = {
    "grpo": clipped_surrogate,
    "bnpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
    "cispo": clipped_weight,
    "sapo": soft_gate,
    "luspo": clipped_surrogate,
    "vespo": gamma_weight,
    "gmpo": geometric_mean,
}

KL_ESTIMATORS: dict[str, Callable[..., Float[Array, "b T"]]] = {"k1": k1, "k2": k2, "k3": k3}

AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": Aggregation(_row_mean, _rows),
    "bnpo": Aggregation(_every_token, _minibatch_tokens),
    "dapo": Aggregation(_every_token, _rollout_tokens_by_minibatch),
    "dr_grpo": Aggregation(_every_token, _row_budget),
    "cispo": Aggregation(_every_token, _rollout_tokens_by_minibatch),
    "sapo": Aggregation(_row_mean, _rows),
    "luspo": Aggregation(_every_token, _rows),
    "vespo": Aggregation(_every_token, _rollout_tokens_by_minibatch),
    "gmpo": Aggregation(_row_mean, _rows),
}
