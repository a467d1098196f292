"""The reward `code`: a completion's program passes the tests of its row, all of them or a share.

Everything of the completion runs in a sandbox (`sandbox`, or `monty`); this process reads bytes. Expected outputs of
programs are compared here; expected values of functions live in a sandbox that the completion is not in.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.config import CodeConfig
from grpo_jax.errors import InputError
from grpo_jax.rewards.monty import Monty, monty
from grpo_jax.rewards.sandbox import Bubblewrap, Limits, bubblewrap
from grpo_jax.rewards.texts import Completion, text_of

LANGUAGES = {"python": "python", "py": "python", "python3": "python", "c": "c", "cpp": "cpp", "c++": "cpp", "cc": "cpp"}
FENCE = re.compile(r"^[ \t]*+```[ \t]*+([\w+]*+)[^\n]*+\n(.*?)^[ \t]*+```", re.MULTILINE | re.DOTALL)
FORMS = "{'inputs', 'outputs'}, {'function', 'inputs', 'outputs'} or {'function', 'code'}"


@dataclasses.dataclass(frozen=True)
class Tests:
    """The tests of a row.

    Attributes:
      language: of programs whose fence does not tell: python, c or cpp.
      programs: (input, expected output) of each run; empty for tests of a function.
      function: its name; empty for tests of a program.
      given: what the sandbox's checker reads, as JSON: {"function", "calls"} or {"function", "setup", "statements"}.
      count: how many tests.
      setup: source that stands before the completion's.
    """

    language: str
    programs: tuple[tuple[bytes, str], ...]
    function: str
    given: bytes
    count: int
    setup: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Tests passed, how many there are, and why the first one failed."""

    passed: int
    count: int
    why: str


@dataclasses.dataclass(frozen=True, eq=False)
class CodeReward:
    """The reward function, with TRL's signature; the column `tests` says what a program must do.

    Attributes:
      config: its options.
      sandbox: where programs run.
      limits: what each run may use.
    """

    config: CodeConfig
    sandbox: Bubblewrap | Monty
    limits: Limits

    def __call__(self, completions: Sequence[Completion], tests: Sequence[Any], **columns: Any) -> list[float | None]:
        """1 where all tests pass, or the share that does; None where the row has no tests."""
        parsed = [read_tests(value, "column 'tests'") for value in tests]
        with concurrent.futures.ThreadPoolExecutor(parallel_runs(self.config)) as pool:
            return list(pool.map(self._score, map(text_of, completions), parsed))

    def _score(self, text: str, tests: Tests | None) -> float | None:
        if tests is None:
            return None
        verdict = self.judge(text, tests)
        share = verdict.passed / verdict.count
        return share if self.config.score == "share" else float(verdict.passed == verdict.count)

    def judge(self, text: str, tests: Tests) -> Verdict:
        """How a completion does."""
        code, language = program_of(text, tests.language)
        program = f"{tests.setup}{code}".encode(errors="replace")
        if not code.strip():
            return Verdict(0, tests.count, "no program")
        if tests.function:
            if language != "python":
                return Verdict(0, tests.count, f"a function in {language}: only python's are called")
            reasons, problem = self.sandbox.call(program, tests.given, self.limits)
            passed = sum(not why for why in reasons[: tests.count])
            why = next((why for why in reasons if why), "") or problem
            return Verdict(passed, tests.count, why if passed < tests.count else "")
        return self._judge_program(program, language, tests)

    def _judge_program(self, program: bytes, language: str, tests: Tests) -> Verdict:
        if language != "python":
            if not isinstance(self.sandbox, Bubblewrap) or language not in self.sandbox.compilers:
                return Verdict(0, tests.count, f"no compiler for {language} here")
            built = self.sandbox.build(program, language, self.limits)
            if built.problem:
                return Verdict(0, tests.count, f"compiling: {_last_line(built.errors) or built.problem}")
            program = built.output
        passed, first = 0, ""
        for number, (given, expected) in enumerate(tests.programs, start=1):
            done = self.sandbox.run(program, given, self.limits, language)
            why = f"{done.problem}: {_last_line(done.errors)}".strip(": ") if done.problem else ""
            if not why and lines_of(done.output.decode(errors="replace")) != lines_of(expected):
                why = f"other output: {done.output[:80]!r}"
            passed += not why
            first = first or (why and f"test {number}: {why}")
            if why and self.config.score == "all":
                break
        return Verdict(passed, tests.count, first)


