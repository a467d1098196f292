"""pydantic-monty as the place where code runs: an interpreter of a part of Python, in worker processes, for any system.

It has no files, network, processes or system calls to reach, and needs no rights, so it runs where bubblewrap cannot.
It knows a part of the language and a few modules, so a right solution may fail: `docs/code_rewards.md` has figures.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable
from typing import Any

from grpo_jax.errors import InputError
from grpo_jax.rewards.inside import WHY, as_json, decode, encode
from grpo_jax.rewards.sandbox import Limits, Outcome

RECURSION = 900  # its own limit of 1000, less what a call costs
SUSPENSIONS = 100_000  # calls out of the sandbox: lines of input, calls between the two sessions


@dataclasses.dataclass(frozen=True, eq=False)
class Monty:
    """The sandbox's calls on sessions of pydantic-monty; `pool` is its pool of workers."""

    pool: Any
    module: Any

    def run(self, program: bytes, stdin: bytes, limits: Limits, language: str = "python") -> Outcome:
        """A program's outcome; it reads its input by `input()`."""
        lines = iter(stdin.decode(errors="replace").splitlines())
        said = self.module.CollectString(limits.output)

        def read(prompt: str = "") -> str:
            return next(lines)

        problem = ""
        with self._session(limits) as session:
            try:
                session.feed_run(program.decode(errors="replace"), external_lookup={"input": read}, print_callback=said)
            except self.module.MontyError as error:
                problem = f"{type(error).__name__}: {error}"[:WHY]
        return Outcome(problem, said.output.encode(errors="replace"), b"")

    def call(self, program: bytes, tests: bytes, limits: Limits) -> tuple[list[str], str]:
        """Tests that call functions of a program, why each failed; the tests run in a session of their own."""
        given = json.loads(tests)
        silent = self.module.CollectString(limits.output)
        with self._session(limits) as session, self._session(limits) as checker:

            def remote(*args: Any, **kwargs: Any) -> Any:
                inputs = {"given_args": list(args), "given_kwargs": kwargs}
                call = f"{given['function']}(*given_args, **given_kwargs)"
                return decode(encode(session.feed_run(call, inputs=inputs, print_callback=silent)))

            try:
                session.feed_run(program.decode(errors="replace"), print_callback=silent)
            except self.module.MontyError as error:
                return [], f"{type(error).__name__}: {error}"[:WHY]
            made = self._calls(given, remote) if "calls" in given else self._statements(given, remote, checker, silent)
            reasons = []
            for test in made:
                try:
                    reasons.append(test())
                except Exception as error:
                    reasons.append(f"{type(error).__name__}: {error}"[:WHY])
            return reasons, ""

    def _calls(self, given: dict[str, Any], remote: Callable[..., Any]) -> list[Callable[[], str]]:
        def test(args: Any, expected: Any) -> Callable[[], str]:
            def run() -> str:
                found = remote(*args)
                return "" if as_json(found) == as_json(expected) else f"{args!r} gave {found!r}, not {expected!r}"[:WHY]

            return run

        return [test(args, expected) for args, expected in given["calls"]]

    def _statements(
        self, given: dict[str, Any], remote: Callable[..., Any], checker: Any, silent: Any
    ) -> list[Callable[[], str]]:
        name = given["function"]

        def test(code: str) -> Callable[[], str]:
            def run() -> str:
                checker.feed_run(
                    f"{given['setup']}\n{name} = candidate_function", external_lookup=names, print_callback=silent
                )
                whole = f"{code}\ncheck(candidate_function)" if "def check(" in code else code
                checker.feed_run(whole, external_lookup=names, print_callback=silent)
                return ""

            return run

        names = {"candidate": remote, "candidate_function": remote}
        return [test(code) for code in given["statements"]]

    def _session(self, limits: Limits) -> Any:
        return self.pool.checkout(
            limits={
                "max_feed_duration_secs": limits.seconds,
                "max_memory": limits.memory,
                "max_recursion_depth": RECURSION,
                "max_suspensions": SUSPENSIONS,
                "max_total_sleep_secs": limits.seconds,
            }
        )


def monty(limits: Limits, parallel: int) -> Monty:
    """A pool of workers, tried out; raises InputError where the package is missing or does not work."""
    where = "rewards.code.sandbox='monty'"
    try:
        module = importlib.import_module("pydantic_monty")
    except ImportError as error:
        raise InputError(f"{where}: {error}: pip install pydantic-monty") from error
    # A completion holds two sessions at most: its own and that of its tests.
    pool = module.Monty(max_processes=2 * parallel, request_timeout=limits.wall)
    made = Monty(pool.__enter__(), module)
    done = made.run(b"print(input())", b"probe\n", limits)
    if done.problem or done.output != b"probe\n":
        raise InputError(f"{where}: its worker fails ({done.problem or done.output!r}): reinstall pydantic-monty")
    return made
