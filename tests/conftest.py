"""What every test stands on: eight CPU devices, exact products, a cache of compiled programs."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = pathlib.Path(importlib.util.find_spec("grpo_jax").submodule_search_locations[0])  # pyright: ignore


def _quick_compiles() -> str:
    """XLA flags with which small programs compile fast: half of these tests' time goes there, the other into tracing.

    Level 1 took 124 CPU seconds for seven tests of the step, level 0 99; one of them took 42 at level 0, and 30 without
    the newer emitters of fused loops. A step took 4.1 in many modules of LLVM, 3.7 in one. XLA ends a process that
    names a flag it does not know, so these are for the versions that were tried.
    """
    flags = "--xla_backend_optimization_level=0"
    tried = importlib.metadata.version("jaxlib").split(".")[:2] == ["0", "10"]
    more = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return f"{flags} {more}" if tried else flags


QUICK_COMPILES = _quick_compiles()


def _set_up_jax() -> None:
    """jax reads its environment once, at import: this must come before."""
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could set its environment")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "grpo_jax_tests"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8 {QUICK_COMPILES}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # who called each operation: 5% of a step's lowering


_set_up_jax()
gc.set_threshold(50_000, 20, 100)  # tracing makes many objects and little garbage: a tenth of its time went to looking


# Files of few tests that take minutes: started last, one of them keeps a process busy when the other has nothing left.
LONG_FILES = ("test_real_model", "test_resume", "test_runs", "test_notebook", "test_lora_run", "test_sweep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first (with `--no-loadscope-reorder`, which keeps this order)."""
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


def pytest_collection_finish() -> None:
    """What was imported lives as long as the process: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Reference numbers and data beside the checkout; tests that need them skip where they are missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared with reference numbers and data")
    return folder


@pytest.fixture(scope="session")
def cli_env() -> dict[str, str]:
    """The environment of a user on a laptop: one CPU device, nothing of these tests' settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_", "COLUMNS"))}
    return env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PACKAGE.parent), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def quick_compiles() -> dict[str, str]:
    """Beside `cli_env`, for runs of which no speed is read."""
    return {"XLA_FLAGS": QUICK_COMPILES}


@pytest.fixture
def run_cli(cli_env, tmp_path):
    """`run_cli("train", "--config", "arithmetic", timeout=120)`: runs grpo-jax in `tmp_path`, output captured as text.

    The result is a `subprocess.CompletedProcess`; the caller checks `returncode`. `env` adds variables, `cwd` is the
    folder to run in.
    """

    def run(*args, timeout: float = 300, env: dict[str, str] | None = None, cwd: pathlib.Path | None = None):
        command = [sys.executable, "-m", "grpo_jax.cli", *map(str, args)]
        return subprocess.run(
            command, env=cli_env | (env or {}), cwd=cwd or tmp_path, timeout=timeout, capture_output=True, text=True
        )

    return run
