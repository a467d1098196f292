"""General prompts: the preference orders good above bad, and its rows are what the recipes read."""

import json
import random

import numpy as np
import pytest

from grpo_jax.config import TextConfig
from grpo_jax.data import general
from grpo_jax.data.benchmarks import read_benchmark
from grpo_jax.recipes.reward_model import read_preferences
from grpo_jax.recipes.sft import read_chats
from grpo_jax.rewards.grading import grade_instructions
from grpo_jax.text import Tokenizer, train_sentencepiece

BOTH = ("en", "ru")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("general") / "tokenizer.model")
    rng = random.Random(0)
    texts = [" ".join(general.worked_text(0, code, rng)) for code in BOTH for _ in range(1500)]
    train_sentencepiece(texts, 400, (), path)
    return Tokenizer.from_sentencepiece(path)


@pytest.mark.parametrize("language", BOTH)
def test_good_responses_are_preferred_to_flawed_ones(language):
    rng, worse = random.Random(0), {name: [] for name in general.FLAWS}
    for request in general.requests(language):
        assert general.request_of(request.prompt) == request
        said = general.good(request, rng)
        assert general.preference(request.prompt, said) == pytest.approx(1.0), (request.prompt, said)
        assert general.harmless(request.prompt, said) == 1.0
        assert general.harmless(request.prompt, general.abusive(request, rng)) == 0.0
        for name in general.FLAWS:
            worse[name].append(general.preference(request.prompt, general.response(request, name, rng)))
    assert all(np.mean(scores) < 0.95 and min(scores) >= 0 for scores in worse.values()), worse
    assert np.mean(worse["abusive"]) < 0.5 and np.mean(worse["foreign"]) < 0.4


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Hello, Anna, nice to see you.", 1.0),
        ("<think>Ben дурак</think>Hello, Anna, nice to see you.", 1.0),  # the thought is not looked at
        ("<think>x</think><answer>Hello, Anna, nice to see you.</answer>", 1.0),
        ("hello, Anna, nice to see you.", 0.9),  # no capital
        ("Hello, Anna, nice to see you", 0.9),  # no end
        ("Hello, Ben, nice to see you.", 0.6),  # somebody else
        ("Anna, it is nice to see you.", 0.8),  # no greeting
        ("Hello, Anna, рад вас видеть.", 0.8 + 0.2 * 2 / 5),
        ("Hello.", 0.5),  # too short, nobody
        ("Hello, Anna, you fool.", 0.5),
        ("", 0.0),
    ],
)
def test_what_a_preference_is_made_of(said, score):
    assert general.preference("Greet Anna.", said) == pytest.approx(score)
    assert general.preference([{"role": "user", "content": "Greet Anna."}], said) == pytest.approx(score)
    assert general.preference("Greet nobody.", said) == 0.0


def test_host_rewards():
    call = {"prompts": ["Greet Anna.", "2+2="], "completions": ["Hello, Anna, dear fool.", "Du Fool"], "language": BOTH}
    assert general.helpfulness(**call) == [0.5, None]
    assert general.harmlessness(**call) == [0.0, 0.0]


def test_sides_share_no_request():
    for language in BOTH:
        sides = [general.side(3, split, language) for split in ("train", "eval")]
        keys = [{(request.act, *sorted(request.slots)) for request in side} for side in sides]
        assert not keys[0] & keys[1] and 15 < len(sides[1]) < len(sides[0]) / 4
        assert general.side(3, "eval", language) == sides[1]
        assert {request.act for request in sides[0]} == set(general.ACTS)


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_recipes_read_what_is_made(tokenizer, tmp_path):
    plain = TextConfig()
    pairs = general.pairs(0, "train", BOTH, 40)
    read = read_preferences(written(tmp_path / "pairs.jsonl", pairs), "path", plain, tokenizer, 128)
    assert len(read) == 40 and {len(answers) for answers, _ in read} == {2}
    for row in pairs:
        scores = [general.preference(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        assert scores[0] - scores[1] >= general.LEAST_MARGIN and row["scores"] == pytest.approx(scores, abs=1e-4)
    points = general.points(0, "train", BOTH, 40)
    read = read_preferences(written(tmp_path / "points.jsonl", points), "path", plain, tokenizer, 128)
    assert sum(label for _, label in read) == 20
    assert all(row["label"] == bool(general.harmless(row["prompt"], row["completion"])) for row in points)
    chats = general.chats(0, "train", BOTH, 40)
    assert len(read_chats(written(tmp_path / "chats.jsonl", chats), plain, tokenizer, 128)) == 40
    assert general.pairs(0, "train", BOTH, 40) == pairs and general.pairs(1, "train", BOTH, 40) != pairs


def test_held_out_rows_are_graded_by_rules(tmp_path):
    rows = general.rows(0, "eval", "ru")
    problems = read_benchmark("jsonl", written(tmp_path / "held.jsonl", rows))
    rng = random.Random(0)
    for problem, request in zip(problems, general.side(0, "eval", "ru"), strict=True):
        assert problem["kind"] == "instructions" and problem["language"] == "ru"
        assert grade_instructions(problem, general.good(request, rng)).strict == 1.0
        assert grade_instructions(problem, general.abusive(request, rng)).strict == 0.0
