"""Hugging Face folders: round trip, shards, dtypes, and each bad input."""

import dataclasses
import json
import pathlib
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf_writer import hf_weights, tokenizer_metadata
from safetensors.numpy import load_file, save_file

from grpo_jax.config import MeshConfig
from grpo_jax.errors import InputError
from grpo_jax.models import weights as tree_weights
from grpo_jax.models.architecture import Stack, llama
from grpo_jax.models.huggingface import NAMES, open_folder, read_folder, write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.parallel import make_mesh, place, shardings
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
        context=64,
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
    with pytest.raises(InputError, match=r"stacks=\(Stack\(windows=\(0, 4\).* no field in .* model_type llama"):
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
        ("model_type", "gpt2"), ("rope_scaling", {"rope_type": "dynamic", "factor": 8.0}), ("attention_bias", 1),
        ("hidden_act", "gelu"), ("mlp_bias", "yes"), ("rope_interleaved", True), ("attention_dropout", 0.1),
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


def test_names_that_a_file_gives_to_a_shared_tensor_are_followed(tmp_path):
    """What safetensors' save_model leaves of tensors that share memory: one tensor, and its other name as metadata."""
    folder = pathlib.Path(folder_of(tmp_path / "m", tie_word_embeddings=False))
    weights = hf_weights()
    kept, alias = "model.embed_tokens.weight", "lm_head.weight"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", alias: kept})
    params = read_folder(str(folder))[1]
    np.testing.assert_array_equal(params["head"]["kernel"], weights[kept].T)
    np.testing.assert_array_equal(params["embed"]["embedding"], weights[kept])
    (folder / "config.json").write_text(json.dumps(CONFIG))  # tied
    stored = {alias if name == kept else name: w for name, w in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt", kept: alias})
    architecture, params = read_folder(str(folder))
    assert architecture.tied and "head" not in params
    np.testing.assert_array_equal(params["embed"]["embedding"], weights[kept])


DEEP = llama(6, vocabulary=64, width=128, heads=4, kv_heads=2, head_size=32, mlp_width=512, tied=False)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> str:
    """Six layers of a megabyte each, in bfloat16 and in shards."""
    random = np.random.default_rng(0)
    leaves = tree_weights.tensor_shapes(DEEP, NAMES)
    tensors = {name: random.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in leaves.items()}
    folder = tmp_path_factory.mktemp("deep")
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes | {"tie_word_embeddings": False}))
    save_file(tensors, folder / "model.safetensors")
    shard(str(folder))
    return str(folder)


def test_a_host_reads_its_share_and_at_most_a_layer_more(deep):
    """The first of four devices, as the only one of its host: what numpy takes while its shares are read."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    tracemalloc.start()
    try:
        params = open_folder(deep)[1]
        assert tracemalloc.get_traced_memory()[1] < 200_000  # opening reads no weight
        shares = []
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings(params, mesh)), strict=True):
            shares.append(leaf[sharding.addressable_devices_indices_map(leaf.shape)[mesh.devices.flat[0]]])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    share = sum(part.nbytes for part in shares)
    layer = sum(leaf.size for leaf in jax.tree.leaves(params["stack_0"])) * 4 // 6
    assert share < 0.26 * whole and layer < 0.17 * whole
    assert peak < share + layer


def test_shards_reach_their_devices(deep):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    placed = place(open_folder(deep)[1], mesh, ml_dtypes.bfloat16)
    assert placed["stack_0"]["mlp"]["down"]["kernel"].sharding.shard_shape((6, 512, 128)) == (6, 256, 64)
    for stored, read in zip(jax.tree.leaves(placed), jax.tree.leaves(read_folder(deep)[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(stored).astype(np.float32), read)


def test_weights_are_written_in_shards_and_in_another_dtype(deep, tmp_path):
    architecture, params = open_folder(deep)
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata())
    write_folder(str(tmp_path / "m"), architecture, params, tokenizer, dtype="bfloat16", most_shard=1_000_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and not list((tmp_path / "m").glob("*.part"))
    assert all((tmp_path / "m" / name).stat().st_size < 1_100_000 for name in files)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert len(set(modes.values())) == 1, "weights are for whom the config is: a server has another account"
    assert index["metadata"]["total_size"] == sum(leaf.size for leaf in jax.tree.leaves(params)) * 2
    again = read_folder(str(tmp_path / "m"))
    assert again[0] == architecture
    same(again[1], read_folder(deep)[1])
