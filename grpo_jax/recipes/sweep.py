"""Several configs with several seeds each: all seeds of a config in one program, a plot and a table of every run.

A sweep is a config file with `get_sweep()` beside `get_config()`: the seeds, and by name the fields in which each
config differs. All start from one model and draw from one dataset, those of the file's own `seed`; a run's seed decides
its order of prompts and its sampling noise.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from grpo_jax import processes
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, from_dict, load_config_module
from grpo_jax.data.prompts import PromptSet, make_batch
from grpo_jax.errors import InputError
from grpo_jax.metrics import Fetcher, RunWriter, divide, read_jsonl, write_json_atomic
from grpo_jax.models.abstract import base_sizes
from grpo_jax.models.build import build_policy
from grpo_jax.models.loading import LoadedModel, load_model
from grpo_jax.parallel import ROWS, check_batch, make_mesh, place, put_rows, replicated, shardings
from grpo_jax.recipes.base import make_base
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.recipes.grpo import initial_state, prepare, read_rows, with_end_tokens
from grpo_jax.recipes.loop import Loop, Stop, check_workdir, open_stop, open_terminal, open_workdir
from grpo_jax.rewards.scorer import Scorer, build_scorer
from grpo_jax.sampler.types import Prompts, Rollout
from grpo_jax.step import Metrics, StepParts, TrainState, train_step
from grpo_jax.terminal import Terminal

SEED_AXIS = "seed"
LAST = 5  # steps whose solve rates the table averages
MAX_SEED = 2**31 - 1  # a seed is an int32 inside the program


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The configs of a sweep by name, the seeds of each, and which configs are trained now."""

    seeds: tuple[int, ...]
    configs: Mapping[str, Config]
    training: tuple[str, ...]


def read_sweep(path: pathlib.Path, config: Config) -> Sweep:
    """What the `get_sweep()` of a config file names; raises InputError naming file, run and field."""
    module = load_config_module(path)
    if not hasattr(module, "get_sweep"):
        raise InputError(f"{path}: has no get_sweep(); it must return {{'seeds': (0, 1), 'runs': {{name: fields}}}}")
    given = module.get_sweep()
    configs = {}
    for name, fields in given["runs"].items():
        values = dataclasses.asdict(config)
        for field, value in fields.items():
            section = values
            *above, leaf = field.split(".")
            for part in above:
                section = section.setdefault(part, {})
            section[leaf] = value
        configs[name] = from_dict(values, f"{path}: runs[{name!r}]")
        if configs[name].step.mode != "fused" or configs[name].sampler.slots:
            raise InputError(
                f"{path}: runs[{name!r}]: all seeds run in one program, which has no step.mode='staged' and no "
                "sampler.slots: use 'fused' and 0"
            )
        if configs[name].mesh.offload != "none":
            raise InputError(f"{path}: runs[{name!r}]: mesh.offload: states of all seeds stay on devices: use 'none'")
    seeds = tuple(given["seeds"])
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise InputError(f"{path}: seeds={seeds} must be different numbers from 0 to {MAX_SEED}")
    return Sweep(seeds, configs, tuple(configs))


def chosen_configs(sweep: Sweep, only: Sequence[str]) -> Sweep:
    """The sweep with `training` limited to the configs named (none: all of them); raises InputError for other names."""
    for name in only:
        if name not in sweep.configs:
            raise InputError(f"--only {name}: no such config; there are: {', '.join(sweep.configs)}")
    return dataclasses.replace(sweep, training=tuple(only) or tuple(sweep.configs))


