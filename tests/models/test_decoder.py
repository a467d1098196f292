"""The decoder against float64 numpy; who may see whom, by zero gradients; packing, adapters, layouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny

from grpo_jax.models.architecture import Stack
from grpo_jax.models.decoder import Decoder, init_params, unstack

# Two stacks, whose layers look back at all, at 3 and at 2 tokens.
TWO_STACKS = dataclasses.replace(tiny.architecture(), stacks=(Stack((0, 3)), Stack((2,))))
UNTIED = tiny.architecture(tied=False, rope_theta=100.0, norm_eps=1e-3)
ONE_LAYER = tiny.architecture(layers=1)
B, S = 3, 8
LENGTHS = np.array([8, 5, 1])


def left_padded(lengths=LENGTHS, width=S, seed=0):
    """Tokens, positions and segments of rows padded on the left; padding holds random ids and positions."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, tiny.VOCABULARY, (len(lengths), width)).astype(np.int32)
    place = np.arange(width)[None, :] - (width - lengths[:, None])
    positions = np.where(place >= 0, place, random.integers(0, width, place.shape)).astype(np.int32)
    return tokens, positions, (place >= 0).astype(np.int32)


@functools.cache
def logits_of(architecture, remat="none", scanned=True, dtype="float32", unroll=1):
    """A jitted (variables, tokens, positions, segments) -> logits."""
    module = Decoder(architecture, dtype=jnp.dtype(dtype), remat=remat, scanned=scanned, unroll=unroll)

    @jax.jit
    def logits(variables, *inputs):
        return module.apply(variables, module.apply(variables, *inputs), method="logits")

    return logits


def oracle(params, architecture, tokens, positions, segments, adapters=None):
    rows = zip(tokens, positions, segments, strict=True)
    return np.stack([numpy_decoder.forward(params, architecture, *row, adapters) for row in rows])


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("architecture", [TWO_STACKS, UNTIED], ids=["two_stacks_tied", "untied"])
def test_against_numpy(architecture):
    params, inputs = tiny.params(architecture), left_padded()
    got = np.asarray(logits_of(architecture)({"params": params}, *inputs))
    assert got.dtype == np.float32 and got.shape == (B, S, tiny.VOCABULARY)
    real = inputs[2] == 1
    close(got[real], oracle(params, architecture, *inputs)[real])


def test_the_layout_of_sampling_computes_the_same():
    params, inputs = tiny.params(TWO_STACKS), left_padded()
    variables = {"params": params, "adapters": tiny.adapters(TWO_STACKS)}
    got = logits_of(TWO_STACKS, scanned=False)(unstack(variables, TWO_STACKS), *inputs)
    real = inputs[2] == 1
    close(np.asarray(got)[real], np.asarray(logits_of(TWO_STACKS)(variables, *inputs))[real])


def test_fresh_parameters_have_the_documented_tree():
    for architecture in (TWO_STACKS, UNTIED):
        shapes = jax.eval_shape(lambda a=architecture: init_params(Decoder(a), jax.random.key(0)))
        assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, tiny.params(architecture))
    wide = dataclasses.replace(tiny.architecture(), width=64, heads=2, kv_heads=1, mlp_width=128)
    made = jax.device_get(jax.jit(lambda key: init_params(Decoder(wide), key))(jax.random.key(0)))
    for block, name, inputs in (("attention", "query", 64), ("mlp", "gate", 64), ("mlp", "down", 128)):
        kernel = made["stack_0"][block][name]["kernel"]
        assert kernel.std() * inputs**0.5 == pytest.approx(1, rel=0.1), name  # variance 1 / inputs
        assert not np.array_equal(kernel[0], kernel[1])
    assert made["embed"]["embedding"].std() * 8 == pytest.approx(1, rel=0.1)
    assert (made["stack_0"]["mlp_norm"]["scale"] == 1).all()


