"""Hugging Face folders: round trip, shards, dtypes, and each bad input."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from gguf_writer import hf_weights, tokenizer_metadata
from safetensors.numpy import load_file, save_file

from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Stack, llama
from grpo_jax.models.huggingface import read_folder, write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.text import Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 265, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 50000, "rope_scaling": None, "hidden_act": "silu", "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "torch_dtype": "float32", "use_cache": True,
    "max_position_embeddings": 64, "initializer_range": 0.02, "_name_or_path": "x",
}  # fmt: skip


def folder_of(path: pathlib.Path, weights: dict | None = None, **config) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(hf_weights() if weights is None else weights, path / "model.safetensors")
    return str(path)


def shard(folder: str, count: int = 3) -> None:
    path = pathlib.Path(folder)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-{i}.safetensors" for i in range(count)]
    weight_map = {name: names[i % count] for i, name in enumerate(sorted(weights))}
    for file in names:
        save_file({n: weights[n] for n, f in weight_map.items() if f == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def same(left, right) -> None:
    assert left.keys() == right.keys()
    for name in left:
        if isinstance(left[name], dict):
            same(left[name], right[name])
        else:
            np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_reach_their_places(tmp_path, sharded, tied):
    weights = hf_weights(tied=tied)
    folder = folder_of(tmp_path / "m", weights, tie_word_embeddings=tied)
    if sharded:
        shard(folder)
    a, params = read_folder(folder)
    assert a == llama(
        2,
        vocabulary=265,
        width=32,
        heads=4,
        kv_heads=2,
        head_size=8,
        mlp_width=64,
        rope_theta=5e4,
        norm_eps=1e-5,
        tied=tied,
    )
    layer = "model.layers.1."
    attention, mlp = params["stack_0"]["attention"], params["stack_0"]["mlp"]
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        np.testing.assert_array_equal(attention[ours]["kernel"][1], weights[f"{layer}self_attn.{theirs}_proj.weight"].T)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(mlp[name]["kernel"][1], weights[f"{layer}mlp.{name}_proj.weight"].T)
    np.testing.assert_array_equal(
        params["stack_0"]["attention_norm"]["scale"][1], weights[f"{layer}input_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["final_norm"]["scale"], weights["model.norm.weight"])
    assert ("head" in params) is not tied


@pytest.mark.parametrize("tied", [False, True])
def test_written_folder_reads_back(tmp_path, tied):
    source = folder_of(tmp_path / "a", hf_weights(tied=tied), tie_word_embeddings=tied)
    architecture, params = read_folder(source)
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata())
    write_folder(str(tmp_path / "b"), architecture, params, tokenizer)
    again = load_model(str(tmp_path / "b"))
    assert again.architecture == architecture
    same(again.params, params)
    assert again.tokenizer.fingerprint() == tokenizer.fingerprint()
    written, original = load_file(tmp_path / "b" / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    same(written, original)
    with pytest.raises(InputError, match="holds weights already"):
        write_folder(str(tmp_path / "b"), architecture, params, tokenizer)


def test_windows_cannot_be_written(tmp_path):
    architecture, params = read_folder(folder_of(tmp_path / "a"))
    windowed = dataclasses.replace(architecture, stacks=(Stack((0, 4)),))
    with pytest.raises(InputError, match=r"windows \[0, 4\]"):
        write_folder(str(tmp_path / "b"), windowed, params, Tokenizer.from_gguf(tokenizer_metadata()))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_float32(tmp_path, dtype):
    weights = {name: w.astype(dtype) for name, w in hf_weights().items()}
    _, params = read_folder(folder_of(tmp_path / "m", weights))
    assert params["embed"]["embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["embed"]["embedding"], weights["model.embed_tokens.weight"].astype(np.float32))


def test_new_style_rope_parameters(tmp_path):
    folder = folder_of(tmp_path / "m", rope_parameters={"rope_type": "default", "rope_theta": 7000.0})
    assert read_folder(folder)[0].rope_theta == 7000.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "qwen2"), ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}), ("attention_bias", True),
        ("hidden_act", "gelu"), ("mlp_bias", True), ("rope_interleaved", True), ("attention_dropout", 0.1),
        ("hidden_size", None), ("hidden_size", "32"), ("num_hidden_layers", 0), ("num_hidden_layers", 10**11),
        ("num_hidden_layers", True),
        ("rope_theta", -1), ("rms_norm_eps", "x"), ("tie_word_embeddings", 1), ("quantization_config", {"bits": 4}),
        ("new_trick", 1), ("num_key_value_heads", 3),
    ],
)  # fmt: skip
def test_config_fields_that_change_the_computation_are_refused(tmp_path, field, value):
    with pytest.raises(InputError, match=rf"config\.json: .*{field}="):
        read_folder(folder_of(tmp_path / "m", **{field: value}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.norm.weight": None}, "tensor model.norm.weight of shape .* is missing"),
        ({"model.norm.weight": np.ones(31, np.float32)}, r"model.norm.weight has shape \[31\], .* \[32\]"),
        ({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}, "q_proj.bias of shape .* no parameter"),
        ({"model.norm.weight": np.ones(32, np.int32)}, "model.norm.weight has dtype I32"),
        ({"model.norm.weight": np.full(32, np.inf, np.float32)}, "model.norm.weight holds NaN or infinite"),
        ({"lm_head.weight": np.ones((265, 32), np.float32)}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    weights = {n: w for n, w in (hf_weights() | change).items() if w is not None}
    with pytest.raises(InputError, match=message):
        read_folder(folder_of(tmp_path / "m", weights))


def test_harmless_extra_tensors_are_allowed(tmp_path):
    weights = hf_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert read_folder(folder_of(tmp_path / "m", weights))[0].tied


@pytest.mark.parametrize("length", [0, 5, 300, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_weights_are_refused(tmp_path, length, sharded):
    folder = folder_of(tmp_path / "m")
    if sharded:
        shard(folder)
    file = tmp_path / "m" / ("model-1.safetensors" if sharded else "model.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=rf"{file.name}: size=\d+ bytes is no whole safetensors file"):
        read_folder(folder)


def test_bad_shards_are_named(tmp_path):
    folder = folder_of(tmp_path / "m")
    shard(folder)
    index = tmp_path / "m" / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for weight_map, message in (
        (good | {"model.norm.weight": "../secret.safetensors"}, "weight_map\\['model.norm.weight'\\]='../secret"),
        (good | {"model.norm.weight": "gone.safetensors"}, "gone.safetensors: no such file"),
        (good | {"extra": "model-0.safetensors"}, "model-0.safetensors: tensor extra"),
        (None, "weight_map="),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            read_folder(folder)


def test_missing_files_are_named(tmp_path):
    folder = folder_of(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        read_folder(folder)
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is not JSON"):
        read_folder(folder)
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        read_folder(folder)
