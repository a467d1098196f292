"""Several prompt sets in one run, each with rewards of its own: who is drawn when, and what counts for it.

The order of draws is a pure function of (seed, draw number), as that of one set is. The sets that are drawn in a phase
of the run are dealt evenly by weight; which places of a step they take is shuffled, so that rounds over a pool of
prompts (dynamic sampling) hold all of them. Each set goes through its rows as a run on it alone would, epoch by epoch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.config import Config, DataConfig, PromptSetConfig
from grpo_jax.data.order import row_order
from grpo_jax.data.sources import load_rows
from grpo_jax.errors import InputError
from grpo_jax.sampler.types import RowRewards

SET = "set"  # the column of rows that names their set
CYCLE = 5040  # draws after which the dealing repeats; it divides by 1 to 10, so that simple ratios are exact
SOURCE_FIELDS = (
    "source path split eval_path eval_split prompt_column answer_column answer_marker".split()
)  # of DataConfig that a set has too


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Prompt sets as they are drawn from.

    Attributes:
      member: number of each row's set.
      shares: weight of each set.
      begins: first step, from 0, in which a set is drawn.
      applies: 1 where a component is asked about a set's completions.
      weights: weights of the components by set.
      component_begins: first step in which a component is asked.
      draws_per_step: draws of a step.
    """

    member: Int[np.ndarray, "rows"]
    shares: Float[np.ndarray, "S"]
    begins: Int[np.ndarray, "S"]
    applies: Float[np.ndarray, "S C"]
    weights: Float[np.ndarray, "S C"]
    component_begins: Int[np.ndarray, "C"]
    draws_per_step: int

    def order(self, draws: Int[np.ndarray, "n"], seed: int, shuffle: bool) -> Int[np.ndarray, "n"]:
        """Row of each draw number."""
        chosen = np.empty(len(draws), np.int64)
        owner, rank = self.dealt(np.asarray(draws, np.int64), seed)
        for number, rows in enumerate(self._rows):
            here = owner == number
            if here.any():
                places = row_order(rank[here], len(rows), seed + (number << 32), shuffle)
                chosen[here] = rows[places]
        return chosen

    def dealt(self, draws: Int[np.ndarray, "n"], seed: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """(set, how many of that set came before it) of each draw number; numbers of a step are in shuffled order."""
        step, place = np.divmod(draws, self.draws_per_step)
        slots = np.empty_like(draws)
        for one in np.unique(step):
            # Philox words sorted, as in `row_order`, which uses keys below 2^63.
            key = np.array([seed % 2**64, 2**63 + int(one)], np.uint64)
            shuffled = np.argsort(np.random.Philox(key=key).random_raw(self.draws_per_step), kind="stable")
            slots[step == one] = one * self.draws_per_step + shuffled[place[step == one]]
        owner, rank = np.empty_like(draws), np.empty_like(draws)
        for number, (first, last, deal) in enumerate(self._phases):
            here = (step >= first) & (step < last)
            cycles, at = np.divmod(slots[here] - first * self.draws_per_step, CYCLE)
            owner[here] = deal.owner[at]
            rank[here] = self._before[number][owner[here]] + cycles * deal.before[-1][owner[here]]
            rank[here] += deal.before[at, owner[here]]
        return owner, rank

    def rewards(self, rows: Int[np.ndarray, "n"], draws: Int[np.ndarray, "n"] | None = None) -> RowRewards:
        """What counts for rows drawn under these numbers; without numbers, what counts at the end of the run."""
        member = self.member[rows]
        asked = self.applies[member]
        if draws is not None:
            step = np.asarray(draws, np.int64) // self.draws_per_step
            asked = asked * (step[:, None] >= self.component_begins)
        fields: Any = {
            "member": member.astype(np.int32),
            "applies": asked.astype(np.float32),
            "weights": (asked * self.weights[member]).astype(np.float32),
        }
        return RowRewards(**fields)

    def graded(self) -> Bool[np.ndarray, "rows"]:
        """Rows whose completions the first component says right or wrong."""
        return self.applies[self.member, 0] > 0

    @functools.cached_property
    def _rows(self) -> list[Int[np.ndarray, "rows"]]:
        """The rows of each set."""
        return [np.flatnonzero(self.member == number) for number in range(len(self.shares))]

    @functools.cached_property
    def _phases(self) -> list[tuple[int, float, "Deal"]]:
        """(first step, step after the last, dealing) of each stretch in which the same sets are drawn."""
        starts = sorted({int(step) for step in self.begins} | {0})
        ends = [*starts[1:], np.inf]
        return [(a, b, deal(self.shares * (self.begins <= a))) for a, b in zip(starts, ends, strict=True)]

    @functools.cached_property
    def _before(self) -> list[Int[np.ndarray, "S"]]:
        """Draws of each set before each phase."""
        made = [np.zeros(len(self.shares), np.int64)]
        for first, last, dealing in self._phases[:-1]:
            cycles, rest = divmod((int(last) - first) * self.draws_per_step, CYCLE)
            made.append(made[-1] + cycles * dealing.before[-1] + dealing.before[rest])
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class Deal:
    """A cycle of draws: the set of each, and how many draws each set has before each place and in all."""

    owner: Int[np.ndarray, "cycle"]
    before: Int[np.ndarray, "cycle+1 S"]


def deal(shares: Float[np.ndarray, "S"]) -> Deal:
    """CYCLE draws dealt by share (largest remainders, at least one each), those of a set spread evenly."""
    wanted = shares / shares.sum() * CYCLE
    counts = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted, kind="stable")[: CYCLE - counts.sum()]] += 1
    while (short := (shares > 0) & (counts == 0)).any():
        counts[np.flatnonzero(short)[0]] += 1
        counts[np.argmax(counts)] -= 1
    owner = np.repeat(np.arange(len(shares)), counts)
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    owner = owner[np.argsort(places, kind="stable")]
    taken = np.cumsum(owner[:, None] == np.arange(len(shares)), axis=0)
    return Deal(owner, np.concatenate([np.zeros((1, len(shares)), np.int64), taken]))


