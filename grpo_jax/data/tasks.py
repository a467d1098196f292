"""Reasoning tasks made in the run, in languages with scripts of their own; nothing is downloaded.

`data.source='tasks'` reads `data.path`: kinds, and after a colon languages, such as 'sums,countdown:en,ru'. Kinds are
sums, countdown, comparison, general (prompts without a right answer, see `general`) and reasoning_gym:NAME. A row is
{'prompt', 'answer', 'task', 'kind', 'language', ...}: 'task' is the kind of task, 'kind' how `grpo-jax eval` grades it.

About a tenth of all problems is held out by a hash of the problem, whatever its language and the order of its numbers.
"""

import dataclasses
import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from grpo_jax.data import arithmetic, general, gym
from grpo_jax.errors import InputError

GENERAL, GYM = "general", "reasoning_gym:"
MOST_DIGITS = 4  # places have names up to thousands
SIGNS = "+-*"
COUNTDOWN_NUMBERS = range(2, 8)  # a factor of 1 makes other signs reach the same target
MOST_TARGET = 99
# What sets the hashed pairs of each kind apart; sums are hashed as those of `arithmetic`.
COMPARISON_MARK, COUNTDOWN_MARK = 1_000_000_000, 2_000_000_000

# What prompts and worked texts say, by language. `words` are what chains consist of beside digits and signs.
PROMPTS: dict[str, dict[str, str]] = {
    "en": {
        "sums": "Add {0} and {1}.",
        "countdown": "Get {0} from {1}, {2}, {3} in order.",
        "largest": "Largest of {0}, {1}, {2}?",
        "smallest": "Smallest of {0}, {1}, {2}?",
    },
    "ru": {
        "sums": "Сложи {0} и {1}.",
        "countdown": "Получи {0} из {1}, {2}, {3} по порядку.",
        "largest": "Наибольшее из {0}, {1}, {2}?",
        "smallest": "Наименьшее из {0}, {1}, {2}?",
    },
}
WORDS: dict[str, dict[str, str]] = {
    "en": {
        **{"place0": "ones", "place1": "tens", "place2": "hundreds", "place3": "thousands", "carry": "carry"},
        **{"less": "less", "more": "more", "so": "so", "try": "try", "no": "no", "yes": "yes", "wait": "wait"},
    },
    "ru": {
        **{"place0": "единицы", "place1": "десятки", "place2": "сотни", "place3": "тысячи", "carry": "перенос"},
        **{"less": "меньше", "more": "больше", "so": "значит", "try": "пробуем", "no": "нет", "yes": "да"},
        "wait": "стой",
    },
}
LANGUAGES = tuple(PROMPTS)
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem in any language.

    Attributes:
      task: sums, countdown or comparison.
      phrase: which prompt of PROMPTS it is put in.
      numbers: those of the prompt, in its order.
      answer: the one right answer.
    """

    task: str
    phrase: str
    numbers: tuple[int, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `data.path` names."""

    tasks: tuple[str, ...]
    languages: tuple[str, ...]


def parse(path: str) -> Asked:
    """Kinds and languages of a `data.path`; all languages where it names none. Raises InputError naming what is not."""
    kinds, colon, languages = path.rpartition(":")
    if not colon or kinds.rpartition(",")[2].strip() == GYM[:-1]:  # no colon, or that of reasoning_gym:NAME
        kinds, languages = path, ",".join(LANGUAGES)
    tasks, named = ([item.strip() for item in items.split(",") if item.strip()] for items in (kinds, languages))
    asked = Asked(tuple(tasks), tuple(named))
    where = f"data.path={path!r}"
    for language in asked.languages:
        if language not in LANGUAGES:
            raise InputError(f"{where}: {language!r} is none of the languages {', '.join(LANGUAGES)}")
    for task in asked.tasks:
        if task not in (*POOLS, GENERAL) and not task.startswith(GYM):
            known = ", ".join((*POOLS, GENERAL, f"{GYM}NAME"))
            raise InputError(f"{where}: {task!r} is none of the tasks {known}; write KIND,KIND:LANGUAGE,LANGUAGE")
    for names in (asked.tasks, asked.languages):
        if not names or len(set(names)) < len(names):
            raise InputError(f"{where}: names a kind or a language twice, or none; such as 'sums,comparison:en,ru'")
    return asked


