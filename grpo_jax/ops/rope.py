"""Rotary position embedding (arXiv 2104.09864), half-split form: feature i is paired with i + half."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """How far a position turns each pair of features.

    Attributes:
      theta: base; pair i of E rotated features turns by theta^(-2i / E) a position.
      kind: default, none (no rotation), linear (arXiv 2306.15595), llama3 (arXiv 2407.21783), yarn (arXiv 2309.00071)
        or longrope (arXiv 2402.13753): how the angles are stretched for long texts.
      size: features of a head that are rotated, its first ones; 0: all.
      factor: how many times longer texts may be; linear, llama3, yarn: the slow pairs turn so many times slower.
      original_length: llama3, yarn, longrope: tokens that the model was first trained on.
      low, high: llama3: pairs that turn fewer than `low` times in `original_length` are slowed by all of `factor`,
        those that turn more than `high` times not at all. yarn: the same (beta_slow, beta_fast).
      truncate: yarn: the borders are whole pairs.
      short, long: longrope: a divisor a pair, for programs of at most `original_length` columns and for longer ones.
      attention_factor: yarn, longrope: cosine and sine are multiplied by it; 0: by the papers' formulas.
      mscale, mscale_all: yarn: weights of those formulas for rotated features and for whole scores (DeepSeek-V3).
    """

    theta: float = 10_000.0
    kind: str = "default"
    size: int = 0
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 4.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all: float = 0.0

    @property
    def magnitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.kind not in ("yarn", "longrope") or self.attention_factor:
            return self.attention_factor or 1.0
        if self.kind == "longrope":
            grown = math.log(self.factor) / math.log(self.original_length) if self.factor > 1 else 0.0
            return math.sqrt(1 + grown)
        if self.mscale and self.mscale_all:
            return self._magnified(self.mscale) / self._magnified(self.mscale_all)
        return self._magnified(1.0)

    @property
    def score_magnitude(self) -> float:
        """What whole scores are multiplied by, in models that ask for it (DeepSeek-V3)."""
        return self._magnified(self.mscale_all) ** 2 if self.kind == "yarn" and self.mscale_all else 1.0

    def _magnified(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def frequencies(rope: Rope, head_size: int, length: int) -> Float[np.ndarray, "half"]:
    """The angle by which a position turns each pair of features, float32, for a program of `length` columns.

    The columns of a program, and not the tokens of a row, choose between longrope's two tables: the sampler's
    prompt and completion columns are as many as the trainer's, so both agree and a row does not depend on its batch.
    """
    size = rope.size or head_size
    base = 1.0 / np.float32(rope.theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    if rope.kind == "none":
        return np.zeros_like(base)
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "longrope":
        return base / np.asarray(rope.long if length > rope.original_length else rope.short, np.float32)
    if rope.kind == "llama3":
        turns = rope.original_length * base / np.float32(2 * math.pi)
        kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1).astype(np.float32)
        return base * ((1 - kept) / np.float32(rope.factor) + kept)
    if rope.kind == "yarn":
        return base * _yarn_share(rope, size)
    return base


def _yarn_share(rope: Rope, size: int) -> Float[np.ndarray, "half"]:
    """1 for pairs that turn more than `high` times in the original length, 1 / factor below `low`, a ramp between."""

    def pair(turns: float) -> float:
        return size * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.high), pair(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last += 0.001 if first == last else 0  # a step, where both borders are one pair
    slowed = np.clip((np.arange(size // 2) - first) / (last - first), 0, 1)
    return (slowed / rope.factor + (1 - slowed)).astype(np.float32)


def rotary_angles(
    positions: Int[Array, "B S"], frequency: Float[np.ndarray, "half"], magnitude: float = 1.0
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine of position * frequency, float32, times `magnitude`; computed once for all layers."""
    angle = positions.astype(jnp.float32)[..., None] * frequency
    # XLA's CPU backend fuses what it can into every use and takes optimization barriers out first: cosines would be
    # computed anew in each layer, for queries and keys, forward and backward (a sixth of a gradient). A loop stays.
    cos, sin = jax.lax.map(lambda which: jax.lax.cond(which == 0, jnp.cos, jnp.sin, angle), jnp.arange(2))
    return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def rotate(
    x: Float[Array, "B S heads E"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S heads E"]:
    """Rotates each pair of the first 2 * half features by its position's angle; the others pass."""
    size = 2 * cos.shape[-1]
    rotated, passed = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if passed is None else jnp.concatenate([turned, passed], axis=-1)
