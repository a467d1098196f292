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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.models.architecture import Architecture, Stack
from grpo_jax.models.cache import Cache, CacheIndex, LayerEntry, read, start, write, write_latent
from grpo_jax.ops.attention import PRODUCT, attend_shared_prefix, soft_cap
from grpo_jax.ops.experts import load_excess, mix_experts, mix_experts_on, report_excess, route
from grpo_jax.ops.kernels import Kernel, attend_by
from grpo_jax.ops.norms import rms_norm
from grpo_jax.ops.packing import real_tokens, row_columns
from grpo_jax.ops.rope import frequencies, rotary_angles, rotate
from grpo_jax.parallel import (
    HOST,
    PACK_AXES,
    ROWS,
    SAMPLING_DROPS,
    row_shards,
    splits_columns,
)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """How activations [B, S, D] lie on a mesh; by default that is left to XLA.

    Attributes:
      mesh: whose devices they lie on.
      rows: what B and S lie over.
      columns: S lies over the mesh's axis sequence.
      drop: axes that expert kernels are gathered over.
    """

    mesh: Mesh | None = None
    rows: PartitionSpec = PartitionSpec()
    columns: bool = False
    drop: tuple[str, ...] = ()

    @property
    def over_columns(self) -> Mesh | None:
        """The mesh where S is split."""
        return self.mesh if self.columns else None

    def lay(self, x: Array) -> Array:
        """x on these devices.

        Left alone, XLA splits hidden states by width, as fsdp splits the embedding: every device then computes a part
        of all rows, and what is summed over devices grows with the batch.
        """
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.rows))


def place_of(mesh: Mesh | None, shape: tuple[int, ...], sampling: str | None) -> Place:
    """Where activations of this shape lie: by rows with `sampling`, which is `mesh.sampling`, else as packs do."""
    if mesh is None or mesh.size == 1:
        return Place()
    if sampling is not None:
        return Place(mesh, ROWS, drop=SAMPLING_DROPS[sampling]) if shape[0] % row_shards(mesh) == 0 else Place()
    if splits_columns(mesh, shape):
        return Place(mesh, PartitionSpec(PACK_AXES, "sequence"), True, ("fsdp",))
    if shape[0] % row_shards(mesh) == 0:  # rows that are no packs, of columns that do not split
        return Place(mesh, ROWS, drop=("fsdp",))
    return Place()


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


