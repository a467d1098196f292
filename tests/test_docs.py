"""The documentation tells what is there: links, options, files, tests and code blocks."""

import ast
import itertools
import pathlib
import re
import subprocess
import sys

import pytest

from grpo_jax.cli import load_config, parser
from grpo_jax.config import config_file, default_config, field_names, from_dict
from grpo_jax.ops.objectives import OBJECTIVES

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "docs/adapters.md",
    "docs/all_scenarios.md",
    "docs/architecture.md",
    "docs/code_rewards.md",
    "docs/distillation.md",
    "docs/extending.md",
    "docs/index.md",
    "docs/models.md",
    "docs/objectives.md",
    "docs/recipes_data.md",
    "docs/results.md",
    "docs/rewards.md",
    "docs/reward_models.md",
    "docs/scaling.md",
    "docs/tasks.md",
)


def page(root: pathlib.Path, name: str) -> str:
    if not (root / name).is_file():
        pytest.skip(f"{name} is in the checkout only")
    return (root / name).read_text(encoding="utf-8")


def told(root: pathlib.Path) -> dict[str, str]:
    """All that a user reads: pages, config files, the notebook."""
    files = [
        *root.glob("*.md"),
        *root.glob("docs/**/*.md"),
        *root.glob("configs/**/*.py"),
        *root.glob("notebooks/*.ipynb"),
    ]
    return {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files}


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def broken_links(name: str, text: str, root: pathlib.Path) -> list[str]:
    here = (root / name).parent
    targets = [t.partition("#")[0] for t in LINK.findall(text) if not re.match(r"[a-z]+:|#", t)]
    return [f"{name}: {t}" for t in targets if not (here / t).exists()]


def unknown_fields(name: str, text: str) -> list[str]:
    known = set(field_names())
    mentioned = re.findall(r"--config\.([a-z_0-9.]*[a-z_0-9])", text)
    return [f"{name}: --config.{field}" for field in mentioned if field not in known]


def test_the_pages_are_there(repo_root):
    assert [name for name in PAGES if not page(repo_root, name).strip()] == []


def test_relative_links_lead_somewhere(repo_root):
    pages = {name: text for name, text in told(repo_root).items() if name.endswith((".md", ".ipynb"))}
    assert sum(len(LINK.findall(text)) for text in pages.values()) > 10
    assert [line for name, text in pages.items() for line in broken_links(name, text, repo_root)] == []


def test_options_that_are_mentioned_exist(repo_root):
    pages = told(repo_root)
    assert sum(text.count("--config.") for text in pages.values()) > 10
    assert [line for name, text in pages.items() for line in unknown_fields(name, text)] == []


def test_fields_set_in_a_code_block_exist(repo_root):
    known = field_names()
    sections = {name.rsplit(".", depth)[0] for name in known for depth in (1, 2) if name.count(".") >= depth}
    for name in ("README.md", "docs/extending.md"):
        for body in blocks(page(repo_root, name), "python"):
            for field in re.findall(r"^\s*config\.([a-z_0-9.]+) = ", body, re.MULTILINE):
                assert field in known, f"{name}: config.{field}"
            for section in re.findall(r"config\.([a-z_0-9.]+)\.update\(", body):
                assert section in sections, f"{name}: config.{section}"


