"""Verdicts of a judge on completions outside of the step: over HTTP, or by a model in this process.

Both answer with JSON, {"analysis": ..., "correctness": ...}, as in DeepSeek-R1's third stage.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.config import JudgeConfig, ModelJudgeConfig
from grpo_jax.errors import InputError
from grpo_jax.generate import load
from grpo_jax.rewards.judge import JudgeError, JudgeReward, Retry, parse_verdict
from grpo_jax.rewards.model_judge import question_of, texts_in, verdict_of
from grpo_jax.rewards.texts import Completion


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says: correctness from 0 to 1, None where it said neither; and why."""

    correctness: float | None
    analysis: str


Judge = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], list[Verdict]]  # of problems and completions


def open_judge(server: JudgeConfig, model: ModelJudgeConfig) -> Judge | None:
    """The judge that is named, or None; nothing is asked and no weights are read before its first call.

    Raises InputError for two of them, a server without a model's name, and files that cannot be used.
    """
    if server.url and model.path:
        raise InputError(f"--judge_url {server.url} and --judge_folder {model.path}: name one judge")
    if server.url:
        check_server(server)
        return functools.partial(_over_http, JudgeReward(server))
    return functools.partial(_in_process, _Loaded(model), question_of(model)) if model.path else None


def check_server(server: JudgeConfig) -> None:
    """Raises InputError for an address without a model's name."""
    if not server.model:
        raise InputError(f"--judge_url {server.url}: name the model on that server: --judge_model NAME")


def _over_http(reward: JudgeReward, problems: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Verdict]:
    logged: dict[str, list[str]] = {}
    answers = [problem.get("answer") for problem in problems]
    try:
        found = reward([p["prompt"] for p in problems], texts, answers, log_extra=logged.__setitem__)
    except JudgeError as error:
        raise InputError(f"--judge_url: {error}: see that it runs; the same command goes on") from error
    return [Verdict(*pair) for pair in zip(found, logged["judge"], strict=True)]


class _Loaded:
    """A judge's model, read when it is first asked."""

    def __init__(self, config: ModelJudgeConfig):
        self.config = config

    @functools.cached_property
    def model(self) -> Any:
        return load(self.config.path)


def _in_process(
    judge: _Loaded, question: str, problems: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> list[Verdict]:
    """Greedy verdicts of a model; its own chat template, special tokens in what it reads as plain text."""
    asked = [
        texts_in(
            question,
            {
                "{prompt}": _plain_prompt(problem["prompt"]),
                "{answer}": str(problem.get("answer") or ""),
                "{completion}": text,
            },
        )
        for problem, text in zip(problems, texts, strict=True)
    ]
    said = judge.model.generate(asked, max_new_tokens=judge.config.max_new_tokens, temperature=0.0)
    return [_verdict(replies[0]) for replies in said]


def _verdict(reply: str) -> Verdict:
    says = verdict_of(reply)
    try:
        analysis = parse_verdict(reply)["analysis"]
    except Retry:
        analysis = ""
    return Verdict(None if says is None else float(says), analysis)


def _plain_prompt(prompt: Completion) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
