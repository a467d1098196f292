"""Gradient descent on given rows: what supervised fine-tuning, DPO and the training of reward models share."""

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
from jaxtyping import Array, Int

from grpo_jax import processes
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import (
    Config,
    DpoConfig,
    LogConfig,
    OptimConfig,
    RewardModelTrainingConfig,
    SftConfig,
    TextConfig,
)
from grpo_jax.data.order import row_order
from grpo_jax.errors import InputError
from grpo_jax.metrics import Fetcher, Mean, RunWriter, divide
from grpo_jax.models.build import build_decoder
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import LoadedModel, load_model
from grpo_jax.models.lora import ADAPTERS, fingerprint, merge, split_variables
from grpo_jax.models.peft import base_of, is_adapters, write_adapters
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import (
    check_offload,
    give_back_host_memory,
    in_host_memory,
    make_mesh,
    moved,
    options_of_cpu,
    place,
    put_rows,
    replicated,
    row_axes,
    row_sharding,
    row_shards,
    shardings,
    whole,
)
from grpo_jax.recipes.loop import Loop, Stop, check_base, open_stop, open_terminal, open_workdir
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer

Options = SftConfig | DpoConfig | RewardModelTrainingConfig
Loss = Callable[[Any, Any, Any], tuple[Array, dict[str, Mean]]]  # of (trainable, fixed, batch)


class SupervisedState(flax.struct.PyTreeNode):
    """All that changes: the trained collections ({"params": ...} or {"adapters": ...}) and the optimizer's state."""

    step: Int[Array, ""]
    trainable: Any
    opt_state: Any


def supervised_optim(config: Options) -> OptimConfig:
    """AdamW, a warm-up of a twentieth, then a cosine to a tenth of the peak."""
    return OptimConfig(lr=config.lr, schedule="cosine", warmup_steps=config.steps // 20, final_lr_fraction=0.1)


def supervised_program(
    config: Config, optim: OptimConfig, steps: int, loss: Loss, collections: tuple[Any, Any], mesh: Mesh
) -> tuple[Any, SupervisedState, Callable[[Any], SupervisedState]]:
    """(the step (fixed, state, batch) -> (state, metrics, None), the abstract state, what makes the first one).

    `collections` are what is trained and what the loss reads besides.
    """
    optimizer, schedule = make_optimizer(optim, steps), make_schedule(optim, steps)
    trainable, fixed = collections

    def make(trainable: Any) -> SupervisedState:
        return SupervisedState(step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable))

    away = config.mesh.offload in ("optimizer", "both")
    shapes = jax.eval_shape(make, trainable)
    layout = shardings(shapes, mesh)
    if away:
        layout = layout.replace(opt_state=in_host_memory(shapes.opt_state, layout.opt_state))

    def step(fixed: Any, state: SupervisedState, batch: Any) -> tuple[SupervisedState, dict[str, Mean], None]:
        with jax.default_matmul_precision(config.model.matmul_precision):
            gradient, means = jax.grad(loss, has_aux=True)(state.trainable, fixed, batch)
            before = moved(state.opt_state, mesh, to_host=False) if away else state.opt_state
            changes, opt_state = optimizer.update(gradient, before, state.trainable)
            opt_state = moved(opt_state, mesh, to_host=True) if away else opt_state
        means |= {"grad_norm": (optax.tree.norm(gradient), 1.0), "lr": (schedule(state.step), 1.0)}
        changed = optax.apply_updates(state.trainable, changes)
        return SupervisedState(step=state.step + 1, trainable=changed, opt_state=opt_state), means, None

    program = jax.jit(
        step,
        in_shardings=(shardings(fixed, mesh), layout, row_sharding(mesh)),
        out_shardings=(layout, replicated(mesh), None),
        donate_argnums=1,
        compiler_options=options_of_cpu(mesh),
    )
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    return program, abstract, jax.jit(make, out_shardings=layout)


