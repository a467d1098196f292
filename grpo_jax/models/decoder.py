"""The decoder: one definition of the network for sampling and for training.

The protocol that a step needs of a model, and all that it needs (`module` is any flax module with it):

    hidden = module.apply(variables, tokens, positions, segments)              training, prefill's law
    hidden, cache = module.apply(variables, tokens, positions, segments, cache)  prefill and decode
    logits = module.apply(variables, hidden, method="logits")                  float32

`variables` is {"params": ...} and, when adapters are trained, {"adapters": ..., "adapter_scales": ...} beside it.
Layers are a list of stacks. With `scanned=True` (training) a stack's parameters carry a leading layer axis and
one compiled layer is scanned over it; with `scanned=False` (sampling) each layer has its own leaves
and its own cache buffers, updated in place; `unstack` maps the first layout to the second.
"""

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.cache import Cache, CacheIndex, LayerCache, read, start, write
from grpo_jax.ops.attention import attend_self, attend_shared_prefix
from grpo_jax.ops.norms import rms_norm
from grpo_jax.ops.rope import rotary_angles, rotate


class DecoderModule(Protocol):
    """What a step asks of a model; `Decoder` is one, any flax module that answers alike is another."""

    @property
    def architecture(self) -> Architecture:
        """Sizes, for the cache and for `unstack`."""
        ...

    def apply(self, variables: Any, *arguments: Any, method: Any = None) -> Any:
        """The calls of this file's first lines."""
        ...

    def clone(self, *, scanned: bool = True, remat: str = "none") -> "DecoderModule":
        """The same network in the other layout of layers, or with another rematerialisation."""
        ...


class Dense(nn.Module):
    """x W, plus x A B times a scale where adapters for this layer are given (LoRA, arXiv 2106.09685).

    W may be int8 with a scale for each column, `kernel_scale`: see `grpo_jax/models/lora.py`.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Projects the last axis to `features`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        # Rows are flattened: XLA's CPU backend computes the gradient of x [B, S, I] @ W, a product contracted
        # over two axes, three times slower than over one (a gated MLP's gradient: 0.169 to 0.051 CPU seconds).
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ kernel.astype(self.dtype)
        if self.has_variable("params", "kernel_scale"):
            y = y * self.get_variable("params", "kernel_scale").astype(self.dtype)
        if self.has_variable("adapters", "a"):
            a, b = self.get_variable("adapters", "a"), self.get_variable("adapters", "b")
            scale = self.get_variable("adapter_scales", "scale", jnp.ones((), self.dtype))
            y = y + scale.astype(self.dtype) * ((rows @ a.astype(self.dtype)) @ b.astype(self.dtype))
        return y.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
    """RMS norm with a learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, rotary positions and an optional window."""

    architecture: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, x, rotary, positions, segments, window, cache: tuple[LayerCache, CacheIndex] | None):
        """[B, S, D] to [B, S, D], and the layer's cache entry with the new keys and values written."""
        a = self.architecture
        batch, length, _ = x.shape

        def heads(name: str, count: int) -> Float[Array, "B S heads E"]:
            return Dense(count * a.head_size, self.dtype, name=name)(x).reshape(batch, length, count, a.head_size)

        query = rotate(heads("query", a.heads), *rotary)
        key, value = rotate(heads("key", a.kv_heads), *rotary), heads("value", a.kv_heads)
        entry, index = (None, None) if cache is None else (write(*cache, key, value), cache[1])
        if entry is not None and index is not None and index.prefilled:
            out = attend_shared_prefix(query, *read(entry, index, positions, segments, window, query.dtype))
        else:
            out = attend_self(query, key, value, positions, segments, window)
        out = out.reshape(batch, length, a.heads * a.head_size)
        return Dense(a.width, self.dtype, name="out")(out), entry


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    architecture: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The gated MLP."""
        a = self.architecture
        gate = Dense(a.mlp_width, self.dtype, name="gate")(x)
        up = Dense(a.mlp_width, self.dtype, name="up")(x)
        return Dense(a.width, self.dtype, name="down")(nn.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm decoder layer; written as a scan body: carry, window, cache in; carry, cache out."""

    architecture: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, x, window, cache, rotary, positions, segments):
        """x + attention(norm(x)), then x + mlp(norm(x))."""
        eps = self.architecture.norm_eps
        normed = Norm(eps, name="attention_norm")(x)
        out, cache = Attention(self.architecture, self.dtype, name="attention")(
            normed, rotary, positions, segments, window, cache
        )
        x = x + out
        x = x + Mlp(self.architecture, self.dtype, name="mlp")(Norm(eps, name="mlp_norm")(x))
        return x, cache


