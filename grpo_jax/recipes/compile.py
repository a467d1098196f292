"""The step compiled for a machine that is not there: does it fit, what does it move, how fast can it be.

The program is that of `grpo-jax train`, made from shapes alone and compiled by the machine's own compiler (libtpu, or
XLA with a GPU's description). Bytes and collectives are read from it, FLOPs come by formula (`recipes/plan.py`).
"""

import dataclasses
import itertools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.batches import PACKS
from grpo_jax.chips import GIB, Topology
from grpo_jax.config import Config
from grpo_jax.errors import InputError
from grpo_jax.hlo import Collective, Loop, Program, Trips, totals
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.cache import init_cache
from grpo_jax.optimizer import MOMENTS
from grpo_jax.parallel import SAMPLING_DROPS, check_batch, partition_spec, path_name
from grpo_jax.recipes.plan import Sizes as MeshSizes
from grpo_jax.recipes.plan import Work, cache_bytes, fits, held, plan_work, sampling_weights, suggestions
from grpo_jax.recipes.shapes import AbstractStep, abstract_step, host_rewards
from grpo_jax.sampler.sample import DECODE, REFILL, choose_pieces, piece_passes
from grpo_jax.topology import devices, topology_mesh

SAMPLING = "sampling"  # scope of what the sampler does
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class DecodePass:
    """One turn of the decode loop on one device.

    Attributes:
      moved: bytes between main memory and the chip.
      least: bytes of weights and cache, which every pass reads.
      collectives: in the loop.
      kinds: (how many, bytes) of them by kind.
      gathered: bytes of weights gathered from other devices.
      copied: bytes of copies as large as a layer's cache or larger.
      wide_weights: bytes of float32 weights read.
    """

    moved: int
    least: float
    collectives: int
    kinds: dict[str, tuple[int, int]]
    gathered: int
    copied: int
    wide_weights: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """Roofline of a phase: seconds that its FLOPs, bytes and collectives take at the chip's peak, one device each."""

    flops: float
    bytes: float
    sent: float
    compute_seconds: float
    memory_seconds: float
    link_seconds: float

    @property
    def seconds(self) -> float:
        """The longest of the three: all may go on at once."""
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compile says. Bytes are those of one device; of a program that libtpu refused only `total` is known.

    Attributes:
      arguments: the state, the prompts.
      temporaries: everything else at the peak.
      cache: keys and values, a part of `temporaries`.
      total: both.
      capacity: what a device has.
      seconds: compiling.
      lower_seconds: tracing and lowering.
      collectives: (runs, bytes) by kind; None when the program was refused.
      unknown_loops: loops that were counted once because nothing tells their trips.
      problem: the compiler's words when it refused.
    """

    topology: str
    arguments: float
    temporaries: float
    cache: float
    total: float
    capacity: float
    seconds: float
    lower_seconds: float
    work: Work
    collectives: dict[str, tuple[int, int]] | None = None
    decode: DecodePass | None = None
    sampling: Phase | None = None
    training: Phase | None = None
    unknown_loops: tuple[str, ...] = ()
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return not self.problem and self.total <= self.capacity


def compile_step(config: Config, architecture: Architecture, topology: Topology) -> tuple[Report, str]:
    """Compiles the fused step for a machine; the report, and the program's text ('' where the compiler refused).

    Raises InputError for a mesh or batch that the machine cannot split, for host rewards on GPUs, and for a program
    that this jax cannot read.
    """
    found = devices(topology)
    mesh = topology_mesh(config.mesh, topology, found)
    check_batch(config, mesh)
    by_host = host_rewards(config)
    if by_host and not topology.chip.tpu:
        raise InputError(
            f"{topology.name}: rewards.names has {by_host[0]!r}, which calls the host, and that cannot be compiled "
            "without the GPU: leave it out or take one of the rewards in the graph"
        )
    jax.config.update("jax_compilation_cache_dir", None)  # what is read back from it has no memory figures
    began = time.perf_counter()
    step = abstract_step(config, mesh, architecture)
    lowered = step.lower()
    between = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory" not in str(error):
            raise
        took = (between - began, time.perf_counter() - between)
        return refused(step, architecture, topology, str(error), took), ""
    took = (between - began, time.perf_counter() - between)
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:  # a libtpu newer than jaxlib has operations of other forms
        raise InputError(
            f"{topology.name}: jax {jax.__version__} cannot read the program that the compiler made: install the "
            f"compiler of that jax, pip install 'jax[tpu]=={jax.__version__}' ({str(error).splitlines()[0][:200]})"
        ) from error
    return read_report(step, architecture, topology, compiled.memory_analysis(), text, took), text


def sizes_of(step: AbstractStep) -> MeshSizes:
    """Devices along the axes of a step's mesh."""
    return MeshSizes(**dict(step.parts.mesh.shape))


