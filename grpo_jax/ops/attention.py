"""Attention with grouped queries over one or two segments of keys, in one softmax.

Who sees whom is told by explicit positions, segment ids and windows, never deduced from slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
    value: Float[Array, "B Z K E"],
    mask: Bool[Array, "B S Z"],
) -> Float[Array, "B S H E"]:
    """softmax(q k^T / sqrt(E)) v with H / K queries a key head; the softmax is float32."""
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = jnp.einsum("bskge,bzke->bkgsz", grouped, key, preferred_element_type=jnp.float32) * size**-0.5
    weights = softmax([jnp.where(mask[:, None, None], scores, MASKED)])[0]
    out = jnp.einsum("bkgsz,bzke->bskge", weights.astype(value.dtype), value)
    return out.reshape(batch, length, heads, size)


def attend_shared_prefix(
    query: Float[Array, "B 1 H E"],
    prefix: tuple[Float[Array, "N K P E"], Float[Array, "N K P E"], Bool[Array, "B 1 P"]],
    own: tuple[Float[Array, "B K Z E"], Float[Array, "B K Z E"], Bool[Array, "B 1 Z"]],
) -> Float[Array, "B 1 H E"]:
    """One query a row over a prefix that B / N adjacent rows share and the row's own keys, in one softmax.

    The prefix is read where it lies: its keys are never copied to the rows that share it.
    """
    batch, _, heads, size = query.shape
    (prefix_key, prefix_value, prefix_mask), (own_key, own_value, own_mask) = prefix, own
    count, kv_heads, length, _ = prefix_key.shape
    grouped = query.reshape(batch, kv_heads, -1, size)
    by_prefix = query.reshape(count, batch // count, kv_heads, -1, size)
    prefix_scores = jnp.einsum("nrkge,nkpe->nrkgp", by_prefix, prefix_key, preferred_element_type=jnp.float32)
    prefix_scores = prefix_scores.reshape(batch, kv_heads, -1, length)
    own_scores = jnp.einsum("bkge,bkze->bkgz", grouped, own_key, preferred_element_type=jnp.float32)
    scale = size**-0.5
    prefix_weights, own_weights = softmax(
        [
            jnp.where(prefix_mask[:, None], prefix_scores * scale, MASKED),
            jnp.where(own_mask[:, None], own_scores * scale, MASKED),
        ]
    )
    prefix_weights = prefix_weights.reshape(count, batch // count, kv_heads, -1, length)
    out = jnp.einsum("nrkgp,nkpe->nrkge", prefix_weights.astype(prefix_value.dtype), prefix_value)
    out = out.reshape(batch, kv_heads, -1, size)
    out = out + jnp.einsum("bkgz,bkze->bkge", own_weights.astype(own_value.dtype), own_value)
    return out.reshape(batch, 1, heads, size)


def softmax(segments: list[Float[Array, "*R z"]]) -> list[Float[Array, "*R z"]]:
    """One softmax over the last axes of several arrays, as if they were concatenated."""
    top = segments[0].max(axis=-1, keepdims=True)
    for scores in segments[1:]:
        top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    exponentials = [jnp.exp(scores - top) for scores in segments]
    total = sum(e.sum(axis=-1, keepdims=True) for e in exponentials)
    return [e / total for e in exponentials]
