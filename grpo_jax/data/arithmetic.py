"""Sums: prompts with answers, and the worked sums of mixed quality that the embedded base learns from.

About a tenth of all operand pairs is held out by a hash of the pair. Training rows and worked sums
draw from the other pairs only, and (a, b) stands on the same side as (b, a).
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.errors import InputError

HELD_OUT_IN = 10  # one pair in ten is held out
MAX_DIGITS = 9  # a prompt's number among all 10^(2 digits) of them must fit in int64
MAX_ROWS = {"train": 10_000, "eval": 1_000}  # what `rows` makes at most; two digits have about 9,000 and 1,000

# Shares of the worked sums that are not right (1 - right_share). All of them forget every carry, so that they agree
# on one wrong answer: it wins the majority vote wherever the sum has a carry (70% of two-digit sums), and sampling
# more does not find the way out. Most answer directly. While right_share is below 0.45, `<answer>` is the likeliest
# first token (0.87 of the wrong against right_share and 0.06 of the wrong that think), so the greedy path is the wrong
# mode too; yet one token away `<think>` opens the right mode, whose weight reinforcement can raise.
# Measured at right_share 0.36 on a smaller decoder (3 layers of width 96, 450 steps, 128 held-out sums): pass@1 0.43,
# greedy 0.27, majority of 8 0.42; 0.85 when `<think>` is given, of 0.93 that these shares allow.
DIRECT_SHARE = 0.80  # <answer>65</answer>
THINKING_SHARE = 0.06  # thinks as the right mode does, with carries of 0: thinking alone is no warrant either
UNCLOSED_SHARE = 0.07  # <answer>65
BARE_SHARE = 0.07  # 65
WRONG_SHARES = {"direct": DIRECT_SHARE, "thinking": THINKING_SHARE, "unclosed": UNCLOSED_SHARE, "bare": BARE_SHARE}

_MASK = 2**64 - 1
_PHRASINGS = ("symbols", "question")


def prompt(a: int, b: int, phrasing: str = "symbols") -> str:
    """'27+48=' ('symbols', for a base model), or 'What is 27 + 48?' ('question', for a chat model)."""
    if phrasing not in _PHRASINGS:
        raise InputError(f"data.path={phrasing!r} is not a phrasing of sums: use one of {_PHRASINGS}")
    return f"{a}+{b}=" if phrasing == "symbols" else question(a, b)


def question(a: int, b: int) -> str:
    """The sum in words that a chat model knows."""
    return f"What is {a} + {b}?"


def sums(seed: int, split: str, digits: int, count: int, phrasing: str = "symbols") -> list[dict]:
    """`count` different rows {'prompt', 'answer', 'a', 'b'} of one side, 'train' or 'eval'.

    Operands are uniform over 0..10^digits-1; whether a pair is held out depends on (seed, pair) alone.
    Raises InputError when that side has fewer than `count` sums.
    """
    pairs = _pairs(seed, split, digits, count)
    return [{"prompt": prompt(a, b, phrasing), "answer": str(a + b), "a": a, "b": b} for a, b in pairs.tolist()]


def rows(seed: int, split: str, digits: int, phrasing: str = "symbols") -> list[dict]:
    """All sums of one side in a seeded order, at most MAX_ROWS of them."""
    return sums(seed, split, digits, min(MAX_ROWS[split], _available(seed, split, digits)), phrasing)


def held_out(seed: int, a: Int[np.ndarray, "n"], b: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Whether each pair is held out: splitmix64 (Steele et al. 2014) of the seed and the unordered pair."""
    low, high = np.minimum(a, b).astype(np.uint64), np.maximum(a, b).astype(np.uint64)
    start = _splitmix64(np.array([seed & _MASK], np.uint64))
    return _splitmix64(start ^ (low << np.uint64(32) | high)) % np.uint64(HELD_OUT_IN) == 0


def operands(text: str) -> tuple[int, int]:
    """The two numbers of a prompt made here, read back from its text."""
    numbers = re.findall(r"\d+", text)
    if len(numbers) != 2:
        raise InputError(f"prompt {text!r} is not a sum of two numbers")
    return int(numbers[0]), int(numbers[1])


def assert_disjoint(
    train_rows: Iterable[Mapping | tuple[str, str]], held_out_rows: Iterable[Mapping | tuple[str, str]]
) -> None:
    """Raises AssertionError when an operand pair, in either order, is in both; read from the prompts' text.

    Rows are mappings with 'prompt', or (prompt, completion) pairs as `worked_sums` makes them.
    """
    trained, held = _pair_set(train_rows), _pair_set(held_out_rows)
    if common := trained & held:
        raise AssertionError(f"{len(common)} held-out operand pairs are trained on, such as {min(common)}")