def parameter(
    module: nn.Module, name: str, initializer: Callable[..., Any], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """`module.param`, without tracing the initializer of a parameter that is there.

    flax does that to learn the shape: a third of the time that it took to trace thirty layers of a sampler.
    Raises flax's ScopeParamShapeError where the shapes differ.
    """
    if not module.has_variable("params", name):
        return module.param(name, initializer, shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise ScopeParamShapeError(name, module.scope.path_text if module.scope else "", value.shape, shape)
    return value


class Dense(nn.Module):
    """x W (+ b), plus x A B times a scale where adapters for this layer are given (LoRA, arXiv 2106.09685).

    W may be int8 with a scale for each column, `kernel_scale`: see `grpo_jax/models/lora.py`.
    """

    features: int
    dtype: Any
    use_bias: bool = False
    flat: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Projects the last axis to `features`."""
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        # Rows are flattened: XLA's CPU backend computes the gradient of x [B, S, I] @ W, a product contracted
        # over two axes, three times slower than over one (a gated MLP's gradient: 0.169 to 0.051 CPU seconds).
        # Columns that lie over several devices are left alone: flattened they would have to come together.
        rows = x.reshape(-1, x.shape[-1]) if self.flat else x
        y = rows @ kernel.astype(self.dtype)
        if self.has_variable("params", "kernel_scale"):
            y = y * self.get_variable("params", "kernel_scale").astype(self.dtype)
        if self.has_variable("adapters", "a"):
            a, b = self.get_variable("adapters", "a"), self.get_variable("adapters", "b")
            scale = self.get_variable("adapter_scales", "scale", jnp.ones((), self.dtype))
            y = y + scale.astype(self.dtype) * ((rows @ a.astype(self.dtype)) @ b.astype(self.dtype))
        if self.use_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)

    def matrix(self) -> Float[Array, "I O"]:
        """W with the adapters merged, for who contracts it on another side (absorbed latent attention)."""
        kernel = self.get_variable("params", "kernel").astype(self.dtype)
        if self.has_variable("params", "kernel_scale"):
            kernel = kernel * self.get_variable("params", "kernel_scale").astype(self.dtype)
        if self.has_variable("adapters", "a"):
            a, b = self.get_variable("adapters", "a"), self.get_variable("adapters", "b")
            scale = self.get_variable("adapter_scales", "scale", jnp.ones((), self.dtype)).astype(self.dtype)
            kernel = kernel + scale * (a.astype(self.dtype) @ b.astype(self.dtype))
        return kernel


class Norm(nn.Module):
    """RMS norm with a learned scale, or a learned scale - 1 (`offset`)."""

    eps: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        if self.offset:
            return rms_norm(x, 1 + parameter(self, "scale", nn.initializers.zeros, (x.shape[-1],)), self.eps)
        return rms_norm(x, parameter(self, "scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, rotary positions and an optional window."""

    architecture: Architecture
    dtype: Any
    columns: Mesh | None = None
    kernel: Kernel | None = None

    @nn.compact
    def __call__(self, x, rotary, positions, segments, window, cache: tuple[LayerEntry, CacheIndex] | None):
        """[B, S, D] to [B, S, D], and the layer's cache entry with the new keys and values written."""
        a = self.architecture
        batch, length, _ = x.shape

        flat = self.columns is None

        def heads(name: str, count: int) -> Float[Array, "B S heads E"]:
            y = Dense(count * a.head_size, self.dtype, a.qkv_bias, flat, name=name)(x)
            y = y.reshape(batch, length, count, a.head_size)
            if name == "value":
                return y
            return rotate(Norm(a.norm_eps, a.norm_offset, name=f"{name}_norm")(y) if a.qk_norm else y, *rotary)

        query, key, value = heads("query", a.heads), heads("key", a.kv_heads), heads("value", a.kv_heads)
        entry, index = (None, None) if cache is None else (write(*cache, key, value), cache[1])
        how = (a.score_scale, a.attention_cap)
        if entry is not None and index is not None and index.prefilled:
            out = attend_shared_prefix(query, *read(entry, index, positions, segments, window, query.dtype), *how)
        else:
            kernel = self.kernel if cache is None else None
            out = attend_by(kernel, query, key, value, positions, segments, window, *how, self.columns)
        out = out.reshape(batch, length, a.heads * a.head_size)
        return Dense(a.width, self.dtype, a.out_bias, flat, name="out")(out), entry


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, equations 37 to 47).

    Over the tokens at hand (training, prefill) keys and values are expanded from the latent. Over a cache they are not:
    queries are taken into the latent's space and the mean latent out of it (the paper's absorbed form), so that what
    is read for a token is one latent, and not keys and values of all heads.
    """

    architecture: Architecture
    dtype: Any
    columns: Mesh | None = None
    kernel: Kernel | None = None

    @nn.compact
    def __call__(self, x, rotary, positions, segments, window, cache: tuple[LayerEntry, CacheIndex] | None):
        """[B, S, D] to [B, S, D], and the layer's cache entry with the new latents written."""
        a, m = self.architecture, self.architecture.latent
        assert m is not None
        batch, length, _ = x.shape
        query, latent, shared = self._project(x, rotary)
        dense = functools.partial(Dense, dtype=self.dtype, flat=self.columns is None)
        key_up = dense(a.heads * m.plain, name="key_up")
        value_up = dense(a.heads * m.value, name="value_up")
        entry, index = (None, None) if cache is None else (None, cache[1])
        if cache is not None:
            entry = write_latent(*cache, jnp.concatenate([latent, shared[:, :, 0]], axis=-1))
        if entry is not None and index is not None and index.prefilled:
            into = key_up.matrix().reshape(m.rank, a.heads, m.plain)
            query_latent = jnp.einsum("bshp,rhp->bshr", query[..., : m.plain], into)
            query = jnp.concatenate([query_latent, query[..., m.plain :]], axis=-1)
            held = read(entry, index, positions, segments, window, query.dtype)
            out = attend_shared_prefix(query, *held, a.score_scale, a.attention_cap)[..., : m.rank]
            out = jnp.einsum("bshr,rhv->bshv", out, value_up.matrix().reshape(m.rank, a.heads, m.value))
        else:
            key = key_up(latent).reshape(batch, length, a.heads, m.plain)
            key = jnp.concatenate([key, jnp.broadcast_to(shared, (*key.shape[:3], m.rotary))], axis=-1)
            value = value_up(latent).reshape(batch, length, a.heads, m.value)
            how = (a.score_scale, a.attention_cap, self.columns)
            kernel = self.kernel if cache is None else None
            out = attend_by(kernel, query, key, value, positions, segments, window, *how)
        out = out.reshape(batch, length, a.heads * m.value)
        return dense(a.width, use_bias=a.out_bias, name="out")(out), entry

    def _project(self, x: Array, rotary: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Queries [B, S, H, E], latents [B, S, rank] and rotated keys [B, S, 1, rotary]."""
        a, m = self.architecture, self.architecture.latent
        assert m is not None
        source, dense = x, functools.partial(Dense, dtype=self.dtype, flat=self.columns is None)
        if m.query_rank:
            source = dense(m.query_rank, name="query_latent")(x)
            source = Norm(m.norm_eps, name="query_latent_norm")(source)
        query = dense(a.heads * a.head_size, name="query")(source)
        query = query.reshape(*x.shape[:2], a.heads, a.head_size)
        query = jnp.concatenate([query[..., : m.plain], rotate(query[..., m.plain :], *rotary)], axis=-1)
        both = dense(m.rank + m.rotary, name="latent")(x)
        latent = Norm(m.norm_eps, name="latent_norm")(both[..., : m.rank])
        return query, latent, rotate(both[:, :, None, m.rank :], *rotary)


class Mlp(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

    architecture: Architecture
    dtype: Any
    width: int
    columns: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The gated MLP."""
        a, more = self.architecture, (self.dtype, self.architecture.mlp_bias, self.columns is None)
        gate, up = (Dense(self.width, *more, name=name)(x) for name in ("gate", "up"))
        return Dense(a.width, *more, name="down")(ACTIVATIONS[a.activation](gate) * up)


class ExpertKernels(nn.Module):
    """One matrix an expert."""

    shape: tuple[int, int, int]
    dtype: Any

    @nn.compact
    def __call__(self) -> Float[Array, "X I O"]:
        """The matrices [experts, in, out]."""
        return parameter(self, "kernel", nn.initializers.lecun_normal(batch_axis=(0,)), self.shape).astype(self.dtype)


class ExpertMlp(nn.Module):
    """Routed experts, and one gated MLP that every token goes through where there are shared experts.

    The router is float32 in every compute dtype: a rounding of its logits would choose another expert. With `balance`
    the gradient of the routing bias is each expert's load above the mean (see `ops.experts.report_excess`).
    """

    architecture: Architecture
    dtype: Any
    balance: bool = False
    place: Place = Place()

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], segments: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """The weighted sum of each token's experts, plus the shared ones."""
        a, e = self.architecture, self.architecture.experts
        assert e is not None
        columns = self.place.over_columns
        logits = Dense(e.count, jnp.float32, flat=columns is None, name="router")(x.astype(jnp.float32))
        logits = logits.reshape(-1, e.count)
        bias = parameter(self, "routing_bias", nn.initializers.zeros, (e.count,)) if e.scoring == "sigmoid" else None
        experts, weights = route(logits, bias, e.chosen, e.groups, e.chosen_groups, e.normalised, e.scale)
        if self.balance and bias is not None:
            weights = report_excess(weights, bias, load_excess(experts, real_tokens(segments).reshape(-1), e.count))
        up, down = (e.count, a.width, e.width), (e.count, e.width, a.width)
        kernels: tuple[Array, Array, Array] = (
            ExpertKernels(up, self.dtype, name="experts_gate")(),
            ExpertKernels(up, self.dtype, name="experts_up")(),
            ExpertKernels(down, self.dtype, name="experts_down")(),
        )
        activation = ACTIVATIONS[a.activation]
        if self.place.mesh is None:
            out = mix_experts(x.reshape(-1, a.width), experts, weights, kernels, activation).reshape(x.shape)
        else:
            given = (x, experts.reshape(*x.shape[:2], -1), weights.reshape(*x.shape[:2], -1))
            out = mix_experts_on(self.place.mesh, self.place.rows, self.place.drop, given, kernels, activation)
        return out + Mlp(a, self.dtype, e.shared_width, columns, name="shared")(x) if e.shared_width else out


