"""Filters: each drops what it is for, by its name, and nothing else; near duplicates against brute force."""

import dataclasses
import itertools

import numpy as np
import pytest

from grpo_jax.data.filters import (
    FILTERS,
    FilterConfig,
    bands,
    decontaminate,
    deduplicate,
    filter_completions,
    jaccard,
    longest_paragraph,
    ngrams,
    repeated_share,
    words_of,
)
from grpo_jax.errors import InputError

GOOD = "<think>Two and three are five.</think> <answer>5</answer>"
STRICT = FilterConfig(format="think_answer", least_length=2, most_length=100, paragraph_words=20, repetition=0.3)
STRICT = dataclasses.replace(STRICT, repetition_ngram=3)


def row(completion: str = GOOD, **fields) -> dict:
    made = {"prompt": "2+3", "completion": completion, "right": True, "ended": True, "length": 20}
    return made | fields


def thought(text: str) -> str:
    return f"<think>{text}</think> <answer>5</answer>"


CASES = {
    "verified correct": [row(right=False)],
    "ended": [row(ended=False)],
    "format": [row("5"), row(GOOD + " done"), row(GOOD[7:])],
    "one language": [row(thought("Two and три равно пять.")), row(language="ru")],
    "repetition": [row(thought("so it is five " * 3))],
    "length": [row(length=1), row(length=101)],
    "long paragraphs": [row(thought(" ".join(map(chr, range(97, 118)))))],
    "code blocks": [row(thought("```python\nprint(5)\n```"))],
}


def test_every_filter_is_counted_by_its_name():
    assert list(CASES) == list(FILTERS)
    good = [row(), row(thought("one\n\n" + "two three four five six")), row("Два и три.", language="ru")]
    good[2]["completion"] = thought("Два и три равно пять.")
    good.append(row(GOOD[7:], opened=True))
    good.append(row(GOOD[7:], prompt="2+3 <think>\n"))
    rows = [*good, *itertools.chain(*CASES.values())]
    found = filter_completions(rows, STRICT)
    assert found.rows == good and found.kept == 5
    assert found.dropped == {name: len(some) for name, some in CASES.items()}
    assert found.rows[0] is not rows[0], "rows are copies"


@pytest.mark.parametrize("name", list(FILTERS))
def test_every_filter_can_be_switched_off(name):
    off = {
        "verified correct": {"right": False},
        "ended": {"ended": False},
        "format": {"format": "none"},
        "one language": {"language_share": 0.0},
        "repetition": {"repetition": 1.0},
        "length": {"least_length": 0, "most_length": 0},
        "long paragraphs": {"paragraph_words": 0},
        "code blocks": {"code_blocks": True},
    }
    assert filter_completions(CASES[name], STRICT).kept == 0
    assert filter_completions(CASES[name], dataclasses.replace(STRICT, **off[name])).kept == len(CASES[name])


def test_a_row_is_counted_once_under_the_first_filter():
    found = filter_completions([row("```", right=False, ended=False)], STRICT)
    assert found.dropped["verified correct"] == 1 and sum(found.dropped.values()) == 1


def test_chats_are_read_by_what_the_assistant_says():
    chat = [{"role": "user", "content": "```"}, {"role": "assistant", "content": GOOD}]
    assert filter_completions([row(chat, prompt=chat[:1])], STRICT).kept == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "json", "filters.format='json' is not one of think_answer, answer, none"),
        ("language", "xx", "filters.language='xx' has no known script"),
        ("language_share", 1.5, "filters.language_share=1.5 must lie between 0 and 1"),
        ("repetition", -0.1, "filters.repetition=-0.1 must lie"),
        ("repetition_ngram", 0, "filters.repetition_ngram=0 must be at least 1"),
        ("paragraph_words", -1, "filters.paragraph_words=-1 must be at least 0"),
    ],
)
def test_bad_values_are_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        filter_completions([], dataclasses.replace(FilterConfig(), **{field: value}))


