"""GGUF files (versions 2 and 3) in numpy: checked header, lazy tensors, weights of Llama, Qwen2 and Qwen3.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is untrusted: every count
and length is held against the bytes that the file has before anything of that size is made.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from grpo_jax.errors import InputError
from grpo_jax.models import weights
from grpo_jax.models.architecture import Architecture, llama

DAMAGED = "the file is truncated or damaged: get it again"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BLOCK, SUPER_BLOCK = 32, 256  # numbers in a block of the quantised types

Blocks = UInt8[np.ndarray, "blocks bytes"]
Values = Float[np.ndarray, "blocks values"]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape slowest axis first, tensor type, first byte and bytes in the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class GGUF:
    """A checked header; tensors are read when asked for."""

    path: str
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor, dequantised to float32, slowest axis first."""
        info = self.tensors[name]
        kind = TENSOR_TYPES[info.type]
        raw = np.memmap(self.path, np.uint8, "r", offset=info.start, shape=(info.size,))
        return np.asarray(kind.decode(raw.reshape(-1, kind.bytes)), np.float32).reshape(info.shape)


@dataclasses.dataclass(frozen=True)
class TensorType:
    """A tensor type: numbers and bytes of a block, and how blocks become float32."""

    name: str
    values: int
    bytes: int
    decode: Callable[[Blocks], Values]


