"""The decode cache: per layer a prompt segment that a group shares, and a completion segment a row.

Opaque to all but the attention that owns it: `init_cache` makes it, `start` notes what comes next,
`write` fills a layer, `take_prompts` hands rows the prompts that they continue. Positions and segments
stand beside the keys, so that what may be seen is never deduced from the slot it lies in. A layer
with another memory (a latent, a ring) brings its own entry and the functions for it.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.architecture import Architecture
from grpo_jax.ops.attention import visible


class LayerCache(flax.struct.PyTreeNode):
    """Keys (already rotated) and values of one layer, laid out as the products of decoding read them.

    XLA's CPU backend takes a third of the time over q k where keys lie with their features before their places.
    """

    prompt_key: Float[Array, "N K E P"]
    prompt_value: Float[Array, "N K P E"]
    key: Float[Array, "B K E T"]
    value: Float[Array, "B K T E"]


class LatentCache(flax.struct.PyTreeNode):
    """The latent and the rotated shared key of one layer, side by side: R = rank + rotary (arXiv 2405.04434)."""

    prompt_latent: Float[Array, "N P R"]
    latent: Float[Array, "B T R"]


LayerEntry = LayerCache | LatentCache


class CacheIndex(flax.struct.PyTreeNode):
    """What lies where, the same in every layer; segment 0 is an empty slot.

    `slot` is where the tokens at hand go, `cursor` the next free one. `length` is how many tokens of a completion there
    may be in the end; T are those that there is room for now.
    """

    prompt_positions: Int[Array, "N P"]
    prompt_segments: Int[Array, "N P"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    slot: Int[Array, ""]
    cursor: Int[Array, ""]
    length: int = flax.struct.field(pytree_node=False)
    prefilled: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def columns(self) -> int:
        """Columns of prompt and completion together, as many as a training batch has."""
        return self.prompt_positions.shape[1] + self.length


class Cache(flax.struct.PyTreeNode):
    """One entry a layer, in order, and the index they share."""

    layers: tuple[LayerEntry, ...]
    index: CacheIndex


def init_cache(
    architecture: Architecture,
    prompts: int,
    prompt_length: int,
    rows: int,
    length: int,
    dtype: Any,
    room: int | None = None,
) -> Cache:
    """An empty cache for `prompts` prompts shared by `rows` rows of up to `length` tokens.

    It has room for `room` of them until `lengthen` (None: for all).
    """
    a, room = architecture, length if room is None else room
    prompt, own = (prompts, prompt_length), (rows, room)

    def layer() -> LayerEntry:
        if a.latent is not None:
            size = a.latent.rank + a.latent.rotary
            return LatentCache(jnp.zeros((*prompt, size), dtype), jnp.zeros((*own, size), dtype))

        def empty(rows: int, *rest: int) -> Array:
            return jnp.zeros((rows, a.kv_heads, *rest), dtype)

        e = a.head_size
        return LayerCache(
            empty(prompts, e, prompt_length),
            empty(prompts, prompt_length, e),
            empty(rows, e, room),
            empty(rows, room, e),
        )

    index = CacheIndex(
        prompt_positions=jnp.zeros(prompt, jnp.int32),
        prompt_segments=jnp.zeros(prompt, jnp.int32),
        positions=jnp.zeros(own, jnp.int32),
        segments=jnp.zeros(own, jnp.int32),
        slot=jnp.zeros((), jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
        length=length,
    )
    return Cache(layers=tuple(layer() for _ in range(a.layers)), index=index)


def start(index: CacheIndex, positions: Int[Array, "R S"], segments: Int[Array, "R S"]) -> CacheIndex:
    """The index with the tokens at hand noted: first the prompts, then one token a row at a time."""
    if not index.prefilled:
        return index.replace(prompt_positions=positions, prompt_segments=segments)
    return index.replace(
        positions=_put(index.positions, positions, index.cursor, axis=1),
        segments=_put(index.segments, segments, index.cursor, axis=1),
        slot=index.cursor,
        cursor=(index.cursor + 1) % index.positions.shape[1],
    )


def write(entry: LayerEntry, index: CacheIndex, key: Array, value: Array) -> LayerCache:
    """A layer's entry with the keys and values [R, S, K, E] of the tokens at hand, in place."""
    assert isinstance(entry, LayerCache)
    key, value = key.transpose(0, 2, 3, 1).astype(entry.key.dtype), jnp.swapaxes(value, 1, 2).astype(entry.value.dtype)
    if not index.prefilled:
        return entry.replace(prompt_key=key, prompt_value=value)
    return entry.replace(
        key=_put(entry.key, key, index.slot, axis=3), value=_put(entry.value, value, index.slot, axis=2)
    )


