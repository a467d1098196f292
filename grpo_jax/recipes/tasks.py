"""`grpo-jax tasks`: the generated tasks of `data.path` as files, for stages that read files."""

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from grpo_jax import processes
from grpo_jax.config import Config
from grpo_jax.data import general, tasks
from grpo_jax.errors import InputError
from grpo_jax.metrics import write_atomic, write_json_atomic
from grpo_jax.recipes.loop import open_terminal
from grpo_jax.terminal import Terminal


def run(config: Config, workdir: pathlib.Path, terminal: Terminal | None = None) -> dict[str, Any]:
    """Writes the files of `made_files` and summary.json, which counts their rows; returns the summary.

    Raises InputError for another data.source and for a path that cannot be meant.
    """
    terminal = terminal or open_terminal()
    if config.data.source != "tasks":
        raise InputError(f"config: data.source={config.data.source!r} makes no tasks: set it to 'tasks'")
    files = made_files(config)
    summary = {
        "path": config.data.path,
        "seed": config.seed,
        "rows": {name: len(rows) for name, rows in files.items()},
    }

    def write() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            write_atomic(workdir / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json_atomic(workdir / "summary.json", summary)

    processes.on_first(write)
    terminal.table(["file", "rows"], [[name, f"{count:,}"] for name, count in summary["rows"].items()])
    return summary


def made_files(config: Config) -> dict[str, list[dict]]:
    """Rows by file: train.jsonl, eval.jsonl and a held-out file a kind (eval_sums.jsonl); of general prompts the same.

    With general prompts also chats.jsonl, and helpful.jsonl (pairs) and harmless.jsonl (points) with their held-out
    files.
    """
    asked, given = tasks.parse(config.data.path), config.tasks
    kinds = [kind for kind in asked.tasks if kind != tasks.GENERAL]
    files: dict[str, list[dict]] = {}
    if kinds:
        train = _rows(config, kinds, asked.languages, "train")[: given.prompts]
        held = [_rows(config, [kind], asked.languages, "eval")[: given.held_out] for kind in kinds]
        files |= {"train.jsonl": train, "eval.jsonl": _by_turns(held)[: given.held_out]}
        files |= {f"eval_{_name(kind)}.jsonl": rows for kind, rows in zip(kinds, held, strict=True)}
        tasks.assert_disjoint(train, [row for rows in held for row in rows])
    if tasks.GENERAL in asked.tasks:
        files |= _general_files(config, asked.languages)
    return files


def _general_files(config: Config, languages: Sequence[str]) -> dict[str, list[dict]]:
    given, seed = config.tasks, config.seed
    return {
        "general.jsonl": _rows(config, [tasks.GENERAL], languages, "train")[: given.prompts],
        "eval_general.jsonl": _rows(config, [tasks.GENERAL], languages, "eval")[: given.held_out],
        "chats.jsonl": general.chats(seed, "train", languages, given.chats, given.good_share),
        "helpful.jsonl": general.pairs(seed, "train", languages, given.pairs),
        "eval_helpful.jsonl": general.pairs(seed, "eval", languages, max(given.pairs // 10, 1)),
        "harmless.jsonl": general.points(seed, "train", languages, given.points),
        "eval_harmless.jsonl": general.points(seed, "eval", languages, max(given.points // 10, 1)),
    }


def _rows(config: Config, kinds: Sequence[str], languages: Sequence[str], split: str) -> list[dict]:
    return tasks.rows(config.seed, split, f"{','.join(kinds)}:{','.join(languages)}", config.data.digits)


def _by_turns(groups: Sequence[Sequence[dict]]) -> list[dict]:
    """The first of each group, the second of each, and so on."""
    places: dict[int, list[dict]] = collections.defaultdict(list)
    for rows in groups:
        for place, row in enumerate(rows):
            places[place].append(row)
    return [row for place in sorted(places) for row in places[place]]


def _name(kind: str) -> str:
    return kind.replace(":", "_")
