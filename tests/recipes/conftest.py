"""One whole run of the micro config, made once and read by many tests."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

MICRO = pathlib.Path(__file__).with_name("micro_config.py")


@dataclasses.dataclass(frozen=True)
class Micro:
    """`grpo-jax train` on the micro config, in processes of its own."""

    env: dict[str, str]
    cache: pathlib.Path

    def popen(self, workdir: pathlib.Path, *arguments: str) -> subprocess.Popen:
        """A start of the run in `workdir`; what it says goes to `<workdir>.log`."""
        cache = f"--config.log.compilation_cache={self.cache}"
        own = ["train", "--config", str(MICRO), cache, "--workdir", str(workdir), *arguments]
        with open(self.log(workdir), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "grpo_jax.cli", *own], env=self.env, stdout=log, stderr=subprocess.STDOUT
            )

    def start(self, workdir: pathlib.Path, *arguments: str, timeout: float = 300) -> str:
        """Runs until the process ends by itself with exit code 0; returns what it said."""
        before = len(self.said(workdir))
        process = self.popen(workdir, *arguments)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = self.said(workdir)[before:]
        assert code == 0, said
        return said

    @staticmethod
    def log(workdir: pathlib.Path) -> pathlib.Path:
        return workdir.with_name(f"{workdir.name}.log")

    @classmethod
    def said(cls, workdir: pathlib.Path) -> str:
        return cls.log(workdir).read_text(encoding="utf-8") if cls.log(workdir).exists() else ""


@pytest.fixture(scope="session")
def micro(cli_env) -> Micro:
    """Starts runs of the micro config on one CPU device, compiled programs shared between them."""
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=1"}  # of the compiler, as in the tests themselves
    return Micro(cli_env | quick, cache.with_name(f"{cache.name}_micro"))


@pytest.fixture(scope="session")
def micro_run(micro, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished, never interrupted run; tests read it and change nothing."""
    workdir = tmp_path_factory.mktemp("micro") / "run"
    micro.start(workdir, timeout=600)
    return workdir


@pytest.fixture(scope="session")
def micro_base(micro_run) -> str:
    """The base model of that run, a Hugging Face folder."""
    return str(micro_run / "base" / "model")


def read_lines(path: pathlib.Path) -> list[dict]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
