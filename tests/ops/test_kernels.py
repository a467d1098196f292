"""The backends' attention kernels against plain attention in float64, and where they are used.

Pallas' kernel runs interpreted, cuDNN's wrapper with jax's XLA implementation of the same call.
"""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.config import ModelConfig
from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Latent, Stack
from grpo_jax.models.build import build_policy, choose_kernel
from grpo_jax.models.decoder import Decoder
from grpo_jax.ops.attention import visible
from grpo_jax.ops.kernels import Kernel, block_and_length, cudnn_attention, splash_attention
from grpo_jax.ops.packing import pack_groups, pack_index, plain_pack
from grpo_jax.recipes.sft import make_sft_batch
from grpo_jax.sampler.sample import left_positions

LENGTH, HEADS, KV_HEADS = 271, 4, 2  # three blocks of 128, the last one mostly added
# Segments of each row by length; 0 is padding: between, before and after them, and a row of nothing else.
ROWS = ([(1, 120), (2, 1), (0, 9), (3, 90)], [(0, 30), (1, 200)], [(0, LENGTH)], [(1, LENGTH)])


def rows_of_segments():
    """(positions, segments) [R, S]; positions count in each segment."""
    segments, positions = np.zeros((2, len(ROWS), LENGTH), np.int32)
    for row, parts in enumerate(ROWS):
        start = 0
        for segment, length in parts:
            segments[row, start : start + length] = segment
            positions[row, start : start + length] = np.arange(length) * (segment > 0)
            start += length
    return positions, segments


def drawn(size, value_size):
    """Queries, keys, values and the gradient of what comes out, which is 0 in the padding."""
    random, rows = np.random.default_rng(0), len(ROWS)
    shapes = ((HEADS, size), (KV_HEADS, size), (KV_HEADS, value_size), (HEADS, value_size))
    *inputs, change = (random.normal(size=(rows, LENGTH, *shape)).astype(np.float32) for shape in shapes)
    return inputs, change * (rows_of_segments()[1] > 0)[..., None, None]


def plain(inputs, change, window, scale, cap):
    """Values and gradients in float64, by row, head and segment: d scores = w (d - w d), times the cap's slope."""
    query, key, value = (x.astype(np.float64) for x in inputs)
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    gradients = [np.zeros(x.shape) for x in (query, key, value)]
    for row, parts in enumerate(ROWS):
        ends = np.cumsum([length for _, length in parts])
        for (segment, length), end in zip(parts, ends, strict=True):
            here, back = slice(end - length, end), np.subtract.outer(np.arange(length), np.arange(length))
            seen = (back >= 0) & (back < (window or LENGTH))
            for head in range(HEADS if segment else 0):
                kv = head * KV_HEADS // HEADS
                q, k, v, d = query[row, here, head], key[row, here, kv], value[row, here, kv], change[row, here, head]
                scores = scale * q @ k.T
                slope = 1 - np.tanh(scores / cap) ** 2 if cap else 1.0
                scores = np.where(seen, cap * np.tanh(scores / cap) if cap else scores, -np.inf)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[row, here, head] = weights @ v
                by_weight = d @ v.T
                by_score = scale * slope * weights * (by_weight - (weights * by_weight).sum(axis=1, keepdims=True))
                gradients[0][row, here, head] += by_score @ k
                gradients[1][row, here, kv] += by_score.T @ q
                gradients[2][row, here, kv] += weights.T @ d
    return out, gradients


def held_equal(attend, inputs, change, window, scale, cap):
    """`attend(query, key, value)` against `plain`: values at tokens, gradients everywhere."""

    def weighed(*given):
        out = attend(*given)
        return jnp.sum(out * change), out

    gradients, out = jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))(*inputs)
    want, wanted_gradients = plain(inputs, change, window, scale, cap)
    real = rows_of_segments()[1] > 0
    np.testing.assert_allclose(np.asarray(out)[real], want[real], atol=3e-6)
    assert np.isfinite(out).all()
    for got, wanted in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize(("size", "value_size", "window", "cap"), [(5, 5, 0, 0.0), (6, 4, 40, 1.5)])
def test_splash_attention_is_plain_attention(size, value_size, window, cap):
    inputs, change = drawn(size, value_size)
    segments = rows_of_segments()[1]
    how = {"window": window, "scale": 0.7, "cap": cap, "interpret": True}
    held_equal(lambda *x: splash_attention(*x, segments, **how), inputs, change, window, 0.7, cap)


