"""Devices, and which array lies on which: one mesh, one table of rules from parameter paths to axes."""

import ctypes
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Int

from grpo_jax.config import Config, MeshConfig, cache_folder, value_of
from grpo_jax.errors import InputError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROW_AXES = AXES[:4]  # how batches are split, by rows; they come first in a mesh
PACK_AXES = AXES[:3]  # how packs of a gradient pass are split; a pack's columns lie over "sequence"
ROWS = PartitionSpec(ROW_AXES)
# Axes over which the weights of sampling are not split, by mesh.sampling.
SAMPLING_DROPS = {"same": (), "tensor": ("fsdp",), "replicated": ("fsdp", "expert", "tensor")}
HOST = "pinned_host"

# Path pattern -> mesh axes of the last dimensions (a leading layer axis is never split).
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"(^|/)head/kernel$", ("fsdp", "tensor")),
    (r"experts_(gate|up)/kernel$", ("expert", "fsdp", "tensor")),
    (r"experts_down/kernel$", ("expert", "tensor", "fsdp")),
    (r"(router|latent)/kernel$", ("fsdp", None)),  # narrow; latents are whole on every device, as their norm needs
    (r"(query|key|value|gate|up)/bias$", ("tensor",)),
    (r"(query|key|value|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    (r"(head|query|key|value|gate|up)/kernel_scale$", ("tensor",)),
    (r"(out|down)/kernel_scale$", ("fsdp",)),
    (r"(query|key|value|gate|up)/a$", ("fsdp", None)),
    (r"(query|key|value|gate|up)/b$", (None, "tensor")),
    (r"(out|down)/a$", ("tensor", None)),
    (r"(out|down)/b$", (None, "fsdp")),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with AXES; -1 takes the devices that are left.

    Raises InputError when the sizes do not multiply to the device count.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({device.slice_index for device in devices}) if devices[0].platform == "tpu" else 1
    return lay_out(mesh_sizes(config, len(devices)), slices, devices)


def lay_out(sizes: tuple[int, ...], slices: int, devices: Sequence[Any]) -> Mesh:
    """A mesh of these sizes; slices are joined by a slower network: rows are split over them, nothing else."""
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    if sizes[0] % slices:
        raise InputError(f"config: mesh.data={sizes[0]} must divide by the {slices} slices that there are")
    inside, across = (sizes[0] // slices, *sizes[1:]), (slices, *(1,) * len(sizes[1:]))
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), AXES, axis_types=types)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes in the order of AXES; raises InputError when they do not multiply to the device count."""
    if config.auto:
        raise InputError("config: mesh.auto=True: this command picks no sizes: set mesh.auto=False and the axes")
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(devices // known, 1)
    if int(np.prod(list(sizes.values()))) != devices:
        told = {axis: size for axis, size in sizes.items() if size != 1 or axis not in ("expert", "sequence")}
        shape = " x ".join(f"mesh.{axis}={size}" for axis, size in told.items())
        raise InputError(f"config: {shape} is not the {devices} devices there are; -1 takes what is left")
    return tuple(sizes.values())


def check_batch(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises InputError when prompts, micro-batches, columns or supervised rows do not split over the devices."""
    shards, named = row_shards(mesh), row_axes(mesh)
    base, cold = config.base.sft.batch_size, config.cold_start.sft.batch_size
    split = [("data.prompts_per_step", config.data.prompts_per_step), ("sampler.slots", config.sampler.slots)]
    split += [("base.sft.batch_size", base)] * (not config.model.path)
    split += [("cold_start.sft.batch_size", cold)] * config.cold_start.enabled
    for name, rows in split:
        if rows % shards:
            raise InputError(f"config: {name}={rows} must divide by the {shards} devices of {named}")
    columns = mesh.shape["sequence"]
    for name in ("data.max_prompt_length", "sampler.max_new_tokens"):
        if value_of(config, name) % columns:
            raise InputError(f"config: {name}={value_of(config, name)} must divide by mesh.sequence={columns}")
    shared, shards = config.train.share_prefix, pack_shards(mesh)
    parts, what = (config.data.prompts_per_step, "prompts") if shared else (config.completions, "completions")
    if parts // shards % config.objective.minibatches:
        raise InputError(
            f"config: objective.minibatches={config.objective.minibatches} must divide the {parts // shards} {what} of "
            f"each of the {shards} devices of {row_axes(mesh, PACK_AXES)}"
        )


