"""What a pipeline shows: report.html, one self-contained page, and the same as report.md.

Stages by benchmarks as the papers' tables have them, curves of the training stages, what each filter dropped,
completions of all stages on the same prompts side by side, and costs. Model output in them is escaped.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.metrics import read_jsonl, write_atomic
from grpo_jax.recipes.benchmark_report import COLUMNS, score_cell
from grpo_jax.report import (
    COLOURS,
    duration,
    embedded,
    escaped,
    html_table,
    markdown_table,
    one_line,
    page,
    thinned,
)

# Panels of a training stage: title, metrics with their labels, whether they are shares.
CURVES = (
    (
        "Accuracy by step",
        (
            ("eval/pass@1", "held-out pass@1"),
            ("eval/majority", "held-out majority"),
            ("solve_rate", "training prompts"),
        ),
        True,
    ),
    ("Response length by step", (("length/mean", "training"), ("eval/length", "held-out")), False),
    ("Reflective words a completion", (("eval/reflective_words", "held-out"),), False),
    ("Language share by step", (("eval/language", "held-out"), ("reward/language", "training")), True),
)
HEADLINE = ("pass@1", "cons", "instructions_strict", "language", "mean_length")  # scores of the first table
PROMPTS = 4  # of each set, whose completions stand side by side
LONGEST = 1200  # characters of one of them
Stages = Sequence["tuple[str, str]"]  # (folder, title)


def write_pipeline_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.html and report.md of the stages that are finished, and returns the page's path."""
    record = json.loads((workdir / "pipeline.json").read_text("utf-8"))
    done = [(name, title) for name, title in record["order"].items() if record["stages"].get(name, {}).get("made")]
    found = {name: _json(workdir / name / "evaluation" / "summary.json") for name, _ in done}
    evaluated = [(name, title) for name, title in done if found[name]]
    tables = [
        ("Stages by benchmarks", *benchmark_table(evaluated, found, HEADLINE)),
        ("Samples kept and dropped", *filter_table(done, workdir)),
        ("Costs", *cost_table(done, record["stages"], workdir)),
        ("All scores", *benchmark_table(evaluated, found, [name for name, _, _ in COLUMNS])),
    ]
    figures = [_bars(evaluated, found)] if evaluated else []
    figures += [drawn for name, title in done if (drawn := _curves(title, _metrics(workdir / name)))]
    samples = side_by_side(evaluated, found, workdir)
    facts = f"{len(done)} of {len(record['order'])} stages finished; {record['file']}"
    _write_markdown(workdir, record["title"], facts, tables, samples)
    body = [f"<h1>{escaped(record['title'])}</h1><p class='facts'>{escaped(facts)}</p>"]
    shown = [f"<h2>{title}</h2>{html_table(headings, rows)}" if rows else "" for title, headings, rows in tables]
    curves = f"<h2>Curves</h2>{''.join(f'<figure>{figure}</figure>' for figure in figures)}" if figures else ""
    texts = [_samples_html(title, headings, rows) for title, headings, rows in samples]
    body += [shown[0], curves, *texts, *shown[1:]]
    write_atomic(workdir / "report.html", page(record["title"], "".join(body)))
    return workdir / "report.html"


def benchmark_table(
    stages: Stages, found: Mapping[str, Any], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): a row for each of the named scores of each set, a column a stage."""
    rows = []
    for each in _sets(stages, found):
        scores = [found[name]["sets"].get(each, {}) for name, _ in stages]
        title = next(s["title"] for s in scores if s)
        for name, label, form in COLUMNS:
            if name in names and any(name in s for s in scores):
                rows.append([title, label, *(score_cell(s, name, form) for s in scores)])
    return ["benchmark", "score", *(title for _, title in stages)], rows


def filter_table(stages: Stages, workdir: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): what each filter of each stage dropped, and what was kept."""
    rows = []
    for name, title in stages:
        summary = _json(workdir / name / "summary.json")
        for reason, count in summary.get("dropped", {}).items():
            if count:
                rows.append([title, f"dropped: {reason}", f"{count:,}", ""])
        if "kept" in summary:
            of = f" of {summary['completions']:,}" if "completions" in summary else ""
            speed = f"{summary['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in summary else ""
            rows.append([title, "kept", f"{summary['kept']:,}{of}", speed])
    return ["stage", "", "samples", "throughput"], rows


def cost_table(stages: Stages, record: Mapping[str, Any], workdir: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): seconds and sampled tokens of each stage and of its evaluation."""
    rows, seconds_all, tokens_all = [], 0.0, 0
    for name, title in stages:
        entry = record[name]
        made, evaluated = entry.get("seconds_made", 0.0), entry.get("seconds_evaluated", 0.0)
        tokens = sampled_tokens(workdir / name)
        seconds_all, tokens_all = seconds_all + made + evaluated, tokens_all + tokens
        cells = [duration(made), duration(evaluated) if evaluated else "", f"{tokens:,}" if tokens else ""]
        rows.append([title, *cells])
    if rows:
        rows.append(["all", duration(seconds_all), "", f"{tokens_all:,}"])
    return ["stage", "time", "evaluation", "tokens sampled"], rows


def sampled_tokens(folder: pathlib.Path) -> int:
    """Tokens that a stage sampled, its evaluation's included."""
    steps = [row for row in _metrics(folder) if "tokens_per_second" in row]
    trained = sum(row["tokens_per_second"] * row["seconds/step"] for row in steps)
    drawn = _json(folder / "summary.json").get("tokens", 0)
    sets = _json(folder / "evaluation" / "summary.json").get("sets", {}).values()
    return round(trained + drawn + sum(scores["tokens"] for scores in sets))


