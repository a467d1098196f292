"""Held-out evaluation: pass@1 with its interval, format, length, greedy and majority answers."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from grpo_jax import processes
from grpo_jax.data.mixture import SET
from grpo_jax.data.prompts import PromptSet, make_eval_batches
from grpo_jax.metrics import Fetcher
from grpo_jax.parallel import put_rows, row_sharding, row_shards
from grpo_jax.rewards.host import Record
from grpo_jax.rewards.letters import language_share, languages_of
from grpo_jax.rewards.mathematics import verdict_at_once
from grpo_jax.rewards.reward_model import COLLECTION
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rewards.texts import answer_span, last_number
from grpo_jax.rewards.texts import number as lenient_reward
from grpo_jax.sampler.types import Prompts, Rollout
from grpo_jax.step import EVALUATION, StepParts, draw_completions, noise_key, sampling_variables
from grpo_jax.text import Tokenizer

BOOTSTRAPS = 2000
Same = Callable[[set[tuple[str, str]]], dict[tuple[str, str], bool]]
Class = TypeVar("Class", bound=Hashable)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Samples held-out problems with the run's own sampler and scores them with its own rewards.

    Attributes:
      parts: the run's step parts; the scorer is replaced by one over the held-out rows.
      prompts: the held-out problems.
      scorer: the rewards over them.
      tokenizer: turns tokens into text.
    """

    parts: StepParts
    prompts: PromptSet
    scorer: Scorer
    tokenizer: Tokenizer

    @functools.cached_property
    def _scores(self) -> Any:
        return jax.jit(self.scorer.score_in_graph)

    @functools.cached_property
    def _ready(self) -> Any:
        return jax.jit(functools.partial(sampling_variables, self.parts))

    @functools.cached_property
    def _samplers(self) -> dict[tuple[int, float, float, int], Any]:
        return {}

    def _sampler(self, samples: int, temperature: float, top_p: float, top_k: int) -> Any:
        """A program (variables, prompts, key) -> rollout; one for each way of sampling."""
        key = (samples, temperature, top_p, top_k)
        if key not in self._samplers:
            config = dataclasses.replace(
                self.parts.config.sampler, group_size=samples, temperature=temperature, top_k=top_k, top_p=top_p
            )

            def program(variables: Any, prompts: Prompts, noise: jax.Array) -> Rollout:
                with jax.default_matmul_precision(self.parts.config.model.matmul_precision):
                    return draw_completions(self.parts, variables, prompts, noise, config)

            rows = row_sharding(self.parts.mesh)
            self._samplers[key] = jax.jit(program, out_shardings=rows)
        return self._samplers[key]

    def sample(
        self,
        variables: Any,
        problems: int,
        samples: int,
        temperature: float,
        top_p: float,
        step: int,
        between: Callable[[], None] = lambda: None,
        top_k: int = 0,
        group: int = 0,
    ) -> list[dict]:
        """One record a completion of the first `problems` problems, in order, scored by component.

        `between` is called before each batch; it may raise to end a long evaluation. `group` completions of a problem
        are drawn at a time, all where it is 0: the same ones, by a program that other numbers of samples share.
        """
        group = group or samples
        at_once = self.problems_at_once(self.parts.config.completions, group)
        in_graph = functools.partial(self._scores, variables=variables.get(COLLECTION))
        ready, fetch, records = self.ready(variables), Fetcher(), []
        host = self.scorer.host
        if host is not None:
            host.step = step
        batches = make_eval_batches(self.prompts, at_once, self.parts.config.data.max_prompt_length, problems)
        parts = (
            batch.replace(first_sample=np.full_like(batch.draw, i))
            for batch in batches
            for i in range(0, samples, group)
        )
        for batch, prompts, rollout in self.rollouts(ready, parts, group, temperature, top_p, step, between, top_k):
            scores = self.scorer.score_on_host(prompts, rollout, in_graph, fetch)
            found, scores = fetch((rollout, scores))
            if host is not None and scores.failed.any():
                processes.raise_any(host.take_error())
            told = Record() if host is None else host.take().of_all()
            records += self._records(batch, found, scores, group, samples, told)
        return sorted(records, key=lambda record: record["problem"])  # a problem's samples stay in their order

    def problems_at_once(self, completions: int, samples: int) -> int:
        """Problems of a batch of about so many completions, split evenly over the devices."""
        shards = row_shards(self.parts.mesh)
        return max(completions // samples // shards, 1) * shards

    def rollouts(
        self,
        ready: Any,
        batches: Iterable[Prompts],
        samples: int,
        temperature: float,
        top_p: float,
        step: int,
        between: Callable[[], None] = lambda: None,
        top_k: int = 0,
    ) -> Iterator[tuple[Prompts, Prompts, Rollout]]:
        """(batch on the host, the same on the devices, its completions there) of each batch; noise is that of `step`.

        `ready` is what `ready` gives, `between` is called before each batch.
        """
        program = self._sampler(samples, temperature, top_p, top_k)
        noise = noise_key(self.parts.config.seed, EVALUATION, step)
        for batch in batches:
            between()
            count, rows = len(batch.row), row_sharding(self.parts.mesh)
            prompts = put_rows(lambda own, batch=batch: jax.tree.map(lambda x: x[own], batch), count, rows)
            yield batch, prompts, program(ready, prompts, noise)

    def ready(self, variables: Any) -> Any:
        """Parameters as sampling wants them, to be made once for all batches."""
        return self._ready(variables)

    def _records(self, batch: Prompts, rollout: Any, scores: Any, group: int, samples: int, told: Record) -> list[dict]:
        records, first = [], np.zeros_like(batch.draw) if batch.first_sample is None else batch.first_sample
        for i in range(len(rollout.lengths)):
            if rollout.weight[i] == 0 or first[i // group] + i % group >= samples:
                continue
            number = int(batch.row[i // group])
            row, ids = self.prompts.rows[number], rollout.tokens[i, : rollout.lengths[i]].tolist()
            extra = told.extra.get((number, tuple(ids)))
            records.append(
                {
                    "problem": number,
                    "prompt": row["prompt"],
                    "answer": row["answer"],
                    "completion": (text := self.tokenizer.decode(ids)),
                    "language": language_share(text, *languages_of([row], self.parts.config.rewards.language)),
                    "rewards": self.scorer.components(scores, i),
                    "right": scores.values[i, 0] >= 1.0,
                    "length": int(rollout.lengths[i]),
                    "ended": bool(rollout.ended[i]),
                    **({SET: row[SET]} if self.prompts.mixture is not None and SET in row else {}),
                    **({"extra": extra} if extra else {}),
                }
            )
        return records

    def measure(
        self, variables: Any, problems: int, samples: int, step: int, between: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Any], list[dict]]:
        """pass@1 and what stands beside it at eval.temperature, and the records they come from."""
        config = self.parts.config.eval
        how = (config.temperature, config.top_p, step, between)
        records = self.sample(variables, problems, samples, *how, group=min(config.samples, samples))
        return summarise(self.graded(records), config.reflective_words) | self.by_set(records), records

    def greedy(self, variables: Any, problems: int, step: int, between: Callable[[], None] = lambda: None) -> float:
        """Share of problems that greedy decoding gets right."""
        records = self.graded(self.sample(variables, problems, 1, 0.0, 1.0, step, between))
        return float(np.mean([r["right"] for r in records]))

    def graded(self, records: list[dict]) -> list[dict]:
        """The records of problems whose completions the first component says right or wrong."""
        mixture = self.prompts.mixture
        return records if mixture is None else [r for r in records if mixture.graded()[r["problem"]]]

    def by_set(self, records: list[dict]) -> dict[str, Any]:
        """Under 'sets' the mean weighted total and components of each prompt set; nothing where there is one."""
        sets, mixture = self.parts.config.data.sets, self.prompts.mixture
        if not sets or mixture is None:
            return {}
        made, names = {}, self.scorer.names
        for number, each in enumerate(sets):
            of_set = [r for r in records if mixture.member[r["problem"]] == number]
            if not of_set:
                continue
            own = [r["rewards"] for r in of_set]
            told = {name: [r[name] for r in own if r[name] is not None] for name in names}
            means = {name: float(np.mean(values)) for name, values in told.items() if values}
            weights = dict(zip(names, mixture.weights[number], strict=True))
            total = sum(weights[name] * (r[name] or 0.0) for r in own for name in names) / len(own)
            made[each.name] = {
                "total": float(total),
                "rewards": means,
                "mean_length": float(np.mean([r["length"] for r in of_set])),
                "completions": len(own),
            } | mean_language(of_set)
        return {"sets": made}


def summarise(records: Sequence[dict], reflective: Sequence[str] = ()) -> dict[str, Any]:
    """pass@1 is the mean over a problem's samples, its interval a bootstrap over problems."""
    by_problem: dict[int, list[dict]] = collections.defaultdict(list)
    for record in records:
        by_problem[record["problem"]].append(record)
    passed = np.array([np.mean([r["right"] for r in group]) for group in by_problem.values()])
    found: dict[str, Any] = {
        "pass@1": float(passed.mean()),
        "pass@1_ci95": list(bootstrap(passed)),
        "mean_length": float(np.mean([r["length"] for r in records])),
        "truncated": float(np.mean([not r["ended"] for r in records])),
        "problems": len(by_problem),
        "samples": len(records) // len(by_problem),
    }
    formats = [name for name in records[0]["rewards"] if "format" in name]
    if formats:
        found["format"] = float(np.mean([r["rewards"][formats[0]] or 0.0 for r in records]))
    if all(last_number(str(r["answer"])) is not None for r in records):
        texts, answers = [r["completion"] for r in records], [r["answer"] for r in records]
        lenient = lenient_reward([r["prompt"] for r in records], texts, answer=answers)
        found["lenient"] = float(np.mean([value or 0.0 for value in lenient]))
    found |= mean_language(records)
    if reflective:
        found["reflective_words"] = float(np.mean([words_among(r["completion"], reflective) for r in records]))
    if found["samples"] > 2:
        found["majority"] = float(np.mean([majority_right(group) for group in by_problem.values()]))
    return found


def mean_language(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """'language': the mean share of the completions that have words; nothing where none has."""
    shares = [r["language"] for r in records if r.get("language") is not None]
    return {"language": float(np.mean(shares))} if shares else {}


def words_among(text: str, words: Sequence[str]) -> int:
    """How many words of a text are among these, whatever their case."""
    wanted = {word.casefold() for word in words}
    return sum(word.casefold() in wanted for word in re.findall(r"\w+", text))


def majority_right(records: Sequence[dict]) -> bool:
    """Whether the answer that most of a problem's completions give is right; of equals, the first drawn wins.

    Numbers that are plainly equal count as one answer.
    """

    def same(pairs: set[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        return {pair: verdict_at_once(*pair) is True for pair in pairs}

    (answers,) = answer_classes([[answer_span(r["completion"]) for r in records]], same)
    winner = majority(answers)
    return winner is not None and verdict_at_once(str(records[0]["answer"]).strip(), winner) is True


def answer_classes(groups: Sequence[Sequence[str | None]], same: Same) -> list[list[str | None]]:
    """Each answer replaced by the first of its problem's answers that it is equivalent to; None stays None.

    `same` tells of many pairs at once; each round compares what is left of every problem with one more answer.
    """
    heads: list[dict[str, str]] = [{} for _ in groups]
    left = [list(dict.fromkeys(answer for answer in group if answer is not None)) for group in groups]
    while any(left):
        verdicts = same({(rest[0], other) for rest in left for other in rest[1:]})
        for number, rest in enumerate(left):
            if rest:
                alike = [rest[0], *(other for other in rest[1:] if verdicts[rest[0], other])]
                heads[number] |= dict.fromkeys(alike, rest[0])
                left[number] = [other for other in rest if other not in heads[number]]
    return [
        [None if answer is None else head[answer] for answer in group]
        for group, head in zip(groups, heads, strict=True)
    ]


def majority(classes: Sequence[Class | None]) -> Class | None:
    """The most frequent class, the first drawn of equals; None where nobody answers."""
    counts = collections.Counter(item for item in classes if item is not None)
    return counts.most_common(1)[0][0] if counts else None


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k completions is right, unbiased (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"{k=} must lie between 1 and {samples=}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean over problems drawn again with replacement."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (BOOTSTRAPS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