def row_axes(mesh: Mesh | AbstractMesh, axes: tuple[str, ...] = ROW_AXES) -> str:
    """The axes that rows are split over, as errors name them."""
    return " x ".join(f"mesh.{axis}" for axis in axes if axis in ("data", "fsdp") or mesh.shape[axis] > 1)


def path_name(path: tuple) -> str:
    """'stack_0/attention/query/kernel' from a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def partition_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, drop: tuple[str, ...] = ()
) -> PartitionSpec:
    """The axes of one leaf by RULES; an axis that does not divide its dimension, or is in `drop`, is left out."""
    for pattern, axes in RULES:
        if re.search(pattern, path) and len(shape) >= len(axes):
            lead = (None,) * (len(shape) - len(axes))
            kept = [
                axis if axis and axis not in drop and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape[len(lead) :], strict=True)
            ]
            return PartitionSpec(*lead, *kept)
    return PartitionSpec()


def axes_text(path: str, shape: tuple[int, ...], mesh: Mesh) -> str:
    """What each dimension of a leaf is split over, '-' where it is whole; '' for a leaf that is copied."""
    spec = partition_spec(path, shape, mesh)
    names = [axis if isinstance(axis, str) and mesh.shape[axis] > 1 else "-" for axis in spec]
    return " x ".join(names) if set(names) - {"-"} else ""


def mesh_text(mesh: Mesh | AbstractMesh) -> str:
    """The axes that have several devices: 'data=2 x fsdp=4'."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def shardings(tree: Any, mesh: Mesh, drop: tuple[str, ...] = ()) -> Any:
    """NamedShardings of a tree of parameters, or of anything whose paths end alike (optimizer state)."""

    def leaf(path: tuple, x: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path_name(path), x.shape, mesh, drop))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def in_host_memory(tree: Any, layout: Any) -> Any:
    """The layout with arrays in the host's memory; scalars stay where they are."""
    return jax.tree.map(lambda x, s: s.with_memory_kind(HOST) if x.ndim else s, tree, layout)


def moved(tree: Any, mesh: Mesh, to_host: bool) -> Any:
    """The tree in the host's memory, or in the devices'; a copy inside a program."""
    layout = jax.tree.map(lambda s: s.with_memory_kind("device"), shardings(tree, mesh))
    return jax.device_put(tree, in_host_memory(tree, layout) if to_host else layout)


def check_offload(offload: str, mesh: Mesh) -> None:
    """Raises InputError where `mesh.offload` asks for a memory that the devices' backend cannot use in programs."""
    if offload == "none":
        return
    device = mesh.local_devices[0]
    problem = "" if HOST in {memory.kind for memory in device.addressable_memories()} else f"have no {HOST} memory"
    if not problem:
        there, here = (SingleDeviceSharding(device, memory_kind=kind) for kind in (HOST, "device"))
        try:
            held = jax.device_put(jnp.zeros(1), there)
            jax.jit(lambda x: jax.device_put(jax.device_put(x, here) + 1, there), out_shardings=there)(held)
        except jax.errors.JaxRuntimeError as error:
            problem = f"cannot use {HOST} memory in a program ({str(error).splitlines()[0]})"
    if problem:
        raise InputError(f"config: mesh.offload={offload!r}: {device.device_kind} devices {problem}: set it to none")


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts rows are split into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def pack_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of gradient passes are split into, each on as many devices as `sequence` has."""
    return math.prod(mesh.shape[axis] for axis in PACK_AXES)


def place(tree: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """The tree's leaves as arrays on the mesh, split by RULES, in `dtype` (None: each in its own).

    Leaves are numpy arrays, jax arrays, or anything with a shape that gives numbers when sliced: each host slices out
    what its own devices hold, once, and nothing else. An array of this host's devices alone is the same on all hosts.
    """

    def leaf(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable):
            return jax.device_put(x.astype(dtype or x.dtype), sharding)
        if isinstance(x, jax.Array):
            x = np.asarray(x)
        parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share it

        def part(index: Any) -> np.ndarray:
            key = tuple((s.start, s.stop) for s in index)
            if key not in parts:
                parts[key] = np.asarray(x[index]).astype(dtype or x.dtype)
            return parts[key]

        return jax.make_array_from_callback(x.shape, sharding, part)

    return jax.tree.map(leaf, tree, shardings(tree, mesh))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over ROW_AXES."""
    return NamedSharding(mesh, ROWS)