@pytest.mark.parametrize(("size", "value_size", "window"), [(5, 5, 0), (8, 3, 40)])
def test_the_call_of_cudnn_is_plain_attention(size, value_size, window):
    inputs, change = drawn(size, value_size)
    held = jnp.asarray(window)

    def attend(*x):
        return cudnn_attention(*x, *rows_of_segments(), held, implementation="xla")

    held_equal(attend, inputs, change, window, size**-0.5, 0.0)


def test_cudnn_is_called_forward_and_backward(monkeypatch):
    """Lowered for a GPU that is not there."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    inputs, change = drawn(5, 3)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]

    def weighed(*given):
        return jnp.sum(cudnn_attention(*given, *rows_of_segments(), 40) * change)

    lowered = jax.jit(jax.grad(weighed, argnums=(0, 1, 2))).trace(*inputs).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text or '"__cudnn$fmhaScaleBiasSoftmax"' in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


def test_splash_attention_is_lowered_for_tpus():
    """Mosaic takes odd heads, values of another size, exact products of bfloat16 (libtpu: test_compile_chips.py)."""
    inputs, _ = drawn(6, 4)
    segments = rows_of_segments()[1]

    def weighed(*given):
        return jnp.sum(splash_attention(*given, segments, 40, 0.7, 1.5).astype(jnp.float32))

    given = [x.astype(jnp.bfloat16) for x in inputs]
    lowered = jax.jit(jax.grad(weighed, argnums=(0, 1, 2))).trace(*given).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert text.count("@tpu_custom_call(") == 3
    assert set(re.findall(r"splash_mha_(\w+?)_", text)) == {"fwd", "dq", "dkv"}


def test_slots_grow_with_positions_inside_segments():
    """What splash attention stands on: in every layout of rows, later by position is later by slot."""
    lengths, starts = jnp.array([[[4], [3], [5]]]), jnp.array([[2, 1, 2]])
    index = pack_index(pack_groups(lengths, 2, 8, 3), lengths, 0, (3, 2, 8))
    sequences = jnp.arange(24).reshape(1, 3, 1, 8)
    pack = plain_pack(sequences, starts, 6, index)
    rows = make_sft_batch([([7, 8, 9], [0, 1, 1]), ([5, 6], [0, 1])], [[1, 0], [0]], 8)
    layouts = [(rows.positions, rows.segments), (pack.positions, pack.segments), left_positions(np.array([3, 8]), 8)]
    for positions, segments in layouts:
        positions, segments = np.asarray(positions), np.asarray(segments)
        assert segments.max() > 0
        for window in (0, 2):
            seen = np.asarray(visible(positions, positions, segments, segments, window))
            for row, i, j in np.ndindex(seen.shape):
                same = segments[row, i] == segments[row, j] != 0
                assert seen[row, i, j] == (same and 0 <= i - j and (window == 0 or i - j < window))


def test_blocks_add_little():
    for length in (1, 128, 129, 271, 500, 513, 1024, 1600, 4097):
        block, padded = block_and_length(length)
        least = -(-length // 128) * 128
        assert padded % block == 0 and length <= padded <= 1.125 * least
    assert block_and_length(8192) == (512, 8192) and block_and_length(513) == (128, 640)


# The decoder.

MIXED = dataclasses.replace(tiny.architecture(), stacks=(Stack((0, 3, 0)), Stack((0,))), attention_cap=2.0)


@pytest.mark.slow
def test_a_decoder_attends_by_the_kernel_on_a_mesh():
    """Rows and heads over four devices, windows that differ inside one scan: hidden states and gradients are XLA's."""
    mesh = tiny.mesh(tiny.config(**{"mesh.data": 2, "mesh.tensor": 2}))
    modules = [Decoder(MIXED), Decoder(MIXED, kernel=Kernel("splash", mesh, interpret=True), remat="full")]
    variables = {"params": tiny.params(MIXED)}
    tokens = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (4, 12))
    segments = np.array([[0] * 2 + [1] * 10, [1] * 5 + [2] * 7, [1] * 12, [1] * 4 + [0] * 8])
    positions = np.maximum(np.arange(12) - np.array([[2], [0], [0], [0]]), 0)
    positions[1, 5:] -= 5

    def loss(variables, module):
        hidden = module.apply(variables, tokens, positions, segments) * (segments > 0)[..., None]
        return jnp.sum(hidden**2), hidden

    found = [jax.jit(jax.grad(lambda v, m=m: loss(v, m), has_aux=True))(variables) for m in modules]
    np.testing.assert_allclose(found[1][1], found[0][1], atol=2e-5)
    size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(found[0][0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * size), found[0][0], found[1][0])
    jaxprs = [str(jax.make_jaxpr(lambda v, m=m: m.apply(v, tokens, positions, segments))(variables)) for m in modules]
    assert ["pallas_call" in text for text in jaxprs] == [False, True]
    odd = jax.make_jaxpr(lambda v: modules[1].apply(v, tokens[:3], positions[:3], segments[:3]))(variables)
    assert "pallas_call" not in str(odd)  # three rows do not split over two devices