@functools.cache
def reach(architecture):
    """[B, S, B, S]: whether the logits at (b, s) change with the embedding that stands at (c, t)."""
    tokens, positions, segments = left_padded()
    params = tiny.params(architecture)
    # A token of its own at every place, so that the gradient by its embedding is that of the place.
    wide = dataclasses.replace(architecture, vocabulary=B * S, tied=False)
    embedding = np.random.default_rng(1).normal(size=(B * S, architecture.width)).astype(np.float32)
    params |= {"embed": {"embedding": embedding}, "head": tiny.params(wide)["head"]}
    tokens = np.arange(B * S).reshape(B, S)
    weights = np.random.default_rng(2).normal(size=(B * S, B * S)).astype(np.float32)

    @jax.jit
    def gradients(embedding):
        def read(embedding):
            variables = {"params": params | {"embed": {"embedding": embedding}}}
            logits = logits_of(wide)(variables, tokens, positions, segments)
            return jnp.sum(logits.reshape(B * S, -1) * weights, axis=-1)

        return jax.vmap(jax.vjp(read, embedding)[1])(jnp.eye(B * S))[0]

    return np.any(np.asarray(gradients(embedding)) != 0, axis=-1).reshape(B, S, B, S)


def test_gradients_flow_from_what_came_before_and_from_nowhere_else():
    _, positions, segments = left_padded()
    real = segments == 1
    for b, s in zip(*np.nonzero(real), strict=True):
        want = np.zeros((B, S), bool)
        want[b] = real[b] & (positions[b] <= positions[b, s])
        np.testing.assert_array_equal(reach(ONE_LAYER)[b, s], want)


def test_windows_bound_how_far_back_gradients_reach():
    _, positions, segments = left_padded()
    narrow = dataclasses.replace(ONE_LAYER, stacks=(Stack((3,)),))
    real = segments == 1
    for b, s in zip(*np.nonzero(real), strict=True):
        want = np.zeros((B, S), bool)
        distance = positions[b, s] - positions[b]
        want[b] = real[b] & (distance >= 0) & (distance < 3)
        np.testing.assert_array_equal(reach(narrow)[b, s], want)


def test_what_stands_in_the_padding_changes_no_bit():
    tokens, positions, segments = left_padded()
    padding = segments == 0
    run = functools.partial(logits_of(TWO_STACKS), {"params": tiny.params(TWO_STACKS)})
    first = np.asarray(run(tokens, positions, segments))
    other = np.asarray(run(np.where(padding, 7, tokens), np.where(padding, 0, positions), segments))
    np.testing.assert_array_equal(first[~padding], other[~padding])
    assert np.isfinite(first).all() and not np.array_equal(first, other)


def test_packed_segments_equal_rows_of_their_own():
    params = tiny.params(TWO_STACKS)
    lengths = (3, 4)
    tokens = np.random.default_rng(3).integers(0, tiny.VOCABULARY, (1, S)).astype(np.int32)
    positions = np.array([[*range(3), *range(4), 0]], np.int32)
    segments = np.array([[1] * 3 + [2] * 4 + [0]], np.int32)
    run = functools.partial(logits_of(TWO_STACKS), {"params": params})
    packed = np.asarray(run(tokens, positions, segments))[0]
    apart = np.zeros((2, S), np.int32)
    apart[0, :3], apart[1, :4] = tokens[0, :3], tokens[0, 3:7]
    place = np.broadcast_to(np.arange(S, dtype=np.int32), (2, S))
    own = np.asarray(run(apart, place, (place < np.array(lengths)[:, None]).astype(np.int32)))
    close(packed[:3], own[0, :3])
    close(packed[3:7], own[1, :4])
    want = oracle(params, TWO_STACKS, tokens, positions, segments)[0]
    close(packed[:7], want[:7])