def remat_policy(name: str) -> Any:
    """The policy of jax.checkpoint_policies that a name of `model.remat` stands for; None keeps nothing."""
    if name == "full":
        return None
    policies, policy = jax.checkpoint_policies, getattr(jax.checkpoint_policies, name)
    if policy is policies.dots_saveable:
        return policies.save_from_both_policies(policy, policies.save_only_these_names(PRODUCT))
    return policy("device", HOST) if name.startswith("offload_") else policy


class Layer(nn.Module):
    """One pre-norm decoder layer; written as a scan body: carry, place, cache in; carry, cache out.

    `place` is what differs by layer: its window, and which of the rotary embeddings it uses.
    """

    architecture: Architecture
    dtype: Any
    experts: bool = False
    balance: bool = False
    kernel: Kernel | None = None
    mesh: Mesh | None = None
    sampling: str = "same"

    @nn.compact
    def __call__(self, x, place, cache, rotary, positions, segments):
        """x + attention(norm(x)), then x + mlp(norm(x))."""
        a, lies = self.architecture, place_of(self.mesh, x.shape, None if cache is None else self.sampling)
        window, rope = place
        if len(a.ropes) > 1:
            rotary = jax.tree.map(lambda angles: angles[rope], rotary)

        def norm(name: str) -> Norm:
            return Norm(a.norm_eps, a.norm_offset, name=name)

        kind = LatentAttention if a.latent else Attention
        attention = kind(a, self.dtype, lies.over_columns, self.kernel, name="attention")
        out, cache = attention(norm("attention_norm")(x), rotary, positions, segments, window, cache)
        x = x + (norm("attention_post_norm")(out) if a.post_norms else out)
        normed = norm("mlp_norm")(x)
        if self.experts:
            out = ExpertMlp(a, self.dtype, self.balance, lies, name="mlp")(normed, segments)
        else:
            out = Mlp(a, self.dtype, a.mlp_width, lies.over_columns, name="mlp")(normed)
        x = x + (norm("mlp_post_norm")(out) if a.post_norms else out)
        return (lies.lay(x) if cache is None else x), cache


