"""Strict and lenient verdicts on completions of evaluation problems, and the answers that a majority counts.

Strict wants the answer where it was asked for: in a box, in `<answer>`, after `####`, a program in a closed fence.
Lenient also takes it from elsewhere in the completion. A completion that its length cut off is never strictly right.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.config import CodeConfig, RewardsConfig
from grpo_jax.errors import InputError
from grpo_jax.rewards import mathematics
from grpo_jax.rewards.code import FENCE, code_reward, read_tests
from grpo_jax.rewards.instructions import check_rules, follows, follows_loosely
from grpo_jax.rewards.judging import Judge
from grpo_jax.rewards.mathematics import MathReward, expected_answer, final_answer, last_boxed
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.texts import answer_span, choice_letter, expected_text, last_number

KINDS = ("math", "choice", "exact", "code", "instructions", "judge")
THOUGHT_END = "</think>"
_NAMED = re.compile(r"(?i:\b(?:answer|choice|option)\b)[^A-Za-z\n]{0,8}(?i:is\b)?[^A-Za-z\n]{0,8}([A-J])(?![A-Za-z'])")
_ALONE = re.compile(r"(?<![A-Za-z'])([A-J])(?![A-Za-z'])")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")

Problem = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Grade:
    """Verdicts on a completion.

    Attributes:
      strict: 1 where it is right in the way that was asked for, else 0.
      lenient: 1 where it is right in some way, else 0; never below strict.
      asked: whether an answer stands where it was asked for, right or wrong.
      answer: what it answers, for a majority; None where it answers nothing, and for code and instructions.
      parts: shares of instructions that are followed, strictly and loosely; empty for other kinds.
      analysis: a judge's reasons; empty for other kinds.
    """

    strict: float
    lenient: float
    asked: bool
    answer: str | None = None
    parts: tuple[float, ...] = ()
    analysis: str = ""


class Grader:
    """Grades completions by the kind of their problem; owns the worker processes that compare answers.

    `judge` grades problems of the kind 'judge': where rules do not apply.
    """

    def __init__(
        self,
        code: CodeConfig | None = None,
        workers: int = 0,
        math_timeout: float | None = None,
        judge: Judge | None = None,
    ):
        self._code, self._judge = code or CodeConfig(), judge
        self._pool = Pool(workers, mathematics.SETUP)
        timeout = RewardsConfig().math_timeout if math_timeout is None else math_timeout
        self._math = MathReward(self._pool, timeout, float("inf"))

    def check(self, problems: Sequence[Problem], where: str) -> None:
        """Raises InputError for problems that cannot be graded (no judge, no sandbox), before any sampling."""
        for problem in problems:
            at = f"{where}: problem {problem['id']}"
            if problem["kind"] == "code":
                read_tests(problem["tests"], at)
            elif problem["kind"] == "instructions":
                check_rules(problem["rules"], at)
            elif problem["kind"] == "judge" and self._judge is None:
                raise InputError(f"{at} has no answer that rules compare: add one, or name a judge (--judge_url)")
        programs = [problem for problem in problems if problem["kind"] == "code"]
        if programs:
            code_reward(self._code, programs)

    def grade(self, problems: Sequence[Problem], texts: Sequence[str], ended: Sequence[bool]) -> list[Grade]:
        """One grade a completion."""
        grades: list[Grade] = [Grade(0.0, 0.0, False)] * len(texts)
        by_kind = {"math": self._grade_math, "code": self._grade_code, "judge": self._grade_judged}
        for kind, grade in by_kind.items():
            chosen = [i for i, problem in enumerate(problems) if problem["kind"] == kind]
            made = grade([problems[i] for i in chosen], [texts[i] for i in chosen]) if chosen else []
            for i, found in zip(chosen, made, strict=True):
                grades[i] = found
        for i, (problem, text) in enumerate(zip(problems, texts, strict=True)):
            if problem["kind"] == "choice":
                grades[i] = grade_choice(problem, text)
            elif problem["kind"] == "exact":
                grades[i] = grade_exact(problem, text)
            elif problem["kind"] == "instructions":
                grades[i] = grade_instructions(problem, text)
        pairs = zip(grades, ended, strict=True)
        return [grade if done else dataclasses.replace(grade, strict=0.0) for grade, done in pairs]

    def same(self, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        """Whether the answers of each pair are equivalent."""
        return self._math.compare(pairs)[0]

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()

    def _grade_math(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        rights = [expected_answer(problem["answer"]) for problem in problems]
        found = [final_answer(text) for text in texts]
        loose = [loose_answers(text) for text in texts]
        given = zip(rights, found, loose, strict=True)
        pairs = {(right, answer) for right, one, others in given for answer in (*others, *(one or ())[1:])}
        verdicts = self.same(pairs)
        grades = []
        for right, one, others in zip(rights, found, loose, strict=True):
            where, given = one or ("", None)
            asked = given is not None and where != "last number"
            strict = given is not None and asked and verdicts[right, given]
            lenient = strict or any(verdicts[right, other] for other in others)
            grades.append(Grade(float(strict), float(lenient), asked, given))
        return grades

    def _grade_code(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        reward = code_reward(dataclasses.replace(self._code, score="all"), problems)
        passed = [bool(value) for value in reward(texts, [problem["tests"] for problem in problems])]
        fenced = [FENCE.search(text.rpartition(THOUGHT_END)[2]) is not None for text in texts]
        return [Grade(float(good and fence), float(good), fence) for good, fence in zip(passed, fenced, strict=True)]

    def _grade_judged(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        """Strict: the judge is sure; lenient: it finds it rather right; no verdict: neither, and not `asked`."""
        assert self._judge is not None, "check comes first"
        grades = []
        for verdict in self._judge(problems, texts):
            says = -1.0 if verdict.correctness is None else verdict.correctness
            grades.append(Grade(float(says >= 1), float(says >= 0.5), says >= 0, analysis=verdict.analysis))
        return grades


def loose_answers(text: str) -> tuple[str, ...]:
    """What a text may answer: its last number, and its last box wherever it stands."""
    place = text.rpartition(THOUGHT_END)[2]
    found = (final_answer(text) or (None, None))[1], last_number(place), last_boxed(text)
    return tuple(dict.fromkeys(answer for answer in found if answer))


def grade_choice(problem: Problem, text: str) -> Grade:
    """Strict wants the letter in `<answer>` or in a box; lenient takes one that is named, or the last on its own."""
    right = str(problem["answer"]).strip().upper()
    place = text.rpartition(THOUGHT_END)[2]
    span = answer_span(text)
    asked = last_boxed(span if span is not None else place) or span
    letter = choice_letter(_TEXT.sub(r"\1", asked).strip()) if asked else None
    strict = letter.upper() if letter else None
    lenient = strict or next((m[-1] for p in (_NAMED, _ALONE) if (m := p.findall(place))), None)
    return Grade(float(strict == right), float(lenient == right), strict is not None, lenient)


def grade_exact(problem: Problem, text: str) -> Grade:
    """Strict wants the text in `<answer>` to be the answer; lenient takes all that follows the thought, tags or not."""
    right, span = expected_text(problem["answer"]), answer_span(text)
    place = text.rpartition(THOUGHT_END)[2].strip().removeprefix("<answer>").strip()
    loose = place if span is None else span
    return Grade(float(span == right), float(loose == right), span is not None, span or None)


def grade_instructions(problem: Problem, text: str) -> Grade:
    """1 where all rules are followed; of a response with a thought or an `<answer>`, what comes after or inside."""
    place = text.rpartition(THOUGHT_END)[2].strip()
    span = answer_span(place)
    response = place if span is None else span
    rules = problem["rules"]
    strict = [follows(rule, response) for rule in rules]
    # The response as it is comes among the loose forms, so loose is never below strict.
    loose = [follows_loosely(rule, response) for rule in rules]
    shares = (sum(strict) / len(rules), sum(loose) / len(rules))
    return Grade(float(all(strict)), float(all(loose)), bool(response), None, shares)
