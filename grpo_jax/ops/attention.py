"""Attention with grouped queries over one or two segments of keys, in one softmax.

Who sees whom is told by explicit positions, segment ids and windows, never deduced from slots.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.ops.packing import SharedPrefix

PRODUCT = "attention_product"
MASKED = -1e30  # finite, so that a row with nothing to see gives a mean and not a NaN


def visible(
    query_positions: Int[Array, "B S"],
    key_positions: Int[Array, "B Z"],
    query_segments: Int[Array, "B S"],
    key_segments: Int[Array, "B Z"],
    window: Int[Array, ""] | int,
) -> Bool[Array, "B S Z"]:
    """True where a query may read a key: same segment (0 is padding), not later, within the window (0: all)."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] != 0)
    near = (window == 0) | (distance < window)
    return same & (distance >= 0) & near


def attend(
    query: Float[Array, "B S H E"],
    key: Float[Array, "B Z K E"],
    value: Float[Array, "B Z K v"],
    mask: Bool[Array, "B S Z"],
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "B S H v"]:
    """softmax(scale q k^T) v with H / K queries a key head; the softmax is float32.

    `scale` is 1 / sqrt(E) unless given; with `cap`, scores x become cap * tanh(x / cap) (arXiv 2408.00118).
    """
    batch, length, heads, size = query.shape
    grouped = heads_first(query, key.shape[2]).reshape(batch, key.shape[2], -1, size)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    scores = product(score(grouped, key)).reshape(batch, key.shape[1], -1, length, key.shape[2])
    scores = soft_cap(scores * (scale or size**-0.5), cap)
    (weights,) = softmax([jnp.where(mask[:, None, None], scores, MASKED)])
    out = product(mix(weights.reshape(*grouped.shape[:3], -1).astype(value.dtype), value))
    out = jnp.moveaxis(out.reshape(batch, key.shape[1], -1, length, value.shape[-1]), 3, 1)
    return out.reshape(batch, length, heads, value.shape[-1])


def heads_first(query: Float[Array, "*b S H E"], kv_heads: int) -> Float[Array, "*b K G S E"]:
    """Queries by key head and place in its group, so that a head's rows lie together, as its products read them."""
    grouped = query.reshape(*query.shape[:-2], kv_heads, -1, query.shape[-1])
    return jnp.moveaxis(grouped, -4, -2)


def product(x: Float[Array, "*R"]) -> Float[Array, "*R"]:
    """x under a name by which policies of rematerialisation know it: they do not look inside functions with a gradient
    of their own.
    """
    return checkpoint_name(x, PRODUCT)


@jax.custom_vjp
def score(query: Float[Array, "*b m E"], key: Float[Array, "*b z E"]) -> Float[Array, "*b m z"]:
    """query key^T in float32.

    The gradient of `key` is a product with the large array on the right, and the small result is transposed: XLA's CPU
    backend would transpose the large one (22 against 50 GFLOP/s at 512 x 512 x 32). So it is in `mix`.
    """
    return jnp.einsum("...me,...ze->...mz", query, key, preferred_element_type=jnp.float32)