def read_report(
    step: AbstractStep,
    architecture: Architecture,
    topology: Topology,
    memory: Any,
    text: str,
    seconds: tuple[float, float],
) -> Report:
    """The report of a compiled step; `seconds` are those of lowering and of compiling."""
    config, sizes = step.parts.config, sizes_of(step)
    platform = step.parts.mesh.devices.flat[0].platform
    config = dataclasses.replace(config, sampler=choose_pieces(config.sampler, platform))
    work = plan_work(config, architecture, sizes, step.params)
    program, trips = Program(text), trip_counts(config, work)
    collectives = program.collectives(trips)
    arguments = float(memory.argument_size_in_bytes)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = float(memory.temp_size_in_bytes + new + memory.generated_code_size_in_bytes)
    sampling, training = phases(program, trips, collectives, work, topology)
    unknown = [loop.op_name or loop.body for loop in program.loops() if loop.trips is None and not named(loop)]
    return Report(
        topology=topology.name,
        arguments=arguments,
        temporaries=temporaries,
        cache=cache_bytes(config, architecture, sizes),
        total=arguments + temporaries,
        capacity=topology.chip.memory,
        seconds=seconds[1],
        lower_seconds=seconds[0],
        work=work,
        collectives=totals(collectives),
        decode=decode_pass(program, trips, step, architecture),
        sampling=sampling,
        training=training,
        unknown_loops=tuple(sorted(set(unknown))),
    )


def refused(
    step: AbstractStep, architecture: Architecture, topology: Topology, error: str, seconds: tuple[float, float]
) -> Report:
    """The report of a step that libtpu would not compile for want of memory, by the sizes in its error."""
    config, sizes = step.parts.config, sizes_of(step)
    used = re.search(r"Used ([\d.]+)([KMGT]?)", error)
    arguments = re.search(r"arguments\s+([\d.]+)([KMGT]?)", error)
    given = float(arguments[1]) * UNITS[arguments[2]] if arguments else 0.0
    given = given or held(step.state, sizes)
    total = float(used[1]) * UNITS[used[2]] if used else float("nan")
    first = next((line for line in error.splitlines() if "memory" in line), error.splitlines()[0])
    return Report(
        topology=topology.name,
        arguments=given,
        temporaries=total - given,
        cache=cache_bytes(config, architecture, sizes),
        total=total,
        capacity=topology.chip.memory,
        seconds=seconds[1],
        lower_seconds=seconds[0],
        work=plan_work(config, architecture, sizes, step.params),
        problem=first,
    )


def named(loop: Loop) -> str:
    """Which of the loops whose trips follow from the data this is; '' for another."""
    scopes = [re.sub(rf"^{DECODE}_\d+$", DECODE, scope) for scope in re.split(r"[/()]", loop.op_name)[-3:]]
    return next((name for name in (DECODE, REFILL, PACKS, MOMENTS) if name in scopes), "")


def piece_of(loop: Loop) -> int:
    """Which of the pieces of decoding a decode loop is, from 0."""
    found = re.findall(rf"{DECODE}_(\d+)", loop.op_name)
    return int(found[-1]) if found else 0


