"""`grpo-jax rewards`: what it shows of completions, and the probe's histogram and warnings."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import tiny

from grpo_jax import cli
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.heads import load_head, save_head
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.parallel import make_mesh
from grpo_jax.recipes import try_rewards
from grpo_jax.recipes.try_rewards import pass_rates, probe, score_completions, show, tell
from grpo_jax.rewards.reward_model import sequence_scores
from grpo_jax.rewards.verifiers import REWARDS
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_prompt, train_sentencepiece


def terminal():
    return Terminal(out=io.StringIO(), err=io.StringIO())


def said(by):
    return by._out.file.getvalue()


ROWS = [
    {"prompt": "7+5?", "answer": "so #### 12", "completion": "<think>a</think> <answer>12</answer>", "level": 1}
    | {"language": "ru"},
    {
        "prompt": "x<think>",
        "answer": "#### 12",
        "completion": "a</think> [red]b[/red] <answer>1/2</answer>",
        "level": 2,
    },
    {"question": "7+5?", "completion": [{"role": "assistant", "content": "\x1b[2J12"}], "level": 3},
]
FIELDS = {
    "rewards.names": ("answer", "format", "language", "cosine", "math", "reward_functions:sleeps_at_level_2"),
    "rewards.weights": (1.0, 0.5, 0.1, 0.2, 1.0, 1.0),
    "rewards.timeout": 3.0,
    "data.answer_marker": "####",
    "sampler.max_new_tokens": 40,
}


@pytest.fixture
def completions(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_what_each_reward_gives_and_why(completions):
    out = terminal()
    first, second, third = show(tiny.config(**FIELDS), completions, out)
    assert list(first) == list(FIELDS["rewards.names"])
    assert first["answer"] == (1.0, "answer '12', right is '12'") and first["format"] == (1.0, "as asked for")
    assert first["math"] == (1.0, "answer '12' is '12'") and first["cosine"][0] == pytest.approx(0.5, abs=0.05)
    assert first["language"] == (0.0, "0 of 1 words in the script of 'ru'")  # the row's own target
    assert second["answer"] == (0.0, "answer '1/2', right is '12'")
    why = "outside of the tags stands '[red]b[/red]' (the prompt holds the opening tag)"
    assert second["format"] == (0.0, why) and second["language"][0] == 1.0
    assert third["answer"] == (None, "no closed <answer>") and third["math"] == (None, "the row has no answer")
    own = [row["reward_functions:sleeps_at_level_2"] for row in (first, second, third)]
    assert [score for score, _ in own] == [1.0, 0.0, 1.0]
    assert "did not return within rewards.timeout=3 seconds" in own[1][1] and not own[0][1]
    text = said(out)
    assert "completion 2: total" in text and "[red]b[/red]" in text and "\x1b" not in text
    assert "answer: mean 0.500 of 2 of 3 completions" in text and "math: does not apply" in text


def test_a_reward_of_ones_own_inside_the_program(completions, monkeypatch):
    def longer(text, n, columns):
        return (n > columns["token_lengths"] - 1) * 1.0, (columns["answer_lengths"] > 0) * 1.0

    monkeypatch.setitem(REWARDS, "longer", longer)
    found = show(
        tiny.config(**{**FIELDS, "rewards.names": ("longer",), "rewards.weights": (1.0,)}), completions, terminal()
    )
    assert [row["longer"] for row in found] == [(1.0, ""), (1.0, ""), (None, "")]


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A model with a score head and a tokenizer of its own."""
    place = tmp_path_factory.mktemp("reward")
    train_sentencepiece(["2+2= is it 4 or 5 then </think>"], 40, (), str(place / "tokenizer.model"))
    tokenizer = Tokenizer.from_sentencepiece(str(place / "tokenizer.model"))
    architecture = tiny.architecture(vocabulary=tokenizer.vocabulary, layers=1)
    write_folder(str(place / "model"), architecture, tiny.params(architecture), tokenizer)
    save_head(str(place / "model"), {"kernel": np.linspace(-1, 1, 16)[:, None], "bias": np.array([0.5])})
    return str(place / "model")


MODEL_ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "", "answer": "5"}]


@pytest.mark.slow
@pytest.mark.parametrize("sees", ["response", "summary"])
def test_a_reward_model_is_asked(reward_folder, sees):
    """Each score is that of the sequence alone, without padding and without what is not seen."""
    fields = {"path": reward_folder, "sees": sees}
    config = tiny.config(**FIELDS | {f"rewards.helpful.{name}": value for name, value in fields.items()})
    rewards = dataclasses.replace(config.rewards, names=("helpful", "answer"), weights=(1.0, 1.0))
    config, texts = dataclasses.replace(config, rewards=rewards), ["is it</think>4 or 5", "5 then"]
    found = score_completions(config, MODEL_ROWS, texts, [[1], [1]], [False, False])
    loaded, tokenizer = load_model(reward_folder), Tokenizer.from_folder(reward_folder)
    variables = {"params": jax.tree.map(np.asarray, loaded.params), "score": load_head(reward_folder, 16)}
    sizes = tokenizer.token_bytes()
    for row, text, cells in zip(MODEL_ROWS, texts, found, strict=True):
        after = tokenizer.encode(text, special=False)
        if sees == "summary":
            spoken = b"".join(sizes[i] for i in after)
            start = spoken.rfind(b"</think>") + len(b"</think>") if b"</think>" in spoken else 0
            begins = np.cumsum([0, *(len(sizes[i]) for i in after)])
            after = [i for i, begin in zip(after, begins, strict=False) if begin >= start]
        before = encode_prompt(row["prompt"], config.text, tokenizer) if row["prompt"] else []
        ids = np.array([[*before, *after, *tokenizer.end_ids[:1]]])
        place = np.arange(ids.size)[None]
        want = sequence_scores(Decoder(loaded.architecture), variables, ids, place, place * 0 + 1)
        assert cells["helpful"][0] == pytest.approx(float(want[0]), abs=1e-4)
    assert found[0]["helpful"][0] != found[1]["helpful"][0]
    assert reward_folder in found[0]["helpful"][1]


