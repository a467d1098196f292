"""GRPO from a config to a trained model: load, evaluate, step, evaluate, report.

Read `run` from top to bottom: it is the whole life of a training run.
"""

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax import processes
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, config_file, from_dict, read_config_file
from grpo_jax.data.mixture import SET, build_mixture, load_all_rows
from grpo_jax.data.prompts import PromptSet, build_prompt_set, make_batch
from grpo_jax.errors import InputError
from grpo_jax.metrics import CompileCounter, Fetcher, RunWriter, divide, read_jsonl, write_json_atomic
from grpo_jax.models.abstract import base_sizes
from grpo_jax.models.build import build_policy
from grpo_jax.models.loading import LoadedModel, load_model, parameter_table
from grpo_jax.models.lora import split_variables, target_layers
from grpo_jax.models.peft import read_adapters
from grpo_jax.models.teacher import load_teacher, open_teacher
from grpo_jax.models.value import TEACHER
from grpo_jax.models.weights import StoredLeaf
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import (
    axes_text,
    check_batch,
    check_offload,
    make_mesh,
    mesh_text,
    place,
    put_rows,
    row_sharding,
    scored_rows,
    set_up_process,
    whole,
)
from grpo_jax.recipes.base import make_base
from grpo_jax.recipes.cold_start import make_cold_start
from grpo_jax.recipes.evaluate import Evaluator
from grpo_jax.recipes.loop import Loop, Stop, check_base, check_workdir, open_stop, open_terminal, open_workdir
from grpo_jax.recipes.mesh import with_mesh
from grpo_jax.recipes.supervised import about_base, save_adapters
from grpo_jax.rewards.host import Progress, Record
from grpo_jax.rewards.model_files import load_reward_variables, open_model_judge, open_reward_models
from grpo_jax.rewards.model_judge import ModelJudge
from grpo_jax.rewards.reward_model import COLLECTION
from grpo_jax.rewards.scorer import RewardPools, build_scorer
from grpo_jax.sampler.stops import stop_table
from grpo_jax.step import Metrics, Program, StepParts, TrainState, init_state
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_prompt

Rewards = Mapping[str, Callable[..., Any]]


def train(
    config: Any = "arithmetic",
    dataset: Sequence[dict] | None = None,
    rewards: Sequence[Callable[..., Any]] | None = None,
    workdir: str | None = None,
) -> dict[str, Any]:
    """Trains by GRPO and returns the run's summary (`before`, `after`, ...), as `grpo-jax train` does.

    Args:
      config: an experiment's name or file, a ConfigDict, or a Config.
      dataset: rows with the columns that `config.data` names, in place of `config.data.source`; the
        last tenth (at least one row) is held out.
      rewards: functions with TRL's signature, `reward(prompts, completions, **columns) -> list[float]`.
        Named in `config.rewards.names` they are weighted there; else they are all the rewards there
        are, with weight 1 each.
      workdir: folder of the run; `runs/<config name>` when None.

    Raises InputError for bad input.
    """
    name = config if isinstance(config, str) else "run"
    if isinstance(config, str):
        path = config_file(config)
        name, config = path.stem, from_dict(read_config_file(path), str(path))
    elif not isinstance(config, Config):
        config = from_dict(config)
    functions = {function.__name__: function for function in rewards or ()}
    if functions and not set(functions) <= set(config.rewards.names):
        replaced = dataclasses.replace(config.rewards, names=tuple(functions), weights=(1.0,) * len(functions))
        config = dataclasses.replace(config, rewards=replaced)
    if dataset is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="memory"))
    set_up_process(config)
    return run(config, pathlib.Path(workdir or f"runs/{name}"), dataset, functions)