def read_gguf(path: str) -> GGUF:
    """Reads and checks the header; raises InputError naming file, field, value and fix."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file: check model.path")
    if os.path.getsize(path) < 24:
        raise InputError(f"{path}: size={os.path.getsize(path)} bytes is too short for a GGUF header: {DAMAGED}")
    cursor = _Cursor(path, memoryview(np.memmap(path, np.uint8, "r")))  # type: ignore[arg-type]
    if (magic := bytes(cursor.take(4, "magic"))) != b"GGUF":
        raise InputError(f"{path}: magic={magic!r} is not b'GGUF': give a .gguf file")
    version = cursor.number("I", "version")
    if version not in (2, 3):
        raise InputError(f"{path}: version={version} is not 2 or 3 (little-endian): convert the file again")
    tensor_count = cursor.count("tensor_count", 32)
    metadata_count = cursor.count("metadata_kv_count", 13)
    metadata: dict[str, Any] = {}
    for i in range(metadata_count):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise cursor.bad(f"metadata key {key!r}", "is there twice")
        metadata[key] = cursor.value(cursor.number("I", key), key)
    return GGUF(path, version, metadata, _tensor_infos(cursor, tensor_count, metadata))


def _tensor_infos(cursor: "_Cursor", count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.bad(f"general.alignment={alignment!r}", "is not a power of two from 8 to 2^20")
    found: dict[str, TensorInfo] = {}
    for i in range(count):
        name = cursor.string(f"tensor name {i}")
        if name in found:
            raise cursor.bad(f"tensor {name!r}", "is there twice")
        found[name] = cursor.tensor_info(name, alignment)
    base = -(-cursor.at // alignment) * alignment
    placed = {n: dataclasses.replace(t, start=base + t.start) for n, t in found.items()}
    end, before = base, "the header"
    for name, info in sorted(placed.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise cursor.bad(f"tensor {name}: offset={info.start - base}", f"lies inside {before}")
        end, before = info.start + info.size, f"tensor {name}"
        if end > cursor.size:
            raise cursor.bad(f"tensor {name}: end={end}", f"is beyond the file's {cursor.size} bytes")
    return placed


class _Cursor:
    """Reads little-endian values one after another, never past the end of the file."""

    def __init__(self, path: str, view: memoryview):
        self.path, self.view, self.at, self.size = path, view, 0, len(view)

    def bad(self, field: str, complaint: str) -> InputError:
        """The error for a damaged field."""
        return InputError(f"{self.path}: {field} {complaint}: {DAMAGED}")

    def take(self, length: int, field: str) -> memoryview:
        """The next bytes, as a view."""
        if length > self.size - self.at:
            raise self.bad(f"{field}: length={length}", f"is more than the {self.size - self.at} bytes left")
        self.at += length
        return self.view[self.at - length : self.at]

    def number(self, code: str, field: str) -> Any:
        """The next number, by its struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), field))[0]

    def count(self, field: str, least: int) -> int:
        """A count of things that take at least `least` bytes each."""
        count = self.number("Q", field)
        if count * least > self.size - self.at:
            raise self.bad(f"{field}={count}", f"cannot fit into the {self.size - self.at} bytes left")
        return count

    def string(self, field: str) -> str:
        """The next string: its length in bytes, then UTF-8."""
        raw = self.take(self.number("Q", field), field)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{field}={bytes(raw[:40])!r}", "is not UTF-8") from None

    def value(self, kind: int, field: str) -> Any:
        """The next metadata value."""
        if kind == STRING:
            return self.string(field)
        if kind in SCALARS:
            return self.number(SCALARS[kind], field)
        if kind != ARRAY:
            raise self.bad(f"{field}: value type {kind}", "is unknown")
        kind = self.number("I", field)
        if kind == STRING:
            return [self.string(field) for _ in range(self.count(f"{field}: length", 8))]
        if kind not in SCALARS:
            raise self.bad(f"{field}: array of value type {kind}", "is unknown or nested")
        code = SCALARS[kind]
        length = self.count(f"{field}: length", struct.calcsize("<" + code))
        return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize("<" + code), field)))

    def tensor_info(self, name: str, alignment: int) -> TensorInfo:
        """The next tensor's entry; `start` still counts from the first tensor."""
        field = f"tensor {name}"
        dimensions = self.number("I", field)
        if not 1 <= dimensions <= 4:
            raise self.bad(f"{field}: n_dimensions={dimensions}", "is not 1 to 4")
        shape = tuple(self.number("Q", field) for _ in range(dimensions))[::-1]
        kind, start = self.number("I", field), self.number("Q", field)
        if kind not in TENSOR_TYPES:
            known = ", ".join(t.name for t in TENSOR_TYPES.values())
            raise InputError(f"{self.path}: {field}: tensor type {kind} is not one of {known}: requantise it")
        values = TENSOR_TYPES[kind].values
        if min(shape) < 1 or shape[-1] % values:
            raise self.bad(f"{field}: shape {list(shape)}", f"is empty or has rows that blocks of {values} do not fill")
        if start % alignment:
            raise self.bad(f"{field}: offset={start}", f"is not a multiple of general.alignment={alignment}")
        return TensorInfo(shape, kind, start, math.prod(shape) // values * TENSOR_TYPES[kind].bytes)


def _halves(blocks: Blocks, first: int) -> Values:
    """The float16 at byte `first` of each block, as a float32 column."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2").astype(np.float32)


def _nibbles(blocks: Blocks, first: int) -> UInt8[np.ndarray, "blocks 32"]:
    """32 four-bit numbers of each block: low halves of the 16 bytes, then high halves."""
    packed = blocks[:, first:]
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _f32(blocks: Blocks) -> Values:
    return blocks.view("<f4")


def _f16(blocks: Blocks) -> Values:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Blocks) -> Values:
    return blocks.view(ml_dtypes.bfloat16).astype(np.float32)


def _q4_0(blocks: Blocks) -> Values:
    return _halves(blocks, 0) * (_nibbles(blocks, 2).astype(np.float32) - 8)


def _q4_1(blocks: Blocks) -> Values:
    return _halves(blocks, 0) * _nibbles(blocks, 4).astype(np.float32) + _halves(blocks, 2)


def _q8_0(blocks: Blocks) -> Values:
    return _halves(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _q4_k(blocks: Blocks) -> Values:
    """Eight runs of 32: d scale q - dmin least, with scale and least of six bits each."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)  # the low six bits of four scales, of four leasts, then four of each
    high = packed[:, 0] >> 6, packed[:, 1] >> 6
    scales = np.concatenate([packed[:, 0] & 63, packed[:, 2] & 15 | high[0] << 4], axis=1)
    least = np.concatenate([packed[:, 1] & 63, packed[:, 2] >> 4 | high[1] << 4], axis=1)
    nibbles = blocks[:, 16:].reshape(-1, 4, 1, 32)
    numbers = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(-1, 8, 32).astype(np.float32)
    scales = (_halves(blocks, 0) * scales.astype(np.float32))[..., None]
    least = (_halves(blocks, 2) * least.astype(np.float32))[..., None]
    return (scales * numbers - least).reshape(-1, SUPER_BLOCK)


def _q6_k(blocks: Blocks) -> Values:
    """Sixteen runs of 16: d scale (q - 32), the numbers' low four bits apart from their high two."""
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    numbers = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return ((_halves(blocks, 208) * scales)[..., None] * numbers).reshape(-1, SUPER_BLOCK)


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _f16),
    2: TensorType("Q4_0", BLOCK, 18, _q4_0),
    3: TensorType("Q4_1", BLOCK, 20, _q4_1),
    8: TensorType("Q8_0", BLOCK, 34, _q8_0),
    12: TensorType("Q4_K", SUPER_BLOCK, 144, _q4_k),
    14: TensorType("Q6_K", SUPER_BLOCK, 210, _q6_k),
    30: TensorType("BF16", 1, 2, _bf16),
}

