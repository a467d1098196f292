"""Packs: whole groups in few rows, and the decoder's log-probabilities the same as row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.models.decoder import Decoder
from grpo_jax.ops.logprobs import token_logps
from grpo_jax.ops.packing import (
    EMPTY,
    SharedPrefix,
    gather_groups,
    move,
    pack_groups,
    pack_index,
    plain_pack,
    plain_sequences,
    shared_pack,
)

ARCHITECTURE = tiny.architecture()
PARAMS = tiny.params(ARCHITECTURE)
D, N, G, P, T = 2, 5, 2, 4, 6
ROWS, PROMPTS = 3, 2
APART = PROMPTS * G  # so many rows that each prompt has its own


def cells(lengths, packing, width):
    """Every cell that a token takes: (part, pack, row, column) -> (group, completion, token)."""
    taken = {}
    for (d, n, g), length in np.ndenumerate(lengths):
        for t in range(length):
            where = (d, int(packing.pack[d, n]), int(packing.row[d, n, g]), int(packing.offset[d, n, g]) + t)
            assert where not in taken and where[3] < width
            taken[where] = (n, g, t)
    return taken


@functools.cache
def packed(shape, rows, width, prompts):
    @jax.jit
    def run(lengths):
        packing = pack_groups(lengths, rows, width, prompts)
        of_number = functools.partial(pack_index, packing, lengths, shape=(prompts, rows, width))
        return packing, jax.vmap(of_number)(jnp.arange(shape[1]))

    return run


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=D * N * G, max_size=D * N * G), st.sampled_from([ROWS, APART]))
def test_every_token_has_a_cell_of_its_own_and_groups_stay_whole(flat, rows):
    lengths = np.array(flat).reshape(D, N, G)
    packing, index = jax.device_get(packed((D, N, G), rows, T, PROMPTS)(lengths))
    taken = cells(lengths, packing, T)
    assert all(row < rows and pack < packing.count[d] for d, pack, row, _ in taken)
    if rows == APART:
        assert all(row // G == packing.slot[d, n] for (d, _, row, _), (n, _, _) in taken.items())
    real = lengths.any(2)
    for d in range(D):
        held = [(packing.pack[d, n], packing.slot[d, n]) for n in range(N) if real[d, n]]
        assert held == sorted(set(held)) and all(slot < PROMPTS for _, slot in held)
        assert packing.count[d] == (held[-1][0] + 1 if held else 0)
        for n in range(N):
            place = (index.groups[packing.pack[d, n], d, packing.slot[d, n]] == n) if real[d, n] else True
            assert place
    assert (index.groups >= 0).sum() == real.sum()
    assert (index.token != EMPTY).sum() == lengths.sum() == (index.cell != EMPTY).sum()
    for (d, pack, row, column), (n, g, t) in taken.items():
        token = index.token[pack, d, row, column]
        assert token == (packing.slot[d, n] * G + g) * T + t
        assert index.cell[pack, d, packing.slot[d, n], g, t] == row * T + column


def test_rows_apart_take_no_more_packs_than_their_prompts_do():
    """Short or long, `PROMPTS` groups a pack: as many as without rows apart, which prompts limit too."""
    for length in (1, T):
        packing, _ = packed((D, N, G), APART, T, PROMPTS)(np.full((D, N, G), length))
        np.testing.assert_array_equal(packing.count, -(-N // PROMPTS))


def test_short_completions_take_few_packs_and_long_ones_one_each():
    short = np.full((1, 8, 4), 2)
    packing, _ = packed((1, 8, 4), 4, 8, 4)(short)
    assert packing.count[0] == 2  # 4 x 4 completions of 2 tokens fill 4 rows of 8
    packing, _ = packed((1, 8, 4), 4, 8, 4)(np.full((1, 8, 4), 8))
    assert packing.count[0] == 8
    with pytest.raises(ValueError, match="rows=3"):
        pack_groups(jnp.asarray(short), 3, 8, 4)


def test_moving_there_and_its_gradient_back():
    x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    to = np.array([[3, EMPTY, 0, 5], [1, 2, EMPTY, EMPTY]])
    back = np.full((2, 6), EMPTY)
    for d, i in np.argwhere(to != EMPTY):
        back[d, to[d, i]] = i
    weight = np.arange(8.0, dtype=np.float32).reshape(2, 4)
    value, gradient = jax.value_and_grad(lambda x: (move(x, to, back) * weight).sum())(x)
    want = np.zeros_like(x)
    for d, i in np.argwhere(to != EMPTY):
        want[d, to[d, i]] = weight[d, i]
    np.testing.assert_array_equal(gradient, want)
    np.testing.assert_allclose(value, (want * x).sum(), rtol=1e-6)


def batch():
    random = np.random.default_rng(5)
    lengths = np.array([[[6, 1], [2, 3], [0, 0], [1, 1], [6, 6]], [[0, 4], [1, 0], [2, 2], [6, 5], [3, 3]]])
    prompt_lengths = np.array([[4, 1, 2, 3, 4], [2, 3, 4, 1, 2]])
    prompts = random.integers(0, tiny.VOCABULARY, (D, N, P)).astype(np.int32)
    tokens = random.integers(0, tiny.VOCABULARY, (D, N, G, T)).astype(np.int32)
    return lengths, prompt_lengths, prompts, tokens


def test_columns_in_chunks_hold_a_part_of_every_prompt_and_row():
    random = np.random.default_rng(1)
    prompts, rows = random.normal(size=(2, 3, 4, 5)), random.normal(size=(2, 2, 6, 5))
    ids = [np.ones(x.shape[:3], np.int32) for x in (prompts, rows)]
    for chunks in (1, 2):
        pack = SharedPrefix(ids[0], ids[1], ids[1], chunks)
        laid = np.asarray(pack.lay(prompts, rows))
        assert laid.shape == (2, 3 * 4 + 2 * 6, 5)
        for first, back in zip((prompts, rows), pack.cut(laid), strict=True):
            np.testing.assert_array_equal(back, first.astype(np.float32))
    halves = laid.reshape(2, 2, -1, 5)
    np.testing.assert_allclose(halves[:, 0, :6], prompts[:, :, :2].reshape(2, 6, 5))
    np.testing.assert_allclose(halves[:, 1, 6:], rows[:, :, 3:].reshape(2, 6, 5))


@functools.cache
def oracle():
    lengths, prompt_lengths, prompts, tokens = batch()
    want = np.zeros(tokens.shape)
    for (d, n, g), length in np.ndenumerate(lengths):
        if length:
            prompt = prompts[d, n, P - prompt_lengths[d, n] :]
            row = tokens[d, n, g, :length]
            want[d, n, g, :length] = numpy_decoder.completion_logps(PARAMS, ARCHITECTURE, prompt, row)
    return want


def packed_gradient(params, architecture, shared, weight, rows=ROWS):
    """The gradient of the weighted sum of all log-probabilities, pack by pack, and these [D, N, G, T]."""
    lengths, prompt_lengths, prompts, tokens = (jnp.asarray(x) for x in batch())
    module = Decoder(architecture)
    if not shared:  # completions on their own, each a group of one
        prompts, prompt_lengths = (jnp.repeat(x, G, axis=1) for x in (prompts, prompt_lengths))
        tokens, weight, lengths = (x.reshape(D, N * G, 1, *x.shape[3:]) for x in (tokens, weight, lengths))
    width = T if shared else P + T
    sizes = lengths if shared else jnp.where(lengths > 0, lengths + prompt_lengths[..., None], 0)
    packing = pack_groups(sizes, rows, width, PROMPTS)

    def of_pack(i):  # a loop, as in the step: unrolled, it compiles five times as long
        index = pack_index(packing, sizes, i, (PROMPTS, rows, width))
        own = gather_groups((prompts, prompt_lengths, tokens), index.groups)
        own_weight, own_lengths = gather_groups((weight, lengths), index.groups)
        real = (jnp.arange(T) < own_lengths[..., None]) & (index.groups >= 0)[..., None, None]
        if shared:
            pack = shared_pack(*own, index)
            assert pack.segments.apart == (rows == APART)
        else:
            pack = plain_pack(plain_sequences(*own), own[1], T, index)

        def total(params):
            hidden = module.apply({"params": params}, pack.tokens, pack.positions, pack.segments)
            logits = functools.partial(module.apply, {"params": params}, method="logits")
            logps, _ = token_logps(pack.predictions(hidden), logits, pack.targets)
            logps = jnp.where(real, move(logps, pack.rows, pack.back), 0)
            return (logps * own_weight).sum(), logps

        return jax.grad(total, has_aux=True)(params)

    gradients, stored = jax.lax.map(of_pack, jnp.arange(tokens.shape[1]))
    by_group = jax.vmap(lambda s, k, n: s[k, n], (1, 0, 0))(stored, packing.pack, packing.slot)
    by_group = jnp.where((lengths.any(2) > 0)[..., None, None], by_group, 0).reshape(D, N, G, T)
    return jax.tree.map(lambda x: x.sum(0), gradients), by_group


@pytest.mark.parametrize(
    ("shared", "rows"), [(True, ROWS), (True, APART), (False, ROWS)], ids=["shared", "rows apart", "plain"]
)
def test_log_probabilities_and_gradients_of_packs_are_those_of_rows(shared, rows):
    weight = np.random.default_rng(1).normal(size=(D, N, G, T)).astype(np.float32)
    run = jax.jit(functools.partial(packed_gradient, architecture=ARCHITECTURE, shared=shared, rows=rows))
    gradient, logps = run(PARAMS, weight=weight)
    np.testing.assert_allclose(logps, oracle(), atol=2e-5)
    _, plain = reference_gradient(weight)
    for (path, got), want in zip(
        jax.tree_util.tree_flatten_with_path(gradient)[0], jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5 * max(np.abs(want).max(), 1.0), err_msg=str(path))


@functools.cache
def plain_gradient():
    lengths, prompt_lengths, prompts, tokens = batch()
    module = Decoder(ARCHITECTURE)
    rows = []
    for (d, n, g), length in np.ndenumerate(lengths):
        prompt = prompts[d, n, P - prompt_lengths[d, n] :]
        rows.append(np.concatenate([prompt, tokens[d, n, g, :length], np.zeros(P + T, np.int32)])[: P + T])
    rows = np.array(rows)
    start = np.repeat(prompt_lengths.reshape(-1), G)
    whole = start + lengths.reshape(-1)
    place = np.broadcast_to(np.arange(P + T), rows.shape)
    segments = (place < whole[:, None]).astype(np.int32)

    @jax.jit
    def run(params, weight):
        def total(params):
            hidden = module.apply({"params": params}, rows, place, segments)
            logits = functools.partial(module.apply, {"params": params}, method="logits")
            logps, _ = token_logps(hidden[:, :-1], logits, rows[:, 1:])
            at = np.minimum(start[:, None] - 1 + np.arange(T), P + T - 2)
            logps = jnp.take_along_axis(logps, at, axis=1)
            real = np.arange(T) < lengths.reshape(-1, 1)
            return (jnp.where(real, logps, 0) * weight.reshape(-1, T)).sum()

        return jax.value_and_grad(total)(params)

    return run


def reference_gradient(weight):
    """The same sum and its gradient, each completion in a row of its own."""
    return jax.device_get(plain_gradient()(PARAMS, weight))