class Decoder(nn.Module):
    """Embedding, stacks of layers, final norm, output matrix."""

    architecture: Architecture
    dtype: Any = jnp.float32
    scanned: bool = True
    remat: str = "none"

    def setup(self):
        """Declares the parts; a stack is one scanned layer or a list of layers."""
        a = self.architecture
        self.embed = nn.Embed(
            a.vocabulary, a.width, embedding_init=nn.initializers.normal(a.width**-0.5), dtype=self.dtype
        )
        layer = nn.remat(Layer, prevent_cse=False) if self.remat == "full" else Layer
        if self.scanned:
            scan = nn.scan(
                layer,
                variable_axes={"params": 0, "adapters": 0, "adapter_scales": 0},
                split_rngs={"params": True},
                in_axes=(0, *(nn.broadcast,) * 4),  # pyright: ignore[reportArgumentType]
            )
            for i in range(len(a.stacks)):
                setattr(self, f"stack_{i}", scan(a, self.dtype))
        else:
            for i, stack in enumerate(a.stacks):
                for j in range(stack.layers):
                    setattr(self, f"stack_{i}_layer_{j}", layer(a, self.dtype))
        self.final_norm = Norm(a.norm_eps)
        if not a.tied:
            self.head = Dense(a.vocabulary, self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        cache: Cache | None = None,
    ):
        """Hidden states [B, S, D] (with a cache: and the cache with these tokens written).

        `positions` count from 0 in each segment; `segments` are 0 for padding, and only tokens of
        the same segment see each other.
        """
        a = self.architecture
        x = self.embed(tokens)
        shared = (rotary_angles(positions, a.head_size, a.rope_theta), positions, segments)
        if self.scanned:
            assert cache is None, "a cache needs scanned=False: see unstack"
            for i, stack in enumerate(a.stacks):
                x, _ = getattr(self, f"stack_{i}")(x, jnp.asarray(stack.windows, jnp.int32), None, *shared)
            return self.final_norm(x)
        entries = []
        index = None if cache is None else start(cache.index, positions, segments)
        for i, stack in enumerate(a.stacks):
            for j, window in enumerate(stack.windows):
                held = None if cache is None else (cache.layers[len(entries)], index)
                x, entry = getattr(self, f"stack_{i}_layer_{j}")(x, window, held, *shared)
                entries.append(entry)
        hidden = self.final_norm(x)
        return hidden if index is None else (hidden, Cache(layers=tuple(entries), index=index))

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits over the vocabulary, float32."""
        if self.architecture.tied:
            kernel = self.embed.embedding.astype(self.dtype)
            rows = hidden.reshape(-1, hidden.shape[-1])
            logits = jnp.einsum("rd,vd->rv", rows, kernel, preferred_element_type=jnp.float32)
            return logits.reshape(*hidden.shape[:-1], self.architecture.vocabulary)
        return self.head(hidden).astype(jnp.float32)


def init_params(module: Decoder, key: jax.Array) -> dict:
    """Fresh float32 parameters in the scanned layout: kernels of variance 1 / inputs, embeddings 1 / D, norms 1.

    Not Llama's normal(0.02), which is right for widths near 2,500: at width 128 three times that makes a base put 0.76
    on a right chain of thought after 300 steps, where 0.02 makes it 0.25.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)

    def both(module: Any, tokens: Array) -> Array:
        return module.logits(module(tokens, tokens, tokens))

    return dict(nn.init(both, module.clone(scanned=True))(key, tokens)["params"])


def unstack(variables: dict, architecture: Architecture) -> dict:
    """Variables of the scanned layout with each layer's leaves on their own, as sampling wants them."""
    out = {}
    for collection, tree in variables.items():
        flat = {k: v for k, v in tree.items() if not k.startswith("stack_")}
        for i, stack in enumerate(architecture.stacks):
            for j in range(stack.layers) if f"stack_{i}" in tree else ():
                flat[f"stack_{i}_layer_{j}"] = jax.tree.map(lambda leaf, j=j: leaf[j], tree[f"stack_{i}"])
        out[collection] = flat
    return out
