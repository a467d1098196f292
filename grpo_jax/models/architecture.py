"""What a decoder is, apart from its weights: sizes, switches, and a list of stacks of alike layers."""

import dataclasses

from grpo_jax.ops.rope import Rope


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers with parameters of the same shapes, scanned as one; what differs by layer is data.

    Attributes:
      windows: one entry a layer: tokens that its attention looks back, 0 for all.
      ropes: one entry a layer: which of `Architecture.ropes` turns its heads; empty: the first, in all of them.
      experts: the layers route tokens to experts instead of having one MLP.
    """

    windows: tuple[int, ...]
    ropes: tuple[int, ...] = ()
    experts: bool = False

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(window, rope) of each layer."""
        return list(zip(self.windows, self.ropes or (0,) * self.layers, strict=True))


@dataclasses.dataclass(frozen=True)
class Experts:
    """Routed experts of a layer (see ops/experts.py).

    Attributes:
      count: experts of a layer.
      chosen: experts that a token goes to.
      width: MLP width of an expert.
      shared_width: MLP width of the experts that every token goes to, taken as one; 0: none.
      scoring: how router logits become scores: softmax, or sigmoid with a routing bias that only chooses.
      normalised: weights of the chosen experts are divided by their sum.
      scale: weights are multiplied by it.
      groups: experts are cut into so many groups, of which a token may use the best `chosen_groups`.
    """

    count: int
    chosen: int
    width: int
    shared_width: int = 0
    scoring: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made from a small latent.

    A head's query and key are `plain` features without position and `rotary` ones; the rotary key is shared by all
    heads. The cache holds rank + rotary numbers a token.

    Attributes:
      rank: width of the latent of keys and values.
      query_rank: width of the queries' own latent; 0: queries are made from the hidden state.
      plain: features of a query or key head without position.
      rotary: features of a query or key head with position.
      value: features of a value head.
      norm_eps: epsilon of the latents' norms.
      paired: in files the two rotary features of a pair lie side by side; the tree has them apart.
    """

    rank: int
    query_rank: int
    plain: int
    rotary: int
    value: int
    norm_eps: float = 1e-6
    paired: bool = True


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder; the defaults are Llama's.

    The parameter tree, stacks first in every leaf of a layer (L layers of the stack):

        embed/embedding [V, D]                      final_norm/scale [D]
        head/kernel [D, V]                          (only when not tied)
        stack_0/attention_norm/scale [L, D]         stack_0/mlp_norm/scale [L, D]
        stack_0/attention/query/kernel [L, D, H*E]  stack_0/mlp/gate/kernel [L, D, F]
        stack_0/attention/key/kernel [L, D, K*E]    stack_0/mlp/up/kernel [L, D, F]
        stack_0/attention/value/kernel [L, D, K*E]  stack_0/mlp/down/kernel [L, F, D]
        stack_0/attention/out/kernel [L, H*E, D]

    and, where the switch is set:

        stack_0/attention/{query,key,value,out}/bias     stack_0/mlp/{gate,up,down}/bias
        stack_0/attention/{query,key}_norm/scale [L, E]  stack_0/{attention,mlp}_post_norm/scale [L, D]

        stack_1/mlp/router/kernel [L, D, X]              stack_1/mlp/experts_{gate,up}/kernel [L, X, D, F']
        stack_1/mlp/routing_bias [L, X]  (sigmoid)       stack_1/mlp/experts_down/kernel [L, X, F', D]
        stack_1/mlp/shared/{gate,up,down}/kernel         in place of mlp/{gate,up,down}

    Latent attention has, in place of key and value, with rank R (and query rank Q):

        latent/kernel [L, D, R + rotary]   latent_norm/scale [L, R]   query_latent/kernel [L, D, Q]
        key_up/kernel [L, R, H*plain]      value_up/kernel [L, R, H*value]   query_latent_norm/scale [L, Q]

    Kernels are [in, out]; heads are the slow index of H*E. Rotary embedding is the half-split form
    (the first and second half of a head are paired), as in Hugging Face's Llama.

    Attributes:
      ropes: the rotary embeddings that layers choose from; all rotate the same number of features.
      tied: the embedding is the output matrix too.
      activation: of the gated MLP: silu or gelu_tanh.
      qkv_bias, out_bias, mlp_bias: which projections have a bias.
      qk_norm: each query and key head is RMS-normed before it is rotated.
      post_norms: attention and MLP outputs are normed before they are added (Gemma 2 and 3).
      norm_offset: norms multiply by 1 + scale (Gemma).
      embedding_scale: embeddings are multiplied by it (Gemma: sqrt(D)).
      attention_scale: scores are multiplied by it; 0: 1 / sqrt(head size).
      attention_cap, logit_cap: scores, logits x become cap * tanh(x / cap); 0: they stay.
      experts: of the stacks that have them.
      family: the `model_type` under which Hugging Face knows it: how its tensors are named in files.
      context: tokens of the longest text that it was trained for; 0: not said.
      latent: attention is multi-head latent attention; then `head_size` is plain + rotary, and `kv_heads` is `heads`.
    """

    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    stacks: tuple[Stack, ...]
    ropes: tuple[Rope, ...] = (Rope(),)
    norm_eps: float = 1e-5
    tied: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    experts: Experts | None = None
    latent: Latent | None = None
    family: str = "llama"
    context: int = 0

    @property
    def layers(self) -> int:
        """Number of layers in all stacks."""
        return sum(stack.layers for stack in self.stacks)

    @property
    def rope_theta(self) -> float:
        """Base of the first rotary embedding."""
        return self.ropes[0].theta

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        magnitude = self.ropes[0].score_magnitude if self.latent else 1.0
        return (self.attention_scale or self.head_size**-0.5) * magnitude


def llama(layers: int, rope_theta: float = 10_000.0, **sizes) -> Architecture:
    """One stack of `layers` layers that look back at everything."""
    return Architecture(stacks=(Stack((0,) * layers),), ropes=(Rope(rope_theta),), **sizes)
