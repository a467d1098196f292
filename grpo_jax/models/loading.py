"""A model from wherever it lies: architecture, float32 parameters and tokenizer that belong together."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.errors import InputError
from grpo_jax.models import hub, peft, runs
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.gguf import architecture_and_params, read_gguf
from grpo_jax.models.huggingface import open_folder
from grpo_jax.models.lora import merge
from grpo_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Parameters are float32 in the tree of `Architecture`; `source` is the file or folder read.

    A leaf is a numpy array, or of a Hugging Face folder a `weights.StoredLeaf`, which reads when it is sliced.
    `adapters` are the collections `adapters` and `adapter_scales` of a PEFT folder, where they were kept.
    """

    architecture: Architecture
    params: dict[str, Any]
    tokenizer: Tokenizer
    source: str
    adapters: dict[str, Any] | None = None


def load_model(path: str, keep_adapters: bool = False, field: str = "model.path") -> LoadedModel:
    """A model from whatever `model.path` takes, adapters merged; raises InputError naming what is wrong with it.

    That is a Hugging Face folder, a PEFT folder (its base is loaded too), a .gguf file, a run or a checkpoint of
    one, a Hub id such as Qwen/Qwen2.5-0.5B-Instruct (@revision may follow), or 'smollm2-135m'. With `keep_adapters`
    they stay beside the base, for a run that trains them on. Errors name `field`.
    """
    found = _load(path, field)
    if keep_adapters or found.adapters is None:
        return found
    return dataclasses.replace(found, params=merge(found.params, found.adapters), adapters=None)


def _load(path: str, field: str = "model.path") -> LoadedModel:
    source = path
    if path == hub.SMOLLM2:
        source = hub.smollm2()
    elif hub.is_hub_id(path):
        source = hub.fetch_from_hub(path)
    if peft.is_adapters(source):
        base = _load(peft.base_of(source))
        return dataclasses.replace(base, adapters=peft.read_adapters(source, base.architecture))
    if os.path.isdir(source) and (checkpoint := runs.find_checkpoint(source)) is not None:
        base = _load(checkpoint.base)
        params, adapters = runs.trained_params(checkpoint, base.params)
        tokenizer = base.tokenizer.with_end_tokens(tuple(checkpoint.config["text"]["end_tokens"]))
        return LoadedModel(base.architecture, params, tokenizer, source, adapters)
    return _from_files(path, source, field)


def _from_files(path: str, source: str, field: str) -> LoadedModel:
    """A Hugging Face folder or a .gguf file."""
    if os.path.isdir(source):
        tokenizer = Tokenizer.from_folder(source)
        architecture, params = open_folder(source)
    elif source.endswith(".gguf"):
        gguf = read_gguf(source)
        tokenizer = Tokenizer.from_gguf(gguf.metadata, source)
        architecture, params = architecture_and_params(gguf)
    else:
        problem = "is neither a folder nor a .gguf file" if os.path.exists(source) else "does not exist"
        raise InputError(
            f"{field}={path!r} {problem}: give a Hugging Face folder, a .gguf file, a run, a Hub id or {hub.SMOLLM2!r}"
        )
    if tokenizer.vocabulary > architecture.vocabulary:
        raise InputError(
            f"{source}: the tokenizer has {tokenizer.vocabulary} ids, the embedding {architecture.vocabulary} rows: "
            "use the tokenizer that the weights were trained with"
        )
    return LoadedModel(architecture, params, tokenizer, source)


def parameter_table(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, tuple[int, ...], str, int]]:
    """Rows of (path, shape, dtype, count), in the order of the tree."""
    rows: list[tuple[str, tuple[int, ...], str, int]] = []
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            rows += parameter_table(leaf, f"{prefix}{name}/")
        else:
            rows.append((prefix + name, tuple(leaf.shape), str(leaf.dtype), int(np.prod(leaf.shape, dtype=np.int64))))
    return rows
