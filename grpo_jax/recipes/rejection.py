"""Rejection sampling: `grpo-jax reject`. Of K samples a prompt, right ones that pass the filters become chats.

Completions are drawn, graded and kept as in `grpo-jax eval` (`benchmark`), so the same command goes on where it stopped
and other filters need no new samples. With a summary of each (`summaries`) they are a cold start's data. What it
writes, `grpo-jax sft` and `grpo-jax mix` read; a person may edit it first.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax import processes
from grpo_jax.data.benchmarks import FIELD, prompts_of
from grpo_jax.data.chats import CHATS, edited_summary, write_chats
from grpo_jax.data.filters import (
    FilterConfig,
    Filtered,
    check_decontamination,
    check_deduplication,
    check_filters,
    decontaminate,
    deduplicate,
    filter_completions,
)
from grpo_jax.errors import InputError
from grpo_jax.models.loading import load_model
from grpo_jax.recipes.benchmark import (
    Drawer,
    ProblemSet,
    Settings,
    check_folder,
    open_grader,
    plain,
    read_sets,
    resolved,
)
from grpo_jax.recipes.loop import Stop, open_terminal
from grpo_jax.recipes.summaries import SummaryConfig, check_summaries, summarise
from grpo_jax.rewards.grading import Grader
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer

SURPLUS = "more than are kept of a prompt"
OPENING = "<think>"
TAG = re.compile(r"</?(?:think|answer)>")


@dataclasses.dataclass(frozen=True)
class Rejection:
    """What is kept of what was drawn.

    Attributes:
      filters: what a completion must be.
      most: chats that are kept of a prompt, the first drawn; 0: all.
      similarity: least share of word trigrams in common that makes two answers of a prompt near duplicates.
      against: evaluation sets, 'NAME=PLACE' each, whose texts no row may share an n-gram with.
      ngram: words of such an n-gram.
      summary: whether and how kept chains are summarised.
    """

    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    most: int = 4
    similarity: float = 0.8
    against: tuple[str, ...] = ()
    ngram: int = 10
    summary: SummaryConfig = dataclasses.field(default_factory=SummaryConfig)


def run(
    settings: Settings, rejection: Rejection, workdir: pathlib.Path, terminal: Terminal | None = None
) -> dict[str, Any]:
    """Writes `workdir/chats.jsonl` and summary.json; returns the summary, with counts of what each filter dropped.

    Chats that somebody has edited are gone on with, as long as the options are the same. Raises InputError before
    anything is sampled and where nothing is left, Stopped between batches.
    """
    terminal = terminal or open_terminal()
    settings, run_config = resolved(dataclasses.replace(settings, greedy=False))
    if not settings.sets:
        raise InputError(f"{FIELD}: name the prompts: {FIELD} jsonl=FILE.jsonl, or train, a run's own")
    check(rejection)
    check_summaries(rejection.summary, settings.judge)
    options = {"settings": plain(settings), "rejection": json.loads(json.dumps(dataclasses.asdict(rejection)))}
    if (edited := processes.on_first(lambda: edited_summary(workdir, options))) is not None:
        terminal.say(f"{workdir / CHATS}: edited since it was written, {edited['chats']['rows']} chats: used as it is")
        return edited
    sets = read_sets(settings, run_config)
    texts = prompts_of(rejection.against)
    grader = open_grader(settings)
    try:
        for each in sets:
            grader.check(each.problems, f"{FIELD} {each.name}")
            check_folder(workdir / each.name, settings)
        with Stop(None) as stop, terminal:
            rows = sampled(settings, sets, grader, workdir, stop, terminal)
            kept = keep(rows, rejection, texts)
            if rejection.summary.by:
                given = (rejection.summary, settings, rejection.filters, grader, workdir, stop, terminal)
                kept = kept.then(lambda rows: summarise(rows, *given))
                kept = kept.then(functools.partial(decontaminate_answers, against=texts, n=rejection.ngram))
    finally:
        grader.close()
    if not kept.rows:
        reasons = ", ".join(f"{name} {count}" for name, count in kept.dropped.items() if count)
        raise InputError(f"none of {len(rows)} completions is kept ({reasons}): draw more --samples or loosen a filter")
    summary = summary_of(rows, kept) | {"model": settings.model, **options}
    chats = [chat(row) for row in kept.rows]
    summary = processes.on_first(lambda: write_chats(workdir, chats, summary))
    tell(summary, terminal, workdir / CHATS)
    return summary


def sampled(
    settings: Settings,
    sets: Sequence[ProblemSet],
    grader: Grader,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
) -> list[dict[str, Any]]:
    """All samples of the sets as the filters read them, drawn now or kept; the model is let go of afterwards."""
    drawer = Drawer(settings, load_model(settings.model), stop, terminal)
    records = {each.name: drawer.complete(each, grader, workdir / each.name) for each in sets}
    return [row for each in sets for row in rows_of(each, records[each.name], drawer)]


def check(rejection: Rejection) -> None:
    """Raises InputError for values that cannot be meant."""
    check_filters(rejection.filters)
    check_deduplication(rejection.similarity)
    check_decontamination(rejection.ngram)
    if rejection.most < 0:
        raise InputError(f"--most {rejection.most}: must be at least 0")


def rows_of(each: ProblemSet, records: Sequence[Mapping[str, Any]], drawer: Drawer) -> list[dict[str, Any]]:
    """The records as the filters read them: with the prompt as it was put, and 'right' by the strict grade."""
    asked = drawer.asked(each.problems)
    opened = {number: opening_of(ids.tolist(), drawer.tokenizer) for number, ids in enumerate(asked.tokens)}
    rows = []
    for record in records:
        number = record["problem"]
        problem = each.problems[number]
        row = {
            "set": each.name,
            "id": problem["id"],
            "problem": problem,
            "prompt": asked.rows[number]["prompt"],
            "completion": record["completion"],
            "opening": opened[number],
            "opened": bool(opened[number]),
            "right": record["strict"] >= 1,
            **{name: record[name] for name in ("ended", "length", "seconds")},
        }
        rows.append(row | {name: problem[name] for name in ("language",) if name in problem})
    return rows


def opening_of(ids: list[int], tokenizer: Tokenizer) -> str:
    """`<think>` and the whitespace after it where a prompt ends so: a chat's answer begins with it."""
    text = tokenizer.decode(ids, skip_special=False)
    return text[text.rfind(OPENING) :] if text.rstrip().endswith(OPENING) else ""


