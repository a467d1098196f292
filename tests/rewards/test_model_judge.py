"""The judge in the program: its prompts, its verdicts against their text twin, its scores against the host's."""

import json
import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny

from grpo_jax.config import ModelConfig, ModelJudgeConfig, SamplerConfig, TextConfig
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.huggingface import write_folder
from grpo_jax.rewards.model_files import open_model_judge
from grpo_jax.rewards.model_judge import COLUMN, PROMPT, ModelJudge, read_verdicts, verdict_of
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rewards.verifiers import byte_table
from grpo_jax.sampler.types import Prompts, Rollout
from grpo_jax.text import Tokenizer, train_sentencepiece

PIECES = [
    '"correctness"',
    "correctness",
    '"',
    ":",
    " : ",
    "true",
    "false",
    "True",
    " ",
    "\n",
    "}",
    ",",
    "{",
    "[",
    "x",
    "1",
]
WHOLE = [
    '{"analysis": "right", "correctness": true}',
    '{"correctness" :\n false , "analysis": ""}',
    '{"correctness": true} {"correctness": false}',
    '{"correctness": truely}',
    '"correctness": true}',
    '{"correctness": true',
    '{"correctness": "true"}',
    '{"analysis": "\\"correctness\\": true}", "correctness": false}',
    "",
]


def test_verdicts_are_read_as_their_text_twin_reads_them():
    """On verdicts, near verdicts, and 4,000 texts put together from their pieces."""
    chance = random.Random(0)
    texts = WHOLE + [
        "{" * chance.randint(0, 1) + "".join(chance.choices(PIECES, k=chance.randint(0, 9))) for _ in range(2000)
    ]
    texts += ['{"correctness"' + "".join(chance.choices(PIECES[2:12], k=chance.randint(1, 5))) for _ in range(2000)]
    texts += [
        f'{{"analysis": "{chance.random()}", "correctness": {chance.choice(("true", "false"))}}}' for _ in range(300)
    ]
    width = max(map(len, texts))
    padded = np.zeros((len(texts), width), np.uint8)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = list(text.encode())
    right, told = jax.jit(read_verdicts)(padded, jnp.array([len(text) for text in texts]))
    wanted = [verdict_of(text) for text in texts]
    assert [bool(x) for x in told] == [verdict is not None for verdict in wanted]
    assert [bool(x) for x in right] == [verdict is True for verdict in wanted]
    assert 50 < sum(verdict is True for verdict in wanted) < 1000 and 50 < sum(verdict is False for verdict in wanted)
    assert [verdict_of(text) for text in WHOLE] == [True, False, False, None, None, None, None, False, None]


def test_the_twin_agrees_with_json_on_whole_verdicts():
    for correctness in (True, False):
        for space in (None, 2):
            verdict = {"analysis": 'a "quoted" {word}, true', "correctness": correctness}
            assert verdict_of(json.dumps(verdict, indent=space)) is correctness


BEFORE = [[5, 6, 7], [8, 9], [4]]
AFTER = (20, 21)
SPECIAL = 1  # no text
# Each token of the judge is a whole verdict, or none.
VERDICTS = [b"", b"", b""] + [b'{"correctness": true}', b'{"correctness": false}', b"so"] * 7


def judge(new_tokens: int = 2) -> ModelJudge:
    table, lengths = np.zeros((3, 3), np.int32), np.array([3, 2, 1], np.int32)
    for row, ids in zip(table, BEFORE, strict=True):
        row[3 - len(ids) :] = ids
    config = tiny.config()
    sampler = SamplerConfig(group_size=1, max_new_tokens=new_tokens, temperature=0.0)
    columns = {COLUMN: table, f"{COLUMN}_lengths": lengths}
    return ModelJudge(sampler, Decoder(tiny.architecture()), tiny.mesh(config), tiny.END_IDS, columns, AFTER)


def given() -> tuple[Prompts, Rollout, list[list[int]]]:
    """Two prompts, four completions each, and the judge's prompts by hand."""
    chance = np.random.default_rng(0)
    tokens, lengths = chance.integers(3, tiny.VOCABULARY, (8, 5)).astype(np.int32), np.array([5, 4, 3, 2, 1, 5, 5, 4])
    tokens[0, 2] = tokens[5, 4] = SPECIAL
    rows = [2, 0]
    group = np.repeat(np.arange(2), 4)
    by_hand = []
    for i in range(8):
        spoken = [int(t) for t in tokens[i, : lengths[i]] if t != SPECIAL]
        by_hand.append([*BEFORE[rows[group[i]]], *spoken, *AFTER])
    columns = {name: jnp.asarray(x[rows]) for name, x in judge().columns.items()}
    prompts = SimpleNamespace(columns=columns)
    rollout = SimpleNamespace(
        tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths), group=jnp.asarray(group), weight=jnp.ones(8)
    )
    return prompts, rollout, by_hand


