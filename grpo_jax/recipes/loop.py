"""The loop that all training recipes share: step, record, evaluate, save, stop, resume.

The host is always one step behind: the numbers of step N are read after step N + 1 was handed to the
device, so that neither waits for the other.
"""

import dataclasses
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from grpo_jax import processes
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, parse_duration, to_json
from grpo_jax.errors import InputError
from grpo_jax.metrics import write_atomic
from grpo_jax.terminal import Terminal
from grpo_jax.watchdog import Watchdog

# Another mesh splits the same work in another way, on other devices or hosts.
MAY_CHANGE = (
    "train.time_budget",
    "log.",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.alarm_drop",
    "mesh.",
    "distributed.",
)
TEMPORARY = ".*.tmp"  # what a kill in the middle of write_atomic leaves


class Stopped(Exception):
    """The run was asked to end and has saved all it needs to go on."""


class Stop:
    """Whether the run was asked to end: by SIGTERM or SIGINT, or because its time is up.

    Several processes have to end at the same place: whoever is asked first asks the others, and all go on until the
    place that they agree upon. `watchdog` hears of progress whenever someone asks for a reason.
    """

    def __init__(self, seconds: float | None, watchdog: Watchdog | None = None):
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._signal: int | None = None
        self._earlier: dict[int, Any] = {}
        self._watchdog = watchdog
        self._spread = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            # SIGTERM of several processes is jax's, which tells the others.
            for number in (signal.SIGINT,) if processes.several() else (signal.SIGTERM, signal.SIGINT):
                self._earlier[number] = signal.signal(number, self._on_signal)
        if self._watchdog is not None:
            self._watchdog.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watchdog is not None:
            self._watchdog.__exit__()
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def progress(self, doing: str) -> None:
        """Tells the watchdog what begins now."""
        if self._watchdog is not None:
            self._watchdog.progress(doing)

    def reason(self, needed: float = 0.0) -> str | None:
        """Why to stop now, or None; `needed` is how many seconds going on takes at least.

        All processes must ask at the same places.
        """
        own = self._own_reason(needed)
        if not processes.several():
            return own
        if own is not None and not self._spread:
            self._spread = True
            processes.ask_all_to_stop()
        if not processes.told_to_stop():
            return None
        found = [reason for reason in processes.exchange(own) if reason is not None]
        return found[0] if found else signal.SIGTERM.name

    def _own_reason(self, needed: float) -> str | None:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() + needed > self._deadline:
            return "the time budget"
        return None

    def check(self, where: str, needed: float = 0.0) -> None:
        """Raises Stopped when there is a reason to stop; for places where all that is done is saved."""
        self.progress(where)
        if reason := self.reason(needed):
            raise Stopped(f"stopped by {reason} {where}")


def open_stop(config: Config, workdir: pathlib.Path) -> Stop:
    """What ends a run early, with the watchdog that tells where it hangs."""
    budget = parse_duration(config.train.time_budget) if config.train.time_budget else None
    number = f".{jax.process_index()}" if processes.several() else ""
    return Stop(budget, Watchdog(config.log.watchdog_minutes, workdir / f"watchdog{number}.txt"))


def open_terminal() -> Terminal:
    """The terminal of a run: of several processes the first one speaks."""
    return Terminal(quiet=not processes.first())


def open_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Makes the folder of a run, or takes up the run that is in it; raises InputError as `check_workdir`.

    Process 0 does so; raises InputError too where another one does not see that folder.
    """
    text = to_json(config) + "\n"

    def make() -> None:
        _check_workdir(workdir, config)
        workdir.mkdir(parents=True, exist_ok=True)
        for path in workdir.glob(TEMPORARY):
            path.unlink()
        write_atomic(workdir / "config.json", text)

    processes.on_first(make)
    if not processes.several():
        return
    path = workdir / "config.json"
    seen = path.is_file() and path.read_text(encoding="utf-8") == text
    processes.raise_any(
        None
        if seen
        else InputError(
            f"--workdir {workdir}: process {jax.process_index()} does not see what process 0 wrote there, or has "
            "another config: name a folder that all hosts share, and start all with the same arguments"
        )
    )


def check_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Raises InputError when a folder holds something else than a run, or a run with another config; writes nothing."""
    processes.on_first(lambda: _check_workdir(workdir, config))


