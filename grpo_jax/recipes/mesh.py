"""`mesh.auto`: sizes of the mesh's axes, picked from the devices, their memory and the model."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from grpo_jax.chips import GIB, Topology
from grpo_jax.config import Config
from grpo_jax.errors import InputError
from grpo_jax.models.abstract import abstract_params, architecture_of
from grpo_jax.models.architecture import Architecture
from grpo_jax.parallel import AXES, check_batch, mesh_text
from grpo_jax.recipes.plan import Sizes, plan_memory, state_shapes
from grpo_jax.terminal import Terminal
from grpo_jax.topology import chip_here

USED = 0.85  # of a device's memory: formulas are held to 15% of what compilers report


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices: how many, what one may take in bytes (0: not known), how many slices they lie in, whether TPUs."""

    devices: int
    memory: float = 0.0
    slices: int = 1
    tpu: bool = False


@dataclasses.dataclass(frozen=True)
class Picked:
    """Sizes, why they are so, and whether the formulas say that the step fits."""

    sizes: Sizes
    reasons: tuple[str, ...]
    fits: bool = True


def with_mesh(config: Config, terminal: Terminal) -> Config:
    """The config with the sizes that `mesh.auto` asks for, said on the terminal; else as it is.

    Raises InputError where no sizes split the batch over the devices.
    """
    if not config.mesh.auto:
        return config
    picked = pick_sizes(config, architecture_of(config), this_machine())
    terminal.say(f"mesh.auto: {'; '.join(picked.reasons)}")
    return placed_on(config, picked.sizes)


def for_topology(config: Config, architecture: Architecture, topology: Topology) -> tuple[Config, list[str]]:
    """The config with the sizes that `mesh.auto` picks on a machine by name, and a line that says why."""
    if not config.mesh.auto:
        return config, []
    chip = topology.chip
    picked = pick_sizes(config, architecture, Machine(topology.chips, chip.memory, topology.slices, chip.tpu))
    return placed_on(config, picked.sizes), [f"mesh.auto: {'; '.join(picked.reasons)}"]


def placed_on(config: Config, sizes: Sizes) -> Config:
    """The config with these sizes in place of `mesh.auto`."""
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, auto=False, **dataclasses.asdict(sizes)))


def this_machine() -> Machine:
    """The devices of all processes; their memory by the table of chips, or by what the backend says."""
    devices, chip = jax.devices(), chip_here()
    told: dict[str, Any] = {} if chip else jax.local_devices()[0].memory_stats() or {}
    tpu = devices[0].platform == "tpu"
    slices = len({device.slice_index for device in devices}) if tpu else 1
    return Machine(len(devices), chip.memory if chip else told.get("bytes_limit", 0.0), slices, tpu)


def pick_sizes(config: Config, architecture: Architecture, machine: Machine) -> Picked:
    """The first sizes, from those that move least between devices on, that split the batch and fit by formula.

    Rows come first (data), which move gradients alone; then parameters over fsdp, experts over expert; then the tokens
    of a pack over sequence; last heads and MLP columns over tensor, which moves activations in every layer and at every
    token drawn. Where the memory is not known the first sizes that split the batch are taken, where none fit those that
    need least.
    """
    placed = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, auto=False))
    shapes = state_shapes(placed, abstract_params(architecture))
    first, least = None, None
    for sizes in candidates(placed, architecture, machine):
        need = plan_memory(placed_on(placed, sizes), architecture, sizes, shapes, machine.tpu).total
        first = first or (need, sizes)
        if not machine.memory or need <= USED * machine.memory:
            return Picked(sizes, reasons(sizes, first, need, machine, config))
        least = (need, sizes) if least is None or need < least[0] else least
    if first is None or least is None:
        raise InputError(
            f"config: mesh.auto=True: data.prompts_per_step={config.data.prompts_per_step} and sampler.slots="
            f"{config.sampler.slots} do not split over {machine.devices} devices: take a multiple of it"
        )
    return Picked(least[1], reasons(least[1], first, least[0], machine, config), fits=False)


def candidates(config: Config, architecture: Architecture, machine: Machine) -> Iterator[Sizes]:
    """Sizes that model and batch allow, those that move least first."""
    a, found = architecture, []
    for parts in factors(machine.devices, len(AXES)):
        sizes = Sizes(**dict(zip(AXES, parts, strict=True)))
        heads = a.heads % sizes.tensor == 0 and a.kv_heads % sizes.tensor == 0
        experts = (a.experts.count if a.experts else 1) % sizes.expert == 0
        if sizes.data % machine.slices or not (heads and experts):
            continue
        try:
            check_batch(placed_on(config, sizes), sizes.mesh)
        except InputError:
            continue
        found.append(sizes)
    yield from sorted(found, key=lambda s: (s.tensor, s.sequence, s.fsdp * s.expert, -s.expert))


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All `count` numbers whose product is `number`, in order."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in factors(number // first, count - 1))


def reasons(sizes: Sizes, first: tuple[float, Sizes], need: float, machine: Machine, config: Config) -> tuple[str, ...]:
    """The sizes, and what decided them, a sentence each."""
    said = [f"{mesh_text(sizes.mesh)} for {machine.devices} devices"]
    if machine.memory:
        room = f"{USED:.0%} of {machine.memory / GIB:.1f} GiB a device"
        if first[1] != sizes:
            said.append(f"{mesh_text(first[1].mesh)} would take {first[0] / GIB:.1f} GiB, more than {room}")
        verdict = "fits" if need <= USED * machine.memory else "does not fit, nothing takes less"
        said.append(f"by formula this takes {need / GIB:.1f} GiB and {verdict} in {room}")
    else:
        said.append(f"the memory of a device is not known, by formula this takes {need / GIB:.2f} GiB")
    if first[1].tensor > 1:
        said.append(f"rows alone do not split: data.prompts_per_step={config.data.prompts_per_step}")
    return tuple(said)
