"""What a run leaves in its folder, and the same from Python with an ordinary function as reward."""

import dataclasses
import json
import math
import pathlib
import re
import time

import pytest

import grpo_jax
from grpo_jax.config import Config, from_dict
from grpo_jax.errors import InputError

MICRO = pathlib.Path(__file__).with_name("micro_config.py")


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_folder_of_a_run(micro_run):
    names = {path.name for path in micro_run.iterdir()}
    assert names == {
        "base",
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "before.json",
        "before.samples.jsonl",
        "after.json",
        "after.samples.jsonl",
        "summary.json",
        "report.html",
    }
    assert {path.name for path in (micro_run / "base").iterdir()} == {"tokenizer.model", "sft", "model"}
    held = json.loads((micro_run / "config.json").read_text())
    assert held["train"]["steps"] == 6 and held["rewards"]["names"] == ["answer_format"]


def test_the_newest_and_the_best_checkpoint_are_kept(micro_run):
    steps = {int(path.name) for path in (micro_run / "checkpoints").iterdir() if path.name.isdigit()}
    scores = {x["step"]: x["eval/pass@1"] for x in read_lines(micro_run / "metrics.jsonl") if "eval/pass@1" in x}
    best = max(scores, key=lambda step: (scores[step], step))
    assert steps == {5, 6, best}


def test_summary(micro_run):
    summary = json.loads((micro_run / "summary.json").read_text())
    for name in ("before", "after"):
        found = summary[name]
        assert found == json.loads((micro_run / f"{name}.json").read_text())
        low, high = found["pass@1_ci95"]
        assert 0 <= low <= found["pass@1"] <= high <= 1
        assert 0 <= found["format"] <= 1 and 1 <= found["mean_length"] <= 6 and 0 <= found["greedy"] <= 1
        assert (found["problems"], found["samples"]) == (4, 2)
        records = read_lines(micro_run / f"{name}.samples.jsonl")
        assert found["pass@1"] == pytest.approx(sum(r["right"] for r in records) / len(records))
        assert found["mean_length"] == pytest.approx(sum(r["length"] for r in records) / len(records))
    assert summary["seconds_total"] > 0 and summary["seed"] == 0 and summary["device"] and summary["devices"] == 1
    assert summary["compiles"] >= read_lines(micro_run / "metrics.jsonl")[-1]["compiles"] > 0
    versions = summary["versions"]
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grpo-jax"} <= versions.keys()
    assert versions["jax"] == __import__("jax").__version__


EVERY_STEP = """
    reward/total reward/answer_format solve_rate groups/all_right groups/all_wrong advantage/mean_abs
    grad_norm kl entropy clip/low clip/high length/mean truncated sampler_gap/max sampler_gap/mean compiles
    seconds/step seconds/rewards tokens_per_second loss lr skipped
""".split()


