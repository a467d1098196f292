"""The decode cache: per layer a prompt segment that a group shares, and a completion segment a row.

Opaque to all but the attention that owns it: `init_cache` makes it, `start` notes what comes next,
`write` fills a layer, `copy_prompt` hands one prompt to the rows of its group. Positions and segments
stand beside the keys, so that what may be seen is never deduced from the slot it lies in. A layer
with another memory (a latent, a ring) brings its own entry and the functions for it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.architecture import Architecture
from grpo_jax.ops.attention import visible


class LayerCache(flax.struct.PyTreeNode):
    """Keys (already rotated) and values of one layer."""

    prompt_key: Float[Array, "N P K E"]
    prompt_value: Float[Array, "N P K E"]
    key: Float[Array, "B T K E"]
    value: Float[Array, "B T K E"]


class CacheIndex(flax.struct.PyTreeNode):
    """What lies where, the same in every layer; segment 0 is an empty slot.

    `slot` is where the tokens at hand go, `cursor` the next free one.
    """

    prompt_positions: Int[Array, "N P"]
    prompt_segments: Int[Array, "N P"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    slot: Int[Array, ""]
    cursor: Int[Array, ""]
    prefilled: bool = flax.struct.field(pytree_node=False, default=False)


class Cache(flax.struct.PyTreeNode):
    """One entry a layer, in order, and the index they share."""

    layers: tuple[LayerCache, ...]
    index: CacheIndex


def init_cache(
    architecture: Architecture, prompts: int, prompt_length: int, rows: int, length: int, dtype: Any
) -> Cache:
    """An empty cache for `prompts` prompts shared by `rows` rows of up to `length` tokens."""
    a = architecture
    prompt, own = (prompts, prompt_length), (rows, length)

    def layer() -> LayerCache:
        head = (a.kv_heads, a.head_size)
        return LayerCache(
            prompt_key=jnp.zeros((*prompt, *head), dtype),
            prompt_value=jnp.zeros((*prompt, *head), dtype),
            key=jnp.zeros((*own, *head), dtype),
            value=jnp.zeros((*own, *head), dtype),
        )

    index = CacheIndex(
        prompt_positions=jnp.zeros(prompt, jnp.int32),
        prompt_segments=jnp.zeros(prompt, jnp.int32),
        positions=jnp.zeros(own, jnp.int32),
        segments=jnp.zeros(own, jnp.int32),
        slot=jnp.zeros((), jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
    )
    return Cache(layers=tuple(layer() for _ in range(a.layers)), index=index)


def start(index: CacheIndex, positions: Int[Array, "R S"], segments: Int[Array, "R S"]) -> CacheIndex:
    """The index with the tokens at hand noted: first the prompts, then one token a row at a time."""
    if not index.prefilled:
        return index.replace(prompt_positions=positions, prompt_segments=segments)
    return index.replace(
        positions=_put(index.positions, positions, index.cursor),
        segments=_put(index.segments, segments, index.cursor),
        slot=index.cursor,
        cursor=index.cursor + 1,
    )


def write(entry: LayerCache, index: CacheIndex, key: Array, value: Array) -> LayerCache:
    """A layer's entry with the keys and values of the tokens at hand, in place."""
    key, value = key.astype(entry.key.dtype), value.astype(entry.value.dtype)
    if not index.prefilled:
        return entry.replace(prompt_key=key, prompt_value=value)
    return entry.replace(key=_put(entry.key, key, index.slot), value=_put(entry.value, value, index.slot))


def end_prompt(cache: Cache) -> Cache:
    """The cache after prefill: what comes next are completions."""
    return cache.replace(index=cache.index.replace(prefilled=True))


def copy_prompt(cache: Cache, rows_per_prompt: int) -> Cache:
    """The cache with each prompt's segment repeated, one copy a row (rows of a group are adjacent)."""

    def repeat(tree: Any, names: tuple[str, ...]) -> Any:
        return tree.replace(**{n: jnp.repeat(getattr(tree, n), rows_per_prompt, axis=0) for n in names})

    return cache.replace(
        layers=tuple(repeat(entry, ("prompt_key", "prompt_value")) for entry in cache.layers),
        index=repeat(cache.index, ("prompt_positions", "prompt_segments")),
    )


def read(entry: LayerCache, index: CacheIndex, positions: Array, segments: Array, window: Any, dtype: Any):
    """((keys, values, visibility [B, 1, P]) of the prompts, (the same [B, 1, T]) of the rows' own tokens)."""
    rows = positions.shape[0] // index.prompt_positions.shape[0]
    prompt_positions = jnp.repeat(index.prompt_positions, rows, axis=0)
    prompt_segments = jnp.repeat(index.prompt_segments, rows, axis=0)
    prompt_mask = visible(positions, prompt_positions, segments, prompt_segments, window)
    own_mask = visible(positions, index.positions, segments, index.segments, window)
    return (
        (entry.prompt_key.astype(dtype), entry.prompt_value.astype(dtype), prompt_mask),
        (entry.key.astype(dtype), entry.value.astype(dtype), own_mask),
    )


def _put(buffer: Array, entries: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, entries, slot, axis=1)
