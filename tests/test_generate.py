"""`grpo_jax.load`: logits and log-probabilities against float64, texts by the sampler of training."""

import dataclasses

import numpy as np
import numpy_decoder
import pytest
import tiny
from gguf_writer import tokenizer_metadata

import grpo_jax
from grpo_jax import cli
from grpo_jax.config import SamplerConfig, TextConfig
from grpo_jax.errors import InputError
from grpo_jax.generate import Model, load
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.lora import adapter_scales, merge
from grpo_jax.models.peft import write_adapters
from grpo_jax.text import Tokenizer, encode_prompt

OF = tiny.architecture(vocabulary=265, layers=1)
PARAMS = tiny.params(OF)
TOKENS = np.random.default_rng(0).integers(0, 265, (3, 7))
LENGTHS = np.array([7, 3, 0])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """A folder with a tiny byte-level model."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    write_folder(str(folder), OF, PARAMS, Tokenizer.from_gguf(tokenizer_metadata()))
    return str(folder)


@pytest.fixture(scope="module")
def model(path) -> Model:
    return grpo_jax.load(path)


def want(row: int) -> np.ndarray:
    """Logits of a row of TOKENS without its padding, by the oracle."""
    tokens = TOKENS[row, : LENGTHS[row]]
    return numpy_decoder.forward(PARAMS, OF, tokens, np.arange(len(tokens)), np.ones(len(tokens), int))


def test_logits_and_log_probs_of_ragged_rows(model):
    logits, logps = model.logits(TOKENS, LENGTHS), model.log_probs(TOKENS, LENGTHS)
    assert logits.shape == (3, 7, 265) and logits.dtype == np.float32 and logps.shape == (3, 7)
    for row, length in enumerate(LENGTHS):
        if length:
            np.testing.assert_allclose(logits[row, :length], want(row), atol=2e-5)
            law = numpy_decoder.log_softmax(want(row))[np.arange(length - 1), TOKENS[row, 1:length]]
            np.testing.assert_allclose(logps[row, 1:length], law, atol=2e-5)
        assert not logits[row, length:].any() and not logps[row, length:].any() and logps[row, 0] == 0
    np.testing.assert_array_equal(model.logits(TOKENS), model.logits(TOKENS, np.full(3, 7)))


def test_programs_are_compiled_once_for_a_bucket(model):
    for rows, length in ((3, 7), (4, 16), (3, 12)):
        model.logits(np.ones((rows, length), int))
    assert model._logits._cache_size() == 1


@pytest.mark.parametrize(
    "tokens, lengths, message",
    [
        ([1, 2], None, r"tokens: int64\[2\] must be padded integers \[rows, length\]"),
        ([[0.5]], None, "must be padded integers"),
        ([[1, 265]], None, "265 is not below the vocabulary, 265"),
        ([[1, 2]], [3], r"lengths=\[3\] must be 1 numbers from 0 to 2"),
        ([[1, 2]], [1, 1], "must be 1 numbers"),
    ],
)
def test_tokens_out_of_range_are_refused(model, tokens, lengths, message):
    with pytest.raises(InputError, match=message):
        model.logits(np.array(tokens), lengths)


PROMPTS = ["hello", [{"role": "user", "content": "a longer one, 12 + 3"}], ""]


def test_greedy_text_is_that_of_the_oracle(model):
    """Each token is the likeliest by float64 logits of the whole row; ends are cut off by decoding."""
    (texts,) = model.generate(PROMPTS[:1], max_new_tokens=4, temperature=0)
    ids = encode_prompt("hello", TextConfig(template="chat"), model.tokenizer)
    drawn = []
    while len(drawn) < 4 and (not drawn or drawn[-1] not in model.tokenizer.end_ids):
        place = np.arange(len(ids) + len(drawn))
        drawn.append(
            int(numpy_decoder.forward(PARAMS, OF, np.array([*ids, *drawn]), place, place * 0 + 1)[-1].argmax())
        )
    assert texts == [model.tokenizer.decode(drawn)]


def test_texts_follow_from_the_seed_and_not_from_the_batch(model):
    how = {"n": 2, "max_new_tokens": 4, "template": "plain"}
    texts = model.generate(PROMPTS[:2], **how)
    assert [len(completions) for completions in texts] == [2, 2] and texts[0][0] != texts[0][1]
    assert model.generate(PROMPTS[:2], **how, batch_size=2) == texts, "one prompt at a time"
    assert model.generate(PROMPTS[:2], **how, seed=1) != texts
    assert len([config for config, _ in model._samplers if config.group_size == 2]) == 1, "whatever the batch"
    assert model.generate([]) == []


def test_options_reach_the_sampler(model, monkeypatch):
    asked = []

    def sampler(self, config, end_ids):
        asked.append((config, end_ids))
        raise StopIteration

    monkeypatch.setattr(Model, "_sampler", sampler)
    options = {"n": 3, "max_new_tokens": 5, "temperature": 0.5, "top_k": 7, "top_p": 0.9}
    with pytest.raises(StopIteration):
        model.generate(["a"], **options, end_tokens=("<|endoftext|>",))
    config = SamplerConfig(group_size=3, max_new_tokens=5, temperature=0.5, top_k=7, top_p=0.9, cache_dtype="float32")
    assert asked == [(config, (0,))]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": "hello"}, "prompts='hello' must be a list"),
        ({"prompts": [3]}, r"prompts=\[3\] must be a list"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1.0 must lie"),
        ({"top_p": 0.0}, "top_p=0.0 must lie"),
        ({"template": "nothing"}, "text.template='nothing'"),
        ({"end_tokens": ("<|nothing|>",)}, "text.end_tokens"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate(**{"prompts": ["a"], **options})


def test_adapters_are_merged(path, model, tmp_path):
    adapters = tiny.adapters(OF)
    added = {"adapters": adapters, "adapter_scales": adapter_scales(adapters, 2.0)}
    write_adapters(str(tmp_path), OF, added, 4.0, path)
    loaded = load(str(tmp_path))
    merged = merge(PARAMS, added)["stack_0"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(loaded.params["stack_0"]["mlp"]["up"]["kernel"], merged)
    assert (merged != np.asarray(model.params["stack_0"]["mlp"]["up"]["kernel"])).any()
    with pytest.raises(InputError, match="dtype='int8' is not float32 or bfloat16"):
        load(path, dtype="int8")


def test_the_command_prints_what_the_call_gives(model, path, capsys, monkeypatch):
    monkeypatch.setattr("grpo_jax.generate.load", lambda *_: model)
    monkeypatch.setattr(cli, "_set_up_jax", lambda config: None)
    options = ["-n", "2", "--max_new_tokens", "4", "--template", "plain"]
    assert cli.main(["sample", "--model", path, "--prompt", "hello", *options]) == 0
    (texts,) = model.generate(["hello"], n=2, max_new_tokens=4, template="plain")
    assert capsys.readouterr().out == "".join(f"--- hello ({i} of 2)\n{text}\n" for i, text in enumerate(texts, 1))
    assert cli.main(["sample", "--model", path]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_a_model_without_chat_template_gets_plain_prompts(model, monkeypatch):
    bare = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, chat_template=None))
    asked = []
    monkeypatch.setattr(Model, "_generated", lambda self, ids, *_: asked.extend(ids) or [])
    for one, how in ((bare, {}), (model, {}), (model, {"template": "plain"}), (model, {"system_prompt": "Add."})):
        one.generate(["hello"], **how)
    tokenizer = model.tokenizer
    chats = [encode_prompt("hello", TextConfig(template="chat", system_prompt=s), tokenizer) for s in ("", "Add.")]
    plain = tokenizer.encode("hello")
    assert asked == [plain, chats[0], plain, chats[1]]
