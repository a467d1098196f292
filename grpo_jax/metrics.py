"""Numbers on their way out: sums and counts, the one fetch from the device, the files of a run.

Inside programs a metric is a pair (sum, count), so that splitting a batch changes nothing; the host
divides once. `Fetcher` is the only place that reads device values in a training loop.
"""

import collections
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Self, cast

import jax
import numpy as np

from grpo_jax.config import LogConfig
from grpo_jax.errors import InputError
from grpo_jax.parallel import whole

Mean = tuple[Any, Any]
"""A mean that is not divided yet: (sum, count), scalars on the device or on the host."""

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
TRACE_EVENT = "/jax/core/compile/jaxpr_trace_duration"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class Fetcher:
    """Brings device values to the host, to each of several; `count` is the number of fetches so far."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tree: Any) -> Any:
        """The tree with numpy leaves; waits for the programs that make them."""
        self.count += 1
        return whole(tree)


def merge(a: Mapping[str, Mean], b: Mapping[str, Mean]) -> dict[str, Mean]:
    """Adds sums and counts; a metric that only one side has is kept as it is."""
    merged = dict(a)
    for name, (total, count) in b.items():
        merged[name] = (merged[name][0] + total, merged[name][1] + count) if name in merged else (total, count)
    return merged


def divide(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """Sum over count of fetched metrics; a metric that counted nothing is left out."""
    return {name: float(total) / float(count) for name, (total, count) in metrics.items() if float(count) != 0.0}


class CompileCounter:
    """Counts what jax compiles and traces while it is entered.

    Attributes:
      compiles: executables made, by the compiler or out of the persistent cache.
      cache_hits: those among them that came out of the cache.
      seconds: time that making them took.
      programs: executables by name, such as 'jit(train_step)'.
      traces: traces by function name.
    """

    def __init__(self) -> None:
        self.compiles = 0
        self.cache_hits = 0
        self.seconds = 0.0
        self.programs: collections.Counter[str] = collections.Counter()
        self.traces: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        name = str(kwargs.get("fun_name", ""))
        if event == COMPILE_EVENT:
            self.compiles += 1
            self.seconds += duration_secs
            self.programs[name] += 1
        elif event == TRACE_EVENT:
            self.traces[name] += 1

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        self.cache_hits += event == CACHE_HIT_EVENT


class RunWriter:
    """metrics.jsonl, samples.jsonl, TensorBoard events and Weights & Biases of one run.

    A new run (`resume_step=None`) starts with empty files; a resumed one keeps the lines up to `resume_step` and drops
    the later ones, which the run will write again. Each line is on disk when the call returns. A value that is not
    finite is written as null. Of several processes the first one writes, the others' writers do nothing. Raises
    InputError when wandb is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: LogConfig,
        resume_step: int | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.workdir = pathlib.Path(workdir)
        self._files = {}
        self._wandb = self._events = None
        if jax.process_index() > 0:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._wandb = _open_wandb(self.workdir, config, run_config) if config.wandb != "off" else None
        for name in ("metrics.jsonl", "samples.jsonl"):
            drop_after(self.workdir / name, resume_step)
            self._files[name] = open(self.workdir / name, "a", encoding="utf-8")
        self._events = _open_tensorboard(self.workdir / "tensorboard", resume_step) if config.tensorboard else None

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line of metrics everywhere."""
        values = {name: _plain(value) for name, value in sorted(metrics.items()) if name != "step"}
        self._append("metrics.jsonl", [{"step": step, **values}])
        finite = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self._events is not None:
            for name, value in finite.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes completions, a line each."""
        self._append("samples.jsonl", [{"step": step, **{k: _plain(v) for k, v in row.items()}} for row in rows])

    def flush(self) -> None:
        """Hands everything to the operating system."""
        for file in self._files.values():
            file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes; may be called again."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._events = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if name not in self._files:
            return
        self._files[name].write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        self._files[name].flush()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a torn last line (killed while writing) is left out, any other raises InputError."""
    # Split at newlines only: str.splitlines would cut at U+2028 and its like, which JSON leaves unescaped.
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8")) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number} is not JSON ({error}): mend or remove it") from error
        if row is not None and not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is {type(row).__name__}, not a JSON object: mend or remove it")
        if row is not None:
            rows.append(row)
    return rows


def drop_after(path: pathlib.Path, step: int | None) -> None:
    """Rewrites a JSONL file without the rows later than `step` (None: without any) and without a torn last line."""
    if not path.exists():
        return
    rows = [row for row in read_jsonl(path) if row["step"] <= step] if step is not None else []
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if text.encode() != path.read_bytes():
        write_atomic(path, text)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes indented JSON so that a reader sees the old file or the new one; non-finite numbers become null."""
    write_atomic(pathlib.Path(path), json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a text file through a temporary beside it and a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Numpy values as Python's; what is not finite as None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(folder: pathlib.Path, resume_step: int | None) -> Any:
    from tensorboardX import SummaryWriter  # here, because it takes a second to import

    # Event files cannot be shortened: purge_step makes TensorBoard hide what an earlier process wrote later than that.
    earlier = folder.is_dir() and any(folder.iterdir())
    purge = (0 if resume_step is None else resume_step + 1) if earlier else None
    return SummaryWriter(str(folder), purge_step=purge)


def _open_wandb(workdir: pathlib.Path, config: LogConfig, run_config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"config: log.wandb={config.wandb!r} needs a package: pip install 'grpo-jax[wandb]', or log.wandb=off"
        ) from error
    # The id stays with the folder, so that a resumed run goes on in the same W&B run.
    identity = workdir / "wandb_id"
    if not identity.exists():
        write_atomic(identity, uuid.uuid4().hex[:12])
    return wandb.init(
        project=config.wandb_project,
        dir=str(workdir),
        id=identity.read_text().strip(),
        mode=cast(Any, config.wandb),
        resume="allow" if config.wandb == "online" else None,
        config=dict(run_config or {}),
        settings=wandb.Settings(silent=True, console="off"),
    )
