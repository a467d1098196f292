"""report.html: one file that shows a run, readable without network, server or scripts.

Prompts and completions are hostile text. They are escaped, and the page's own policy forbids scripts and
requests, so that a miss would stay harmless.
"""

import base64
import html
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl, write_atomic
from grpo_jax.terminal import visible

Rows = Sequence[Mapping[str, Any]]

# Title, caption, metrics with their labels ('reward/*': all that are not named), and how they are drawn: 'mean' adds a
# running mean to long series, 'log' does too and takes a logarithmic axis where the range asks for one, 'exact' does
# neither.
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...], str], ...] = (
    ("Reward", "weighted total and components", (("reward/total", "total"), ("reward/*", "")), "mean"),
    (
        "Held-out problems",
        "shares of the evaluation set, never trained on",
        (
            ("eval/pass@1", "pass@1"),
            ("eval/lenient", "lenient"),
            ("eval/majority", "majority"),
            ("eval/greedy", "greedy"),
            ("eval/format", "format"),
        ),
        "exact",
    ),
    ("Solve rate", "share of sampled completions that are right", (("solve_rate", "solve rate"),), "mean"),
    ("Prompt sets: reward", "weighted total by set", (("set_reward/*", ""),), "mean"),
    ("Prompt sets: held-out reward", "weighted total by set", (("eval_reward/*", ""),), "exact"),
    ("Prompt sets: solve rate", "of the sets that have right answers", (("set_solve_rate/*", ""),), "mean"),
    ("Prompt sets: length", "tokens", (("set_length/*", ""),), "mean"),
    ("Prompt sets: share", "of the completions that count", (("set_share/*", ""),), "mean"),
    (
        "Groups without signal",
        "all their completions are right, or all are wrong",
        (("groups/all_right", "all right"), ("groups/all_wrong", "all wrong")),
        "mean",
    ),
    (
        "Response length",
        "tokens, end token included",
        (("length/mean", "all"), ("length/right", "right"), ("length/wrong", "wrong"), ("eval/length", "held-out")),
        "mean",
    ),
    ("Reflective words", "a held-out completion", (("eval/reflective_words", "reflective words"),), "exact"),
    (
        "Language",
        "share of words in the language asked for",
        (("eval/language", "held-out"),),
        "exact",
    ),
    ("Truncated", "share of completions that the budget cut off", (("truncated", "truncated"),), "mean"),
    ("KL", "to the reference, mean a token", (("kl", "KL"),), "mean"),
    ("Distance to the teacher", "reverse KL, nats a token", (("distill/kl", "KL"),), "mean"),
    ("Entropy", "of the policy, nats a token", (("entropy", "entropy"),), "mean"),
    ("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),), "mean"),
    ("Clipped", "share of tokens outside the trust region", (("clip/low", "low"), ("clip/high", "high")), "mean"),
    ("Advantage", "mean of its absolute value", (("advantage/mean_abs", "mean |A|"),), "mean"),
    ("Loss", "of the objective", (("loss", "GRPO"), ("sft/loss", "supervised")), "mean"),
    ("Learning rate", "of the last update in the step", (("lr", "learning rate"),), "exact"),
    (
        "Sampler gap",
        "sampler's log-probabilities against the trainer's",
        (("sampler_gap/max", "largest"), ("sampler_gap/mean", "mean")),
        "log",
    ),
    (
        "Seconds a step",
        "and the part of host rewards",
        (("seconds/step", "step"), ("seconds/rewards", "rewards")),
        "log",
    ),
    ("Tokens a second", "sampled tokens", (("tokens_per_second", "tokens/s"),), "mean"),
    ("Skipped updates", "because the gradient was not finite", (("skipped", "skipped"),), "exact"),
)
SCORES = (
    ("pass@1", "pass@1, sampled", "{:.1%}"),
    ("lenient", "lenient scoring", "{:.1%}"),
    ("greedy", "greedy", "{:.1%}"),
    ("majority", "majority vote", "{:.1%}"),
    ("format", "right format", "{:.1%}"),
    ("mean_length", "mean length, tokens", "{:.1f}"),
)
COLOURS = ("#0b5fa5", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be185d", "#0f766e", "#525252")
OWN_COLOURS = {"right": "#15803d", "all right": "#15803d", "wrong": "#b91c1c", "all wrong": "#b91c1c"}
POINTS = 500  # that a curve has at most; longer runs are averaged down to it
SAMPLE_STEPS = 3
SAMPLE_ROWS = 40

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1917; background: #fff; margin: 0 auto; max-width: 1120px;
       padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 36px 0 10px; }
.facts { color: #57534e; margin: 0 0 20px; }
table { border-collapse: collapse; } th, td { padding: 7px 14px; text-align: left; vertical-align: top; }
th { font-size: 14px; color: #57534e; border-bottom: 2px solid #d6d3d1; } td { border-bottom: 1px solid #e7e5e4; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scores td { font-size: 18px; } .scores tr:first-child td { font-weight: 650; font-size: 22px; }
.interval { color: #57534e; font-size: 14px; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 22px 20px; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-weight: 650; line-height: 1.35; }
figcaption span { display: block; font-weight: 400; color: #57534e; font-size: 14px; }
.samples { width: 100%; table-layout: fixed; } .samples td { font-size: 14px; }
.samples td.text { font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap;
                   overflow-wrap: anywhere; }
.reward { display: flex; justify-content: space-between; gap: 8px; border-radius: 4px; padding: 1px 8px;
          margin: 0 0 3px; font-variant-numeric: tabular-nums; }
.reward span:first-child { overflow: hidden; text-overflow: ellipsis; }
.good { background: #dcfce7; color: #14532d; } .bad { background: #fee2e2; color: #7f1d1d; }
.some { background: #fef3c7; color: #713f12; }
.none { background: #f5f5f4; color: #57534e; } .total { font-weight: 650; }
.small { color: #57534e; font-size: 13px; }
pre { background: #fafaf9; border: 1px solid #e7e5e4; border-radius: 6px; padding: 14px; overflow-x: auto;
      font-size: 13px; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `workdir/report.html` from the files of the run and returns its path.

    Needs metrics.jsonl; samples.jsonl, summary.json and config.json are shown when present, and a metric that the run
    did not write has no chart. Raises InputError when the folder holds no run.
    """
    folder = pathlib.Path(workdir)
    if not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder}: no metrics.jsonl: name the workdir of a run")
    metrics = read_jsonl(folder / "metrics.jsonl")
    samples = read_jsonl(folder / "samples.jsonl") if (folder / "samples.jsonl").is_file() else []
    sections = [
        _headline(folder, metrics, _read_json(folder / "summary.json")),
        _charts(metrics),
        _samples(samples),
        _config(folder / "config.json"),
    ]
    write_atomic(folder / "report.html", page(folder.resolve().name, "".join(sections)))
    return folder / "report.html"


def page(title: str, body: str) -> str:
    """A whole page that needs nothing else and may run nothing; `body` is HTML whose texts are escaped."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


def embedded(figure: Any, alt: str) -> str:
    """A matplotlib figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<img alt='{escaped(alt)}' src='data:image/svg+xml;base64,{image}'>"


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, escaped."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same as lines of Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(one_line(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def one_line(text: str) -> str:
    """A text without control characters and line breaks."""
    return " ".join(visible(str(text)).split())


def escaped(value: Any) -> str:
    """A value as HTML shows it, whatever it holds."""
    return html.escape(visible(str(value)))


def duration(seconds: float) -> str:
    """'4 min 31 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _headline(folder: pathlib.Path, metrics: Rows, summary: Mapping[str, Any]) -> str:
    facts = [f"{metrics[-1]['step']} steps" if metrics else "no steps yet"]
    if "seconds_total" in summary:
        facts.append(duration(summary["seconds_total"]))
    facts += [str(summary["device"])] if "device" in summary else []
    facts += [f"{name} {summary[name]}" for name in ("seed", "compiles") if name in summary]
    if isinstance(summary.get("versions"), Mapping):
        facts += [f"{name} {version}" for name, version in summary["versions"].items()]
    if not summary:
        facts.append("not finished: no summary.json")
    title = f"<h1>{escaped(folder.resolve().name)}</h1><p class='facts'>{escaped(' · '.join(facts))}</p>"
    return title + _score_table(summary.get("before") or {}, summary.get("after") or {})


def _score_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    rows = []
    for name, label, form in SCORES:
        cells = [_score(scores, name, form) for scores in (before, after)]
        if any(cells):
            numbers = "".join(f"<td class='number'>{cell or '–'}</td>" for cell in cells)
            rows.append(f"<tr><td>{label}</td>{numbers}</tr>")
    if not rows:
        return ""
    head = "<tr><th>held-out problems</th><th class='number'>before</th><th class='number'>after</th></tr>"
    return f"<table class='scores'><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _score(scores: Mapping[str, Any], name: str, form: str) -> str:
    if scores.get(name) is None:
        return ""
    interval = scores.get(f"{name}_ci95")
    low_high = " to ".join(form.format(bound) for bound in interval) if interval else ""
    return form.format(scores[name]) + (f" <span class='interval'>{low_high}</span>" if low_high else "")


def _charts(metrics: Rows) -> str:
    figures = []
    for title, caption, patterns, manner in CHARTS:
        series = _series(metrics, patterns)
        if series:
            image = embedded(_draw(series, manner), f"{title} by step")
            figures.append(f"<figure><figcaption>{title}<span>{caption}</span></figcaption>{image}</figure>")
    return f"<h2>Curves by step</h2><div class='charts'>{''.join(figures)}</div>" if figures else ""


def _series(metrics: Rows, patterns: Sequence[tuple[str, str]]) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> (steps, values) of the metrics that exist; lines without the metric, or with null, are left out."""
    named = {name for name, _ in patterns}
    labels: dict[str, str] = {}
    for name, label in patterns:
        if name.endswith("*"):
            prefix = name[:-1]
            found = dict.fromkeys(key for row in metrics for key in row if key.startswith(prefix) and key not in named)
            labels |= {key: key.removeprefix(prefix) for key in found}
        else:
            labels[name] = label
    series = {}
    for name, label in labels.items():
        points = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), int | float)]
        if points:
            series[label] = ([step for step, _ in points], [float(value) for _, value in points])
    return series


def _draw(series: Mapping[str, tuple[list[int], list[float]]], manner: str) -> Any:
    """A small line chart."""
    from matplotlib.figure import Figure  # here: it takes a second to import, and only reports need it
    from matplotlib.ticker import MaxNLocator

    # Room for labels of six characters and for a legend, by hand: a layout engine takes half of a report's time.
    figure = Figure(figsize=(4.6, 2.7))
    axes = figure.add_axes((0.12, 0.11, 0.86, 0.77 if len(series) > 1 else 0.82))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    colours = dict(zip(series, COLOURS * len(series), strict=False)) | OWN_COLOURS
    for label, points in series.items():
        steps, values = thinned(*points)
        name = label.replace("$", r"\$")  # a reward's name is no formula
        smooth = manner != "exact" and len(values) > 30
        marker = "o" if len(values) <= 30 else ""
        if smooth:
            axes.plot(steps, values, color=colours[label], alpha=0.25, linewidth=0.8)
            values = _running_mean(values, len(values) // 15)
        axes.plot(steps, values, color=colours[label], linewidth=1.8, marker=marker, markersize=3.5, label=name)
    everything = [value for _, values in series.values() for value in values]
    if manner == "log" and min(everything) > 0 and max(everything) > 10 * min(everything):
        axes.set_yscale("log")
    if not any(everything):
        axes.set_ylim(-0.02, 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=9, colors="#44403c", length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#a8a29e")
    axes.grid(True, color="#f0efee")
    if len(series) > 1:
        axes.legend(fontsize=9, frameon=False, ncols=min(len(series), 4), loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    return figure


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Steps and values, means of neighbours where there are more than POINTS."""
    width = -(-len(values) // POINTS)

    def mean(numbers: Sequence[float]) -> list[float]:
        return [sum(part := numbers[at : at + width]) / len(part) for at in range(0, len(numbers), width)]

    return mean(steps), mean(values)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the `width` values up to each one, as a person watching the run would have seen it."""
    return [sum(part := values[max(0, i + 1 - width) : i + 1]) / len(part) for i in range(len(values))]


def _samples(rows: Rows) -> str:
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return ""
    chosen = {steps[0], *steps[-(SAMPLE_STEPS - 1) :]}
    shown = sorted((row for row in rows if row["step"] in chosen), key=lambda row: -row["step"])[:SAMPLE_ROWS]
    best: dict[str, float] = {}
    for name, value in (item for row in rows for item in _rewards(row).items() if _is_number(item[1])):
        best[name] = max(value, best.get(name, value))
    head = "<colgroup><col style='width:17%'><col style='width:25%'><col><col style='width:10%'></colgroup>"
    head += "<thead><tr><th>reward</th><th>prompt</th><th>completion</th><th>step</th></tr></thead>"
    body = "".join(_sample(row, best) for row in shown)
    note = f"{len(shown)} of the {len(rows)} completions in samples.jsonl: the last steps and the first."
    return f"<h2>Samples</h2><p class='small'>{note}</p><table class='samples'>{head}<tbody>{body}</tbody></table>"


def _sample(row: Mapping[str, Any], best: Mapping[str, float]) -> str:
    cells = "".join(_reward(name, value, best.get(name, 0.0)) for name, value in _rewards(row).items())
    if _is_number(row.get("advantage")):
        cells += f"<div class='small'>advantage {row['advantage']:+.2f}</div>"
    about = [str(row["step"])]
    about += [f"{row['length']} tokens"] if "length" in row else []
    about += ["cut off"] if row.get("ended") is False else []
    answer = f"\n<span class='small'>answer: {escaped(row['answer'])}</span>" if row.get("answer") is not None else ""
    return (
        f"<tr><td>{cells}</td><td class='text'>{escaped(row.get('prompt', ''))}{answer}</td>"
        f"<td class='text'>{escaped(row.get('completion', ''))}</td>"
        f"<td class='small'>{'<br>'.join(map(escaped, about))}</td></tr>"
    )


def _rewards(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"total": row.get("total"), **(row.get("rewards") or {})}


def _reward(name: str, value: Any, best: float) -> str:
    """Green in the upper half of what the run's samples reached, amber below, red where nothing was earned."""
    colour = "none"
    if _is_number(value):
        colour = "bad" if value <= 0 else "good" if value > best / 2 else "some"
    total = " total" if name == "total" else ""
    shown = f"{value:.2f}" if _is_number(value) else "none"
    return f"<div class='reward {colour}{total}'><span>{escaped(name)}</span><span>{shown}</span></div>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _config(path: pathlib.Path) -> str:
    config = _read_json(path)
    if not config:
        return ""
    return f"<h2>Configuration</h2><pre>{escaped(json.dumps(config, indent=2, ensure_ascii=False))}</pre>"


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}): mend or remove it") from error
