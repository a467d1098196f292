"""`grpo-jax eval`: scores against counting by hand, and runs that are ended, taken up again and enlarged."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tiny
from gguf_writer import tokenizer_metadata

from grpo_jax import cli
from grpo_jax.config import CodeConfig, MeshConfig, from_dict
from grpo_jax.errors import InputError
from grpo_jax.models.huggingface import write_folder
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import benchmark
from grpo_jax.recipes.benchmark import Drawer, Settings, read_sets, resolved, run
from grpo_jax.recipes.benchmark_scores import powers, scores_of
from grpo_jax.recipes.evaluate import answer_classes, bootstrap, majority, pass_at_k
from grpo_jax.recipes.loop import Stopped
from grpo_jax.rewards.mathematics import verdict_at_once
from grpo_jax.text import Tokenizer


def same(pairs):
    return {pair: verdict_at_once(*pair) is True for pair in pairs}


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, k):
    drawn = [1] * right + [0] * (5 - right)
    subsets = list(itertools.combinations(drawn, k))
    assert pass_at_k(5, right, k) == pytest.approx(np.mean([max(subset) for subset in subsets]))


def test_pass_at_k_is_unbiased_and_bounded():
    random = np.random.default_rng(0)
    estimates = [pass_at_k(8, int(random.binomial(8, 0.3)), 4) for _ in range(4000)]
    assert np.mean(estimates) == pytest.approx(1 - 0.7**4, abs=0.02)
    for k in (0, 9):
        with pytest.raises(ValueError, match="must lie between"):
            pass_at_k(8, 1, k)


def test_answers_are_counted_by_what_they_are_worth():
    groups = [["1/2", "3", "0.5", None, "3.0", "\\frac{1}{2}"], [None, None], ["7", "7.0", "x"]]
    classes = answer_classes(groups, same)
    assert classes == [["1/2", "3", "1/2", None, "3", "1/2"], [None, None], ["7", "7", "x"]]
    # As strings every one of them stands alone, and the first drawn would win by luck.
    assert [majority(group) for group in classes] == ["1/2", None, "7"]
    assert majority(["b", "a", "a", "b"]) == "b" and majority([]) is None


def record(problem: int, sample: int | None, strict: float, answer: str | None = None, **fields) -> dict:
    made = {"problem": problem, "sample": sample, "strict": strict, "lenient": strict, "answer": answer}
    made |= {"parts": (), "asked": True, "format": 0.0, "language": 1.0, "length": 10, "ended": True, "seconds": 0.5}
    return made | fields


def test_scores_of_a_set_by_hand():
    problems = [{"kind": "math", "answer": "0.5"}, {"kind": "math", "answer": "#### 7"}]
    said = [["1/2", "3", "3.0", "0.50"], ["8", "7", "7.0", None]]
    right = [[1, 0, 0, 1], [0, 1, 1, 0]]
    records = [
        record(
            p,
            s,
            float(right[p][s]),
            said[p][s],
            lenient=float(s != 1),
            length=10 + s,
            ended=s != 3,
            format=s / 3,
            language=s / 4 if p else None,
        )
        for p in range(2)
        for s in range(4)
    ] + [record(0, None, 1.0, length=100), record(1, None, 0.0, lenient=1.0)]
    found = scores_of(problems, records, same)
    assert (found["problems"], found["samples"], found["pass@1"], found["lenient"]) == (2, 4, 0.5, 0.75)
    assert found["pass@1_ci95"] == list(bootstrap(np.array([0.5, 0.5]))) == [0.5, 0.5]
    assert found["pass@k"] == {"1": 0.5, "2": pytest.approx(1 - 1 / 6), "4": 1.0}
    # Problem 0: one half and three have two votes each, one half was drawn first. Problem 1: seven has two of three.
    assert found["cons"] == 1.0 and found["cons@k"] == {"4": 1.0}
    assert (found["greedy"], found["greedy_lenient"], round(found["format"], 9)) == (0.5, 1.0, 0.5)
    assert found["language"] == (0 + 1 + 2 + 3) / 16, "completions without a word have no say"
    assert (found["mean_length"], found["truncated"], found["tokens"]) == (11.5, 0.25, 92 + 110)
    assert found["length_right"] == np.mean([10, 13, 11, 12]) and found["length_wrong"] == np.mean([11, 12, 10, 13])
    assert found["seconds"] == 5.0


def test_majority_at_smaller_k_is_the_mean_over_blocks():
    answers = ["1", "1", "2", "2", "2", "2", "1", "2"]
    found = scores_of([{"kind": "choice", "answer": "2"}], [record(0, i, 0.0, a) for i, a in enumerate(answers)], same)
    assert found["cons@k"] == {"4": 0.5, "8": 1.0} and found["cons"] == 1.0  # of two and two the first drawn wins
    assert powers(6) == [1, 2, 4, 6] and powers(1) == [1]


def test_a_majority_of_exact_answers_goes_by_their_text():
    """Beside a problem whose answers are one where they are equal in value."""
    problems = [{"kind": "exact", "answer": "1-3"}, {"kind": "math", "answer": "0.5"}]
    said = [["1-3", "-2", "-2", "1-3", "1-3"], ["1/2", "0.50", "3", "3", ".5"]]
    records = [record(p, s, 0.0, said[p][s]) for p in range(2) for s in range(5)]
    assert scores_of(problems, records, same)["cons"] == 1.0
    wrong = [{"kind": "exact", "answer": "-2"}, problems[1]]
    assert scores_of(wrong, records, same)["cons"] == 0.5


def test_own_rows_keep_their_kind_and_language():
    config = from_dict({"data": {"source": "tasks", "path": "sums,countdown:en,ru"}})
    (found,) = read_sets(Settings("model", ("held_out",), problems=4), config)
    shown = [(problem["kind"], problem["language"]) for problem in found.problems]
    assert shown == [("math", "en"), ("math", "ru"), ("exact", "en"), ("exact", "ru")]


def test_what_does_not_apply_is_left_out():
    rules = [{"kind": "instructions", "rules": [{}, {}]}, {"kind": "instructions", "rules": [{}]}]
    records = [record(0, 0, 0.0, parts=(0.5, 1.0)), record(1, 0, 1.0, parts=(1.0, 1.0))]
    found = scores_of(rules, records, same)
    assert found["instructions_strict"] == pytest.approx(2 / 3) and found["instructions_loose"] == 1.0
    assert not {"cons", "cons@k", "greedy"} & set(found)
    programs = [record(0, i, 1.0, language=None) for i in range(4)]
    assert not {"cons", "language"} & set(scores_of([{"kind": "code"}], programs, same))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny byte-level model and a file of problems."""
    where = tmp_path_factory.mktemp("benchmark")
    of = tiny.architecture(vocabulary=265, layers=1)
    write_folder(str(where / "model"), of, tiny.params(of), Tokenizer.from_gguf(tokenizer_metadata()))
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in ((1, 2), (3, 40), (5, 6))]
    (where / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


@pytest.fixture(scope="module")
def settings(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "make_mesh", lambda config, devices: make_mesh(config, devices[:1]))
        patch.setattr(benchmark, "CHUNK", 2)
        yield Settings(
            model=str(folder / "model"),
            sets=(f"jsonl={folder / 'sums.jsonl'}",),
            samples=4,
            max_new_tokens=4,
            template="plain",
            batch_size=4,
            temperature=1.0,
            top_p=1.0,
        )


@pytest.fixture(scope="module")
def whole(folder, settings):
    """An evaluation that nothing ended."""
    summary = run(settings, folder / "whole")
    return folder / "whole", summary


def lines(workdir):
    rows = [json.loads(line) for line in (workdir / "sums" / "samples.jsonl").read_text("utf-8").split("\n") if line]
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return sorted(timeless, key=lambda row: (row["problem"], row["sample"] is None, row["sample"]))


def timeless(summary):
    return {name: {k: v for k, v in s.items() if k != "seconds"} for name, s in summary["sets"].items()}


def test_a_run_leaves_samples_summary_and_reports(whole, capsys):
    workdir, summary = whole
    rows = lines(workdir)
    assert [(r["problem"], r["sample"]) for r in rows] == [(p, s) for p in range(3) for s in (0, 1, 2, 3, None)]
    assert len({r["completion"] for r in rows if r["sample"] is not None}) > 8  # 12 draws at temperature 1
    scores = summary["sets"]["sums"]
    assert (scores["problems"], scores["samples"], scores["title"], scores["kind"]) == (3, 4, "sums", "math")
    assert {"pass@1", "pass@1_ci95", "lenient", "greedy", "cons", "format", "language", "mean_length"} <= set(scores)
    assert set(scores["pass@k"]) == {"1", "2", "4"} and scores["tokens"] == sum(r["length"] for r in rows)
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    page, text = (workdir / "report.html").read_text("utf-8"), (workdir / "report.md").read_text("utf-8")
    assert "image/svg+xml" in page and "<script" not in page and "Content-Security-Policy" in page
    assert "| sums | 3 x 4 |" in text and "pass@1" in text


def test_nothing_is_drawn_again(whole, settings, monkeypatch):
    workdir, summary = whole
    before = (workdir / "sums" / "samples.jsonl").read_bytes()

    def refuse(self, prompts):
        raise AssertionError("the model was wanted")

    monkeypatch.setattr(Drawer, "_evaluator", refuse)
    assert run(settings, workdir) == summary
    assert (workdir / "sums" / "samples.jsonl").read_bytes() == before
    fewer = run(dataclasses.replace(settings, samples=2, problems=2), workdir)["sets"]["sums"]
    assert (fewer["problems"], fewer["samples"]) == (2, 2)
    assert (workdir / "sums" / "samples.jsonl").read_bytes() == before


def test_ended_and_enlarged_runs_come_to_the_same(whole, settings, folder, monkeypatch):
    """Fewer samples first, then an end in the middle of a line and of a chunk, then all."""
    workdir, summary = whole
    again = folder / "again"
    run(dataclasses.replace(settings, samples=1, greedy=False), again)
    assert len(lines(again)) == 3
    calls = itertools.count()

    def check(self, where, needed=0.0):
        if next(calls) == 2:
            raise Stopped(f"stopped by SIGTERM {where}")

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.Stop, "check", check)
        with pytest.raises(Stopped, match="while evaluating sums; all samples are kept"):
            run(settings, again)
    assert 3 < len(lines(again)) < 15
    with open(again / "sums" / "samples.jsonl", "a") as file:
        file.write('{"problem": 1, "sam')
    assert timeless(run(settings, again)) == timeless(summary)
    assert lines(again) == lines(workdir)