def put_rows(make: Callable[[Int[np.ndarray, "own"]], Any], count: int, sharding: NamedSharding) -> Any:
    """`count` rows on the mesh, of which `make` is asked on each host for those that its devices hold, by number.

    `make` gives a tree of numpy arrays with these rows on the axis that `sharding` splits.
    """
    axis = next(i for i, axes in enumerate(sharding.spec) if axes is not None)
    cuts = sharding.addressable_devices_indices_map((1,) * axis + (count,)).values()
    numbers = np.arange(count)
    own = np.unique(np.concatenate([numbers[index[axis]] for index in cuts if index is not None]))

    def leaf(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
        indices = [(d, i) for d, i in sharding.addressable_devices_indices_map(shape).items() if i is not None]
        places = [(*index[:axis], np.searchsorted(own, numbers[index[axis]])) for _, index in indices]
        # Transfers that are asked for: loops allow no others.
        pieces = [jax.device_put(x[place], device) for place, (device, _) in zip(places, indices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return jax.tree.map(leaf, make(own))


def scoring_process(count: int, mesh: Mesh) -> Int[np.ndarray, "B"]:
    """Which process scores each of `count` rows: the one with the first device of those that hold it."""
    firsts = mesh.devices.reshape(row_shards(mesh), -1)[:, 0]  # the axes of rows come first
    return np.repeat([device.process_index for device in firsts], count // row_shards(mesh))


def scored_rows(count: int, mesh: Mesh) -> Int[np.ndarray, "own"]:
    """Numbers of those of `count` rows that this process scores."""
    return np.flatnonzero(scoring_process(count, mesh) == jax.process_index())


def whole(tree: Any) -> Any:
    """The tree with numpy leaves, each in full on every host, whoever held its parts.

    All processes must ask for it.
    """

    def gathered(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)  # a leaf at a time: no device holds two

    return jax.device_get(jax.tree.map(gathered, tree))


def constrain_packs(x: jax.Array, mesh: Mesh, columns: bool = True) -> jax.Array:
    """[D, X, ...] with parts over PACK_AXES and, with `columns`, their columns over sequence."""
    spec = PartitionSpec(PACK_AXES, "sequence" if columns else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def spread_columns(x: jax.Array, mesh: Mesh) -> jax.Array:
    """[D, Q, ...] as [D * n, Q / n, ...] on the n devices of sequence, zeros at the end where n does not divide Q."""
    n = mesh.shape["sequence"]
    if n == 1:
        return x
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % n)] + [(0, 0)] * (x.ndim - 2))
    return constrain_rows(x.reshape(x.shape[0] * n, -1, *x.shape[2:]), mesh)


def gather_columns(x: jax.Array, shape: tuple[int, ...], mesh: Mesh) -> jax.Array:
    """The inverse of `spread_columns` for [D, Q] of this shape, whole on the devices of sequence."""
    if mesh.shape["sequence"] == 1:
        return x
    return constrain_packs(x.reshape(shape[0], -1)[:, : shape[1]], mesh, columns=False)


def splits_columns(mesh: Mesh | None, shape: tuple[int, ...]) -> bool:
    """Whether activations [B, S, ...] of a gradient pass have their columns over the mesh's axis sequence."""
    if mesh is None or mesh.shape["sequence"] == 1:
        return False
    return shape[0] % pack_shards(mesh) == 0 and shape[1] % mesh.shape["sequence"] == 0


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_rows(tree: Any, mesh: Mesh) -> Any:
    """The tree with each leaf's first axis split as rows are."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, row_sharding(mesh)), tree)


@jax.named_scope("sampling")
def sampling_layout(variables: Any, mesh: Mesh, sampling: str) -> Any:
    """Parameters in the layout that sampling wants: as trained, not over fsdp, or copied."""
    if sampling == "same":
        return variables
    return jax.lax.with_sharding_constraint(variables, shardings(variables, mesh, SAMPLING_DROPS[sampling]))


def set_up_process(config: Config) -> None:
    """Process-wide settings of a run: the allocator, devices of the processor, the persistent compilation cache.

    `log.compilation_cache` is a folder, '' for none, or 'auto': the user's cache folder, unless jax was told of one.
    """
    keep_host_memory(split_processor(config))
    compilation_cache = config.log.compilation_cache
    if compilation_cache == "auto" and jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = str(cache_folder() / "compiled") if compilation_cache == "auto" else compilation_cache
    jax.config.update("jax_compilation_cache_dir", folder or None)
    if folder:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def split_processor(config: Config) -> int:
    """Has jax show the processor as `mesh.cpu_devices` devices, each operation on one thread; the devices it asked for.

    The operations of a small model are too short for several threads each; rows on devices of their own need none.
    Nothing happens where jax has its devices already or XLA_FLAGS tells their number, nor among several processes.
    """
    count = config.mesh.cpu_devices or cores_for_rows(config, len(os.sched_getaffinity(0)))
    flags = os.environ.get("XLA_FLAGS", "")
    if count == 1 or "xla_force_host_platform_device_count" in flags or jax.distributed.is_initialized():
        return 1
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has them
        return 1
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    return count


def cores_for_rows(config: Config, cores: int) -> int:
    """The largest number of devices, up to one a core, that the rows of a batch split over along mesh.data."""
    for count in range(cores, 1, -1):
        try:
            sizes = mesh_sizes(config.mesh, count)
            check_batch(config, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
        except InputError:
            continue
        return count
    return 1


def options_of_cpu(mesh: Mesh) -> dict[str, str] | None:
    """XLA's options for a program of CPU devices; None elsewhere, and in versions that were not tried.

    XLA hands products and sums to YNNPACK. Its kernels of sums keep memory of their own, 0.96 GB in a step of
    SmolLM2-135M, which takes as long without, or shorter over several devices.
    """
    cpu = mesh.devices.flat[0].platform == "cpu"
    if not cpu or not jax.__version__.startswith("0.10."):
        return None
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def give_back_host_memory() -> None:
    """Gives the system what this process has freed, where the C library is glibc: before compiling and a first call.

    Each thread of the compiler takes memory of its own, and a program's temporaries are one block: both fit into none
    of the holes that loading a model and compiling have left.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def keep_host_memory(devices: int = 1) -> None:
    """Makes this process keep the host memory that it frees, where the C library is glibc; else nothing.

    XLA's CPU backend allocates a program's temporaries at every call. glibc gives blocks of that size back to the
    system and gets them anew, page by page: 16.7 million page faults and 75 of 389 CPU seconds in the embedded default.
    Products take memory too: with one arena for all threads, devices of the processor waited for its lock for half of a
    small model's step. One device, whose model may be large, has as many arenas as cores, one to call it, and one more.
    Programs of one CPU device run before their call returns: the next call would come before the last one's block is
    free, take another, and leave a hole too small for the third. Must come before jax has made its devices.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_* of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    if devices == 1:
        mallopt(arena_max, len(os.sched_getaffinity(0)) + 2)
