"""Hugging Face folders: config.json and safetensors, read lazily and written in shards."""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from grpo_jax.errors import InputError
from grpo_jax.models import weights
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.families import from_fields, read_config, read_json, to_fields
from grpo_jax.text import Tokenizer

LAYER = "model.layers.{layer}."
NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "attention_norm/scale": LAYER + "input_layernorm.weight",
    "attention/query/kernel": LAYER + "self_attn.q_proj.weight",
    "attention/key/kernel": LAYER + "self_attn.k_proj.weight",
    "attention/value/kernel": LAYER + "self_attn.v_proj.weight",
    "attention/out/kernel": LAYER + "self_attn.o_proj.weight",
    "attention/query/bias": LAYER + "self_attn.q_proj.bias",
    "attention/key/bias": LAYER + "self_attn.k_proj.bias",
    "attention/value/bias": LAYER + "self_attn.v_proj.bias",
    "attention/out/bias": LAYER + "self_attn.o_proj.bias",
    "attention/query_norm/scale": LAYER + "self_attn.q_norm.weight",
    "attention/key_norm/scale": LAYER + "self_attn.k_norm.weight",
    "mlp_norm/scale": LAYER + "post_attention_layernorm.weight",
    "mlp/gate/kernel": LAYER + "mlp.gate_proj.weight",
    "mlp/up/kernel": LAYER + "mlp.up_proj.weight",
    "mlp/down/kernel": LAYER + "mlp.down_proj.weight",
    "mlp/gate/bias": LAYER + "mlp.gate_proj.bias",
    "mlp/up/bias": LAYER + "mlp.up_proj.bias",
    "mlp/down/bias": LAYER + "mlp.down_proj.bias",
    "mlp/router/kernel": LAYER + "mlp.gate.weight",
    "mlp/routing_bias": LAYER + "mlp.gate.e_score_correction_bias",
    "mlp/experts_gate/kernel": LAYER + "mlp.experts.{expert}.gate_proj.weight",
    "mlp/experts_up/kernel": LAYER + "mlp.experts.{expert}.up_proj.weight",
    "mlp/experts_down/kernel": LAYER + "mlp.experts.{expert}.down_proj.weight",
    "mlp/shared/gate/kernel": LAYER + "mlp.shared_experts.gate_proj.weight",
    "mlp/shared/up/kernel": LAYER + "mlp.shared_experts.up_proj.weight",
    "mlp/shared/down/kernel": LAYER + "mlp.shared_experts.down_proj.weight",
}
GEMMA_NAMES = {
    "attention_post_norm/scale": LAYER + "post_attention_layernorm.weight",
    "mlp_norm/scale": LAYER + "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": LAYER + "post_feedforward_layernorm.weight",
}
PHI3_NAMES = {f"attention/{n}/kernel": LAYER + "self_attn.qkv_proj.weight" for n in ("query", "key", "value")} | {
    f"mlp/{n}/kernel": LAYER + "mlp.gate_up_proj.weight" for n in ("gate", "up")
}
LATENT_NAMES = {
    "attention/query_latent/kernel": LAYER + "self_attn.q_a_proj.weight",
    "attention/query_latent_norm/scale": LAYER + "self_attn.q_a_layernorm.weight",
    "attention/latent/kernel": LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    "attention/latent_norm/scale": LAYER + "self_attn.kv_a_layernorm.weight",
    "attention/key_up/kernel": LAYER + "self_attn.kv_b_proj.weight",
    "attention/value_up/kernel": LAYER + "self_attn.kv_b_proj.weight",
}
DTYPES = ("F32", "F16", "BF16")
WRITTEN = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MOST_SHARD = 5_000_000_000  # bytes of a file, as transformers has it