def side_by_side(
    stages: Stages, found: Mapping[str, Any], workdir: pathlib.Path
) -> list[tuple[str, list[str], list[list[tuple[str, float | None]]]]]:
    """For each set (title, headings, rows of (text, strict grade or None)): all stages on the same prompts."""
    tables = []
    for each in _sets(stages, found):
        columns, title = [], each
        for name, _ in stages:
            path = workdir / name / "evaluation" / each / "samples.jsonl"
            rows = read_jsonl(path) if path.is_file() else []
            title = found[name]["sets"].get(each, {}).get("title", title)
            columns.append({row["problem"]: row for row in rows if row["sample"] == 0})
        numbers = sorted(set().union(*columns))[:PROMPTS]
        if not numbers:
            continue
        made: list[list[tuple[str, float | None]]] = []
        for number in numbers:
            some = next(column[number] for column in columns if number in column)
            cells = [(column[number]["completion"], column[number]["strict"]) if number in column else ("", None)
                     for column in columns]  # fmt: skip
            made.append([(some["question"], None), *cells])
        tables.append((f"The same prompts: {title}", ["prompt", *(title for _, title in stages)], made))
    return tables


def _samples_html(title: str, headings: Sequence[str], rows: Sequence[Sequence[tuple[str, float | None]]]) -> str:
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in headings)
    body = []
    for row in rows:
        cells = []
        for text, grade in row:
            colour = "" if grade is None else " good" if grade >= 1 else " bad"
            cells.append(f"<td class='text{colour}'>{escaped(text[:LONGEST])}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table class='samples'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f"<h2>{escaped(title)}</h2><p class='small'>green: right, red: not; the first sample of each.</p>{table}"


def _write_markdown(
    workdir: pathlib.Path,
    title: str,
    facts: str,
    tables: Sequence[tuple[str, list[str], list[list[str]]]],
    samples: Sequence[tuple[str, list[str], list[list[tuple[str, float | None]]]]],
) -> None:
    text = [f"# {one_line(title)}", "", facts, ""]
    for name, headings, rows in tables:
        text += [f"## {name}", "", *markdown_table(headings, rows), ""] if rows else []
    for name, headings, rows in samples:
        marked = [[_marked(cell[:LONGEST], grade) for cell, grade in row] for row in rows]
        text += [f"## {one_line(name)}", "", *markdown_table(headings, marked), ""]
    write_atomic(workdir / "report.md", "\n".join(text))


def _marked(text: str, grade: float | None) -> str:
    said = one_line(text).replace("<", "\\<").replace("`", "\\`")
    return said if grade is None else f"({'right' if grade >= 1 else 'wrong'}) {said}"


def _bars(stages: Stages, found: Mapping[str, Any]) -> str:
    """pass@1 of each set by stage, with its interval; the majority as a mark."""
    from matplotlib.figure import Figure  # here: it takes a second to import

    sets = _sets(stages, found)
    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(stages)
    for i, (name, title) in enumerate(stages):
        scores = [(n, found[name]["sets"][each]) for n, each in enumerate(sets) if each in found[name]["sets"]]
        places = [n + i * width for n, _ in scores]
        values = [s["pass@1"] for _, s in scores]
        errors = [[max(s["pass@1"] - s["pass@1_ci95"][0], 0) for _, s in scores]]
        errors.append([max(s["pass@1_ci95"][1] - s["pass@1"], 0) for _, s in scores])
        axes.bar(places, values, width, yerr=errors, label=_plain(title), color=COLOURS[i % len(COLOURS)])
        votes = [(place, s["cons"]) for place, (_, s) in zip(places, scores, strict=True) if "cons" in s]
        axes.plot([at for at, _ in votes], [vote for _, vote in votes], "k_", markersize=9)
    titles = [_plain(next(s["title"] for name, _ in stages if (s := found[name]["sets"].get(each)))) for each in sets]
    axes.set_xticks([n + 0.4 - width / 2 for n in range(len(sets))], titles, fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("pass@1; dash: majority")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    return embedded(figure, "pass@1 by benchmark and stage")


def _curves(title: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The panels of a training stage that have something to draw; empty where none has."""
    from matplotlib.figure import Figure

    drawn = []
    for heading, names, share in CURVES:
        series = []
        for name, label in names:
            points = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), int | float)]
            series += [(label, [s for s, _ in points], [v for _, v in points])] if points else []
        drawn += [(heading, series, share)] if series else []
    if not drawn:
        return ""
    figure = Figure(figsize=(10.4, 2.6), layout="constrained")
    for axes, (heading, series, share) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for number, (label, steps, values) in enumerate(series):
            axes.plot(*thinned(steps, values), color=COLOURS[number], label=label, linewidth=1.5)
        axes.set_title(heading, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if share:
            axes.set_ylim(0, 1.02)
        axes.legend(fontsize=7, frameon=False)
    return f"<figcaption>{escaped(title)}</figcaption>{embedded(figure, f'curves of {title}')}"


def _sets(stages: Stages, found: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(each for name, _ in stages for each in found[name]["sets"]))


def _metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_jsonl(path) if path.is_file() else []


def _json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a title is no formula