def worked_sums(seed: int, count: int, digits: int, right_share: float) -> list[tuple[str, str]]:
    """`count` pairs (prompt, completion) of mixed quality on training pairs; no end token.

    A share of `right_share` is right (`right_completion`); the others forget their carries, in the layouts of
    WRONG_SHARES. Mode and operands are independent. Pairs repeat only when there are fewer than `count`.
    """
    if not 0 <= right_share <= 1:
        raise InputError(f"base.right_share={right_share!r} must lie between 0 and 1")
    available = _available(seed, "train", digits)
    cycles = [
        _pairs(seed, "train", digits, min(available, count - done), 1 + done // available)
        for done in range(0, count, available)
    ]
    modes = ("right", *WRONG_SHARES)
    shares = [right_share, *((1 - right_share) * share for share in WRONG_SHARES.values())]
    drawn = np.searchsorted(np.cumsum(shares), _generator(seed, "modes").random(count), side="right")
    made = []
    for (a, b), mode in zip(np.concatenate(cycles).tolist() if cycles else [], drawn.tolist(), strict=True):
        made.append((prompt(a, b), completion(a, b, digits, modes[min(mode, len(modes) - 1)])))
    return made


def completion(a: int, b: int, digits: int, mode: str) -> str:
    """What `mode` ('right' or a key of WRONG_SHARES) answers to a + b."""
    carry = mode == "right"
    answer = a + b if carry else _sum_without_carries(a, b, digits)
    if mode in ("right", "thinking"):
        return f"<think>{_columns(a, b, digits, carry)}</think><answer>{answer}</answer>"
    return {"direct": f"<answer>{answer}</answer>", "unclosed": f"<answer>{answer}", "bare": f"{answer}"}[mode]


def _columns(a: int, b: int, digits: int, with_carries: bool) -> str:
    """Column sums from the units on: '7+8=15;2+4+1=07' for 27+48, the carry explicit, every sum two digits.

    Always `digits` columns, so that a token's place tells what it is.
    """
    lines, carry = [], 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x}+{y}={total:02d}" if place == 0 else f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10 if with_carries else 0
    return ";".join(lines)


def _sum_without_carries(a: int, b: int, digits: int) -> int:
    return sum((a // 10**p + b // 10**p) % 10 * 10**p for p in range(digits))


def _pairs(seed: int, split: str, digits: int, count: int, cycle: int = 0) -> Int[np.ndarray, "count 2"]:
    """`count` different ordered pairs of one side, each order of draws its own `cycle`."""
    available = _available(seed, split, digits)
    if count > available:
        raise InputError(
            f"data.digits={digits} has {available} sums in the {split} split, not {count}: raise data.digits"
        )
    base = 10**digits
    # Enough candidates that the side asked for has its count, bar a chance far below 1e-9.
    wanted = (HELD_OUT_IN if split == "eval" else 2) * 2 * count + 2000
    numbers = _generator(seed, split, cycle).choice(base**2, size=min(base**2, wanted), replace=False)
    a, b = np.divmod(numbers.astype(np.int64), base)
    kept = held_out(seed, a, b) == (split == "eval")
    return np.stack([a[kept], b[kept]], 1)[:count]


def _available(seed: int, split: str, digits: int) -> int:
    """How many ordered pairs a side has: counted to 3 digits, beyond that more than anybody asks for."""
    if split not in MAX_ROWS:
        raise ValueError(f"{split=} must be one of {tuple(MAX_ROWS)}")
    if not 1 <= digits <= MAX_DIGITS:
        raise InputError(f"data.digits={digits} must lie between 1 and {MAX_DIGITS}")
    if digits > 3:
        return 10 ** (2 * digits) // (2 * HELD_OUT_IN)  # half of what the split holds on average: surely there
    a, b = np.divmod(np.arange(100**digits), 10**digits)
    held = int(held_out(seed, a, b).sum())
    return held if split == "eval" else 100**digits - held


def _pair_set(rows: Iterable[Mapping | tuple[str, str]]) -> set[tuple[int, int]]:
    prompts = (row["prompt"] if isinstance(row, Mapping) else row[0] for row in rows)
    return {(min(pair), max(pair)) for pair in map(operands, prompts)}


def _generator(seed: int, purpose: str, cycle: int = 0) -> np.random.Generator:
    number = ("train", "eval", "modes").index(purpose)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed & _MASK, number, cycle])))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
