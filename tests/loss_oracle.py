"""Losses of the GRPO family in float64 numpy: one row at a time, gradients by hand as a Jacobian of token losses.

Written from the papers' equations, apart from the package. exp is continued by its tangent beyond e^20, as there.
"""

import numpy as np

ROW_MEANS = ("grpo", "sapo", "gmpo")
ROLLOUT_MEANS = ("dapo", "cispo", "vespo")


def exp_with_tangent(x):
    return np.exp(np.minimum(x, 20)) * (1 + np.maximum(x - 20, 0))


def exp_slope(x):
    return np.exp(np.minimum(x, 20))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def ratios(x, level):
    """Ratio of each token of a row, and d ratio_t / d logp_s."""
    n = len(x)
    if level == "token":
        return exp_with_tangent(x), np.diag(exp_slope(x))
    mean = np.full(n, x.mean())
    slope = np.full((n, n), exp_slope(x.mean()) / n) if level == "sequence" else np.diag(exp_slope(mean))
    return exp_with_tangent(mean), slope


def policy_row(new, old, a, config):
    """l_t of the tokens of a row, and d l_t / d logp_s."""
    x, o = new - old, config
    r, slope = ratios(x, "token" if o.loss_type in ("vespo", "gmpo") else o.importance_sampling_level)
    if o.loss_type == "cispo":
        weight = np.minimum(r, o.cispo_max_ratio)
        return -weight * a * new, np.diag(-weight * a)
    if o.loss_type == "sapo":
        tau = np.where(a > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
        gate = sigmoid(tau * (r - 1))
        return -4 / tau * gate * a, (-4 * gate * (1 - gate) * a)[:, None] * slope
    if o.loss_type == "vespo":
        log_w = np.clip(x.sum(), np.log(1e-8), 20)
        k = np.where(a < 0, o.vespo_k_neg, o.vespo_k_pos)
        rate = np.where(a < 0, o.vespo_lambda_neg, o.vespo_lambda_pos)
        phi = np.exp(k * log_w + rate * (1 - np.exp(log_w)))
        return -phi * a * new, np.diag(-phi * a)
    if o.loss_type == "gmpo":
        sign = np.sign(a)
        bounded = np.where(a > 0, np.minimum(x, o.epsilon_high), np.where(a < 0, np.maximum(x, -o.epsilon), x))
        free = (sign * x <= np.where(a > 0, o.epsilon_high, o.epsilon)) | (sign == 0)
        mean = bounded.mean()
        return -exp_with_tangent(mean) * a, np.outer(-a, free) * exp_slope(mean) / len(x)
    capped = np.minimum(r, o.delta) if o.delta else r
    clipped = np.clip(r, 1 - o.epsilon, 1 + o.epsilon_high)
    free = (capped * a <= clipped * a) & (capped == r)
    return -np.minimum(capped * a, clipped * a), (-a * free)[:, None] * slope


def kl(new, ref, config):
    """The estimate by token and its derivative."""
    d = new - ref
    value, slope = {
        "k1": (d, np.ones_like(d)),
        "k2": (d**2 / 2, d),
        "k3": (exp_with_tangent(-d) + d - 1, 1 - exp_slope(-d)),
    }[config.kl_estimator]
    return value, d if config.kl_gradient == "k2" else slope


def loss_and_gradients(
    new,
    old,
    ref,
    adv,
    mask,
    config,
    weight,
    length,
    rollout_mask=None,
    rollout_weight=None,
    entropies=None,
    corrections=None,
    selected=None,
):
    """Loss of a minibatch, its gradient by log-probabilities and by entropies."""
    rollout_mask = mask if rollout_mask is None else rollout_mask
    rollout_weight = weight if rollout_weight is None else rollout_weight
    rows, tokens = sum(weight), sum(m.sum() for m, w in zip(mask, weight, strict=True) if w)
    rollout_tokens = sum(m.sum() for m, w in zip(rollout_mask, rollout_weight, strict=True) if w)
    loss, by_logp, by_entropy = 0.0, np.zeros(new.shape), np.zeros(new.shape)
    for b in range(len(new)):
        (at,) = np.nonzero(mask[b])
        if not weight[b] or not len(at):
            continue
        if config.loss_type in ROW_MEANS:
            w = 1 / (rows * len(at))
        elif config.loss_type in ROLLOUT_MEANS:
            w = len(rollout_mask) / len(mask) / rollout_tokens
        else:
            w = {"bnpo": 1 / tokens, "dr_grpo": 1 / (rows * length), "luspo": 1 / rows}[config.loss_type]
        c = np.ones(len(at)) if corrections is None else corrections[b, at]
        before = old[b, at]
        if config.loss_type == "vespo":
            before, c = before - np.log(np.maximum(c, 1e-8)), np.ones(len(at))
        c = c if selected is None else c * selected[b, at]
        value, jacobian = policy_row(new[b, at], before, adv[b, at], config)
        total, slope = (c * value).sum(), c @ jacobian
        if config.beta:
            estimate, its_slope = kl(new[b, at], ref[b, at], config)
            total, slope = total + config.beta * estimate.sum(), slope + config.beta * its_slope
        if config.entropy_coef:
            total -= config.entropy_coef * entropies[b, at].sum()
            by_entropy[b, at] = -config.entropy_coef * w
        loss += w * total
        by_logp[b, at] = w * slope
    return loss, by_logp, by_entropy


def correction_weights(logps, sampled, mask, config):
    """Importance weights by `config.correction`, 0 where masked."""
    x = np.subtract(logps, sampled, out=np.zeros(np.shape(logps)), where=mask != 0)
    if config.correction.startswith("sequence"):
        x = x.sum(axis=1, keepdims=True) + np.zeros_like(x)
    ratio = exp_with_tangent(x)
    high = config.correction_max or np.inf
    if config.correction.endswith("mask"):
        return ratio * (ratio >= config.correction_min) * (ratio <= high) * (mask != 0)
    return np.clip(ratio, config.correction_min, high) * (mask != 0)


def high_entropy(entropies, mask, share):
    """1 for the tokens whose entropy reaches the quantile of the unmasked ones."""
    return ((entropies >= np.quantile(entropies[mask != 0], 1 - share)) & (mask != 0)).astype(float)