def rows(seed: int, split: str, path: str, digits: int) -> list[dict]:
    """Rows of one side, 'train' or 'eval': kinds and languages by turns, at most `arithmetic.MAX_ROWS` in all.

    Raises InputError for a path that cannot be meant, and where a kind has no rows.
    """
    asked = parse(path)
    sources = [made for task in asked.tasks for made in _rows_of(seed, split, task, asked.languages, digits)]
    each = -(-arithmetic.MAX_ROWS[split] // len(sources))
    turns = itertools.zip_longest(*(made[:each] for made in sources))
    found = [row for turn in turns for row in turn if row is not None]
    return found[: arithmetic.MAX_ROWS[split]]


def _rows_of(seed: int, split: str, task: str, languages: tuple[str, ...], digits: int) -> list[list[dict]]:
    """The rows of a kind, a list a language; every problem stands in one language only."""
    if task == GENERAL:
        return [general.rows(seed, split, language) for language in languages]
    if task.startswith(GYM):
        made = gym.rows(seed, split, task.removeprefix(GYM), arithmetic.MAX_ROWS[split])
        return [
            [{**row, "prompt": gym.ASKS[language] + row["prompt"], "task": task, "language": language} for row in mine]
            for language, mine in _dealt(made, languages)
        ]
    pool = problems(seed, split, task, digits)
    if len(pool) < len(languages):
        raise InputError(f"data.digits={digits} leaves no {task} to the {split} split: raise it, or change {seed=}")
    return [[row_of(problem, language) for problem in mine] for language, mine in _dealt(pool, languages)]


def _dealt(items: Sequence[Item], languages: tuple[str, ...]) -> list[tuple[str, Sequence[Item]]]:
    return [(language, items[number :: len(languages)]) for number, language in enumerate(languages)]


def row_of(problem: Problem, language: str) -> dict:
    """The row of a problem in a language."""
    return {
        "prompt": prompt(problem, language),
        "answer": problem.answer,
        "task": problem.task,
        "kind": "exact" if problem.task == "countdown" else "math",
        "language": language,
    }


def prompt(problem: Problem, language: str) -> str:
    """The question of a problem."""
    return PROMPTS[language][problem.phrase].format(*problem.numbers)


@functools.lru_cache(maxsize=16)
def problems(seed: int, split: str, task: str, digits: int) -> tuple[Problem, ...]:
    """All problems of a kind on one side in a seeded order, at most `arithmetic.MAX_ROWS`."""
    if split not in arithmetic.MAX_ROWS:
        raise ValueError(f"{split=} must be one of {tuple(arithmetic.MAX_ROWS)}")
    if not 1 <= digits <= MOST_DIGITS:
        raise InputError(f"data.digits={digits} must lie between 1 and {MOST_DIGITS} for data.source='tasks'")
    return tuple(POOLS[task](seed, split, digits))


def _sums(seed: int, split: str, digits: int) -> list[Problem]:
    made = arithmetic.rows(seed, split, digits)
    return [Problem("sums", "sums", (row["a"], row["b"]), row["answer"]) for row in made]


def _comparisons(seed: int, split: str, digits: int) -> list[Problem]:
    """Largest or smallest of three different numbers."""
    wanted = arithmetic.MAX_ROWS[split] * (4 if split == "train" else 4 * arithmetic.HELD_OUT_IN)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, 11])))
    drawn = np.concatenate([rng.integers(0, 10**digits, (wanted, 3)), rng.integers(0, 2, (wanted, 1))], axis=1)
    x, y, z = np.sort(drawn[:, :3], axis=1).T
    held = arithmetic.held_out(seed, x * 10**digits + y, z + COMPARISON_MARK)
    kept = drawn[(x < y) & (y < z) & (held == (split == "eval"))]
    made = []
    for a, b, c, smallest in dict.fromkeys(map(tuple, kept.tolist())):
        phrase, best = ("smallest", min(a, b, c)) if smallest else ("largest", max(a, b, c))
        made.append(Problem("comparison", phrase, (a, b, c), str(best)))
    return made[: arithmetic.MAX_ROWS[split]]


def _countdowns(seed: int, split: str, digits: int) -> list[Problem]:
    """Three small numbers and a target that exactly one choice of two signs reaches, the numbers' order kept."""
    del digits
    made, pairs = [], []
    for numbers in itertools.product(COUNTDOWN_NUMBERS, repeat=3):
        reached: dict[int, list[str]] = {}
        for text in expressions(numbers):
            reached.setdefault(value(text), []).append(text)
        for target, ways in reached.items():
            if len(ways) == 1 and 0 <= target <= MOST_TARGET:
                made.append(Problem("countdown", "countdown", (target, *numbers), ways[0]))
                low, middle, high = sorted(numbers)
                pairs.append((low * 100 + middle * 10 + high, target + COUNTDOWN_MARK))
    held = arithmetic.held_out(seed, *np.array(pairs).T)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, 12])))
    order = [number for number in rng.permutation(len(made)).tolist() if held[number] == (split == "eval")]
    return [made[number] for number in order][: arithmetic.MAX_ROWS[split]]


POOLS: dict[str, Callable[[int, str, int], list[Problem]]] = {
    "sums": _sums,
    "countdown": _countdowns,
    "comparison": _comparisons,
}


