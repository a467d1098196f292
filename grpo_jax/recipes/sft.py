"""Supervised fine-tuning: next-token cross-entropy on assistant tokens only."""

import dataclasses
import functools
import pathlib
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, DpoConfig, LogConfig, OptimConfig, SftConfig, TextConfig, parse_duration
from grpo_jax.data.prompts import row_order
from grpo_jax.errors import InputError
from grpo_jax.metrics import Fetcher, Mean, RunWriter, divide, read_jsonl
from grpo_jax.models.decoder import Decoder, DecoderModule
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import LoadedModel, load_model
from grpo_jax.models.lora import ADAPTERS, fingerprint, merge, split_variables
from grpo_jax.models.peft import base_of, is_adapters, write_adapters
from grpo_jax.ops.logprobs import token_logps
from grpo_jax.ops.masked import safe_divide
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import make_mesh, place, replicated, row_sharding, shardings
from grpo_jax.recipes.loop import Loop, Stop, check_base, open_workdir
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_chat

OPEN_PACKS = 64  # packs that first fit looks at: the last ones, so that packing n examples takes O(n)

Example = tuple[list[int], list[int]]  # token ids, and 1 where the loss counts
Loss = Callable[[Any, Any, Any], tuple[Array, dict[str, Mean]]]  # of (trainable, fixed, batch)


class SftState(flax.struct.PyTreeNode):
    """All that changes: the trained collections ({"params": ...} or {"adapters": ...}) and the optimizer's state."""

    step: Int[Array, ""]
    trainable: Any
    opt_state: Any


