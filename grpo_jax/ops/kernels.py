"""Attention by the backends' kernels: Pallas' splash attention on TPUs, cuDNN's on NVIDIA GPUs.

They serve the passes of training over rows with segment ids, gradients included, and hold no scores of a whole row.
Packs with shared prompts and decoding stay with `ops/attention.py`, which both are held equal to.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.ops.attention import attend_self, visible
from grpo_jax.ops.packing import SharedPrefix
from grpo_jax.parallel import ROWS, row_shards

BLOCKS = (512, 256, 128)  # columns that splash attention takes at a time; it wants multiples of 128
HEADS = PartitionSpec(*ROWS, None, "tensor", None)  # [R, S, heads, E]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of a decoder's layers.

    Attributes:
      name: splash or cudnn.
      mesh: rows lie over ROW_AXES, heads over tensor.
      windows: how far back the layers at hand look (0: at all), each once; splash compiles one kernel for each.
      interpret: Pallas runs as plain operations, on any device.
    """

    name: str
    mesh: Mesh
    windows: tuple[int, ...] = (0,)
    interpret: bool = False

    def over(self, windows: Sequence[int]) -> "Kernel":
        """The kernel of layers with these windows."""
        return dataclasses.replace(self, windows=tuple(sorted(set(windows))))


def attend_by(
    kernel: Kernel | None,
    query: Float[Array, "R S H E"],
    key: Float[Array, "R S K E"],
    value: Float[Array, "R S K v"],
    positions: Int[Array, "R S"],
    segments: Int[Array, "R S"] | SharedPrefix,
    window: Int[Array, ""] | int,
    scale: float | None = None,
    cap: float = 0.0,
    columns: Mesh | None = None,
) -> Float[Array, "R S H v"]:
    """`attend_self`, by the kernel where one is given and rows are whole, have segment ids and split over its mesh."""
    shared = isinstance(segments, SharedPrefix)
    if kernel is None or shared or columns is not None or query.shape[0] % row_shards(kernel.mesh):
        return attend_self(query, key, value, positions, segments, window, scale, cap, columns)
    if kernel.name == "cudnn":
        return cudnn_attention(query, key, value, positions, segments, window, scale)
    # GSPMD does not split a Pallas call: without this each device would attend for all rows and heads.
    split = jax.shard_map(
        functools.partial(_splash_by_window, windows=kernel.windows, scale=scale, cap=cap, interpret=kernel.interpret),
        mesh=kernel.mesh,
        in_specs=(HEADS, HEADS, HEADS, ROWS, PartitionSpec()),
        out_specs=HEADS,
        check_vma=False,  # a Pallas call does not say over which axes its results vary
    )
    return split(query, key, value, segments, jnp.asarray(window, jnp.int32))


def _splash_by_window(
    query: Array, key: Array, value: Array, segments: Array, window: Array, windows: tuple[int, ...], **how
) -> Array:
    """Splash attention with the one of `windows` that the layer has: a kernel's mask is static."""
    kernels = [functools.partial(splash_attention, window=w, **how) for w in windows]
    given = (query, key, value, segments)
    if len(kernels) == 1:
        return kernels[0](*given)
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(windows, jnp.int32), window), kernels, *given)


def splash_attention(
    query: Float[Array, "R S H E"],
    key: Float[Array, "R S K E"],
    value: Float[Array, "R S K v"],
    segments: Int[Array, "R S"],
    window: int,
    scale: float | None = None,
    cap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "R S H v"]:
    """Causal attention inside segments, by Pallas' kernel of that name (blocks that nothing sees are skipped).

    Who is later is told by slots, which inside a segment grow with positions. Padding (segment 0) sees padding, so that
    no softmax is over nothing. Head sizes are free.
    """
    # Here, as only TPUs need it and every start of a command would load it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = query.shape[1], query.shape[2]
    block, padded = block_and_length(length)
    grow = ((0, 0), (0, padded - length))
    query = query * (scale or query.shape[-1] ** -0.5)
    query, key, value = (jnp.swapaxes(jnp.pad(x, (*grow, (0, 0), (0, 0))), 1, 2) for x in (query, key, value))
    segments = jnp.pad(segments, grow)
    shape = (padded, padded)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if 0 < window < length else splash.CausalMask(shape)
    # Of queries, keys and keys at a time; the same of the gradients of keys and values; then of those of queries.
    sizes = splash.BlockSizes(block, block, block, block, block, block, block, block)
    attend = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=cap or None,
        interpret=interpret,
    )
    out: Any = jax.vmap(attend)(query, key, value, splash.SegmentIds(segments, segments))
    return jnp.swapaxes(out, 1, 2)[:, :length]


def block_and_length(length: int) -> tuple[int, int]:
    """The largest block whose multiple adds at most an eighth to the columns, and that multiple."""
    least = -(-length // BLOCKS[-1]) * BLOCKS[-1]
    made = ((block, -(-length // block) * block) for block in BLOCKS)
    return next((block, padded) for block, padded in made if padded <= 1.125 * least)


def cudnn_attention(
    query: Float[Array, "R S H E"],
    key: Float[Array, "R S K E"],
    value: Float[Array, "R S K v"],
    positions: Int[Array, "R S"],
    segments: Int[Array, "R S"],
    window: Int[Array, ""] | int,
    scale: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "R S H v"]:
    """Causal attention inside segments by `jax.nn.dot_product_attention`; bfloat16 or float16.

    Segments and windows are a mask [R, 1, S, S], the same for all heads: cuDNN itself knows lengths, not segments. It
    wants heads of one size, a multiple of 8, and for gradients an even S: what is added to reach them is zeros.
    """
    length, size, width = query.shape[1], query.shape[-1], value.shape[-1]
    heads, odd = -(-max(size, width) // 8) * 8, length % 2
    positions, segments = (jnp.pad(x, ((0, 0), (0, odd))) for x in (positions, segments))
    query, key, value = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, heads - x.shape[-1]))) for x in (query, key, value))
    ids = segments + 1  # padding sees padding: no softmax is over nothing
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=visible(positions, positions, ids, ids, window)[:, None],
        scale=scale or size**-0.5,
        is_causal=True,  # the mask says so too; with this the later blocks are not computed
        implementation=implementation,
    )
    return out[:, :length, :, :width]