class Decoder(nn.Module):
    """Embedding, stacks of layers, final norm, output matrix.

    `unroll`: layers that a turn of the scan does.
    `balance`: the gradient of routing biases is the load of their experts, for `optimizer.move_routing_biases`.
    `kernel`: attends in passes without a cache; None: XLA.
    `mesh`: devices over whose axes expert and sequence the work of a layer is split; `sampling`: `mesh.sampling`.
    """

    architecture: Architecture
    dtype: Any = jnp.float32
    scanned: bool = True
    remat: str = "none"
    unroll: int = 1
    balance: bool = False
    kernel: Kernel | None = None
    mesh: Mesh | None = None
    sampling: str = "same"

    def setup(self):
        """Declares the parts; a stack is one scanned layer or a list of layers."""
        a = self.architecture
        self.embed = nn.Embed(
            a.vocabulary, a.width, embedding_init=nn.initializers.normal(a.width**-0.5), dtype=self.dtype
        )
        layer = Layer
        if self.remat != "none":  # a loop of single layers keeps what is computed again apart by itself
            layer = nn.remat(Layer, prevent_cse=self.unroll > 1, policy=remat_policy(self.remat))

        def of(stack: Stack) -> tuple:
            kernel = None if self.kernel is None else self.kernel.over(stack.windows)
            return a, self.dtype, stack.experts, self.balance, kernel, self.mesh, self.sampling

        if self.scanned:
            scan = nn.scan(
                layer,
                variable_axes={"params": 0, "adapters": 0, "adapter_scales": 0},
                split_rngs={"params": True},
                in_axes=(0, *(nn.broadcast,) * 4),  # pyright: ignore[reportArgumentType]
                unroll=self.unroll,
            )
            for i, stack in enumerate(a.stacks):
                setattr(self, f"stack_{i}", scan(*of(stack)))
        else:
            for i, stack in enumerate(a.stacks):
                for j in range(stack.layers):
                    setattr(self, f"stack_{i}_layer_{j}", layer(*of(stack)))
        self.final_norm = Norm(a.norm_eps, a.norm_offset)
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
        lies = place_of(self.mesh, tokens.shape, None if cache is None else self.sampling)
        if cache is None:
            tokens, positions = lies.lay(tokens), lies.lay(positions)
        x = self.embed(tokens)
        x = lies.lay(x) if cache is None else x
        if a.embedding_scale != 1.0:
            x = x * jnp.asarray(a.embedding_scale, x.dtype)
        columns = row_columns(segments) if cache is None else cache.index.columns
        shared = (self._rotary(positions, columns), positions, segments)
        if self.scanned:
            assert cache is None, "a cache needs scanned=False: see unstack"
            for i, stack in enumerate(a.stacks):
                x, _ = getattr(self, f"stack_{i}")(x, _columns(stack.places), None, *shared)
            return self.final_norm(x)
        entries = []
        index = None if cache is None else start(cache.index, positions, segments)
        for i, stack in enumerate(a.stacks):
            for j, place in enumerate(stack.places):
                held = None if cache is None else (cache.layers[len(entries)], index)
                x, entry = getattr(self, f"stack_{i}_layer_{j}")(x, place, held, *shared)
                entries.append(entry)
        hidden = self.final_norm(x)
        return hidden if index is None else (hidden, Cache(layers=tuple(entries), index=index))

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits over the vocabulary, float32."""
        if self.architecture.tied:
            kernel = self.embed.embedding.astype(self.dtype)
            rows = hidden.reshape(-1, hidden.shape[-1])
            logits = jnp.einsum("rd,vd->rv", rows, kernel, preferred_element_type=jnp.float32)
            logits = logits.reshape(*hidden.shape[:-1], self.architecture.vocabulary)
        else:
            logits = self.head(hidden).astype(jnp.float32)
        return soft_cap(logits, self.architecture.logit_cap)

    def _rotary(self, positions: Int[Array, "B S"], columns: int) -> tuple[Array, Array]:
        """Cosine and sine [B, S, half]; of several rotary embeddings [ropes, B, S, half]."""
        a = self.architecture
        size = a.head_size if a.latent is None else a.latent.rotary
        angles = [rotary_angles(positions, frequencies(rope, size, columns), rope.magnitude) for rope in a.ropes]
        if len(angles) == 1:
            return angles[0]
        return jnp.stack([cos for cos, _ in angles]), jnp.stack([sin for _, sin in angles])


def _columns(places: list[tuple[int, int]]) -> tuple[Int[Array, "L"], Int[Array, "L"]]:
    """What a stack scans along: windows and rotary embeddings of its layers."""
    windows, ropes = zip(*places, strict=True)
    return jnp.asarray(windows, jnp.int32), jnp.asarray(ropes, jnp.int32)


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
