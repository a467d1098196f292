"""Devices of machines that are not there, for compiling ahead of time."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from grpo_jax.chips import Topology
from grpo_jax.config import MeshConfig
from grpo_jax.errors import InputError
from grpo_jax.parallel import AXES, make_mesh, mesh_sizes


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
        wanted = {"platform": "cuda", "topology": f"1x1x{size}", "target_config": chip.target_config}
    if importlib.util.find_spec(plugin) is None:
        raise InputError(f"{topology.name}: needs {fix}")
    try:
        return list(topologies.get_topology_desc(**wanted).devices)
    except Exception as error:  # plugins' errors have no common type
        raise InputError(f"{topology.name}: {plugin} knows no such machine: {str(error).splitlines()[0]}") from error


def topology_mesh(config: MeshConfig, topology: Topology, found: Sequence[Any]) -> Mesh:
    """The mesh of a config over a topology; several slices lie along the axis data, whose traffic is least."""
    if topology.slices == 1:
        return make_mesh(config, found)
    data, *inside = mesh_sizes(config, topology.chips)
    if data % topology.slices:
        raise InputError(f"config: mesh.data={data} must be a multiple of the {topology.slices} slices")
    shape = (data // topology.slices, *inside)
    grid = mesh_utils.create_hybrid_device_mesh(shape, (topology.slices, 1, 1), found)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
