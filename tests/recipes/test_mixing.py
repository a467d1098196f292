"""`grpo-jax mix`: proportions, order, thoughts, duplicates, edited mixtures."""

import collections
import dataclasses
import json
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import cli
from grpo_jax.errors import InputError
from grpo_jax.metrics import read_jsonl
from grpo_jax.recipes import mixing
from grpo_jax.recipes.mixing import Mixture, Part, counts, run, without_thought

WORDS = (
    "red green blue white black grey pink gold brown teal lime navy plum rust sand jade ruby onyx opal pearl".split()
)


def chat(asked: str, said: str, **columns) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], **columns}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mixture(tmp_path):
    """Twelve chats with thoughts, and four others."""
    sums = [chat(f"{word} and {n}", f"<think>{word} {n}.</think>\n{n}", id=str(n)) for n, word in enumerate(WORDS[:12])]
    rest = [
        chat("hello", "<think>greet</think>\nHi!"),
        {"prompt": "bye", "completion": "See you."},
        chat("write a poem about the sea at night, with six lines or more", "<think>sea</think>\nWaves."),
        chat("what colour is the sky", "Blue.", part="of an earlier mixture"),
    ]
    parts = (
        Part("reasoning", write(tmp_path / "sums.jsonl", sums), 3.0),
        Part("general", write(tmp_path / "rest.jsonl", rest), 1.0, "simple"),
    )
    return Mixture(parts, seed=5)


def mixed(folder) -> list[dict]:
    return read_jsonl(folder / "chats.jsonl")


def test_three_to_one(mixture, tmp_path):
    summary = run(mixture, tmp_path / "out")
    rows = mixed(tmp_path / "out")
    assert collections.Counter(row["part"] for row in rows) == {"reasoning": 12, "general": 4}
    assert summary["rows"] == 16 and set(summary["dropped"].values()) == {0}
    about = {
        name: [part[k] for k in ("read", "available", "drawn", "share")] for name, part in summary["parts"].items()
    }
    assert about == {"reasoning": [12, 12, 12, 0.75], "general": [4, 4, 4, 0.25]}
    said = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert said["hello"] == "Hi!" and summary["parts"]["general"]["thoughts_dropped"] == 1
    assert said["write a poem about the sea at night, with six lines or more"].startswith("<think>")
    assert said["red and 0"] == "<think>red 0.</think>\n0" and said["bye"] == "See you."
    assert {row.get("id") for row in rows} == {None, *map(str, range(12))}, "columns stay"
    words = sum(len(mixing.words_of(row["messages"][1]["content"])) for row in rows if row["part"] == "general")
    assert summary["parts"]["general"]["words"] == words
    order = [row["part"] for row in rows]
    assert order != sorted(order) and order != sorted(order, reverse=True), "shuffled"


def test_the_seed_names_rows_and_order(mixture, tmp_path):
    few = dataclasses.replace(mixture, rows=8)
    run(few, tmp_path / "a")
    run(few, tmp_path / "b")
    run(dataclasses.replace(few, seed=6), tmp_path / "c")
    a, b, c = (mixed(tmp_path / name) for name in "abc")
    assert a == b and collections.Counter(row["part"] for row in a) == {"reasoning": 6, "general": 2}
    assert {row.get("id") for row in a} != {row.get("id") for row in c}
    other = dataclasses.replace(few, parts=(few.parts[0], dataclasses.replace(few.parts[1], name="chat")))
    run(other, tmp_path / "d")
    ids = [{row.get("id") for row in rows} for rows in (a, mixed(tmp_path / "d"))]
    assert ids[0] == ids[1], "which rows a part gives does not depend on the other parts"


def test_a_part_that_is_used_up_shrinks_the_mixture_or_is_repeated(mixture, tmp_path, capsys):
    even = tuple(dataclasses.replace(part, weight=1.0) for part in mixture.parts)
    summary = run(dataclasses.replace(mixture, parts=even, rows=100), tmp_path / "shrunk")
    assert summary["rows"] == 8 and "8 rows, not 100: a part is used up" in capsys.readouterr().err
    summary = run(dataclasses.replace(mixture, parts=even, used_up="repeat"), tmp_path / "repeated")
    assert summary["rows"] == 24 and [p["passes"] for p in summary["parts"].values()] == [1.0, 3.0]
    asked = collections.Counter(row["messages"][0]["content"] for row in mixed(tmp_path / "repeated"))
    assert sorted(asked.values()) == [1] * 12 + [3] * 4
    run(dataclasses.replace(mixture, parts=even, used_up="repeat", rows=12), tmp_path / "some")
    asked = collections.Counter(row["messages"][0]["content"] for row in mixed(tmp_path / "some"))
    assert sorted(asked[key] for key in ("hello", "bye", "what colour is the sky")) in ([1, 1, 2], [1, 2, 2])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0, 3.0, 0.1]), st.integers(1, 50)), min_size=1, max_size=4),
    st.integers(0, 60),
    st.sampled_from(["shrink", "repeat"]),
)
def test_counts_are_the_weights(pairs, rows, used_up):
    weights, left = [w for w, _ in pairs], [n for _, n in pairs]
    found = counts(weights, left, rows, used_up)
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) * sum(found) for w in weights]
    assert all(abs(count - share) < 1 for count, share in zip(found, exact, strict=True))
    if used_up == "shrink":
        assert all(count <= n for count, n in zip(found, left, strict=True))
        one_more = [share * (sum(found) + 1) / max(sum(found), 1) for share in exact]
        full = any(share > n for share, n in zip(one_more, left, strict=True))
        assert sum(found) == rows or full or not sum(found), "as many as there are"
    else:
        assert sum(found) == rows if rows else any(c >= n for c, n in zip(found, left, strict=True))


