"""`grpo-jax pipeline`: the stages of a recipe one after another, each a command of its own in a folder of its own.

A pipeline is a config file with `get_pipeline()` beside `get_config()`. What a stage does is a line that can be read
with --dry_run and run by hand; it reads other stages' folders by name, `{zero}/chats.jsonl`. Each stage is a process:
what it held is gone when it ends, and one that is killed takes nothing with it.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import json
import math
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpo_jax.config import Config, load_config_module, value_of
from grpo_jax.errors import InputError
from grpo_jax.launcher import Job
from grpo_jax.metrics import write_json_atomic
from grpo_jax.recipes.pipeline_report import write_pipeline_report
from grpo_jax.report import write_report

RECORD = "pipeline.json"
REPLACED = "replaced"  # folder of what --again has moved aside
EVALUATION = "evaluation"  # folder in a stage's own
# Commands that a stage may be, and what each leaves in its folder once it is finished.
LEAVES = {
    "base": "model",
    "tasks": "summary.json",
    "train": "summary.json",
    "sft": "model",
    "dpo": "model",
    "reward-model train": "model",
    "reject": "summary.json",
    "mix": "summary.json",
    "eval": "summary.json",
}
CONFIGURED = ("base", "tasks", "train", "sft", "dpo", "reward-model train")  # those that read a config
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PLACE = re.compile(r"\{\{|\}\}|\{([a-z][a-z0-9_.]*)\}")  # {{ and }} stand for braces

# (command, until, lock) -> (exit code, whether it was asked to end): runs it, which holds the lock of that file number.
Run = Callable[..., "tuple[int, bool]"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
      name: of its folder, and in `{name}` where later stages read it.
      title: how tables call it.
      command: a key of LEAVES.
      fields: config fields that it sets, for commands that read a config.
      options: its own options; a list gives an option several times, True one without a value.
      model: what is evaluated after it, such as '{zero}'; empty: nothing is.
    """

    name: str
    title: str
    command: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A recipe that was read.

    Attributes:
      file: where it stands.
      title: of its report.
      stages: in order.
      evaluation: options of `grpo-jax eval`, after each stage that has a model.
      config: what the file's `get_config()` gives, with the command line's `overrides`.
      overrides: '--config.FIELD=VALUE' of the command line; a stage's own fields count more.
    """

    file: pathlib.Path
    title: str
    stages: tuple[Stage, ...]
    evaluation: Mapping[str, Any]
    config: Config
    overrides: tuple[str, ...] = ()


def read_pipeline(file: pathlib.Path, config: Config, overrides: Sequence[str] = ()) -> Pipeline:
    """What the `get_pipeline()` of a config file names; raises InputError naming file, stage and fix."""
    module = load_config_module(file)
    if not hasattr(module, "get_pipeline"):
        raise InputError(f"{file}: has no get_pipeline(); it must return {{'title': ..., 'stages': [...]}}")
    given = module.get_pipeline()
    _check_keys(f"{file}: get_pipeline()", given, ("title", "stages", "evaluation"), ("title", "stages"))
    known = [f.name for f in dataclasses.fields(Stage)]
    stages: list[Stage] = []
    for number, item in enumerate(given["stages"]):
        where = f"{file}: stages[{number}]"
        _check_keys(where, item, known, ("name", "title", "command"))
        stages.append(Stage(**item))
        _check_stage(where, stages)
    if not stages:
        raise InputError(f"{file}: get_pipeline() names no stages")
    return Pipeline(file, given["title"], tuple(stages), given.get("evaluation", {}), config, tuple(overrides))


def _check_keys(where: str, given: Mapping[str, Any], known: Sequence[str], needed: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"{where}: has {name!r}, which is none of {', '.join(known)}")
    for name in needed:
        if name not in given:
            raise InputError(f"{where}: has no {name!r}")


def _check_stage(where: str, stages: Sequence[Stage]) -> None:
    """Raises InputError where the last stage cannot be meant, given those before it."""
    stage, before = stages[-1], [earlier.name for earlier in stages[:-1]]
    if not _NAME.fullmatch(stage.name) or stage.name in (*before, REPLACED, "config"):
        raise InputError(f"{where}: name={stage.name!r} must be new, of small letters, digits and underscores")
    if stage.command not in LEAVES:
        raise InputError(f"{where}: command={stage.command!r} is none of {', '.join(LEAVES)}")
    if stage.fields and stage.command not in CONFIGURED:
        raise InputError(f"{where}: {stage.command} reads no config: give 'options', not 'fields'")
    for name in sorted(reads(stage)):
        if name not in before:
            raise InputError(f"{where}: {stage.name} reads {{{name}}}, which is no stage before it: {before}")


def reads(stage: Stage) -> set[str]:
    """Names of the stages whose folders a stage's command names."""
    found: list[str] = []
    given = [dict(stage.fields), dict(stage.options), stage.model]
    _with_texts(given, lambda text: str(found.extend(_PLACE.findall(text))))
    return {name for name in found if name and not name.startswith("config.")} - {stage.name}