def test_its_prompts_are_the_ids_before_the_spoken_ones_and_those_after():
    prompts, rollout, by_hand = given()
    made = judge().prompts(byte_table(VERDICTS), prompts, rollout)
    assert made.tokens.shape == (8, 3 + 5 + 2)
    assert [made.tokens[i, 10 - made.lengths[i] :].tolist() for i in range(8)] == by_hand


def verdict_by_hand(params, ids: list[int], new_tokens: int = 2) -> str:
    """Greedy decoding in float64, one token at a time, no cache."""
    ids, text = list(ids), b""
    for _ in range(new_tokens):
        place = np.arange(len(ids))
        logits = numpy_decoder.forward(params, tiny.architecture(), np.array(ids), place, np.ones_like(place))
        ids.append(int(logits[-1].argmax()))
        text += VERDICTS[ids[-1]]
        if ids[-1] in tiny.END_IDS:
            break
    return text.decode()


def test_scores_in_the_program_are_those_of_judging_each_completion_on_the_host():
    prompts, rollout, by_hand = given()
    params = tiny.params(tiny.architecture(), seed=4, scale=0.6)
    mesh = tiny.mesh(tiny.config())
    scorer = Scorer(("model_judge",), (1.0,), byte_table(VERDICTS), None, mesh, {}, models={"model_judge": judge()})
    arrays = (prompts.columns, {name: getattr(rollout, name) for name in ("tokens", "lengths", "group", "weight")})

    def score(columns, fields, variables):
        prompts = SimpleNamespace(columns=columns, rewards=None)
        return scorer.score_in_graph(prompts, SimpleNamespace(**fields), variables)

    program = jax.jit(score)
    variables = {"model_judge": {"params": params}}
    values, valid = program(*arrays, variables)
    wanted = [verdict_of(verdict_by_hand(params, ids)) for ids in by_hand]
    assert valid[:, 0].tolist() == [float(verdict is not None) for verdict in wanted]
    assert values[:, 0].tolist() == [float(verdict is True) for verdict in wanted]
    assert len(set(wanted)) > 1, "the verdicts differ"
    assert "callback" not in program.lower(*arrays, variables).as_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("judge")
    train_sentencepiece([PROMPT, "one two three ask right said done 3"], 150, (), str(place / "tokenizer.model"))
    tokenizer = Tokenizer.from_sentencepiece(str(place / "tokenizer.model"))
    architecture = tiny.architecture(vocabulary=tokenizer.vocabulary, layers=1)
    write_folder(str(place / "model"), architecture, tiny.params(architecture), tokenizer)
    return str(place / "model")


ROWS = [{"prompt": "one {answer} two", "answer": "3"}, {"prompt": [{"role": "user", "content": "three"}], "answer": ""}]


def opened(folder: str, rows=ROWS, tokenizer: Tokenizer | None = None, **fields) -> ModelJudge:
    config = ModelJudgeConfig(path=folder, **fields)
    mesh = tiny.mesh(tiny.config())
    return open_model_judge(config, ModelConfig(), TextConfig(), tokenizer or Tokenizer.from_folder(folder), rows, mesh)


def test_a_row_becomes_what_stands_before_and_after_the_completion(folder, tmp_path):
    own = tmp_path / "prompt.txt"
    own.write_text("ask {prompt} right {answer} said {completion} done")
    made, tokenizer = opened(folder, prompt=str(own)), Tokenizer.from_folder(folder)
    lengths = made.columns[f"{COLUMN}_lengths"]
    texts = [tokenizer.decode(made.columns[COLUMN][i, -lengths[i] :].tolist()).strip() for i in range(2)]
    assert texts == ["ask one {answer} two right 3 said", "ask three right  said"]
    assert tokenizer.decode(list(made.after)).strip() == "done"
    assert "{completion}" not in tokenizer.decode(opened(folder).columns[COLUMN][0].tolist())


def test_what_will_not_do_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="config.json: cannot be read"):
        opened("nowhere", tokenizer=Tokenizer.from_folder(folder))
    with pytest.raises(InputError, match=r"rewards\.model_judge\.prompt='nowhere': no such file"):
        opened(folder, prompt="nowhere")
    (tmp_path / "p.txt").write_text("no place")
    with pytest.raises(InputError, match="must hold {completion} once"):
        opened(folder, prompt=str(tmp_path / "p.txt"))
    train_sentencepiece(["quite another text of words"], 50, (), str(tmp_path / "tokenizer.model"))
    with pytest.raises(InputError, match="its tokenizer is not the policy's"):
        opened(folder, tokenizer=Tokenizer.from_sentencepiece(str(tmp_path / "tokenizer.model")))