@pytest.mark.slow
def test_the_judge_shows_its_verdict(reward_folder):
    config = tiny.config(
        **FIELDS | {"rewards.model_judge.path": reward_folder, "rewards.model_judge.max_new_tokens": 6}
    )
    rewards = dataclasses.replace(config.rewards, names=("model_judge",), weights=(1.0,))
    config = dataclasses.replace(config, rewards=rewards)
    found = score_completions(config, MODEL_ROWS, ["4", "4"], [[1], [1]], [False, False])
    assert [cells["model_judge"][0] for cells in found] == [None, None], "a model of random weights gives no verdict"
    assert all(cells["model_judge"][1] for cells in found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no completions"),
        ('{"prompt": "p"}\n', "row 1: 'completion' must be text or a list of messages"),
        ("nonsense\n{}\n", "line 1 is not JSON"),
    ],
)
def test_files_that_are_refused(tmp_path, text, says):
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        show(tiny.config(**FIELDS), path, terminal())
    with pytest.raises(InputError, match="is not a file"):
        show(tiny.config(**FIELDS), tmp_path / "none", terminal())


def test_the_command(completions, capsys, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(try_rewards, "show", lambda config, path: calls.append((config.rewards.names, str(path))))
    monkeypatch.setattr(try_rewards, "probe", lambda config, count, workdir: calls.append((count, workdir)))
    monkeypatch.setattr(cli, "_set_up_jax", lambda config: None)
    assert cli.main(["rewards", "--completions", str(completions), "--probe", "5"]) == 0
    assert calls == [(("answer", "format"), str(completions)), (5, None)]
    assert cli.main(["rewards"]) == 2
    assert "nothing to do: give --completions FILE.jsonl, or --probe N" in capsys.readouterr().err


def records(rates, group=4, ended=True, other=0.0):
    return [
        {"problem": i, "right": k < rate, "ended": ended, "rewards": {"odd": float(k < rate), "long": other * k}}
        for i, rate in enumerate(rates)
        for k in range(group)
    ]


WEIGHTS = {"odd": 1.0, "long": 0.5}


def test_pass_rates_of_groups():
    found = pass_rates(records([0, 0, 1, 3, 4]), WEIGHTS)
    assert found["rates"] == [0, 0, 0.25, 0.75, 1] and found["pass_rate"] == pytest.approx(0.4)
    shares = [found[name] for name in ("all_wrong", "all_right", "differ", "truncated")]
    assert shares == [0.4, 0.2, 0.4, 0.0] and (found["prompts"], found["group"]) == (5, 4)
    out = terminal()
    tell(found, tiny.config(), out)
    bars = [line.split() for line in said(out).splitlines()[1:6]]
    assert [(bar[0], bar[-1]) for bar in bars] == [("0/4", "2"), ("1/4", "1"), ("2/4", "0"), ("3/4", "1"), ("4/4", "1")]
    assert len(bars[0][1]) == 2 * len(bars[1][1]) == 40 and not out._err.getvalue()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rates": [0] * 20}, "next to nothing to learn: rewards differ in 0% of the groups"),
        ({"rates": [0] * 20}, "take easier prompts"),
        ({"rates": [4] * 19 + [2]}, "take harder prompts"),
        ({"rates": [0] * 4, "other": 1.0}, "no completion passes: a run would learn from long alone"),
        ({"rates": [2] * 4, "ended": False}, "100% of the completions are cut off at sampler.max_new_tokens=6"),
    ],
)
def test_warnings(given, says):
    out = terminal()
    tell(pass_rates(records(**given), WEIGHTS), tiny.config(), out)
    assert says in out._err.getvalue()


def test_large_groups_have_bins_of_a_tenth():
    out = terminal()
    tell(pass_rates(records([0, 16, 8], group=16), WEIGHTS), tiny.config(), out)
    lines = said(out).splitlines()[1:12]
    assert [line.split()[0] for line in lines] == [f"{i}0%" if i else "0%" for i in range(11)]
    assert [line.split()[-1] for line in lines] == ["1", *["0"] * 4, "1", *["0"] * 4, "1"]


def test_the_probe_samples_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(try_rewards, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 6) for b in range(1, 5)]
    path = str(tmp_path / "tokenizer.model")
    train_sentencepiece([r["question"] + r["answer"] for r in rows], 60, ("<answer>", "</answer>"), path)
    tokenizer = Tokenizer.from_sentencepiece(path)
    architecture = tiny.architecture(layers=1, vocabulary=tokenizer.vocabulary)
    write_folder(str(tmp_path / "model"), architecture, tiny.params(architecture), tokenizer)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny.config(
        **{
            "model.path": str(tmp_path / "model"),
            "data.source": "jsonl",
            "data.path": str(tmp_path / "rows.jsonl"),
            "data.eval_path": str(tmp_path / "rows.jsonl"),
            "data.max_prompt_length": 8,
            "rewards.names": ("reward_functions:later",),
            "rewards.weights": (1.0,),
            "sampler.max_new_tokens": 3,
        }
    )
    out = terminal()
    found = probe(config, 3, None, out)
    assert (found["prompts"], found["group"], found["pass_rate"]) == (3, 4, 1.0)
    assert found["rewards"]["reward_functions:later"] == 2.0 and "pass rate of 3 prompts, 4 completions" in said(out)
