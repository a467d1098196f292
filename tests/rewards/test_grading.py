"""Strict and lenient grades of evaluation problems; all golden answers of GSM8K."""

import shutil
import time

import pytest

from grpo_jax.data.benchmarks import read_benchmark
from grpo_jax.rewards.grading import Grader, grade_choice, loose_answers


@pytest.fixture(scope="module")
def grader():
    made = Grader(workers=1)
    yield made
    made.close()


def math(answer: str) -> dict:
    return {"id": "0", "kind": "math", "prompt": "", "answer": answer}


def test_golden_answers_of_gsm8k_are_right_and_the_next_ones_wrong(shared_dir, grader):
    path = shared_dir / "data" / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip("no data/gsm8k/test.jsonl in ../shared")
    problems = read_benchmark("gsm8k", str(path))
    golden = [problem["answer"] for problem in problems]
    assert len(problems) == 1319
    own = grader.grade(problems, golden, [True] * 1319)
    assert [(g.strict, g.lenient) for g in own] == [(1.0, 1.0)] * 1319
    others = grader.grade(problems, golden[1:] + golden[:1], [True] * 1319)
    # Read anew, by characters alone: which problems have the answer of the next one.
    plain = [text.rpartition("####")[2].strip().replace(",", "") for text in golden]
    equal = [a == b for a, b in zip(plain, plain[1:] + plain[:1], strict=True)]
    assert [(g.strict, g.lenient) for g in others] == [(float(same), float(same)) for same in equal]
    assert 0 < sum(equal) < 30


@pytest.mark.parametrize(
    ("right", "text", "strict", "lenient"),
    [
        ("\\frac{1}{2}", "So \\boxed{0.5}.", 1, 1),
        ("\\frac{1}{2}", "<think>0.3</think> <answer>1/2</answer>", 1, 1),
        ("5", "It is 5.", 0, 1),
        ("5", "It is 5, or 6.", 0, 0),
        ("5", "The box: \\boxed{5}. I checked 3 times.", 1, 1),
        ("5", "<answer>5 apples</answer>", 1, 1),  # math-verify leaves units out
        ("5", "\\boxed{5} <answer>none</answer>", 0, 1),
        ("5", "<think>\\boxed{5}", 1, 1),
        ("25", "answer: 025 #### 025", 1, 1),
        ("5", "", 0, 0),
        ("5", "\\boxed{", 0, 0),
    ],
)
def test_math(grader, right, text, strict, lenient):
    (grade,) = grader.grade([math(right)], [text], [True])
    assert (grade.strict, grade.lenient) == (strict, lenient)
    (cut,) = grader.grade([math(right)], [text], [False])
    assert (cut.strict, cut.lenient) == (0, lenient)


def test_what_votes(grader):
    texts = ["\\boxed{7}", "so 8", "nothing", "<answer>9</answer>"]
    grades = grader.grade([math("7")] * 4, texts, [True] * 4)
    assert [g.answer for g in grades] == ["7", "8", None, "9"]
    assert loose_answers("\\boxed{3} then 4") == ("3", "4")
    assert grader.same({("1/2", "0.5"), ("1", "2")}) == {("1/2", "0.5"): True, ("1", "2"): False}


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("\\boxed{B}", 1, 1),
        ("\\boxed{\\text{B}}", 1, 1),
        ("<think>A or C</think><answer>(b)</answer>", 1, 1),
        ("The answer is B.", 0, 1),
        ("The correct answer is: **(B)**", 0, 1),
        ("I think A at first. Answer: B", 0, 1),
        ("A, then B", 0, 1),
        ("\\boxed{A} though the answer is B", 0, 0),
        ("As a result, Bob wins", 0, 0),
        ("", 0, 0),
    ],
)
def test_choice(text, strict, lenient):
    grade = grade_choice({"answer": "B"}, text)
    assert (grade.strict, grade.lenient) == (strict, lenient)


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("<think>8-3+2=7</think><answer>8-3+2</answer>", 1, 1),
        ("<answer> 8-3+2\n</answer>", 1, 1),
        ("<answer>7</answer>", 0, 0),  # the value is not the expression
        ("<answer>8+2-3</answer>", 0, 0),
        ("<think>x</think><answer>8-3+2", 0, 1),  # not closed
        ("8-3+2", 0, 1),
        ("", 0, 0),
    ],
)
def test_exact(grader, text, strict, lenient):
    problem = {"id": "0", "kind": "exact", "prompt": "", "answer": "8-3+2"}
    (grade,) = grader.grade([problem], [text], [True])
    assert (grade.strict, grade.lenient, grade.asked) == (strict, lenient, "</answer>" in text)


def test_instructions_strict_and_loose(grader):
    problem = {"id": "0", "kind": "instructions", "prompt": ""}
    problem["rules"] = [{"rule": "punctuation:no_comma"}, {"rule": "startend:end_checker", "end_phrase": "Bye."}]
    texts = ["Well. Bye.", "Sure, here it is\nWell. Bye.", "Well, bye", "<think>a, b</think>\nWell. Bye."]
    found = grader.grade([problem] * 4, texts, [True] * 4)
    assert [(g.strict, g.lenient) for g in found] == [(1, 1), (0, 1), (0, 0), (1, 1)]
    assert [g.parts for g in found] == [(1, 1), (0.5, 1), (0, 0), (1, 1)]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")
def test_code_in_a_closed_fence_or_not(grader):
    problem = {"id": "0", "kind": "code", "prompt": "", "tests": {"inputs": ["2\n"], "outputs": ["4\n"]}}
    program = "print(2 * int(input()))\n"
    texts = [f"```python\n{program}```", program, "```python\nprint(5)\n```"]
    grader.check([problem], "here")
    found = grader.grade([problem] * 3, texts, [True] * 3)
    assert [(g.strict, g.lenient, g.answer) for g in found] == [(1, 1, None), (0, 1, None), (0, 0, None)]


def test_kinds_may_be_mixed_in_a_batch(grader):
    choice = {"id": "1", "kind": "choice", "prompt": "", "answer": "C"}
    found = grader.grade([choice, math("3"), choice], ["\\boxed{C}", "\\boxed{3}", "\\boxed{3}"], [True] * 3)
    assert [g.strict for g in found] == [1, 1, 0]


def test_hostile_choices_take_linear_time():
    start = time.process_time()
    for text in ("answer " * 200_000, "A" * 10**6, "answer is " + "*" * 10**6, "\\boxed{" * 10**5):
        grade_choice({"answer": "B"}, text)
    assert time.process_time() - start < 5
