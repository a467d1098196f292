"""Killed at any moment and started again, a run ends as if nobody had touched it, bit for bit."""

import dataclasses
import json
import pathlib
import re
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.checkpoint import Checkpoints

STEPS = 6  # of micro_config.py
CLOCK = ("seconds/", "tokens_per_second", "compiles")


def lines(path: pathlib.Path) -> list[dict]:
    """Whole lines of a JSONL file that may be being written."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def metrics(path: pathlib.Path) -> list[dict]:
    """Metrics without the figures of clock and compiler."""
    return [{name: x for name, x in line.items() if not name.startswith(CLOCK)} for line in lines(path)]


def parameters(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint by name: parameters, reference, optimizer state, counters."""
    with Checkpoints(folder, keep=9) as checkpoints:
        step = checkpoints.steps()[-1]
        layout = json.loads((folder / str(step) / "meta" / "metadata").read_text())["layout"]
        wanted = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (dtype, shape) in layout.items()}
        restored = checkpoints.restore(wanted)
    assert restored is not None and restored[2] == step
    return jax.tree.map(np.asarray, restored[0])


def assert_same_run(run: pathlib.Path, other: pathlib.Path) -> None:
    for name in ("samples.jsonl", "before.json", "after.json", "before.samples.jsonl", "after.samples.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("metrics.jsonl", "base/sft/metrics.jsonl"):
        assert metrics(run / name) == metrics(other / name)
    mine, others = parameters(run / "checkpoints"), parameters(other / "checkpoints")
    assert mine.keys() == others.keys()
    assert [name for name in mine if mine[name].tobytes() != others[name].tobytes()] == []


def end_when(process, seen: Callable[[], bool], by: signal.Signals) -> None:
    """Sends the signal as soon as `seen`; looks often, as a save takes a few hundredths of a second."""
    while not seen():
        assert process.poll() is None, "the run ended before what was waited for"
        time.sleep(0.001)
    process.send_signal(by)


def kill_when(micro, workdir: pathlib.Path, seen: Callable[[], bool]) -> None:
    process = micro.popen(workdir)
    try:
        end_when(process, seen, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()


def being_saved(folder: pathlib.Path, after: int) -> bool:
    return folder.exists() and any(
        int(path.name.split(".")[0]) > after for path in folder.iterdir() if "orbax-checkpoint-tmp" in path.name
    )


def damage_newest(checkpoints: pathlib.Path) -> pathlib.Path:
    """Cuts the end off the largest file of the newest whole checkpoint, and gives that file."""
    newest = max((path for path in checkpoints.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    return largest


@dataclasses.dataclass
class Ended:
    """A run that was ended five times, what some of its starts said, and the file that was damaged before the last."""

    run: pathlib.Path
    short: str
    asked: str
    damaged: pathlib.Path
    last: str


@pytest.fixture(scope="module")
def ended(micro, micro_run, tmp_path_factory) -> Ended:
    """One chain instead of a run for each way to end it, because every start costs ten seconds."""
    run = tmp_path_factory.mktemp("ended") / "run"
    base, checkpoints, written = run / "base", run / "checkpoints", run / "metrics.jsonl"
    kill_when(micro, run, base.exists)  # the tokenizer is being trained
    short = micro.start(run, "--time_budget", "1s")
    kill_when(micro, run, lambda: len(lines(base / "sft" / "metrics.jsonl")) >= 3)
    assert not (base / "model").exists() and not checkpoints.exists()
    said = len(micro.said(run))
    process = micro.popen(run)
    try:
        end_when(process, lambda: len(lines(written)) >= 1, signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    asked = micro.said(run)[said:]
    assert len(lines(written)) <= 2 and not (run / "after.json").exists()
    kill_when(micro, run, lambda: being_saved(checkpoints, after=3))
    assert any("orbax-checkpoint-tmp" in path.name for path in checkpoints.iterdir()), "killed in the middle of a save"
    return Ended(run, short, asked, damage_newest(checkpoints), micro.start(run))


def test_the_reference_run_really_trains(micro_run):
    written = lines(micro_run / "metrics.jsonl")
    assert [line["step"] for line in written] == list(range(1, STEPS + 1))
    assert sum(line["grad_norm"] > 0.01 for line in written) >= 4
    assert written[-1]["kl"] > 0
    final = parameters(micro_run / "checkpoints")
    trained = {name.split("/", 1)[1]: x for name, x in final.items() if name.startswith("trainable/")}
    kept = {name.split("/", 1)[1]: x for name, x in final.items() if name.startswith("reference/")}
    assert trained.keys() == kept.keys()
    assert all((trained[name] != kept[name]).any() for name in trained), "the reference is that of step 4"


def test_ended_and_resumed_equals_uninterrupted(micro_run, ended):
    assert_same_run(ended.run, micro_run)


def test_nothing_that_is_finished_is_made_again(micro, ended):
    said = micro.said(ended.run)
    assert said.count("training a SentencePiece tokenizer") in (1, 2), "twice when the first kill came before its end"
    assert said.count("evaluating before training") == 1
    assert said.count("evaluating after training") == 1
    resumed = [int(step) for step in re.findall(rf"going on after step (\d+) of {STEPS}", said)]
    assert len(resumed) == 2 and 1 <= resumed[0] <= resumed[1]


def test_a_time_budget_ends_the_run_cleanly(ended):
    last = ended.short.splitlines()[-1]
    assert last == "stopped by the time budget before step 1 of 20. Run the same command again to go on."


def test_sigterm_saves_exits_0_and_says_how_to_go_on(micro, ended):
    last = ended.asked.splitlines()[-1]
    found = re.fullmatch(rf"stopped by SIGTERM after step (\d) of {STEPS}; saved\. Run the same .* to go on\.", last)
    assert found, last
    first_resume = re.search(r"going on after step (\d)", micro.said(ended.run))
    assert first_resume and first_resume[1] == found[1]


def test_starts_share_compiled_programs(micro, ended):
    assert len(list(micro.cache.glob("jit_train_step-*-cache"))) >= 1
    compiled = [float(x) for x in re.findall(r"compiled the step in ([\d.]+) s", micro.said(ended.run))]
    assert len(compiled) == 3


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(ended):
    newest = next(path for path in ended.damaged.parents if path.name.isdigit())
    (line,) = [line for line in ended.last.splitlines() if "is damaged" in line]
    before = re.search(r"step (\d) is used", line)
    assert str(newest) in line and ended.damaged.name in line and before and int(before[1]) < int(newest.name)
    assert f"going on after step {before[1]} of {STEPS}" in ended.last
    assert (ended.run / "summary.json").exists() and (ended.run / "report.html").exists()
