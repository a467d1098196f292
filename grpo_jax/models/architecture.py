"""What a decoder is, apart from its weights: sizes, and a list of stacks of alike layers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers with parameters of the same shapes, scanned as one; what differs by layer is data.

    Attributes:
      windows: one entry a layer: tokens that its attention looks back, 0 for all.
    """

    windows: tuple[int, ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder of the Llama family.

    The parameter tree, stacks first in every leaf of a layer (L layers of the stack):

        embed/embedding [V, D]                      final_norm/scale [D]
        head/kernel [D, V]                          (only when not tied)
        stack_0/attention_norm/scale [L, D]         stack_0/mlp_norm/scale [L, D]
        stack_0/attention/query/kernel [L, D, H*E]  stack_0/mlp/gate/kernel [L, D, F]
        stack_0/attention/key/kernel [L, D, K*E]    stack_0/mlp/up/kernel [L, D, F]
        stack_0/attention/value/kernel [L, D, K*E]  stack_0/mlp/down/kernel [L, F, D]
        stack_0/attention/out/kernel [L, H*E, D]

    Kernels are [in, out]; heads are the slow index of H*E. Rotary embedding is the half-split form
    (the first and second half of a head are paired), as in Hugging Face's Llama.
    """

    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    stacks: tuple[Stack, ...]
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True

    @property
    def layers(self) -> int:
        """Number of layers in all stacks."""
        return sum(stack.layers for stack in self.stacks)


def llama(layers: int, **sizes) -> Architecture:
    """One stack of `layers` layers that look back at everything."""
    return Architecture(stacks=(Stack((0,) * layers),), **sizes)
