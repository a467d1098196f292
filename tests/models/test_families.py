"""config.json of each family as its hub has it: the architecture it says, the way back, and fields that are refused."""

import dataclasses

import pytest

from grpo_jax.errors import InputError
from grpo_jax.models.architecture import Experts, Latent, Stack, llama
from grpo_jax.models.families import FAMILIES, from_fields, to_fields
from grpo_jax.ops.rope import Rope

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
    "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
    "rope_type": "llama3",
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
V3_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
# What the released models' files hold beside the sizes, by family and model.
HUB = {
    "llama-2": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "hidden_act": "silu"},
    "llama-3.1, r1-distill-llama": {"model_type": "llama", "rope_scaling": LLAMA3, "mlp_bias": False},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False},
    "mistral-0.1": {"model_type": "mistral", "sliding_window": 1024},
    "mistral-0.3": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "smollm3": {
        "model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "layer_types": None,
        "use_sliding_window": False, "sliding_window": None, "attention_bias": False, "mlp_bias": False,
        "pretraining_tp": 2, "max_window_layers": None,
    },
    "qwen2.5": {
        "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28,
        "tie_word_embeddings": True, "hidden_act": "silu",
    },
    "qwen2.5, long": {"model_type": "qwen2", "rope_scaling": YARN, "use_sliding_window": False},
    "r1-distill-qwen": {"model_type": "qwen2", "use_mrope": False, "sliding_window": 4096, "max_window_layers": 21},
    "qwen3": {
        "model_type": "qwen3", "head_dim": 128, "attention_bias": False, "max_window_layers": 28,
        "use_sliding_window": False, "sliding_window": None, "rope_scaling": None, "tie_word_embeddings": True,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "head_dim": 128, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "max_window_layers": 48, "sliding_window": None,
        "use_sliding_window": False,
    },
    "gemma-2": {
        "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 16, "query_pre_attn_scalar": 144, "sliding_window": 128, "sliding_window_size": 128,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
        "attention_bias": False,
    },
    "gemma-3": {
        "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "rope_scaling": None,
        "query_pre_attn_scalar": 256, "sliding_window": 128, "sliding_window_pattern": 3, "attention_bias": False,
        "rope_local_base_freq": 10000, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
    },
    "phi-3-4k": {
        "model_type": "phi3", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "sliding_window": 2047, "rope_scaling": None,
        "original_max_position_embeddings": 4096, "attention_bias": False,
    },
    "phi-4-mini": {
        "model_type": "phi3", "partial_rotary_factor": 0.75, "full_attn_mod": 1, "interpolate_factor": 1,
        "lm_head_bias": False, "tie_word_embeddings": True, "original_max_position_embeddings": 1024,
        "sliding_window": 262144, "attention_bias": False,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0, 1.5], "long_factor": [1, 2, 4.0]},
    },
    "deepseek-v3, r1": {
        "model_type": "deepseek_v3", "num_key_value_heads": 4, "aux_loss_alpha": 0.001, "ep_size": 1, "seq_aux": True,
        "first_k_dense_replace": 3, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 6, "moe_intermediate_size": 16, "moe_layer_freq": 1, "n_group": 4,
        "topk_group": 2, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_scaling": V3_YARN,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "attention_bias": False,
    },
}  # fmt: skip


def read(name, **changes):
    return from_fields("config.json", COMMON | HUB[name] | changes)


@pytest.mark.parametrize("name", HUB)
def test_the_way_back_says_the_same(name):
    architecture = read(name)
    fields = to_fields(architecture)
    assert fields["model_type"] == HUB[name]["model_type"] == architecture.family
    assert from_fields("config.json", fields) == architecture


def test_every_family_is_here():
    assert {fields["model_type"] for fields in HUB.values()} == set(FAMILIES)


def test_llama_rope_and_head_size():
    sizes = {"vocabulary": 97, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "norm_eps": 1e-6}
    plain = llama(4, rope_theta=1e6, head_size=8, tied=False, context=4096, **sizes)
    assert read("llama-2") == plain
    assert read("llama-3.1, r1-distill-llama").ropes == (Rope(1e6, "llama3", 0, 8.0, 1024, 1.0, 4.0),)
    assert read("smollm2") == dataclasses.replace(plain, tied=True)
    assert read("mistral-0.3").head_size == 16


def test_windows_by_layer():
    assert read("mistral-0.1").stacks == (Stack((1024,) * 4),)
    assert read("mistral-0.3").stacks == read("qwen2.5").stacks == read("qwen3").stacks == (Stack((0,) * 4),)
    late = read("qwen2.5", use_sliding_window=True, max_window_layers=3, sliding_window=9)
    assert late.stacks == (Stack((0, 0, 0, 9)),)
    assert read("gemma-2").stacks == (Stack((128, 0, 128, 0)),)
    assert read("gemma-3").stacks == (Stack((128, 128, 0, 128), (1, 1, 0, 1)),)
    assert read("gemma-3", layer_types=["full_attention"] * 4).stacks == (Stack((0,) * 4, (0,) * 4),)
    assert read("phi-3-4k").stacks == (Stack((2047,) * 4),)


