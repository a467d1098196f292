"""The reward 'math': where answers are found, what is the same, and that nothing in an answer is ever run."""

import math
import time

import pytest
from attacks import attacks

from grpo_jax.rewards.host import HostRewards
from grpo_jax.rewards.mathematics import (
    SETUP,
    MathReward,
    exact_value,
    expected_answer,
    final_answer,
    verdict_at_once,
)
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.texts import TEXT_REWARDS


@pytest.fixture(scope="module")
def pool():
    made = Pool(2, SETUP)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("so \\boxed{12}", ("boxed", "12")),
        ("\\boxed{1} or \\boxed{\\frac{1}{2}}", ("boxed", "\\frac{1}{2}")),
        ("\\fbox{ 3 }", ("boxed", "3")),
        ("\\boxed{\\{1, 2\\}}", ("boxed", "\\{1, 2\\}")),
        ("\\boxed{12", ("last number", "12")),
        ("\\boxed{5} <answer>12</answer>", ("answer", "12")),
        ("<answer>it is $\\boxed{12}$.</answer>", ("boxed", "12")),
        ("<answer> x = 12 </answer>", ("answer", "x = 12")),
        ("<answer>12 and 13", ("last number", "13")),
        ("<think>\\boxed{3}</think> then 12", ("last number", "12")),
        ("half of 48 is 24\n#### 1,234\nmore 5", ("####", "1,234")),
        ("#### 3 #### 72", ("####", "72")),
        ("it costs $1,250.50 in all", ("last number", "1250.5")),
        ("nothing", None),
        ("", None),
        ("<answer></answer> 3", None),
    ],
)
def test_where_the_answer_is_found(text, want):
    assert final_answer(text) == want


def test_the_right_answer_may_be_a_worked_solution():
    assert expected_answer("Half of 48 is <<48/2=24>>24.\n#### 72") == "72"
    assert expected_answer("We get $\\boxed{\\frac12}$ after all.") == "\\frac12"
    assert expected_answer(" 7 ") == "7" and expected_answer(3.5) == "3.5" and expected_answer(None) == ""


@pytest.mark.parametrize(
    ("right", "given", "same"),
    [
        ("72", "72", True),
        ("72", "72.00", True),
        ("72", "$72$", True),
        ("72", "\\$72.", True),
        ("1000", "1,000", True),
        ("1{,}000", "1000", True),
        ("-3", "−3", True),
        ("1/2", "\\frac{1}{2}", True),
        ("0.5", "1/2", True),
        ("-\\dfrac{3}{4}", "-0.75", True),
        ("x + 1", "x+1", True),
        ("\\left( 1, 2 \\right]", "(1,2]", True),
        ("72", "73", False),
        ("72", "-72", False),
        ("72", "9" * 3000, False),
        ("1/3", "0.333", False),
        ("1/3", "0.333333", None),
        ("x+1", "1+x", None),
        ("50\\%", "0.5", None),
        ("1/0", "3", None),
    ],
)
def test_what_is_plain_at_once(right, given, same):
    assert verdict_at_once(right, given) is same


def test_exact_values_of_long_numbers_are_bounded():
    assert exact_value("9" * 64) == 10**64 - 1 and exact_value("9" * 65) is None
    assert exact_value("." + "0" * 63 + "1") is not None and exact_value("." + "0" * 64 + "1") is None
    assert exact_value("1e5") is None and exact_value("") is None and exact_value("-") is None