def run(
    config: Config,
    workdir: pathlib.Path,
    dataset: Sequence[dict] | None = None,
    rewards: Rewards | None = None,
    terminal: Terminal | None = None,
) -> dict[str, Any]:
    """One run in `workdir`, started or gone on with; returns its summary.

    Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    began = time.perf_counter()
    terminal = terminal or open_terminal()
    config = with_mesh(config, terminal)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    check_offload(config.mesh.offload, mesh)
    check_workdir(workdir, config)
    rows = {split: read_rows(config, split, dataset) for split in ("train", "eval")}
    model = check_inputs(config, rows, mesh, rewards)
    open_workdir(workdir, config)
    with open_stop(config, workdir) as stop, CompileCounter() as compiles, terminal:
        model = starting_model(config, model, rows, mesh, workdir, stop, terminal)
        parts, prompts, evaluator = prepare(config, model, rows, mesh, rewards)
        terminal.announce(
            config.data.prompts_per_step,
            config.sampler.group_size,
            config.train.steps,
            f"{mesh.size} x {jax.devices()[0].device_kind}",
        )
        show_parameters(config, model.params, mesh, terminal)
        session = Session(parts, prompts, evaluator, workdir, stop, terminal, compiles)
        try:
            state = session.train(model)
            if config.lora.rank:
                held = {**state.frozen, **state.trainable}
                fetched = whole({name: held[name] for name in held if name not in (COLLECTION, TEACHER)})
                terminal.say(f"adapters for PEFT: {save_adapters(workdir / 'adapter', config, model, fetched)}")
            return session.finish(state, began)
        finally:
            parts.scorer.close()


def show_parameters(config: Config, params: Mapping[str, Any], mesh: Mesh, terminal: Terminal) -> None:
    """The parameter table with the axes that the rules give, and what is trained when it is not all of it."""
    rows = parameter_table(params)
    terminal.parameter_table((path, shape, dtype, axes_text(path, shape, mesh)) for path, shape, dtype, _ in rows)
    if mesh.size > 1:
        terminal.say(f"mesh: {mesh_text(mesh)}")
    if config.lora.rank:
        trained = sum(
            layers * config.lora.rank * (inputs + outputs)
            for layers, inputs, outputs in target_layers(params, config.lora.targets).values()
        )
        total = sum(count for *_, count in rows)
        terminal.say(
            f"LoRA: {trained:,} adapter parameters are trained; the {total:,} of the base are frozen in "
            f"{config.lora.base_dtype}"
        )


def read_rows(config: Config, split: str, dataset: Sequence[dict] | None) -> list[dict]:
    """The rows of a split, from `config.data` or from the rows given in Python."""
    if dataset is None:
        if config.data.source == "memory":
            raise InputError("config: data.source='memory' is for grpo_jax.train(dataset=...): name a source to read")
        return load_all_rows(config.data, split, config.seed)
    columns = (config.data.prompt_column, config.data.answer_column)
    rows = []
    for number, row in enumerate(dataset):
        if columns[0] not in row:
            raise InputError(f"dataset row {number}: has no column data.prompt_column={columns[0]!r}, only {list(row)}")
        rows.append({**row, "prompt": row[columns[0]], "answer": row.get(columns[1], "")})
    held = max(len(rows) // 10, 1)
    if len(rows) < 2:
        raise InputError(f"dataset: has {len(rows)} rows; at least 2 are needed, one of them held out")
    return rows[:-held] if split == "train" else rows[-held:]


def check_inputs(
    config: Config, rows: dict[str, list[dict]], mesh: Mesh, rewards: Rewards | None = None
) -> LoadedModel | None:
    """The model that `model.path` names (None: the run makes one) after every check that needs no workdir.

    Raises InputError for rewards, answers, weights, tokenizer, end tokens and prompts that would fail later.
    """
    for split in ("train", "eval"):
        build_mixture(config, rows[split], split == "train")
        own, sets = dict(rewards) if rewards else None, config.data.sets
        build_scorer(config.rewards, [b""], rows[split], lambda ids: "", mesh, own, sets=sets)
    open_reward_models(config.rewards, config.model, None)
    open_teacher(config.distill, config.model, None)
    if not config.model.path:
        build_policy(config, base_sizes(config.base, config.base.vocabulary), mesh)  # raises where it cannot be
        return None
    model = with_end_tokens(load_model(config.model.path, keep_adapters=config.lora.rank > 0), config)
    prepare(config, model, rows, mesh, rewards)
    if jax.process_count() == 1:  # of many hosts each reads its own share, later
        for leaf in jax.tree.leaves(model.params):
            if isinstance(leaf, StoredLeaf):
                leaf.check()
    return model


def starting_model(
    config: Config,
    model: LoadedModel | None,
    rows: dict[str, list[dict]],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
) -> LoadedModel:
    """The model that GRPO starts from: as loaded, or made in the run, or after its cold start."""
    if model is None:
        path = make_base(config, rows["eval"], mesh, workdir / "base", stop, terminal)
        model = with_end_tokens(load_model(path), config)
    if not config.cold_start.enabled:
        return model
    path = make_cold_start(config, model, rows, mesh, workdir, stop, terminal)
    if config.lora.rank:
        return dataclasses.replace(model, adapters=read_adapters(path, model.architecture))
    return with_end_tokens(load_model(path), config)


def with_end_tokens(model: LoadedModel, config: Config) -> LoadedModel:
    """The model with `text.end_tokens`; raises InputError when nothing would ever end a completion."""
    tokenizer = model.tokenizer.with_end_tokens(config.text.end_tokens)
    if not tokenizer.end_ids:
        raise InputError(f"{model.source}: names no end token: set text.end_tokens")
    return dataclasses.replace(model, tokenizer=tokenizer)


def prepare(
    config: Config, model: LoadedModel, rows: dict[str, list[dict]], mesh: Mesh, rewards: Rewards | None = None
) -> tuple[StepParts, PromptSet, Evaluator]:
    """Everything that a step needs, checked: prompts within their budget, rewards that exist, answers there."""
    tokenizer = model.tokenizer
    if config.lora.rank:
        target_layers(model.params, config.lora.targets)  # raises when there are none
    token_bytes = tokenizer.token_bytes() + [b""] * (model.architecture.vocabulary - tokenizer.vocabulary)
    scorers, sets = {}, {}
    models = open_reward_models(config.rewards, config.model, tokenizer)
    pools = RewardPools.of(config.rewards)
    progress = {"train": Progress(config.draws_per_step, config.train.steps), "eval": None}
    for split in ("train", "eval"):
        scorer = build_scorer(
            config.rewards,
            token_bytes,
            rows[split],
            tokenizer.decode,
            mesh,
            dict(rewards) if rewards else None,
            pools,
            progress[split],
            models | judges(config, tokenizer, rows[split], mesh),
            config.data.sets,
        )
        scorers[split] = scorer
        sets[split] = build_prompt_set(
            rows[split],
            lambda prompt: encode_prompt(prompt, config.text, tokenizer),
            config.data.max_prompt_length,
            lambda given, scorer=scorer: scorer.columns(np.arange(len(given))),
            build_mixture(config, rows[split], split == "train"),
        )
    updates = config.train.steps * config.objective.num_iterations * config.objective.minibatches
    module = build_policy(config, model.architecture, mesh)
    parts = StepParts(
        config,
        module,
        make_optimizer(config.optim, updates),
        make_schedule(config.optim, updates),
        scorers["train"],
        mesh,
        tokenizer.end_ids,
        stop_table(config.sampler.stop, token_bytes),
        teacher=open_teacher(config.distill, config.model, tokenizer),
    )
    return parts, sets["train"], Evaluator(parts, sets["eval"], scorers["eval"], tokenizer)


def judges(config: Config, tokenizer: Tokenizer, rows: list[dict], mesh: Mesh) -> dict[str, ModelJudge]:
    """The judge in the program, where the config names one; it reads the dataset's rows."""
    if "model_judge" not in config.rewards.names:
        return {}
    given = (config.rewards.model_judge, config.model, config.text, tokenizer, rows, mesh)
    return {"model_judge": open_model_judge(*given)}