def write_latent(entry: LayerEntry, index: CacheIndex, latent: Array) -> LatentCache:
    """A layer's entry with the latents [R, S, rank + rotary] of the tokens at hand, in place."""
    assert isinstance(entry, LatentCache)
    latent = latent.astype(entry.latent.dtype)
    if not index.prefilled:
        return entry.replace(prompt_latent=latent)
    return entry.replace(latent=_put(entry.latent, latent, index.slot, axis=1))


def lengthen(cache: Cache, room: int) -> Cache:
    """The cache with room for `room` tokens a completion; the next ones go behind all that had room before."""

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, room - size if i == axis else 0) for i, size in enumerate(x.shape)])

    def longer(entry: LayerEntry) -> LayerEntry:
        if isinstance(entry, LatentCache):
            return entry.replace(latent=pad(entry.latent, 1))
        return entry.replace(key=pad(entry.key, 3), value=pad(entry.value, 2))

    index = cache.index
    index = index.replace(
        positions=pad(index.positions, 1),
        segments=pad(index.segments, 1),
        cursor=jnp.asarray(index.positions.shape[1], jnp.int32),
    )
    return Cache(layers=tuple(longer(entry) for entry in cache.layers), index=index)


def end_prompt(cache: Cache) -> Cache:
    """The cache after prefill: what comes next are completions."""
    return cache.replace(index=cache.index.replace(prefilled=True))


def take_prompts(cache: Cache, prompts: Cache, source: Int[Array, "D s"], new: Bool[Array, "R"]) -> Cache:
    """The cache with the prompt segments of `prompts` in the rows that are `new`, whose own segment becomes empty.

    Each row has a prompt segment of its own here. Rows and prompts lie in D equal parts, and `source` is the number
    of a row's prompt in its part.
    """

    def take(into: Array, given: Array) -> Array:
        parts = given.reshape(source.shape[0], -1, *given.shape[1:])
        taken = jax.vmap(lambda part, i: part[i])(parts, source).reshape(into.shape)
        return jnp.where(new.reshape(-1, *(1,) * (into.ndim - 1)), taken, into)

    def adopt(into: Any, given: Any) -> Any:
        names = [field.name for field in dataclasses.fields(into) if field.name.startswith("prompt_")]
        return into.replace(**{name: take(getattr(into, name), getattr(given, name)) for name in names})

    index = adopt(cache.index, prompts.index)
    index = index.replace(segments=jnp.where(new[:, None], 0, index.segments))
    layers = tuple(adopt(*pair) for pair in zip(cache.layers, prompts.layers, strict=True))
    return cache.replace(layers=layers, index=index)


def read(entry: LayerEntry, index: CacheIndex, positions: Array, segments: Array, window: Any, dtype: Any):
    """((keys, values, visibility [B, 1, P]) of the prompts, (the same [B, 1, T]) of the rows' own tokens).

    Keys are [.., K, E, places], values [.., K, places, E]. A latent is the one key and the one value of all heads.
    """
    rows = positions.shape[0] // index.prompt_positions.shape[0]
    prompt_positions = jnp.repeat(index.prompt_positions, rows, axis=0)
    prompt_segments = jnp.repeat(index.prompt_segments, rows, axis=0)
    prompt_mask = visible(positions, prompt_positions, segments, prompt_segments, window)
    own_mask = visible(positions, index.positions, segments, index.segments, window)
    if isinstance(entry, LatentCache):
        prompt, own = (latent.astype(dtype)[:, None] for latent in (entry.prompt_latent, entry.latent))
        return (jnp.swapaxes(prompt, 2, 3), prompt, prompt_mask), (jnp.swapaxes(own, 2, 3), own, own_mask)
    return (
        (entry.prompt_key.astype(dtype), entry.prompt_value.astype(dtype), prompt_mask),
        (entry.key.astype(dtype), entry.value.astype(dtype), own_mask),
    )


def _put(buffer: Array, entries: Array, slot: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, entries, slot, axis)
