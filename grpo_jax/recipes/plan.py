"""What a step needs of a machine, by formula: memory by use, FLOPs, roofline time; nothing is compiled.

`recipes/compile.py` says the same from the compiled program; a test holds the two together.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from grpo_jax.batches import PackShape, pack_shape
from grpo_jax.chips import GIB, Topology
from grpo_jax.config import Config
from grpo_jax.errors import InputError
from grpo_jax.models.abstract import abstract_params, abstract_teacher
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.build import kernel_name
from grpo_jax.models.cache import init_cache
from grpo_jax.models.lora import abstract_variables
from grpo_jax.optimizer import make_optimizer
from grpo_jax.parallel import AXES, SAMPLING_DROPS, check_batch, mesh_sizes, partition_spec, path_name
from grpo_jax.sampler.sample import piece_lengths, piece_passes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device by use; `arguments` are there through the whole step, the rest in one of its phases.

    Attributes:
      masters: trained parameters at rest.
      frozen: a base that is not trained, a teacher.
      optimizer: its state.
      reference: the reference's own parameters.
      sampling_weights: the policy as sampling reads it.
      cache: keys and values, or latents.
      prefill: activations of the prompts, and what a decode step has besides.
      rollout: tokens, log-probabilities and noise, which outlive sampling.
      gradient: that of a pack, and the sum over packs where there are several.
      cast: parameters in the compute dtype.
      kept: what the backward pass of a pack has of its forward pass.
      gathered_layers: whole layers brought from other devices.
      insides: of one layer in its backward pass.
      gathered_head: the whole output matrix, brought from other devices, and its gradient.
      logits: of one chunk of positions, forward and backward.
      fetched: what comes from the host's memory for a use, the optimizer's state or the reference.
    """

    masters: float
    frozen: float
    optimizer: float
    reference: float
    sampling_weights: float
    cache: float
    prefill: float
    rollout: float
    gradient: float
    cast: float
    kept: float
    gathered_layers: float
    insides: float
    gathered_head: float
    logits: float
    fetched: float = 0.0

    @property
    def arguments(self) -> float:
        """Bytes that the step is handed, and hands on."""
        return self.masters + self.frozen + self.optimizer + self.reference

    @property
    def sampling(self) -> float:
        """Temporaries while completions are drawn."""
        return self.sampling_weights + self.cache + self.prefill + self.rollout

    @property
    def training(self) -> float:
        """Temporaries of a gradient pass: at the logits or in a layer, which are one after another."""
        passes = self.cast + self.kept + max(self.gathered_head + self.logits, self.gathered_layers + self.insides)
        return self.gradient + max(passes, self.fetched) + self.rollout

    @property
    def temporaries(self) -> float:
        """Bytes of the phase that needs more."""
        return max(self.sampling, self.training)

    @property
    def total(self) -> float:
        """Bytes of a device at the most."""
        return self.arguments + self.temporaries


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a step on all devices, every completion taken at its full length.

    Attributes:
      prefill: of the prompts.
      decode: of all passes of the decode loop.
      fixed: of forward passes whose parameters do not change (reference, correction).
      training: of forward and backward passes, what rematerialisation repeats included.
      passes: of the decode loop.
      packs: gradient passes of a minibatch, on each device.
    """

    prefill: float
    decode: float
    fixed: float
    training: float
    passes: int
    packs: int

    @property
    def sampling(self) -> float:
        """Prompts and decoding."""
        return self.prefill + self.decode

    @property
    def update(self) -> float:
        """All that follows the rollout."""
        return self.fixed + self.training


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the formulas say of a config on a machine."""

    memory: Memory
    work: Work
    sampling_seconds: float
    update_seconds: float


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Trees of shapes: the model's parameters, what of them is trained and what frozen, the optimizer's state."""

    params: Any
    trainable: Any
    frozen: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Devices along the axes."""

    data: int
    fsdp: int
    tensor: int
    expert: int = 1
    sequence: int = 1

    @property
    def rows(self) -> int:
        """Parts that rows are cut into."""
        return self.parts * self.sequence

    @property
    def parts(self) -> int:
        """Parts that the packs of gradient passes are cut into, each of which lies over `sequence` devices."""
        return self.data * self.fsdp * self.expert

    @property
    def mesh(self) -> AbstractMesh:
        """For `partition_spec`."""
        sizes = tuple(getattr(self, axis) for axis in AXES)
        return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes_of(config: Config, devices: int) -> Sizes:
    """The sizes that a config asks for; raises InputError where they are not so many devices."""
    return Sizes(**dict(zip(AXES, mesh_sizes(config.mesh, devices), strict=True)))


