"""Hugging Face folders of Llama models: config.json and safetensors, read and written."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from grpo_jax.errors import InputError
from grpo_jax.models import weights
from grpo_jax.models.architecture import Architecture, llama
from grpo_jax.text import Tokenizer

NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "attention/query/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
    "attention/key/kernel": "model.layers.{layer}.self_attn.k_proj.weight",
    "attention/value/kernel": "model.layers.{layer}.self_attn.v_proj.weight",
    "attention/out/kernel": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp/gate/kernel": "model.layers.{layer}.mlp.gate_proj.weight",
    "mlp/up/kernel": "model.layers.{layer}.mlp.up_proj.weight",
    "mlp/down/kernel": "model.layers.{layer}.mlp.down_proj.weight",
}
DTYPES = ("F32", "F16", "BF16")
MOST_LAYERS = 10_000

# Fields of config.json that say nothing about the computation.
IGNORED = frozenset(
    "architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label initializer_range "
    "is_llama_config label2id max_position_embeddings pad_token_id pretraining_tp problem_type return_dict "
    "torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version "
    "output_attentions output_hidden_states use_cache".split()
)
# Fields that may only have the value with which this decoder computes the same.
FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


def read_folder(folder: str) -> tuple[Architecture, dict[str, Any]]:
    """Sizes and float32 parameter tree; raises InputError naming file, field or tensor, value and fix."""
    architecture = read_config(str(pathlib.Path(folder, "config.json")))
    files = _files(pathlib.Path(folder))
    found: dict[str, tuple[int, ...]] = {}
    for name, path in files.items():
        view = _open(path).get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {view.get_dtype()}: save it as {', '.join(DTYPES)}")
        if not name.endswith("rotary_emb.inv_freq"):  # old files hold this table; it follows from rope_theta
            found[name] = tuple(view.get_shape())

    def read(name: str, path: str) -> np.ndarray:
        return _open(files[name]).get_tensor(name).astype(np.float32)

    if architecture.tied and NAMES["head/kernel"] in found:
        head, embedding = NAMES["head/kernel"], NAMES["embed/embedding"]
        if embedding in found and not np.array_equal(read(head, ""), read(embedding, "")):
            raise InputError(
                f"{files[head]}: tensor {head} differs from {embedding} though tie_word_embeddings=true: "
                "set it false in config.json, or remove the tensor"
            )
        del found[head]
    weights.check_shapes(weights.tensor_shapes(architecture, NAMES), found, folder)
    return architecture, weights.assemble(architecture, NAMES, read, folder)


def read_config(path: str) -> Architecture:
    """The sizes in a config.json; unknown fields and fields that would change the computation are errors."""
    fields = read_json(path)
    for name, wanted in FIXED.items():
        if (value := fields.pop(name, None if name == "model_type" else wanted)) != wanted:
            raise InputError(f"{path}: {name}={value!r} is not supported: use a model with {name}={wanted!r}")

    def number(name: str, default: Any = None, kind: type = int) -> Any:
        value = fields.pop(name, None)
        value = default if value is None else value
        allowed = (int, float) if kind is float else int
        if not isinstance(value, allowed) or isinstance(value, bool) or not 0 < value < 1e12:
            raise InputError(f"{path}: {name}={value!r} must be a positive number: mend config.json")
        return kind(value)

    rope_theta = _rope(path, fields)
    width, heads = number("hidden_size"), number("num_attention_heads")
    sizes = dict(
        vocabulary=number("vocab_size"),
        width=width,
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_size=number("head_dim", width // heads),
        mlp_width=number("intermediate_size"),
        norm_eps=number("rms_norm_eps", 1e-6, float),
    )
    layers, tied = number("num_hidden_layers"), fields.pop("tie_word_embeddings", False)
    if layers > MOST_LAYERS:  # before a list of so many layers is made
        raise InputError(f"{path}: num_hidden_layers={layers} is more than {MOST_LAYERS}: mend config.json")
    if not isinstance(tied, bool):
        raise InputError(f"{path}: tie_word_embeddings={tied!r} must be true or false: mend config.json")
    if heads % sizes["kv_heads"] or sizes["head_size"] % 2:
        raise InputError(
            f"{path}: num_attention_heads={heads} must divide by num_key_value_heads={sizes['kv_heads']}, and "
            f"head_dim={sizes['head_size']} must be even: mend config.json"
        )
    if unknown := [n for n in fields if n not in IGNORED and not n.startswith("_")]:
        name = unknown[0]
        raise InputError(
            f"{path}: {name}={fields[name]!r} is an unknown field, which may change the computation: "
            "remove it if it does not"
        )
    return llama(layers, rope_theta=rope_theta, tied=tied, **sizes)


def _rope(path: str, fields: dict[str, Any]) -> float:
    """Takes the rotary fields out: rope_theta, or rope_parameters as newer files have them."""
    theta: Any = fields.pop("rope_theta", 10_000.0)
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.pop(name, None)
        if value is None:
            continue
        rest = dict(value) if isinstance(value, dict) else {"": value}
        theta = rest.pop("rope_theta", theta)
        kinds = {rest.pop("rope_type", "default"), rest.pop("type", "default")}
        if kinds != {"default"} or rest:
            raise InputError(f"{path}: {name}={value!r} is not supported: use a model without scaled rotary angles")
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < 1e30:
        raise InputError(f"{path}: rope_theta={theta!r} must be a positive number: mend config.json")
    return float(theta)


def read_json(path: str) -> dict[str, Any]:
    """A JSON file that holds an object; raises InputError when it is missing or something else."""
    try:
        fields = json.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give a complete Hugging Face folder") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}): get it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not an object: get it again")
    return fields


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name -> file, of a sharded or a single checkpoint."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise InputError(f"{single}: no such file, nor {index.name}: give a folder with safetensors weights")
        return {name: single for name in _open(single).keys()}
    weight_map = read_json(str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: weight_map={str(weight_map)[:60]!r} must map tensors to files: get it again")
    files = {}
    held: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise InputError(f"{index}: weight_map[{name!r}]={file!r} is no .safetensors file of this folder: mend it")
        if file not in held:
            held[file] = set(_open(folder / file).keys())
        if name not in held[file]:
            raise InputError(f"{folder / file}: tensor {name} of {index.name} is missing: get both again")
        files[name] = folder / file
    return files


def _open(path: pathlib.Path) -> Any:
    """A lazy handle: the header is read and checked, tensors when asked for."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: give a complete Hugging Face folder")
    try:
        return safetensors.safe_open(str(path), framework="numpy")  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        size = path.stat().st_size
        raise InputError(f"{path}: {size=} bytes is no whole safetensors file ({error}): get it again") from None


