"""The numbers of an evaluation from its graded completions."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.recipes.evaluate import Same, answer_classes, bootstrap, majority, mean_language, pass_at_k
from grpo_jax.rewards.mathematics import expected_answer
from grpo_jax.rewards.texts import expected_text

VOTERS = 3  # a majority needs so many completions
VOTING = ("math", "choice", "exact")

Records = Sequence[Mapping[str, Any]]


def scores_of(problems: Sequence[Mapping[str, Any]], records: Records, same: Same) -> dict[str, Any]:
    """Scores of a set; `records` hold the samples of each problem (`sample` is None for the greedy one), graded.

    Shares are from 0 to 1, each with `NAME_ci95` where problems were drawn again for an interval. What does not apply
    (a majority of programs, greedy that was not drawn) is left out.
    """
    sampled, greedy = _by_problem(records, greedy=False), _by_problem(records, greedy=True)
    drawn = [record for group in sampled for record in group]
    found: dict[str, Any] = {"problems": len(sampled), "samples": min(map(len, sampled))}
    for name, grade in (("pass@1", "strict"), ("lenient", "lenient")):
        found |= _with_interval(name, [np.mean([r[grade] for r in group]) for group in sampled])
    ks = powers(found["samples"])
    found["pass@k"] = {str(k): _pass_at(sampled, "strict", k) for k in ks}
    found["pass@k_lenient"] = {str(k): _pass_at(sampled, "lenient", k) for k in ks}
    found |= _votes(problems, sampled, ks, same)
    if greedy:
        for name, grade in (("greedy", "strict"), ("greedy_lenient", "lenient")):
            found |= _with_interval(name, [group[0][grade] for group in greedy])
    for name in ("asked", "format"):
        found[name] = float(np.mean([r[name] for r in drawn]))
    found |= mean_language(drawn)
    if all(r["parts"] for r in drawn):
        for i, name in enumerate(("instructions_strict", "instructions_loose")):
            found[name] = _share_of_rules(problems, drawn, i)
    return found | _lengths(drawn) | {"tokens": sum(r["length"] for r in records), "seconds": _seconds(records)}


def powers(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def _by_problem(records: Records, greedy: bool) -> list[list[Mapping[str, Any]]]:
    groups: dict[int, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for record in records:
        if (record["sample"] is None) == greedy:
            groups[record["problem"]].append(record)
    return [groups[number] for number in sorted(groups)]


def _with_interval(name: str, values: Sequence[Any]) -> dict[str, Any]:
    each = np.asarray(values, float)
    return {name: float(each.mean()), f"{name}_ci95": list(bootstrap(each))}


def _pass_at(sampled: Sequence[Records], grade: str, k: int) -> float:
    return float(np.mean([pass_at_k(len(group), sum(r[grade] >= 1 for r in group), k) for group in sampled]))


def _votes(
    problems: Sequence[Mapping[str, Any]], sampled: Sequence[Records], ks: Sequence[int], same: Same
) -> dict[str, Any]:
    """cons@k: share of problems whose most frequent answer is right; of equals, the first drawn wins.

    Answers are one where they are equivalent, of the kind exact where they are the same text. With k below the number
    of samples: the mean over blocks of k of them.
    """
    chosen = [(problems[group[0]["problem"]], group) for group in sampled]
    if any(problem["kind"] not in VOTING for problem, _ in chosen) or ks[-1] < VOTERS:
        return {}
    exact = [pair for pair in chosen if pair[0]["kind"] == "exact"]
    voted = _classes([pair for pair in chosen if pair[0]["kind"] != "exact"], same)
    voted += [([r["answer"] for r in group], {expected_text(problem["answer"])}) for problem, group in exact]
    found: dict[str, Any] = {"cons@k": {}}
    for k in (k for k in ks if k >= VOTERS):
        by_problem = []
        for group, right in voted:
            blocks = [majority(group[at : at + k]) for at in range(0, len(group) - k + 1, k)]
            by_problem.append(np.mean([winner in right for winner in blocks]))
        scores = _with_interval("cons", by_problem)
        found["cons@k"][str(k)] = scores["cons"]
    return {**found, **scores}


def _classes(
    chosen: Sequence[tuple[Mapping[str, Any], Records]], same: Same
) -> list[tuple[list[str | None], set[str]]]:
    """Of each problem the class of every answer, and the classes that are right."""
    classes = answer_classes([[r["answer"] for r in group] for _, group in chosen], same)
    rights = [expected_answer(problem["answer"]) for problem, _ in chosen]
    named = {(right, item) for right, group in zip(rights, classes, strict=True) for item in group if item is not None}
    verdicts = same(named)
    pairs = zip(rights, classes, strict=True)
    return [(group, {item for item in group if item is not None and verdicts[right, item]}) for right, group in pairs]


def _share_of_rules(problems: Sequence[Mapping[str, Any]], drawn: Records, which: int) -> float:
    """Share of instructions that are followed, each counted once."""
    counts = [len(problems[r["problem"]]["rules"]) for r in drawn]
    return float(np.dot(counts, [r["parts"][which] for r in drawn]) / sum(counts))


def _lengths(drawn: Records) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mean_length": float(np.mean([r["length"] for r in drawn])),
        "truncated": float(np.mean([not r["ended"] for r in drawn])),
    }
    for name, value in (("length_right", 1.0), ("length_wrong", 0.0)):
        if some := [r["length"] for r in drawn if r["strict"] == value]:
            found[name] = float(np.mean(some))
    return found


def _seconds(records: Records) -> float:
    return round(sum(r["seconds"] for r in records), 3)