def test_kept_completions_are_graded_anew_on_request(whole, settings, folder):
    workdir, summary = whole
    made = folder / "regraded" / "sums"
    made.mkdir(parents=True)
    (made / "settings.json").write_text((workdir / "sums" / "settings.json").read_text())
    rows = [row | {"seconds": 0.1, "ended": True} for row in lines(workdir)]
    for row in rows:
        if row["sample"] in (0, 3):
            row["completion"] = {0: "\\boxed{3}", 1: "it is 43", 2: "\\boxed{12}"}[row["problem"]]
    (made / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(settings, made.parent)["sets"]["sums"]["pass@1"] == summary["sets"]["sums"]["pass@1"]
    found = run(dataclasses.replace(settings, rescore=True), made.parent)["sets"]["sums"]
    assert found["pass@1"] == pytest.approx(2 / 12) and found["lenient"] == pytest.approx(4 / 12)
    assert found["pass@k"]["4"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, "sums: holds samples with temperature=1.0, this asks for 0.5: name another --workdir"),
        ({"system_prompt": "Be brief."}, "holds samples with system_prompt=''"),
        ({"sets": ()}, "--set: name a set: aime_2024, "),
        ({"sets": ("held_out",)}, "--set held_out: needs a run whose rows"),
        ({"sets": ("jsonl=a/sums.jsonl", "jsonl=b/sums.jsonl")}, "does not exist"),
        ({"samples": -1}, "--samples -1: must be at least 0"),
        ({"top_p": 0.0}, "--top_p 0.0: must be"),
        ({"language": "xx"}, "--language xx: is not one of"),
        ({"dtype": "int8"}, "--dtype int8: is not one of float32, bfloat16"),
        ({"instruction": "maybe"}, "--instruction maybe: is not one of auto, yes, no"),
    ],
)
def test_refused_before_anything_is_sampled(whole, settings, monkeypatch, change, message):
    monkeypatch.setattr(Drawer, "__init__", None)
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(settings, **change), whole[0])


