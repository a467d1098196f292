"""Summaries of chains: what becomes of a completion, by whom, in which form, and what is refused."""

import dataclasses
import io
import json

import pytest
import tiny
from gguf_writer import tokenizer_metadata
from judge_server import reply, serving

from grpo_jax.config import JudgeConfig
from grpo_jax.data.filters import FilterConfig
from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl
from grpo_jax.models.huggingface import write_folder
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import benchmark
from grpo_jax.recipes.benchmark import Drawer, Settings
from grpo_jax.recipes.loop import Stop
from grpo_jax.recipes.summaries import (
    DROPPED,
    SummaryConfig,
    after_thought,
    ask_model,
    ask_server,
    reasoning_of,
    summarise,
)
from grpo_jax.rewards.grading import Grader
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think> 2 and 3.\n</think> <answer>5</answer>", "2 and 3."),
        ("so</think> 5", "so"),
        ("2 and 3 <answer>5</answer>", "2 and 3"),
        ("It is \\boxed{5}.", "It is \\boxed{5}."),
        ("<answer>5</answer>", ""),
        ("<think></think> 5", ""),
        ("<think>a</think> b</think> 5", "a</think> b"),
    ],
)
def test_the_thought_of_a_completion(text, reasoning):
    assert reasoning_of(text) == reasoning
    assert after_thought("<think>a</think> b \n") == "b" and after_thought("b") == ""


@pytest.fixture(scope="module")
def grader():
    made = Grader(workers=1)
    yield made
    made.close()


def row(completion: str, answer: str = "5", **fields) -> dict:
    problem = {"id": "0", "kind": "math", "prompt": "2+3", "answer": answer}
    return {"prompt": "2+3", "completion": completion, "opening": "", "problem": problem} | fields


def summarised(rows, grader, tmp_path, settings=None, **options):
    config, settings = SummaryConfig(**({"by": "answer"} | options)), settings or Settings("m")
    terminal = Terminal(out=io.StringIO())
    found = summarise(rows, config, settings, FilterConfig(), grader, tmp_path, Stop(None), terminal)
    assert list(found.dropped) == list(DROPPED) and found.kept + sum(found.dropped.values()) == len(rows)
    return [r["answer_text"] for r in found.rows], {name: n for name, n in found.dropped.items() if n}


GOOD = "<think>2 and 3.</think> <answer>5</answer>"


def test_an_answer_is_the_summary_of_its_chain(grader, tmp_path):
    rows = [
        row(GOOD),
        row("<answer>5</answer>"),
        row("<think>2 <answer>and</answer> 3.</think> <answer>5</answer>"),
        row("3 да 2.</think> 5", opening="<think>\n", language="ru"),
        row("no short answer", problem={"kind": "code", "tests": {}}),
        row("2 и 3. <answer>5</answer>"),
    ]
    texts, dropped = summarised(rows, grader, tmp_path)
    assert texts == ["<think>2 and 3.</think>\n<answer>5</answer>", "<think>\n3 да 2.</think>\n<answer>5</answer>"]
    assert dropped == {
        "no reasoning": 1,
        "no summary": 1,
        "tags in reasoning or summary": 1,
        "summary in one language": 1,
    }


def test_form_and_sentences_are_options(grader, tmp_path):
    (tmp_path / "form.txt").write_text("|think|{reasoning}|sum|{summary}")
    sentences = ("The answer is \\boxed{{answer}}.", "ru=Ответ: \\boxed{{answer}}.")
    rows = [row(GOOD), row("<think>2 и 3: {}</think> 5", language="ru"), row("<think>{summary}</think> 5")]
    for form in ("|think|{reasoning}|sum|{summary}", str(tmp_path / "form.txt")):
        texts, dropped = summarised(rows, grader, tmp_path, form=form, sentences=sentences)
        assert texts == [
            "|think|2 and 3.|sum|The answer is \\boxed{5}.",
            "|think|2 и 3: {}|sum|Ответ: \\boxed{5}.",
            "|think|{summary}|sum|The answer is \\boxed{5}.",
        ]
        assert not dropped, "the form's own words have no language, and what a chain says is not filled in"


def test_a_worked_solution_gives_its_short_answer(grader, tmp_path):
    (text,), _ = summarised([row(GOOD, answer="Two and three. #### 5")], grader, tmp_path)
    assert text.endswith("\n<answer>5</answer>")


def test_a_server_summarises_once(grader, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")

    def content(body):
        asked = body["messages"][0]["content"]
        assert "[question]\n2+3\n" in asked and "[final answer]\n5\n" in asked
        return reply("<think>hm</think>Both add up to 5." if "2 and 3." in asked else "Six: 6")

    rows = [row(GOOD), row("<think>3 and 2.</think> 5"), row(GOOD)]
    with serving((200, {}, content)) as server:
        judge = JudgeConfig(url=server.url, model="m", retries=0)
        settings = dataclasses.replace(Settings("m"), judge=judge)
        texts, dropped = summarised(rows, grader, tmp_path, settings, by="judge")
        assert texts == ["<think>2 and 3.</think>\nBoth add up to 5.\n<answer>5</answer>"] * 2
        assert dropped == {"summary without the right answer": 1} and len(server.seen) == 2
    kept = (tmp_path / "summaries.jsonl").read_text()
    (tmp_path / "summaries.jsonl").write_text(kept + '{"key": "torn')
    assert summarised(rows, grader, tmp_path, settings, by="judge")[0] == texts, "the server is gone"
    assert (tmp_path / "summaries.jsonl").read_text() == kept
    with pytest.raises(InputError, match="--judge_url: .*: see that it runs; the same command goes on"):
        ask_server(["another"], judge, tmp_path / "summaries.jsonl")


def test_a_model_writes_greedily_through_the_sampler(tmp_path, monkeypatch):
    of = tiny.architecture(vocabulary=265, layers=1)
    write_folder(str(tmp_path / "model"), of, tiny.params(of), Tokenizer.from_gguf(tokenizer_metadata()))
    monkeypatch.setattr(benchmark, "make_mesh", lambda config, devices: make_mesh(config, devices[:1]))
    config = SummaryConfig("model", model=str(tmp_path / "model"), max_new_tokens=3)
    given = (config, Settings("m", temperature=1.0, batch_size=2), tmp_path / "out", Stop(None))
    terminal = Terminal(out=io.StringIO())
    replies = ask_model(["Sum up: a", "Sum up: b"], *given, terminal)
    (path,) = (tmp_path / "out").glob("*/samples.jsonl")
    records = read_jsonl(path)
    assert [(r["problem"], r["sample"], r["length"]) for r in records] == [(0, None, 3), (1, None, 3)]
    assert replies == ["", ""] and not any(r["ended"] for r in records), "what the limit cut off is no summary"
    settings = json.loads((path.parent / "settings.json").read_text())
    assert settings["template"] == "" and settings["instruction"] == "no"
    monkeypatch.setattr(Drawer, "_draw_missing", lambda *_: iter(()))
    for record in records:
        record["ended"] = True
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert ask_model(["Sum up: a", "Sum up: b"], *given, terminal) == [r["completion"] for r in records]