def test_the_config_of_the_page_on_all_scenarios_is_one(repo_root):
    made = {"c": default_config()}
    exec(blocks(page(repo_root, "docs/all_scenarios.md"), "python")[0], made)
    found = from_dict(made["c"])
    assert [each.name for each in found.data.sets] == ["reasoning", "general"] and found.late_step == 1300


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its head left out."""
    lines = text.partition(f"## {heading}")[2].splitlines()
    rows = list(
        itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda x: x[:1] != "|", lines))
    )
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_every_option_of_the_objective_is_explained(repo_root):
    text = page(repo_root, "docs/objectives.md")
    others = {"num_iterations", "micro_batch_size"}  # how a rollout is cut: the page of options
    names = {name.removeprefix("objective.") for name in field_names() if name.startswith("objective.")}
    assert {name for name in names - others if f"`{name}" not in text} == set()
    types = [row[0].strip("`") for row in table_rows(text, "`loss_type`")]
    assert types == list(OBJECTIVES)


def test_a_paper_leads_to_options_that_are_accepted(repo_root):
    """Each row of options makes a config, and a preset holds what its row says."""
    rows = table_rows(page(repo_root, "docs/objectives.md"), "From a paper to options")
    seen = set()
    for name, cell, preset in rows:
        found = re.findall(r"(\w+)=([\w.-]+)", cell)
        fields = {key: ast.literal_eval(value) if re.match(r"[\d.]|True", value) else value for key, value in found}
        assert found or "the same" in cell, name
        sampler = {"max_new_tokens": 4096}
        made = from_dict({"objective": fields, "sampler": sampler, "data": {"prompts_per_step": 512}}, name)
        if preset:
            given = load_config(["--config", preset.strip("`")])[1]
            told = {key: getattr(made.objective, key) for key in fields}
            assert {key: getattr(given.objective, key) for key in fields} == told, name
            seen.add(preset.strip("`"))
    assert seen == {f"presets/{path.stem}" for path in (repo_root / "configs" / "presets").glob("*.py")}
    assert len(rows) > 20


def test_configs_that_are_mentioned_exist(repo_root):
    own = {"my_experiment.py", "NAME", "FILE", "FILE.py", "CONFIG"}  # the user's, and placeholders
    mentioned = [
        (name, found) for name, text in told(repo_root).items() for found in re.findall(r"--config[ =]([\w./]+)", text)
    ]
    assert {"smollm2_sums", "arithmetic"} <= {found for _, found in mentioned}
    for name, found in mentioned:
        assert found in own or config_file(found).is_file(), f"{name}: --config {found}"


def test_commands_that_are_mentioned_exist(repo_root):
    (commands,) = [set(action.choices) for action in parser()._actions if action.choices]
    mentioned = {c for text in told(repo_root).values() for c in re.findall(r"grpo-jax ([a-z]+(?:-[a-z]+)*)\b", text)}
    assert "train" in mentioned and mentioned <= commands


def test_files_that_are_mentioned_exist(repo_root):
    """Paths in code font that begin with a folder of the checkout."""
    pattern = re.compile(r"`((?:grpo_jax|tests|configs|docs|launch|notebooks|\.ci)/[\w./]+)`")
    mentioned = [(name, found) for name, text in told(repo_root).items() for found in pattern.findall(text)]
    assert len(mentioned) > 20
    assert [f"{name}: {found}" for name, found in mentioned if not (repo_root / found).exists()] == []


def test_the_floors_are_those_of_the_test_of_imports(repo_root):
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", page(repo_root, "docs/architecture.md"), re.MULTILINE)
    drawn = {part: int(floor) for floor, parts in rows for part in re.findall(r"`(\w+)`", parts)}
    tree = ast.parse((repo_root / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    (floors,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    ]
    assert drawn == floors


def test_the_two_lines_are_those_that_ci_runs(repo_root):
    if not (repo_root / ".ci" / "run").is_file():
        pytest.skip(".ci/run is in the checkout only")
    script = (repo_root / ".ci" / "run").read_text(encoding="utf-8")
    first = blocks(page(repo_root, "README.md"), "bash")[0].splitlines()
    lines = [line.partition("#")[0].strip() for line in first]
    assert lines == ["pip install . && grpo-jax train", "pip install '.[test]' && pytest"]
    titles = re.findall(r'^stage "(.*)" \w+$', script, re.MULTILINE)
    assert [title for title in titles if title.startswith("pip install")] == lines
    for line in lines:
        for command in line.split(" && "):
            command = command.replace("pip install", "pip install -q")
            assert re.search(rf"{re.escape(command)}(?=\s|$)", script), command


def test_no_paths_of_one_machine(repo_root):
    suffixes = {".md", ".py", ".toml", ".ipynb", ".sh", ".json", ".jsonl", ".jinja"}  # .txt: what scripts print
    folders = ("grpo_jax", "configs", "docs", "launch", "notebooks", "tests", "benchmarks", ".ci")
    inside = [file for folder in folders for file in (repo_root / folder).rglob("*") if file.is_file()]
    files = [f for f in [*repo_root.glob("*"), *inside] if f.suffix in suffixes or f.name == "run"]
    absolute = re.compile(r"(?<![\w.:/$}-])/(?:work|tmp|root|home|Users|mnt)/\w")
    found = [
        f"{file.relative_to(repo_root)}:{number}: {line.strip()}"
        for file in files
        if "__pycache__" not in file.parts and file.is_file()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if absolute.search(line)
    ]
    assert len(files) > 50 and found == []


def test_the_checks_see_what_is_wrong(repo_root):
    text = "[a](docs/nowhere.md) [b](https://example.org/x) [c](#here) --config.optim.learning_rate=1 --config.seed=1."
    assert broken_links("README.md", text, repo_root) == ["README.md: docs/nowhere.md"]
    assert unknown_fields("x", text) == ["x: --config.optim.learning_rate"]


def test_the_example_of_the_readme_is_what_train_takes(repo_root, monkeypatch):
    import grpo_jax

    calls = []

    def train(config, dataset, rewards, workdir):
        calls.append((from_dict(config), dataset, rewards))
        return {"before": {"pass@1": 0.0}, "after": {"pass@1": 0.0}}

    monkeypatch.setitem(vars(grpo_jax), "train", train)
    (body,) = blocks(page(repo_root, "README.md"), "python")
    exec(compile(body, "README.md", "exec"), {})
    ((config, rows, (right,)),) = calls
    assert {config.data.prompt_column, config.data.answer_column} <= rows[0].keys()
    assert right(completions=["so <answer>12</answer>", "12"], prompts=["", ""], answer=["12", "12"]) == [1.0, 0.0]


def test_the_rewards_of_the_page_on_extending(repo_root, monkeypatch):
    import numpy as np

    from grpo_jax.rewards import verifiers

    host, in_graph, _ = blocks(page(repo_root, "docs/extending.md"), "python")
    names: dict = {}
    exec(compile(host, "extending.md", "exec"), names)
    texts = ["<answer>7</answer>", "<answer>9</answer>", "seven"]
    assert names["close"](completions=texts, answer=["7", "7", "7"]) == [1.0, 1 / 3, None]
    assert names["brief"](completions=["", "abc"]) == [0.0, -0.03]

    monkeypatch.setattr(verifiers, "REWARDS", dict(verifiers.REWARDS))
    exec(compile(in_graph, "extending.md", "exec"), {})
    padded = np.array([list(b"ab\0\0"), list(b"a7\0\0"), list(b"ab\x007")], np.uint8)  # the last 7 is beyond the text
    scores, valid = verifiers.REWARDS["no_digits"](padded, np.array([2, 2, 3]), {})
    assert scores.tolist() == [1.0, 0.0, 1.0] and valid.tolist() == [1.0, 1.0, 1.0]


def test_the_module_of_the_page_on_extending_learns(repo_root, cli_env, quick_compiles, tmp_path):
    body = blocks(page(repo_root, "docs/extending.md"), "python")[-1]
    # A user's own process with one device; compiling is what takes the time, so LLVM's optimisations are left out.
    env = cli_env | quick_compiles
    command = [sys.executable, "-W", "error", "-c", body]
    done = subprocess.run(command, env=env, cwd=tmp_path, timeout=350, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rewards = ast.literal_eval(done.stdout)
    assert len(rewards) == 20 and rewards[0] < 0.7 < 0.9 < rewards[-1]