def test_metrics(micro_run):
    lines = read_lines(micro_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(EVERY_STEP) <= line.keys()
        assert all(isinstance(x, int | float) and math.isfinite(x) for x in line.values())
        assert line["reward/total"] == pytest.approx(line["reward/answer_format"] / 2)
        assert line["solve_rate"] == pytest.approx(line["reward/answer_format"])
        assert 0 <= line["sampler_gap/mean"] <= line["sampler_gap/max"] < 1e-5
        assert ("length/right" in line) == (line["solve_rate"] > 0) and ("length/wrong" in line) == (
            line["solve_rate"] < 1
        )
        assert line["groups/all_right"] + line["groups/all_wrong"] <= 2
        assert line["seconds/step"] > 0 and line["tokens_per_second"] > 0 and line["skipped"] == 0
        assert ("eval/pass@1" in line) == (line["step"] in (3, 6))
    assert lines[0]["kl"] == 0, "the first step starts at the reference"
    assert lines[-1]["compiles"] == lines[3]["compiles"], "nothing is compiled once all programs have run"


def test_samples(micro_run):
    rows = read_lines(micro_run / "samples.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(1, 7) for _ in range(2)]
    for row in rows:
        assert re.fullmatch(r"\d\+\d=", row["prompt"])
        a, b = row["prompt"][:-1].split("+")
        assert row["answer"] == str(int(a) + int(b))
        assert set(row["rewards"]) == {"answer_format"}
        assert row["total"] == row["rewards"]["answer_format"] / 2
        assert 1 <= row["length"] <= 6 and isinstance(row["completion"], str)
        assert row["ended"] or row["length"] == 6
    assert any(row["advantage"] != 0 for row in rows)
    assert len({row["draw"] for row in rows}) == 12, "every step draws other prompts"


def test_the_report_is_one_file(micro_run):
    text = (micro_run / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/svg+xml;base64,") >= 3
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", text)


def test_the_terminal_tells_the_run(micro, micro_run):
    said = micro.said(micro_run)
    assert "2 prompts x 8 = 16 completions a step, 6 steps on 1 x cpu" in said
    assert "embed/embedding" in said and "compiling the step" in said
    assert re.search(r"step 6/6 +reward", said)
    table = said[said.index("held-out problems") :]
    assert re.search(r"pass@1 +[\d.]+% \[[\d.]+%, [\d.]+%\] +[\d.]+% \[", table)
    assert "format" in table and "mean length" in table
    assert len(re.findall(r"reward [-\d.]+  answer \d+", table)) == 3, "three sample completions"
    assert str(micro_run / "report.html") in said


SCORED: list[str] = []


def length(prompts: list[str], completions: list[str], answer: list[str], **columns) -> list[float]:
    """A reward as a user writes it."""
    assert set(columns) >= {"source"} and all(p.endswith("=") for p in prompts)
    SCORED.extend(completions)
    if "log_extra" in columns:
        columns["log_extra"]("characters", [len(text) for text in completions])
        columns["log_metric"]("step", columns["trainer_state"].global_step)
    return [len(text) / 10 + (str(a) in text) for text, a in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [{"question": f"{a}+{b}=", "answer": a + b, "source": "here"} for a in range(6) for b in range(4)]


def python_config(micro_base: str) -> Config:
    values = {
        "model": {"path": micro_base},
        "data": {"max_prompt_length": 4, "prompts_per_step": 2},
        "sampler": {"group_size": 4, "max_new_tokens": 5},
        "optim": {"lr": 1e-3},
        "step": {"mode": "staged"},
        "mesh": {"data": 1},
        "train": {"steps": 3},
        "eval": {"every": 0, "final_problems": 2, "samples": 4, "majority": 0},
        "log": {"tensorboard": True, "samples_every": 1, "samples": 4},
    }
    return from_dict(values)


@pytest.fixture(scope="module")
def python_run(micro_base, rows, tmp_path_factory, one_device):
    """Summary, folder and scored completions of a staged run: the caller's rows and reward, TensorBoard, wandb."""
    config = python_config(micro_base)
    workdir = tmp_path_factory.mktemp("python") / "run"
    try:
        __import__("wandb")
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, wandb="offline"))
    except ImportError:
        pass
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(workdir.parent / name))
        SCORED.clear()
        summary = grpo_jax.train(config, dataset=rows, rewards=[length], workdir=str(workdir))
        return summary, workdir, len(SCORED)


def test_a_function_and_rows_from_python(python_run, rows):
    summary, workdir, _ = python_run
    assert summary == json.loads((workdir / "summary.json").read_text())
    held = {row["question"] for row in rows[-2:]}
    assert {r["prompt"] for r in read_lines(workdir / "before.samples.jsonl")} == held, "the last tenth is held out"
    samples = read_lines(workdir / "samples.jsonl")
    assert len(samples) == 12 and not {row["prompt"] for row in samples} & held
    for row in samples:
        (expected,) = length([row["prompt"]], [row["completion"]], [row["answer"]], source=["here"])
        assert row["rewards"] == {"length": pytest.approx(expected)} and row["total"] == pytest.approx(expected)
    lines = read_lines(workdir / "metrics.jsonl")
    assert all(line["seconds/rewards"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert all(row["extra"] == {"characters": len(row["completion"])} for row in samples)
    assert [line["reward_metrics/step"] for line in lines] == [0, 1, 2]
    assert all(line["reward_errors/length"] == 0 for line in lines)


def test_the_config_says_what_was_given_from_python(python_run):
    config = json.loads((python_run[1] / "config.json").read_text())
    assert (config["rewards"]["names"], config["rewards"]["weights"]) == (["length"], [1.0])
    assert config["data"]["source"] == "memory"


def test_every_completion_is_scored_once(python_run):
    """3 steps of 8 completions, and of 2 problems 4 samples and 1 greedy completion, before and after."""
    assert python_run[2] == 3 * 8 + 2 * 2 * (4 + 1)


def test_staged_mode_tells_the_seconds_of_its_phases(python_run):
    for line in read_lines(python_run[1] / "metrics.jsonl"):
        phases = [line[f"seconds/{name}"] for name in ("sample", "score", "update")]
        assert min(phases) > 0 and sum(phases) == pytest.approx(line["seconds/step"])
        assert line["seconds/rewards"] <= line["seconds/score"]


def test_tensorboard_events_are_written(python_run):
    (events,) = (python_run[1] / "tensorboard").iterdir()
    assert b"reward/length" in events.read_bytes()


def test_wandb_keeps_the_run_offline(python_run):
    pytest.importorskip("wandb", reason="wandb is optional: pip install 'grpo-jax[wandb]'")
    (path,) = (python_run[1] / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while b"reward/length" not in path.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)  # wandb's own process may write a moment after its finish() has returned
    assert b"reward/length" in path.read_bytes()


def test_a_finished_run_says_its_summary_again(python_run, rows):
    summary, workdir, _ = python_run
    config = json.loads((workdir / "config.json").read_text())
    again = grpo_jax.train(from_dict(config), dataset=rows, rewards=[length], workdir=str(workdir))
    assert (again["before"], again["after"]) == (summary["before"], summary["after"])
    assert len(read_lines(workdir / "metrics.jsonl")) == 3


def test_rows_without_the_column_are_named(micro_base, tmp_path, one_device):
    with pytest.raises(InputError, match=r"dataset row 1: has no column data\.prompt_column='question', only \['q'\]"):
        rows = [{"question": "1+1=", "answer": 2}, {"q": "1+2="}]
        grpo_jax.train(python_config(micro_base), dataset=rows, rewards=[length], workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
