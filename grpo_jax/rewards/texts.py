"""The text twins of the in-graph rewards, with TRL's signature: for host evaluation, and the tests' oracle.

Completions are strings or chats (lists of messages); a result of None says that the reward does not apply.
Text is compared, never run, in time linear in its length. Nothing here loads jax.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.letters import share_in_language, word_counts

WHITESPACE = " \t\n\r\x0b\x0c"
# A longer number counts as none; the bound keeps the work on a window at the end of the text.
NUMBER_LIMIT = 64
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LOOSE = r"(?<![0-9A-Za-z.)])"
_NUMBER = re.compile(
    rf"(?P<minus>{_LOOSE}-)?"
    rf"(?:(?P<whole>(?<![0-9])[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]+)(?:\.(?P<fraction>[0-9]+))?"
    rf"|{_LOOSE}\.(?P<bare>[0-9]+))\Z"
)

_CHOICE = re.compile(r"[(\[{]?([A-Za-z])(?:\Z|[)\].:,}])")

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


def whole_number(text: str) -> str | None:
    """The number that a text is and nothing else, as `last_number` writes it; None for all other texts."""
    match = _NUMBER.search(text[-NUMBER_LIMIT - 8 :])
    return last_number(text) if match is not None and len(match[0]) == len(text) else None


def choice_letter(text: str) -> str | None:
    """The lower-case letter of a choice written 'B', 'b', '(B)', 'B.' or 'B: words'; None for all other texts."""
    match = _CHOICE.match(text)
    return None if match is None else match[1].lower()


def opens_thinking(prompt: Completion) -> bool:
    """Whether a prompt, as text or chat, ends with an open `<think>`, so that the completion does not write it."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "") if prompt else ""
    return text.rstrip(WHITESPACE).endswith("<think>")


def answer(prompts: Sequence, completions: Sequence[Completion], answer: Sequence, **columns) -> list[float | None]:
    """1.0 where the answer span is the right answer; None where the row has none."""
    del prompts, columns
    pairs = zip(completions, map(expected_text, answer), strict=True)
    return [float(answer_span(text_of(c)) == right) if right else None for c, right in pairs]


def format(
    prompts: Sequence, completions: Sequence[Completion], opened: Sequence[bool] | None = None, **columns
) -> list[float | None]:
    """1.0 where all is `<think>...</think> <answer>...</answer>`, each tag once, and only whitespace around them.

    Where the prompt already holds the opening tag, the completion goes on after it. `opened` says so by row; without
    it the prompts are looked at as they are, before any template.
    """
    del columns
    starts = list(map(opens_thinking, prompts)) if opened is None else opened
    texts = (("<think>" if start else "") + text_of(c) for start, c in zip(starts, completions, strict=True))
    return [float(not thought_and_answer_fault(text)) for text in texts]


def answer_format(prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float | None]:
    """1.0 where `<answer>...</answer>` stands once, closed, with only whitespace after it."""
    del prompts, columns
    return [float(not answer_last_fault(text_of(c))) for c in completions]


def number(prompts: Sequence, completions: Sequence[Completion], answer: Sequence, **columns) -> list[float | None]:
    """1.0 where the last number of the text is that of the right answer; None where the answer holds no number."""
    del prompts, columns
    rights = [last_number(expected_text(value)) for value in answer]
    pairs = zip(completions, rights, strict=True)
    return [None if right is None else float(last_number(text_of(c)) == right) for c, right in pairs]


def answer_number(
    prompts: Sequence, completions: Sequence[Completion], answer: Sequence, **columns
) -> list[float | None]:
    """1.0 where the answer span is a number and nothing else, equal to the last number of the right answer."""
    del prompts, columns
    rights = [last_number(expected_text(value)) for value in answer]
    given = (whole_number(answer_span(text_of(c)) or "") for c in completions)
    return [None if right is None else float(found == right) for found, right in zip(given, rights, strict=True)]


def choice(prompts: Sequence, completions: Sequence[Completion], answer: Sequence, **columns) -> list[float | None]:
    """1.0 where the answer span names the letter of the right choice; None where the right answer names none."""
    del prompts, columns
    rights = [choice_letter(expected_text(value)) for value in answer]
    given = (choice_letter(answer_span(text_of(c)) or "") for c in completions)
    return [None if right is None else float(found == right) for found, right in zip(given, rights, strict=True)]


def language(
    prompts: Sequence, completions: Sequence[Completion], language: str | Sequence[str] = "en", **columns
) -> list[float | None]:
    """Share of words in the script of the target language (DeepSeek-R1, section 2.3.2); 1.0 without any word.

    `language` is the target of all rows, or the target of each.
    """
    del prompts, columns
    targets = [language] * len(completions) if isinstance(language, str) else language
    return [share_in_language(text_of(c), target) for c, target in zip(completions, targets, strict=True)]


def repetition(
    prompts: Sequence, completions: Sequence[Completion], completion_ids: Sequence, ngram: int = 3, **columns
) -> list[float | None]:
    """Minus the share of token n-grams that were there before: -(1 - distinct / all) (arXiv 2502.03373)."""
    del prompts, completions, columns
    scores: list[float | None] = []
    for ids in completion_ids:
        total = max(len(ids) - ngram + 1, 0)
        distinct = len({tuple(ids[i : i + ngram]) for i in range(total)})
        scores.append(distinct / total - 1.0 if total else 0.0)
    return scores


