"""The text twins of the in-graph rewards, with TRL's signature: for host evaluation, and the tests' oracle.

Completions are strings or chats (lists of messages); a result of None says that the reward does not apply.
Text is compared, never run, in time linear in its length.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.verifiers import NUMBER_LIMIT

WHITESPACE = " \t\n\r\x0b\x0c"
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LOOSE = r"(?<![0-9A-Za-z.)])"
_NUMBER = re.compile(
    rf"(?P<minus>{_LOOSE}-)?"
    rf"(?:(?P<whole>(?<![0-9])[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]+)(?:\.(?P<fraction>[0-9]+))?"
    rf"|{_LOOSE}\.(?P<bare>[0-9]+))\Z"
)

Completion = str | Sequence[dict[str, Any]]


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or what the last assistant message of a chat says."""
    if isinstance(completion, str):
        return completion
    spoken = [message["content"] for message in completion if message["role"] == "assistant"]
    return (spoken[-1] or "") if spoken else ""


def expected_text(value: Any) -> str:
    """The right answer of a row as the rewards compare it: stripped text, empty where there is none."""
    return "" if value is None else str(value).strip(WHITESPACE)


def answer_span(text: str) -> str | None:
    """What stands, stripped, from the last `<answer>` to the first `</answer>` after it; None if that is missing."""
    start = text.rfind("<answer>")
    end = text.find("</answer>", start + len("<answer>"))
    return None if start < 0 or end < 0 else text[start + len("<answer>") : end].strip(WHITESPACE)


def last_number(text: str) -> str | None:
    """The last number of a text without commas and idle zeros, such as '-1234.5'; None where there is none."""
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    match = _NUMBER.search(text[max(0, end - NUMBER_LIMIT - 8) : end])
    if match is None or len(match[0]) > NUMBER_LIMIT:
        return None
    whole = (match["whole"] or "").replace(",", "").lstrip("0") or "0"
    fraction = (match["fraction"] or match["bare"] or "").rstrip("0")
    size = f"{whole}.{fraction}" if fraction else whole
    return f"-{size}" if match["minus"] and size != "0" else size


def answer(prompts: Sequence, completions: Sequence[Completion], answer: Sequence, **columns) -> list[float | None]:
    """1.0 where the answer span is the right answer; None where the row has none."""
    del prompts, columns
    pairs = zip(completions, map(expected_text, answer), strict=True)
    return [float(answer_span(text_of(c)) == right) if right else None for c, right in pairs]


def format(prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float | None]:
    """1.0 where all is `<think>...</think> <answer>...</answer>`, each tag once, and only whitespace around them."""
    del prompts, columns
    return [float(_is_thought_and_answer(text_of(c))) for c in completions]


def answer_format(prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float | None]:
    """1.0 where `<answer>...</answer>` stands once, closed, with only whitespace after it."""
    del prompts, columns
    return [float(_is_answer_last(text_of(c))) for c in completions]


def number(prompts: Sequence, completions: Sequence[Completion], answer: Sequence, **columns) -> list[float | None]:
    """1.0 where the last number of the text is that of the right answer; None where the answer holds no number."""
    del prompts, columns
    rights = [last_number(expected_text(value)) for value in answer]
    pairs = zip(completions, rights, strict=True)
    return [None if right is None else float(last_number(text_of(c)) == right) for c, right in pairs]


TEXT_REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "answer": answer,
    "format": format,
    "answer_format": answer_format,
    "number": number,
}


def _is_thought_and_answer(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    at = [text.find(tag) for tag in _TAGS]
    outside = text[: at[0]] + text[at[1] + len("</think>") : at[2]] + text[at[3] + len("</answer>") :]
    return at == sorted(at) and not outside.strip(WHITESPACE)


def _is_answer_last(text: str) -> bool:
    start, end = text.find("<answer>"), text.find("</answer>")
    once = text.count("<answer>") == 1 and text.count("</answer>") == 1
    return once and start < end and not text[end + len("</answer>") :].strip(WHITESPACE)