def machine(platform, tensor=1, capability="9.0", sequence=1):
    """What the choice reads of a mesh."""
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    axes = {"tensor": tensor, "sequence": sequence}
    return types.SimpleNamespace(devices=np.full((1, 1, tensor), device), shape=axes)


WIDE, LATENT = tiny.architecture(head_size=256), Latent(8, 0, 64, 64, 320)


@pytest.mark.parametrize(
    ("attention", "given", "fields", "want"),
    [
        ("auto", machine("cpu"), {}, None),
        ("auto", machine("tpu"), {}, "splash"),
        ("auto", machine("tpu", tensor=2), {}, "splash"),
        ("auto", machine("tpu", tensor=4), {}, None),
        ("auto", machine("gpu"), {}, "cudnn"),
        ("auto", machine("cuda"), {}, "cudnn"),
        ("auto", machine("gpu"), {"dtype": "float32"}, None),
        ("auto", machine("gpu", capability="gfx942"), {}, None),
        ("auto", machine("gpu"), {"of": MIXED}, None),
        ("auto", machine("gpu"), {"of": WIDE}, "cudnn"),
        ("auto", machine("gpu", capability="8.0"), {"of": WIDE}, None),
        ("auto", machine("gpu"), {"of": dataclasses.replace(WIDE, latent=LATENT)}, None),
        ("xla", machine("tpu"), {}, None),
        ("xla", machine("gpu"), {}, None),
        ("splash", machine("tpu"), {"of": MIXED}, "splash"),
        ("splash", machine("cpu"), {}, "'splash' is no kernel of the devices, which are cpus: take auto"),
        ("splash", machine("tpu", tensor=4), {}, "mesh.tensor=4 to divide the model's 2 key heads: lower it"),
        ("splash", machine("tpu", sequence=2), {}, "takes rows whole, and mesh.sequence=2 splits them: set 1"),
        ("auto", machine("tpu", sequence=2), {}, None),
        ("cudnn", machine("gpu"), {}, "cudnn"),
        ("cudnn", machine("tpu"), {}, "which are tpus: take auto"),
        ("cudnn", machine("gpu"), {"dtype": "float32"}, "takes no model.compute_dtype='float32': set bfloat16"),
        ("cudnn", machine("gpu"), {"of": MIXED}, "the model's are capped at 2: take auto"),
        ("cudnn", machine("gpu", capability="8.9"), {"of": WIDE}, "up to 128 features here, and the model's have 256"),
        ("cudnn", machine("gpu"), {"backend": "cpu"}, "this one is described: take auto"),
    ],
)
def test_which_kernel_attends(monkeypatch, attention, given, fields, want):
    monkeypatch.setattr(jax, "default_backend", lambda: fields.get("backend", "gpu"))
    config = ModelConfig(attention=attention, compute_dtype=fields.get("dtype", "bfloat16"))
    if want in (None, "splash", "cudnn"):
        kernel = choose_kernel(config, fields.get("of", tiny.architecture()), given)
        assert (kernel and kernel.name) == want
    else:
        with pytest.raises(InputError) as error:
            choose_kernel(config, fields.get("of", tiny.architecture()), given)
        assert want in str(error.value) and "\n" not in str(error.value)


def test_a_named_kernel_needs_prompts_of_their_own():
    config = tiny.config(**{"model.attention": "splash", "train.share_prefix": True})
    with pytest.raises(InputError, match=r"set train\.share_prefix=False"):
        build_policy(config, tiny.architecture(), machine("tpu"))
    config = tiny.config(**{"model.attention": "splash", "train.share_prefix": False})
    assert build_policy(config, tiny.architecture(), machine("tpu")).kernel is not None
