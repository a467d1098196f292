"""Every family against transformers: stored checkpoints and what transformers computes from them (make_parity.py)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import weights
from grpo_jax.models.cache import end_prompt, init_cache, lengthen
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.huggingface import read_folder, tensor_table

FOLDER = pathlib.Path(__file__).parent / "parity"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
# Compiling is what these tests cost, so `-m slow` has the rest: variants of a family that others cover in part, the
# gradients of families whose parts others have, and the decoding of families whose cache is read just as another's.
VARIANTS = {"deepseek_v3_plain", "llama_linear", "phi3"}
GRADED = {"deepseek_v3", "gemma2", "gemma3", "qwen3_moe"}
DECODED = {"deepseek_v3", "gemma3", "phi4_mini"}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in two thirds of the CPU seconds: 3.3 against 5.3 a gradient
LENGTHS, COLUMNS, PROMPT = np.array([12, 9, 5]), 12, 8
REAL = {"right": np.arange(COLUMNS)[None] < LENGTHS[:, None]}
REAL["left"] = REAL["right"][:, ::-1]


def each(quick):
    """All families as parameters of a test, slow unless quick."""
    return pytest.mark.parametrize(
        "family", [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
    )


@functools.cache
def stored(family):
    """Architecture, parameters, and what transformers computed."""
    with np.load(FOLDER / family / "expected.npz") as file:
        expected = dict(file)
    return *read_folder(str(FOLDER / family)), expected


def places(side):
    real = REAL[side]
    return np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32), real.astype(np.int32)


@functools.cache
def compiled(family):
    """(params, tokens, positions, segments) -> logits."""
    module = Decoder(stored(family)[0])

    def logits(params, *given):
        return module.apply({"params": params}, module.apply({"params": params}, *given), method="logits")

    return jax.jit(logits, compiler_options=QUICK)


def gradient_of(family):
    """The gradient of sum_t w_t log p(token t)."""
    architecture, params, expected = stored(family)
    module, (positions, segments) = Decoder(architecture), places("left")
    tokens, weights = expected["left"].astype(np.int32), expected["left_weights"]

    def loss(params):
        hidden = module.apply({"params": params}, tokens, positions, segments)
        logits = module.apply({"params": params}, hidden, method="logits")
        logps = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(chosen * weights[:, 1:] * segments[:, :-1])

    return jax.device_get(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))


@pytest.mark.parametrize("side", ["left", "right"])
@each(set(FAMILIES) - VARIANTS)
def test_logits(family, side):
    want = stored(family)[2][f"{side}_logits"]
    _, params, expected = stored(family)
    got = np.asarray(compiled(family)(params, expected[side].astype(np.int32), *places(side)))
    assert got.dtype == np.float32 and np.abs(want[REAL[side]]).max() > 1  # a bound of 2e-5 says something
    np.testing.assert_allclose(got[REAL[side]], want[REAL[side]], rtol=0, atol=2e-5)


@each(GRADED)
def test_gradients(family):
    architecture, _, expected = stored(family)
    gradient = gradient_of(family)
    names, rows = tensor_table(architecture)
    got = {name: np.array(g) for name, g in weights.disassemble(architecture, names, gradient, rows)}
    for name in [name for name in got if name.endswith("e_score_correction_bias")]:
        np.testing.assert_array_equal(got.pop(name), 0)  # it chooses experts, which has no gradient
    want = {name.removeprefix("gradient/"): g for name, g in expected.items() if name.startswith("gradient/")}
    assert got.keys() == want.keys()
    embedding = got["model.embed_tokens.weight"]
    embedding[0] = want["model.embed_tokens.weight"][0]  # torch drops what reaches the padding id's row as an input
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in want.values()))
    for name, g in want.items():
        assert np.abs(got[name] - g).max() <= 1e-4 * max(np.abs(g).max(), 1e-3 * norm), name
    difference = np.sqrt(sum(np.sum(np.square(got[name] - g, dtype=np.float64)) for name, g in want.items()))
    assert difference <= 1e-5 * norm


@pytest.mark.parametrize("room", [None, 2], ids=["whole_cache", "cache_that_grows"])
@each(DECODED)
def test_prefill_and_decode_equal_the_full_pass(family, room):
    architecture, params, expected = stored(family)
    module, rows = Decoder(architecture, scanned=False), len(LENGTHS)
    positions, segments = places("left")

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, tokens):
        variables = unstack({"params": params}, architecture)
        cache = init_cache(architecture, rows, PROMPT, rows, COLUMNS - PROMPT, jnp.float32, room)
        prompt = (x[:, :PROMPT] for x in (tokens, positions, segments))
        hidden, cache = module.apply(variables, *prompt, cache)

        def step(cache, column):
            one = (jax.lax.dynamic_slice_in_dim(x, column, 1, axis=1) for x in (tokens, positions, segments))
            hidden, cache = module.apply(variables, *one, cache)
            return cache, hidden[:, 0]

        columns, cache, parts = jnp.arange(PROMPT, COLUMNS), end_prompt(cache), [jnp.swapaxes(hidden[:, -1:], 0, 1)]
        if room is not None:
            cache, part = jax.lax.scan(step, cache, columns[:room])
            columns, cache, parts = columns[room:], lengthen(cache, COLUMNS - PROMPT), [*parts, part]
        hidden = jnp.swapaxes(jnp.concatenate([*parts, jax.lax.scan(step, cache, columns)[1]]), 0, 1)
        return module.apply(variables, hidden, method="logits")

    got = run(params, expected["left"].astype(np.int32))
    np.testing.assert_allclose(got, expected["left_logits"][:, PROMPT - 1 :], rtol=0, atol=2e-5)