def descend(
    config: Config,
    steps: int,
    programs: tuple[Any, SupervisedState, Callable[[Any], SupervisedState]],
    collections: tuple[Any, Any],
    batch: Callable[[int], Any],
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
    name: str,
    about: Mapping[str, Any] = types.MappingProxyType({}),
    save_last: bool = True,
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
        stop.progress(f"compiling {name}")
        give_back_host_memory()
        with terminal.compiling(name):
            compiled = functools.partial(program.lower(fixed, abstract, batch(first)).compile(), fixed)
        give_back_host_memory()
        fetch = Fetcher()
        with RunWriter(workdir, dataclasses.replace(LogConfig(), tensorboard=False), first or None) as writer:

            def record(done: int, metrics: Any, _: Any, found: dict[str, float], seconds: float) -> None:
                line = divide(fetch(metrics)) | {"seconds/step": seconds}
                writer.step(done, line)
                terminal.step(done, steps, line)

            every = config.checkpoint.every
            loop = Loop(steps, compiled, batch, record, checkpoints, every, stop, about=about, save_last=save_last)
            state = loop.run(state, first)
        terminal.end_steps()
        return state.trainable


def drawn_rows(config: Config, options: Options, step: int, count: int) -> list[int]:
    """Which of `count` rows a step takes: each once an epoch, in an order of the config's seed."""
    draws = step * options.batch_size + np.arange(options.batch_size)
    return row_order(draws, count, config.seed, True).tolist()


def drawn_batch(
    config: Config, options: Options, step: int, rows: Sequence[Any], make: Callable[[list[Any]], Any], mesh: Mesh
) -> Any:
    """What `make` gives for the rows of a step, on the mesh; each host makes the rows that its devices hold."""
    chosen = drawn_rows(config, options, step, len(rows))
    return put_rows(lambda own: make([rows[chosen[i]] for i in own]), options.batch_size, row_sharding(mesh))


def open_model(config: Config, options: Options, name: str) -> tuple[LoadedModel, Mesh]:
    """The model to train, with the end tokens of the config, and the mesh; raises InputError before it reads any."""
    if not config.model.path:
        raise InputError("config: model.path='' names no model to train")
    mesh = make_mesh(config.mesh)
    check_offload(config.mesh.offload, mesh)
    if options.batch_size % row_shards(mesh):
        raise InputError(
            f"config: {name}.batch_size={options.batch_size} must divide by the {row_shards(mesh)} devices of "
            f"{row_axes(mesh)}"
        )
    model = load_model(config.model.path, keep_adapters=config.lora.rank > 0)
    return dataclasses.replace(model, tokenizer=model.tokenizer.with_end_tokens(config.text.end_tokens)), mesh


def open_run(config: Config, model: LoadedModel, mesh: Mesh, workdir: pathlib.Path) -> tuple[Decoder, Stop]:
    """The decoder, and what ends the run when its time is up; the workdir becomes this run's."""
    module = build_decoder(config, model.architecture, mesh)
    open_workdir(workdir, config)
    return module, open_stop(config, workdir)


def train_on_rows(
    config: Config,
    options: Options,
    name: str,
    read: Callable[[str, TextConfig, Tokenizer, int], Sequence[Any]],
    train: Callable[..., Any],
    workdir: pathlib.Path,
    terminal: Terminal | None,
) -> str:
    """Trains `model.path` on the rows that `read` gives of `options.path`; returns the folder of the result.

    `train` is called with (module, collections, rows, mesh, workdir, stop, terminal, name, what checkpoints say of a
    frozen base). Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    terminal = terminal or open_terminal()
    model, mesh = open_model(config, options, name)
    rows = read(options.path, config.text, model.tokenizer, options.max_length)
    module, stop = open_run(config, model, mesh, workdir)
    epochs = options.epochs if isinstance(options, SftConfig) else 0
    span = f"{epochs} epochs" if epochs else f"{options.steps} steps"
    terminal.say(f"{len(rows)} rows, {options.batch_size} a step, {span}")
    with stop, terminal:
        collections = put_variables(config, model, mesh)
        trained = train(module, collections, rows, mesh, workdir, stop, terminal, name, about_base(config, model))
    return save_trained(workdir, config, model, whole({**collections[1], **trained}))


def put_variables(config: Config, model: LoadedModel, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) collections of a run on the mesh: all parameters, or adapters and the base."""
    trainable, frozen = split_variables(model.params, config.lora, config.seed, model.adapters)
    return place(trainable, mesh, jnp.float32), place(frozen, mesh)


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
    """The folder that `write` fills, there whole or not at all; a finished one is left as it is. Process 0 writes."""

    def make() -> None:
        if not folder.is_dir():
            making = folder.with_name(f"{folder.name}.making")
            shutil.rmtree(making, ignore_errors=True)  # a kill may have left half of one
            write(str(making))
            making.rename(folder)

    processes.on_first(make)
    return str(folder)
