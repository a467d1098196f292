"""The runner of stages: commands, what is done again and what is not, stops, and the report."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from grpo_jax import pipeline as pipelines
from grpo_jax.cli import check_command, load_config
from grpo_jax.config import Config, config_file
from grpo_jax.errors import InputError
from grpo_jax.pipeline import (
    Pipeline,
    Stage,
    check_commands,
    chosen_stages,
    command_of,
    dry_run,
    evaluation_of,
    read_pipeline,
    run,
)
from grpo_jax.recipes.pipeline_report import write_pipeline_report

FILE = pathlib.Path("recipe.py")
STAGES = (
    Stage("base", "Base", "base", model="{base}/model"),
    Stage("zero", "R1-Zero", "train", {"model.path": "{base}/model", "text.end_tokens": ("a", "b")}, model="{zero}"),
    Stage(
        "keep", "Rejection", "reject", options={"model": "{zero}", "set": ["train", "held_out"], "code_blocks": True}
    ),
    Stage("sft", "SFT", "sft", {"sft.path": "{keep}/chats.jsonl", "sft.steps": 3}),
)
EVALUATION = {"set": ["held_out"], "samples": 2, "seed": "{config.seed}", "no_greedy": False}


def recipe(stages=STAGES, **config):
    return Pipeline(FILE, "A recipe", tuple(stages), EVALUATION, Config(**config), ("--config.seed=3",))


class Fake:
    """In place of processes: notes what is started and leaves what the command would."""

    def __init__(self, workdir, stop_at="", fail_at=""):
        self.workdir, self.stop_at, self.fail_at, self.started = workdir, stop_at, fail_at, []

    def __call__(self, words, until, lock):
        folder = pathlib.Path(words[words.index("--workdir") + 1])
        name = folder.relative_to(self.workdir).as_posix()
        self.started.append(name)
        if name == self.fail_at:
            return 2, False
        if name == self.stop_at:
            return 0, True
        folder.mkdir(parents=True, exist_ok=True)
        if words[3] in ("base", "sft"):
            (folder / "model").mkdir()
        else:
            sums = {"title": "sums", "pass@1": 0.5, "pass@1_ci95": [0.4, 0.6], "tokens": 7}
            (folder / "summary.json").write_text(json.dumps({"sets": {"held_out": sums}}))
        return 0, False


ALL = ["base", "base/evaluation", "zero", "zero/evaluation", "keep", "sft"]


def test_commands_name_folders_and_fields():
    given, here = recipe(seed=3), pathlib.Path("w")
    assert command_of(given, STAGES[1], here) == [
        *("train", "--config", "recipe.py", "--config.seed=3", "--config.model.path=w/base/model"),
        *("--config.text.end_tokens=('a', 'b')", "--workdir", "w/zero"),
    ]
    words = command_of(given, STAGES[2], here)
    assert words[:-2] == ["reject", "--model", "w/zero", "--set", "train", "--set", "held_out", "--code_blocks"]
    assert evaluation_of(given, STAGES[0], here) == [
        *("eval", "--model", "w/base/model", "--set", "held_out", "--samples", "2", "--seed", "3"),
        *("--workdir", "w/base/evaluation"),
    ]
    assert evaluation_of(given, STAGES[3], here) == []


def test_braces_that_name_no_stage_are_doubled():
    sets = ({"name": "a", "path": "{zero}/a.jsonl", "more": {"b": ("{{c}}", 1)}},)
    stage = Stage("rl", "RL", "train", {"data.sets": sets}, {"form": "<think>{{zero}}</think>"})
    assert pipelines.reads(stage) == {"zero"}
    words = command_of(recipe(), stage, pathlib.Path("w"))
    assert "--config.data.sets=({'name': 'a', 'path': 'w/zero/a.jsonl', 'more': {'b': ('{c}', 1)}},)" in words
    assert words[words.index("--form") + 1] == "<think>{zero}</think>"


def test_stages_run_in_order_and_once(tmp_path):
    fake = Fake(tmp_path)
    assert run(recipe(), tmp_path, STAGES, start=fake)
    assert fake.started == ALL
    assert run(recipe(), tmp_path, STAGES, start=fake) and fake.started == ALL
    record = json.loads((tmp_path / "pipeline.json").read_text())["stages"]
    assert all(record[stage.name]["made"] for stage in STAGES)
    assert "R1-Zero" in (tmp_path / "report.md").read_text()


def test_a_stopped_or_failed_stage_is_gone_on_with(tmp_path):
    assert not run(recipe(), tmp_path, STAGES, start=Fake(tmp_path, stop_at="zero"))
    with pytest.raises(InputError, match="stage zero ended with exit code 2"):
        run(recipe(), tmp_path, STAGES, start=Fake(tmp_path, fail_at="zero"))
    fake = Fake(tmp_path)
    assert run(recipe(), tmp_path, STAGES, start=fake) and fake.started == ALL[2:]


def test_a_command_that_leaves_nothing_is_not_finished(tmp_path):
    assert not run(recipe(), tmp_path, STAGES[:1], start=lambda *_, **__: (0, False))
    assert run(recipe(), tmp_path, STAGES[:1], start=Fake(tmp_path))


def test_again_keeps_what_was_made(tmp_path):
    run(recipe(), tmp_path, STAGES, start=Fake(tmp_path))
    fake = Fake(tmp_path)
    chosen = chosen_stages(recipe(), first="keep")
    assert run(recipe(), tmp_path, chosen, again=True, start=fake) and fake.started == ["keep", "sft"]
    assert sorted(path.name for path in (tmp_path / "replaced").iterdir()) == ["keep.1", "sft.1"]
    assert run(recipe(), tmp_path, chosen, again=True, start=fake)
    assert (tmp_path / "replaced" / "keep.2").is_dir()


def test_a_changed_stage_and_those_that_read_it_are_refused(tmp_path):
    run(recipe(), tmp_path, STAGES, start=Fake(tmp_path))
    changed = (*STAGES[:1], Stage("zero", "R1-Zero", "train", {"model.path": "{base}/model"}), *STAGES[2:])
    with pytest.raises(InputError, match="stage zero was made by another command.*--from zero --again"):
        run(recipe(changed), tmp_path, changed, start=Fake(tmp_path))
    with pytest.raises(InputError, match="stage sft was made"):  # through keep, which reads zero
        run(recipe(changed), tmp_path, changed[3:], start=Fake(tmp_path))
    with pytest.raises(InputError, match="stage base was made"):
        run(recipe(seed=4), tmp_path, STAGES, start=Fake(tmp_path))


def test_inputs_have_to_be_there(tmp_path):
    with pytest.raises(InputError, match="--from zero: reads base, which is not finished"):
        run(recipe(), tmp_path, chosen_stages(recipe(), only="zero"), start=Fake(tmp_path))


def test_a_folder_that_is_gone_is_made_again(tmp_path):
    run(recipe(), tmp_path, STAGES, start=Fake(tmp_path))
    shutil.rmtree(tmp_path / "keep")
    with pytest.raises(InputError, match="reads keep, which is not finished"):
        run(recipe(), tmp_path, STAGES[3:], start=Fake(tmp_path))
    fake = Fake(tmp_path)
    assert run(recipe(), tmp_path, STAGES, start=fake) and fake.started == ["keep"]


def test_one_pipeline_a_folder(tmp_path):
    def second(*_, **__):
        with pytest.raises(InputError, match="another pipeline is running"):
            run(recipe(), tmp_path, STAGES, start=Fake(tmp_path))
        return 2, False

    with pytest.raises(InputError, match="stage base"):
        run(recipe(), tmp_path, STAGES, start=second)


def test_a_process_is_asked_to_end_in_time(tmp_path):
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(1); time.sleep(60)"
    began = time.monotonic()
    with open(tmp_path / "lock", "w") as lock:
        assert pipelines._start([sys.executable, "-c", script], began + 1.0, lock.fileno()) == (0, True)
        assert pipelines._start([sys.executable, "-c", "raise SystemExit(3)"], began + 60, lock.fileno()) == (3, False)
    assert time.monotonic() - began < 30


def test_a_stage_holds_the_folder_when_its_pipeline_is_killed(tmp_path):
    with pipelines._alone(tmp_path) as lock:
        script = "import sys; print(sys.stdin.read())"
        left = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(InputError, match="another pipeline is running"), pipelines._alone(tmp_path):
        pass
    left.communicate(b"end", timeout=60)
    with pipelines._alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{'title': 'x'}", "has no 'stages'"),
        ("{'title': 'x', 'stages': []}", "names no stages"),
        ("{'title': 'x', 'stages': [{'name': 'a', 'title': 'A'}]}", "has no 'command'"),
        ("{'title': 'x', 'stages': [dict(A, command='fly')]}", "command='fly' is none of"),
        ("{'title': 'x', 'stages': [dict(A, name='A b')]}", "name='A b' must be new"),
        ("{'title': 'x', 'stages': [A, A]}", r"stages\[1\]: name='a' must be new"),
        ("{'title': 'x', 'stages': [dict(A, fields={'sft.path': '{b}/x'})]}", "reads {b}, which is no stage before"),
        ("{'title': 'x', 'stages': [dict(A, command='eval', fields={'seed': 1})]}", "eval reads no config"),
        ("{'title': 'x', 'stages': [dict(A, option={})]}", "has 'option', which is none of"),
    ],
)
def test_a_recipe_that_cannot_be_meant(tmp_path, given, says):
    file = tmp_path / "recipe.py"
    file.write_text(
        "A = {'name': 'a', 'title': 'A', 'command': 'train'}\ndef get_config(): ...\n"
        f"def get_pipeline():\n    return {given}\n"
    )
    with pytest.raises(InputError, match=says):
        read_pipeline(file, Config())


def test_dry_run_checks_and_prints_every_command(capsys, tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(
        "from grpo_jax.config import config_file, read_config_file\n"
        "def get_config(): return read_config_file(config_file('arithmetic'))\n"
    )
    given = Pipeline(file, "A recipe", STAGES, EVALUATION, Config())
    dry_run(given, tmp_path, check_command)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said if not line.startswith("#")] == [
        ["grpo-jax", word] for word in ("base", "eval", "train", "eval", "reject", "sft")
    ]
    wrong = Stage("zero", "R1-Zero", "train", {"optim.learning_rate": 1})
    with pytest.raises(InputError, match="stage zero: .*optim.learning_rate"):
        dry_run(Pipeline(file, "A recipe", (wrong,), {}, Config()), tmp_path, check_command)


@pytest.mark.parametrize("name", ["r1_toy", "r1_qwen2.5_1.5b"])
def test_the_recipes_that_come_with_the_package_are_made_of_commands_that_exist(name, tmp_path):
    file = config_file(name)
    given = read_pipeline(file, load_config(["--config", name])[1])
    check_commands(given, tmp_path, check_command)
    titles = [stage.title for stage in given.stages]
    assert {"R1-Zero", "Cold start", "Reasoning RL", "SFT from the base", "RL for all scenarios"} < set(titles)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"first": "fly"}, "--from fly: is no stage; there are base, zero"),
        ({"first": "sft", "last": "zero"}, "zero comes first"),
        ({"only": "sft", "last": "zero"}, "goes without"),
    ],
)
def test_stages_that_cannot_be_chosen(given, says):
    with pytest.raises(InputError, match=says):
        chosen_stages(recipe(), **given)


@pytest.fixture
def report(tmp_path) -> pathlib.Path:
    """The page of three stages, with a model's text in it that looks like HTML."""
    run(recipe(), tmp_path, STAGES, start=Fake(tmp_path))
    folder = tmp_path / "zero"
    lines = [{"step": i, "eval/pass@1": i / 9, "length/mean": 9.0, "tokens_per_second": 10.0} for i in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x | {"seconds/step": 2.0}) + "\n" for x in lines))
    (tmp_path / "keep" / "summary.json").write_text(
        json.dumps({"dropped": {"not right": 5, "cut off": 0}, "kept": 3, "completions": 8, "tokens": 100})
    )
    for name, text in (("base", "<script>alert(1)</script>"), ("zero", "1|2 <answer>3</answer>")):
        place = tmp_path / name / "evaluation" / "held_out"
        place.mkdir()
        row = {"problem": 0, "sample": 0, "question": "1+2=", "completion": text, "strict": float(name == "zero")}
        (place / "samples.jsonl").write_text(json.dumps(row) + "\n")
    return write_pipeline_report(tmp_path)


