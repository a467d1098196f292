"""Makes tests/models/parity: one tiny random checkpoint a family, written and computed by transformers.

    pip install "grpo-jax[hf]" torch
    python tests/models/make_parity.py [FAMILY ...]

Each folder holds config.json and model.safetensors as `save_pretrained` writes them (bfloat16), and expected.npz: what
transformers computes from these files in float32 with eager attention. Shapes are odd on purpose: head sizes that do
not divide the width, one key head, a vocabulary that is a multiple of nothing.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "parity"
LENGTHS, COLUMNS, VOCABULARY = (12, 9, 5), 12, 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 900.0}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {
        "head_dim": 6, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    }),
    "llama_linear": (transformers.LlamaConfig, {
        "head_dim": 6, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0},
    }),
    "mistral": (transformers.MistralConfig, {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False}),
    "smollm3": (transformers.SmolLM3Config, {
        "no_rope_layers": [1, 0], "tie_word_embeddings": True, "hidden_size": 24, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    }),
    "qwen2": (transformers.Qwen2Config, {
        "hidden_size": 24, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    }),
    "qwen3": (transformers.Qwen3Config, {
        "head_dim": 14, "num_attention_heads": 2, "tie_word_embeddings": True, "attention_bias": True,
    }),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {
        "head_dim": 6, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 11,
        "mlp_only_layers": [0], "norm_topk_prob": True,
    }),
    "gemma2": (transformers.Gemma2Config, {
        "head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4, "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 5.0,
    }),
    "gemma3": (transformers.Gemma3TextConfig, {
        "head_dim": 6, "query_pre_attn_scalar": 7, "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }),
    "phi3": (transformers.Phi3Config, {
        "hidden_size": 32, "sliding_window": 6, "num_key_value_heads": 2, "original_max_position_embeddings": 32,
        "rope_parameters": LONGROPE | {"short_factor": [1.0, 1.1, 1.2, 1.4], "long_factor": [1.0, 2.0, 3.0, 5.0]},
    }),
    "phi4_mini": (transformers.Phi3Config, {
        "hidden_size": 32, "tie_word_embeddings": True, "original_max_position_embeddings": 8,
        "rope_parameters": LONGROPE
        | {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 5.0]},
    }),
    "deepseek_v3": (transformers.DeepseekV3Config, {
        "num_key_value_heads": 4, "moe_intermediate_size": 9, "n_shared_experts": 2, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 10,
        "q_lora_rank": 7, "qk_rope_head_dim": 4, "qk_nope_head_dim": 5, "v_head_dim": 3, "num_mtp_layers": 0,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 3, "beta_slow": 1, "mscale": 0.7,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
        },
    }),
    "deepseek_v3_plain": (transformers.DeepseekV3Config, {
        "num_key_value_heads": 4, "moe_intermediate_size": 9, "n_shared_experts": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 10,
        "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 5, "v_head_dim": 7, "num_mtp_layers": 0,
        "rope_interleave": False, "norm_topk_prob": False, "num_hidden_layers": 1,
    }),
}  # fmt: skip


def fill(model: torch.nn.Module, random: np.random.Generator, norm: float) -> None:
    """Normal weights that bfloat16 holds exactly; norms near `norm`."""
    state = model.state_dict()
    for name in sorted(state):
        scale, mean = (0.1, norm) if "norm" in name else (0.2, 0.0) if "bias" in name else (0.3, 0.0)
        drawn = torch.tensor(random.normal(mean, scale, tuple(state[name].shape)), dtype=torch.bfloat16)
        state[name].copy_(drawn)
    model.tie_weights()


def inputs(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Ragged rows padded on either side, the padding filled with random ids, and weights of their losses."""
    real = np.arange(COLUMNS)[None] < np.array(LENGTHS)[:, None]
    rows = random.integers(0, VOCABULARY, real.shape)
    weights = random.normal(size=real.shape).astype(np.float32)
    padding = random.integers(0, VOCABULARY, real.shape)
    left = padding.copy()
    left_weights = np.zeros_like(weights)
    for b, length in enumerate(LENGTHS):
        left[b, COLUMNS - length :] = rows[b, :length]
        left_weights[b, COLUMNS - length :] = weights[b, :length]
    right = np.where(real, rows, padding)
    return {"left": left, "right": right, "left_weights": left_weights, "right_weights": np.where(real, weights, 0)}


def compute(model: torch.nn.Module, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits of both paddings, and the gradient of sum_t w_t log p(token t + 1) over the left-padded rows."""
    out = {}
    real = np.arange(COLUMNS)[None] < np.array(LENGTHS)[:, None]
    for side, mask in (("left", real[:, ::-1].copy()), ("right", real)):
        place = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        made = model(
            input_ids=torch.tensor(given[side]),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(place),
        ).logits
        out[f"{side}_logits"] = made.detach().numpy()
        if side == "left":
            logps = torch.log_softmax(made[:, :-1], dim=-1)
            chosen = logps.gather(-1, torch.tensor(given[side][:, 1:, None]))[..., 0]
            weights = torch.tensor(given["left_weights"][:, 1:] * mask[:, :-1])
            (chosen * weights).sum().backward()
    return out


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients under the names of the parameters in memory; experts that lie in one tensor are told apart."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy() if parameter.grad is not None else np.zeros(parameter.shape, np.float32)
        if name.endswith("mlp.experts.gate_up_proj"):
            for e, both in enumerate(gradient):
                for part, one in zip(("gate_proj", "up_proj"), np.split(both, 2), strict=True):
                    found[name.replace("gate_up_proj", f"{e}.{part}.weight")] = one
        elif name.endswith("mlp.experts.down_proj"):
            for e, one in enumerate(gradient):
                found[name.replace("down_proj", f"{e}.down_proj.weight")] = one
        else:
            found[name] = gradient
    return {f"gradient/{name}": gradient for name, gradient in found.items()}


def make(family: str) -> None:
    """Writes the folder of a family."""
    kind, changes = FAMILIES[family]
    seed = sorted(FAMILIES).index(family)
    random = np.random.default_rng(seed)
    config = kind(**(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        fill(model, random, 0.0 if family.startswith("gemma") else 1.0)
    folder = FOLDER / family
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="16KB" if "moe" in family else "50GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    given = inputs(random)
    np.savez_compressed(folder / "expected.npz", **given, **compute(again, given), **gradients(again))
    print(family, sum(p.numel() for p in again.parameters()), "parameters", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        make(name)