def command_of(pipeline: Pipeline, stage: Stage, workdir: pathlib.Path) -> list[str]:
    """The words after `grpo-jax` of a stage."""
    words = stage.command.split()
    if stage.command in CONFIGURED:
        words += ["--config", str(pipeline.file), *pipeline.overrides]
        words += [f"--config.{name}={filled(pipeline, value, workdir)}" for name, value in stage.fields.items()]
    return [*words, *_options(pipeline, stage.options, workdir), "--workdir", str(workdir / stage.name)]


def evaluation_of(pipeline: Pipeline, stage: Stage, workdir: pathlib.Path) -> list[str]:
    """The words after `grpo-jax` that evaluate a stage's model; empty where there is none."""
    if not stage.model:
        return []
    words = ["eval", "--model", filled(pipeline, stage.model, workdir)]
    options = _options(pipeline, pipeline.evaluation, workdir)
    return [*words, *options, "--workdir", str(workdir / stage.name / EVALUATION)]


def _options(pipeline: Pipeline, options: Mapping[str, Any], workdir: pathlib.Path) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            for item in value if isinstance(value, list | tuple) else [value]:
                words += [f"--{name}", filled(pipeline, item, workdir)]
    return words


def filled(pipeline: Pipeline, value: Any, workdir: pathlib.Path) -> str:
    """A value as the command line takes it, with stages' folders and fields of the config in place of their names."""

    def place(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        return str(value_of(pipeline.config, name[7:]) if name.startswith("config.") else workdir / name)

    made = _with_texts(value, lambda text: _PLACE.sub(place, text))
    return made if isinstance(made, str) else repr(made)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value with all texts in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _with_texts(item, change) for key, item in value.items()}
    return type(value)(_with_texts(item, change) for item in value) if isinstance(value, list | tuple) else value


def fingerprints(pipeline: Pipeline) -> dict[str, str]:
    """Of each stage what its result depends on: its command and what it reads, wherever the workdir is."""
    found: dict[str, str] = {}
    nowhere = pathlib.Path("WORKDIR")
    for stage in pipeline.stages:
        words = [word for word in command_of(pipeline, stage, nowhere) if word != str(pipeline.file)]
        shared = dataclasses.asdict(pipeline.config) if stage.command in CONFIGURED else {}
        said = json.dumps([words, shared, [found[name] for name in sorted(reads(stage))]], default=str)
        found[stage.name] = hashlib.sha256(said.encode()).hexdigest()[:16]
    return found


def chosen_stages(pipeline: Pipeline, first: str = "", last: str = "", only: str = "") -> tuple[Stage, ...]:
    """The stages from `first` to `last`, or `only` one; raises InputError naming those there are."""
    names = [stage.name for stage in pipeline.stages]
    for option, name in (("--from", first), ("--to", last), ("--only", only)):
        if name and name not in names:
            raise InputError(f"{option} {name}: is no stage; there are {', '.join(names)}")
    if only and (first or last):
        raise InputError(f"--only {only}: goes without --from and --to")
    start = names.index(only or first) if only or first else 0
    end = names.index(only or last) if only or last else len(names) - 1
    if end < start:
        raise InputError(f"--from {first} --to {last}: {last} comes first")
    return pipeline.stages[start : end + 1]


def dry_run(pipeline: Pipeline, workdir: pathlib.Path, check: Callable[[list[str]], None]) -> None:
    """Prints each stage's command, all of them checked."""
    check_commands(pipeline, workdir, check)
    for stage in pipeline.stages:
        print(f"# {stage.name}: {stage.title}")
        for words in (command_of(pipeline, stage, workdir), evaluation_of(pipeline, stage, workdir)):
            if words:
                print(shlex.join(["grpo-jax", *words]))


def check_commands(pipeline: Pipeline, workdir: pathlib.Path, check: Callable[[list[str]], None]) -> None:
    """Has `check` read every command; raises InputError naming the stage."""
    for stage in pipeline.stages:
        for words in (command_of(pipeline, stage, workdir), evaluation_of(pipeline, stage, workdir)):
            try:
                if words:
                    check(words)
            except InputError as error:
                raise InputError(f"{pipeline.file}: stage {stage.name}: {error}") from None


