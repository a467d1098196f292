"""A run that several processes can do: a model of one layer, twenty sums, a reward in Python that notes who scored."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import tiny

from grpo_jax.models.huggingface import write_folder
from grpo_jax.text import Tokenizer, train_sentencepiece

ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 6) for b in range(1, 5)]
CLOCK = ("seconds", "tokens_per_second", "compiles")
CONFIG = """
from grpo_jax.config import default_config


def get_config():
    c = default_config()
    c.model.path, c.data.source, c.data.path = "model", "jsonl", "rows.jsonl"
    c.data.prompts_per_step, c.data.max_prompt_length = 4, 8
    c.sampler.group_size, c.sampler.max_new_tokens = 2, 4
    c.rewards.names, c.rewards.weights = ("answer", "noting:different"), (1.0, 1.0)
    c.optim.lr, c.train.steps, c.checkpoint.every, c.checkpoint.keep = 1e-2, 6, 2, 9
    c.eval.every, c.eval.final_problems, c.eval.samples, c.eval.majority = 0, 2, 1, 0
    c.log.tensorboard, c.log.samples_every, c.log.samples = False, 1, 8
    c.distributed.heartbeat_timeout = 20
    return c
"""
REWARD = """
import json, os, time


def different(completion_ids, trainer_state, log_metric, **columns):
    time.sleep(float(os.environ.get("PAUSE", "0")))
    with open(f"scored.{os.environ['JAX_PROCESS_ID']}", "a") as file:
        file.write(json.dumps([trainer_state.global_step, completion_ids]) + "\\n")
    log_metric("scored", float(len(completion_ids)))
    return [len(set(ids)) / len(ids) for ids in completion_ids]
"""


def write(folder: pathlib.Path) -> pathlib.Path:
    """The folder with model, data, config and reward."""
    texts = [*(r["question"] + r["answer"] for r in ROWS), "think aloud, user asks:\n!<>/ew"]
    train_sentencepiece(texts, 120, ("<answer>", "</answer>"), str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_sentencepiece(str(folder / "tokenizer.model"))
    architecture = tiny.architecture(vocabulary=tokenizer.vocabulary, layers=1)
    write_folder(str(folder / "model"), architecture, tiny.params(architecture), tokenizer)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "config.py").write_text(CONFIG)
    (folder / "noting.py").write_text(REWARD)
    return folder


def environment(base: dict[str, str], devices: int = 1) -> dict[str, str]:
    """That of one process: so many CPU devices, compiled programs kept where tests keep theirs."""
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_DEFAULT_MATMUL_PRECISION")
    quick = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    return base | {name: os.environ[name] for name in kept} | {"XLA_FLAGS": quick, "JAX_PROCESS_ID": "0"}


def launch(folder: pathlib.Path, env: dict[str, str], processes: int, workdir: str, *flags: str) -> subprocess.Popen:
    """`grpo-jax launch` of `grpo-jax train`, its output in files beside the workdir."""
    command = [sys.executable, "-m", "grpo_jax.cli", "launch", f"--processes={processes}", "--"]
    return started(folder, env, [*command, "train", "--config", "config.py", "--workdir", workdir, *flags], workdir)


def started(folder: pathlib.Path, env: dict[str, str], command: list[str], name: str) -> subprocess.Popen:
    """A command under way in the folder, its output in NAME.out and NAME.err."""
    with open(folder / f"{name}.out", "a") as out, open(folder / f"{name}.err", "a") as err:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)


def lines(folder: pathlib.Path, workdir: str) -> list[dict]:
    """The metrics of a run without what the clock says."""
    path = folder / workdir / "metrics.jsonl"
    read = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in line.items() if not name.startswith(CLOCK)} for line in read]


def samples(folder: pathlib.Path, workdir: str) -> list[dict]:
    """The completions of a run."""
    return [json.loads(line) for line in (folder / workdir / "samples.jsonl").read_text().splitlines()]


def wait_for_step(
    folder: pathlib.Path, workdir: str, step: int, process: subprocess.Popen, seconds: float = 400
) -> None:
    """Returns when metrics.jsonl has come to a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if len(lines(folder, workdir)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"not at step {step}: {(folder / f'{workdir}.err').read_text()[-2000:]}")


def pid_of(parent: int, number: int) -> int:
    """The process with this JAX_PROCESS_ID among the children of a launcher."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and f"JAX_PROCESS_ID={number}".encode() in (
                path / "environ"
            ).read_bytes().split(b"\0"):
                return int(path.name)
    raise AssertionError(f"no process {number} under {parent}")
