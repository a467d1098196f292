"""Prompt sets: rows made into tokens once, and the order in which they are drawn.

The order is a pure function of (seed, draw number): a resumed run needs the draw cursor and nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from grpo_jax import processes
from grpo_jax.data.mixture import Mixture
from grpo_jax.data.order import row_order
from grpo_jax.errors import InputError
from grpo_jax.sampler.types import Prompts


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet:
    """A dataset ready to be drawn from.

    Attributes:
      rows: the rows as loaded; host rewards look text and columns up here.
      tokens: the prompt of each row, template included, unpadded; of several processes each makes those it draws.
      columns: what in-graph rewards need, each array with one entry a row.
      mixture: what set each row is of, where there are several or rewards change in the run.
    """

    rows: tuple[dict, ...]
    tokens: Sequence[np.ndarray]
    columns: dict[str, np.ndarray]
    mixture: Mixture | None = None

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def order(self, draws: Int[np.ndarray, "n"], seed: int, shuffle: bool) -> Int[np.ndarray, "n"]:
        """Row of each draw number."""
        if self.mixture is None:
            return row_order(draws, self.size, seed, shuffle)
        return self.mixture.order(draws, seed, shuffle)


class Encoded(Sequence[np.ndarray]):
    """Token ids of rows' prompts, each made when it is first asked for."""

    def __init__(self, rows: Sequence[dict], encode: Callable[[Any], list[int]]):
        self._rows, self._encode = rows, encode
        self._made: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        if number not in self._made:
            if not 0 <= number < len(self._rows):
                raise IndexError(number)
            self._made[number] = np.asarray(self._encode(self._rows[number]["prompt"]), np.int32)
        return self._made[number]


def prompt_lengths(tokens: Sequence[np.ndarray]) -> Int[np.ndarray, "rows"]:
    """The length of each prompt; of several processes each makes its share and tells the others.

    Raises the InputError of the first row, of any process, that cannot be encoded.
    """
    own, error = [], None
    try:
        own = [len(tokens[i]) for i in range(processes.number(), len(tokens), processes.count())]
    except InputError as found:
        error = found
    processes.raise_any(error)
    lengths = np.zeros(len(tokens), np.int64)
    for number, told in enumerate(processes.exchange(own)):
        lengths[number :: processes.count()] = told
    return lengths


def build_prompt_set(
    rows: Sequence[dict],
    encode: Callable[[Any], list[int]],
    max_prompt_length: int,
    columns: Callable[[Sequence[dict]], dict[str, np.ndarray]],
    mixture: Mixture | None = None,
) -> PromptSet:
    """Encodes rows' 'prompt'; raises InputError for an empty dataset and for prompts beyond their budget.

    One process encodes all rows here. Of several each encodes its share, so that all are checked, and later those that
    it draws.
    """
    if not rows:
        raise InputError("data: the dataset is empty: no row to draw prompts from")
    tokens = Encoded(rows, encode)
    lengths = prompt_lengths(tokens)
    if not lengths.all():
        first = int(lengths.argmin())
        raise InputError(f"data: the prompt of row {first} has no tokens: {rows[first]['prompt']!r}")
    if lengths.max() > max_prompt_length:
        first = int(np.argmax(lengths > max_prompt_length))
        raise InputError(
            f"data: the prompt of row {first} (counted from 0) has {lengths[first]} tokens, more than "
            f"data.max_prompt_length={max_prompt_length}, as have {int((lengths > max_prompt_length).sum())} of "
            f"{len(rows)} rows: {lengths.max()} would fit all"
        )
    made = {name: np.asarray(column) for name, column in columns(rows).items()}
    for name, column in made.items():
        if column.shape[:1] != (len(rows),):
            raise ValueError(f"column {name!r} has shape {column.shape}, its first axis must be the {len(rows)} rows")
    return PromptSet(tuple(rows), tokens, made, mixture)


def make_batch(
    prompt_set: PromptSet,
    first_draw: int,
    count: int,
    seed: int,
    shuffle: bool,
    max_prompt_length: int,
    only: Int[np.ndarray, "own"] | None = None,
) -> Prompts:
    """Draws first_draw to first_draw + count - 1 as numpy arrays, prompts padded with 0 on the left.

    Of these `count` rows `only` names those that are made (None: all), by their places.
    """
    draws = first_draw + (np.arange(count, dtype=np.int64) if only is None else np.asarray(only, np.int64))
    chosen = prompt_set.order(draws, seed, shuffle)
    made = _prompts(prompt_set, draws, chosen, np.ones(len(draws), np.float32), max_prompt_length)
    mixture = prompt_set.mixture
    return made if mixture is None else made.replace(rewards=mixture.rewards(chosen, draws))


def make_eval_batches(
    prompt_set: PromptSet, batch: int, max_prompt_length: int, problems: int = 0
) -> Iterator[Prompts]:
    """The first `problems` rows (0: all; never more than there are) in order, `batch` at a time.

    Row r has draw number r. Filler rows of weight 0 complete the last batch: they repeat row 0 under draw
    numbers of their own.
    """
    wanted = min(problems or prompt_set.size, prompt_set.size)
    return make_row_batches(prompt_set, range(wanted), batch, max_prompt_length)


def make_row_batches(
    prompt_set: PromptSet, rows: Sequence[int], batch: int, max_prompt_length: int
) -> Iterator[Prompts]:
    """These rows, `batch` at a time, each under its own number as draw number; filler as in `make_eval_batches`."""
    for start in range(0, len(rows), batch):
        here = np.asarray(rows[start : start + batch], np.int64)
        filler = np.arange(batch - len(here), dtype=np.int64)
        draws = np.concatenate([here, prompt_set.size + filler])
        weight = (np.arange(batch) < len(here)).astype(np.float32)
        yield _prompts(prompt_set, draws, np.concatenate([here, 0 * filler]), weight, max_prompt_length)


def _prompts(
    prompt_set: PromptSet, draws: np.ndarray, chosen: np.ndarray, weight: np.ndarray, max_prompt_length: int
) -> Prompts:
    tokens = np.zeros((len(chosen), max_prompt_length), np.int32)
    for place, row in enumerate(chosen):
        prompt = prompt_set.tokens[row]
        tokens[place, max_prompt_length - len(prompt) :] = prompt
    fields: dict[str, Any] = {
        "tokens": tokens,
        "lengths": np.array([len(prompt_set.tokens[row]) for row in chosen], np.int32),
        "draw": draws.astype(np.int32),
        "row": chosen.astype(np.int32),
        "weight": weight,
        "columns": {name: column[chosen] for name, column in prompt_set.columns.items()},
        "rewards": None if prompt_set.mixture is None else prompt_set.mixture.rewards(chosen),
    }
    return Prompts(**fields)
