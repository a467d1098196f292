"""One whole run of the micro config, made once and read by many tests."""

import dataclasses
import fcntl
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from grpo_jax.parallel import make_mesh

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
def micro(cli_env, quick_compiles) -> Micro:
    """Starts runs of the micro config on one CPU device, compiled programs shared between them."""
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    return Micro(cli_env | quick_compiles, cache.with_name(f"{cache.name}_micro"))


@pytest.fixture(scope="session")
def micro_run(micro, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished, never interrupted run; tests read it and change nothing."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # one run for all processes of pytest: the first one makes it
    with open(shared / "micro_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "micro_run").exists():
            micro.start(shared / "micro_run", timeout=900)
    return shared / "micro_run"


@pytest.fixture(scope="session")
def micro_base(micro_run) -> str:
    """The base model of that run, a Hugging Face folder."""
    return str(micro_run / "base" / "model")


@pytest.fixture(scope="module")
def one_device():
    """Runs started from Python take the first of the eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        for recipe in ("grpo", "supervised"):
            patch.setattr(f"grpo_jax.recipes.{recipe}.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield
