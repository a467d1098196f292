import collections
import re

import numpy as np
import pytest

from grpo_jax.data import arithmetic
from grpo_jax.errors import InputError


def splitmix64(x: int) -> int:
    """The published generator on Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def column_sum(a: int, b: int) -> int:
    """a + b with every carry forgotten, on the digits as text."""
    width = max(len(str(a)), len(str(b)))
    return int("".join(str((int(x) + int(y)) % 10) for x, y in zip(f"{a:0{width}}", f"{b:0{width}}", strict=True)))


def test_splitmix64_has_the_published_first_value():
    # The first output of the reference implementation seeded with 0.
    assert int(arithmetic._splitmix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("seed", [0, 7, 2**40, -3])
def test_held_out_is_the_hash_of_seed_and_unordered_pair(seed):
    pairs = [(a, b) for a in range(20) for b in range(20)] + [(123_456_789, 999_999_999)]
    expected = [splitmix64(splitmix64(seed % 2**64) ^ (min(p) << 32 | max(p))) % 10 == 0 for p in pairs]
    a, b = np.array(pairs).T
    assert arithmetic.held_out(seed, a, b).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_two_digit_rows_split_all_pairs_about_one_to_nine(seed):
    train, held = arithmetic.rows(seed, "train", 2), arithmetic.rows(seed, "eval", 2)
    pairs = [(row["a"], row["b"]) for row in train + held]
    start = splitmix64(seed)
    sides_of_all = [splitmix64(start ^ (min(a, b) << 32 | max(a, b))) % 10 for a in range(100) for b in range(100)]
    out = sides_of_all.count(0)
    assert 830 <= out <= 1170  # a tenth of 5,050 unordered pairs, 4 standard deviations
    assert (len(train), len(held)) == (10_000 - out, min(out, arithmetic.MAX_ROWS["eval"]))
    assert len(set(pairs)) == len(pairs)
    sides = {}
    for side, rows in (("train", train), ("eval", held)):
        for row in rows:
            assert sides.setdefault(frozenset((row["a"], row["b"])), side) == side
    arithmetic.assert_disjoint(train, held)


def test_rows_read_back_to_their_answer():
    for digits in (1, 2, 3, 9):
        for row in arithmetic.sums(3, "train", digits, 40):
            a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)=", row["prompt"]).groups())  # pyright: ignore
            assert (a, b) == (row["a"], row["b"]) and row["answer"] == str(a + b) and max(a, b) < 10**digits


def test_operands_are_uniform_over_the_digit_range():
    a = np.array([row["a"] for row in arithmetic.sums(0, "train", 3, 6_000)])
    counts = np.histogram(a, bins=10, range=(0, 1000))[0]
    assert np.abs(counts - 600).max() < 5 * 24  # 5 standard deviations of a binomial


def test_sums_depend_on_seed_and_arguments_only():
    first = arithmetic.sums(5, "eval", 2, 50)
    assert first == arithmetic.sums(5, "eval", 2, 50)
    assert first != arithmetic.sums(6, "eval", 2, 50)
    assert [r["prompt"] for r in arithmetic.sums(5, "eval", 2, 50, "question")] == [
        f"What is {r['a']} + {r['b']}?" for r in first
    ]


def test_assert_disjoint_sees_a_pair_in_either_order_and_in_worked_sums():
    held = [{"prompt": "What is 48 + 27?"}]
    arithmetic.assert_disjoint([{"prompt": "27+47="}], held)
    with pytest.raises(AssertionError, match=r"\(27, 48\)"):
        arithmetic.assert_disjoint([{"prompt": "27+48="}], held)
    with pytest.raises(AssertionError, match=r"1 held-out"):
        arithmetic.assert_disjoint([("27+48=", "<answer>75</answer>")], held)


def test_worked_sums_leave_held_out_pairs_alone():
    worked = arithmetic.worked_sums(0, 6_000, 2, 0.36)
    arithmetic.assert_disjoint(worked, arithmetic.rows(0, "eval", 2))
    assert len({prompt for prompt, _ in worked}) == 6_000
    assert worked == arithmetic.worked_sums(0, 6_000, 2, 0.36)
    assert worked != arithmetic.worked_sums(1, 6_000, 2, 0.36)


def test_worked_sums_repeat_pairs_evenly_when_there_are_too_few():
    counts = collections.Counter(prompt for prompt, _ in arithmetic.worked_sums(0, 1_000, 1, 0.5))
    assert 80 <= len(counts) < 100 and max(counts.values()) - min(counts.values()) <= 1


LAYOUTS = {
    "thinks": re.compile(r"<think>([^<]*)</think><answer>(\d+)</answer>"),
    "direct": re.compile(r"<answer>(\d+)</answer>"),
    "unclosed": re.compile(r"<answer>(\d+)"),
    "bare": re.compile(r"(\d+)"),
}


def test_worked_sums_have_their_modes_in_their_shares():
    count, share = 8_000, 0.4
    found = collections.Counter()
    for prompt, completion in arithmetic.worked_sums(0, count, 3, share):
        a, b = arithmetic.operands(prompt)
        (layout,) = [name for name, pattern in LAYOUTS.items() if pattern.fullmatch(completion)]
        answer = int(LAYOUTS[layout].fullmatch(completion)[2 if layout == "thinks" else 1])  # pyright: ignore
        if layout != "thinks":
            assert answer == column_sum(a, b)
        assert answer in (a + b, column_sum(a, b))
        if column_sum(a, b) != a + b:  # where there is a carry, the answer tells the mode
            found[layout if answer != a + b else "right"] += 1
    carries = sum(found.values())
    assert 0.78 < carries / count < 0.88  # 1 - .55^3 of three-digit sums have a carry
    shares = {
        "right": share,
        "thinks": 0.6 * arithmetic.THINKING_SHARE,
        "direct": 0.6 * arithmetic.DIRECT_SHARE,
        "unclosed": 0.6 * arithmetic.UNCLOSED_SHARE,
        "bare": 0.6 * arithmetic.BARE_SHARE,
    }
    for name, expected in shares.items():
        assert abs(found[name] / carries - expected) < 4 * (expected * (1 - expected) / carries) ** 0.5, name
    assert sum(arithmetic.WRONG_SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_right_completions_add_up_when_read_again(digits):
    for prompt, completion in arithmetic.worked_sums(1, 300, digits, 1.0):
        a, b = arithmetic.operands(prompt)
        thought, answer = LAYOUTS["thinks"].fullmatch(completion).groups()  # pyright: ignore
        columns = thought.split(";")
        assert len(columns) == digits
        carry, units = 0, ""
        for place, column in enumerate(columns):
            terms, total = column.split("=")
            terms = [int(term) for term in terms.split("+")]
            assert terms[:2] == [a // 10**place % 10, b // 10**place % 10]
            assert terms[2:] == ([carry] if place else []) and sum(terms) == int(total) and len(total) == 2
            carry, units = int(total[0]), total[1] + units
        assert int(f"{carry}{units}") == int(answer) == a + b


def test_known_completions():
    made = {mode: arithmetic.completion(27, 48, 2, mode) for mode in ("right", *arithmetic.WRONG_SHARES)}
    assert made == {
        "right": "<think>7+8=15;2+4+1=07</think><answer>75</answer>",
        "thinking": "<think>7+8=15;2+4+0=06</think><answer>65</answer>",
        "direct": "<answer>65</answer>",
        "unclosed": "<answer>65",
        "bare": "65",
    }


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"data.digits=1 has .* sums in the eval split, not 50: raise"):
        arithmetic.sums(0, "eval", 1, 50)
    with pytest.raises(InputError, match=r"data.digits=10 must lie between 1 and 9"):
        arithmetic.sums(0, "train", 10, 5)
    with pytest.raises(InputError, match=r"base.right_share=1.5"):
        arithmetic.worked_sums(0, 5, 2, 1.5)
    with pytest.raises(InputError, match=r"data.path='words' is not a phrasing"):
        arithmetic.sums(0, "train", 2, 5, "words")
    with pytest.raises(InputError, match="not a sum of two numbers"):
        arithmetic.operands("Hello")
