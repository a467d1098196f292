"""Mixing: `grpo-jax mix`. Files of chats put together in given proportions, such as 3 of reasoning to 1 of others.

DeepSeek-R1's third stage learns from about 600k reasoning and 200k other chats; simple queries have no chain of thought
there. Rows are drawn by seed, without replacement until a file is used up. What it writes, `grpo-jax sft` reads.
"""

import collections
import dataclasses
import fractions
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.data.benchmarks import prompts_of
from grpo_jax.data.chats import CHATS, edited_summary, read_chat_file, write_chats
from grpo_jax.data.filters import (
    Filtered,
    check_decontamination,
    check_deduplication,
    decontaminate,
    deduplicate,
    words_of,
)
from grpo_jax.data.prompts import row_order
from grpo_jax.errors import InputError
from grpo_jax.terminal import Terminal

THOUGHT_END = "</think>"
THOUGHTS = ("keep", "simple", "drop")
USED_UP = ("shrink", "repeat")


@dataclasses.dataclass(frozen=True)
class Part:
    """A file of the mixture.

    Attributes:
      name: stands in each row as 'part'.
      path: JSONL file of chats.
      weight: its share is this over the sum of all weights.
      thoughts: 'keep'; 'drop': answers lose what stands before `</think>`; 'simple': those to short prompts do.
    """

    name: str
    path: str
    weight: float = 1.0
    thoughts: str = "keep"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What is mixed and how.

    Attributes:
      parts: the files, in the order in which duplicates are looked for.
      rows: of the mixture; 0: as many as there are.
      used_up: when a part has too few rows: 'shrink' the mixture, or 'repeat' the part's rows, all before any again.
      simple_words: a prompt of at most so many words is simple.
      similarity: as in rejection sampling.
      against: evaluation sets, 'NAME=PLACE' each, whose texts no row may share an n-gram with.
      ngram: words of such an n-gram.
      seed: which rows, in which order.
    """

    parts: tuple[Part, ...]
    rows: int = 0
    used_up: str = "shrink"
    simple_words: int = 8
    similarity: float = 0.8
    against: tuple[str, ...] = ()
    ngram: int = 10
    seed: int = 0


def run(mixture: Mixture, workdir: pathlib.Path, terminal: Terminal | None = None) -> dict[str, Any]:
    """Writes `workdir/chats.jsonl` and summary.json; returns the summary: counts by part, and what was dropped why.

    Chats that somebody has edited are gone on with, as long as the options are the same. Raises InputError naming file,
    row and fix.
    """
    terminal = terminal or Terminal()
    check(mixture)
    files = {part.name: hashlib.sha256(_bytes(part.path)).hexdigest() for part in mixture.parts}
    options = {"mixture": json.loads(json.dumps(dataclasses.asdict(mixture))), "files": files}
    if (edited := edited_summary(workdir, options)) is not None:
        terminal.say(f"{workdir / CHATS}: edited since it was written, {edited['chats']['rows']} chats: used as it is")
        return edited
    found, parts = available(mixture, prompts_of(mixture.against))
    left = [parts[part.name]["available"] for part in mixture.parts]
    wanted = counts([part.weight for part in mixture.parts], left, mixture.rows, mixture.used_up)
    if not sum(wanted):
        gone = [part.name for part, count in zip(mixture.parts, left, strict=True) if not count]
        raise InputError(
            f"--part: nothing to mix, {' and '.join(gone) or 'the smallest part'} has too few rows: {left}"
        )
    rows = drawn(mixture, found.rows, wanted)
    for part, count in zip(mixture.parts, wanted, strict=True):
        about = parts[part.name]
        about |= {"drawn": count, "share": count / sum(wanted), "passes": count / max(about["available"], 1)}
        about["words"] = sum(_words(row) for row in rows if row["part"] == part.name)
    summary = {"rows": len(rows), "parts": parts, "dropped": found.dropped, **options}
    summary = write_chats(workdir, rows, summary)
    tell(summary, mixture, terminal, workdir / CHATS)
    return summary


def check(mixture: Mixture) -> None:
    """Raises InputError for values that cannot be meant, and files that are not there."""
    names = [part.name for part in mixture.parts]
    if not names:
        raise InputError("mix: nothing to mix: name files: --part reasoning=FILE.jsonl --part general=FILE.jsonl")
    for part in mixture.parts:
        if names.count(part.name) > 1:
            raise InputError(f"--part {part.name}: is named twice: give each file a name of its own")
        if not 0 < part.weight < float("inf"):
            raise InputError(f"--weight {part.name}={part.weight}: must be above 0")
        if part.thoughts not in THOUGHTS:
            raise InputError(f"--thoughts {part.name}={part.thoughts}: is not one of {', '.join(THOUGHTS)}")
        if not pathlib.Path(part.path).is_file():
            raise InputError(f"--part {part.name}={part.path}: no such file: name a JSONL file of chats")
    if mixture.used_up not in USED_UP:
        raise InputError(f"--used_up {mixture.used_up}: is not one of {', '.join(USED_UP)}")
    for name, value in (("rows", mixture.rows), ("simple_words", mixture.simple_words)):
        if value < 0:
            raise InputError(f"--{name} {value}: must be at least 0")
    check_deduplication(mixture.similarity)
    check_decontamination(mixture.ngram)


def available(mixture: Mixture, against: Sequence[Any]) -> tuple[Filtered, dict[str, dict[str, Any]]]:
    """The rows that may be drawn, and for each part what it had, lost and has."""
    rows, parts = [], {}
    for part in mixture.parts:
        chats = read_chat_file(part.path, f"--part {part.name}")
        parts[part.name] = {"path": part.path, "weight": part.weight, "read": len(chats)}
        rows += [as_row(chat, part.name) for chat in chats]
    unique = functools.partial(deduplicate, least_similarity=mixture.similarity)
    steps: list[tuple[str, Callable[[Sequence[Mapping[str, Any]]], Filtered]]] = [
        ("duplicates", unique),
        ("emptied", functools.partial(without_thoughts, mixture=mixture)),
        ("duplicates", unique),  # without their thoughts further rows are alike
        ("contaminated", functools.partial(decontaminate, against=against, n=mixture.ngram)),
    ]
    found = Filtered(rows, {})
    for name, step in steps:
        before = collections.Counter(row["part"] for row in found.rows)
        found = found.then(step)
        after = collections.Counter(row["part"] for row in found.rows)
        for part, about in parts.items():
            about |= {name: about.get(name, 0) + before[part] - after[part], "available": after[part]}
    for part, about in parts.items():
        about["thoughts_dropped"] = sum(row["changed"] for row in found.rows if row["part"] == part)
    return found, parts


def without_thoughts(rows: Sequence[Mapping[str, Any]], mixture: Mixture) -> Filtered:
    """The rows without the thoughts that their parts leave out; rows that say nothing else are dropped."""
    thoughts = {part.name: part.thoughts for part in mixture.parts}
    made = []
    for row in rows:
        chat = without_thought(row["chat"], thoughts[row["part"]], mixture.simple_words)
        made.append(as_row(chat, row["part"]) | {"changed": chat is not row["chat"]})
    said = [row for row in made if row["completion"].strip()]
    return Filtered(said, {"empty without its thought": len(made) - len(said)})


def without_thought(chat: dict[str, Any], thoughts: str, simple_words: int) -> dict[str, Any]:
    """The chat, its last answer without what stands up to `</think>` where that is asked for; else the chat itself."""
    *asked, answer = chat["messages"]
    if thoughts == "keep" or THOUGHT_END not in answer["content"]:
        return chat
    if thoughts == "simple" and len(words_of(asked[-1]["content"])) > simple_words:
        return chat
    said = answer["content"].rpartition(THOUGHT_END)[2].strip()
    return {**chat, "messages": [*asked, {**answer, "content": said}]}


def as_row(chat: dict[str, Any], part: str) -> dict[str, Any]:
    """A chat as the filters read it."""
    *asked, answer = chat["messages"]
    return {"prompt": asked, "completion": answer["content"], "part": part, "chat": chat}


def counts(weights: Sequence[float], left: Sequence[int], rows: int, used_up: str) -> list[int]:
    """Rows of each part, in proportion to the weights by largest remainders.

    'shrink': at most what is left of each, so the part that is used up first decides, or `rows` where that is less.
    'repeat': `rows`, or as many as it takes for every row to come once. A part without rows leaves nothing.
    """
    shares = [fractions.Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    if not all(left):
        return [0] * len(left)
    bounds = [int(count / share) for count, share in zip(left, shares, strict=True)]
    total = min(min(bounds), rows or min(bounds)) if used_up == "shrink" else rows or max(bounds)
    exact = [share * total for share in shares]
    made = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (made[i] - exact[i], i))
    for i in by_rest[: total - sum(made)]:
        made[i] += 1
    return made


def drawn(mixture: Mixture, rows: Sequence[Mapping[str, Any]], wanted: Sequence[int]) -> list[dict[str, Any]]:
    """The mixture: each part's rows in an order of seed and name, all of them before any again, then shuffled."""
    chosen = []
    for part, count in zip(mixture.parts, wanted, strict=True):
        own = [row["chat"] for row in rows if row["part"] == part.name]
        seed = int.from_bytes(hashlib.sha256(f"{mixture.seed} {part.name}".encode()).digest()[:4], "little")
        chosen += [
            {"part": ""} | own[i] | {"part": part.name}
            for i in row_order(np.arange(count), len(own), seed, True).tolist()
        ]
    return [chosen[i] for i in row_order(np.arange(len(chosen)), len(chosen), mixture.seed, True).tolist()]


def tell(summary: Mapping[str, Any], mixture: Mixture, terminal: Terminal, path: pathlib.Path) -> None:
    """Prints the parts, and what was dropped."""
    headings = ["part", "read", "duplicates", "emptied", "contaminated", "available", "drawn", "share", "passes"]
    terminal.table(
        headings,
        [
            [name, *(f"{about[key]:,}" for key in headings[1:7]), f"{about['share']:.1%}", f"{about['passes']:.2f}"]
            for name, about in summary["parts"].items()
        ],
    )
    if mixture.rows > summary["rows"]:
        terminal.warn(
            f"{summary['rows']:,} rows, not {mixture.rows:,}: a part is used up; --used_up repeat takes rows again"
        )
    terminal.say(f"{summary['rows']:,} chats: {path}")


def _words(chat: Mapping[str, Any]) -> int:
    return len(words_of(chat["messages"][-1]["content"]))


def _bytes(path: str) -> bytes:
    return pathlib.Path(path).read_bytes()
