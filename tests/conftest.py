"""What every test stands on: eight CPU devices, exact products, a cache of compiled programs."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = pathlib.Path(importlib.util.find_spec("grpo_jax").submodule_search_locations[0])  # pyright: ignore


def _set_up_jax() -> None:
    """jax reads its environment once, at import: this must come before."""
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could set its environment")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "grpo_jax_tests"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        # Level 1 compiles small programs in two thirds of the time (8.8 against 12.9 CPU seconds for a gradient).
        quick = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
        os.environ["XLA_FLAGS"] = f"{flags} {quick}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


_set_up_jax()


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