def _check_workdir(workdir: pathlib.Path, config: Config) -> None:
    path = workdir / "config.json"
    if not path.exists():
        if workdir.exists() and not workdir.is_dir():
            raise InputError(f"--workdir {workdir}: is a file: name a folder")
        if workdir.exists() and not all(found.match(TEMPORARY) for found in workdir.iterdir()):
            raise InputError(
                f"--workdir {workdir}: holds files but no config.json, so no run to go on with: name another"
            )
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}): name another --workdir") from error
    if not isinstance(held, dict) or "seed" not in held:
        raise InputError(f"{path}: is not the config of a run: name another --workdir")
    old, new = _flat(held), _flat(json.loads(to_json(config)))
    for name in [*new, *(n for n in old if n not in new)]:
        if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE):
            raise InputError(
                f"--workdir {workdir}: holds a run with {name}={old.get(name)!r}, this one has {new.get(name)!r}: "
                "name another --workdir, or use the same config to go on"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {name: value for key, child in tree.items() for name, value in _flat(child, f"{prefix}{key}.").items()}


def check_base(saved: Mapping[str, Any], about: Mapping[str, Any], workdir: pathlib.Path, path: str) -> None:
    """Raises InputError when a checkpoint's adapters were trained on other weights than those at hand."""
    if saved.get("base") != about.get("base"):
        raise InputError(
            f"model.path={path!r} holds other weights than those that {workdir} was trained on: bring them back, or "
            "name another --workdir"
        )


def is_ready(arrays: Any) -> bool:
    """Whether reading the arrays would wait for nothing."""
    return all(x.is_ready() for x in jax.tree.leaves(arrays))


@dataclasses.dataclass
class Loop:
    """One training loop: a step is recorded as soon as the next one is on its way, or at once where it is done by then.

    Attributes:
      steps: steps of the whole run.
      program: (state, batch) -> (state, metrics, details), compiled, state donated.
      batch: the batch of a step, on the devices.
      record: writes step `done` (1 for the first) given device metrics, details, evaluation and seconds.
      checkpoints: where states go.
      save_every: steps between checkpoints; 0: only at the end.
      save_last: whether the state after the last step is saved; no need where its result is written right after.
      stop: when to end early.
      evaluate: numbers of a state, called after the steps for which `evaluate_at` holds.
      evaluate_at: which steps those are.
      score: name of the evaluation that makes a checkpoint the best one.
      saved_part: what of a state a checkpoint holds.
      about: what a checkpoint says beside its step.
    """

    steps: int
    program: Callable[[Any, Any], tuple[Any, Any, Any]]
    batch: Callable[[int], Any]
    record: Callable[[int, Any, Any, dict[str, float], float], None]
    checkpoints: Checkpoints
    save_every: int
    stop: Stop
    evaluate: Callable[[int, Any], dict[str, float]] = lambda step, state: {}
    evaluate_at: Callable[[int], bool] = lambda step: False
    score: str = "eval/pass@1"
    saved_part: Callable[[Any], Any] = lambda state: state
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    save_last: bool = True

    def run(self, state: Any, first: int) -> Any:
        """The state after the last step; raises Stopped after saving when the run is asked to end."""
        waiting: tuple[int, Any, Any] | None = None
        slowest = pause = 0.0  # seconds of a step, and of what is done between steps
        if first < self.steps:
            self.stop.check(f"before step {first + 1} of {self.steps}")
        mark = time.perf_counter()
        for step in range(first, self.steps):
            self.stop.progress(f"step {step + 1} of {self.steps}")
            with jax.profiler.StepTraceAnnotation("step", step_num=step), jax.transfer_guard("disallow"):
                state, metrics, details = self.program(state, self.batch(step))
            if waiting is not None:
                seconds, mark = self._seconds(waiting[1], mark)
                self.record(*waiting, {}, seconds)
                slowest = max(slowest, seconds)
            done, waiting = step + 1, (step + 1, metrics, details)
            last = done == self.steps
            evaluate = self.evaluate_at(done)
            # This step is still on its way; to go on is to do one more and the saving after it.
            reason = self.stop.reason(2 * slowest + pause)
            if last or evaluate or reason or (self.save_every > 0 and done % self.save_every == 0):
                seconds, mark = self._seconds(metrics, mark)
                self.stop.progress(f"what follows step {done}: recording, evaluating, saving")
                found = self.evaluate(done, state) if evaluate else {}
                self.record(*waiting, found, seconds)
                waiting = None
                if self.save_last or not last:
                    about = {"step": done, **self.about}
                    self.checkpoints.save(done, self.saved_part(state), about, found.get(self.score))
                slowest, pause = max(slowest, seconds), max(pause, time.perf_counter() - mark)
                mark = time.perf_counter()
            elif is_ready(metrics):
                seconds, mark = self._seconds(metrics, mark)
                self.record(*waiting, {}, seconds)
                waiting, slowest = None, max(slowest, seconds)
            if reason and not last:
                self.checkpoints.wait()
                raise Stopped(f"stopped by {reason} after step {done} of {self.steps}; saved")
        self.checkpoints.wait()
        return state

    def _seconds(self, metrics: Any, mark: float) -> tuple[float, float]:
        """Seconds from `mark` until the metrics are there, and the new mark."""
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        return now - mark, now