def keep(rows: Sequence[Mapping[str, Any]], rejection: Rejection, against: Sequence[Any]) -> Filtered:
    """Filters, then duplicates, then contamination, then the first few of each prompt."""
    return (
        filter_completions(rows, rejection.filters)
        .then(functools.partial(deduplicate, least_similarity=rejection.similarity))
        .then(functools.partial(decontaminate, against=against, n=rejection.ngram))
        .then(functools.partial(first_of_each, most=rejection.most))
    )


def first_of_each(rows: Sequence[Mapping[str, Any]], most: int) -> Filtered:
    """The first `most` rows of every prompt of every set (0: all)."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    kept = []
    for row in rows:
        place = (row["set"], row["id"])
        if not most or counts[place] < most:
            counts[place] += 1
            kept.append(dict(row))
    return Filtered(kept, {SURPLUS: len(rows) - len(kept)})


def decontaminate_answers(rows: Sequence[Mapping[str, Any]], against: Sequence[Any], n: int) -> Filtered:
    """`decontaminate` on summaries, which may hold what their chains did not; tags are no words of theirs."""
    said = [{"prompt": "", "completion": TAG.sub(" ", row["summary"]), "row": row} for row in rows]
    found = decontaminate(said, against, n)
    return Filtered([row["row"] for row in found.rows], found.dropped)


def chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as `grpo-jax sft` reads it; where it comes from stands beside the messages."""
    prompt = row["prompt"]
    asked = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    said = row["opening"] + row["completion"].strip()
    made = {"set": row["set"], "id": row["id"]} | {n: row[n] for n in ("language",) if n in row}
    made["messages"] = [*asked, {"role": "assistant", "content": row.get("answer_text", said)}]
    return made | ({"completion": row["completion"]} if "answer_text" in row else {})


def summary_of(rows: Sequence[Mapping[str, Any]], kept: Filtered) -> dict[str, Any]:
    """Counts, shares and the sampler's throughput."""
    tokens, seconds = sum(row["length"] for row in rows), sum(row["seconds"] for row in rows)
    prompts = {(row["set"], row["id"]) for row in rows}
    answered = {(row["set"], row["id"]) for row in kept.rows}
    return {
        "prompts": len(prompts),
        "prompts_kept": len(answered),
        "completions": len(rows),
        "right": sum(row["right"] for row in rows) / len(rows),
        "dropped": kept.dropped,
        "kept": kept.kept,
        "acceptance": kept.kept / len(rows),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "completions_per_second": round(len(rows) / max(seconds, 1e-9), 3),
    }


def tell(summary: Mapping[str, Any], terminal: Terminal, path: pathlib.Path) -> None:
    """Prints what was dropped by which filter, and the throughput."""
    rows = [[name, f"{count:,}"] for name, count in summary["dropped"].items()]
    terminal.table(["dropped", "completions"], [*rows, ["kept", f"{summary['kept']:,}"]])
    terminal.say(
        f"{summary['completions']:,} completions of {summary['prompts']:,} prompts, {summary['right']:.1%} right, "
        f"{summary['acceptance']:.1%} kept, of {summary['prompts_kept']:,} prompts; "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['completions_per_second']:.2f} completions/s: {path}"
    )