def run(config: Config, workdir: pathlib.Path, sweep: Sweep, terminal: Terminal | None = None) -> list[dict[str, Any]]:
    """Trains what is not trained yet, config by config; returns and writes a line for every run, and the plot.

    Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    terminal = terminal or open_terminal()
    mesh = make_mesh(config.mesh)
    for each in sweep.configs.values():
        check_batch(each, mesh)
    rows = {split: read_rows(config, split, None) for split in ("train", "eval")}
    for each in sweep.configs.values():
        sets = each.data.sets
        refuse_host_rewards(build_scorer(each.rewards, [b""], rows["train"], lambda ids: "", mesh, sets=sets))
    model = with_end_tokens(load_model(config.model.path), config) if config.model.path else None
    sizes = model.architecture if model else base_sizes(config.base, config.base.vocabulary)
    for each in sweep.configs.values():
        build_policy(each, sizes, mesh)  # raises where a kernel that is named cannot serve
    open_workdir(workdir, config)
    with open_stop(config, workdir) as stop, terminal:
        if model is None:
            path = make_base(config, rows["eval"], mesh, workdir / "base", stop, terminal)
            model = with_end_tokens(load_model(path), config)
        for name in sweep.training:
            terminal.say(f"{name}: {len(sweep.seeds)} seeds in one program")
            train_seeds(sweep.configs[name], sweep.seeds, model, rows, mesh, workdir / name, stop, terminal)
            terminal.end_steps()

    def finish() -> list[dict[str, Any]]:
        table = run_table(workdir, sweep)
        write_json_atomic(workdir / "runs.json", table)
        terminal.say(f"{len(table)} runs: {workdir / 'runs.json'}, {plot(workdir, sweep)}")
        return table

    return processes.on_first(finish)


def seeds_step(
    parts: StepParts, seeds: Int[Array, "S"], states: TrainState, prompts: Prompts
) -> tuple[TrainState, Metrics, Rollout]:
    """`train_step` of every seed side by side; arguments and results have a leading axis of seeds."""

    def one(seed: Any, state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Rollout]:
        config = dataclasses.replace(parts.config, seed=seed)
        return train_step(dataclasses.replace(parts, config=config, seed_axis=SEED_AXIS), state, prompts)

    return jax.vmap(one, axis_name=SEED_AXIS)(seeds, states, prompts)


class SeedsProgram:
    """The compiled step of all seeds: `program(states, prompts) -> (states, metrics, rollouts)`, the states donated."""

    def __init__(self, parts: StepParts, seeds: Sequence[int], states: TrainState):
        refuse_host_rewards(parts.scorer)
        layout = jax.tree.map(lambda x: x.sharding, states)
        rows, whole = seed_rows(parts.mesh), replicated(parts.mesh)
        self.seeds = place(np.asarray(seeds, np.int32), parts.mesh)

        def program(seeds: Array, states: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Rollout]:
            with jax.default_matmul_precision(parts.config.model.matmul_precision):
                return seeds_step(parts, seeds, states, prompts)

        self.step: Any = jax.jit(
            program, in_shardings=(whole, layout, rows), out_shardings=(layout, whole, rows), donate_argnums=1
        )

    def compile(self, states: TrainState, prompts: Prompts) -> None:
        """Compiles before the first call."""
        self.step = self.step.lower(self.seeds, states, prompts).compile()

    def __call__(self, states: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Rollout]:
        """Runs one step of every seed."""
        return self.step(self.seeds, states, prompts)


def refuse_host_rewards(scorer: Scorer) -> None:
    """Raises InputError for rewards that are called from the program: a callback has no axis of seeds."""
    if scorer.host is not None:
        raise InputError(
            f"config: rewards.names={scorer.names!r} holds a reward in Python: a sweep runs all seeds in one program, "
            "so use rewards that are in it"
        )


def seed_rows(mesh: Mesh) -> NamedSharding:
    """A leading axis of seeds that every device holds, then rows split as those of one run."""
    return NamedSharding(mesh, PartitionSpec(None, *ROWS))


def stack_states(parts: StepParts, state: TrainState, count: int) -> TrainState:
    """`count` copies of a state on a leading axis."""

    def make(state: TrainState) -> TrainState:
        return jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), state)

    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, state), parts.mesh))(state)


def seed_batches(parts: StepParts, prompts: PromptSet, seeds: Sequence[int], step: int) -> Prompts:
    """The prompts of a step of every seed, on the devices; those of a single run of each seed."""
    data, count = parts.config.data, parts.config.draws_per_step

    def make(own: np.ndarray) -> Prompts:
        rest = (data.shuffle, data.max_prompt_length, own)
        each = [make_batch(prompts, step * count, count, seed, *rest) for seed in seeds]
        return jax.tree.map(lambda *x: np.stack(x), *each)

    return put_rows(make, count, seed_rows(parts.mesh))


def train_seeds(
    config: Config,
    seeds: Sequence[int],
    model: LoadedModel,
    rows: dict[str, list[dict]],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
) -> None:
    """All seeds of one config, from the newest checkpoint to the last step; each seed's metrics in its own folder."""
    done = workdir / "summary.json"
    check_workdir(workdir, config)
    if processes.on_first(done.exists):
        return
    open_workdir(workdir, config)
    parts, prompts, evaluator = prepare(config, model, rows, mesh)
    states = stack_states(parts, initial_state(parts, model), len(seeds))
    program, fetch, steps = SeedsProgram(parts, seeds, states), Fetcher(), config.train.steps
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
    began = time.perf_counter()
    with Checkpoints(workdir / "checkpoints", 1, terminal.warn) as checkpoints, contextlib.ExitStack() as files:
        restored = checkpoints.restore(abstract)
        first, states = (restored[2], restored[0]) if restored else (0, states)
        log = dataclasses.replace(config.log, tensorboard=False, wandb="off")
        writers = [files.enter_context(RunWriter(workdir / f"seed_{seed}", log, first or None)) for seed in seeds]

        def record(done: int, metrics: Any, _: Any, found: dict[str, float], seconds: float) -> None:
            means = fetch(metrics).means
            lines = [divide(jax.tree.map(lambda x, i=i: x[i], means)) for i in range(len(seeds))]
            for writer, line in zip(writers, lines, strict=True):
                writer.step(done, line | {"seconds/step": seconds})
            names = set.intersection(*(set(line) for line in lines))
            mean = {name: statistics.fmean(line[name] for line in lines) for name in names}
            terminal.step(done, steps, mean | {"seconds/step": seconds})

        if first < steps:
            with terminal.compiling("the step of all seeds"):
                program.compile(states, seed_batches(parts, prompts, seeds, first))
        loop = Loop(
            steps,
            program,
            lambda step: seed_batches(parts, prompts, seeds, step),
            record,
            checkpoints,
            config.checkpoint.every,
            stop,
        )
        states = loop.run(states, first)
    scores = [held_out(evaluator, config, states, i, stop) for i in range(len(seeds))]
    told = {
        "seconds": time.perf_counter() - began,
        "resumed_at": first,
        "pass@1": dict(zip(seeds, scores, strict=True)),
    }
    if processes.first():
        write_json_atomic(done, told)


