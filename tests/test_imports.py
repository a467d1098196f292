"""Imports go down the floors only; importing the package loads no jax."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

FLOORS = {
    "cli": 7,
    "pipeline": 7,
    "recipes": 6,
    "report": 6,
    "step": 5,
    "batches": 5,
    "checkpoint": 5,
    "optimizer": 5,
    "generate": 4,
    "rewards": 4,
    "data": 4,
    "sampler": 3,
    "models": 2,
    "ops": 1,
    "config": 0,
    "chips": 0,
    "hlo": 0,
    "topology": 0,
    "parallel": 0,
    "metrics": 0,
    "text": 0,
    "errors": 0,
    "terminal": 0,
    "processes": 0,
    "watchdog": 0,
    "launcher": 7,
}
ROOF = 8  # the package's own __init__, which only hands out names


def module_names(package: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted name of each module -> its file; a package's __init__ has the package's name."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(module: str, path: pathlib.Path, modules: dict[str, pathlib.Path]) -> set[str]:
    """Modules of the package that a module imports, in functions and under TYPE_CHECKING too."""
    found = set()
    own_package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = own_package.split(".")[: len(own_package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in modules else base)
    root = module.partition(".")[0]
    return {name for name in found if name.partition(".")[0] == root}


def part(module: str) -> str:
    """`grpo_jax.models.cache` -> `models`; the package itself -> ''."""
    return module.split(".")[1] if "." in module else ""


def problems(package: pathlib.Path, floors: dict[str, int]) -> list[str]:
    """Each breach of the rules as a line."""
    modules = module_names(package)
    imports = {module: imported(module, path, modules) for module, path in modules.items()}
    floor = {"": ROOF, **floors}
    lines = [f"{m}: has no floor; give {part(m)} one" for m in imports if part(m) not in floor]
    lines += [f"{m} imports {t}, which is not a file" for m, ts in imports.items() for t in sorted(ts - set(modules))]
    if lines:
        return lines
    for module, targets in imports.items():
        for target in sorted(targets):
            below, above = floor[part(module)], floor[part(target)]
            if above > below:
                lines.append(f"{module} (floor {below}) imports {target} (floor {above})")
    parts = {p: set() for p in floor}
    for module, targets in imports.items():
        parts[part(module)] |= {part(t) for t in targets} - {part(module)}
    return lines + cycle(imports) + cycle(parts)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The first import cycle as a line, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["cycle: " + " -> ".join(reversed(error.args[1]))]
    return []


def test_imports_go_down(repo_root):
    package = repo_root / "grpo_jax"
    assert len(module_names(package)) > 4
    assert problems(package, FLOORS) == []


TREE = {
    "__init__.py": "",
    "low.py": "import os\n",
    "beside.py": "from toy import low\n",
    "mid/__init__.py": "",
    "mid/one.py": "from toy.low import x\nimport toy.mid.two\n",
    "mid/two.py": "import json\n",
    "high.py": "from toy.mid import one\nfrom . import low\n",
}
TOY_FLOORS = {"low": 0, "beside": 0, "mid": 1, "high": 2}


def build(folder: pathlib.Path, changes: dict[str, str]) -> pathlib.Path:
    for name, text in (TREE | changes).items():
        path = folder / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "toy"


def test_the_checker_accepts_a_clean_tree(tmp_path):
    assert problems(build(tmp_path, {}), TOY_FLOORS) == []


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"low.py": "import toy.high\n"}, "toy.low (floor 0) imports toy.high (floor 2)"),
        ({"low.py": "def f():\n    from toy.mid.two import g\n"}, "toy.low (floor 0) imports toy.mid.two (floor 1)"),
        ({"mid/two.py": "from ..high import g\n"}, "toy.mid.two (floor 1) imports toy.high (floor 2)"),
        ({"mid/two.py": "from .. import high\n"}, "toy.mid.two (floor 1) imports toy.high (floor 2)"),
        ({"low.py": "import toy\n"}, "toy.low (floor 0) imports toy (floor 8)"),
        ({"mid/two.py": "from . import one\n"}, "cycle: toy.mid.one -> toy.mid.two -> toy.mid.one"),
        ({"low.py": "from toy import beside\n"}, "cycle: toy.low -> toy.beside -> toy.low"),
        ({"new.py": ""}, "toy.new: has no floor; give new one"),
        ({"high.py": "from toy.mid.three import x\n"}, "toy.high imports toy.mid.three, which is not a file"),
    ],
)
def test_the_checker_names_a_breach(tmp_path, changes, want):
    found = problems(build(tmp_path, changes), TOY_FLOORS)
    if want.startswith("cycle"):  # where a cycle is entered is arbitrary
        assert any(line.startswith("cycle") and set(line.split()) == set(want.split()) for line in found), found
    else:
        assert want in found


def test_the_checker_names_a_cycle_of_packages_without_one_of_modules(tmp_path):
    changes = {
        "mid/two.py": "from toy.other import three\n",
        "other/__init__.py": "",
        "other/three.py": "",
        "other/four.py": "from toy.mid import one\n",
    }
    found = problems(build(tmp_path, changes), TOY_FLOORS | {"other": 1})
    assert len(found) == 1 and set(found[0].split()) == {"cycle:", "->", "mid", "other"}, found


def loaded_by(statement: str, cli_env: dict[str, str]) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], env=cli_env, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_package_and_its_config_import_no_jax(cli_env):
    loaded = loaded_by("import grpo_jax, grpo_jax.config, grpo_jax.errors; dir(grpo_jax)", cli_env)
    assert "grpo_jax.config" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow_datasets", "matplotlib"}


def test_the_step_needs_no_tokenizer_and_no_reader_of_checkpoints(cli_env):
    """They are 30 MB of a process, in which a sampler or a benchmark has no use for them."""
    loaded = loaded_by("import grpo_jax.step", cli_env)
    assert {"jax", "grpo_jax.rewards.reward_model", "grpo_jax.rewards.model_judge"} <= loaded
    assert not loaded & {"orbax", "tensorstore", "sentencepiece", "tokenizers", "jinja2"}


def test_an_unknown_name_is_an_attribute_error():
    import grpo_jax

    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        grpo_jax.trian  # noqa: B018


def test_the_version_is_that_of_the_distribution(repo_root):
    import tomllib
    from importlib import metadata

    import grpo_jax

    try:
        installed = metadata.version("grpo-jax")
    except metadata.PackageNotFoundError:
        pytest.skip("grpo-jax is not installed here")
    assert grpo_jax.__version__ == installed
    assert installed == tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("name", ["advantages", "load", "load_model", "policy_loss", "train"])
def test_a_lazy_name_is_the_function_of_that_name(name):
    import grpo_jax

    assert name in dir(grpo_jax)
    assert getattr(grpo_jax, name).__name__ == name
