"""What the built distributions carry."""

import pathlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest


@pytest.fixture(scope="module")
def built(repo_root, tmp_path_factory):
    """Names inside the wheel and inside the sdist, its top folder left out."""
    pytest.importorskip("hatchling", reason="hatchling (extra 'test') builds the wheel")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=repo_root, check=True, capture_output=True, timeout=120)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        members = {name.partition("/")[2] for name in tar.getnames()}
    return set(zipfile.ZipFile(wheel).namelist()), members


def files(folder: pathlib.Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob(pattern) if "__pycache__" not in path.parts}


def test_the_wheel_carries_package_configs_and_templates(built, repo_root):
    wheel, _ = built
    configs = {f"grpo_jax/{name}" for name in files(repo_root, "configs/**/*.py")}
    templates = files(repo_root, "grpo_jax/templates/*.jinja")
    assert configs and templates
    assert wheel >= files(repo_root, "grpo_jax/**/*.py") | configs | templates | {"grpo_jax/py.typed"}


def test_the_wheel_carries_nothing_else(built):
    wheel, _ = built
    outside = {name for name in wheel if not name.startswith(("grpo_jax/", "grpo_jax-"))}
    assert outside == set()
    assert {name for name in wheel if name.endswith((".pyc", ".ipynb", ".sh"))} == set()


def test_the_sdist_carries_what_builds_and_tests_it(built, repo_root):
    _, sdist = built
    want = {"pyproject.toml", "LICENSE", "CHANGELOG.md", "launch/gpu.sh", "launch/tpu_vm.sh", "tests/conftest.py"}
    assert sdist >= want | files(repo_root, "configs/**/*.py") | files(repo_root, "grpo_jax/**/*.py")
    assert {name for name in sdist if "__pycache__" in name or name.startswith(("runs/", ".ci/"))} == set()


def test_dependencies_have_lower_bounds_and_no_caps(repo_root):
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for line in project["dependencies"] + [line for line in extras if not line.startswith("grpo-jax[")]:
        bound = line.partition(";")[0]
        assert ">=" in bound and not set("<~!") & set(bound.replace(">=", "")), line
