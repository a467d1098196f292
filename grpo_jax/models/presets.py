"""Published architectures by name, and what they cost: parameters, bytes, FLOPs a token, by formula.

A preset holds the fields of the model's own config.json (huggingface.co/<source>/blob/main/config.json) that decide
its sizes. Nothing is loaded and nothing compiled.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from grpo_jax.errors import InputError

MASTERS = 16  # bytes a trained parameter: float32 master, gradient and Adam's two moments


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model: where its config.json stands, and the fields of it that decide sizes."""

    source: str
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of a model.

    Attributes:
      total: all of them; a tied output matrix counts once.
      active: those that one token meets: of routed experts the chosen ones.
      embedding: of the input table.
      looked_up: of an input table that is not the output matrix too: it costs no products.
      adapted: inputs plus outputs of every linear layer, summed: adapters of rank r have r times as many.
      attention: L * H * (E of keys + E of values): a token costs twice that in FLOPs for each token it sees.
      cached: numbers that the cache holds for a token.
    """

    total: int
    active: int
    embedding: int
    looked_up: int
    adapted: int
    attention: int
    cached: int


def preset(name: str) -> Preset:
    """The preset of that name, upper or lower case; raises InputError naming the nearest."""
    by_lower = {key.lower(): key for key in PRESETS}
    by_lower |= {found.source.lower(): key for key, found in PRESETS.items()}
    if name.lower() in by_lower:
        return PRESETS[by_lower[name.lower()]]
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f"; did you mean {by_lower[near[0]]}?" if near else ""
    raise InputError(f"--model {name}: no such preset{hint} There are: {', '.join(PRESETS)}")


def count(fields: Mapping[str, Any]) -> Count:
    """Parameters by the fields of a config.json."""
    f = fields
    width, layers, vocabulary = f["hidden_size"], f["num_hidden_layers"], f["vocab_size"]
    attention, attended, cached = _attention(f)
    attention_biases = _biases(f)
    dense = [(width, f["intermediate_size"])] * 2 + [(f["intermediate_size"], width)]
    experts = f.get("num_experts") or f.get("n_routed_experts") or 0
    first_dense = f.get("first_k_dense_replace", 0) if experts else layers
    norms = width * (4 if f["model_type"] in ("gemma2", "gemma3_text") else 2) + _inner_norms(f)
    head = 0 if f.get("tie_word_embeddings", False) else vocabulary * width
    every_layer = _size(attention) + attention_biases + norms
    total = vocabulary * width + width + head + layers * every_layer + first_dense * _size(dense)
    active, adapted = total, layers * _sides(attention) + first_dense * _sides(dense)
    if experts:
        inner, chosen = f["moe_intermediate_size"], f["num_experts_per_tok"]
        expert = 3 * width * inner
        shared = [(width, inner * f.get("n_shared_experts", 0))] * 3 if f.get("n_shared_experts") else []
        router = width * experts + (experts if f.get("topk_method") == "noaux_tc" else 0)
        sparse = layers - first_dense
        total += sparse * (experts * expert + _size(shared) + router)
        active += sparse * (chosen * expert + _size(shared) + router)
        adapted += sparse * _sides(shared)
    table = vocabulary * width
    return Count(total, active, table, table if head else 0, adapted, layers * attended, layers * cached)


def forward_flops(counted: Count, context: int) -> float:
    """FLOPs of one token that sees `context` tokens: 2 for each weight it meets, 2 for each product of attention."""
    return 2.0 * (counted.active - counted.looked_up) + 2.0 * counted.attention * context


def describe(name: str, context: int = 1024, rank: int = 16) -> list[str]:
    """What `grpo-jax plan --model` prints: parameters, bytes by dtype and use, FLOPs a token."""
    found = preset(name)
    c, gib = count(found.fields), 2.0**30
    adapters = rank * c.adapted

    def size(number: float) -> str:
        return f"{number / gib:,.2f} GiB"

    active = "" if c.active == c.total else f", of which a token meets {c.active:,}"
    held = {"float32": 4 * c.total, "bfloat16": 2 * c.total, "int8": c.total + c.embedding}  # the table in bfloat16
    weights = ", ".join(f"{dtype} {size(number)}" for dtype, number in held.items())
    lora = ", ".join(f"{dtype} base {size(held[dtype] + adapters * MASTERS)}" for dtype in ("bfloat16", "int8"))
    cache = f"float32 {c.cached * 4 / 1024:,.1f} KiB, bfloat16 {c.cached * 2 / 1024:,.1f} KiB"
    forward = forward_flops(c, context)
    return [
        f"{found.source}: {c.total:,} parameters{active}",
        f"weights: {weights}",
        f"training all of it (float32 masters, gradient, two Adam moments): {size(c.total * MASTERS)}",
        f"training adapters of rank {rank} ({adapters:,} parameters): {lora}",
        f"cache, for each token: {cache}",
        f"FLOPs a token that sees {context:,}: {forward / 1e9:,.2f}e9 forward, {3 * forward / 1e9:,.2f}e9 and backward",
        "without activations, logits and what the program needs besides",
    ]


def _attention(f: Mapping[str, Any]) -> tuple[list[tuple[int, int]], int, int]:
    """(matrices of one layer, products of a query with one token, cached numbers a token)."""
    width, heads = f["hidden_size"], f["num_attention_heads"]
    if "kv_lora_rank" not in f:
        kv_heads = f.get("num_key_value_heads", heads)
        size = f.get("head_dim") or width // heads
        matrices = [(width, heads * size), (width, kv_heads * size), (width, kv_heads * size), (heads * size, width)]
        return matrices, 2 * heads * size, 2 * kv_heads * size
    plain, rotary, value = f["qk_nope_head_dim"], f["qk_rope_head_dim"], f["v_head_dim"]
    rank, query_rank = f["kv_lora_rank"], f["q_lora_rank"]
    matrices = [
        (width, query_rank),
        (query_rank, heads * (plain + rotary)),
        (width, rank + rotary),
        (rank, heads * plain),
        (rank, heads * value),
        (heads * value, width),
    ]
    return matrices, heads * (plain + rotary + value), rank + rotary


def _biases(f: Mapping[str, Any]) -> int:
    """Of query, key and value, which Qwen2 has."""
    matrices, _, _ = _attention(f)
    return sum(outputs for _, outputs in matrices[:3]) if f["model_type"] == "qwen2" else 0


def _inner_norms(f: Mapping[str, Any]) -> int:
    """Norms inside the attention: of query and key heads, or of the latents."""
    if "kv_lora_rank" in f:
        return f["kv_lora_rank"] + f["q_lora_rank"]
    return 2 * f["head_dim"] if f["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text") else 0


def _size(matrices: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in matrices)


def _sides(matrices: list[tuple[int, int]]) -> int:
    return sum(inputs + outputs for inputs, outputs in matrices)


def _dense(model_type: str, vocabulary: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any):
    """The fields that every family has."""
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        **more,
    }


TIED: dict[str, Any] = {"tie_word_embeddings": True}
GEMMA: dict[str, Any] = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", **TIED}
DEEPSEEK_V3 = _dense(
    "deepseek_v3",
    129280,
    7168,
    61,
    128,
    128,
    18432,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    topk_method="noaux_tc",
)
QWEN3_30B = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}

PRESETS: dict[str, Preset] = {
    "SmolLM2-135M": Preset("HuggingFaceTB/SmolLM2-135M-Instruct", _dense("llama", 49152, 576, 30, 9, 3, 1536, **TIED)),
    "SmolLM2-360M": Preset("HuggingFaceTB/SmolLM2-360M-Instruct", _dense("llama", 49152, 960, 32, 15, 5, 2560, **TIED)),
    "SmolLM2-1.7B": Preset(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", _dense("llama", 49152, 2048, 24, 32, 32, 8192, **TIED)
    ),
    "SmolLM3-3B": Preset("HuggingFaceTB/SmolLM3-3B", _dense("smollm3", 128256, 2048, 36, 16, 4, 11008, **TIED)),
    "Llama-2-7B": Preset("meta-llama/Llama-2-7b-hf", _dense("llama", 32000, 4096, 32, 32, 32, 11008)),
    "Llama-3.2-1B": Preset(
        "meta-llama/Llama-3.2-1B-Instruct", _dense("llama", 128256, 2048, 16, 32, 8, 8192, head_dim=64, **TIED)
    ),
    "Llama-3.2-3B": Preset(
        "meta-llama/Llama-3.2-3B-Instruct", _dense("llama", 128256, 3072, 28, 24, 8, 8192, head_dim=128, **TIED)
    ),
    "Llama-3-8B": Preset("meta-llama/Llama-3.1-8B-Instruct", _dense("llama", 128256, 4096, 32, 32, 8, 14336)),
    "Llama-3-70B": Preset("meta-llama/Llama-3.1-70B-Instruct", _dense("llama", 128256, 8192, 80, 64, 8, 28672)),
    "Mistral-7B": Preset("mistralai/Mistral-7B-Instruct-v0.3", _dense("mistral", 32768, 4096, 32, 32, 8, 14336)),
    "Qwen2.5-0.5B": Preset("Qwen/Qwen2.5-0.5B-Instruct", _dense("qwen2", 151936, 896, 24, 14, 2, 4864, **TIED)),
    "Qwen2.5-1.5B": Preset("Qwen/Qwen2.5-1.5B-Instruct", _dense("qwen2", 151936, 1536, 28, 12, 2, 8960, **TIED)),
    "Qwen2.5-3B": Preset("Qwen/Qwen2.5-3B-Instruct", _dense("qwen2", 151936, 2048, 36, 16, 2, 11008, **TIED)),
    "Qwen2.5-7B": Preset("Qwen/Qwen2.5-7B-Instruct", _dense("qwen2", 152064, 3584, 28, 28, 4, 18944)),
    "Qwen2.5-14B": Preset("Qwen/Qwen2.5-14B-Instruct", _dense("qwen2", 152064, 5120, 48, 40, 8, 13824)),
    "Qwen2.5-32B": Preset("Qwen/Qwen2.5-32B-Instruct", _dense("qwen2", 152064, 5120, 64, 40, 8, 27648)),
    "Qwen2.5-72B": Preset("Qwen/Qwen2.5-72B-Instruct", _dense("qwen2", 152064, 8192, 80, 64, 8, 29568)),
    "Qwen3-0.6B": Preset("Qwen/Qwen3-0.6B", _dense("qwen3", 151936, 1024, 28, 16, 8, 3072, head_dim=128, **TIED)),
    "Qwen3-8B": Preset("Qwen/Qwen3-8B", _dense("qwen3", 151936, 4096, 36, 32, 8, 12288, head_dim=128)),
    "Qwen3-30B-A3B": Preset("Qwen/Qwen3-30B-A3B", _dense("qwen3_moe", 151936, 2048, 48, 32, 4, 6144, **QWEN3_30B)),
    "Gemma-2-2B": Preset("google/gemma-2-2b-it", _dense("gemma2", 256000, 2304, 26, 8, 4, 9216, **GEMMA)),
    "Gemma-2-9B": Preset("google/gemma-2-9b-it", _dense("gemma2", 256000, 3584, 42, 16, 8, 14336, **GEMMA)),
    "Gemma-3-1B": Preset("google/gemma-3-1b-it", _dense("gemma3_text", 262144, 1152, 26, 4, 1, 6912, **GEMMA)),
    "Phi-3-mini": Preset("microsoft/Phi-3-mini-4k-instruct", _dense("phi3", 32064, 3072, 32, 32, 32, 8192)),
    "Phi-4": Preset("microsoft/phi-4", _dense("phi3", 100352, 5120, 40, 40, 10, 17920)),
    "DeepSeek-R1-Distill-Qwen-1.5B": Preset(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", _dense("qwen2", 151936, 1536, 28, 12, 2, 8960)
    ),
    "DeepSeek-R1-Distill-Qwen-7B": Preset(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", _dense("qwen2", 152064, 3584, 28, 28, 4, 18944)
    ),
    "DeepSeek-R1-Distill-Llama-8B": Preset(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", _dense("llama", 128256, 4096, 32, 32, 8, 14336)
    ),
    "DeepSeek-V3-671B": Preset("deepseek-ai/DeepSeek-V3", DEEPSEEK_V3),
    "DeepSeek-R1-671B": Preset("deepseek-ai/DeepSeek-R1", DEEPSEEK_V3),
}