def load_all_rows(config: DataConfig, split: str, seed: int) -> list[dict]:
    """The rows of `data.sets`, or of the one dataset that `data` names."""
    return load_set_rows(config, split, seed) if config.sets else load_rows(config, split, seed)


def load_set_rows(config: DataConfig, split: str, seed: int) -> list[dict]:
    """Rows of all sets, each with its set's name in the column `set`; raises InputError naming set, file and fix.

    Held-out rows of the sets lie between each other by weight, so that the first ones are of all sets.
    """
    found: list[tuple[float, dict]] = []
    for number, each in enumerate(config.sets):
        own = {name: getattr(each, name) for name in SOURCE_FIELDS}
        try:
            rows = load_rows(dataclasses.replace(config, sets=(), **own), split, seed)
        except InputError as error:
            raise InputError(f"data.sets[{number}] ({each.name}): {error}") from error
        for place, row in enumerate(rows):
            if row.get(SET, each.name) != each.name:
                raise InputError(
                    f"data.sets[{number}] ({each.name}): row {place} has {SET}={row[SET]!r}, the column that names the "
                    "prompt set: rename the column"
                )
            found.append(((place + 0.5) / each.weight, {**row, SET: each.name}))
    if split == "eval":
        found.sort(key=lambda item: item[0])
    return [row for _, row in found]


def components_of(each: PromptSetConfig, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """The components that a set's completions earn, with their weights."""
    chosen = each.rewards or tuple(names)
    default = dict(zip(names, weights, strict=True))
    return dict(zip(chosen, each.reward_weights or [default[name] for name in chosen], strict=True))


def build_mixture(config: Config, rows: Sequence[dict], drawn: bool = True) -> Mixture | None:
    """The mixture of a config over its rows; None where one set has the same rewards in the whole run.

    Raises InputError for rows of no set and, where rows are to be drawn, for a set without rows.
    """
    if not config.data.sets and not config.rewards.late_names:
        return None
    sets = config.data.sets or (PromptSetConfig(name="all"),)
    numbers = {each.name: number for number, each in enumerate(sets)}
    of_row = [row.get(SET) if config.data.sets else "all" for row in rows]
    for place, name in enumerate(of_row):
        if name not in numbers:
            raise InputError(f"dataset row {place}: column {SET}={name!r} is none of data.sets: {', '.join(numbers)}")
    member = np.array([numbers[name] for name in of_row if name is not None], np.int64)
    names, rewards = config.rewards.names, config.rewards
    earned = [components_of(each, names, rewards.weights) for each in sets]
    for number, each in enumerate(sets):
        if drawn and not (member == number).any():
            raise InputError(f"data.sets[{number}] ({each.name}): has no row to draw prompts from")
    return Mixture(
        member=member,
        shares=np.array([each.weight for each in sets], np.float64),
        begins=np.array([config.late_step * each.late for each in sets], np.int64),
        applies=np.array([[name in own for name in names] for own in earned], np.float64),
        weights=np.array([[own.get(name, 0.0) for name in names] for own in earned], np.float64),
        component_begins=np.array([config.late_step * (name in rewards.late_names) for name in names], np.int64),
        draws_per_step=config.draws_per_step,
    )
