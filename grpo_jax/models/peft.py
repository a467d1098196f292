"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, written and read.

PEFT holds A as [r, I] and B as [O, r], one pair for each linear layer, under the names of transformers' modules.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.families import read_json
from grpo_jax.models.huggingface import tensor_table
from grpo_jax.models.lora import ADAPTERS, SCALES, adapter_pairs, adapter_scales
from grpo_jax.models.weights import layer_shapes, put, save_tensors, tensor_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields of adapter_config.json that may only have the value with which x A B alpha / r is all that is added.
FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
# Fields that say how adapters came about, or nothing about what they compute; which layers have them, the tensors tell.
IGNORED = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules "
    "inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout "
    "lora_ga_config megatron_config megatron_core peft_version qalora_group_size r rank_pattern revision "
    "target_modules task_type".split()
)


def write_adapters(
    folder: str, architecture: Architecture, collections: Mapping[str, Any], alpha: float, base: str
) -> None:
    """Writes the collections `adapters` and `adapter_scales` as `peft.PeftModel.from_pretrained` reads them.

    `base` is the model that they belong to, as PEFT should name it.
    """
    pairs = list(adapter_pairs(collections[ADAPTERS]))
    rank = pairs[0][1].shape[-1]
    parts: dict[str, list[tuple[Any, np.ndarray, np.ndarray]]] = {}
    for layer, a, b in pairs:
        modules, rows = _modules(architecture, layer)
        for module, one_a, one_b in zip(modules, a, b, strict=True):
            parts.setdefault(module, []).append((rows, one_a.T.astype(np.float32), one_b.T.astype(np.float32)))
    outputs = tensor_shapes(architecture, tensor_table(architecture)[0])
    tensors: dict[str, np.ndarray] = {}
    for module, found in parts.items():
        a, b = _joined(found, outputs[f"{module}.weight"][0])
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
    several = {module: len(found) for module, found in parts.items() if len(found) > 1}
    config = _config(architecture, sorted(parts), rank, alpha, base)
    config["rank_pattern"] = {module: rank * count for module, count in several.items()}
    config["alpha_pattern"] = {module: alpha * count for module, count in several.items()}
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_tensors(path / WEIGHTS, tensors)


def _joined(parts: list[tuple[Any, np.ndarray, np.ndarray]], outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A [k r, I] and B [O, k r] of a module that holds k of our layers: B's blocks fill the rows of each layer."""
    rank = parts[0][1].shape[0]
    b = np.zeros((outputs, rank * len(parts)), np.float32)
    for i, (rows, _, one) in enumerate(parts):
        b[slice(None) if rows is None else rows, i * rank : (i + 1) * rank] = one
    return np.ascontiguousarray(np.concatenate([a for _, a, _ in parts])), b


def read_adapters(folder: str, architecture: Architecture) -> dict[str, Any]:
    """The collections `adapters` and `adapter_scales`; raises InputError naming file, field or tensor, and fix.

    Adapters of a module that holds several of our layers (Phi-3's qkv_proj) become one pair for each of them.
    """
    path = pathlib.Path(folder)
    fields = _checked_config(path / CONFIG)
    try:
        found = safetensors.numpy.load_file(str(path / WEIGHTS))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path / WEIGHTS}: is no whole safetensors file ({error}): get it again") from None
    adapters: dict[str, Any] = {}
    used: set[str] = set()
    for layer in _layers(architecture):
        modules, rows = _modules(architecture, layer)
        names = [(f"{PREFIX}{m}.lora_A.weight", f"{PREFIX}{m}.lora_B.weight") for m in modules]
        if not any(name in found for pair in names for name in pair):
            continue
        if missing := [name for pair in names for name in pair if name not in found]:
            raise InputError(f"{path / WEIGHTS}: tensor {missing[0]} is missing: adapters must be in every layer")
        used |= {name for pair in names for name in pair}
        parts = [_part(found[a], found[b], rows, fields["r"]) for a, b in names]
        if _shared(architecture, layer) and not any(b.any() for _, b in parts):
            continue  # the module's adapters are those of another layer in it
        _check_shapes(path / WEIGHTS, architecture, layer, parts)
        put(adapters, f"{layer}/a", np.stack([a.T for a, _ in parts]).astype(np.float32))
        put(adapters, f"{layer}/b", np.stack([b.T for _, b in parts]).astype(np.float32))
    if left := found.keys() - used:
        raise InputError(f"{path / WEIGHTS}: tensor {min(left)} belongs to no linear layer of the model: remove it")
    if not adapters:
        raise InputError(f"{path / WEIGHTS}: holds no adapter of a linear layer: name a folder that PEFT wrote")
    return {ADAPTERS: adapters, SCALES: adapter_scales(adapters, fields["lora_alpha"] / fields["r"])}


