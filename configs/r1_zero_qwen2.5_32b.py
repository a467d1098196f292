r"""DeepSeek-R1-Zero-Qwen-32B (arXiv 2501.12948): R1-Zero's fields on Qwen2.5-32B but for the lr.

    grpo-jax train --config r1_zero_qwen2.5_32b --config.data.path=train.jsonl --config.data.eval_path=test.jsonl

The paper's "otherwise alike" leaves lengths and batch to R1-Zero's. Result there: AIME 2024 47.0, against 72.6 for the
same model distilled. `grpo-jax plan --config r1_zero_qwen2.5_32b --model Qwen2.5-32B --devices v5p:4x4x8` tells what
of a machine it needs; `--config.sampler.max_new_tokens=8192` asks for much less.
"""

from grpo_jax.config import config_file, read_config_file


def get_config():
    """R1-Zero's fields, learning rate 2e-6."""
    c = read_config_file(config_file("presets/r1_zero"))
    c.model.path = "Qwen/Qwen2.5-32B"
    c.model.compute_dtype = "bfloat16"
    c.model.matmul_precision = "default"
    c.sampler.cache_dtype = "bfloat16"
    c.data.source = "jsonl"
    c.data.path = "train.jsonl"
    c.data.eval_path = "test.jsonl"
    c.optim.lr = 2e-6
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.sampling = "tensor"
    return c