def test_words_n_grams_and_paragraphs():
    assert words_of("Ｈello, WORLD_2  3.5 你好") == ["hello", "world", "2", "3", "5", "你", "好"]
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")] and not list(ngrams(["a"], 2))
    assert repeated_share("a b a b a", 2) == 0.5 and repeated_share("a", 2) == 0.0
    assert longest_paragraph("a b\nc\n \nd e") == 3 and longest_paragraph("") == 0


def test_contaminated_rows_share_an_n_gram_with_an_evaluation_set():
    test = "Natalia sold 48 clips to her friends in April, and then half as many in May. How many in all?"
    sets = [test, [{"role": "user", "content": "What is 17 + 4?"}]]
    rows = [
        row(prompt="Repeat: natalia SOLD 48 clips to her friends -- in april and then go on"),
        row(prompt="Who?", completion="It says: half as many in May; how many in all? So many."),
        row(prompt="what is 17+4"),
        row(prompt="Natalia sold 48 clips to her friends in May, and then half as many in April"),
        row(prompt="What is 17 + 45?"),
    ]
    found = decontaminate(rows, sets, n=9)
    assert found.dropped == {"contaminated": 3} and found.rows == rows[3:]
    assert decontaminate(rows, sets, n=7).kept == 1 and decontaminate(rows, [], n=9).kept == 5
    with pytest.raises(InputError, match="n=0 must be at least 1"):
        decontaminate(rows, sets, n=0)


def test_duplicates_exact_and_near():
    base = " ".join(f"word{i}" for i in range(60))
    near = base.replace("word30", "other")  # 55 of 61 trigrams in common
    rows = [
        row(base),
        row(f"  {base.upper()}\n"),
        row(near),
        row(near, prompt="another question"),
        row(" ".join(f"word{i}" for i in range(30))),
        row("5"),
        row("6"),
        row("5 ."),
    ]
    found = deduplicate(rows)
    assert found.dropped == {"exact duplicates": 1, "near duplicates": 2}
    assert found.rows == [rows[0], rows[3], rows[4], rows[5], rows[6]]
    assert deduplicate(rows, least_similarity=0.95).dropped["near duplicates"] == 1
    with pytest.raises(InputError, match="must be above 0"):
        deduplicate(rows, least_similarity=0.0)


def test_near_duplicates_are_those_of_brute_force():
    """Texts in families of unlike changes; the candidates of MinHash lose none of the pairs."""
    random = np.random.default_rng(1)
    texts = []
    for _ in range(12):
        words = random.integers(0, 500, 80)
        for changes in (0, 1, 2, 4, 8, 20):
            changed = words.copy()
            changed[random.choice(80, changes, replace=False)] = random.integers(500, 1000, changes)
            texts.append(" ".join(f"w{i}" for i in changed))
    rows = [row(texts[i]) for i in random.permutation(len(texts))]
    kept: list[dict] = []
    for one in rows:
        grams = set(ngrams(words_of(one["completion"]), 3))
        others = (set(ngrams(words_of(other["completion"]), 3)) for other in kept)
        if all(jaccard(grams, other) < 0.8 for other in others):
            kept.append(one)
    assert 12 < len(kept) < len(rows) and deduplicate(rows).rows == kept


def test_bands_agree_as_often_as_the_sets_overlap():
    """A MinHash of two sets is equal with a chance of their Jaccard similarity."""
    a, b = ({(str(i),) for i in range(start, start + 300)} for start in (0, 100))
    equal = np.mean([x == y for p, q in zip(bands(a), bands(b), strict=True) for x, y in zip(p, q, strict=True)])
    assert jaccard(a, b) == 0.5 and abs(equal - 0.5) < 0.15  # 128 hashes: three deviations are 0.13
    assert bands(a) == bands(set(reversed(sorted(a))))


def test_filters_follow_each_other_and_their_counts_stay():
    rows = [row(), row(), row(right=False), row(prompt="the question of the test", completion=thought("seven"))]
    found = (
        filter_completions(rows, STRICT).then(deduplicate).then(lambda r: decontaminate(r, ["question of the test"], 3))
    )
    assert found.kept == 1 and found.dropped["verified correct"] == 1
    assert (found.dropped["exact duplicates"], found.dropped["contaminated"]) == (1, 1)
    assert sum(found.dropped.values()) + found.kept == len(rows)