def test_rotary_embeddings_by_family():
    assert read("smollm3").ropes == (Rope(1e6), Rope(kind="none")) and read("smollm3").stacks[0].ropes == (0, 0, 0, 1)
    assert read("qwen2.5, long").ropes == (Rope(1e6, "yarn", 0, 4.0, 1024, 1.0, 32.0),)
    assert read("gemma-3").ropes == (Rope(1e6), Rope(1e4))
    scaled = read("gemma-3", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert scaled.ropes == (Rope(1e6, "linear", factor=8.0), Rope(1e4))
    mini = read("phi-4-mini").ropes[0]
    assert (mini.size, mini.short, mini.long, mini.factor) == (6, (1.0, 1.0, 1.5), (1.0, 2.0, 4.0), 4.0)
    assert mini.magnitude == pytest.approx((1 + 2 / 10) ** 0.5)  # sqrt(1 + log 4 / log 1024)
    v3 = read("deepseek-v3, r1")
    assert v3.ropes[0].magnitude == 1.0
    assert v3.score_scale == pytest.approx(12**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)


def test_switches_by_family():
    qwen2, qwen3, gemma = read("qwen2.5"), read("qwen3"), read("gemma-2")
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm, qwen3.head_size) == (False, False, True, 128)
    assert gemma.post_norms and gemma.norm_offset and gemma.tied and gemma.activation == "gelu_tanh"
    assert (gemma.attention_cap, gemma.logit_cap, gemma.score_scale) == (50.0, 30.0, 1 / 12)
    assert gemma.embedding_scale == 32**0.5 and read("gemma-3").qk_norm
    moe, v3 = read("qwen3-moe"), read("deepseek-v3, r1")
    assert moe.experts == Experts(8, 2, 24) and moe.stacks == (Stack((0,) * 4, experts=True),)
    mixed = read("qwen3-moe", mlp_only_layers=[0], decoder_sparse_step=2)
    assert [(stack.layers, stack.experts) for stack in mixed.stacks] == [(1, False), (1, True), (1, False), (1, True)]
    assert v3.stacks == (Stack((0,) * 3), Stack((0,), experts=True))
    assert v3.latent == Latent(12, 10, 8, 4, 6) and v3.head_size == 12
    assert v3.experts == Experts(8, 2, 16, 16, "sigmoid", True, 2.5, 4, 2)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("llama-2", "new_trick", 1), ("llama-2", "sliding_window", 64), ("qwen2.5", "use_mrope", True),
        ("qwen2.5", "rope_scaling", {"type": "mrope", "mrope_section": [1, 2]}), ("qwen3", "layer_types", ["full"] * 4),
        ("qwen2.5, long", "rope_scaling", {**YARN, "trick": 1}), ("gemma-2", "hidden_activation", "silu"),
        ("gemma-3", "use_bidirectional_attention", True), ("phi-4-mini", "lm_head_bias", True),
        ("phi-4-mini", "rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 3}),
        ("phi-3-4k", "resid_pdrop", 0.1), ("qwen3-moe", "num_experts_per_tok", 9), ("qwen3-moe", "num_experts", 10**9),
        ("deepseek-v3, r1", "scoring_func", "softmax"), ("deepseek-v3, r1", "n_group", 3),
        ("deepseek-v3, r1", "quantization_config", {"quant_method": "fp8"}), ("smollm3", "no_rope_layers", [1, 2]),
        ("llama-3.1, r1-distill-llama", "rope_scaling", {**LLAMA3, "high_freq_factor": 0.5}),
    ],
)  # fmt: skip
def test_fields_that_change_the_computation_are_refused(name, field, value):
    inner = {"rope_scaling": r"(rope_scaling|trick|short_factor|low_freq_factor)"}
    with pytest.raises(InputError, match=rf"^config\.json: {inner.get(field, field)}="):
        read(name, **{field: value})


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama-2", {"qk_norm": True}), ("qwen2.5", {"mlp_bias": True}), ("llama-2", {"attention_cap": 5.0}),
        ("mistral-0.1", {"stacks": (Stack((0, 8, 0, 8)),)}), ("qwen3", {"ropes": (Rope(1e6, size=64),) * 2}),
    ],
)  # fmt: skip
def test_what_a_family_cannot_say_is_seen(name, change):
    changed = dataclasses.replace(read(name), **change)
    assert from_fields("config.json", to_fields(changed)) != changed
