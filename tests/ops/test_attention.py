"""Attention over one and two segments, rotary positions and RMS norm against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest

from grpo_jax.ops.attention import attend, attend_shared_prefix, softmax, visible
from grpo_jax.ops.norms import rms_norm
from grpo_jax.ops.rope import Rope, frequencies, rotary_angles, rotate

N, R, P, T, H, K, E = 2, 3, 5, 4, 4, 2, 6
B = N * R


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_attention(query, key, value, mask):
    """By row, query and head, over the keys that the mask lets through."""
    out = np.zeros(query.shape)
    for b, s, h in np.ndindex(query.shape[:3]):
        seen, head = np.flatnonzero(mask[b, s]), h // (query.shape[2] // key.shape[2])
        scores = key[b, seen, head].astype(np.float64) @ query[b, s, h] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights @ value[b, seen, head] / weights.sum()
    return out


def random_mask(*shape):
    mask = np.random.default_rng(7).random(shape) < 0.6
    mask[..., 0] = True
    return mask


def test_who_sees_whom():
    random = np.random.default_rng(0)
    positions, key_positions = random.integers(0, 6, (2, 5)), random.integers(0, 6, (2, 7))
    segments, key_segments = random.integers(0, 3, (2, 5)), random.integers(0, 3, (2, 7))
    for window in (0, 1, 3):
        seen = jax.jit(functools.partial(visible, window=window))
        got = np.asarray(seen(positions, key_positions, segments, key_segments))
        for b, s, z in np.ndindex(got.shape):
            back = positions[b, s] - key_positions[b, z]
            near = back >= 0 and (window == 0 or back < window)
            assert got[b, s, z] == (segments[b, s] == key_segments[b, z] and key_segments[b, z] > 0 and near)


def test_attention_with_grouped_queries():
    query, key, value = normal(B, T, H, E), normal(B, P, K, E, seed=1), normal(B, P, K, E, seed=2)
    mask = random_mask(B, T, P)
    got = jax.jit(attend)(query, key, value, mask)
    np.testing.assert_allclose(got, plain_attention(query, key, value, mask), atol=1e-6)


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_gradients_are_those_of_the_formula(cap):
    """By row, query and head in float64: d scores = w (d - w d), and cap tanh's slope."""
    query, key, value = normal(B, T, H, E), normal(B, P, K, E, seed=1), normal(B, P, K, E, seed=2)
    mask, change = random_mask(B, T, P), normal(B, T, H, E, seed=3)
    compute = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a, mask, 0.3, cap) * change), argnums=(0, 1, 2)))
    got = compute(query, key, value)
    want = [np.zeros(x.shape) for x in (query, key, value)]
    for b, s, h in np.ndindex(query.shape[:3]):
        seen, k = np.flatnonzero(mask[b, s]), h // (H // K)
        keys, values = key[b, seen, k].astype(np.float64), value[b, seen, k].astype(np.float64)
        scores = 0.3 * keys @ query[b, s, h]
        slope = 1 - np.tanh(scores / cap) ** 2 if cap else 1.0
        weights = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        weights /= weights.sum()
        by_weight = values @ change[b, s, h]
        by_score = 0.3 * slope * weights * (by_weight - weights @ by_weight)
        want[0][b, s, h] += by_score @ keys
        want[1][b, seen, k] += by_score[:, None] * query[b, s, h]
        want[2][b, seen, k] += weights[:, None] * change[b, s, h]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-6)