def tensor_table(a: Architecture) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Tensor names by path, and for tensors that hold more than one parameter, or in another order, its rows."""
    names, rows = dict(NAMES), {}
    if a.post_norms:
        names |= GEMMA_NAMES
    if a.family == "phi3":
        names |= PHI3_NAMES
        query, key = a.heads * a.head_size, a.kv_heads * a.head_size
        for parts in ({"attention/query": query, "attention/key": key, "attention/value": key},
                      {"mlp/gate": a.mlp_width, "mlp/up": a.mlp_width}):  # fmt: skip
            first = 0
            for path, size in parts.items():
                rows[f"{path}/kernel"] = np.arange(first, first + size)
                first += size
    if (m := a.latent) is not None:
        names |= LATENT_NAMES
        if m.query_rank:
            names["attention/query/kernel"] = LAYER + "self_attn.q_b_proj.weight"
        starts = np.arange(a.heads)[:, None] * (m.plain + m.value)
        rows["attention/key_up/kernel"] = (starts + np.arange(m.plain)).ravel()
        rows["attention/value_up/kernel"] = (starts + m.plain + np.arange(m.value)).ravel()
        if m.paired:  # features 2i and 2i + 1 of a file are i and i + rotary / 2 of the tree
            apart = np.r_[0 : m.rotary : 2, 1 : m.rotary : 2]
            head = np.r_[0 : m.plain, m.plain + apart]
            rows["attention/query/kernel"] = (np.arange(a.heads)[:, None] * a.head_size + head).ravel()
            rows["attention/latent/kernel"] = np.r_[0 : m.rank, m.rank + apart]
    return names, rows


def read_folder(folder: str) -> tuple[Architecture, dict[str, Any]]:
    """Architecture and float32 parameter tree, all of it in memory: `open_folder`, read."""
    architecture, params = open_folder(folder)
    return architecture, weights.materialize(params)


def open_folder(folder: str) -> tuple[Architecture, dict[str, Any]]:
    """Architecture and a tree of `weights.StoredLeaf`: names, shapes and dtypes are checked, no weight is read.

    Raises InputError naming file, field or tensor, value and fix.
    """
    architecture = read_config(str(pathlib.Path(folder, "config.json")))
    reader = _Reader(folder, architecture)
    names, rows = tensor_table(architecture)
    weights.check_shapes(weights.tensor_shapes(architecture, names), reader.shapes, folder)

    def read(name: str, path: str, index: weights.Index) -> np.ndarray:
        return reader.rows(name, index, rows.get(path))

    return architecture, weights.stored_tree(architecture, names, read, folder)


class _Reader:
    """The tensors of a folder: shapes by name, and slices of them when asked for."""

    def __init__(self, folder: str, architecture: Architecture):
        self._files = _files(pathlib.Path(folder))
        self._handles = {path: _open(path) for path in set(self._files.values())}
        self._kept = self._aliases()  # name -> the name under which the tensor is stored
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, kept in self._kept.items():
            view = self._view(name)
            if view.get_dtype() not in DTYPES:
                path = self._files[kept]
                raise InputError(f"{path}: tensor {name} has dtype {view.get_dtype()}: save it as {', '.join(DTYPES)}")
            if not _is_left_out(name, architecture):
                self.shapes[name] = tuple(view.get_shape())
        if architecture.tied:
            self._check_tied()

    def _aliases(self) -> dict[str, str]:
        """Stored names, and those that a file's metadata gives to a tensor stored under another (shared weights)."""
        kept = {name: name for name in self._files}
        for handle in self._handles.values():
            for name, stored in (handle.metadata() or {}).items():
                if stored in self._files and name.endswith(".weight"):
                    kept.setdefault(name, stored)
        return kept

    def _view(self, name: str) -> Any:
        stored = self._kept[name]
        return self._handles[self._files[stored]].get_slice(stored)

    def _check_tied(self) -> None:
        """A head beside a tied embedding must be the same numbers."""
        head, embedding = NAMES["head/kernel"], NAMES["embed/embedding"]
        if head not in self.shapes or embedding not in self.shapes:
            return
        one, other = self._view(head), self._view(embedding)
        size = self.shapes[head][0]
        starts = range(0, size if self._kept[head] != self._kept[embedding] else 0, 1024)
        same = self.shapes[head] == self.shapes[embedding] and all(
            np.array_equal(*(view[i : min(i + 1024, size)] for view in (one, other))) for i in starts
        )
        if not same:
            raise InputError(
                f"{self._files[self._kept[head]]}: tensor {head} differs from {embedding} though "
                "tie_word_embeddings=true: set it false in config.json, or remove the tensor"
            )
        del self.shapes[head]

    def rows(self, name: str, index: weights.Index, rows: np.ndarray | None) -> np.ndarray:
        """Slices of a tensor, float32; with `rows`, the first slice is one of these row numbers."""
        view, (first, *rest) = self._view(name), index
        if rows is None:
            return np.asarray(view[tuple(index)]).astype(np.float32)
        numbers = rows[first]
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=-1)) + 1
        low = low if len(numbers) == 0 else int(numbers.min())
        return np.asarray(view[(slice(low, high), *rest)]).astype(np.float32)[numbers - low]


def _is_left_out(name: str, a: Architecture) -> bool:
    """Tables that follow from the config, and DeepSeek-V3's layers after the last, which predict further tokens."""
    layer = re.match(r"model\.layers\.(\d{1,6})\.", name)
    further = a.family == "deepseek_v3" and layer is not None and int(layer[1]) >= a.layers
    return further or name.endswith("rotary_emb.inv_freq")


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


def write_folder(
    folder: str,
    architecture: Architecture,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    dtype: str = "",
    most_shard: int = MOST_SHARD,
) -> None:
    """Writes config.json, safetensors in shards and the tokenizer, as `open_folder`, transformers and vLLM read them.

    Weights keep the dtype of `params` unless `dtype` names another; no more than one shard is held at a time. Raises
    InputError where weights stand already, and for an architecture that its family's config.json cannot say.
    """
    path = pathlib.Path(folder)
    if (path / "model.safetensors").exists() or (path / "model.safetensors.index.json").exists():
        raise InputError(f"{path}: holds weights already: give an empty folder")
    fields = to_fields(architecture)
    again = from_fields(str(path / "config.json"), fields)
    for name, value in vars(architecture).items():
        if getattr(again, name) != value:
            raise InputError(
                f"{path}: {name}={value!r} has no field in the config.json of model_type {architecture.family}: "
                f"it would be read as {getattr(again, name)!r}"
            )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    written = dtype or str(weights.take(params, "final_norm/scale").dtype)
    ends = list(tokenizer.end_ids)
    fields |= {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": written,
    }
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    _write_shards(path, architecture, params, WRITTEN[written], most_shard)


def _write_shards(path: pathlib.Path, a: Architecture, params: Mapping[str, Any], dtype: Any, most: int) -> None:
    """The weights in files of at most `most` bytes (or one tensor), complete when the last has its name."""
    names, rows = tensor_table(a)
    parts: list[tuple[pathlib.Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        part = path / f"model-{len(parts) + 1:05d}.part"
        weights.save_tensors(part, held)
        parts.append((part, list(held)))
        held.clear()

    for name, tensor in weights.disassemble(a, names, params, rows):
        tensor = tensor.astype(dtype, copy=False)
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > most:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        parts[0][0].replace(path / "model.safetensors")
        return
    weight_map = {}
    for number, (part, inside) in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.replace(path / file)
        weight_map |= dict.fromkeys(inside, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
