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
from grpo_jax.models.weights import layer_shapes, put

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
    "rank_pattern": {},
    "alpha_pattern": {},
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
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config "
    "megatron_config megatron_core peft_version qalora_group_size r revision target_modules task_type".split()
)


def write_adapters(
    folder: str, architecture: Architecture, collections: Mapping[str, Any], alpha: float, base: str
) -> None:
    """Writes the collections `adapters` and `adapter_scales` as `peft.PeftModel.from_pretrained` reads them.

    `base` is the model that they belong to, as PEFT should name it.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: set[int] = set()
    for layer, a, b in adapter_pairs(collections[ADAPTERS]):
        ranks.add(a.shape[-1])
        for i, module in enumerate(_modules(architecture, layer)):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a[i].T.astype(np.float32))
            tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b[i].T.astype(np.float32))
    (rank,) = ranks
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    modules = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors})
    (path / CONFIG).write_text(json.dumps(_config(architecture, modules, rank, alpha, base), indent=2) + "\n", "utf-8")
    part = path / f"{WEIGHTS}.part"
    safetensors.numpy.save_file(tensors, str(part), metadata={"format": "pt"})
    part.replace(path / WEIGHTS)


def read_adapters(folder: str, architecture: Architecture) -> dict[str, Any]:
    """The collections `adapters` and `adapter_scales`; raises InputError naming file, field or tensor, and fix."""
    path = pathlib.Path(folder)
    scale = _scale(path / CONFIG)
    try:
        found = safetensors.numpy.load_file(str(path / WEIGHTS))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path / WEIGHTS}: is no whole safetensors file ({error}): get it again") from None
    adapters: dict[str, Any] = {}
    for layer in _layers(architecture):
        modules = _modules(architecture, layer)
        names = {leaf: [f"{PREFIX}{m}.lora_{leaf.upper()}.weight" for m in modules] for leaf in ("a", "b")}
        if not any(name in found for pair in names.values() for name in pair):
            continue
        for leaf, wanted in names.items():
            if missing := [name for name in wanted if name not in found]:
                raise InputError(f"{path / WEIGHTS}: tensor {missing[0]} is missing: adapters must be in every layer")
            put(adapters, f"{layer}/{leaf}", np.stack([found.pop(name).T for name in wanted]).astype(np.float32))
    if found:
        raise InputError(f"{path / WEIGHTS}: tensor {min(found)} belongs to no linear layer of the model: remove it")
    _check_shapes(path / WEIGHTS, architecture, adapters)
    return {ADAPTERS: adapters, SCALES: adapter_scales(adapters, scale)}


def is_adapters(path: str) -> bool:
    """Whether a path is a PEFT folder."""
    return pathlib.Path(path, CONFIG).is_file()


def base_of(folder: str) -> str:
    """The model that the adapters of a folder belong to."""
    base = read_json(str(pathlib.Path(folder, CONFIG))).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{pathlib.Path(folder, CONFIG)}: base_model_name_or_path={base!r} names no model: mend it")
    return base


def _scale(path: pathlib.Path) -> float:
    """lora_alpha / r, when nothing in the config would compute something else."""
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
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
            raise InputError(f"{path}: {name}={value!r} must be a positive number: mend it")
    assert rank is not None and alpha is not None
    return alpha / rank


def _layers(architecture: Architecture) -> list[str]:
    """Linear layers of the stacks that transformers has too, such as 'stack_0/attention/query'."""
    apart = tensor_table(architecture)[1]
    return [
        f"stack_{i}/{path.removesuffix('/kernel')}"
        for i, stack in enumerate(architecture.stacks)
        for path, shape in layer_shapes(architecture, stack).items()
        if path.endswith("/kernel") and len(shape) == 2 and path not in apart and "router" not in path
    ]


def _modules(architecture: Architecture, layer: str) -> list[str]:
    """transformers' module names of a layer, one for each of its stack."""
    stack, _, path = layer.partition("/")
    number = int(stack.removeprefix("stack_"))
    first = sum(s.layers for s in architecture.stacks[:number])
    names, apart = tensor_table(architecture)
    if f"{path}/kernel" in apart:
        raise InputError(
            f"{layer}: its rows lie in {names[f'{path}/kernel']} with others, or in another order, so PEFT has no "
            "adapter for it alone: merge the adapters, or leave the layer out of lora.targets"
        )
    name = names[f"{path}/kernel"].removesuffix(".weight")
    return [name.format(layer=first + j) for j in range(architecture.stacks[number].layers)]


def _check_shapes(path: pathlib.Path, architecture: Architecture, adapters: dict[str, Any]) -> None:
    if not adapters:
        raise InputError(f"{path}: holds no adapter of a linear layer: name a folder that PEFT wrote")
    rank = next(adapter_pairs(adapters))[1].shape[-1]
    for layer, a, b in adapter_pairs(adapters):
        stack, _, below = layer.partition("/")
        shapes = layer_shapes(architecture, architecture.stacks[int(stack.removeprefix("stack_"))])
        outputs, inputs = shapes[f"{below}/kernel"]
        if a.shape[1:] != (inputs, rank) or b.shape[1:] != (rank, outputs):
            raise InputError(
                f"{path}: the adapters of {layer} have shapes {list(a.shape[1:])} and {list(b.shape[1:])}, not "
                f"{[inputs, rank]} and {[rank, outputs]}: use the model that they were trained on"
            )


def _config(architecture: Architecture, modules: list[str], rank: int, alpha: float, base: str) -> dict[str, Any]:
    """What PEFT needs; target_modules are last names where every layer has them, else full ones."""
    short = sorted({module.rpartition(".")[2] for module in modules})
    every = len(modules) == len(short) * architecture.layers
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