def test_a_shared_prefix_and_own_keys_are_one_softmax():
    query = normal(B, 1, H, E)
    prefix, own = (normal(N, P, K, E, seed=i) for i in (1, 2)), (normal(B, T, K, E, seed=i) for i in (3, 4))
    prefix_mask, own_mask = random_mask(B, 1, P), random_mask(B, 1, T)
    (prefix_key, prefix_value), (own_key, own_value) = prefix, own
    keys = [x.transpose(0, 2, 3, 1) for x in (prefix_key, own_key)]
    values = [np.swapaxes(x, 1, 2) for x in (prefix_value, own_value)]
    got = jax.jit(attend_shared_prefix)(query, (keys[0], values[0], prefix_mask), (keys[1], values[1], own_mask))

    def joined(prefix, own):
        return np.concatenate([np.repeat(prefix, R, axis=0), own], axis=1)

    mask = np.concatenate([prefix_mask, own_mask], axis=2)
    want = plain_attention(query, joined(prefix_key, own_key), joined(prefix_value, own_value), mask)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_row_that_sees_nothing_is_finite_in_value_and_gradient():
    query, key, value = normal(1, 2, 1, E), normal(1, 3, 1, E, seed=1), normal(1, 3, 1, E, seed=2)
    mask = np.array([[[True, False, False], [False] * 3]])
    out, gradient = jax.jit(jax.value_and_grad(lambda q: attend(q, key, value, mask).sum()))(query)
    assert np.isfinite(out) and np.isfinite(gradient).all()


def test_masked_keys_have_no_influence_whatever_they_hold():
    query, key, value = normal(1, 1, H, E), normal(1, P, K, E, seed=1), normal(1, P, K, E, seed=2)
    mask = np.array([[[True, True, False, False, True]]])
    compiled = jax.jit(attend)
    first = compiled(query, key, value, mask)
    hidden = np.array([False, False, True, True, False])[None, :, None, None]
    other = [np.where(hidden, np.float32(junk), x) for junk, x in ((1e6, key), (3.0, value))]
    np.testing.assert_array_equal(first, compiled(query, *other, mask))
    square = jax.grad(lambda k, v: (attend(query, k, v, mask) ** 2).sum(), argnums=(0, 1))
    by_key, by_value = jax.jit(square)(key, value)
    assert not np.any(by_key[0, 2:4]) and not np.any(by_value[0, 2:4]) and np.any(by_key[0, 4])


def test_softmax_over_segments_with_large_scores():
    pieces = softmax([jnp.array([[1e4, 0.0]]), jnp.array([[1e4, -1e30, 9999.0]])])
    total = 2 + np.exp(-1)
    np.testing.assert_allclose(np.concatenate(pieces, 1), [[1 / total, 0, 1 / total, 0, np.exp(-1) / total]], rtol=1e-6)


@pytest.mark.parametrize("theta", [1e2, 1e5])
def test_rotary_positions(theta):
    x, positions = normal(2, 4, H, E), np.array([[0, 1, 2, 3], [5, 900, 17, 2047]])
    got = jax.jit(lambda x, at: rotate(x, *rotary_angles(at, frequencies(Rope(theta=theta), E, 2048))))(x, positions)
    want = [numpy_decoder.rope(x[b].astype(np.float64), positions[b], theta) for b in range(2)]
    np.testing.assert_allclose(got, want, atol=3e-4)  # an angle of 2047 is rounded to 1e-4 in float32
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = normal(1, 1, 1, E), normal(1, 1, 1, E, seed=1)

    def score(at_q, at_k):
        turned = [rotate(x, *rotary_angles(np.array([[at]]), E, 100.0)) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    np.testing.assert_allclose(score(9, 4), score(5, 0), rtol=1e-5)
    assert abs(score(9, 4) - score(4, 9)) > 1e-3


def test_rms_norm():
    x, scale = normal(3, 8) * 5, normal(8, seed=1)
    for eps in (1e-6, 0.5):
        want = numpy_decoder.rms_norm(x.astype(np.float64), scale.astype(np.float64), eps)
        np.testing.assert_allclose(rms_norm(x, scale, eps), want, rtol=1e-5)
    half = rms_norm(jnp.asarray(x, jnp.bfloat16), scale, 0.5)
    assert half.dtype == jnp.bfloat16  # and the mean was taken in float32:
    wide = numpy_decoder.rms_norm(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64), scale.astype(np.float64), 0.5)
    np.testing.assert_array_equal(half, jnp.asarray(wide, jnp.bfloat16))
