"""The least module that the step's protocol allows, and GRPO on it in float64 numpy.

The logits of the next token are the row of a table that the last token picks. It compiles in a
second, and its gradient is a line: d logp(y | c) / d table[c] = (onehot(y) - softmax(table[c] / t)) / t.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import loss_oracle
import numpy as np
import tiny

from grpo_jax.models.architecture import Architecture
from grpo_jax.step import StepParts

# No layers: an empty cache. The width is the vocabulary: hidden states are logits.
ARCHITECTURE = Architecture(tiny.VOCABULARY, tiny.VOCABULARY, 1, 1, 2, 1, ())


class Bigram(nn.Module):
    """`spike` adds 0 to the logits; its gradient is 0, and NaN where it is 0."""

    architecture: Architecture = ARCHITECTURE
    scanned: bool = True
    remat: str = "none"

    def setup(self):
        size = self.architecture.vocabulary
        self.table = self.param("table", nn.initializers.normal(1.0), (size, size))
        self.spike = self.param("spike", nn.initializers.ones, ())

    def __call__(self, tokens, positions, segments, cache=None):
        hidden = jnp.asarray(self.table)[tokens] + 0.0 * jnp.sqrt(self.spike)
        return hidden if cache is None else (hidden, cache)

    def logits(self, hidden):
        return hidden.astype(jnp.float32)


def params(seed: int = 0) -> dict:
    """Logits with a standard deviation of 1.5."""
    table = np.random.default_rng(seed).normal(0, 1.5, (tiny.VOCABULARY, tiny.VOCABULARY))
    return {"table": table.astype(np.float32), "spike": np.float32(1)}


def parts(config, **options) -> StepParts:
    """The parts of a step of this module."""
    return dataclasses.replace(tiny.parts(config, of=ARCHITECTURE, **options), module=Bigram())


def contexts(rollout) -> np.ndarray:
    """The token before each completion token."""
    return np.concatenate([rollout.prompt_tokens[:, -1:], rollout.tokens[:, :-1]], axis=1)


def logps_of(table, rollout, temperature=1.0) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability of each completion token, the whole softmax), float64."""
    logits = np.asarray(table, np.float64)[contexts(rollout)] / temperature
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.log(np.take_along_axis(p, rollout.tokens[..., None], -1)[..., 0]), p


def counted_mask(rollout, config):
    """1 for the tokens that count in the loss."""
    mask = np.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    ended = rollout.ended[:, None] if config.objective.mask_truncated else 1
    return (mask * rollout.weight[:, None] * ended).astype(float)


def beside(table, rollout, config):
    """What the policy before its first update decides: the ratio's denominator, corrections, selected tokens."""
    o, mask = config.objective, counted_mask(rollout, config)
    logps, p = logps_of(table, rollout, config.sampler.temperature)
    made = {"old": rollout.logps}
    if o.correction != "none":
        made |= {
            "old": logps,
            "corrections": loss_oracle.correction_weights(logps, rollout.sampled_logps, mask, o),
        }
    if o.top_entropy_quantile < 1:
        made["selected"] = loss_oracle.high_entropy(-(p * np.log(p)).sum(-1), mask, o.top_entropy_quantile)
    return made


def loss_and_gradient(table, reference, rollout, rows, config, made=None):
    """Loss of the minibatch of `rows` and its gradient by the table, from the formulas of the papers."""
    temperature, mask = config.sampler.temperature, counted_mask(rollout, config)
    made = {"old": rollout.logps} if made is None else made
    logps, p = logps_of(table, rollout, temperature)
    entropies = -(p * np.log(p)).sum(-1)
    old, *more = (made.get(name) for name in ("old", "corrections", "selected"))
    corrections, selected = (x if x is None else x[rows] for x in more)
    loss, by_logp, by_entropy = loss_oracle.loss_and_gradients(
        logps[rows],
        np.asarray(old, np.float64)[rows],
        logps_of(reference, rollout, temperature)[0][rows],
        np.asarray(rollout.advantages, np.float64)[rows],
        mask[rows],
        config.objective,
        rollout.weight[rows],
        mask.shape[1],
        mask,
        rollout.weight,
        entropies[rows],
        corrections,
        selected,
    )
    tokens, p = rollout.tokens[rows], p[rows]
    by_logits = by_logp[..., None] * (np.eye(p.shape[-1])[tokens] - p)
    by_logits -= by_entropy[..., None] * p * (np.log(p) + entropies[rows][..., None])
    gradient = np.zeros(np.shape(table))
    np.add.at(gradient, contexts(rollout)[rows].reshape(-1), by_logits.reshape(-1, p.shape[-1]) / temperature)
    return loss, gradient


def minibatch_rows(config, count: int, number: int) -> np.ndarray:
    """Every so-manieth group, or completion where prompts are not shared."""
    unit = config.sampler.group_size if config.train.share_prefix else 1
    return np.flatnonzero(np.arange(count) // unit % config.objective.minibatches == number)


def descend(table, reference, rollout, config, lr):
    """The table after every epoch and minibatch of gradient descent, and the losses along the way."""
    table, losses = np.asarray(table, np.float64), []
    made = beside(table, rollout, config)
    for _ in range(config.objective.num_iterations):
        for m in range(config.objective.minibatches):
            rows = minibatch_rows(config, len(rollout.lengths), m)
            loss, gradient = loss_and_gradient(table, reference, rollout, rows, config, made)
            table = table - lr * gradient
            losses.append(loss)
    return table, losses
