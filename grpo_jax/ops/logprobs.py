"""Log-probabilities of given tokens and entropies, without a vocabulary-wide tensor for all positions."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logps(
    hidden: Float[Array, "B T D"],
    unembed: Callable[[Float[Array, "... D"]], Float[Array, "... V"]],
    targets: Int[Array, "B T"],
    temperature: float | Float[Array, ""] = 1.0,
    chunk: int = 0,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The log-probability of each target under softmax(unembed(hidden) / temperature), and the entropy of that law.

    With chunk > 0 the logits of at most `chunk` positions exist at once, in the backward pass too, which computes
    them anew. Logits are widened to float32. `unembed` is a pure function of hidden states and may close over
    parameters: gradients reach them. The entropy carries one if `entropy_gradient`.
    """
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    if chunk < 0:
        raise ValueError(f"{chunk=} must not be negative")

    def score(h: Float[Array, "b t D"], tokens: Int[Array, "b t"]) -> tuple[Array, Array]:
        logits = unembed(h)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
        return gather_logps(logits, tokens), entropy(logits if entropy_gradient else jax.lax.stop_gradient(logits))

    return in_blocks(score, (hidden, targets), chunk)


def distilled_logps(
    hidden: Float[Array, "B T D"],
    unembed: Callable[[Float[Array, "... D"]], Float[Array, "... V"]],
    teacher_hidden: Float[Array, "B T E"],
    teacher_unembed: Callable[[Float[Array, "... E"]], Float[Array, "... W"]],
    targets: Int[Array, "B T"],
    temperature: float | Float[Array, ""] = 1.0,
    chunk: int = 0,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """What `token_logps` gives, and `reverse_kl` to the teacher's law at the same temperature, from the same logits.

    Of the vocabularies' rows the first min(V, W) are compared: families pad their embeddings to other sizes.
    """

    def score(h: Array, taught: Array, tokens: Array) -> tuple[Array, Array, Array]:
        logits, teacher = (
            x.astype(jnp.promote_types(x.dtype, jnp.float32)) / temperature
            for x in (unembed(h), teacher_unembed(taught))
        )
        spread = entropy(logits if entropy_gradient else jax.lax.stop_gradient(logits))
        common = min(logits.shape[-1], teacher.shape[-1])
        return gather_logps(logits, tokens), spread, reverse_kl(logits[..., :common], teacher[..., :common])

    return in_blocks(score, (hidden, teacher_hidden, targets), chunk)


def reverse_kl(logits: Float[Array, "*shape V"], teacher: Float[Array, "*shape V"]) -> Float[Array, "*shape"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of p = softmax(logits), q = softmax(teacher); GKD, arXiv 2306.13649.

    Its gradient by logit v is p_v (log p_v - log q_v - KL), written down as such: the derivative of the softmax would
    leave roundings where the laws are equal, which Adam turns into whole steps. The teacher has none.
    """
    logps, taught = jax.lax.stop_gradient((jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)))
    probabilities, difference = jnp.exp(logps), logps - taught
    value = jnp.sum(probabilities * difference, axis=-1)
    slope = jnp.sum(probabilities * (difference - value[..., None]) * logits, axis=-1)
    return value + slope - jax.lax.stop_gradient(slope)


def in_blocks(score: Callable[..., Any], arrays: tuple[Array, ...], chunk: int) -> Any:
    """score(*arrays), a tree of [B, T], of arrays [B, T, ...]: at most `chunk` positions at once, 0: all.

    The backward computes each block anew.
    """
    batch, length = arrays[0].shape[:2]
    if chunk == 0 or batch * length <= chunk:
        return score(*arrays)
    rows, steps = _block_shape(batch, length, chunk)
    # A scan's body is compiled apart from what surrounds it, so nothing can undo the recomputation there.
    score_block = jax.checkpoint(lambda block: score(*block), prevent_cse=False)
    blocks = jax.lax.map(score_block, tuple(_split(x, rows, steps) for x in arrays))
    return jax.tree.map(lambda x: _join(x, (batch, length)), blocks)


def gather_logps(logits: Float[Array, "*shape V"], tokens: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of log softmax(logits), the entry of each token; the sampler and the trainer both call it, so that they agree."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def entropy(logits: Float[Array, "*shape V"]) -> Float[Array, "*shape"]:
    """-sum_v p_v log p_v of p = softmax(logits); a logit of -inf adds 0."""
    logps = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(logps)
    return -jnp.sum(probabilities * jnp.where(probabilities > 0, logps, 0.0), axis=-1)


def _block_shape(batch: int, length: int, chunk: int) -> tuple[int, int]:
    """Rows and steps of a block of at most `chunk` positions.

    A block keeps all rows when it can: rows are what a mesh splits, and a block of a few rows' positions would sit on
    a few devices. Steps (or rows) are evened out over the blocks, which keeps the padding small.
    """
    rows, steps = (batch, chunk // batch) if chunk >= batch else (chunk, 1)
    return math.ceil(batch / math.ceil(batch / rows)), math.ceil(length / math.ceil(length / steps))


def _split(x: Array, rows: int, steps: int) -> Array:
    """[B, T, ...] as blocks [n, rows, steps, ...], zeros where the last ones reach beyond B or T."""
    batch, length, *rest = x.shape
    x = jnp.pad(x, [(0, -batch % rows), (0, -length % steps)] + [(0, 0)] * len(rest))
    x = x.reshape(x.shape[0] // rows, rows, x.shape[1] // steps, steps, *rest)
    return jnp.swapaxes(x, 1, 2).reshape(-1, rows, steps, *rest)


def _join(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_split` for one number a position."""
    (batch, length), (_, rows, steps) = shape, blocks.shape
    blocks = blocks.reshape(math.ceil(batch / rows), math.ceil(length / steps), rows, steps)
    blocks = jnp.swapaxes(blocks, 1, 2).reshape(blocks.shape[0] * rows, -1)
    return blocks[:batch, :length]
