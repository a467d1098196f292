"""Prefill and decode through the cache equal the pass over the whole sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny

from grpo_jax.models.architecture import Stack
from grpo_jax.models.cache import end_prompt, init_cache, take_prompts
from grpo_jax.models.decoder import Decoder, unstack

# Looks back at all, at 3 and at 2 tokens: the windows end in the prompt, then in the completion.
ARCHITECTURE = dataclasses.replace(tiny.architecture(), stacks=(Stack((0, 3)), Stack((2,))))
PARAMS = tiny.params(ARCHITECTURE)
P, T, GROUP = 5, 4, 2
LENGTHS = np.array([5, 2])
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, P)).astype(np.int32)
COMPLETIONS = np.random.default_rng(1).integers(0, tiny.VOCABULARY, (2 * GROUP, T)).astype(np.int32)


@functools.cache
def decoded(dtype="float32", copied=False):
    """Logits [B, T, V] at the last prompt token and the completion's tokens but its last, and the cache."""
    module = Decoder(ARCHITECTURE, scanned=False)
    variables = unstack({"params": PARAMS}, ARCHITECTURE)
    place = np.arange(P)[None] - (P - LENGTHS[:, None])

    @jax.jit
    def run(tokens):
        cache = init_cache(ARCHITECTURE, 2, P, 2 * GROUP, T, jnp.dtype(dtype))
        hidden, cache = module.apply(variables, tokens, np.maximum(place, 0), (place >= 0).astype(np.int32), cache)
        cache = end_prompt(cache)
        if copied:
            into = end_prompt(init_cache(ARCHITECTURE, 2 * GROUP, P, 2 * GROUP, T, jnp.dtype(dtype)))
            source = jnp.repeat(jnp.arange(2), GROUP)[None]
            cache = take_prompts(into, cache, source, jnp.ones(2 * GROUP, bool))

        def step(cache, t):
            token = jax.lax.dynamic_slice_in_dim(COMPLETIONS, t, 1, axis=1)
            at = np.repeat(LENGTHS, GROUP)[:, None] + t
            hidden, cache = module.apply(variables, token, at, np.ones((2 * GROUP, 1), np.int32), cache)
            return cache, hidden[:, 0]

        cache, rest = jax.lax.scan(step, cache, jnp.arange(T - 1))
        hidden = jnp.concatenate([jnp.repeat(hidden[:, -1:], GROUP, axis=0), jnp.swapaxes(rest, 0, 1)], axis=1)
        return module.apply(variables, hidden, method="logits"), cache

    return jax.device_get(run(TOKENS))


def whole():
    """The same logits by the float64 oracle, each row in one pass without padding or cache."""
    rows = []
    for b, completion in enumerate(COMPLETIONS):
        prompt = TOKENS[b // GROUP, P - LENGTHS[b // GROUP] :]
        tokens = np.concatenate([prompt, completion])
        place = np.arange(len(tokens))
        logits = numpy_decoder.forward(PARAMS, ARCHITECTURE, tokens, place, np.ones_like(place))
        rows.append(logits[len(prompt) - 1 : -1])
    return np.stack(rows)


@pytest.mark.parametrize("copied", [False, True], ids=["shared_prompt", "copied_prompt"])
def test_prefill_and_decode_equal_the_whole_pass(copied):
    want = whole()
    np.testing.assert_allclose(decoded(copied=copied)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_the_prompt_is_kept_once_unless_copied():
    shared, copied = decoded()[1], decoded(copied=True)[1]
    for one, many in zip(shared.layers, copied.layers, strict=True):
        assert one.prompt_value.shape == (2, ARCHITECTURE.kv_heads, P, ARCHITECTURE.head_size)
        np.testing.assert_array_equal(many.prompt_key, np.repeat(one.prompt_key, GROUP, axis=0))
        np.testing.assert_array_equal(many.prompt_value, np.repeat(one.prompt_value, GROUP, axis=0))
    assert shared.index.cursor == T - 1 and shared.index.segments.tolist() == [[1] * (T - 1) + [0]] * (2 * GROUP)
    np.testing.assert_array_equal(
        shared.index.positions[:, : T - 1] - np.arange(T - 1), np.repeat(LENGTHS, GROUP)[:, None].repeat(T - 1, 1)
    )


def test_a_bfloat16_cache_halves_the_memory_and_moves_the_logits_a_little():
    logits, cache = decoded(dtype="bfloat16")
    assert {x.dtype.name for layer in cache.layers for x in jax.tree.leaves(layer)} == {"bfloat16"}
    want = whole()
    error = np.abs(logits - want)
    assert 1e-4 < error[:, 1:].max() < 0.03 * np.abs(want).max()
    assert error[:, 0].max() < 1e-5 * np.abs(want).max()  # the prompt's own pass does not read the cache
