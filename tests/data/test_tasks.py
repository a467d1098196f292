"""Generated tasks: made again the same, held out by problem, with one right answer each, in two scripts."""

import collections
import itertools
import random
import re
import sys
import types

import numpy as np
import pytest

from grpo_jax.data import arithmetic, gym, tasks
from grpo_jax.errors import InputError
from grpo_jax.rewards.letters import word_counts
from grpo_jax.rewards.texts import TEXT_REWARDS, answer_span, thought_and_answer_fault
from grpo_jax.text import Tokenizer, train_sentencepiece

OWN = "sums,countdown,comparison:en,ru"
ALL = "sums,countdown,comparison,general:en,ru"


@pytest.fixture(scope="module")
def train():
    return tasks.rows(0, "train", OWN, 2)


@pytest.fixture(scope="module")
def held():
    return tasks.rows(0, "eval", OWN, 2)


def solved(prompt: str) -> set[str]:
    """All right answers of a prompt, found anew from its words and numbers."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    if len(numbers) == 2:
        return {str(sum(numbers))}
    if len(numbers) == 3:
        return {str(min(numbers) if prompt.startswith(("Smallest", "Наименьшее")) else max(numbers))}
    target, *given = numbers
    texts = (f"{given[0]}{f}{given[1]}{s}{given[2]}" for f, s in itertools.product("+-*", repeat=2))
    return {text for text in texts if eval(text) == target}  # of numbers and signs that stand here


def test_every_prompt_has_the_one_answer_that_its_row_names(train, held):
    for row in train + held:
        assert solved(row["prompt"]) == {row["answer"]}, row
    counts = collections.Counter((row["task"], row["language"]) for row in train)
    assert set(counts) == {(task, code) for task in ("sums", "countdown", "comparison") for code in ("en", "ru")}
    assert min(counts.values()) > 500 and all(max(word_counts(r["prompt"], r["language"])) > 0 for r in train)
    assert all(word_counts(row["prompt"], row["language"])[1] == 0 for row in train + held)


def test_the_own_answer_is_right_and_the_next_one_wrong(held):
    """By the text twins, which the tests of `verifiers` hold equal to the rewards in the program."""
    answers = [row["answer"] for row in held]
    says = [f"<think>x</think><answer>{answer}</answer>" for answer in answers]
    assert TEXT_REWARDS["answer"]([], says, answer=answers) == [1.0] * len(held)
    others = TEXT_REWARDS["answer"]([], says[1:] + says[:1], answer=answers)
    equal = [a == b for a, b in zip(answers, answers[1:] + answers[:1], strict=True)]
    assert others == [float(same) for same in equal] and sum(equal) < len(held) / 20


def test_rows_are_a_function_of_the_seed(train):
    assert tasks.rows(0, "train", OWN, 2) == train
    other = tasks.rows(1, "train", OWN, 2)
    assert {row["prompt"] for row in other} != {row["prompt"] for row in train}
    worked = [tasks.worked_texts(seed, 200, ALL, 2, 0.4) for seed in (0, 0, 1)]
    assert worked[0] == worked[1] != worked[2]


@pytest.mark.parametrize("seed", [0, 5])
def test_no_problem_is_on_both_sides(seed):
    sides = {split: tasks.rows(seed, split, ALL, 2) for split in ("train", "eval")}
    tasks.assert_disjoint(sides["train"], sides["eval"])
    tasks.assert_disjoint(tasks.worked_texts(seed, 2000, ALL, 2, 0.4), sides["eval"])
    with pytest.raises(AssertionError, match="1 held-out problems are trained on"):
        tasks.assert_disjoint([{"prompt": "Сложи 48 и 27."}], [{"prompt": "Add 27 and 48."}])


def test_a_problem_stands_in_one_language_and_sums_are_split_as_those_of_arithmetic(train, held):
    numbers = [(row["task"], row["answer"], *re.findall(r"\d+", row["prompt"])) for row in train + held]
    assert len(set(numbers)) == len(numbers)
    assert tasks.key("Get 7 from 2, 8, 3 in order.") == tasks.key("Получи 7 из 8, 3, 2 по порядку.")
    assert tasks.key("Largest of 1, 2, 3?") == tasks.key("Наименьшее из 3, 2, 1?")
    pairs = np.array([arithmetic.operands(row["prompt"]) for row in held if row["task"] == "sums"])
    assert arithmetic.held_out(0, *pairs.T).all()


def test_kinds_and_languages_come_by_turns(held):
    first = [(row["task"], row["language"]) for row in held[:6]]
    assert first == [(task, code) for task in ("sums", "countdown", "comparison") for code in ("en", "ru")]
    only = tasks.rows(0, "eval", "comparison:ru", 1)
    assert {(row["task"], row["language"]) for row in only} == {("comparison", "ru")}
    assert {row["kind"] for row in held if row["task"] == "countdown"} == {"exact"}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("foo:en", "'foo' is none of the tasks sums, countdown, comparison, general, reasoning_gym:NAME"),
        ("sums:xx", "'xx' is none of the languages en, ru"),
        ("sums,sums:en", "twice, or none"),
        ("", "twice, or none"),
    ],
)
def test_a_path_that_cannot_be_meant(path, says):
    with pytest.raises(InputError, match=says):
        tasks.rows(0, "train", path, 2)
    with pytest.raises(InputError, match="data.digits=5 must lie between 1 and 4"):
        tasks.rows(0, "train", "sums", 5)


def test_paths():
    assert tasks.parse("sums") == tasks.Asked(("sums",), ("en", "ru"))
    assert tasks.parse("reasoning_gym:a, sums:ru") == tasks.Asked(("reasoning_gym:a", "sums"), ("ru",))
    assert tasks.parse("sums,reasoning_gym:a") == tasks.Asked(("sums", "reasoning_gym:a"), ("en", "ru"))


@pytest.mark.parametrize("task", ["sums", "countdown", "comparison"])
def test_worked_chains_say_what_they_mean(task):
    """Every step of a right chain holds, a slip is mended where it says so, and a chain that slips ends in its slip."""
    rng, lengths = random.Random(0), set()
    for problem in tasks.problems(0, "train", task, 2)[:300]:
        said = tasks.completion(problem, "en", "right", rng)
        assert not thought_and_answer_fault(said) and answer_span(said) == problem.answer
        chain = re.sub(r"[^,]*, (wait|стой), ", "", said[len("<think>") : said.index("</think>")])
        for left, right in re.findall(r"([\d+*-]+)=(-?\d+)", chain):
            assert eval(left) == int(right), said
        for left, word, right in re.findall(r"(\d+) (less|more|меньше|больше) (\d+)", chain):
            assert (int(left) < int(right)) == (word in ("less", "меньше")), said
        lengths.add(len(re.findall("wait|стой", said)))
        slipped = answer_span(tasks.completion(problem, "en", "slip", rng))
        assert slipped != problem.answer or task == "comparison"  # there a later number may win all the same
        assert tasks.completion(problem, "en", "bare", rng).isascii()
        assert tasks.completion(problem, "ru", "unclosed", rng).startswith("<answer>")
    assert lengths == {0, 1}


def test_right_chains_mix_the_languages_and_wrong_ones_seldom_do():
    rng, mixed = random.Random(0), {}
    problems = tasks.problems(0, "train", "sums", 2)[:400]
    for mode in ("right", "slip"):
        counts = [word_counts(tasks.completion(problem, "ru", mode, rng), "ru") for problem in problems]
        mixed[mode] = np.mean([outside > 0 for _, outside in counts])
    assert mixed["right"] > 0.4 > 0.2 > mixed["slip"] > 0


def test_a_majority_of_guesses_is_better_than_one():
    """Guesses scatter, unlike those of `arithmetic`."""
    rng, won, alone = random.Random(0), [], []
    for problem in tasks.problems(0, "train", "sums", 2)[:200]:
        guesses = [tasks.guess(problem, rng) for _ in range(8)]
        alone.append(guesses[0] == problem.answer)
        won.append(collections.Counter(guesses).most_common(1)[0][0] == problem.answer)
    assert np.mean(won) > np.mean(alone) + 0.2


def test_worked_texts_tokenise_and_come_back(tmp_path):
    texts = [prompt + said for prompt, said in tasks.worked_texts(0, 2000, ALL, 2, 0.4)]
    symbols = ("<think>", "</think>", "<answer>", "</answer>")
    train_sentencepiece(texts, 400, symbols, str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.from_sentencepiece(str(tmp_path / "tokenizer.model"))
    ids = [tokenizer.encode(text, special=False) for text in texts]
    assert [tokenizer.decode(row) for row in ids] == texts
    assert tokenizer.backend.unknown_id not in set(itertools.chain(*ids))
    shares = np.mean([[word_counts(text, code)[0] > 0 for code in ("en", "ru")] for text in texts], axis=0)
    assert shares.min() > 0.3  # both scripts are there


def test_a_base_needs_worked_texts():
    with pytest.raises(InputError, match="reasoning_gym:gcd has no worked texts to make a base from: name model.path"):
        tasks.worked_texts(0, 10, "sums,reasoning_gym:gcd:en", 2, 0.4)


@pytest.fixture
def package(monkeypatch):
    """A stand-in for reasoning-gym: one generator with unique answers, one with a scorer of its own."""

    class ProceduralDataset:
        def score_answer(self, answer, entry):
            raise AssertionError("its scorers are not used")

    class Plain(ProceduralDataset):
        pass

    class Scored(ProceduralDataset):
        def score_answer(self, answer, entry):
            raise AssertionError

    def create_dataset(name, seed, size):
        return [{"question": f"What is {i % 300} + {seed}? ", "answer": f"{i % 300 + seed}"} for i in range(size)]

    parts = {
        "reasoning_gym": {"create_dataset": create_dataset},
        "reasoning_gym.factory": {"DATASETS": {"chain_sum": (Plain, None), "puzzle": (Scored, None)}},
        "reasoning_gym.dataset": {"ProceduralDataset": ProceduralDataset},
    }
    for name, attributes in parts.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def test_reasoning_gym(package):
    sides = {split: tasks.rows(3, split, "reasoning_gym:chain_sum:en,ru", 2) for split in ("train", "eval")}
    tasks.assert_disjoint(sides["train"], sides["eval"])
    assert len(sides["train"]) + len(sides["eval"]) == 300 and 10 < len(sides["eval"]) < 60
    for row in sides["train"]:
        assert row["answer"] == str(sum(map(int, re.findall(r"\d+", row["prompt"])))) and row["kind"] == "exact"
        assert row["prompt"].startswith("Думай по-русски. ") == (row["language"] == "ru")
    with pytest.raises(InputError, match="only its own scorer can judge; there are: chain_sum"):
        tasks.rows(3, "train", "reasoning_gym:puzzle", 2)
    with pytest.raises(InputError, match="did you mean 'chain_sum'"):
        tasks.rows(3, "train", "reasoning_gym:chain_sums", 2)


def test_reasoning_gym_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, gym.PACKAGE, None)
    with pytest.raises(InputError, match=r"pip install 'grpo-jax\[tasks\]'"):
        tasks.rows(0, "train", "reasoning_gym:gcd", 2)


def test_the_real_reasoning_gym():
    pytest.importorskip(gym.PACKAGE, reason="reasoning-gym is not installed")
    rows = tasks.rows(0, "eval", "reasoning_gym:gcd:en", 2)
    assert len(rows) > 100 and all(row["answer"].isdigit() for row in rows)
