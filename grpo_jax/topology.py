"""Devices of machines that are not there, for compiling ahead of time."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from grpo_jax.chips import BOX, CHIPS, Chip, Topology
from grpo_jax.config import MeshConfig
from grpo_jax.errors import InputError
from grpo_jax.parallel import lay_out, mesh_sizes


def chip_here() -> Chip | None:
    """The chip of this process' first device, where the table knows it."""
    kind = jax.devices()[0].device_kind.lower()
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


def devices(topology: Topology) -> list[Any]:
    """Devices that programs can be compiled for; raises InputError where a plugin is missing or the slice unknown."""
    chip, size = topology.chip, "x".join(map(str, topology.shape))
    if chip.tpu:
        plugin, fix = "libtpu", "libtpu: pip install 'grpo-jax[aot]'"
        more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
        if chip.name == "v4":  # as its runtime has it: the two cores of a chip are one device
            more["chip_config_name"] = "megacore"
        wanted: dict[str, Any] = {"platform": "tpu", "topology_name": f"{chip.name}:{size}", **more}
    else:
        plugin = "jax_cuda12_plugin"
        fix = "jax's CUDA plugin: pip install 'grpo-jax[aot-cuda12]'"
        boxes = -(-topology.chips // BOX)
        shape = f"1x{boxes}x{topology.chips // boxes}"  # slices x boxes x GPUs of a box
        wanted = {"platform": "cuda", "topology": shape, "target_config": chip.target_config}
    if importlib.util.find_spec(plugin) is None:
        raise InputError(f"{topology.name}: needs {fix}")
    try:
        return list(topologies.get_topology_desc(**wanted).devices)
    except Exception as error:  # plugins' errors have no common type
        raise InputError(f"{topology.name}: {plugin} knows no such machine: {str(error).splitlines()[0]}") from error


def topology_mesh(config: MeshConfig, topology: Topology, found: Sequence[Any]) -> Mesh:
    """The mesh of a config over a topology; devices that are not there do not all say which slice they are of."""
    return lay_out(mesh_sizes(config, topology.chips), topology.slices, found)