def _score_backward(held: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    query, key = held
    change = change.astype(query.dtype)
    return jnp.einsum("...mz,...ze->...me", change, key), jnp.swapaxes(_small_left(query, change), -1, -2)


@jax.custom_vjp
def mix(weights: Float[Array, "*b m z"], value: Float[Array, "*b z v"]) -> Float[Array, "*b m v"]:
    """weights value; see `score`."""
    return jnp.einsum("...mz,...zv->...mv", weights, value)


def _mix_backward(held: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    weights, value = held
    return jnp.einsum("...mv,...zv->...mz", change, value), jnp.swapaxes(_small_left(change, weights), -1, -2)


def _small_left(small: Float[Array, "*b m e"], large: Float[Array, "*b m z"]) -> Float[Array, "*b e z"]:
    return jnp.einsum("...me,...mz->...ez", small, large)


score.defvjp(lambda query, key: (score(query, key), (query, key)), _score_backward)
mix.defvjp(lambda weights, value: (mix(weights, value), (weights, value)), _mix_backward)


def attend_shared_prefix(
    query: Float[Array, "B 1 H E"],
    prefix: tuple[Float[Array, "N K E P"], Float[Array, "N K P v"], Bool[Array, "B 1 P"]],
    own: tuple[Float[Array, "B K E Z"], Float[Array, "B K Z v"], Bool[Array, "B 1 Z"]],
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "B 1 H v"]:
    """One query a row over a prefix that B / N adjacent rows share and the row's own keys, in one softmax.

    The prefix is read where it lies: its keys are never copied to the rows that share it.
    """
    batch, _, heads, size = query.shape
    (prefix_key, prefix_value, prefix_mask), (own_key, own_value, own_mask) = prefix, own
    count, kv_heads = prefix_key.shape[:2]

    def by_prefix(x: Float[Array, "B K G z"]) -> Float[Array, "N K R*G z"]:
        # The rows of a prefix together under each key head: plain products, the only ones that XLA's CPU backend has
        # a fast kernel for.
        x = x.reshape(count, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 2).reshape(count, kv_heads, -1, x.shape[-1])

    def by_row(x: Float[Array, "N K R*G z"]) -> Float[Array, "B K G z"]:
        x = x.reshape(count, kv_heads, batch // count, -1, x.shape[-1])
        return jnp.moveaxis(x, 2, 1).reshape(batch, kv_heads, -1, x.shape[-1])

    grouped = query.reshape(batch, kv_heads, -1, size)
    prefix_scores = by_row(jnp.matmul(by_prefix(grouped), prefix_key, preferred_element_type=jnp.float32))
    own_scores = jnp.einsum("bkge,bkez->bkgz", grouped, own_key, preferred_element_type=jnp.float32)
    factor = scale or size**-0.5
    prefix_weights, own_weights = softmax(
        [
            jnp.where(prefix_mask[:, None], soft_cap(prefix_scores * factor, cap), MASKED),
            jnp.where(own_mask[:, None], soft_cap(own_scores * factor, cap), MASKED),
        ]
    )
    out = by_row(jnp.matmul(by_prefix(prefix_weights.astype(prefix_value.dtype)), prefix_value))
    out = out + jnp.einsum("bkgz,bkze->bkge", own_weights.astype(own_value.dtype), own_value)
    return out.reshape(batch, 1, heads, out.shape[-1])


def soft_cap(x: Float[Array, "*R"], cap: float) -> Float[Array, "*R"]:
    """cap * tanh(x / cap); x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend_self(
    query: Float[Array, "R S H E"],
    key: Float[Array, "R S K E"],
    value: Float[Array, "R S K v"],
    positions: Int[Array, "R S"],
    segments: Int[Array, "R S"] | SharedPrefix,
    window: Int[Array, ""] | int,
    scale: float | None = None,
    cap: float = 0.0,
    mesh: Mesh | None = None,
) -> Float[Array, "R S H v"]:
    """Attention of a batch to itself, its segments being ids or packs with shared prompts.

    With a mesh the columns lie over its axis sequence: each device keeps its queries, and gets the keys and values of
    all the others, which with grouped queries are the smaller part.
    """
    if mesh is None:
        return _attend((query, positions, segments), (key, value, positions, segments), window, scale, cap)
    shared = isinstance(segments, SharedPrefix)
    columns, by_token = PartitionSpec(None, "sequence"), PartitionSpec(None, *(None,) * shared, "sequence")

    def local(query: Array, seen: tuple[Array, ...], segments: Any, window: Array) -> Array:
        def gather(x: Array, axis: int = 1) -> Array:
            return jax.lax.all_gather(x, "sequence", axis=axis, tiled=True)

        ids, own = jax.tree.map(lambda x: gather(x, x.ndim - 1), segments), segments
        own = segments.replace(chunks=1) if isinstance(segments, SharedPrefix) else own
        key, value, places = map(gather, seen)
        return _attend((query, seen[2], own), (key, value, places, ids), window, scale, cap)

    specs = (columns, (columns, columns, columns), by_token, PartitionSpec())
    over = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=columns, axis_names={"sequence"})
    return over(query, (key, value, positions), segments, jnp.asarray(window))


def _attend(
    own: tuple[Array, Array, Any], seen: tuple[Array, Array, Array, Any], window: Any, scale: float | None, cap: float
) -> Array:
    """Queries, their positions and segments to keys and values, their positions and segments."""
    (query, places, segments), (key, value, key_places, key_segments) = own, seen
    if isinstance(segments, SharedPrefix):
        return attend_packed(own, seen, window, scale, cap)
    return attend(query, key, value, visible(places, key_places, segments, key_segments, window), scale, cap)


def attend_packed(
    own: tuple[Float[Array, "D x H E"], Int[Array, "D x"], SharedPrefix],
    seen: tuple[Float[Array, "D X K E"], Float[Array, "D X K v"], Int[Array, "D X"], SharedPrefix],
    window: Int[Array, ""] | int,
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "D x H v"]:
    """Prompts to themselves; rows to themselves and to their tokens' prompts, in one softmax.

    `own` are queries, with their positions and segments, of all columns of a pack or of a part of each prompt and row;
    `seen` are keys and values of all columns. Prompts that have rows apart are packs of one prompt here.
    """
    (query, places, segments), (key, value, key_places, key_segments) = own, seen
    parts, n, width = key_segments.prompt_segments.shape
    packed, (_, r, length) = (parts, n), segments.segments.shape
    heads, size, kv_heads = *query.shape[2:], key.shape[2]

    def cut(x: Array, by: SharedPrefix) -> tuple[Array, Array]:
        return tuple(y.reshape(-1, *y.shape[2:]) for y in by.cut(x))  # pyright: ignore[reportReturnType]

    prompt_query, row_query = cut(query, segments)
    (prompt_key, row_key), (prompt_value, row_value) = cut(key, key_segments), cut(value, key_segments)
    (prompt_places, row_places), (prompt_key_places, row_key_places) = (
        cut(places, segments),
        cut(key_places, key_segments),
    )
    ids, key_ids = (x.prompt_segments.reshape(parts * n, -1) for x in (segments, key_segments))
    mask = visible(prompt_places, prompt_key_places, ids, key_ids, window)
    prompts = attend(prompt_query, prompt_key, prompt_value, mask, scale, cap)
    ids, key_ids = (x.segments.reshape(parts * r, -1) for x in (segments, key_segments))
    own_mask = visible(row_places, row_key_places, ids, key_ids, window)
    # All prompts of the pack lie before each row; a token sees the one that it continues.
    if segments.apart:
        parts, n, r = parts * n, 1, r // n
    numbers = jnp.arange(1, n + 1)[:, None] * key_segments.prompt_segments.reshape(parts, n, width)  # 0 in the padding
    number = 1 if segments.apart else segments.prompt + 1
    wanted = jnp.where(segments.segments > 0, number, -1).reshape(parts, r * length)
    between = (row_places.reshape(parts, -1), prompt_key_places.reshape(parts, -1))
    prompt_mask = visible(*between, wanted, numbers.reshape(parts, -1), window).reshape(parts, r, length, n * width)
    # [D, K, R, G, T, E]: one order for both products, so that their scores meet without being moved.
    grouped = jnp.moveaxis(heads_first(row_query, kv_heads).reshape(parts, r, kv_heads, -1, length, size), 1, 2)
    own_key, own_value = (jnp.moveaxis(x.reshape(parts, r, -1, *x.shape[2:]), 3, 1) for x in (row_key, row_value))
    before_key, before_value = (
        jnp.swapaxes(x.reshape(parts, n * width, kv_heads, -1), 1, 2) for x in (prompt_key, prompt_value)
    )
    factor = scale or size**-0.5
    before_scores = product(score(grouped.reshape(parts, kv_heads, -1, size), before_key))
    own_scores = product(score(grouped.reshape(parts, kv_heads, r, -1, size), own_key))
    before_scores, own_scores = (x.reshape(*grouped.shape[:-1], -1) for x in (before_scores, own_scores))
    own_mask = own_mask.reshape(parts, r, length, -1)
    before_weights, own_weights = softmax(
        [
            jnp.where(prompt_mask[:, None, :, None], soft_cap(before_scores * factor, cap), MASKED),
            jnp.where(own_mask[:, None, :, None], soft_cap(own_scores * factor, cap), MASKED),
        ]
    )
    before = product(mix(before_weights.reshape(parts, kv_heads, -1, n * width).astype(value.dtype), before_value))
    after = product(mix(own_weights.reshape(parts, kv_heads, r, -1, own_key.shape[3]).astype(value.dtype), own_value))
    out = (before.reshape(*grouped.shape[:-1], -1) + after.reshape(*grouped.shape[:-1], -1)).transpose(0, 2, 4, 1, 3, 5)
    rows = out.reshape(*segments.segments.shape, heads, -1)
    return segments.lay(prompts.reshape(*packed, -1, *prompts.shape[2:]), rows)


@jax.custom_vjp
def softmax(segments: list[Float[Array, "*R z"]]) -> list[Float[Array, "*R z"]]:
    """One softmax over the last axes of several arrays, as if they were concatenated.

    Its gradient w (d - sum w d) reads the weights alone; that of the formula would keep the exponentials too.
    """
    top = segments[0].max(axis=-1, keepdims=True)
    for scores in segments[1:]:
        top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    exponentials = [jnp.exp(scores - top) for scores in segments]
    total = sum(e.sum(axis=-1, keepdims=True) for e in exponentials)
    return [e / total for e in exponentials]


def _softmax_forward(segments: list[Array]) -> tuple[list[Array], list[Array]]:
    weights = softmax(segments)
    return weights, weights


def _softmax_backward(weights: list[Array], changes: list[Array]) -> tuple[list[Array]]:
    mean = sum(jnp.sum(w * d, axis=-1, keepdims=True) for w, d in zip(weights, changes, strict=True))
    return ([w * (d - mean) for w, d in zip(weights, changes, strict=True)],)


softmax.defvjp(_softmax_forward, _softmax_backward)
