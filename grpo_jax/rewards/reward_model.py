"""Reward models in the program: one more forward pass of a decoder with a scalar head over prompt and completion.

The components `helpful` and `harmless` are DeepSeek-R1's (arXiv 2501.12948, section 2.3.4): helpfulness is judged on
the final summary, harmlessness on the whole response. What is not seen gets segment 0, so it neither takes a position
nor is looked at: the score is that of the sequence without it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.config import RewardModelConfig
from grpo_jax.models.decoder import DecoderModule
from grpo_jax.models.heads import read_head
from grpo_jax.rewards.verifiers import ByteTable, completion_bytes
from grpo_jax.sampler.sample import left_positions
from grpo_jax.sampler.types import Prompts, Rollout

MODEL_REWARDS = ("helpful", "harmless", "model_judge")
COLLECTION = "rewards"  # of the step's frozen variables: {name: {"params": ..., "score": ...}}


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """A reward model without its variables, which travel in the step's state.

    Attributes:
      config: what it sees.
      module: its decoder.
      columns: what it reads of each dataset row: nothing.
    """

    config: RewardModelConfig
    module: DecoderModule

    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def score(
        self, variables: Mapping[str, Any], table: ByteTable, prompts: Prompts, rollout: Rollout
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """The head's number at the last token that it sees, and ones: it applies to every completion."""
        score = self._scores(variables, table, rollout)
        return score, jnp.ones_like(score)

    def _scores(self, variables: Mapping[str, Any], table: ByteTable, rollout: Rollout) -> Float[Array, "B"]:
        seen = jnp.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
        if self.config.sees == "summary":
            seen &= after_marker(table, rollout.tokens, rollout.lengths, self.config.marker.encode())
        given = (rollout.prompt_tokens, rollout.prompt_lengths, rollout.tokens, seen)
        rows = self.config.micro_batch_size
        if rows == 0 or rows >= len(seen):
            return self._forward(variables, *given)
        # A piece takes rows at a stride, so that each device keeps its share of it.
        pieces = [x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1) for x in given]
        scores = jax.lax.map(lambda piece: self._forward(variables, *piece), tuple(pieces))
        return scores.swapaxes(0, 1).reshape(-1)

    def _forward(
        self,
        variables: Mapping[str, Any],
        prompt: Int[Array, "b P"],
        prompt_lengths: Int[Array, "b"],
        tokens: Int[Array, "b T"],
        seen: Bool[Array, "b T"],
    ) -> Float[Array, "b"]:
        positions, segments = left_positions(prompt_lengths, prompt.shape[1])
        after = prompt_lengths[:, None] + jnp.cumsum(seen, axis=1) - 1
        return sequence_scores(
            self.module,
            variables,
            jnp.concatenate([prompt, tokens], axis=1),
            jnp.concatenate([positions, jnp.maximum(after, 0)], axis=1),
            jnp.concatenate([segments, seen.astype(jnp.int32)], axis=1),
        )


def sequence_scores(
    module: DecoderModule,
    variables: Mapping[str, Any],
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"],
) -> Float[Array, "B"]:
    """The score head's number at the last token of each row that is in a segment."""
    hidden = module.apply({"params": variables["params"]}, tokens, positions, segments)
    last = jnp.max(jnp.where(segments > 0, jnp.arange(tokens.shape[1]), 0), axis=1)
    return read_head(variables["score"], jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def after_marker(
    table: ByteTable, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], marker: bytes
) -> Bool[Array, "B T"]:
    """True for tokens that begin after the last marker; for all where the text does not hold it.

    A token that holds the marker's end is not one of them, even where it goes on.
    """
    text, _ = completion_bytes(table, tokens, lengths)
    sizes = jnp.asarray(table.lengths).at[tokens].get(mode="fill", fill_value=0)
    sizes = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], sizes, 0)
    begins = jnp.cumsum(sizes, axis=1) - sizes
    padded = jnp.pad(text, ((0, 0), (0, len(marker))))
    width = text.shape[1]
    hits = jnp.stack([padded[:, i : i + width] == byte for i, byte in enumerate(marker)]).all(axis=0)
    at = jnp.max(jnp.where(hits, jnp.arange(width) + len(marker), 0), axis=1)
    return begins >= at[:, None]
