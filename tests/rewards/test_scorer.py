"""The scorer: names to components in order, columns of rows, weights, and what is refused."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import MeshConfig, RewardsConfig
from grpo_jax.errors import InputError
from grpo_jax.parallel import make_mesh
from grpo_jax.rewards.pool import Pooled
from grpo_jax.rewards.reward_model import MODEL_REWARDS
from grpo_jax.rewards.scorer import HOST_REWARDS, build_scorer, load_function
from grpo_jax.rewards.texts import text_reward
from grpo_jax.rewards.verifiers import REWARDS
from grpo_jax.sampler.types import Prompts, Rollout, Scores

ROWS = [{"prompt": f"p{i}", "answer": answer} for i, answer in enumerate(["12", "3", "1,000", "-4"])]
BYTES = [bytes([i]) for i in range(256)]
TEXTS = [
    "<think>x</think><answer>3</answer>",
    "<answer>3</answer>",
    "so 3",
    "<think></think><answer>4</answer>",
    "<think>x</think> <answer>12</answer>",
    "<answer>12</answer>",
    "",
    "12.0",
]
ROW_OF_PROMPT = [1, 0]


def decode(ids):
    return bytes(ids).decode()


def mesh_of(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return make_mesh(MeshConfig(*shape), devices)


def build(names, weights=None, callables=None, rows=ROWS, mesh=None, timeout=10.0):
    config = RewardsConfig(names=names, weights=weights or (1.0,) * len(names), timeout=timeout)
    return build_scorer(config, BYTES, rows, decode, mesh or mesh_of(1, 1, 1), callables)


def inputs(scorer):
    tokens = np.zeros((8, 48), np.int32)
    for row, text in zip(tokens, TEXTS, strict=True):
        row[: len(text)] = list(text.encode())
    lengths = np.array([len(text) for text in TEXTS], np.int32)
    floats, ones = jnp.zeros((8, 48)), jnp.ones(8)
    prompts = Prompts(
        tokens=jnp.zeros((2, 4), jnp.int32),
        lengths=jnp.full(2, 4),
        draw=jnp.arange(2),
        row=jnp.array(ROW_OF_PROMPT),
        weight=jnp.ones(2),
        columns={name: jnp.asarray(x) for name, x in scorer.columns(ROW_OF_PROMPT).items()},
    )
    rollout = Rollout(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        logps=floats,
        sampled_logps=floats,
        ended=ones > 0,
        started=jnp.zeros(8, jnp.int32),
        mask=floats,
        weight=ones,
        draw=jnp.repeat(jnp.arange(2), 4),
        group=jnp.repeat(jnp.arange(2), 4),
        prompt_tokens=jnp.zeros((8, 4), jnp.int32),
        prompt_lengths=jnp.full(8, 4),
    )
    return prompts, rollout


def some(completions, answer, **columns):
    return [None if "think" in c else float(a) for c, a in zip(completions, answer, strict=True)]


@functools.cache
def expected():
    answers = [ROWS[row]["answer"] for row in np.repeat(ROW_OF_PROMPT, 4)]
    call = {"prompts": [""] * 8, "completions": TEXTS, "answer": answers}
    call |= {"completion_ids": [list(text.encode()) for text in TEXTS]}
    made = {"some": some(TEXTS, answers)}
    call["right"] = [value is not None and value >= 1 for value in made["some"]]
    for name in ("number", "answer", "format", "answer_format", "cosine", "repetition"):
        made[name] = text_reward(name, RewardsConfig(), 48)(**call)
    return made


def test_the_language_of_a_row_is_that_of_its_completions():
    rows = [{**row, "language": code} for row, code in zip(ROWS, ("ru", "en", "ru", "en"), strict=True)]
    scorer = build(("language",), rows=rows)
    assert scorer.columns([0, 3])["language_number"].tolist() == [1, 0]
    assert "language_number" not in build(("language",)).columns([0])
    values, _ = jax.jit(scorer.score_in_graph)(*inputs(scorer))
    targets = [rows[row]["language"] for row in np.repeat(ROW_OF_PROMPT, 4)]
    want = text_reward("language", RewardsConfig(), 48)(prompts=[""] * 8, completions=TEXTS, language=targets)
    assert values[:, 0].tolist() == want and want[:5] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_components_come_in_config_order_fused_and_staged(shape):
    names = ("some", "cosine", "number", "answer", "format", "repetition", "answer_format")
    scorer = build(names, callables={"some": some}, mesh=mesh_of(*shape))
    prompts, rollout = inputs(scorer)
    scores = jax.jit(scorer.score)(prompts, rollout)
    for c, name in enumerate(names):
        want = expected()[name]
        np.testing.assert_allclose(scores.values[:, c], [x or 0.0 for x in want], atol=1e-6, err_msg=name)
        assert scores.valid[:, c].tolist() == [float(x is not None) for x in want], name
    assert not scores.failed
    staged = scorer.score_on_host(prompts, rollout, in_graph=jax.jit(scorer.score_in_graph))
    np.testing.assert_allclose(staged.values, scores.values, atol=1e-6)
    np.testing.assert_array_equal(staged.valid, scores.valid)
    assert scorer.host is not None and scorer.host.scored == 16 and not staged.failed


@pytest.mark.parametrize("names", [("answer", "format"), ("some",)])
def test_only_in_graph_or_only_host(names):
    scorer = build(names, callables={"some": some} if "some" in names else None)
    prompts, rollout = inputs(scorer)
    assert bool(prompts.columns) == ("answer" in names) and (scorer.host is None) == ("answer" in names)
    fused = jax.jit(scorer.score)
    scores = fused(prompts, rollout)
    assert scores.values.T.tolist() == [[x or 0.0 for x in expected()[name]] for name in names]
    jax.tree.map(
        np.testing.assert_array_equal,
        scorer.score_on_host(prompts, rollout, in_graph=jax.jit(scorer.score_in_graph)),
        scores,
    )
    assert ("callback" in fused.lower(prompts, rollout).as_text()) == ("some" in names)


def test_total_weighs_what_applies():
    scorer = build(("answer", "format"), weights=(2.0, -0.5))
    values = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.25, 3.0]])
    valid = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert scorer.total(Scores(values, valid, jnp.bool_(False))).tolist() == [1.5, 2.0, -1.5]


def test_a_callable_takes_precedence_over_a_builtin():
    scorer = build(("format",), callables={"format": lambda completions: [7.0] * len(completions)})
    prompts, rollout = inputs(scorer)
    assert scorer.score_on_host(prompts, rollout).values.tolist() == [[7.0]] * 8


@pytest.mark.parametrize("staged", [False, True])
def test_a_failing_reward_marks_the_scores(staged):
    scorer = build(("format", "bad"), callables={"bad": lambda completions: ["x"] * len(completions)})
    prompts, rollout = inputs(scorer)
    if staged:
        scores = scorer.score_on_host(prompts, rollout, in_graph=jax.jit(scorer.score_in_graph))
    else:
        scores = jax.jit(scorer.score)(prompts, rollout)
    assert scores.failed and np.isfinite(scores.values).all()
    assert scorer.host is not None and "reward 'bad' returned 'x' (str)" in str(scorer.host.take_error())


def test_columns_have_the_width_of_the_whole_dataset():
    columns = build(("answer",)).columns(np.array([3, 0]))
    assert columns["answer_bytes"].shape == (2, 5) and columns["answer_lengths"].tolist() == [2, 2]
    assert columns["answer_bytes"].tobytes() == b"-4\0\0\x0012\0\0\0"
    assert build(("format",)).columns([0, 1]) == {}


@pytest.mark.parametrize(
    ("answer", "names", "message"),
    [
        (None, ("answer",), "dataset row 1: column 'answer' is empty, and the reward 'answer' needs it"),
        (" \n", ("format", "number"), "dataset row 1: column 'answer' is empty, and the reward 'number' needs it"),
        ("yes", ("answer", "number"), "dataset row 1: answer 'yes' holds no number"),
    ],
)
def test_a_row_without_an_answer_is_refused(answer, names, message):
    with pytest.raises(InputError) as caught:
        build(names, rows=[{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": answer}])
    assert message in str(caught.value)


def test_a_row_without_an_answer_is_fine_where_no_reward_reads_it():
    assert build(("format",), rows=[{"prompt": "p"}]).columns([0]) == {}


def test_load_function_finds_and_refuses(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_file.py").write_text("def short(completions):\n    return [0.0]\n\nlimit = 3\n")
    (tmp_path / "broken_rewards_file.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("my_rewards_file:short")(completions=[]) == [0.0]
    known = ", ".join([*REWARDS, *HOST_REWARDS, *MODEL_REWARDS])
    refused = {
        "my_rewards_file:shrot": "module 'my_rewards_file' has no 'shrot'; did you mean 'short'?",
        "my_rewards_file:limit": "'limit' is a int, not a function",
        "my_rewards_file:": "has no ''",
        "no_such_module_here:f": "no module 'no_such_module_here'",
        "broken_rewards_file:f": "importing 'broken_rewards_file' raised ZeroDivisionError",
        "formta": f"is not one of {known}, nor 'module:function'; did you mean 'format'?",
        ":f": "Empty module name",
    }
    for name, message in refused.items():
        with pytest.raises(InputError) as caught:
            load_function(name)
        assert f"rewards.names={name!r}" in str(caught.value) and message in str(caught.value)
    for module in ("my_rewards_file", "broken_rewards_file"):
        sys.modules.pop(module, None)


def test_a_named_function_runs_in_a_worker_and_a_callable_here():
    scorer = build(("reward_functions:later", "some", "math"), callables={"some": some})
    assert scorer.host is not None
    assert scorer.host.functions["reward_functions:later"] == Pooled("reward_functions:later")
    assert scorer.host.functions["some"] is some and not scorer.host.pool.pids()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"names": ("cosine", "answer")}, "'cosine' reads whether the first component is right"),
        ({"names": ("language",), "language": "xx"}, "rewards.language='xx' has no known script: use one of"),
        ({"names": ("choice",)}, "answer '12' is no choice such as 'B'"),
    ],
)
def test_in_graph_rewards_that_do_not_fit(config, message):
    made = RewardsConfig(**config, weights=(1.0,) * len(config["names"]))
    with pytest.raises(InputError) as caught:
        build_scorer(made, BYTES, ROWS, decode, mesh_of(1, 1, 1))
    assert message in str(caught.value)


def test_the_opening_tag_of_the_prompt_counts():
    scorer = build(("format",))
    prompts, rollout = inputs(scorer)
    tokens = np.zeros((2, 10), np.int32)
    tokens[1, -8:] = list(b"<think>\n")
    prompts = prompts.replace(tokens=jnp.asarray(tokens), lengths=jnp.array([10, 8]))
    rest = [text.removeprefix("<think>") for text in TEXTS]
    filled = np.zeros((8, 48), np.int32)
    for row, text in zip(filled, rest, strict=True):
        row[: len(text)] = list(text.encode())
    rollout = rollout.replace(tokens=jnp.asarray(filled), lengths=jnp.array([len(text) for text in rest]))
    values = jax.jit(scorer.score_in_graph)(prompts, rollout)[0]
    want = text_reward("format", RewardsConfig(), 48)([""] * 8, rest, opened=[False] * 4 + [True] * 4)
    assert values[:, 0].tolist() == want and sum(want) == 1


def test_callables_are_checked_before_anything_runs():
    with pytest.raises(InputError, match=r"leaves out the reward 'other'"):
        build(("format",), callables={"other": some})
    with pytest.raises(InputError, match=r"reward 'some' is a int"):
        build(("some",), callables={"some": 3})
    with pytest.raises(InputError, match=r"reward 'some' wants the column 'solution'; the dataset has .*answer"):
        build(("some",), callables={"some": lambda completions, solution: [0.0]})
