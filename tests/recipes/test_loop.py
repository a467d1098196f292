"""The shared loop with everything but itself replaced: what comes after what, and how it ends early."""

import dataclasses
import json
import os
import signal
import threading
import time
from typing import Any

import pytest

from grpo_jax.config import Config, TrainConfig, to_json
from grpo_jax.errors import InputError
from grpo_jax.recipes.loop import Loop, Stop, Stopped, open_workdir


class Metric(int):
    """A number that is there when its step is done."""

    done = False

    def is_ready(self) -> bool:
        return self.done


@dataclasses.dataclass
class Run:
    """A loop over integers that writes down what happens; `at` holds what is done while a step is dispatched.

    `waits`: a step is done when its call returns.
    """

    events: list = dataclasses.field(default_factory=list)
    at: dict[int, Any] = dataclasses.field(default_factory=dict)
    step_seconds: float = 0.0
    waits: bool = False

    def program(self, state: int, batch: str) -> tuple[int, Metric, str]:
        assert batch == f"batch {state}"
        self.events.append(("step", state + 1))
        time.sleep(self.step_seconds)
        self.at.get(state + 1, lambda: None)()
        metric = Metric((state + 1) * 10)
        metric.done = self.waits
        return state + 1, metric, f"details {state + 1}"

    def record(self, done: int, metrics: int, details: str, found: dict[str, float], seconds: float) -> None:
        assert (metrics, details) == (done * 10, f"details {done}") and seconds >= 0
        self.events.append(("record", done, found))

    def evaluate(self, done: int, state: int) -> dict[str, float]:
        assert state == done
        self.events.append(("evaluate", done))
        return {"eval/pass@1": done / 10}

    def save(self, step: int, state: int, extra: dict, score: float | None) -> None:
        assert step == state == extra["step"]
        self.events.append(("save", step, score))

    def wait(self) -> None:
        self.events.append(("wait",))

    def loop(self, steps: int, stop: Stop, **options: Any) -> Loop:
        return Loop(
            steps,
            self.program,
            lambda step: f"batch {step}",
            self.record,
            self,  # pyright: ignore[reportArgumentType]
            options.pop("save_every", 0),
            stop,
            self.evaluate,
            **options,
        )

    def of(self, kind: str) -> list[int]:
        return [event[1] for event in self.events if event[0] == kind]


def test_the_host_is_one_step_behind():
    run = Run()
    assert run.loop(4, Stop(None)).run(0, 0) == 4
    assert run.events == [
        ("step", 1),
        ("step", 2),
        ("record", 1, {}),
        ("step", 3),
        ("record", 2, {}),
        ("step", 4),
        ("record", 3, {}),
        ("record", 4, {}),
        ("save", 4, None),
        ("wait",),
    ]


def test_a_step_that_is_done_when_its_call_returns_is_recorded_at_once():
    run, seconds = Run(waits=True, step_seconds=0.05), []

    def record(done: int, metrics: int, details: str, found: dict[str, float], took: float) -> None:
        run.record(done, metrics, details, found, took)
        seconds.append(took)

    loop = dataclasses.replace(run.loop(3, Stop(None), save_every=2), record=record)
    assert loop.run(0, 0) == 3
    assert [event[:2] for event in run.events] == [
        ("step", 1),
        ("record", 1),
        ("step", 2),
        ("record", 2),
        ("save", 2),
        ("step", 3),
        ("record", 3),
        ("save", 3),
        ("wait",),
    ]
    assert all(0.05 <= took < 0.5 for took in seconds)  # each step's own, the first and the last as well


def test_metrics_are_written_before_the_checkpoint_that_they_belong_to():
    run = Run()
    loop = run.loop(5, Stop(None), save_every=2, evaluate_at=lambda done: done % 3 == 0)
    assert loop.run(0, 0) == 5
    assert run.events == [
        ("step", 1),
        ("step", 2),
        ("record", 1, {}),
        ("record", 2, {}),
        ("save", 2, None),
        ("step", 3),
        ("evaluate", 3),
        ("record", 3, {"eval/pass@1": 0.3}),
        ("save", 3, 0.3),
        ("step", 4),
        ("record", 4, {}),
        ("save", 4, None),
        ("step", 5),
        ("record", 5, {}),
        ("save", 5, None),
        ("wait",),
    ]


def test_only_the_last_state_may_go_unsaved():
    run = Run()
    assert run.loop(5, Stop(None), save_every=2, save_last=False).run(0, 0) == 5
    assert run.of("save") == [2, 4] and run.of("record") == [1, 2, 3, 4, 5]


def test_a_resumed_loop_does_the_steps_that_are_left():
    run = Run()
    assert run.loop(5, Stop(None)).run(3, 3) == 5
    assert run.of("step") == run.of("record") == [4, 5]
    done = Run()
    assert done.loop(5, Stop(None)).run(5, 5) == 5
    assert done.events == [("wait",)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number):
    run = Run(at={2: lambda: os.kill(os.getpid(), number)})
    earlier = signal.getsignal(number)
    with Stop(None) as stop:
        with pytest.raises(Stopped, match=f"stopped by {number.name} after step 2 of 9; saved"):
            run.loop(9, stop, evaluate_at=lambda done: done == 9).run(0, 0)
    assert run.events[-3:] == [("record", 2, {}), ("save", 2, None), ("wait",)]
    assert signal.getsignal(number) is earlier


