"""A model for notebooks and outside checks: `model = grpo_jax.load(path)`, then logits, log-probabilities, texts.

The decoder and the sampler are those of training. Shapes are padded to powers of two, so that a program is compiled
once for each of them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.config import SamplerConfig, TextConfig
from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.models.loading import load_model
from grpo_jax.ops.logprobs import token_logps
from grpo_jax.sampler.sample import choose_pieces, sample
from grpo_jax.sampler.stops import stop_table
from grpo_jax.sampler.types import Prompts
from grpo_jax.text import Tokenizer, encode_prompt

Prompt = str | Sequence[Mapping[str, Any]]
LEAST_LENGTH = 16  # shorter rows are padded to it
LOGITS_CHUNK = 1024  # positions whose logits exist at once where only log-probabilities are asked for


def load(path: str, dtype: str = "float32", precision: str = "highest") -> "Model":
    """A model from whatever `model.path` takes, adapters merged.

    `dtype` is that of weights and products ('float32' or 'bfloat16'; logits stay float32), `precision` jax's
    matmul precision. Raises InputError for anything that is no model.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype={dtype!r} is not float32 or bfloat16: use one of them")
    loaded = load_model(path)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.dtype(dtype)), loaded.params)
    return Model(loaded.architecture, params, loaded.tokenizer, dtype, precision)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Parameters, tokenizer, and what can be asked of them.

    Attributes:
      architecture: sizes.
      params: the parameter tree of `Architecture`.
      tokenizer: turns texts into tokens.
      dtype: of activations and products.
      precision: jax's matmul precision.
    """

    architecture: Architecture
    params: dict[str, Any]
    tokenizer: Tokenizer
    dtype: str = "float32"
    precision: str = "highest"

    def logits(
        self, tokens: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, "B"] | None = None
    ) -> Float[np.ndarray, "B S V"]:
        """Logits after each token, float32; rows are padded on the right, what stands beyond `lengths` gives 0."""
        return self._by_row(self._logits, tokens, lengths)

    def log_probs(
        self, tokens: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, "B"] | None = None
    ) -> Float[np.ndarray, "B S"]:
        """log p(token | the tokens before it) at temperature 1; 0 for the first token and beyond `lengths`."""
        return self._by_row(self._log_probs, tokens, lengths)

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        template: str = "",
        system_prompt: str = "",
        end_tokens: tuple[str, ...] = (),
        stop: tuple[str, ...] = (),
        batch_size: int = 32,
    ) -> list[list[str]]:
        """For each prompt (a text, or a list of messages) `n` completions as texts.

        `template` is as `text.template`; empty: the model's own, or 'plain' where it has none. Temperature 0 is
        greedy; `end_tokens` and `stop` (texts) end a completion. At most about `batch_size` completions are drawn at
        once; how many does not change the texts. Raises InputError for prompts that the template refuses and options
        out of range.
        """
        if isinstance(prompts, str) or not all(isinstance(p, str | list | tuple) for p in prompts):
            raise InputError(f"prompts={repr(prompts)[:60]} must be a list of texts or of lists of messages")
        config = SamplerConfig(
            group_size=n,
            max_new_tokens=max_new_tokens,
            temperature=float(temperature),
            top_k=top_k,
            top_p=float(top_p),
            cache_dtype=self.dtype,
            stop=tuple(stop),
        )
        _check(config, batch_size)
        template = template or ("chat" if self.tokenizer.chat_template else "plain")
        text = TextConfig(template=template, system_prompt=system_prompt, end_tokens=tuple(end_tokens))
        end_ids = self.tokenizer.with_end_tokens(text.end_tokens).end_ids
        if not end_ids:
            raise InputError("end_tokens=(): the model names no end token: name one")
        ids = [encode_prompt(prompt, text, self.tokenizer) for prompt in prompts]
        at_once = _bucket(max(batch_size // n, 1))
        texts: list[list[str]] = []
        for first in range(0, len(ids), at_once):
            texts += self._generated(ids[first : first + at_once], first, config, end_ids, seed)
        return texts

    def _generated(
        self, ids: list[list[int]], first: int, config: SamplerConfig, end_ids: tuple[int, ...], seed: int
    ) -> list[list[str]]:
        rollout = self._sampler(config, end_ids)(self._unstacked, _prompts(ids, first), jax.random.key(seed))
        tokens, lengths = jax.device_get((rollout.tokens, rollout.lengths))
        found = [self.tokenizer.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        return [found[i * config.group_size : (i + 1) * config.group_size] for i in range(len(ids))]

    def _by_row(self, program: Any, tokens: Any, lengths: Any) -> np.ndarray:
        """A program on rows padded to powers of two, and its result cut back."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens: {tokens.dtype}{list(tokens.shape)} must be padded integers [rows, length]")
        rows, length = tokens.shape
        lengths = np.full(rows, length) if lengths is None else np.asarray(lengths)
        if lengths.shape != (rows,) or (rows and not 0 <= lengths.min() <= lengths.max() <= length):
            raise InputError(f"lengths={lengths.tolist()} must be {rows} numbers from 0 to {length}, one a row")
        inside = np.where(np.arange(length) < lengths[:, None], tokens, 0)
        if inside.size and not 0 <= inside.min() <= inside.max() < self.architecture.vocabulary:
            raise InputError(f"tokens: {inside.max()} is not below the vocabulary, {self.architecture.vocabulary}")
        wide = np.zeros((_bucket(rows), _bucket(max(length, LEAST_LENGTH))), np.int32)
        wide[:rows, :length] = inside
        counts = np.zeros(len(wide), np.int32)
        counts[:rows] = lengths
        return np.asarray(program(self.params, wide, counts))[:rows, :length]

    @functools.cached_property
    def _module(self) -> Decoder:
        return Decoder(self.architecture, dtype=jnp.dtype(self.dtype))

    @functools.cached_property
    def _logits(self) -> Any:
        """(params, tokens, lengths) -> logits; jax keeps a program for each shape."""

        def program(params: Any, tokens: Array, lengths: Array) -> Array:
            hidden, inside = self._hidden(params, tokens, lengths)
            logits = self._module.apply({"params": params}, hidden, method="logits")
            return jnp.where(inside[..., None], logits, 0.0)  # pyright: ignore[reportArgumentType]

        return self._compiled(program)

    @functools.cached_property
    def _log_probs(self) -> Any:
        def program(params: Any, tokens: Array, lengths: Array) -> Array:
            hidden, inside = self._hidden(params, tokens, lengths)

            def unembed(hidden: Array) -> Any:
                return self._module.apply({"params": params}, hidden, method="logits")

            logps, _ = token_logps(hidden[:, :-1], unembed, tokens[:, 1:], 1.0, LOGITS_CHUNK)
            return jnp.pad(jnp.where(inside[:, 1:], logps, 0.0), ((0, 0), (1, 0)))

        return self._compiled(program)

    def _hidden(self, params: Any, tokens: Array, lengths: Array) -> tuple[Any, Array]:
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        inside = place < lengths[:, None]
        return self._module.apply({"params": params}, tokens, place, inside.astype(jnp.int32)), inside

    @functools.cached_property
    def _unstacked(self) -> dict[str, Any]:
        """Each layer's parameters on their own, as the sampler wants them."""
        return unstack({"params": self.params}, self.architecture)

    @functools.cached_property
    def _samplers(self) -> dict[tuple[SamplerConfig, tuple[int, ...]], Any]:
        return {}

    def _sampler(self, config: SamplerConfig, end_ids: tuple[int, ...]) -> Any:
        """(variables, prompts, key) -> rollout; one for each way of sampling."""
        if (config, end_ids) not in self._samplers:
            module, pieced = self._module.clone(scanned=False), choose_pieces(config, jax.default_backend())
            spelled = self.tokenizer.token_bytes() if config.stop else []
            stops = stop_table(config.stop, spelled + [b""] * (self.architecture.vocabulary - len(spelled)))

            def program(variables: Any, prompts: Prompts, key: Array) -> Any:
                return sample(module, variables, prompts, key, pieced, end_ids, stops)

            self._samplers[config, end_ids] = self._compiled(program)
        return self._samplers[config, end_ids]

    def _compiled(self, program: Any) -> Any:
        def precise(*arguments: Any) -> Any:
            with jax.default_matmul_precision(self.precision):
                return program(*arguments)

        return jax.jit(precise)