def expressions(numbers: Iterable[int]) -> list[str]:
    """The nine ways to put signs between three numbers: '8-3+2'."""
    a, b, c = numbers
    return [f"{a}{first}{b}{second}{c}" for first in SIGNS for second in SIGNS]


def value(expression: str) -> int:
    """The value of numbers with + - * between them, products first; made here, no text of a model comes in."""
    terms = re.findall(r"[+-]?[0-9*]+", expression)
    return sum(math.prod(map(int, term.split("*"))) for term in terms)


def key(prompt: str) -> tuple:
    """What problems have in common that must stand on one side: kind and numbers in any order, else the text."""
    for phrase, pattern in _patterns():
        if found := pattern.fullmatch(prompt):
            first, *rest = map(int, found.groups())
            if phrase == "countdown":
                return phrase, first, *sorted(rest)
            return "comparison" if len(rest) == 2 else phrase, *sorted((first, *rest))
    return ("text", gym.bare(prompt))


@functools.lru_cache(maxsize=1)
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    pairs = [(phrase, text) for prompts in PROMPTS.values() for phrase, text in prompts.items()]
    return [(phrase, re.compile(re.sub(r"\\\{\d\\\}", r"(\\d+)", re.escape(text)))) for phrase, text in pairs]


def assert_disjoint(
    train_rows: Iterable[Mapping | tuple[str, str]], held_out_rows: Iterable[Mapping | tuple[str, str]]
) -> None:
    """Raises AssertionError when a problem is in both; read from the prompts' text.

    Rows are mappings with 'prompt', or (prompt, completion) pairs as `worked_texts` makes them.
    """
    sides = [
        {key(row["prompt"] if isinstance(row, Mapping) else row[0]) for row in side}
        for side in (train_rows, held_out_rows)
    ]
    if common := sides[0] & sides[1]:
        raise AssertionError(f"{len(common)} held-out problems are trained on, such as {min(common, key=str)}")


# What the embedded base learns from. A text is right with `right_share`: it thinks step by step and is well formed.
# The others answer directly, slip on the way, or break the format. Their answers scatter around the right one (unlike
# those of `arithmetic`, which agree), so that a majority of samples is better than one. Most right chains mix the
# languages word by word, and few wrong ones do: the mixing that DeepSeek-R1-Zero showed then comes with being right.
WRONG_SHARES = {"direct": 0.45, "slip": 0.30, "unclosed": 0.15, "bare": 0.10}
MIXED_SHARE = {"right": 0.6, "slip": 0.15}  # of the chains of a mode
SWITCH = 0.5  # chance that a word of a mixed chain is in the other language
CORRECTED_SHARE = 0.2  # of right chains: a slip is seen and mended after the word for "wait"
GUESS_RIGHT = {"sums": 0.35, "comparison": 0.45, "countdown": 0.2}  # of answers without a chain
TRIES = 3  # of a countdown at most, the right one included


def worked_texts(seed: int, count: int, path: str, digits: int, right_share: float) -> list[tuple[str, str]]:
    """`count` pairs (prompt, completion) of mixed quality on training problems; no end token.

    Kinds and languages come by turns, problems again when there are fewer. Raises InputError for kinds without worked
    texts.
    """
    if not 0 <= right_share <= 1:
        raise InputError(f"base.right_share={right_share!r} must lie between 0 and 1")
    asked = parse(path)
    if strange := [task for task in asked.tasks if task.startswith(GYM)]:
        raise InputError(f"data.path={path!r}: {strange[0]} has no worked texts to make a base from: name model.path")
    rng = random.Random(f"{seed} worked texts")
    turns = itertools.cycle(
        (task, language, mine)
        for task in asked.tasks
        for language, mine in _dealt(_train_pool(seed, task, digits), asked.languages)
    )
    used: dict[tuple[str, str], int] = {}
    made = []
    for task, language, mine in itertools.islice(turns, count):
        number = used.setdefault((task, language), 0)
        used[task, language] += 1
        if task == GENERAL:
            made.append(general.worked_text(seed, language, rng))
        else:
            problem = mine[number % len(mine)]
            made.append((prompt(problem, language), completion(problem, language, _mode(rng, right_share), rng)))
    return made


def _train_pool(seed: int, task: str, digits: int) -> tuple[Problem, ...]:
    return () if task == GENERAL else problems(seed, "train", task, digits)


def _mode(rng: random.Random, right_share: float) -> str:
    if rng.random() < right_share:
        return "right"
    return rng.choices(list(WRONG_SHARES), list(WRONG_SHARES.values()))[0]