def held_out(evaluator: Evaluator, config: Config, states: TrainState, index: int, stop: Stop) -> float:
    """pass@1 of one seed on `eval.problems` held-out problems."""
    state = jax.tree.map(lambda x: x[index], states)
    found, _ = evaluator.measure(
        {**state.frozen, **state.trainable},
        config.eval.problems,
        config.eval.samples,
        config.train.steps,
        lambda: stop.check("while evaluating a sweep; saved"),
    )
    return float(found["pass@1"])


def run_table(workdir: pathlib.Path, sweep: Sweep) -> list[dict[str, Any]]:
    """A line for every run: steps done, solve rate over its first and last steps, held-out pass@1 at the end."""
    table = []
    for name in sweep.configs:
        path = workdir / name / "summary.json"
        scores = json.loads(path.read_text(encoding="utf-8"))["pass@1"] if path.exists() else {}
        for seed in sweep.seeds:
            solved = solve_rates(workdir, name, seed)
            table.append(
                {
                    "run": name,
                    "seed": seed,
                    "steps": len(solved),
                    "solve_rate_first": float(np.mean(solved[:LAST])) if solved else None,
                    "solve_rate_last": float(np.mean(solved[-LAST:])) if solved else None,
                    "pass@1": scores.get(str(seed)),
                }
            )
    return table


def solve_rates(workdir: pathlib.Path, name: str, seed: int) -> list[float]:
    """The solve rate of each step of a run, over everything that it sampled."""
    path = workdir / name / f"seed_{seed}" / "metrics.jsonl"
    return [line["solve_rate"] for line in read_jsonl(path)] if path.exists() else []


def plot(workdir: pathlib.Path, sweep: Sweep) -> pathlib.Path:
    """solve_rate.png: the mean over seeds by step of each config, its seeds as thin lines."""
    from matplotlib.figure import Figure  # here: it takes a second

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(sweep.configs):
        curves = [curve for seed in sweep.seeds if (curve := solve_rates(workdir, name, seed))]
        if not curves:
            continue
        steps = min(map(len, curves))
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=f"C{number}", linewidth=0.5, alpha=0.35)
        mean = np.mean([curve[:steps] for curve in curves], axis=0)
        axes.plot(range(1, steps + 1), mean, color=f"C{number}", linewidth=1.8, label=f"{name} ({len(curves)} seeds)")
    axes.set(xlabel="step", ylabel="solve rate of the completions sampled", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    path = workdir / "solve_rate.png"
    figure.savefig(path, dpi=150)
    return path
