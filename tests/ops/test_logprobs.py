"""Chunked log-probabilities equal the plain ones, in value and gradient, with bounded memory."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from grpo_jax.ops.logprobs import entropy, gather_logps, token_logps

B, T, D, V = 3, 7, 5, 11
CHUNKS = [0, 1, 4, 100]
DTYPES = {"float32": 1e-5, "float64": 1e-12}


def example():
    random = np.random.default_rng(0)
    parameters = {"kernel": random.normal(size=(D, V)), "bias": random.normal(size=V)}
    return random.normal(size=(B, T, D)), parameters, random.integers(0, V, (B, T)), random.normal(size=(B, T))


def oracle(hidden, parameters, targets, temperature, cotangent):
    """Log-probs, entropies, and the gradients of sum(cotangent * logps) by hand: d logp / d logits = onehot - p."""
    logits = (hidden @ parameters["kernel"] + parameters["bias"]) / temperature
    unnormalised = np.exp(logits - logits.max(-1, keepdims=True))
    p = unnormalised / unnormalised.sum(-1, keepdims=True)
    logps = np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0]
    by_logits = cotangent[..., None] * (np.eye(V)[targets] - p) / temperature
    grads = (
        by_logits @ parameters["kernel"].T,
        {"kernel": np.einsum("btd,btv->dv", hidden, by_logits), "bias": by_logits.sum((0, 1))},
    )
    return logps, -(p * np.log(p)).sum(-1), grads


@pytest.mark.parametrize(("chunk", "dtype"), [(c, "float64") for c in CHUNKS] + [(0, "float32"), (4, "float32")])
def test_values_and_gradients_against_numpy(chunk, dtype):
    hidden, parameters, tokens, cotangent = example()
    targets = jnp.array(tokens)
    want_logps, want_entropy, want_grads = oracle(hidden, parameters, tokens, 0.7, cotangent)

    def loss(hidden, parameters):
        logps, entropies = token_logps(
            hidden, lambda h: h @ parameters["kernel"] + parameters["bias"], targets, 0.7, chunk
        )
        return jnp.sum(logps * cotangent) + jnp.sum(entropies), (logps, entropies)

    with jax.enable_x64(dtype == "float64"):
        arguments = jax.tree.map(lambda x: jnp.array(x, dtype), (hidden, parameters))
        cotangent = jnp.array(cotangent, dtype)
        compute = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, (logps, entropies)), grads = jax.jit(compute)(*arguments)
        assert logps.dtype == entropies.dtype == dtype
    assert logps.shape == entropies.shape == (B, T)
    close = functools.partial(np.testing.assert_allclose, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    close(logps, want_logps)
    close(entropies, want_entropy)
    # The entropy is in the loss above and not in these gradients.
    jax.tree.map(close, grads, want_grads)


@pytest.mark.parametrize("chunk", [0, 4])
def test_the_entropy_carries_its_gradient_when_asked(chunk):
    """By hand: d H / d logits = -p (log p + H)."""
    hidden, parameters, tokens, weights = example()
    _, want, _ = oracle(hidden, parameters, tokens, 0.7, weights)
    logits = (hidden @ parameters["kernel"] + parameters["bias"]) / 0.7
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_logits = -weights[..., None] * np.exp(logps) * (logps + want[..., None]) / 0.7

    def loss(kernel):
        def unembed(h):
            return h @ kernel + parameters["bias"]

        entropies = token_logps(jnp.array(hidden), unembed, jnp.array(tokens), 0.7, chunk, entropy_gradient=True)[1]
        return jnp.sum(entropies * weights)

    with jax.enable_x64(True):
        grad = jax.jit(jax.grad(loss))(jnp.array(parameters["kernel"]))
    np.testing.assert_allclose(grad, np.einsum("btd,btv->dv", hidden, by_logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 9, 16, 30, 1000])
def test_no_more_than_a_chunk_of_logits_exists_at_once(chunk):
    seen = []

    def unembed(h):
        seen.append(int(np.prod(h.shape[:-1])))
        return jnp.zeros((*h.shape[:-1], V))

    hidden, targets = jnp.zeros((8, 15, D)), jnp.zeros((8, 15), jnp.int32)
    jax.eval_shape(jax.grad(lambda h: token_logps(h, unembed, targets, 1.0, chunk)[0].sum()), hidden)
    assert seen and max(seen) <= chunk


def test_memory_with_chunks_does_not_grow_with_positions_times_vocabulary():
    rows, vocabulary = 2, 4096
    kernel = jnp.zeros((D, vocabulary))

    def temporaries(length, chunk):
        def loss(hidden, kernel, targets):
            return token_logps(hidden, lambda h: h @ kernel, targets, 1.0, chunk)[0].sum()

        shapes = jax.ShapeDtypeStruct((rows, length, D), jnp.float32), kernel, jnp.zeros((rows, length), jnp.int32)
        memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    more_logits = rows * (256 - 64) * vocabulary * 4
    assert temporaries(256, 0) - temporaries(64, 0) >= more_logits
    assert temporaries(256, 16) - temporaries(64, 16) < more_logits / 50
    assert temporaries(256, 16) < more_logits / 5


@pytest.mark.parametrize("chunk", [0, 4])
def test_bfloat16_logits_are_widened_before_the_softmax(chunk):
    hidden, parameters, targets, _ = example()
    kernel = jnp.array(parameters["kernel"], jnp.bfloat16)
    hidden = jnp.array(hidden, jnp.bfloat16)
    compute = jax.jit(lambda hidden, targets: token_logps(hidden, lambda h: h @ kernel, targets, 0.5, chunk))
    logps, entropies = compute(hidden, targets)
    assert logps.dtype == entropies.dtype == jnp.float32
    logits = np.asarray((hidden @ kernel).astype(jnp.float32), np.float64) / 0.5
    want = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(logps, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 2, 8])
def test_a_position_depends_on_its_own_hidden_state_and_target_only(chunk):
    hidden, parameters, targets, _ = example()
    hidden, targets, kernel = jnp.array(hidden), jnp.array(targets), jnp.array(parameters["kernel"])

    def at(hidden):
        return token_logps(hidden, lambda h: h @ kernel, targets, 1.0, chunk)[0][1, 4]

    moved = np.any(np.asarray(jax.jit(jax.grad(at))(hidden)) != 0, axis=-1)
    assert moved[1, 4] and moved.sum() == 1


def test_the_sampler_and_the_trainer_share_one_formula():
    hidden, parameters, targets, _ = example()
    logits = jnp.array(hidden @ parameters["kernel"], jnp.float32)
    logps, entropies = token_logps(logits, lambda h: h, jnp.array(targets), 0.7, 0)
    np.testing.assert_array_equal(gather_logps(logits[:, 2] / 0.7, jnp.array(targets[:, 2])), logps[:, 2])
    np.testing.assert_array_equal(entropy(logits[:, 2] / 0.7), entropies[:, 2])


def test_extreme_logits():
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [3e38, -3e38, 0.0], [1e4, 1e4, -1e4]])
    np.testing.assert_allclose(entropy(logits), [np.log(2), 0.0, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(gather_logps(logits, jnp.array([0, 0, 1])), [-np.log(2), 0.0, -np.log(2)], rtol=1e-6)
    grad = jax.grad(lambda logits: gather_logps(logits, jnp.array([0, 0, 1])).sum())(logits)
    np.testing.assert_allclose(grad, [[0.5, 0, -0.5], [0, 0, 0], [-0.5, 0.5, 0]], atol=1e-6)


def test_golden_entropy(shared_dir):
    cases = json.loads((shared_dir / "golden" / "golden_grpo.json").read_text())["cases"]
    cases = [case for case in cases if "logits" in case["inputs"]]
    assert cases
    for case in cases:
        inputs, mask = case["inputs"], np.array(case["inputs"]["mask"], bool)
        with jax.enable_x64(True):
            logits, tokens = jnp.array(inputs["logits"]), jnp.array(inputs["tokens"])
            logps, entropies = jax.jit(lambda h, t: token_logps(h, lambda x: x, t, 1.0, 3))(logits, tokens)
        for got, want in ((logps, inputs["logp_new"]), (entropies, case["expected"]["entropy"])):
            np.testing.assert_allclose(np.array(got)[mask], np.array(want)[mask], rtol=1e-9, atol=1e-12)


def test_a_negative_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk=-1 must not be negative"):
        token_logps(jnp.zeros((1, 1, 1)), lambda h: h, jnp.zeros((1, 1), jnp.int32), 1.0, -1)


def test_chunks_of_a_sharded_batch_move_no_hidden_state_between_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    hidden = jax.ShapeDtypeStruct((16, 32, D), jnp.float32, sharding=rows)
    kernel = jax.ShapeDtypeStruct((D, V), jnp.float32, sharding=whole)
    targets = jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=rows)

    def loss(hidden, kernel, targets):
        return token_logps(hidden, lambda h: h @ kernel, targets, 1.0, 64)[0].sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, kernel, targets).compile().as_text()
    assert program is not None and "all-reduce(" in program  # of the kernel's gradient
    assert not {"all-gather(", "all-to-all(", "collective-permute("} & set(re.findall(r"[a-z-]+\(", program))
