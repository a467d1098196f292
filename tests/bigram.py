"""The least module that the step's protocol allows, and GRPO on it in float64 numpy.

The logits of the next token are the row of a table that the last token picks. It compiles in a
second, and its gradient is a line: d logp(y | c) / d table[c] = (onehot(y) - softmax(table[c] / t)) / t.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
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


def loss_and_gradient(table, reference, rollout, rows, config):
    """Loss of the minibatch of `rows` and its gradient by the table, from the formulas of the papers."""
    o, temperature = config.objective, config.sampler.temperature
    mask = np.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    counted = (mask * rollout.weight[:, None] * (rollout.ended[:, None] if o.mask_truncated else 1)).astype(float)
    logps, p = logps_of(table, rollout, temperature)
    ratio = np.exp(np.where(mask, logps - rollout.logps, 0))
    advantage = np.asarray(rollout.advantages, np.float64)
    bounded = np.clip(ratio, 1 - o.epsilon, 1 + o.epsilon_high)
    token_loss = -np.minimum(ratio * advantage, bounded * advantage)
    slope = np.where(ratio * advantage <= bounded * advantage, -ratio * advantage, 0)
    if o.beta:
        difference = np.where(mask, logps_of(reference, rollout, temperature)[0] - logps, 0)
        token_loss += o.beta * (np.exp(difference) - difference - 1)
        slope += o.beta * (1 - np.exp(difference))
    token_weight = {
        "grpo": counted / np.maximum(counted.sum(1, keepdims=True), 1) / rollout.weight[rows].sum(),
        "bnpo": counted / max(counted[rows].sum(), 1),
        "dapo": counted / max(counted.sum() * len(rows) / len(counted), 1),
        "dr_grpo": counted / (rollout.weight[rows].sum() * counted.shape[1]),
    }[o.loss_type]
    slope, token_loss = (slope * token_weight)[rows], (token_loss * token_weight)[rows]
    by_logits = slope[..., None] * (np.eye(p.shape[-1])[rollout.tokens[rows]] - p[rows]) / temperature
    gradient = np.zeros(np.shape(table))
    np.add.at(gradient, contexts(rollout)[rows].reshape(-1), by_logits.reshape(-1, p.shape[-1]))
    return token_loss.sum(), gradient


def descend(table, reference, rollout, config, lr):
    """The table after every epoch and minibatch of gradient descent, and the losses along the way."""
    table, losses = np.asarray(table, np.float64), []
    for _ in range(config.objective.num_iterations):
        for m in range(config.objective.minibatches):
            rows = np.arange(m, len(rollout.lengths), config.objective.minibatches)
            loss, gradient = loss_and_gradient(table, reference, rollout, rows, config)
            table = table - lr * gradient
            losses.append(loss)
    return table, losses