def plan(config: Config, architecture: Architecture, topology: Topology) -> Plan:
    """Memory, FLOPs and roofline seconds of a step; raises InputError for a mesh that is not the machine's."""
    return plan_params(config, architecture, topology, abstract_params(architecture))


def plan_params(config: Config, architecture: Architecture, topology: Topology, params: Any) -> Plan:
    """`plan` with the parameter tree's shapes at hand."""
    sizes = sizes_of(config, topology.chips)
    check_batch(config, sizes.mesh)
    memory = plan_memory(config, architecture, sizes, state_shapes(config, params), topology.chip.tpu)
    work = plan_work(config, architecture, sizes, params)
    chip, share = topology.chip, 1 / topology.chips
    read = memory.sampling_weights * work.passes + cache_read(config, architecture, sizes, work)
    sampling = work.prefill * share / chip.flops
    sampling += max(work.decode * share / chip.flops, read / chip.memory_bandwidth)
    moved = 2 * memory.arguments * config.objective.num_iterations * config.objective.minibatches
    update = max(work.update * share / chip.flops, moved / chip.memory_bandwidth)
    return Plan(memory, work, sampling, update)


def state_shapes(config: Config, params: Any) -> Shapes:
    """What a run holds between steps, whatever the mesh."""
    trainable, frozen = abstract_variables(params, config.lora)
    dtype = jnp.dtype(config.model.param_dtype)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), trainable)
    optimizer = jax.eval_shape(make_optimizer(config.optim, 1).init, trainable)
    return Shapes(params, trainable, {**frozen, **abstract_teacher(config)}, optimizer)


def plan_memory(config: Config, a: Architecture, sizes: Sizes, shapes: Shapes, tpu: bool = False) -> Memory:
    """Bytes of one device by use, of a TPU or of another one."""
    kernel = tpu and kernel_name(config.model, a, "tpu", sizes.mesh.shape, None)
    splash = bool(kernel) and not config.train.share_prefix
    params, trainable = shapes.params, shapes.trainable
    shape, compute = pack_shape(config, sizes.parts, sizes.sequence), jnp.dtype(config.model.compute_dtype).itemsize
    residuals, insides = _activations(config, a, sizes, shape, compute, splash)
    gathered = _gathered_layers(a, sizes, params, compute)
    if config.model.remat == "none":  # the weights that a layer multiplied with are kept too
        residuals, gathered = residuals + gathered * a.layers, 0.0
    masters = held(trainable, sizes)
    float32 = held(trainable, sizes, 4)
    kept = config.objective.beta > 0 and not config.lora.rank
    state = {"optimizer": held(shapes.optimizer, sizes), "reference": masters if kept else 0.0}
    away = {"both": tuple(state)}.get(config.mesh.offload, (config.mesh.offload,))
    critic = masters if config.objective.baseline == "value" and config.ppo.critic == "model" else 0.0
    return Memory(
        masters=masters + critic,
        frozen=held(shapes.frozen, sizes),
        optimizer=0.0 if "optimizer" in away else state["optimizer"] * (2 if critic else 1),
        reference=0.0 if "reference" in away else state["reference"],
        sampling_weights=sampling_weights(config, sizes, params),
        cache=cache_bytes(config, a, sizes),
        prefill=_prefill(config, a, sizes, compute),
        rollout=_rollout(config, sizes),
        gradient=(2 if packs(config, sizes, shape) > 1 else 1) * float32,
        cast=held(params, sizes, compute) if compute < 4 and not config.lora.rank else 0.0,
        kept=residuals,
        gathered_layers=2 * gathered,  # one in use and one on its way
        insides=insides,
        gathered_head=_gathered_head(config, a, sizes, compute, copies=3 if tpu else 1),
        logits=_logits(config, a, sizes, shape),
        fetched=max((state[name] for name in away if name in state), default=0.0),
    )