def completion(problem: Problem, language: str, mode: str, rng: random.Random) -> str:
    """What `mode` ('right' or a key of WRONG_SHARES) says to a problem."""
    if mode in ("direct", "unclosed", "bare"):
        answer = guess(problem, rng)
        return {"direct": f"<answer>{answer}</answer>", "unclosed": f"<answer>{answer}", "bare": answer}[mode]
    mixed = rng.random() < MIXED_SHARE[mode]
    voice = Voice(language, SWITCH if mixed else 0.0, rng)
    slips = "none" if mode == "right" else "kept"
    if mode == "right" and rng.random() < CORRECTED_SHARE:
        slips = "mended"
    chain, answer = CHAINS[problem.task](problem, voice, slips)
    return f"<think>{chain}</think><answer>{answer}</answer>"


@dataclasses.dataclass(frozen=True)
class Voice:
    """Picks the words of a chain: each is in another language with the chance `switch`."""

    language: str
    switch: float
    rng: random.Random

    def __call__(self, word: str) -> str:
        """A word of WORDS."""
        others = [language for language in LANGUAGES if language != self.language]
        return WORDS[self.rng.choice(others) if self.rng.random() < self.switch else self.language][word]


def guess(problem: Problem, rng: random.Random) -> str:
    """An answer without a chain: right now and then, else near by."""
    if rng.random() < GUESS_RIGHT[problem.task]:
        return problem.answer
    if problem.task == "sums":
        near = [int(problem.answer) + by for by in (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20)]
        return str(rng.choice([number for number in near if number >= 0]))
    if problem.task == "comparison":
        return str(rng.choice([number for number in problem.numbers if str(number) != problem.answer]))
    return rng.choice([text for text in expressions(problem.numbers[1:]) if text != problem.answer])


def _sum_chain(problem: Problem, say: Voice, slips: str) -> tuple[str, str]:
    """'ones 7+8=15 carry 1, tens 2+4+1=7', and the answer that these digits make."""
    a, b = problem.numbers
    places = len(str(max(a, b)))
    at = say.rng.randrange(places) if slips != "none" else -1
    parts, carry, answer = [], 0, 0
    for place in range(places):
        x, y = a // 10**place % 10, b // 10**place % 10
        total, term = x + y + carry, f"{x}+{y}" + (f"+{carry}" if carry else "")
        text = f"{say(f'place{place}')} {term}="
        if place == at:
            wrong = total + (say.rng.choice((-1, 1)) if total else 1)
            text += f"{wrong}, {say('wait')}, {term}=" if slips == "mended" else ""
            total = total if slips == "mended" else wrong
        carry = total // 10 if place < places - 1 else 0
        parts.append(f"{text}{total}" + (f" {say('carry')} {carry}" if carry else ""))
        answer += (total - 10 * carry) * 10**place
    return ", ".join(parts), str(answer)


def _comparison_chain(problem: Problem, say: Voice, slips: str) -> tuple[str, str]:
    """'31 less 57, 57 more 48, so 57': the best so far against the next."""
    best, *others = problem.numbers
    at = say.rng.randrange(len(others)) if slips != "none" else -1
    parts = []
    for place, other in enumerate(others):
        names = ("less", "more") if best < other else ("more", "less")  # the true one first
        seen = names[0]
        if place == at and slips == "mended":
            parts += [f"{best} {say(names[1])} {other}", say("wait")]
        elif place == at:
            seen = names[1]
        parts.append(f"{best} {say(seen)} {other}")
        best = other if (seen == "less") == (problem.phrase == "largest") else best
    return ", ".join([*parts, f"{say('so')} {best}"]), str(best)


def _countdown_chain(problem: Problem, say: Voice, slips: str) -> tuple[str, str]:
    """'try 8+3+2=13 no, try 8-3+2=7 yes': other signs first, then those that do."""
    target, *numbers = problem.numbers
    others = [text for text in expressions(numbers) if text != problem.answer and text.count("*") < 2]
    tried = say.rng.sample(others, say.rng.randrange(TRIES))
    if slips == "kept":  # the last one is taken for what it is not
        tried = tried or say.rng.sample(others, 1)
        parts = [f"{say('try')} {text}={value(text)} {say('no')}" for text in tried[:-1]]
        return ", ".join([*parts, f"{say('try')} {tried[-1]}={target} {say('yes')}"]), tried[-1]
    parts = [f"{say('try')} {text}={value(text)} {say('no')}" for text in tried]
    last = f"{say('try')} {problem.answer}="
    if slips == "mended":
        last += f"{target + say.rng.choice((-1, 1))}, {say('wait')}, {problem.answer}="
    return ", ".join([*parts, f"{last}{target} {say('yes')}"]), problem.answer


CHAINS: dict[str, Callable[[Problem, Voice, str], tuple[str, str]]] = {
    "sums": _sum_chain,
    "countdown": _countdown_chain,
    "comparison": _comparison_chain,
}