def write_folder(folder: str, architecture: Architecture, params: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Writes config.json, model.safetensors and the tokenizer, as `read_folder` and transformers read them.

    Weights keep the dtype of `params`. Raises InputError where weights stand already, and for windows,
    which this format's Llama does not know.
    """
    path = pathlib.Path(folder)
    if (path / "model.safetensors").exists() or (path / "model.safetensors.index.json").exists():
        raise InputError(f"{path}: holds weights already: give an empty folder")
    windows = sorted({w for stack in architecture.stacks for w in stack.windows})
    if windows != [0]:
        raise InputError(f"{path}: attention windows {windows} have no field in Llama's config.json: use 0 (all)")
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    tensors = weights.disassemble(architecture, NAMES, params)
    dtype = str(tensors[NAMES["embed/embedding"]].dtype)
    (path / "config.json").write_text(json.dumps(_config(architecture, tokenizer, dtype), indent=2) + "\n", "utf-8")
    part = path / "model.safetensors.part"
    safetensors.numpy.save_file(tensors, str(part), metadata={"format": "pt"})
    part.replace(path / "model.safetensors")


def _config(a: Architecture, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    ends = list(tokenizer.end_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": a.vocabulary,
        "hidden_size": a.width,
        "intermediate_size": a.mlp_width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": a.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": dtype,
    }