def held(tree: Any, sizes: Sizes, width: int = 0, drop: tuple[str, ...] = ()) -> float:
    """Bytes of a tree on one device, by the rules that lay it out; `width` replaces the bytes of a number."""
    mesh, total = sizes.mesh, 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        axes = [axis for axis in partition_spec(path_name(path), leaf.shape, mesh, drop) if axis]
        parts = math.prod(mesh.shape[axis] for axis in axes)
        total += math.prod(leaf.shape) * (width or leaf.dtype.itemsize) / parts
    return total


def sampling_weights(config: Config, sizes: Sizes, params: Any) -> float:
    """Bytes of the policy as sampling reads it: cast, laid out by `mesh.sampling`, beside what is frozen as int8."""
    drop = SAMPLING_DROPS[config.mesh.sampling]
    compute, quantised = jnp.dtype(config.model.compute_dtype).itemsize, config.lora.rank > 0
    total = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = path_name(path)
        width = compute
        if quantised and config.lora.base_dtype == "int8" and name.endswith("/kernel"):
            width = 1
        total += held({name: leaf}, sizes, width, drop)
    return total


def cache_bytes(config: Config, a: Architecture, sizes: Sizes) -> float:
    """Bytes of the decode cache on one device: prompts' segments, and with slots their copies and the slots' own."""
    s, prompts = config.sampler, config.data.prompts_per_step
    rows, width = config.completions, config.data.max_prompt_length
    slots = min(s.slots or rows, rows)
    dtype = jnp.dtype(s.cache_dtype)

    def size(*rows_and_lengths: int) -> float:
        made = jax.eval_shape(lambda: init_cache(a, *rows_and_lengths, dtype))  # pyright: ignore[reportCallIssue]
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made)) / sizes.rows

    total = size(prompts, width, rows if slots == rows else 0, s.max_new_tokens)
    total += 0.0 if slots == rows else size(slots, width, slots, s.max_new_tokens)
    return total / (sizes.tensor if a.latent is None and a.kv_heads % sizes.tensor == 0 else 1)


def cache_read(config: Config, a: Architecture, sizes: Sizes, work: Work) -> float:
    """Bytes of the decode cache that a device reads in all passes, where every completion is full."""
    if config.sampler.slots:
        return cache_bytes(config, a, sizes) * work.passes
    total, passes = 0.0, piece_passes(config.sampler)
    for room, count in zip(piece_lengths(config.sampler), passes, strict=True):
        sampler = dataclasses.replace(config.sampler, max_new_tokens=room)
        total += count * cache_bytes(dataclasses.replace(config, sampler=sampler), a, sizes)
    return total


def plan_work(config: Config, a: Architecture, sizes: Sizes, params: Any) -> Work:
    """FLOPs of a step: 2 for each weight that a token meets, 2 for each product of attention, three times in training.

    A token sees the prompt and half the completion on average. What rematerialisation does again counts.
    """
    o, s = config.objective, config.sampler
    prompts, width, rows, length = config.data.prompts_per_step, config.data.max_prompt_length, config.completions, 0
    length = s.max_new_tokens
    weights, head = met_weights(a, params)

    def forward(tokens: float, context: float, heads: float, absorbed: bool = False) -> float:
        return 2.0 * (weights * tokens + head * heads + attended(a, absorbed) * tokens * context)

    prefill = forward(prompts * width, width / 2, prompts)
    decode = forward(rows * (length - 1), width + length / 2, rows * (length - 1), True)
    times = prompts if config.train.share_prefix else rows
    whole = forward(times * width, width / 2, 0) + forward(rows * length, width + length / 2, rows * length)
    fixed = whole * ((o.beta > 0) + (o.correction != "none" or o.top_entropy_quantile < 1))
    passes = 3 + (config.model.remat == "full") + (config.model.logits_chunk > 0) * _head_share(weights, head)
    shape = pack_shape(config, sizes.parts, sizes.sequence)
    slots = min(s.slots or rows, rows)
    turns = length - 1 if slots == rows else math.ceil(rows / slots) * length
    return Work(prefill, decode, fixed, whole * passes * o.num_iterations, turns, packs(config, sizes, shape))