def initial_state(parts: StepParts, model: LoadedModel) -> TrainState:
    """The state at step 0 on the mesh: what is trained in `model.param_dtype`, a frozen base in `lora.base_dtype`."""
    config = parts.config
    dtype = jnp.dtype(config.model.param_dtype)
    trainable, frozen = split_variables(model.params, config.lora, config.seed, model.adapters)
    trainable = place(trainable, parts.mesh, dtype)
    frozen = place(frozen, parts.mesh)
    frozen = {**frozen, **load_reward_variables(config.rewards, config.model, parts.mesh)}
    frozen |= load_teacher(config.distill, config.model, parts.mesh)
    return init_state(parts, trainable, frozen, base_is_reference=config.lora.rank > 0 and model.adapters is None)


def abstract_of(state: TrainState) -> TrainState:
    """The shapes, dtypes and shardings of a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def saved_part(state: TrainState) -> TrainState:
    """What of a state a checkpoint holds: a frozen base is read from the model again."""
    return state.replace(frozen={})


@dataclasses.dataclass(eq=False)
class Session:
    """A run under way: what it reads, where it writes."""

    parts: StepParts
    prompts: PromptSet
    evaluator: Evaluator
    workdir: pathlib.Path
    stop: Stop
    terminal: Terminal
    compiles: CompileCounter
    fetch: Fetcher = dataclasses.field(default_factory=Fetcher)
    best: float = float("-inf")

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.parts.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.evaluator.tokenizer

    def batch(self, step: int) -> Any:
        """The prompts of a step: a function of the seed and the step alone."""
        data, count = self.config.data, self.config.draws_per_step
        given = (self.prompts, step * count, count, self.config.seed, data.shuffle, data.max_prompt_length)
        return put_rows(lambda own: make_batch(*given, own), count, row_sharding(self.parts.mesh))

    def train(self, model: LoadedModel) -> TrainState:
        """From the newest checkpoint, or from the start, to the last step."""
        config, total = self.config, self.config.train.steps
        state = initial_state(self.parts, model)
        self.measure_once("before", state, 0)
        program = Program(self.parts, state)
        with Checkpoints(self.workdir / "checkpoints", config.checkpoint.keep, self.terminal.warn) as checkpoints:
            about = about_base(config, model)
            restored = checkpoints.restore(saved_part(abstract_of(state)))
            first = restored[2] if restored else 0
            if restored:
                check_base(restored[1], about, self.workdir, config.model.path)
                state = restored[0].replace(frozen=state.frozen)
                self.terminal.say(f"going on after step {first} of {total}")
                self.best = max([self.best, *processes.on_first(lambda: self.scores_until(first))])
            with RunWriter(self.workdir, config.log, first or None, dataclasses.asdict(config)) as writer:
                if first < total:
                    self.stop.progress("compiling the step")
                    with self.terminal.compiling("the step"):
                        program.compile(state, self.batch(first))
                recorder = Recorder(self, writer, program)
                loop = Loop(
                    total,
                    recorder.step if config.step.mode == "staged" else program,
                    self.batch,
                    recorder,
                    checkpoints,
                    config.checkpoint.every,
                    self.stop,
                    self.evaluate,
                    lambda done: config.eval.every > 0 and done % config.eval.every == 0,
                    saved_part=saved_part,
                    about=about,
                )
                return loop.run(state, first)

    def scores_until(self, step: int) -> list[float]:
        """The held-out scores that metrics.jsonl holds up to a step."""
        lines = read_jsonl(self.workdir / "metrics.jsonl")
        return [line["eval/pass@1"] for line in lines if line["step"] <= step and line.get("eval/pass@1") is not None]

    def measure_once(self, name: str, state: TrainState, step: int) -> dict[str, Any]:
        """The held-out scores of the `before` or `after` table, read from their file when they are there.

        Raises Stopped when the run is asked to end: all training so far is saved then.
        """
        path = self.workdir / f"{name}.json"
        known = processes.on_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
        if known is not None:
            return known
        config = self.config.eval
        self.terminal.say(f"evaluating {name} training on held-out problems")
        variables = {**state.frozen, **state.trainable}
        samples = max(config.samples, config.majority)

        def between() -> None:
            self.stop.check(f"while evaluating {name} training; saved")

        found, records = self.evaluator.measure(variables, config.final_problems, samples, step, between)
        found["greedy"] = self.evaluator.greedy(variables, config.final_problems, step, between)
        if config.majority == 0:
            found.pop("majority", None)
        if processes.first():
            with open(self.workdir / f"{name}.samples.jsonl", "w", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps({**record, "right": bool(record["right"])}, ensure_ascii=False) + "\n")
            write_json_atomic(path, found)
        return found

    def evaluate(self, done: int, state: TrainState) -> dict[str, float]:
        """Held-out scores during training; warns when pass@1 falls below its best."""
        config = self.config.eval
        found, _ = self.evaluator.measure({**state.frozen, **state.trainable}, config.problems, config.samples, done)
        score = found["pass@1"]
        if score < self.best - config.alarm_drop:
            self.terminal.warn(
                f"held-out pass@1 fell to {score:.3f} after step {done}, from its best {self.best:.3f}: the best "
                "checkpoint is kept; a lower optim.lr or an objective.beta above 0 often helps"
            )
        self.best = max(self.best, score)
        names = {
            "pass@1": "eval/pass@1",
            "format": "eval/format",
            "mean_length": "eval/length",
            "lenient": "eval/lenient",
            "majority": "eval/majority",
            "language": "eval/language",
            "reflective_words": "eval/reflective_words",
        }
        told = {label: found[name] for name, label in names.items() if name in found}
        return told | {f"eval_reward/{name}": scores["total"] for name, scores in found.get("sets", {}).items()}

    def finish(self, state: TrainState, began: float) -> dict[str, Any]:
        """After-training scores, summary.json, report.html and what the terminal shows of them."""
        before, after = (self.measure_once(name, state, self.config.train.steps) for name in ("before", "after"))
        seconds = time.perf_counter() - began
        summary = {
            "before": before,
            "after": after,
            "seconds_total": seconds,
            "compiles": self.compiles.compiles,
            "seed": self.config.seed,
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
            "devices": self.parts.mesh.size,
            "processes": jax.process_count(),
            "platform": platform.platform(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if not processes.first():
            return summary
        write_json_atomic(self.workdir / "summary.json", summary)
        from grpo_jax.report import write_report  # here: matplotlib takes a second

        report = write_report(self.workdir)
        self.terminal.before_after_table(before, after)
        self.terminal.samples(self.some_samples())
        self.terminal.say(f"{seconds:.0f} s in all; report: {report}")
        return summary

    def some_samples(self) -> list[dict]:
        """Three completions of the trained model on held-out problems."""
        path = self.workdir / "after.samples.jsonl"
        records = read_jsonl(path) if path.exists() else []
        weights = dict(zip(self.parts.scorer.names, self.parts.scorer.weights, strict=True))
        for record in records:
            record["total"] = sum(weights[name] * (value or 0.0) for name, value in record["rewards"].items())
        return records[:: max(len(records) // 3, 1)][:3]


@dataclasses.dataclass
class Recorder:
    """Turns what a step leaves on the device into lines of metrics.jsonl and samples.jsonl."""

    session: Session
    writer: RunWriter
    program: Program
    phases: collections.deque[dict[str, float]] = dataclasses.field(default_factory=collections.deque)

    def step(self, *given: Any) -> Any:
        """Runs a staged program and keeps the seconds of its phases: the next one may run before this is recorded."""
        result = self.program(*given)
        self.phases.append(dict(self.program.seconds))
        return result

    def __call__(self, done: int, metrics: Metrics, rollout: Any, found: dict[str, float], seconds: float) -> None:
        """Writes step `done`; raises InputError when a host reward failed."""
        s, config = self.session, self.session.config
        host = s.parts.scorer.host
        fetched: Metrics = s.fetch(metrics)
        if host is not None and fetched.failed:
            processes.raise_any(host.take_error())
        phases = self.phases.popleft() if self.phases else {}
        seconds = sum(phases.values()) or seconds
        line = divide(fetched.means)
        tokens = line.pop("tokens")
        scored = round(config.completions * line.get("pool/rounds", 1.0))
        told = Record() if host is None else host.take(len(scored_rows(scored, s.parts.mesh))).of_all()
        line |= found | {
            "seconds/step": seconds,
            "tokens_per_second": tokens / seconds,
            "compiles": s.compiles.compiles,
            "seconds/rewards": told.seconds,
        }
        if host is not None:
            line |= {f"reward_errors/{name}": float(len(told.failures.get(name, []))) for name in host.functions}
            line |= {f"reward_metrics/{name}": sum(found) / len(found) for name, found in told.metrics.items()}
        for failures in told.failures.values():
            s.terminal.warn(f"step {done}: {failures[0][1]} ({len(failures)} completions scored 0)")
        line |= {f"seconds/{name}": value for name, value in phases.items()}
        self.writer.step(done, line)
        s.terminal.step(done, config.train.steps, line)
        if line["skipped"]:
            self.dump(done, fetched, rollout)
        if config.log.samples_every and done % config.log.samples_every == 0:
            self.writer.samples(done, sample_rows(s, s.fetch(rollout), config.log.samples, told))

    def dump(self, done: int, metrics: Metrics, rollout: Any) -> None:
        """Keeps the batch of an update that was not finite, says where it began, and stops after too many."""
        s = self.session
        leaves = jax.tree_util.tree_flatten_with_path(s.fetch(rollout))[0]
        path = s.workdir / "nonfinite" / f"step_{done}.npz"
        if processes.first():
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **{jax.tree_util.keystr(k, simple=True, separator="."): v for k, v in leaves})
        names = [path for path, flag in zip(self.program.paths, metrics.nonfinite, strict=True) if flag]
        where = f"first in the gradient of {names[0]}" if names else "in the loss"
        s.terminal.warn(f"step {done}: an update was not finite ({where}) and was skipped; its batch is in {path}")
        limit = s.config.train.halt_when_nonfinite
        if limit and int(metrics.skipped_in_row) >= limit:
            raise InputError(
                f"{s.workdir}: {int(metrics.skipped_in_row)} updates in a row were not finite, last at step {done}; "
                f"the checkpoints before are kept: lower optim.lr={s.config.optim.lr}, or see {path}"
            )


def sample_rows(session: Session, rollout: Any, count: int, told: Record | None = None) -> list[dict]:
    """Completions of a fetched rollout, spread over its groups, as rows of samples.jsonl.

    A component that does not apply is null there; `told` adds what rewards have logged about the completion.
    """
    scorer, rows = session.parts.scorer, []
    total = np.asarray(scorer.total(rollout.scores))
    order = session.prompts.order(np.asarray(rollout.draw, np.int64), session.config.seed, session.config.data.shuffle)
    filled = np.flatnonzero(rollout.weight)  # dynamic sampling may leave places empty
    for i in filled[:: max(len(filled) // count, 1)][:count].tolist() if count else ():
        row = session.prompts.rows[int(order[i])]
        ids = rollout.tokens[i, : int(rollout.lengths[i])].tolist()
        extra = told.extra.get((int(order[i]), tuple(ids))) if told else None
        rows.append(
            {
                "draw": int(rollout.draw[i]),
                "prompt": row["prompt"],
                "completion": session.tokenizer.decode(ids),
                "answer": row["answer"],
                "rewards": scorer.components(rollout.scores, i),
                "total": float(total[i]),
                "advantage": float(rollout.advantages[i, 0]),
                "length": len(ids),
                "ended": bool(rollout.ended[i]),
                **({SET: row[SET]} if session.config.data.sets else {}),
                **({"extra": extra} if extra else {}),
            }
        )
    return rows


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers."""
    names = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
