"""Accelerators by their makers' own figures, and machines of them by name: TPU slices, boxes of GPUs.

Loads no jax: what `environment` gives must be set before jax is imported.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from grpo_jax.errors import InputError

GIB = 2**30
BOX = 8  # GPUs that NVLink joins
BETWEEN_BOXES = 5e10  # bytes a second from a GPU to other boxes: eight ports of 400 Gbit/s, DGX H100 data sheet

# XLA's GpuTargetConfigProto of an H100 SXM, by the limits of compute capability 9.0 (CUDA C++ Programming Guide,
# "Compute Capabilities") and the card's own sizes.
H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
      name: as topologies are written, such as v5e.
      kinds: what jax calls such devices (`device_kind`), lower case.
      flops: bfloat16 FLOPs a second, dense.
      memory: bytes that a program may take: on TPUs what libtpu's compiler allows, on GPUs three quarters of the card,
        what jax reserves unless told otherwise (XLA_PYTHON_CLIENT_MEM_FRACTION).
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second out of a chip to its neighbours, one way, all links together.
      source: where the figures are from.
      tpu: a TPU; else a GPU.
      target_config: of a GPU, for its compiler.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    source: str
    tpu: bool = True
    target_config: str = ""


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            ("tpu v4",),
            275e12,
            int(30.75 * GIB),
            1.228e12,
            2.7e11,
            "https://cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433, 6 of 45 GB/s",
        ),
        Chip(
            "v5e",
            ("tpu v5 lite", "tpu v5e"),
            197e12,
            int(15.75 * GIB),
            8.19e11,
            2e11,
            "https://cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GB/s, 1,600 Gbit/s",
        ),
        Chip(
            "v5p",
            ("tpu v5", "tpu v5p"),
            459e12,
            int(95.74 * GIB),
            2.765e12,
            6e11,
            "https://cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GB, 2,765 GB/s, 4,800 Gbit/s",
        ),
        Chip(
            "v6e",
            ("tpu v6 lite", "tpu v6e"),
            918e12,
            int(31.25 * GIB),
            1.64e12,
            4.48e11,
            "https://cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1,640 GB/s, 3,584 Gbit/s",
        ),
        Chip(
            "h100",
            ("nvidia h100 80gb hbm3",),
            989.4e12,
            int(0.75 * 84942979072),
            3.35e12,
            4.5e11,
            "https://www.nvidia.com/en-us/data-center/h100: SXM, 989 TFLOPs dense, 80 GB, 3.35 TB/s, NVLink 900 GB/s "
            "both ways",
            tpu=False,
            target_config=H100_TARGET,
        ),
    )
}

# What libtpu wants to be told on a machine without a TPU; a second process would else die on a lock file.
TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # a CUDA plugin without a card would complain at length
}
GPU_FLAGS = "--xla_gpu_autotune_level=0"  # autotuning would run kernels

# libtpu wants the smallest accelerator's name of a kind, whatever the slice.
ACCELERATOR_TYPES = {"v4": "v4-8", "v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}
THREE_DIMENSIONS = ("v4", "v5p")  # their slices are AxBxC


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine by name: `v5e:4x4`, `v5p:2x2x4`, `h100:8`, or several TPU slices, `2*v5e:4x4`.

    Attributes:
      chip: the kind of chip.
      shape: chips along each axis of a slice; (n,) for GPUs.
      slices: TPU slices joined by the data centre's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written."""
        prefix = f"{self.slices}*" if self.slices > 1 else ""
        return f"{prefix}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second out of a chip: inside a slice, or between boxes where GPUs fill several."""
        return BETWEEN_BOXES if not self.chip.tpu and self.chips > BOX else self.chip.link_bandwidth


def parse_topology(text: str) -> Topology:
    """A topology from its name; raises InputError naming the fix.

    `v5e:16` (a number of chips) is the most square slice of so many.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)", text)
    if found is None:
        raise InputError(f"{text!r}: name a slice such as v5e:4x4 or v5p:2x2x4, several as 2*v5e:4x4, or h100:8")
    slices, name, sizes = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    if name not in CHIPS:
        raise InputError(f"{text!r}: no such chip {name!r}; there are: {', '.join(CHIPS)}")
    chip = CHIPS[name]
    if min(sizes) < 1 or slices < 1:
        raise InputError(f"{text!r}: sizes must be positive")
    if not chip.tpu:
        if len(sizes) > 1 or slices > 1:
            raise InputError(f"{text!r}: give a number of GPUs, such as {name}:8")
        count = math.prod(sizes)
        if count > BOX and count % BOX:
            whole = count // BOX * BOX
            raise InputError(f"{text!r}: more than {BOX} GPUs are boxes of {BOX}, such as {name}:{whole}")
        return Topology(chip, sizes)
    dimensions = 3 if name in THREE_DIMENSIONS else 2
    if len(sizes) == 1:
        sizes = slice_shape(sizes[0], dimensions)
    if len(sizes) != dimensions:
        example = "x".join("2" * dimensions)
        raise InputError(f"{text!r}: a slice of {name} has {dimensions} sizes, such as {name}:{example}")
    return Topology(chip, sizes, slices)


def slice_shape(chips: int, dimensions: int) -> tuple[int, ...]:
    """The most cubic shape of so many chips, sizes growing, ones last: 8 is 2x4, in three dimensions 2x2x2."""
    left, shape = chips, []
    for remaining in range(dimensions, 0, -1):
        sides = [side for side in range(1, left + 1) if left % side == 0 and side**remaining <= left]
        shape.append(sides[-1])
        left //= sides[-1]
    return tuple(sorted(shape, key=lambda side: (side == 1, side)))


def environment(topology: Topology, given: Mapping[str, str]) -> dict[str, str]:
    """Variables that must be set before jax is imported to compile for this topology."""
    if not topology.chip.tpu:
        flags = given.get("XLA_FLAGS", "")
        quiet = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {GPU_FLAGS}".strip(), **quiet}
    return {**TPU_ENVIRONMENT, "TPU_ACCELERATOR_TYPE": ACCELERATOR_TYPES[topology.chip.name]}
