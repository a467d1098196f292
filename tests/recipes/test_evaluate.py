"""Held-out scores against numpy, and an evaluation that its batches cannot be seen in."""

import bigram
import numpy as np
import pytest
import tiny

from grpo_jax.data.prompts import build_prompt_set
from grpo_jax.recipes.evaluate import (
    Evaluator,
    bootstrap,
    majority_right,
    mean_language,
    summarise,
)
from grpo_jax.recipes.loop import Stopped
from grpo_jax.rewards.letters import language_share


def record(problem: int, right: bool, completion: str = "", answer: str = "5", **fields) -> dict:
    rewards = {"answer": float(right), "format": 0.0}
    made = {"problem": problem, "prompt": "2+3=", "answer": answer, "completion": completion, "rewards": rewards}
    return made | {"right": right, "length": 4, "ended": True} | fields


def test_pass_at_1_is_the_mean_over_problems_of_the_mean_over_samples():
    table = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1]])
    records = [
        record(
            problem, bool(table[problem, k]), length=problem + k, ended=k < 3, rewards={"answer": 0.0, "format": k / 4}
        )
        for problem in range(5)
        for k in range(4)
    ]
    found = summarise(records)
    assert found["pass@1"] == pytest.approx(table.mean(1).mean())
    assert found["mean_length"] == pytest.approx(np.mean([[p + k for k in range(4)] for p in range(5)]))
    assert found["truncated"] == 0.25
    assert found["format"] == pytest.approx(np.mean([0, 0.25, 0.5, 0.75]))
    assert (found["problems"], found["samples"]) == (5, 4)
    low, high = found["pass@1_ci95"]
    assert 0 < low < found["pass@1"] < high < 1


def test_the_interval_is_the_percentile_bootstrap_over_problems():
    """Against an independent bootstrap of many more draws, and against the normal law where that holds."""
    values = np.random.default_rng(3).beta(2, 3, 200)
    low, high = bootstrap(values)
    draws = np.random.default_rng(4).choice(values, (20_000, 200)).mean(1)
    error = values.std() / np.sqrt(200)
    assert abs(low - np.quantile(draws, 0.025)) < 0.2 * error
    assert abs(high - np.quantile(draws, 0.975)) < 0.2 * error
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert bootstrap(values) == (low, high), "the same numbers give the same interval"
    assert bootstrap(np.ones(7)) == (1.0, 1.0)


def test_problems_are_drawn_again_and_not_samples():
    """Two problems with 100 equal samples each are two numbers, not 200."""
    records = [record(problem, problem == 0) for problem in range(2) for _ in range(100)]
    assert summarise(records)["pass@1_ci95"] == [0.0, 1.0]


@pytest.mark.parametrize(
    "said, right",
    [
        (["<answer>5</answer>", "<answer>5</answer>", "<answer>6</answer>"], True),
        (["<answer>6</answer>", "<answer>5</answer>", "<answer>6</answer>"], False),
        (["<answer>5</answer>", "<answer>6</answer>"], True),
        (["<answer>6</answer>", "<answer>5</answer>"], False),
        (["no answer", "nor here", "<answer> 5 </answer>"], True),
        (["no answer", "nor here"], False),
    ],
    ids=["most", "outvoted", "tie-first", "tie-second", "only-answers-vote", "nobody-votes"],
)
def test_majority(said, right):
    assert majority_right([record(0, False, text, answer="5") for text in said]) is right


def test_majority_needs_three_votes_and_counts_problems():
    texts = {
        0: ["<answer>5</answer>"] * 2 + ["<answer>1</answer>"],
        1: ["<answer>1</answer>"] * 2 + ["<answer>5</answer>"],
    }
    records = [record(problem, "5" in text, text) for problem, said in texts.items() for text in said]
    assert summarise(records)["majority"] == 0.5
    assert "majority" not in summarise([r for r in records if r["completion"] != "<answer>1</answer>"][:2])


