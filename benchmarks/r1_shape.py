"""The table of docs/r1.md: what runs of the toy pipeline, one a seed, have of the papers' shape.

python benchmarks/r1_shape.py runs/r1_toy_0 runs/r1_toy_1 runs/r1_toy_2
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

REASONING = ("eval_sums", "eval_comparison", "eval_countdown")
GENERAL = "eval_general"
Measures = Mapping[str, Mapping[str, float]]  # by stage and name


def measures(workdir: pathlib.Path) -> Measures:
    """Of each evaluated stage: reasoning, cons, language, preference."""
    record = json.loads((workdir / "pipeline.json").read_text("utf-8"))
    found = {}
    for name in record["order"]:
        path = workdir / name / "evaluation" / "summary.json"
        if not path.is_file():
            continue
        sets = json.loads(path.read_text("utf-8"))["sets"]
        means = {title: statistics.mean(sets[each][score] for each in REASONING) for title, score in
                 (("reasoning", "pass@1"), ("cons@8", "cons"), ("language", "language"))}  # fmt: skip
        found[name] = means | {"preference": sets[GENERAL]["instructions_strict"]}
    return found


def minutes(workdir: pathlib.Path) -> float:
    """What all stages took."""
    stages = json.loads((workdir / "pipeline.json").read_text("utf-8"))["stages"].values()
    return sum(s.get("seconds_made", 0) + s.get("seconds_evaluated", 0) for s in stages) / 60


def statements(m: Measures) -> dict[str, bool]:
    """Whether each statement of docs/r1.md holds for these measures."""
    return {
        "Zero mixes languages": m["zero"]["language"] < 0.9,
        "R1 does not": m["all_scenarios"]["language"] > 0.97,
        "Zero reasons better than its base": m["zero"]["reasoning"] >= m["base"]["reasoning"] + 0.2,
        "the cold start loses reasoning": m["cold_start"]["reasoning"] <= m["zero"]["reasoning"] - 0.03,
        "RL regains it": m["reasoning"]["reasoning"] >= m["zero"]["reasoning"] - 0.02,
        "the last stage lifts preference": m["all_scenarios"]["preference"] >= m["sft"]["preference"] + 0.05,
        "without losing reasoning": m["all_scenarios"]["reasoning"] >= m["reasoning"]["reasoning"] - 0.03,
        "majority vote beats pass@1": m["zero"]["cons@8"] > m["zero"]["reasoning"],
        "distilling beats RL": m["distilled"]["reasoning"] >= m["student_rl"]["reasoning"] + 0.03,
    }


def mean_of(each: Sequence[Measures]) -> Measures:
    """The mean over runs."""
    return {
        stage: {name: statistics.mean(m[stage][name] for m in each) for name in values}
        for stage, values in each[0].items()
    }


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    workdirs = parser.parse_args().workdirs
    each = [measures(workdir) for workdir in workdirs]
    names = [workdir.name for workdir in workdirs]
    rows = [
        [stage, name, *(f"{m[stage][name]:.1%}" for m in [*each, mean_of(each)])]
        for stage, values in each[0].items()
        for name in values
    ]
    print(table(["stage", "measure", *names, "mean"], rows), end="\n\n")
    verdicts = [statements(m) for m in [*each, mean_of(each)]]
    rows = [[said, *("yes" if v[said] else "no" for v in verdicts)] for said in verdicts[0]]
    took = [minutes(workdir) for workdir in workdirs]
    rows.append(["minutes", *(f"{t:.1f}" for t in took), f"{statistics.mean(took):.1f}"])
    print(table(["statement", *names, "mean"], rows))


if __name__ == "__main__":
    main()