def run(
    pipeline: Pipeline,
    workdir: pathlib.Path,
    stages: Sequence[Stage],
    again: bool = False,
    until: float = math.inf,
    start: Run | None = None,
) -> bool:
    """Runs the stages that are not finished, evaluates their models, writes the report; False when it was stopped.

    `again` makes the chosen stages anew; their folders are moved to `workdir/replaced`. At `until` (of
    `time.monotonic`) the stage under way is asked to save and end. Raises InputError where a stage fails, or was made
    by another command, or reads one that is not there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with _alone(workdir) as lock:
        record = _read_record(pipeline, workdir)
        known = fingerprints(pipeline)
        if again:
            for stage in stages:
                _set_aside(workdir, record, stage.name)
        _check_record(pipeline, workdir, stages, record, known)
        begin = functools.partial(start or _start, until=until, lock=lock)
        if not all(_finish(pipeline, stage, workdir, record, known, begin) for stage in stages):
            return False
        write_pipeline_report(workdir)
    _say(f"{workdir / 'report.html'}, report.md: all stages that were asked for are finished")
    return True


def _finish(
    pipeline: Pipeline,
    stage: Stage,
    workdir: pathlib.Path,
    record: dict[str, Any],
    known: Mapping[str, str],
    start: Callable[[Sequence[str]], tuple[int, bool]],
) -> bool:
    """Does what is left of a stage and records it; False when it was stopped."""
    entry = record["stages"].setdefault(stage.name, {"title": stage.title, "fingerprint": known[stage.name]})
    parts = {
        "made": (command_of(pipeline, stage, workdir), workdir / stage.name / LEAVES[stage.command]),
        "evaluated": (evaluation_of(pipeline, stage, workdir), workdir / stage.name / EVALUATION / "summary.json"),
    }
    for part, (words, leaves) in parts.items():
        if not words or (entry.get(part) and leaves.exists()):
            continue
        _say(f"{stage.name}: {shlex.join(['grpo-jax', *words])}")
        entry |= {"command": words} if part == "made" else {}
        write_json_atomic(workdir / RECORD, record)
        began = time.monotonic()
        code, asked = start([sys.executable, "-m", "grpo_jax.cli", *words])
        name = f"seconds_{part}"
        entry[name] = round(entry.get(name, 0.0) + time.monotonic() - began, 1)
        write_json_atomic(workdir / RECORD, record)
        if code:
            raise InputError(f"stage {stage.name} ended with exit code {code}: mend it, then run the same command")
        if asked or not leaves.exists():
            _say(f"stopped in stage {stage.name}; all is saved. Run the same command again to go on")
            return False
        entry[part] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json_atomic(workdir / RECORD, record)
        if (workdir / stage.name / "metrics.jsonl").is_file():
            write_report(workdir / stage.name)
        write_pipeline_report(workdir)
    return True


def _start(words: Sequence[str], until: float, lock: int) -> tuple[int, bool]:
    """As a process, which holds the lock even where this one is killed."""
    job = Job(words, [None], holding=lock)
    return job.watch(until), job.asked > 0


def _read_record(pipeline: Pipeline, workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / RECORD
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"stages": {}}
    names = [stage.name for stage in pipeline.stages]
    if strange := [name for name in record["stages"] if name not in names]:
        raise InputError(f"{path}: has stage {strange[0]}, which {pipeline.file} has not: name another --workdir")
    titles = {stage.name: stage.title for stage in pipeline.stages}
    return {"title": pipeline.title, "file": str(pipeline.file), "order": titles, "stages": record["stages"]}


def _check_record(
    pipeline: Pipeline,
    workdir: pathlib.Path,
    chosen: Sequence[Stage],
    record: Mapping[str, Any],
    known: Mapping[str, str],
) -> None:
    """Raises InputError for stages made by other commands, and for inputs that neither are there nor will be made."""
    made, names = record["stages"], [stage.name for stage in chosen]
    for stage in chosen:
        if stage.name in made and made[stage.name]["fingerprint"] != known[stage.name]:
            raise InputError(
                f"{pipeline.file}: stage {stage.name} was made by another command, or from other stages: "
                f"--from {stage.name} --again makes it and those after it anew, or name another --workdir"
            )
        for name in sorted(reads(stage)):
            if name not in names and not (made.get(name, {}).get("made") and (workdir / name).exists()):
                raise InputError(f"--from {stage.name}: reads {name}, which is not finished: --from {name}")


def _set_aside(workdir: pathlib.Path, record: dict[str, Any], name: str) -> None:
    record["stages"].pop(name, None)
    write_json_atomic(workdir / RECORD, record)
    if (workdir / name).exists():
        number = 1
        while (place := workdir / REPLACED / f"{name}.{number}").exists():
            number += 1
        place.parent.mkdir(exist_ok=True)
        (workdir / name).rename(place)


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[int]:
    """Holds the workdir by a lock, gives its file's number; raises InputError where another pipeline does."""
    with open(workdir / "pipeline.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{workdir}: another pipeline is running in it: wait, or name another --workdir") from None
        yield file.fileno()


def _say(text: str) -> None:
    print(f"== {text}", flush=True)