def test_lenient_takes_the_last_number_and_strict_does_not():
    records = [record(0, False, "it is 5"), record(1, False, "5 or 6"), record(2, True, "<answer>5</answer>")]
    found = summarise(records)
    assert found["pass@1"] == pytest.approx(1 / 3) and found["lenient"] == pytest.approx(2 / 3)
    assert "lenient" not in summarise([record(0, False, "five", answer="a word")])


def test_words_and_languages_are_counted():
    texts = ["Wait, 5. wait: ещё", "12+3=15"]
    records = [record(i, True, text, language=language_share(text, "en")) for i, text in enumerate(texts)]
    found = summarise(records, ("wait", "Check"))
    assert found["reflective_words"] == 1.0 and found["language"] == pytest.approx(2 / 3)
    assert "reflective_words" not in summarise(records) and "language" not in summarise(records[1:])
    assert mean_language(records[1:]) == {} and mean_language(records) == {"language": found["language"]}


def evaluator(prompts_per_step: int) -> Evaluator:
    config = tiny.config(**{"data.prompts_per_step": prompts_per_step})
    parts = bigram.parts(config)
    prompts = build_prompt_set(tiny.ROWS, tiny.encode, 7, lambda _: {})

    class Spelling:
        """As much of a tokenizer as an evaluator uses."""

        decode = staticmethod(tiny.decode)

    return Evaluator(parts, prompts, parts.scorer, Spelling())  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def variables() -> dict:
    return {"params": bigram.params()}


@pytest.fixture(scope="module")
def filled() -> Evaluator:
    """Takes two of the five rows at a time (8 completions over 4 samples), so that a third batch has a filler."""
    return evaluator(2)


def test_filler_rows_leave_no_record_and_batches_no_trace(filled, variables):
    records = filled.sample(variables, 5, 4, 1.0, 1.0, step=3)
    assert [r["problem"] for r in records] == [problem for problem in range(5) for _ in range(4)]
    assert [r["prompt"] for r in records[::4]] == [row["prompt"] for row in tiny.ROWS]
    assert len({r["completion"] for r in records}) > 15
    for r in records:
        ids = tiny.encode(r["completion"])
        assert len(ids) <= r["length"] <= 6
        assert r["ended"] or r["length"] == 6
        assert set(r["rewards"]) == {"odd", "long"}
        assert r["rewards"]["long"] == pytest.approx(r["length"] / 6)
        assert r["right"] == (r["rewards"]["odd"] >= 1)
    whole = evaluator(5).sample(variables, 5, 4, 1.0, 1.0, step=3)
    assert [(r["completion"], r["length"]) for r in whole] == [(r["completion"], r["length"]) for r in records]


def test_other_steps_draw_other_samples_and_fewer_problems_the_same(filled, variables):
    records = filled.sample(variables, 5, 4, 1.0, 1.0, step=3)
    assert filled.sample(variables, 3, 4, 1.0, 1.0, step=3) == records[:12]
    other = filled.sample(variables, 5, 4, 1.0, 1.0, step=4)
    assert sum(a["completion"] != b["completion"] for a, b in zip(records, other, strict=True)) > 10
    found, again = filled.measure(variables, 5, 4, 3)
    assert again == records and found == summarise(records)


def test_samples_drawn_a_few_at_a_time_are_those_drawn_at_once(filled, variables):
    """With a last part that is cut off, and with the number that `measure` takes, that of `eval.samples`."""
    at_once = filled.sample(variables, 5, 8, 1.0, 1.0, step=3)
    assert filled.sample(variables, 5, 8, 1.0, 1.0, step=3, group=3) == at_once
    assert len({r["completion"] for r in at_once}) > 30  # of 40; a part drawn twice would leave 20
    assert filled.parts.config.eval.samples < 8 and filled.measure(variables, 5, 8, 3)[1] == at_once
    before = set(filled._samplers)
    filled.measure(variables, 5, 6, 3)
    assert set(filled._samplers) == before, "other numbers of samples share a program"


def test_an_evaluation_can_be_ended_between_its_batches(filled, variables):
    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped("stopped while evaluating")

    with pytest.raises(Stopped, match="while evaluating"):
        filled.sample(variables, 5, 4, 1.0, 1.0, 3, between)
    assert len(calls) == 2
