"""The reward 'math': the final answer of a completion against the right one.

Numbers are compared here, exactly. Everything else (LaTeX, sets, intervals, units, percent) goes to math-verify, in
worker processes that are killed at their time limit. No text is evaluated. math-verify is asked for LaTeX alone, which
it parses by a grammar. Both its way for plain expressions and its way for digits end in sympy's `parse_expr`, which
evaluates: the first is never taken, and for the second the workers have a reader of numbers in its place. They refuse
to evaluate text, to start processes, to write files and to open connections.
"""

import collections
import os
import re
import resource
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.texts import WHITESPACE, Completion, answer_span, expected_text, last_number, text_of

SETUP = "grpo_jax.rewards.mathematics:confine"
COMPARE = "grpo_jax.rewards.mathematics:compare"
ANSWER_LIMIT = 2000  # characters; a longer answer is wrong
MEMORY_LIMIT = 4 * 2**30  # bytes of a worker's address space
ROUNDING = Fraction(1, 10**5)
REMEMBERED = 2**16  # verdicts that are kept: a group often gives one answer many times
# Files that generate code, out of numbers of variables and names of fields.
GENERATORS = ("sympy/polys/monomials.py", "/dataclasses.py", "/collections/__init__.py")
MARK = "####"
_DIGITS = r"[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+"
_NUMBER = re.compile(rf"(?P<sign>[-+−]?)\s*\\?\$?\s*(?P<whole>{_DIGITS})?(?:\.(?P<part>[0-9]+))?\Z")
_FRACTION = re.compile(r"(?P<sign>-?)(?:\\[dt]?frac\{(\d{1,64})\}\{(\d{1,64})\}|(\d{1,64})/(\d{1,64}))\Z", re.ASCII)
_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;!: ]|\\displaystyle|\s+")


def final_answer(text: str) -> tuple[str, str] | None:
    """(where it was found, the answer) of a text; None where there is nothing to compare.

    Looked for in the last closed `<answer>` where there is one, else after the thinking: the last boxed answer,
    what follows the last `####` on its line, the whole of the answer span, the last number.
    """
    span = answer_span(text)
    place = text.rpartition("</think>")[2] if span is None else span
    if (boxed := last_boxed(place)) is not None:
        return "boxed", boxed
    if MARK in place:
        return "####", place.rpartition(MARK)[2].strip(WHITESPACE).partition("\n")[0].strip(WHITESPACE)
    if span:
        return "answer", span
    number = last_number(place)
    return None if number is None else ("last number", number)


def last_boxed(text: str) -> str | None:
    """What stands in the last LaTeX box (boxed or fbox); None without one, and where its braces do not close."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for match in re.finditer(r"\\[{}]|[{}]", text[begin:]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[begin : begin + match.start()].strip(WHITESPACE)
    return None


def expected_answer(value: Any) -> str:
    """The right answer of a row: in its last box, after its last `####`, or all of it."""
    text = expected_text(value)
    boxed = last_boxed(text)
    return boxed if boxed is not None else text.rpartition(MARK)[2].strip(WHITESPACE)


def exact_value(text: str) -> Fraction | None:
    """The value of an integer, decimal or fraction of integers, of at most 64 digits each; None for all other texts."""
    text = normal(text)
    if match := _FRACTION.match(text):
        above, below = (int(digits) for digits in match.groups()[1:] if digits is not None)
        return (-1 if match["sign"] else 1) * Fraction(above, below) if below else None
    match = _NUMBER.match(text) if len(text) <= 140 else None
    if match is None or not (match["whole"] or match["part"]):
        return None
    whole, part = re.sub(r"[^0-9]", "", match["whole"] or "0"), match["part"] or ""
    if max(len(whole), len(part)) > 64:
        return None
    return (1 if match["sign"] in ("", "+") else -1) * Fraction(int(whole + part), 10 ** len(part))


def normal(text: str) -> str:
    """A text without dollar signs around it, a full stop after it, spacing and the size of brackets."""
    text = text.strip(WHITESPACE)
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)]
    return _NOISE.sub("", text.removesuffix("."))


def verdict_at_once(right: str, given: str) -> bool | None:
    """Whether the answers are the same, where that is plain: equal texts, or numbers; None where it is not.

    Numbers that are nearly the same may have been rounded, and math-verify is asked.
    """
    if len(given) > ANSWER_LIMIT:
        return False
    if normal(right) == normal(given):
        return True
    values = exact_value(right), exact_value(given)
    if values[0] is None or values[1] is None:
        return None
    apart = abs(values[0] - values[1])
    return True if apart == 0 else False if apart > ROUNDING else None


class MathReward:
    """1.0 where the final answer is the right one, None where the row has no answer.

    `log_extra` gets what was compared and how; a comparison beyond its time limit is wrong, and counted.
    """

    def __init__(self, pool: Pool, timeout: float, total: float):
        self.pool, self.timeout, self.total = pool, timeout, total
        self._known: collections.OrderedDict[tuple[str, str], bool] = collections.OrderedDict()

    def __call__(
        self,
        completions: Sequence[Completion],
        answer: Sequence[Any],
        log_extra: Any = None,
        log_metric: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores of a batch."""
        rights = [expected_answer(value) for value in answer]
        found = [final_answer(text_of(completion)) for completion in completions]
        pairs = {(right, given[1]) for right, given in zip(rights, found, strict=True) if right and given}
        verdicts, late = self.compare(pairs)
        scores: list[float | None] = []
        reasons = []
        for right, given in zip(rights, found, strict=True):
            good = bool(given) and verdicts.get((right, given[1]), False)
            scores.append(float(good) if right else None)
            reasons.append(_reason(right, given, good, late))
        if log_extra is not None:
            log_extra("math", reasons)
        if log_metric is not None:
            log_metric("math/timeouts", len(late))
        return scores

    def compare(self, pairs: set[tuple[str, str]]) -> tuple[dict[tuple[str, str], bool], set[tuple[str, str]]]:
        """Whether each (right, given) is the same, and those that took too long."""
        verdicts = {pair: self._known[pair] if pair in self._known else verdict_at_once(*pair) for pair in pairs}
        open_ = sorted(pair for pair, verdict in verdicts.items() if verdict is None)
        tasks = [(COMPARE, {"right": right, "given": given}) for right, given in open_]
        # Some of the time that the whole call has is left for all else.
        replies = self.pool.run(tasks, self.timeout, 0.9 * self.total) if tasks else []
        late = {pair for pair, reply in zip(open_, replies, strict=True) if "timeout" in reply}
        verdicts |= {p: reply.get("scores") == [1.0] for p, reply in zip(open_, replies, strict=True)}
        made = {pair: bool(verdict) for pair, verdict in verdicts.items()}
        self._known.update({pair: made[pair] for pair in open_})
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return made, late