def _bucket(size: int) -> int:
    """The power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _prompts(ids: Sequence[Sequence[int]], first: int) -> Prompts:
    """Token lists as a batch: padded on the left, filler up to a power of two; draw numbers from `first` on."""
    count, width = _bucket(len(ids)), _bucket(max(LEAST_LENGTH, *map(len, ids)))
    tokens = np.zeros((count, width), np.int32)
    for row, prompt in zip(tokens, ids, strict=False):
        row[width - len(prompt) :] = prompt
    lengths = [len(prompt) for prompt in ids] + [1] * (count - len(ids))
    return Prompts(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths, jnp.int32),
        draw=jnp.arange(first, first + count, dtype=jnp.int32),
        row=jnp.arange(count, dtype=jnp.int32),
        weight=(jnp.arange(count) < len(ids)).astype(jnp.float32),
        columns={},
    )


def _check(config: SamplerConfig, batch_size: int) -> None:
    numbers = {"n": config.group_size, "max_new_tokens": config.max_new_tokens, "batch_size": batch_size}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    for name, value, least, most in (
        ("temperature", config.temperature, 0.0, float("inf")),
        ("top_k", config.top_k, 0, float("inf")),
        ("top_p", config.top_p, 1e-6, 1.0),
    ):
        if not least <= value <= most:
            raise InputError(f"{name}={value} must lie between {least} and {most}")