def trip_counts(config: Config, work: Work) -> Trips:
    """Trips of the loops that end by the data: as many as completions of full length take."""
    slots = config.sampler.slots or config.completions
    turns = max(-(-config.completions // slots), 1)
    passes = piece_passes(config.sampler)

    def trips(loop: Loop) -> int:
        if named(loop) == DECODE and turns == 1:
            return max(passes[piece_of(loop)], 1)
        return {DECODE: max(work.passes // turns, 1), REFILL: turns, PACKS: work.packs}.get(named(loop), 1)

    return trips


def phases(
    program: Program, trips: Trips, collectives: list[Collective], work: Work, topology: Topology
) -> tuple[Phase, Phase]:
    """Rooflines of sampling and of all else."""
    moved, sent = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for where, instruction, times, loops in program.walk(trips):
        inside = any(SAMPLING in name for name in (*loops, instruction.op_name))
        moved[inside] += times * program.instruction_traffic(where, instruction)
    for one in collectives:
        sent[any(SAMPLING in name for name in (*one.loops, one.op_name))] += one.times * one.sent
    chip, made = topology.chip, []
    for inside, flops in ((True, work.sampling), (False, work.update)):
        share = flops / topology.chips
        seconds = (share / chip.flops, moved[inside] / chip.memory_bandwidth, sent[inside] / topology.link_bandwidth)
        made.append(Phase(share, moved[inside], sent[inside], *seconds))
    return made[0], made[1]


def decode_pass(program: Program, trips: Trips, step: AbstractStep, architecture: Architecture) -> DecodePass | None:
    """What one turn of the decode loop, of its last piece, moves; None when the program has no such loop."""
    loops = sorted((loop for loop in program.loops() if named(loop) == DECODE), key=piece_of, reverse=True)
    if not loops:
        return None
    config, sizes, body = step.parts.config, sizes_of(step), loops[0].body
    whole, part = weight_shapes(step)
    entries = cache_shapes(step)
    copied, wide = 0, 0
    for where, instruction, times, _ in program.walk(trips, body):
        for shape in program.made_anew(where, instruction):
            copied += times * shape.bytes if key(shape.dims) in entries else 0
        for read in program.inputs(where, instruction):
            wide += sum(times * s.bytes for s in read.shapes if s.dtype == "f32" and key(s.dims) in whole | part)
    inside = [one for one in program.collectives(trips) if loops[0].op_name in one.loops]
    gathered = sum(one.bytes for one in inside if one.kind == "all-gather" and key(one.dims) in whole)
    least = sampling_weights(config, sizes, step.params) + cache_bytes(config, architecture, sizes)
    kinds = totals([dataclasses.replace(one, times=1) for one in inside])
    return DecodePass(program.traffic(body, trips), least, len(inside), kinds, gathered, copied, wide)


def key(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions without order and without ones, which compilers move about."""
    return tuple(sorted(d for d in dims if d > 1))


def weight_shapes(step: AbstractStep) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Shapes of the layers' matrices as no device should see them (gathered over an axis), and as they are laid out.

    A router is left out: it is float32 and whole on purpose.
    """
    mesh, mode = step.parts.mesh, step.parts.config.mesh.sampling
    drop = SAMPLING_DROPS[mode]
    whole, part = set(), set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(step.params)[0]:
        name = path_name(path)
        dims = leaf.shape[1:] if name.startswith("stack_") else leaf.shape
        if len(dims) < 2 or "router" in name:
            continue
        axes = partition_spec(name, dims, mesh, drop)
        sizes = [(mesh.shape[axis] if axis else 1) for axis in (*axes, *(None,) * len(dims))][: len(dims)]
        options = itertools.product(*([d // n, d] if n > 1 else [d] for d, n in zip(dims, sizes, strict=True)))
        local, *gathered = sorted({key(option) for option in options}, key=math.prod)
        part.add(local)
        whole |= set(gathered)
    return whole, part


def cache_shapes(step: AbstractStep) -> set[tuple[int, ...]]:
    """Shapes of a layer's cache buffers on one device."""
    config, a, mesh = step.parts.config, step.parts.module.architecture, step.parts.mesh
    s, rows = config.sampler, config.completions
    slots, sizes, width = min(s.slots or rows, rows), sizes_of(step), config.data.max_prompt_length
    prompts = config.data.prompts_per_step if slots == rows else slots
    made = jax.eval_shape(lambda: init_cache(a, prompts, width, slots, s.max_new_tokens, jnp.dtype(s.cache_dtype)))
    found = set()
    for layer in made.layers:
        for leaf in jax.tree.leaves(layer):
            for heads in {1, mesh.shape["tensor"]}:
                dims = (leaf.shape[0] // sizes.rows, *leaf.shape[1:])
                split = a.latent is None and dims[1] % heads == 0
                found.add(key((dims[0], dims[1] // heads, *dims[2:]) if split else dims))
    return found


def lines(report: Report, config: Config, architecture: Architecture, topology: Topology) -> list[str]:
    """What `grpo-jax compile` prints."""
    r, said = report, []
    said.append(
        f"{r.topology}: {topology.chips} devices, compiled in {r.seconds:.0f} s, lowered in {r.lower_seconds:.0f} s"
    )
    if r.problem:
        said.append(f"the compiler refused it: {r.problem}")
    said.append(fits(r.total, topology))
    said.append(
        f"bytes a device: arguments (state, prompts) {r.arguments / GIB:.2f} GiB, temporaries "
        f"{r.temporaries / GIB:.2f} GiB, of which the cache {r.cache / GIB:.2f} GiB"
    )
    w = r.work
    said.append(
        f"FLOPs of a step, all devices: {w.sampling + w.update:.3g}: prompts {w.prefill:.3g}, {w.passes} decode passes "
        f"{w.decode:.3g}, reference and corrections {w.fixed:.3g}, training {w.training:.3g}"
    )
    if r.collectives is not None:
        for kind, (runs, size) in sorted(r.collectives.items()):
            said.append(f"{kind}: {runs:,} a step, {size / GIB:.3f} GiB a device")
        said += [] if r.collectives else ["no collectives"]
    if r.decode is not None:
        said.append(_decode_line(r.decode))
    for name, phase in (("sampling", r.sampling), ("training", r.training)):
        if phase is not None:
            said.append(
                f"roofline, {name}: {phase.seconds:.3g} s (products {phase.compute_seconds:.3g}, memory "
                f"{phase.memory_seconds:.3g}, links {phase.link_seconds:.3g})"
            )
    if r.sampling and r.training:
        said.append(f"roofline of a step: {r.sampling.seconds + r.training.seconds:.3g} s")
    said += [f"counted once, as nothing tells how often it turns: the loop {name}" for name in r.unknown_loops]
    if not r.fits:
        said.append("what would help most, by formula:")
        said += [f"  {text}" for text in suggestions(config, architecture, topology)]
    return said


def _decode_line(d: DecodePass) -> str:
    kinds = ", ".join(f"{count} {kind} of {size:,} bytes in all" for kind, (count, size) in sorted(d.kinds.items()))
    gathers = f"{d.gathered / GIB:.3f} GiB of weights gathered" if d.gathered else "no weight gathered"
    copies = f"{d.copied / GIB:.3f} GiB of cache copied" if d.copied else "no cache copied"
    wide = f"{d.wide_weights / GIB:.3f} GiB of float32 weights read" if d.wide_weights else "no float32 weight"
    return (
        f"a decode pass: {d.moved / GIB:.3f} GiB moved, {d.moved / d.least:.2f} of weights and cache; {gathers}, "
        f"{copies}, {wide}; collectives: {kinds or 'none'}"
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    return dataclasses.asdict(report) | {"fits": report.fits}