def _reason(right: str, given: tuple[str, str] | None, good: bool, late: set[tuple[str, str]]) -> str:
    if not right:
        return "the row has no answer"
    if given is None:
        return f"no answer found; right is {right!r}"
    if (right, given[1]) in late:
        return f"{given[0]} {given[1][:200]!r} took too long to compare with {right!r}"
    return f"{given[0]} {given[1][:200]!r} {'is' if good else 'is not'} {right!r}"


def compare(right: str, given: str) -> list[float]:
    """Whether math-verify takes two answers for the same; runs in a worker.

    It removes units, and takes 50% for 0.5 and for 50; decimals agree to 6 digits.
    """
    from math_verify import verify

    parsed = [_parsed(text) for text in (right, given)]
    # The worker is killed at the time limit: math-verify's own needs signals.
    return [float(all(parsed) and verify(parsed[0], parsed[1], timeout_seconds=None))]


def _parsed(text: str) -> list[Any]:
    from math_verify.parser import LatexExtractionConfig, parse

    boxed = f"\\boxed{{{normal_for_latex(text)}}}"
    only = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(boxed, only, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]


def normal_for_latex(text: str) -> str:
    """The text without what would end or start the LaTeX environment that it is put into."""
    text = text.strip(WHITESPACE).removesuffix(".")
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)]
    return text


def confine() -> None:
    """Prepares a worker: loads math-verify, bounds its memory and takes away what it has no use for."""
    import logging

    import sympy.integrals.manualintegrate
    import sympy.parsing.sympy_parser
    import sympy.physics.units

    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)  # math-verify logs what it cannot parse, and that we switch its timer off
    # What sympy loads when it is first used it must load now: some of it reads names by evaluating them.
    for right, given in (("(0,1]", "x \\in (0, 1]"), ("x^2+2x+1", "(x+1)^2"), ("\\int_0^1 x dx", "50\\% \\text{ cm}")):
        compare(right, given)
    # sympy.Number reads even digits by evaluating them.
    sympy.parsing.sympy_parser.parse_expr = _read_number
    # The grammar prints what it cannot read; that fails where the trainer's stderr is a file and files have no size.
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)


def _read_number(text: str, *_: Any, **__: Any) -> Any:
    """What workers have in place of sympy's `parse_expr`: digits and a decimal point, nothing else."""
    from sympy import Float, Integer

    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text):
        raise SyntaxError(f"{text[:80]!r} is no number")
    return Integer(text) if text.isdigit() else Float(text)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuses what parsing never needs; an audit hook, which cannot be taken away again."""
    if event == "open":
        mode, flags = arguments[1:3]
        if (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(f"a math worker does not write: {arguments[0]!r}")
    elif event in ("compile", "exec") and not sys._getframe(1).f_code.co_filename.endswith(GENERATORS):
        code = str(arguments[1]) if event == "compile" else str(arguments[0].co_filename)
        if code.startswith("<"):
            raise PermissionError("a math worker does not evaluate text")
    elif event.startswith(("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.", "socket.")):
        raise PermissionError(f"a math worker does not start or connect: {event}")
    elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.kill"):
        raise PermissionError(f"a math worker does not touch files or processes: {event}")
