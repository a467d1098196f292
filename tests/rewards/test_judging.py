"""Judges outside of the step: over HTTP and in this process, and the grades that they lead to."""

import dataclasses

import pytest
from judge_server import says, serving

from grpo_jax.config import JudgeConfig, ModelJudgeConfig
from grpo_jax.errors import InputError
from grpo_jax.rewards import judging
from grpo_jax.rewards.grading import Grade, Grader
from grpo_jax.rewards.judging import Verdict, open_judge

PROBLEMS = [
    {"id": "0", "kind": "judge", "prompt": "Greet <me>"},
    {"id": "1", "kind": "judge", "prompt": [{"role": "user", "content": "Poem!"}], "answer": "rhymes"},
]
NO_SERVER, NO_MODEL = JudgeConfig(), ModelJudgeConfig()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


def test_a_server_reads_prompt_reference_and_completion():
    def verdict(body):
        text = body["messages"][0]["content"]
        return says("Hello" in text.partition("[answer to judge]")[2], "polite" if "rhymes" in text else "rude")

    with serving((200, {}, verdict)) as server:
        judge = open_judge(JudgeConfig(url=server.url, model="m"), NO_MODEL)
        assert judge is not None and not server.seen
        assert judge(PROBLEMS, ["Hello", "Go"]) == [Verdict(1.0, "rude"), Verdict(0.0, "polite")]


def test_a_server_that_fails_is_one_line(monkeypatch):
    with serving((401, {}, "")) as server:
        judge = open_judge(JudgeConfig(url=server.url, model="m"), NO_MODEL)
        with pytest.raises(InputError, match="--judge_url: .*HTTP 401.*: see that it runs; the same command goes on"):
            judge(PROBLEMS, ["Hello", "Go"])


def test_a_model_in_this_process_reads_the_same(monkeypatch):
    asked = []

    @dataclasses.dataclass
    class Model:
        path: str

        def generate(self, prompts, **options):
            asked.append((self.path, prompts, options))
            return [['{"analysis": "kind", "correctness": true}'], ["no verdict"]]

    monkeypatch.setattr(judging, "load", Model)
    judge = open_judge(NO_SERVER, ModelJudgeConfig(path="folder", max_new_tokens=9))
    assert judge is not None and not asked
    assert judge(PROBLEMS, ["a {answer}", "b"]) == [Verdict(1.0, "kind"), Verdict(None, "")]
    ((path, prompts, options),) = asked
    assert path == "folder" and options == {"max_new_tokens": 9, "temperature": 0.0}
    assert "Greet <me>" in prompts[0] and "a {answer}" in prompts[0], "what a completion says is not filled in"
    assert "Poem!" in prompts[1] and "rhymes" in prompts[1]


@pytest.mark.parametrize(
    ("server", "model", "message"),
    [
        (JudgeConfig(url="u"), NO_MODEL, "--judge_url u: name the model on that server: --judge_model"),
        (JudgeConfig(url="u", model="m"), ModelJudgeConfig(path="f"), "--judge_url u and --judge_folder f: name one"),
        (NO_SERVER, ModelJudgeConfig(path="f", prompt="nowhere"), "prompt='nowhere': no such file"),
    ],
)
def test_judges_that_cannot_be_meant(server, model, message):
    with pytest.raises(InputError, match=message):
        open_judge(server, model)


def test_a_judge_grades_what_rules_cannot():
    verdicts = [Verdict(1.0, "right"), Verdict(0.6, "nearly"), Verdict(0.2, "wrong"), Verdict(None, "")]
    grader = Grader(workers=1, judge=lambda problems, texts: verdicts)
    try:
        problems = [PROBLEMS[0]] * 4
        grader.check(problems, "--set a")
        found = grader.grade([*problems, {"kind": "choice", "answer": "B"}], ["x"] * 4 + ["\\boxed{B}"], [True] * 5)
    finally:
        grader.close()
    assert [(g.strict, g.lenient, g.asked, g.analysis) for g in found[:4]] == [
        (1.0, 1.0, True, "right"),
        (0.0, 1.0, True, "nearly"),
        (0.0, 0.0, True, "wrong"),
        (0.0, 0.0, False, ""),
    ]
    assert found[4] == Grade(1.0, 1.0, True, "B"), "and nothing else"
    assert open_judge(NO_SERVER, NO_MODEL) is None
    with pytest.raises(InputError, match="--set a: problem 0 has no answer .*: add one, or name a judge"):
        Grader(workers=1).check(problems, "--set a")