def packs(config: Config, sizes: Sizes, shape: PackShape) -> int:
    """Gradient passes of a minibatch on each device where every completion is full."""
    groups = config.completions // sizes.parts // shape.group // config.objective.minibatches
    return math.ceil(groups / min(max(shape.rows // shape.group, 1), shape.prompts))


def met_weights(a: Architecture, params: Any) -> tuple[float, float]:
    """(weights of the layers that one token meets, those of the output matrix)."""
    layers = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, size = path_name(path), math.prod(leaf.shape)
        if name.startswith("stack_"):
            routed = a.experts is not None and "/experts_" in name
            layers += size * (a.experts.chosen / a.experts.count if routed and a.experts else 1)
    return layers, float(a.vocabulary * a.width)


def attended(a: Architecture, absorbed: bool = False) -> float:
    """Products of a query with one token it sees, in all layers; `absorbed` as latent attention reads its cache."""
    if a.latent is None:
        return 2.0 * a.layers * a.heads * a.head_size
    m = a.latent
    inner = 2 * m.rank + m.rotary if absorbed else m.plain + m.rotary + m.value
    return float(a.layers * a.heads * inner)


def _head_share(weights: float, head: float) -> float:
    """What the logits, which chunks compute twice, are of a forward pass."""
    return head / (weights + head)


def _prefill(config: Config, a: Architecture, sizes: Sizes, compute: int) -> float:
    """Hidden states of the prompts with the widest layer's insides, scores, and the logits of a decode step.

    And, where it is gathered, a second copy of a tied output matrix, which is looked up in one layout and multiplied in
    another.
    """
    prompts, width = config.data.prompts_per_step / sizes.rows, config.data.max_prompt_length
    rows = min(config.sampler.slots or config.completions, config.completions) / sizes.rows
    mlp = 2 * a.mlp_width / sizes.tensor
    tokens = prompts * width * (2 * a.width + mlp) * compute
    scores = prompts * a.heads / sizes.tensor * width * width * (4 + compute)
    matrix = a.vocabulary * a.width / sizes.tensor * compute if a.tied and sizes.fsdp > 1 else 0.0
    return max(tokens + scores, rows * a.vocabulary / sizes.tensor * 4 * 3) + matrix


def _rollout(config: Config, sizes: Sizes) -> float:
    """Tokens, two log-probabilities, noise, and the batch that training makes of them."""
    rows, length = config.completions / sizes.rows, config.sampler.max_new_tokens
    return rows * (length * 4 * 12 + config.data.max_prompt_length * 4 * 2)


def _gathered_layers(a: Architecture, sizes: Sizes, params: Any, compute: int) -> float:
    """Weights of one layer; the gradient of each goes back to the devices as it is made."""
    if sizes.fsdp == 1:
        return 0.0
    stacks = {name: tree for name, tree in params.items() if name.startswith("stack_")}
    return held(stacks, sizes, compute, ("fsdp",)) / a.layers


def _gathered_head(config: Config, a: Architecture, sizes: Sizes, compute: int, copies: int) -> float:
    """The output matrix and its float32 gradient; on TPUs two layouts of it, and the gradient rounded for its way."""
    if sizes.fsdp == 1:
        return 0.0
    head = a.vocabulary * a.width / (sizes.tensor if a.vocabulary % sizes.tensor == 0 else 1)
    return head * (compute * copies + (0 if config.lora.rank else 4))


def _activations(
    config: Config, a: Architecture, sizes: Sizes, shape: PackShape, compute: int, splash: bool = False
) -> tuple[float, float]:
    """(what is kept of each layer for the backward pass, its input or without rematerialisation all; one's insides)."""
    length, prompt = config.sampler.max_new_tokens, config.data.max_prompt_length
    width = length if shape.shared else length + prompt
    tokens = shape.rows * width + (shape.prompts * prompt if shape.shared else 0)
    heads = a.heads / sizes.tensor
    seen = width + (prompt * (1 if shape.apart else shape.prompts) if shape.shared else 0)
    scores = shape.rows * heads * width * seen
    scores += shape.prompts * heads * prompt * prompt if shape.shared else 0
    sums = 0.0
    if splash:  # no scores, and for each query a log-sum-exp that the kernel writes 128 times; the first is kept
        scores, sums = 0.0, shape.rows * heads * width * 128 * 4.0
    query = heads * a.head_size
    inner = tokens * compute * (4 * a.width + 4 * query + _mlp_numbers(a, sizes)) + scores * (4 + compute)
    kept = tokens * a.width * compute
    inner, kept = inner / sizes.sequence, kept / sizes.sequence
    if config.model.remat in ("full", "offload_dot_with_no_batch_dims"):
        return a.layers * kept, 1.5 * inner + sums
    return a.layers * (inner + kept) + sums, 0.0


def _mlp_numbers(a: Architecture, sizes: Sizes) -> float:
    """Numbers that a token has inside the widest MLP: with experts a copy of itself for each that it chose."""
    dense = 4 * a.mlp_width / sizes.tensor
    if a.experts is None:
        return dense
    e = a.experts
    return max(dense, e.chosen * (2 * a.width + 4 * e.width / sizes.tensor) + 4 * e.shared_width / sizes.tensor)


def _logits(config: Config, a: Architecture, sizes: Sizes, shape: PackShape) -> float:
    """Float32 logits of a chunk, their law, and the gradient of both."""
    positions = shape.rows * config.sampler.max_new_tokens
    chunk = config.model.logits_chunk
    if chunk:
        positions = min(positions, max(chunk / sizes.parts, 1))
    return positions / sizes.sequence * a.vocabulary / sizes.tensor * 4 * 3


# Changes that save memory, and what they cost; each is tried where it changes anything.
CHANGES: tuple[tuple[str, str, Any, str], ...] = (
    ("model", "remat", "full", "a third more work in training"),
    ("model", "logits_chunk", 1024, "logits are computed twice"),
    ("model", "compute_dtype", "bfloat16", "rounding"),
    ("sampler", "cache_dtype", "bfloat16", "rounding"),
    ("optim", "moment_dtype", "bfloat16", "rounding of Adam's first moment"),
    ("optim", "name", "adafactor", "another optimizer"),
    ("objective", "beta", 0.0, "no KL to a reference"),
    ("mesh", "offload", "both", "optimizer and reference come over the host's bus"),
    ("mesh", "sampling", "tensor", "weights of sampling are split over tensor alone"),
    ("mesh", "sampling", "same", "weights of sampling are gathered where fsdp splits them"),
    ("lora", "rank", 16, "adapters are trained, not all parameters"),
)


def suggestions(config: Config, architecture: Architecture, topology: Topology, most: int = 3) -> list[str]:
    """The changes of a config that save most bytes a device by formula, each with what it saves and costs."""
    params = abstract_params(architecture)

    def total(config: Config, topology: Topology) -> float:
        return plan_params(config, architecture, topology, params).memory.total

    before, found = total(config, topology), []
    for changed, written, cost in _changes(config, topology):
        try:
            saved = before - total(changed, topology)
        except InputError:
            continue
        if saved > 0.01 * before:
            found.append((saved, f"{written} saves {saved / GIB:,.2f} GiB a device ({cost})"))
    bigger = dataclasses.replace(topology, shape=(*topology.shape[:-1], 2 * topology.shape[-1]))
    sizes = sizes_of(config, topology.chips)
    mesh = dataclasses.replace(config.mesh, data=sizes.data, fsdp=2 * sizes.fsdp, tensor=sizes.tensor)
    prompts = max(config.data.prompts_per_step, sizes.data * mesh.fsdp)
    data = dataclasses.replace(config.data, prompts_per_step=prompts)
    saved = before - total(dataclasses.replace(config, mesh=mesh, data=data), bigger)
    if saved > 0.01 * before:
        found.append(
            (saved, f"{bigger.name} with --config.mesh.fsdp={mesh.fsdp} saves {saved / GIB:,.2f} GiB a device")
        )
    return [text for _, text in sorted(found, reverse=True)[:most]]


def _changes(config: Config, topology: Topology) -> list[tuple[Config, str, str]]:
    """(changed config, how to write it, what it costs)."""
    made = []

    def add(section: str, field: str, value: Any, cost: str) -> None:
        if getattr(getattr(config, section), field) != value:
            inner = dataclasses.replace(getattr(config, section), **{field: value})
            written = f"--config.{section}.{field}={value}"
            made.append((dataclasses.replace(config, **{section: inner}), written, cost))

    for change in CHANGES:
        add(*change)
    rows = pack_shape(config, sizes_of(config, topology.chips).parts)
    if rows.rows > rows.group:
        least = rows.parts * rows.group
        add("objective", "micro_batch_size", max(least, rows.rows * rows.parts // 2), "smaller gradient passes")
    slots = config.sampler.slots or config.completions
    if slots // 2 >= rows.parts and slots // 2 % rows.parts == 0:
        add("sampler", "slots", slots // 2, "more decode passes")
    tensor = config.mesh.tensor if config.mesh.tensor > 0 else 1
    others = tensor * max(config.mesh.expert, 1) * max(config.mesh.sequence, 1)
    spread = dataclasses.replace(config.mesh, data=1, fsdp=topology.chips // others)
    if spread != config.mesh and topology.chips > tensor:
        changed = dataclasses.replace(config, mesh=spread)
        made.append((changed, f"--config.mesh.data=1 --config.mesh.fsdp={spread.fsdp}", "layers are gathered"))
    return made


def describe_plan(found: Plan, config: Config, topology: Topology) -> list[str]:
    """What `grpo-jax plan --config` prints."""
    memory, work = found.memory, found.work
    rows: Mapping[str, float] = {f.name: getattr(memory, f.name) for f in dataclasses.fields(memory)}
    lines = [f"{topology.name}: {topology.chips} chips, {config.completions} completions a step; GiB a device:"]
    lines += [f"  {name.replace('_', ' '):<18}{size / GIB:9.2f}" for name, size in rows.items() if size]
    lines.append(f"  arguments {memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f} ")
    lines[-1] += f"(sampling {memory.sampling / GIB:.2f}, training {memory.training / GIB:.2f})"
    lines.append(fits(memory.total, topology))
    lines.append(
        f"FLOPs of a step: sampling {work.sampling:.3g}, training {work.update:.3g}; "
        f"{work.passes} decode passes, {work.packs * config.objective.minibatches} gradient passes a device"
    )
    step = found.sampling_seconds + found.update_seconds
    lines.append(
        f"roofline: {step:.3g} s a step, {found.sampling_seconds:.3g} sampling and {found.update_seconds:.3g} training "
        "(no collectives)"
    )
    return lines


def fits(total: float, topology: Topology) -> str:
    """The line that says whether so many bytes a device fit, and by how much."""
    spare = topology.chip.memory - total
    said = f"fits with {spare / GIB:.2f} GiB to spare" if spare >= 0 else f"does not fit by {-spare / GIB:.2f} GiB"
    return f"{said}: {total / GIB:.2f} of {topology.chip.memory / GIB:.2f} GiB a device"
