"""What an evaluation shows: a table on the terminal, report.md and a self-contained report.html."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from grpo_jax.metrics import read_jsonl, write_atomic
from grpo_jax.report import COLOURS, embedded, escaped, html_table, markdown_table, one_line, page

Scores = Mapping[str, Any]
# Heading, score, form; a column that no set has is left out.
COLUMNS = (
    ("pass@1", "pass@1", "{:.1%}"),
    ("lenient", "lenient", "{:.1%}"),
    ("cons", "cons@n", "{:.1%}"),
    ("greedy", "greedy", "{:.1%}"),
    ("greedy_lenient", "greedy, lenient", "{:.1%}"),
    ("instructions_strict", "instructions", "{:.1%}"),
    ("instructions_loose", "instructions, loose", "{:.1%}"),
    ("asked", "answer in place", "{:.1%}"),
    ("format", "format", "{:.1%}"),
    ("language", "language", "{:.1%}"),
    ("mean_length", "tokens", "{:.0f}"),
    ("truncated", "cut off", "{:.1%}"),
)
WIDE = ("pass@1",)  # those whose interval stands in tables
EXAMPLES = 3  # completions of each set in the report, of each verdict
LONGEST = 3000  # characters of one of them


def table(sets: Mapping[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): a row a set, with the columns that some set has."""
    shown = [(name, title, form) for name, title, form in COLUMNS if any(name in scores for scores in sets.values())]
    headings = ["set", "problems x k", *(title for _, title, _ in shown)]
    rows = []
    for scores in sets.values():
        cells = [score_cell(scores, name, form) for name, _, form in shown]
        rows.append([scores["title"], f"{scores['problems']} x {scores['samples']}", *cells])
    return headings, rows


def pass_at_k_table(sets: Mapping[str, Scores]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): pass@k and cons@k of each set by k."""
    ks = sorted({int(k) for scores in sets.values() for k in scores["pass@k"]})
    rows = []
    for scores in sets.values():
        for name, what in (("pass@k", "pass@k"), ("pass@k_lenient", "pass@k, lenient"), ("cons@k", "cons@k")):
            if values := scores.get(name):
                cells = [f"{values[str(k)]:.1%}" if str(k) in values else "" for k in ks]
                rows.append([scores["title"], what, *cells])
    return ["set", "", *(f"k = {k}" for k in ks)], rows


def write_reports(workdir: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Writes report.md and report.html beside summary.json; model output in them is escaped."""
    tables = [("Scores", *table(summary["sets"])), ("By k", *pass_at_k_table(summary["sets"]))]
    notes = _notes(summary)
    text = [f"# {one_line(summary['model'])}", "", notes, ""]
    for title, headings, rows in tables:
        text += [f"## {title}", "", *markdown_table(headings, rows), ""]
    write_atomic(workdir / "report.md", "\n".join(text))
    body = [f"<h1>{escaped(summary['model'])}</h1><p class='facts'>{escaped(notes)}</p>"]
    for title, headings, rows in tables:
        body.append(f"<h2>{title}</h2>{html_table(headings, rows)}")
    body.append(f"<h2>Plots</h2><figure>{_plot(summary['sets'])}</figure>")
    body += [_examples(workdir / name, scores) for name, scores in summary["sets"].items()]
    body.append(f"<h2>Settings</h2><pre>{escaped(json.dumps(summary['settings'], indent=2, ensure_ascii=False))}</pre>")
    write_atomic(workdir / "report.html", page(summary["model"], "".join(body)))


def _notes(summary: Mapping[str, Any]) -> str:
    s, sets = summary["settings"], summary["sets"].values()
    tokens, seconds = sum(x["tokens"] for x in sets), sum(x["seconds"] for x in sets)
    return (
        f"temperature {s['temperature']}, top-p {s['top_p']}, at most {s['max_new_tokens']} tokens, seed {s['seed']}; "
        f"{tokens:,} tokens in {seconds:,.0f} s of sampling. pass@1 is the mean over k samples, in brackets its 95% "
        "interval by a bootstrap over problems; strict unless said otherwise."
    )


def score_cell(scores: Scores, name: str, form: str) -> str:
    """A score with its interval where tables show one; empty where there is none."""
    if name not in scores:
        return ""
    low_high = scores.get(f"{name}_ci95") if name in WIDE else None
    return form.format(scores[name]) + (
        f" [{form.format(low_high[0])}, {form.format(low_high[1])}]" if low_high else ""
    )


def _plot(sets: Mapping[str, Scores]) -> str:
    """Bars of pass@1 with its interval beside lenient, majority and greedy; curves by k."""
    from matplotlib.figure import Figure  # here: it takes a second to import

    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    titles = [scores["title"].replace("$", r"\$") for scores in sets.values()]
    kinds = [item for item in COLUMNS[:4] if any(item[0] in scores for scores in sets.values())]
    width = 0.8 / len(kinds)
    for i, (name, label, _) in enumerate(kinds):
        some = [(n + i * width, scores) for n, scores in enumerate(sets.values()) if name in scores]
        values = [scores[name] for _, scores in some]
        low_high = [scores[f"{name}_ci95"] for _, scores in some]
        errors = [[v - e[0] for v, e in zip(values, low_high, strict=True)]]
        errors.append([e[1] - v for v, e in zip(values, low_high, strict=True)])
        errors = [[max(e, 0.0) for e in side] for side in errors]
        places = [at for at, _ in some]
        bars.bar(places, values, width, yerr=errors, label=label, color=COLOURS[i], error_kw={"linewidth": 0.8})
    bars.set_xticks([n + 0.4 - width / 2 for n in range(len(titles))], titles, fontsize=9)
    bars.set_ylim(0, 1)
    bars.legend(fontsize=8, frameon=False)
    for n, (title, scores) in enumerate(zip(titles, sets.values(), strict=True)):
        for name, style in (("pass@k", "-"), ("cons@k", "--")):
            if points := scores.get(name):
                xs = [int(k) for k in points]
                colour = COLOURS[n % len(COLOURS)]
                curves.plot(xs, list(points.values()), style, marker="o", color=colour, label=f"{title} {name}")
    curves.set_xscale("log", base=2)
    curves.set_ylim(0, 1)
    curves.set_xlabel("k")
    curves.legend(fontsize=8, frameon=False)
    return embedded(figure, "scores by set, and by k")


def _examples(folder: pathlib.Path, scores: Scores) -> str:
    """A few completions that are right and a few that are not."""
    rows = [row for row in read_jsonl(folder / "samples.jsonl") if row["sample"] == 0]
    chosen = [row for right in (0.0, 1.0) for row in [row for row in rows if row["strict"] == right][:EXAMPLES]]
    cells = [
        [f"{row['id']}: strict {row['strict']:.0f}, lenient {row['lenient']:.0f}", row["completion"][:LONGEST]]
        for row in sorted(chosen, key=lambda row: row["problem"])
    ]
    body = "".join(f"<tr><td>{escaped(about)}</td><td class='text'>{escaped(text)}</td></tr>" for about, text in cells)
    columns = "<colgroup><col style='width:20%'><col></colgroup>"
    return f"<h2>Completions: {escaped(scores['title'])}</h2><table class='samples'>{columns}{body}</table>"
