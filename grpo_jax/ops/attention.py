"""Attention with grouped queries over one or two segments of keys, in one softmax.

Who sees whom is told by explicit positions, segment ids and windows, never deduced from slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.ops.packing import SharedPrefix

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
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = jnp.einsum("bskge,bzke->bkgsz", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * (scale or size**-0.5), cap)
    weights = softmax([jnp.where(mask[:, None, None], scores, MASKED)])[0]
    out = jnp.einsum("bkgsz,bzke->bskge", weights.astype(value.dtype), value)
    return out.reshape(batch, length, heads, value.shape[-1])


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
    count, kv_heads, _, length = prefix_key.shape
    grouped = query.reshape(batch, kv_heads, -1, size)
    by_prefix = query.reshape(count, batch // count, kv_heads, -1, size)
    prefix_scores = jnp.einsum("nrkge,nkep->nrkgp", by_prefix, prefix_key, preferred_element_type=jnp.float32)
    prefix_scores = prefix_scores.reshape(batch, kv_heads, -1, length)
    own_scores = jnp.einsum("bkge,bkez->bkgz", grouped, own_key, preferred_element_type=jnp.float32)
    factor = scale or size**-0.5
    prefix_weights, own_weights = softmax(
        [
            jnp.where(prefix_mask[:, None], soft_cap(prefix_scores * factor, cap), MASKED),
            jnp.where(own_mask[:, None], soft_cap(own_scores * factor, cap), MASKED),
        ]
    )
    prefix_weights = prefix_weights.reshape(count, batch // count, kv_heads, -1, length)
    out = jnp.einsum("nrkgp,nkpe->nrkge", prefix_weights.astype(prefix_value.dtype), prefix_value)
    out = out.reshape(batch, kv_heads, -1, out.shape[-1])
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
) -> Float[Array, "R S H v"]:
    """Attention of a batch to itself, its segments being ids or packs with shared prompts."""
    if isinstance(segments, SharedPrefix):
        return attend_packed(query, key, value, positions, segments, window, scale, cap)
    return attend(query, key, value, visible(positions, positions, segments, segments, window), scale, cap)


def attend_packed(
    query: Float[Array, "D X H E"],
    key: Float[Array, "D X K E"],
    value: Float[Array, "D X K v"],
    positions: Int[Array, "D X"],
    segments: SharedPrefix,
    window: Int[Array, ""] | int,
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "D X H v"]:
    """Prompts to themselves; rows to themselves and to their tokens' prompts, in one softmax."""
    parts, n, width = segments.prompt_segments.shape
    _, r, length = segments.segments.shape
    heads, size = query.shape[2:]

    def cut(x: Array) -> tuple[Array, Array]:
        prompts, rows = x[:, : n * width], x[:, n * width :]
        return prompts.reshape(parts * n, width, *x.shape[2:]), rows.reshape(parts * r, length, *x.shape[2:])

    (prompt_query, row_query), (prompt_key, row_key), (prompt_value, row_value) = cut(query), cut(key), cut(value)
    prompt_places, row_places = cut(positions)
    own = segments.prompt_segments.reshape(parts * n, width)
    mask = visible(prompt_places, prompt_places, own, own, window)
    prompts = attend(prompt_query, prompt_key, prompt_value, mask, scale, cap)
    ids = segments.segments.reshape(parts * r, length)
    own_mask = visible(row_places, row_places, ids, ids, window)
    # All prompts of the pack lie before each row; a token sees the one that it continues.
    numbers = jnp.arange(1, n + 1)[:, None] * segments.prompt_segments  # [D, n, P]: 0 in the padding
    wanted = jnp.where(segments.segments > 0, segments.prompt + 1, -1).reshape(parts, r * length)
    places = (row_places.reshape(parts, -1), prompt_places.reshape(parts, -1))
    prompt_mask = visible(*places, wanted, numbers.reshape(parts, -1), window).reshape(parts, r, length, n * width)
    kv_heads = key.shape[2]
    grouped = row_query.reshape(parts, r, length, kv_heads, -1, size)
    before = (x.reshape(parts, n * width, *x.shape[2:]) for x in (prompt_key, prompt_value))
    before_key, before_value = before
    factor = scale or size**-0.5
    before_scores = jnp.einsum("drskge,dzke->drkgsz", grouped, before_key, preferred_element_type=jnp.float32)
    own_scores = jnp.einsum(
        "bskge,bzke->bkgsz", grouped.reshape(-1, *grouped.shape[2:]), row_key, preferred_element_type=jnp.float32
    ).reshape(parts, r, kv_heads, -1, length, length)
    before_weights, own_weights = softmax(
        [
            jnp.where(prompt_mask[:, :, None, None], soft_cap(before_scores * factor, cap), MASKED),
            jnp.where(own_mask.reshape(parts, r, 1, 1, length, length), soft_cap(own_scores * factor, cap), MASKED),
        ]
    )
    out = jnp.einsum("drkgsz,dzke->drskge", before_weights.astype(value.dtype), before_value)
    own_weights = own_weights.reshape(parts * r, *own_weights.shape[2:]).astype(value.dtype)
    out = out + jnp.einsum("bkgsz,bzke->bskge", own_weights, row_value).reshape(out.shape)
    return jnp.concatenate([x.reshape(parts, -1, heads, value.shape[-1]) for x in (prompts, out)], axis=1)


def softmax(segments: list[Float[Array, "*R z"]]) -> list[Float[Array, "*R z"]]:
    """One softmax over the last axes of several arrays, as if they were concatenated."""
    top = segments[0].max(axis=-1, keepdims=True)
    for scores in segments[1:]:
        top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    exponentials = [jnp.exp(scores - top) for scores in segments]
    total = sum(e.sum(axis=-1, keepdims=True) for e in exponentials)
    return [e / total for e in exponentials]