NAMES = {
    "embed/embedding": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
    "attention_norm/scale": "blk.{layer}.attn_norm.weight",
    "attention/query/kernel": "blk.{layer}.attn_q.weight",
    "attention/key/kernel": "blk.{layer}.attn_k.weight",
    "attention/value/kernel": "blk.{layer}.attn_v.weight",
    "attention/out/kernel": "blk.{layer}.attn_output.weight",
    "attention/query/bias": "blk.{layer}.attn_q.bias",
    "attention/key/bias": "blk.{layer}.attn_k.bias",
    "attention/value/bias": "blk.{layer}.attn_v.bias",
    "attention/query_norm/scale": "blk.{layer}.attn_q_norm.weight",
    "attention/key_norm/scale": "blk.{layer}.attn_k_norm.weight",
    "mlp_norm/scale": "blk.{layer}.ffn_norm.weight",
    "mlp/gate/kernel": "blk.{layer}.ffn_gate.weight",
    "mlp/up/kernel": "blk.{layer}.ffn_up.weight",
    "mlp/down/kernel": "blk.{layer}.ffn_down.weight",
}

# general.architecture -> what the family has beside Llama's layers.
FAMILIES: dict[str, dict[str, bool]] = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
PAIRED = ("llama",)  # families whose files hold rotary pairs side by side

# Keys below the family's name that say nothing about the computation, and those that may only have one value.
IGNORED = {"context_length"}
FIXED = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}


def architecture_and_params(gguf: GGUF) -> tuple[Architecture, dict[str, Any]]:
    """Sizes and float32 parameter tree of a model of FAMILIES; raises InputError at anything it cannot compute."""
    architecture = _architecture(gguf)
    found = {name: info.shape for name, info in gguf.tensors.items()}
    weights.check_shapes(weights.tensor_shapes(architecture, NAMES), found, gguf.path)
    heads = {"attention/query/kernel": architecture.heads, "attention/key/kernel": architecture.kv_heads}
    heads = heads if architecture.family in PAIRED else {}

    def read(name: str, path: str) -> np.ndarray:
        tensor = gguf.tensor(name)
        return _unpermute(tensor, heads[path]) if path in heads else tensor

    return architecture, weights.assemble(architecture, NAMES, read, gguf.path)


def _unpermute(weight: Float[np.ndarray, "out in"], heads: int) -> Float[np.ndarray, "out in"]:
    """Rotary pairs side by side, as GGUF has them, to first and second half of each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _architecture(gguf: GGUF) -> Architecture:
    family = gguf.metadata.get("general.architecture")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"{gguf.path}: general.architecture={family!r} is not supported: use one of {known}")
    where = f"{gguf.path}: {family}."
    fields = {k.removeprefix(f"{family}."): v for k, v in gguf.metadata.items() if k.startswith(f"{family}.")}

    def positive(name: str, default: int | None = None) -> int:
        value = fields.pop(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}{name}={value!r} must be a positive number: {DAMAGED}")
        return value

    def real(name: str, default: float | None = None) -> float:
        value = fields.pop(name, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise InputError(f"{where}{name}={value!r} must be a positive real number: {DAMAGED}")
        return float(str(np.float32(value)))  # stored as float32: 9.99999974e-06 is meant as 1e-05

    layers, width, heads = positive("block_count"), positive("embedding_length"), positive("attention.head_count")
    if layers > len(gguf.tensors):  # before a list of so many layers is made
        raise InputError(f"{where}block_count={layers} exceeds {len(gguf.tensors)} tensors: {DAMAGED}")
    head_size = positive("attention.key_length", width // heads)
    sizes = dict(
        width=width,
        heads=heads,
        head_size=head_size,
        mlp_width=positive("feed_forward_length"),
        kv_heads=positive("attention.head_count_kv", heads),
        rope_theta=real("rope.freq_base", 10_000.0),
        norm_eps=real("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in gguf.tensors,
    )
    same = {"rope.dimension_count": head_size, "attention.value_length": head_size}
    embedding = gguf.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding else len(gguf.metadata.get("tokenizer.ggml.tokens", [])) or 1
    same["vocab_size"] = vocabulary
    for name, value in fields.items():
        wanted = same.get(name, FIXED.get(name))
        if name in IGNORED or (wanted is not None and value == wanted):
            continue
        fix = f"must be {wanted!r}" if wanted is not None else "is not known"
        raise InputError(f"{where}{name}={value!r} {fix}: this decoder would compute something else")
    made = llama(layers, vocabulary=vocabulary, **sizes)
    return _checked(dataclasses.replace(made, family=family, **FAMILIES[family]), where, gguf)


def _checked(a: Architecture, where: str, gguf: GGUF) -> Architecture:
    if a.heads % a.kv_heads:
        raise InputError(f"{where}attention.head_count={a.heads} must divide by head_count_kv={a.kv_heads}")
    if a.head_size % 2:
        raise InputError(f"{gguf.path}: head size {a.head_size} must be even (rotary): {DAMAGED}")
    return a