class SftBatch(flax.struct.PyTreeNode):
    """Packs of examples: `segments` numbers a pack's examples from 1 (0 is padding), `mask` is 1 on what is learned."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    mask: Float[Array, "B S"]


def read_chats(path: str, config: TextConfig, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Examples of a JSONL file of {'messages': [...]} or {'prompt', 'completion'} rows.

    Raises InputError naming file, row and fix: no such file, no rows, other columns, rows that are too long.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"sft.path={path!r}: no such file; give a JSONL file of chats")
    examples = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if "messages" in row:
            messages = row["messages"]
        elif {"prompt", "completion"} <= row.keys():
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        else:
            raise InputError(f"{path}: row {number} has {sorted(row)}, not 'messages' nor 'prompt' and 'completion'")
        try:
            ids, mask = encode_chat(messages, config, tokenizer)
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from None
        if len(ids) > max_length:
            raise InputError(f"{path}: row {number} has {len(ids)} tokens, more than max_length={max_length}")
        examples.append((ids, mask))
    if not examples:
        raise InputError(f"sft.path={path!r}: has no rows")
    return examples


def pack(examples: Sequence[Example], length: int, seed: int) -> list[list[int]]:
    """Examples by number, put together in packs of at most `length` tokens: first fit in a seeded order.

    Examples of a pack do not see each other, so the loss is that of separate rows.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for number in row_order(np.arange(len(examples)), len(examples), seed, True).tolist():
        size = len(examples[number][0])
        place = next((i for i in range(max(len(packs) - OPEN_PACKS, 0), len(packs)) if room[i] >= size), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(length)
        packs[place].append(number)
        room[place] -= size
    return packs


def make_sft_batch(examples: Sequence[Example], packs: Sequence[Sequence[int]], length: int) -> SftBatch:
    """The packs as numpy arrays [B, length]."""
    arrays = {name: np.zeros((len(packs), length), np.int32) for name in ("tokens", "positions", "segments")}
    mask = np.zeros((len(packs), length), np.float32)
    for row, numbers in enumerate(packs):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            ids, counted = examples[number]
            here = slice(start, start + len(ids))
            arrays["tokens"][row, here], mask[row, here] = ids, counted
            arrays["positions"][row, here], arrays["segments"][row, here] = np.arange(len(ids)), segment
            mask[row, start] = 0.0  # nothing before it says what an example's first token is
            start += len(ids)
    return SftBatch(**arrays, mask=mask)  # pyright: ignore[reportArgumentType]


def sft_loss(module: DecoderModule, variables: Any, batch: SftBatch, chunk: int = 0) -> tuple[Array, dict[str, Mean]]:
    """Mean over counted tokens of -log p(token | tokens before it)."""
    hidden = module.apply(variables, batch.tokens, batch.positions, batch.segments)

    def unembed(hidden: Array) -> Array:
        return module.apply(variables, hidden, method="logits")

    logps, _ = token_logps(hidden[:, :-1], unembed, batch.tokens[:, 1:], 1.0, chunk)
    mask = batch.mask[:, 1:]
    total, count = -jnp.sum(logps * mask), jnp.sum(mask)
    return safe_divide(total, count), {"sft/loss": (total, count)}


def sft_optim(config: SftConfig | DpoConfig) -> OptimConfig:
    """AdamW, a warm-up of a twentieth, then a cosine to a tenth of the peak."""
    return OptimConfig(lr=config.lr, schedule="cosine", warmup_steps=config.steps // 20, final_lr_fraction=0.1)


def fine_tune(
    config: Config,
    sft: SftConfig,
    module: DecoderModule,
    params: Any,
    examples: Sequence[Example],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
    name: str,
) -> Any:
    """Parameters after `sft.steps` steps from `params`; checkpoints and metrics lie in `workdir`."""
    return fit(config, sft, module, ({"params": params}, {}), examples, mesh, workdir, stop, terminal, name)["params"]


def supervised_program(
    config: Config, optim: OptimConfig, steps: int, loss: Loss, collections: tuple[Any, Any], mesh: Mesh
) -> tuple[Any, SftState, Callable[[Any], SftState]]:
    """(the step (fixed, state, batch) -> (state, metrics, None), the abstract state, what makes the first one).

    `collections` are what is trained and what the loss reads besides.
    """
    optimizer, schedule = make_optimizer(optim, steps), make_schedule(optim, steps)
    trainable, fixed = collections

    def make(trainable: Any) -> SftState:
        return SftState(step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable))

    shapes = jax.eval_shape(make, trainable)
    layout = shardings(shapes, mesh)

    def step(fixed: Any, state: SftState, batch: Any) -> tuple[SftState, dict[str, Mean], None]:
        with jax.default_matmul_precision(config.model.matmul_precision):
            gradient, means = jax.grad(loss, has_aux=True)(state.trainable, fixed, batch)
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        means |= {"grad_norm": (optax.tree.norm(gradient), 1.0), "lr": (schedule(state.step), 1.0)}
        changed = optax.apply_updates(state.trainable, changes)
        return SftState(step=state.step + 1, trainable=changed, opt_state=opt_state), means, None

    program = jax.jit(
        step,
        in_shardings=(shardings(fixed, mesh), layout, row_sharding(mesh)),
        out_shardings=(layout, replicated(mesh), None),
        donate_argnums=1,
    )
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    return program, abstract, jax.jit(make, out_shardings=layout)


def fit(
    config: Config,
    sft: SftConfig,
    module: DecoderModule,
    collections: tuple[Any, Any],
    examples: Sequence[Example],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
    name: str,
    about: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """The trained collections after `sft.steps` steps from `collections`, (trainable, frozen).

    `about` is what checkpoints say of a frozen base, which they do not hold.
    """

    def loss(trainable: Any, frozen: Any, batch: SftBatch) -> tuple[Array, dict[str, Mean]]:
        return sft_loss(module, {**frozen, **trainable}, batch, config.model.logits_chunk)

    packs = pack(examples, sft.max_length, config.seed)
    rows = row_sharding(mesh)

    def batch(step: int) -> SftBatch:
        draws = step * sft.batch_size + np.arange(sft.batch_size)
        chosen = row_order(draws, len(packs), config.seed, True)
        return jax.device_put(make_sft_batch(examples, [packs[i] for i in chosen], sft.max_length), rows)

    program = supervised_program(config, sft_optim(sft), sft.steps, loss, collections, mesh)
    return descend(config, sft.steps, program, collections, batch, workdir, stop, terminal, name, about)


def descend(
    config: Config,
    steps: int,
    programs: tuple[Any, SftState, Callable[[Any], SftState]],
    collections: tuple[Any, Any],
    batch: Callable[[int], Any],
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
    name: str,
    about: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """The trained collections after `steps` steps of a `supervised_program`, gone on with where a checkpoint is."""
    (program, abstract, start), (trainable, fixed) = programs, collections
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep, terminal.warn) as checkpoints:
        restored = checkpoints.restore(abstract)
        first = restored[2] if restored else 0
        if restored:
            check_base(restored[1], about, workdir, config.model.path)
        state = restored[0] if restored else start(trainable)
        if first == steps:
            return state.trainable
        with terminal.compiling(name):
            compiled = functools.partial(program.lower(fixed, abstract, batch(first)).compile(), fixed)
        fetch = Fetcher()
        with RunWriter(workdir, dataclasses.replace(LogConfig(), tensorboard=False), first or None) as writer:

            def record(done: int, metrics: Any, _: Any, found: dict[str, float], seconds: float) -> None:
                line = divide(fetch(metrics)) | {"seconds/step": seconds}
                writer.step(done, line)
                terminal.step(done, steps, line)

            loop = Loop(steps, compiled, batch, record, checkpoints, config.checkpoint.every, stop, about=about)
            state = loop.run(state, first)
        terminal.end_steps()
        return state.trainable


def run(config: Config, workdir: pathlib.Path, terminal: Terminal | None = None) -> str:
    """`grpo-jax sft`: fine-tunes `model.path` on `sft.path`; returns the folder of the result.

    Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    terminal = terminal or Terminal()
    if not config.model.path:
        raise InputError("config: model.path='' names no model to fine-tune")
    mesh = make_mesh(config.mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.sft.batch_size % shards:
        raise InputError(f"config: sft.batch_size={config.sft.batch_size} must divide by the {shards} devices")
    model = load_model(config.model.path, keep_adapters=config.lora.rank > 0)
    tokenizer = model.tokenizer.with_end_tokens(config.text.end_tokens)
    examples = read_chats(config.sft.path, config.text, tokenizer, config.sft.max_length)
    open_workdir(workdir, config)
    budget = parse_duration(config.train.time_budget) if config.train.time_budget else None
    module = Decoder(model.architecture, dtype=jnp.dtype(config.model.compute_dtype), remat=config.model.remat)
    terminal.say(f"{len(examples)} examples, {config.sft.batch_size} a step, {config.sft.steps} steps")
    with Stop(budget) as stop, terminal:
        collections = put_variables(config, model, mesh)
        given = (collections, examples, mesh, workdir, stop, terminal, "sft", about_base(config, model))
        trained = fit(config, config.sft, module, *given)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    return save_trained(workdir, config, model, jax.device_get({**collections[1], **trained}))


def put_variables(config: Config, model: LoadedModel, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) collections of a run on the mesh: all parameters, or adapters and the base."""
    trainable, frozen = split_variables(model.params, config.lora, config.seed, model.adapters)
    return place(trainable, mesh, jnp.float32), jax.device_put(frozen, shardings(frozen, mesh))


def about_base(config: Config, model: LoadedModel) -> dict[str, int]:
    """What a checkpoint of adapters says of the base that it does not hold."""
    return {"base": fingerprint(model.params)} if config.lora.rank else {}


def save_trained(workdir: pathlib.Path, config: Config, model: LoadedModel, variables: Mapping[str, Any]) -> str:
    """Writes `model`, a Hugging Face folder, adapters merged, and with adapters `adapter` for PEFT beside it."""
    if ADAPTERS not in variables:
        return save_model(workdir / "model", model, variables["params"])
    save_adapters(workdir / "adapter", config, model, variables)
    return save_model(workdir / "model", model, merge(variables["params"], variables))


def save_adapters(folder: pathlib.Path, config: Config, model: LoadedModel, variables: Mapping[str, Any]) -> str:
    """Writes a PEFT folder that is there whole or not at all; a finished one is left as it is."""
    base = config.model.path or model.source
    while is_adapters(base):  # adapters that were trained on: PEFT wants the model below them
        base = base_of(base)
    return written_whole(
        folder, lambda making: write_adapters(making, model.architecture, variables, config.lora.alpha, base)
    )


def save_model(folder: pathlib.Path, model: LoadedModel, params: Any) -> str:
    """Writes a Hugging Face folder that is there whole or not at all; a finished one is left as it is."""
    return written_whole(folder, lambda making: write_folder(making, model.architecture, params, model.tokenizer))


def written_whole(folder: pathlib.Path, write: Callable[[str], None]) -> str:
    """The folder that `write` fills, there whole or not at all; a finished one is left as it is."""
    if not folder.is_dir():
        making = folder.with_name(f"{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)  # a kill may have left half of one
        write(str(making))
        making.rename(folder)
    return str(folder)