def code_reward(config: CodeConfig, rows: Sequence[Mapping[str, Any]]) -> CodeReward:
    """The reward, its sandbox tried out; raises InputError where it does not isolate and for unreadable tests."""
    parsed = [read_tests(row.get("tests"), f"dataset row {i}: column 'tests'") for i, row in enumerate(rows)]
    if rows and not any(parsed):
        raise InputError(f"rewards.names: 'code' needs a column 'tests' ({FORMS}), which no row of the dataset has")
    languages = {tests.language for tests in parsed if tests is not None and not tests.function}
    return CodeReward(config, *_place(config, frozenset(languages)))


@functools.cache
def _place(config: CodeConfig, languages: frozenset[str]) -> tuple[Bubblewrap | Monty, Limits]:
    limits = Limits(
        config.seconds, config.memory_mb << 20, config.threads, config.files_mb << 20, config.output_kb << 10
    )
    if config.sandbox == "monty":
        return monty(limits, parallel_runs(config)), limits
    return bubblewrap(languages, limits), limits


def parallel_runs(config: CodeConfig) -> int:
    """Completions judged at once."""
    return config.parallel or os.cpu_count() or 1


def program_of(text: str, language: str) -> tuple[str, str]:
    """The program of a completion and its language: the last closed fence after the thought, or all of that text.

    A thought ends at the last `</think>`. A fence's own word, where it is a known language, comes first.
    """
    text = text.rpartition("</think>")[2]
    fences = FENCE.findall(text)
    if not fences:
        return text, language
    word, code = fences[-1]
    return code, LANGUAGES.get(word.lower(), language)


def read_tests(value: Any, where: str) -> Tests | None:
    """The tests that a row's column holds, as an object or as JSON text; None for an empty one; raises InputError."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}): give {FORMS}") from None
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is a {type(value).__name__}: give {FORMS}")
    # Names that known datasets use: APPS and TACO have fn_name, HumanEval entry_point, test and prompt.
    function = value.get("function") or value.get("fn_name") or value.get("entry_point") or ""
    code, setup = value.get("code", value.get("test")), value.get("setup", value.get("prompt")) or ""
    language = LANGUAGES.get(str(value.get("language", "python")).lower())
    if language is None:
        raise InputError(f"{where} has language={value['language']!r}, not one of {', '.join(sorted(set(LANGUAGES)))}")
    if not (function or code) or (code is None):
        return _tests_of_values(value, where, str(function), language, str(setup))
    statements = list(code) if isinstance(code, list | tuple) else [code]
    if not function or not statements or not all(isinstance(item, str) for item in statements):
        raise InputError(f"{where} has 'code' but no 'function' or no text of it: give {FORMS}")
    given = {"function": function, "setup": setup, "statements": statements}
    return Tests("python", (), str(function), json.dumps(given).encode(), len(statements), str(setup))


def _tests_of_values(value: Mapping[str, Any], where: str, function: str, language: str, setup: str) -> Tests:
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
        inputs, outputs = (), ()
    if not inputs:
        raise InputError(f"{where} has no 'inputs' and 'outputs' of one length: give {FORMS}")
    if function:
        if not all(isinstance(args, list | tuple) for args in inputs):
            raise InputError(f"{where}: each of 'inputs' must be a list of arguments of {function!r}")
        given = {"function": function, "calls": [list(pair) for pair in zip(inputs, outputs, strict=True)]}
        return Tests("python", (), function, json.dumps(given).encode(), len(inputs), setup)
    if not all(isinstance(text, str) for text in [*inputs, *outputs]):
        raise InputError(f"{where}: 'inputs' and 'outputs' of a program must be texts; give 'function' for values")
    pairs = tuple((given.encode(errors="replace"), expected) for given, expected in zip(inputs, outputs, strict=True))
    return Tests(language, pairs, "", b"", len(pairs), setup)


def lines_of(output: str) -> list[str]:
    """What outputs are compared by: lines without blanks at their ends, no empty lines at the end of all."""
    return [line.rstrip() for line in output.rstrip().split("\n")]


def _last_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