def test_another_file_under_the_same_name_is_refused(whole, settings, folder):
    other = folder / "other" / "sums.jsonl"
    other.parent.mkdir()
    other.write_text('{"question": "9+9", "answer": "18"}\n')
    with pytest.raises(InputError, match="problem 0 had another prompt: name another --workdir"):
        run(dataclasses.replace(settings, sets=(f"jsonl={other}",)), whole[0])


def test_a_run_is_taken_as_it_was_trained(micro_run, settings, tmp_path):
    """Its newest checkpoint, its template and its own held-out rows."""
    asked = dataclasses.replace(
        settings, model=str(micro_run), sets=(), template="", problems=2, samples=2, greedy=False
    )
    filled, config = resolved(asked)
    assert config is not None and filled.template == config.text.template
    assert filled.model.startswith(str(micro_run / "checkpoints"))
    (held_out,) = read_sets(filled, config)
    assert [p["answer"] == str(sum(map(int, p["prompt"].rstrip("=").split("+")))) for p in held_out.problems] == [
        True
    ] * 2
    found = run(asked, tmp_path)["sets"]["held_out"]
    assert (found["problems"], found["samples"]) == (2, 2) and 1 <= found["mean_length"] <= 4


def test_the_command_hands_on_all_its_options(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(benchmark, "run", lambda settings, workdir: calls.append((settings, workdir)))
    monkeypatch.setattr(cli, "_set_up_jax", lambda *_: None)
    given = {"samples": 3, "problems": 2, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7, "template": "plain"}
    given |= {
        "system_prompt": "s",
        "instruction": "no",
        "language": "de",
        "batch_size": 5,
        "dtype": "bfloat16",
        "seed": 4,
    }
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    more = [
        "--set",
        "gsm8k=x",
        "--set",
        "held_out",
        "--end_token",
        "<e>",
        "--no_greedy",
        "--rescore",
        "--sandbox",
        "monty",
    ]
    mesh = ["--fsdp", "2", "--tensor", "4"]
    assert cli.main(["eval", "--model", "runs/a", *options, *more, *mesh]) == 0
    ((settings, workdir),) = calls
    rest = {"sets": ("gsm8k=x", "held_out"), "end_tokens": ("<e>",), "greedy": False, "rescore": True}
    rest |= {"mesh": MeshConfig(fsdp=2, tensor=4), "code": CodeConfig(sandbox="monty")}
    assert settings == Settings(model="runs/a", **given, **rest) and str(workdir) == "runs/eval_a"
    assert cli.main(["eval", "--model", "m"]) == 0 and calls[1][0] == Settings(model="m")