def test_the_report_shows_scores_filters_samples_and_costs(report):
    page = report.read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("<img ") == 2  # bars, and the curves of the one stage that has metrics
    text = report.with_name("report.md").read_text()
    assert "| sums | pass@1 | 50.0% [40.0%, 60.0%] | 50.0% [40.0%, 60.0%] |" in text
    assert "| Rejection | dropped: not right | 5 |" in text and "cut off" not in text
    assert "| R1-Zero | 0 s |  | 87 |" in text  # 4 steps of 20 tokens, 7 of the evaluation
    assert "(right) 1\\|2 \\<answer>3\\</answer>" in text and "(wrong) \\<script>" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_every_plot_of_the_report(report):
    """As it is, the page gives no message; with a script let in, each picture is found to have a size."""

    def opened(page: pathlib.Path) -> tuple[str, str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
        command = ["chromium", *flags, f"--user-data-dir={page.parent}/chromium", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.stdout, "".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    shown, said = opened(report)
    assert "Stages by benchmarks" in shown and not said
    text, counts = report.read_text(), "[...document.images].map(x => x.naturalWidth).join()"
    script = f"<script>onload = () => document.title = {counts}</script>"
    asked = report.with_name("asked.html")
    asked.write_text(text.replace("default-src 'none'", "script-src 'unsafe-inline'").replace("</body>", script))
    shown, said = opened(asked)
    title = shown[shown.index("<title>") + 7 : shown.index("</title>")]
    assert not said and len(title.split(",")) == text.count("<img ") > 0
    assert all(int(width) > 100 for width in title.split(",")), title