def test_a_part_without_rows_leaves_nothing():
    assert counts([3.0, 1.0], [9, 0], 0, "repeat") == [0, 0]


def test_duplicates_and_evaluation_sets_are_kept_out_across_parts(mixture, tmp_path):
    sums = read_jsonl(mixture.parts[0].path)
    write(tmp_path / "rest.jsonl", [*read_jsonl(mixture.parts[1].path), sums[3], chat("x", "<think>y</think>")])
    summary = run(mixture, tmp_path / "out")
    general = summary["parts"]["general"]
    counted = [general[name] for name in ("read", "duplicates", "emptied", "contaminated", "available")]
    assert counted == [6, 1, 1, 0, 4]
    assert summary["dropped"]["empty without its thought"] == 1 and summary["dropped"]["exact duplicates"] == 1
    (tmp_path / "test.jsonl").write_text('{"question": "Sea: what COLOUR is it?", "answer": "blue"}\n')
    given = dataclasses.replace(mixture, against=(f"jsonl={tmp_path / 'test.jsonl'}",), ngram=3)
    general = run(given, tmp_path / "out")["parts"]["general"]
    assert (general["contaminated"], general["available"], general["drawn"]) == (1, 3, 3)


def test_thoughts_are_dropped_where_that_is_asked_for():
    thought, plain = chat("one two three", "<think>a</think>b</think>\n c"), chat("one", "c")
    assert without_thought(thought, "keep", 9) is thought and without_thought(plain, "drop", 0) is plain
    assert without_thought(thought, "simple", 2) is thought
    for thoughts, words in (("simple", 3), ("drop", 0)):
        made = without_thought(thought, thoughts, words)
        assert made["messages"][1]["content"] == "c" and thought["messages"][1]["content"].startswith("<think>")


def test_edited_mixtures_are_kept(mixture, tmp_path, capsys):
    run(mixture, tmp_path / "out")
    path = tmp_path / "out" / "chats.jsonl"
    path.write_text(path.read_text().replace("See you.", "So long."))
    assert run(mixture, tmp_path / "out")["chats"]["edited"] and "So long." in path.read_text()
    assert "edited since it was written, 16 chats: used as it is" in capsys.readouterr().out
    with pytest.raises(InputError, match="mixture.seed: 5 then, 7 now"):
        run(dataclasses.replace(mixture, seed=7), tmp_path / "out")
    write(tmp_path / "rest.jsonl", read_jsonl(mixture.parts[1].path)[:3])
    with pytest.raises(InputError, match="files.general: "):
        run(mixture, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ()}, "mix: nothing to mix: name files: --part"),
        ({"parts": (Part("a", "x"), Part("a", "y"))}, "--part a: is named twice"),
        ({"parts": (Part("a", "x", 0.0),)}, "--weight a=0.0: must be above 0"),
        ({"parts": (Part("a", "x", 1.0, "some"),)}, "--thoughts a=some: is not one of keep, simple, drop"),
        ({"parts": (Part("a", "nowhere"),)}, "--part a=nowhere: no such file"),
        ({"used_up": "stop"}, "--used_up stop: is not one of shrink, repeat"),
        ({"rows": -1}, "--rows -1: must be at least 0"),
        ({"simple_words": -1}, "--simple_words -1"),
        ({"similarity": 0.0}, "similarity=0.0 must be above 0"),
        ({"ngram": 0}, "n=0 must be at least 1"),
    ],
)
def test_what_cannot_be_meant(mixture, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(mixture, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_hands_on_all_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(mixing, "run", lambda mixture, workdir: calls.append((mixture, str(workdir))))
    given = "--part a=x.jsonl --part b=y=z.jsonl --weight a=3 --thoughts b=drop --rows 9 --used_up repeat --seed 4"
    more = " --simple_words 3 --similarity 0.7 --against gsm8k=g --against jsonl=h --ngram 5 --workdir w"
    assert cli.main(["mix", *(given + more).split()]) == 0
    parts = (Part("a", "x.jsonl", 3.0), Part("b", "y=z.jsonl", 1.0, "drop"))
    assert calls == [(Mixture(parts, 9, "repeat", 3, 0.7, ("gsm8k=g", "jsonl=h"), 5, 4), "w")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "a"], "--part a: write NAME=VALUE"),
        (["--part", "a=x", "--part", "a=y"], "--part a=x: write NAME=VALUE, each name once"),
        (["--part", "general=x", "--weight", "generl=3"], "--weight generl: .* did you mean general?"),
        (["--part", "a=x", "--weight", "a=three"], "--weight: could not convert .*three.*: write NAME=NUMBER"),
        (["--config", "arithmetic"], "--config: mix has options of its own"),
    ],
)
def test_options_that_cannot_be_read(capsys, options, message):
    assert cli.main(["mix", *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