def overlong(
    prompts: Sequence,
    completions: Sequence[Completion],
    completion_ids: Sequence,
    budget: int,
    cache: int = 0,
    **columns,
) -> list[float | None]:
    """Soft overlong punishment: 0 up to budget - cache tokens, falling to -1 at the budget (DAPO, 2503.14476, eq. 13).

    `cache` 0 is a fifth of the budget, as in the paper.
    """
    del prompts, completions, columns
    cache = cache or max(budget // 5, 1)
    return [min(max((budget - cache - len(ids)) / cache, -1.0), 0.0) for ids in completion_ids]


def cosine(
    prompts: Sequence,
    completions: Sequence[Completion],
    completion_ids: Sequence,
    right: Sequence[bool],
    budget: int,
    when_right: Sequence[float] = (1.0, 0.5),
    when_wrong: Sequence[float] = (-1.0, -0.5),
    **columns,
) -> list[float | None]:
    """Cosine of the length, from the first value at no tokens to the second at the budget (arXiv 2502.03373, eq. 1).

    Shorter is better when the completion is right, longer when it is wrong.
    """
    del prompts, completions, columns
    scores: list[float | None] = []
    for ids, good in zip(completion_ids, right, strict=True):
        start, end = when_right if good else when_wrong
        share = min(len(ids) / budget, 1.0)
        scores.append(end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share)))
    return scores


TEXT_REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "answer": answer,
    "format": format,
    "answer_format": answer_format,
    "number": number,
    "answer_number": answer_number,
    "choice": choice,
    "language": language,
    "repetition": repetition,
    "overlong": overlong,
    "cosine": cosine,
}

# The options of the rewards that have any, from the config; a length budget of 0 is that of the sampler.
OPTIONS: dict[str, Callable[[RewardsConfig], Mapping[str, Any]]] = {
    "language": lambda c: {"language": c.language},
    "repetition": lambda c: {"ngram": c.repetition_ngram},
    "overlong": lambda c: {"budget": c.length_budget, "cache": c.overlong_cache},
    "cosine": lambda c: {"budget": c.length_budget, "when_right": c.cosine_right, "when_wrong": c.cosine_wrong},
}


def text_reward(name: str, config: RewardsConfig, max_new_tokens: int) -> Callable[..., list[float | None]]:
    """The text twin of an in-graph reward with the config's options."""
    options = dict(OPTIONS[name](config)) if name in OPTIONS else {}
    if options.get("budget") == 0:
        options["budget"] = max_new_tokens
    return functools.partial(TEXT_REWARDS[name], **options)


def reason(name: str, text: str, right: str, opened: bool, ids: Sequence[int], config: RewardsConfig) -> str:
    """Why the in-graph reward of this name gives what it gives, in a few words; empty for rewards of one's own."""
    span = answer_span(text)
    if name in ("answer", "answer_number", "choice"):
        return "no closed <answer>" if span is None else f"answer {span[:60]!r}, right is {right[:60]!r}"
    if name == "number":
        return f"last number {last_number(text)}, right is {last_number(right)}"
    if name == "format":
        fault = thought_and_answer_fault(("<think>" if opened else "") + text)
        return (fault or "as asked for") + (" (the prompt holds the opening tag)" if opened else "")
    if name == "answer_format":
        return answer_last_fault(text) or "as asked for"
    if name == "language":
        inside, outside = word_counts(text, config.language)
        return f"{inside} of {inside + outside} words in the script of {config.language!r}"
    if name == "repetition":
        total = max(len(ids) - config.repetition_ngram + 1, 0)
        distinct = len({tuple(ids[i : i + config.repetition_ngram]) for i in range(total)})
        return f"{distinct} of {total} {config.repetition_ngram}-grams are distinct"
    return f"{len(ids)} tokens" if name in ("overlong", "cosine") else ""


def thought_and_answer_fault(text: str) -> str:
    """What keeps a text from being `<think>...</think> <answer>...</answer>`; empty when nothing does."""
    for tag in _TAGS:
        if text.count(tag) != 1:
            return f"{tag} stands {text.count(tag)} times"
    at = [text.find(tag) for tag in _TAGS]
    if at != sorted(at):
        return "the tags are not in order"
    outside = text[: at[0]] + text[at[1] + len("</think>") : at[2]] + text[at[3] + len("</answer>") :]
    return f"outside of the tags stands {outside.strip(WHITESPACE)[:60]!r}" if outside.strip(WHITESPACE) else ""


def answer_last_fault(text: str) -> str:
    """What keeps a text from ending with its one `<answer>...</answer>`; empty when nothing does."""
    for tag in _TAGS[2:]:
        if text.count(tag) != 1:
            return f"{tag} stands {text.count(tag)} times"
    start, end = text.find("<answer>"), text.find("</answer>")
    if start > end:
        return "the tags are not in order"
    after = text[end + len("</answer>") :].strip(WHITESPACE)
    return f"after the answer stands {after[:60]!r}" if after else ""