def test_a_signal_during_the_last_step_does_not_hide_that_the_loop_is_done():
    run = Run(at={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with Stop(None) as stop:
        assert run.loop(2, stop).run(0, 0) == 2
        assert ("save", 2, None) in run.events
        with pytest.raises(Stopped, match="stopped by SIGTERM while evaluating"):
            stop.check("while evaluating")


def test_a_signal_before_the_first_step_stops_before_it():
    run = Run()
    with Stop(None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM before step 4 of 9"):
            run.loop(9, stop).run(3, 3)
    assert run.events == []


def test_a_second_sigint_interrupts_at_once_and_a_second_sigterm_does_not():
    with Stop(None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_stay_with_their_owner():
    earlier, found = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with Stop(None) as stop:
            found.append((stop.reason(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(None, earlier)]


class Clock:
    """Stands in for the module `time`: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def timed(monkeypatch, budget: float, durations: dict[int, float], save_seconds: float = 0.0) -> tuple[Run, Clock]:
    """A loop whose step n takes durations[n] (else 1 s), run until its time is up."""
    clock, run = Clock(), Run()
    monkeypatch.setattr("grpo_jax.recipes.loop.time", clock)
    run.at = {step: lambda step=step: clock.sleep(durations.get(step, 1.0)) for step in range(1, 100)}
    monkeypatch.setattr(run, "save", lambda step, *_: (clock.sleep(save_seconds), run.events.append(("save", step))))
    with pytest.raises(Stopped, match="stopped by the time budget after step"):
        run.loop(99, Stop(budget), save_every=5).run(0, 0)
    return run, clock


@pytest.mark.parametrize("durations", [{}, {4: 9.0}, {12: 6.0}])
@pytest.mark.parametrize("save_seconds", [0.0, 3.0])
def test_the_time_budget_is_kept_even_when_the_next_step_is_as_slow_as_the_slowest(
    monkeypatch, durations, save_seconds
):
    run, clock = timed(monkeypatch, 60.0, durations, save_seconds)
    assert clock.now - 1000.0 <= 60.0
    assert run.events[-2:] == [("save", run.of("step")[-1]), ("wait",)]
    slowest = max(durations.values(), default=1.0)
    assert clock.now - 1000.0 >= 60.0 - 2 * slowest - 2 * save_seconds - 1.0, "and not much is left of it"


def test_a_budget_that_is_used_up_before_the_first_step_stops_before_it(monkeypatch):
    clock, run = Clock(), Run()
    monkeypatch.setattr("grpo_jax.recipes.loop.time", clock)
    stop = Stop(30.0)
    assert stop.reason() is None and stop.reason(needed=31.0) == "the time budget"
    clock.sleep(31.0)
    with pytest.raises(Stopped, match="stopped by the time budget before step 1 of 9"):
        run.loop(9, stop).run(0, 0)
    assert run.events == []


def with_field(name: str, value: Any) -> Config:
    section, leaf = name.split(".")
    config = Config()
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{leaf: value})})


def test_a_new_folder_gets_the_config(tmp_path):
    folder = tmp_path / "a" / "b"
    open_workdir(folder, Config(seed=3))
    assert json.loads((folder / "config.json").read_text()) == json.loads(to_json(Config(seed=3)))
    open_workdir(folder, Config(seed=3))
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_another_config_is_refused_naming_the_field_and_both_values(tmp_path):
    open_workdir(tmp_path, Config())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"holds a run with optim\.lr=1e-06, this one has 0\.5: .*--workdir") as info:
        open_workdir(tmp_path, with_field("optim.lr", 0.5))
    assert "\n" not in str(info.value) and str(tmp_path) in str(info.value)
    with pytest.raises(InputError, match=r"with seed=0, this one has 1"):
        open_workdir(tmp_path, Config(seed=1))
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "name, value",
    [
        ("train.time_budget", "5m"),
        ("log.samples_every", 3),
        ("log.wandb", "offline"),
        ("checkpoint.every", 7),
        ("checkpoint.keep", 9),
        ("eval.alarm_drop", 0.5),
    ],
)
def test_fields_that_do_not_change_the_numbers_may_change(tmp_path, name, value):
    open_workdir(tmp_path, Config())
    open_workdir(tmp_path, with_field(name, value))
    section, leaf = name.split(".")
    assert json.loads((tmp_path / "config.json").read_text())[section][leaf] == value


def test_what_may_change_is_no_prefix_of_what_may_not(tmp_path):
    open_workdir(tmp_path, Config())
    with pytest.raises(InputError, match=r"train\.steps=100, this one has 101"):
        open_workdir(tmp_path, dataclasses.replace(Config(), train=TrainConfig(steps=101)))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"--workdir .*holds files but no config\.json"):
        open_workdir(tmp_path, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is not JSON"):
        open_workdir(tmp_path, Config())
    (tmp_path / "config.json").write_text('{"name": "of another program"}')
    with pytest.raises(InputError, match=r"config\.json: is not the config of a run"):
        open_workdir(tmp_path, Config())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_while_the_config_was_written_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / ".config.json.123.tmp").write_text("{")
    open_workdir(tmp_path, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