def _part(a: np.ndarray, b: np.ndarray, rows: np.ndarray | None, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one of our layers: its rows of B, and of a module written by `_joined` the block that they use."""
    if rows is not None and b.ndim == 2 and rows.max() < len(b):
        b = b[rows]
    if a.ndim == b.ndim == 2 and len(a) == b.shape[1] > rank and len(a) % rank == 0:
        blocks = np.flatnonzero(np.any(b.reshape(len(b), -1, rank), axis=(0, 2)))
        if len(blocks) <= 1:
            at = slice(int(blocks[0]) * rank, (int(blocks[0]) + 1) * rank) if len(blocks) else slice(0, rank)
            a, b = a[at], b[:, at]
    return a, b


def is_adapters(path: str) -> bool:
    """Whether a path is a PEFT folder."""
    return pathlib.Path(path, CONFIG).is_file()


def base_of(folder: str) -> str:
    """The model that the adapters of a folder belong to."""
    base = read_json(str(pathlib.Path(folder, CONFIG))).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{pathlib.Path(folder, CONFIG)}: base_model_name_or_path={base!r} names no model: mend it")
    return base


def _checked_config(path: pathlib.Path) -> dict[str, Any]:
    """The fields of an adapter_config.json, when nothing in it would compute something else."""
    fields = read_json(str(path))
    for name, wanted in FIXED.items():
        if (value := fields.get(name, wanted)) != wanted and not (not value and not wanted):
            raise InputError(f"{path}: {name}={value!r} is not supported: use adapters with {name}={wanted!r}")
    for name, value in fields.items():
        if value and name not in FIXED and name not in IGNORED:
            raise InputError(
                f"{path}: {name}={value!r} is an unknown field, which may change the computation: remove it if it does "
                "not"
            )
    rank, alpha = fields.get("r", 0), fields.get("lora_alpha", 0)
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
            raise InputError(f"{path}: {name}={value!r} must be a positive number: mend it")
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    for module in {**ranks, **alphas}:
        if alphas.get(module, alpha) * rank != alpha * ranks.get(module, rank):
            raise InputError(
                f"{path}: rank_pattern and alpha_pattern give {module} another alpha / r than the others have: use "
                "adapters with one scale"
            )
    return fields


def _layers(architecture: Architecture) -> list[str]:
    """Linear layers of the stacks, such as 'stack_0/attention/query'; routers and routed experts are none."""
    return [
        f"stack_{i}/{path.removesuffix('/kernel')}"
        for i, stack in enumerate(architecture.stacks)
        for path, shape in layer_shapes(architecture, stack).items()
        if path.endswith("/kernel") and len(shape) == 2 and not path.endswith("/router/kernel")
    ]


def _modules(architecture: Architecture, layer: str) -> tuple[list[str], np.ndarray | None]:
    """transformers' module names of a layer, one for each of its stack, and which of a module's rows are its own."""
    stack, _, path = layer.partition("/")
    names, rows = tensor_table(architecture)
    number = int(stack.removeprefix("stack_"))
    first = sum(s.layers for s in architecture.stacks[:number])
    name = names[f"{path}/kernel"].removesuffix(".weight")
    count = architecture.stacks[number].layers
    return [name.format(layer=first + j) for j in range(count)], rows.get(f"{path}/kernel")


def _shared(architecture: Architecture, layer: str) -> bool:
    """Whether a module of transformers holds this layer and others."""
    names, _ = tensor_table(architecture)
    return list(names.values()).count(names[f"{layer.partition('/')[2]}/kernel"]) > 1


def _check_shapes(path: pathlib.Path, architecture: Architecture, layer: str, parts: list[Any]) -> None:
    stack, _, below = layer.partition("/")
    shapes = layer_shapes(architecture, architecture.stacks[int(stack.removeprefix("stack_"))])
    outputs, inputs = shapes[f"{below}/kernel"]
    rank = len(parts[0][0])
    for a, b in parts:
        if a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise InputError(
                f"{path}: the adapters of {layer} have shapes {list(a.shape)} and {list(b.shape)}, not "
                f"{[rank, inputs]} and {[outputs, rank]}: use the model that they were trained on"
            )


def _config(architecture: Architecture, modules: list[str], rank: int, alpha: float, base: str) -> dict[str, Any]:
    """What PEFT needs; target_modules are last names where every layer has them, else full ones."""
    short = sorted({module.rpartition(".")[2] for module in modules})
    # Routed experts have layers of the same last names, which have no adapters.
    every = architecture.experts is None and len(modules) == len(short) * architecture.layers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": short if every else modules,
    }