SAME = [
    ("\\frac{1}{2}", "\\frac12"),
    ("\\frac{1}{3}", "0.333333"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("5", "x=5"),
    ("5", "5\\text{ cm}"),
    ("5", "5 meters"),
    ("90", "90^\\circ"),
    ("50\\%", "0.5"),
    ("\\{1,2\\}", "\\{2, 1\\}"),
    ("1, 2", "2,1"),
    ("(0,1]", "(0, 1]"),
    ("(-\\infty,2)\\cup(3,4)", "(3,4) \\cup (-\\infty,2)"),
    ("[2,\\infty)", "x \\in [2,\\infty)"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("\\{3,-1\\}", "1 \\pm 2"),
    ("\\frac{7}{2}", "3\\frac{1}{2}"),
    ("1024", "2^{10}"),
]
UNLIKE = [
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("2\\sqrt{2}", "3"),
    ("(0,1)", "[0,1]"),
    ("\\{1,2\\}", "\\{1,3\\}"),
    ("(1,2)", "(2,1)"),
    ("50\\%", "0.05"),
    ("\\pi", "3.14"),
    ("x^2", "y^2"),
]


def test_answers_of_many_kinds(pool):
    reward = MathReward(pool, 120.0, 900.0)
    logged = {}
    pairs = SAME + UNLIKE
    got = reward(
        completions=[f"<answer>${given}$</answer>" for _, given in pairs] + ["<answer>1</answer>", "no"],
        answer=[f"${right}$" for right, _ in pairs] + ["", "\\sqrt{2}"],
        log_extra=logged.__setitem__,
        log_metric=logged.__setitem__,
    )
    wrong = [(pair, score) for pair, score in zip(pairs, got, strict=False) if score != (pair in SAME)]
    assert not wrong and got[-2:] == [None, 0.0]
    assert logged["math"][0].startswith("answer '$\\\\frac12$' is ") and logged["math"][-1].startswith(
        "no answer found"
    )
    assert logged["math"][-2] == "the row has no answer" and logged["math/timeouts"] == 0
    assert len(pool.pids()) <= 2
    # What was compared once is remembered.
    begin = time.process_time()
    assert reward(["\\boxed{\\sqrt{8}}"], ["2\\sqrt{2}"]) == [1.0] or time.process_time() - begin < 1


def test_gsm8k(shared_dir):
    import json

    lines = (shared_dir / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:300]]
    texts = [row["answer"] for row in rows]
    reward = MathReward(Pool(1, SETUP), 1.0, 10.0)
    assert reward(texts, texts) == [1.0] * 300  # a worked solution ends with its answer
    assert sum(reward(texts, texts[1:] + texts[:1])) < 30
    assert not reward.pool.pids()  # plain numbers need no worker


def test_attacks_do_nothing_and_end_in_time(pool, tmp_path):
    canary = tmp_path / "made"
    completions = attacks(canary)
    assert len(completions) >= 200 and sum(len(c) >= 900_000 for c in completions) >= 15
    inputs = {"completions": completions, "answer": ["12345.678"] * len(completions)}
    logged = {}
    begin = time.monotonic()
    scores = MathReward(pool, 0.5, 60.0)(**inputs, log_extra=logged.__setitem__, log_metric=logged.__setitem__)
    assert time.monotonic() - begin < 120 and scores == [0.0] * len(completions)
    assert not canary.exists() and len(pool.pids()) <= 2
    for name, twin in TEXT_REWARDS.items():
        begin = time.process_time()
        options = {"budget": 8} if name in ("overlong", "cosine") else {}
        ids = [[1, 2]] * len(completions)
        found = twin(prompts=[""] * len(ids), **inputs, completion_ids=ids, right=[False] * len(ids), **options)
        assert all(score is None or math.isfinite(score) for score in found), name
        assert time.process_time() - begin < 30, name
    assert not canary.exists()


def test_a_worker_refuses_what_parsing_never_needs(pool):
    said = {}
    for what in ("open('x', 'w')", "eval('1')", "__import__('os').fork()", "__import__('socket').socket()"):
        task = ("reward_functions:attempt", {"what": what})
        (reply,) = pool.run([task], 30.0)
        said[what] = reply.get("error", [str(reply)])[0]
    assert set(said.values()) == {"PermissionError"}, said


def test_as_a_host_reward(pool):
    rows = [{"prompt": "p", "answer": "\\frac{1}{2}"}, {"prompt": "q", "answer": "7"}]
    host = HostRewards({"math": MathReward(pool, 120.0, 300.0)}, rows, str, 300.0)
    values, record = host.score_texts(["\\boxed{2^{-1}}", "it is 8"], [[1], [2]])
    assert values.tolist() == [[1.0], [0.0]]
    assert [found["math"] for found in record.extra.values()] == [
        "boxed '2^{-1}' is '\\\\frac{1}{2}'",
        "last number '8' is not '7'",
    ]
