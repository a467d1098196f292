import numpy as np
import pytest

from grpo_jax import processes
from grpo_jax.data import prompts
from grpo_jax.errors import InputError


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def answers(rows):
    return {"answer": np.array([[int(row["answer"]), 0] for row in rows], np.int32)}


def prompt_set(size: int = 7, budget: int = 5):
    rows = [{"prompt": "x" * (1 + i % 4) + str(i % 10), "answer": str(i * 10)} for i in range(size)]
    return prompts.build_prompt_set(rows, encode, budget, answers)


def test_tokens_and_columns_follow_the_rows():
    made = prompt_set()
    assert made.size == 7
    for i, row in enumerate(made.rows):
        assert "".join(map(chr, made.tokens[i])) == row["prompt"]
        assert made.columns["answer"][i, 0] == int(row["answer"])


def test_bad_prompt_sets_are_refused():
    with pytest.raises(InputError, match="dataset is empty"):
        prompts.build_prompt_set([], encode, 5, answers)
    rows = [{"prompt": p, "answer": "1"} for p in ("ok", "123456", "1234567890", "four")]
    message = (
        r"row 1 \(counted from 0\) has 6 tokens, more than data.max_prompt_length=5, as have 2 of 4 rows: 10 would"
    )
    with pytest.raises(InputError, match=message):
        prompts.build_prompt_set(rows, encode, 5, answers)
    assert prompts.build_prompt_set(rows, encode, 10, answers).size == 4
    with pytest.raises(InputError, match="row 1 has no tokens: ''"):
        prompts.build_prompt_set([{"prompt": "a"}, {"prompt": ""}], encode, 5, lambda rows: {})
    with pytest.raises(ValueError, match="'short' has shape"):
        prompts.build_prompt_set(rows, encode, 10, lambda rows: {"short": np.zeros(3)})


def test_each_process_encodes_its_share_and_what_it_draws(monkeypatch):
    """Process 1 of 2: the other one says how long its prompts are; what it cannot encode is an error of both."""
    rows = [{"prompt": "x" * (1 + i % 4), "answer": str(i)} for i in range(7)]
    asked, told, wrong = [], [], [None]

    def counting(text):
        asked.append(text)
        return encode(text)

    def exchange(value):
        told.append(value)
        other = wrong[0] if len(told) % 2 else [len(row["prompt"]) for row in rows[::2]]
        return [other, value]

    for name, value in (("number", lambda: 1), ("count", lambda: 2), ("exchange", exchange)):
        monkeypatch.setattr(processes, name, value)
    made = prompts.build_prompt_set(rows, counting, 4, answers)
    assert told == [None, [2, 4, 2]] and len(asked) == 3
    batch = prompts.make_batch(made, 0, 4, 0, False, 4, np.array([0, 1]))
    assert batch.lengths.tolist() == [1, 2] and len(asked) == 4  # row 0 anew, row 1 was its own
    with pytest.raises(InputError, match="row 3 .* has 4 tokens"):
        prompts.build_prompt_set(rows, counting, 3, answers)
    wrong[0] = "of process 0"
    with pytest.raises(InputError, match="of process 0"):
        prompts.build_prompt_set(rows, counting, 4, answers)


@pytest.mark.parametrize("size", [1, 2, 7, 1319])
def test_every_row_comes_once_an_epoch_and_epochs_differ(size):
    order = prompts.row_order(np.arange(3 * size), size, seed=4, shuffle=True).reshape(3, size)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(size))
    if size == 1319:
        assert (order[0] != order[1]).mean() > 0.9 and (order[1] != order[2]).mean() > 0.9
        assert (order[0] != np.arange(size)).mean() > 0.9
        other = prompts.row_order(np.arange(size), size, seed=5, shuffle=True)
        assert (order[0] != other).mean() > 0.9


def test_row_of_a_draw_does_not_depend_on_what_is_asked_beside_it():
    size, draws = 11, np.arange(40)
    together = prompts.row_order(draws, size, 9, True)
    apart = [int(prompts.row_order(np.array([d]), size, 9, True)[0]) for d in draws]
    assert together.tolist() == apart
    backwards = prompts.row_order(draws[::-1], size, 9, True)
    assert backwards[::-1].tolist() == apart
    far = np.array([10**12, 3, 10**12 + 1])
    assert prompts.row_order(far, size, 9, True)[1] == apart[3]


def test_order_is_the_same_as_ever():
    # Holds numpy to its promise for Philox words. Regenerate: sort the six words of each key (0, epoch).
    assert prompts.row_order(np.arange(12), 6, 0, True).tolist() == [0, 2, 1, 5, 4, 3, 5, 3, 2, 4, 1, 0]


def test_unshuffled_order_is_the_file_s():
    assert prompts.row_order(np.arange(5, 19), 7, 0, False).tolist() == [d % 7 for d in range(5, 19)]


def test_batch_is_left_padded_and_numbered():
    made = prompt_set()
    batch = prompts.make_batch(made, first_draw=12, count=5, seed=3, shuffle=True, max_prompt_length=6)
    order = prompts.row_order(np.arange(12, 17), 7, 3, True)
    assert np.array_equal(batch.draw, np.arange(12, 17)) and np.array_equal(batch.row, order)
    assert np.array_equal(batch.weight, np.ones(5))
    assert batch.tokens.shape == (5, 6)
    for i, row in enumerate(order):
        text = made.rows[row]["prompt"]
        assert batch.tokens[i].tolist() == [0] * (6 - len(text)) + encode(text)
        assert batch.lengths[i] == len(text) and batch.columns["answer"][i, 0] == 10 * row
    kinds = {name: getattr(batch, name).dtype for name in ("tokens", "lengths", "draw", "row", "weight")}
    assert kinds == {"tokens": np.int32, "lengths": np.int32, "draw": np.int32, "row": np.int32, "weight": np.float32}


def test_batches_of_any_size_draw_the_same_prompts():
    made = prompt_set()
    whole = prompts.make_batch(made, 0, 12, 1, True, 5)
    parts = [prompts.make_batch(made, first, 4, 1, True, 5) for first in (0, 4, 8)]
    assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))
    assert np.array_equal(whole.draw, np.concatenate([part.draw for part in parts]))


def test_filler_completes_the_last_evaluation_batch():
    made = prompt_set(7)
    batches = list(prompts.make_eval_batches(made, 3, 5))
    assert [b.weight.tolist() for b in batches] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    rows = np.concatenate([b.row for b in batches])
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0]
    assert np.concatenate([b.draw for b in batches]).tolist() == list(range(9))
    assert np.array_equal(batches[2].tokens[1], batches[0].tokens[0]) and all(b.lengths.min() > 0 for b in batches)


@pytest.mark.parametrize(("problems", "weights"), [(2, [2]), (4, [3, 1]), (6, [3, 3]), (100, [3, 3, 1])])
def test_evaluation_takes_as_many_problems_as_asked_or_there_are(problems, weights):
    batches = list(prompts.make_eval_batches(prompt_set(7), 3, 5, problems))
    assert [b.weight.sum() for b in batches] == weights