def test_adapters_of_zero_are_the_base_and_others_the_merged_kernels():
    params, inputs = tiny.params(TWO_STACKS), left_padded()
    real = inputs[2] == 1
    run = logits_of(TWO_STACKS)
    base = np.asarray(run({"params": params}, *inputs))[real]
    none = np.asarray(run({"params": params, "adapters": tiny.adapters(TWO_STACKS, zero_b=True)}, *inputs))[real]
    np.testing.assert_array_equal(none, base)

    adapters = tiny.adapters(TWO_STACKS)
    merged = jax.tree.map(np.copy, params)
    for stack, blocks in adapters.items():
        for block, names in blocks.items():
            for name, leaf in names.items():
                merged[stack][block][name]["kernel"] += np.einsum("lir,lro->lio", leaf["a"], leaf["b"])
    added = np.asarray(run({"params": params, "adapters": adapters}, *inputs))[real]
    close(added, oracle(merged, TWO_STACKS, *inputs)[real])
    assert np.abs(added - base).max() > 0.1


def test_recomputing_in_the_backward_changes_no_gradient():
    """By name of the policy, each keeps less than the one before."""
    of = tiny.architecture(layers=4)
    params, tokens = tiny.params(of), np.random.default_rng(4).integers(0, tiny.VOCABULARY, (2, 64))
    inputs = (tokens, np.broadcast_to(np.arange(64), tokens.shape), np.ones_like(tokens))
    weights = np.random.default_rng(4).normal(size=(*tokens.shape, tiny.VOCABULARY))
    bytes_held, products, gradients = [], [], []
    for remat in ("none", "dots_saveable", "dots_with_no_batch_dims_saveable", "full"):

        def loss(params, remat=remat):
            return jnp.sum(logits_of(of, remat=remat)({"params": params}, *inputs) * weights)

        lowered = jax.jit(jax.grad(loss)).lower(params)
        products.append(lowered.as_text().count("dot_general"))
        compiled = lowered.compile()
        bytes_held.append(compiled.memory_analysis().temp_size_in_bytes)
        gradients.append(compiled(params))
    assert products == sorted(products) and len(set(products)) >= 3
    assert bytes_held == sorted(bytes_held, reverse=True) and len(set(bytes_held)) == 4, bytes_held
    for gradient in gradients[1:]:
        jax.tree.map(close, gradient, gradients[0])


def test_layers_in_a_row_change_no_gradient():
    """Also two and one of three; and what is to be recomputed is, where XLA could join it with the first time."""
    of = tiny.architecture(layers=3)
    params, tokens = tiny.params(of), np.random.default_rng(5).integers(0, tiny.VOCABULARY, (2, 64))
    inputs = (tokens, np.broadcast_to(np.arange(64), tokens.shape), np.ones_like(tokens))
    weights = np.random.default_rng(5).normal(size=(*tokens.shape, tiny.VOCABULARY))
    loops, held, gradients = {}, {}, {}
    for kind in [(remat, unroll) for remat in ("none", "full") for unroll in (1, 2, 3)]:

        def loss(params, kind=kind):
            return jnp.sum(logits_of(of, remat=kind[0], unroll=kind[1])({"params": params}, *inputs) * weights)

        lowered = jax.jit(jax.grad(loss)).lower(params)
        loops[kind] = lowered.as_text().count("stablehlo.while")
        compiled = lowered.compile()
        held[kind] = compiled.memory_analysis().temp_size_in_bytes
        gradients[kind] = compiled(params)
    for gradient in gradients.values():
        jax.tree.map(close, gradient, gradients["none", 1])
    assert loops["none", 1] - loops["none", 3] == 2, loops  # forward and backward
    assert all(held["full", unroll] < held["none", unroll] for unroll in (1, 2, 3)), held


def test_bfloat16_computes_near_float32_with_float32_logits():
    params, inputs = tiny.params(ONE_LAYER), left_padded()
    got = logits_of(ONE_LAYER, dtype="bfloat16")({"params": params}, *inputs)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) - oracle(params, ONE_LAYER, *inputs))[inputs[2] == 1]
    scale = np.abs(oracle(params, ONE_LAYER, *inputs)).max()
    assert 1e-4 * scale < error.max() < 0.05 * scale
