r"""The step whose size docs/scaling.md tells, for any model by name and any machine.

    grpo-jax plan --config scale --model Qwen2.5-1.5B --devices v5e:8 --config.mesh.fsdp=8 --config.mesh.data=1
    grpo-jax compile --config scale --model Qwen2.5-1.5B --topology v5e:8 --config.mesh.fsdp=8 --config.mesh.data=1

Both print memory, FLOPs and roofline time; neither needs the machine. To train with it, name a model and data:

    grpo-jax train --config scale --config.model.path=FOLDER --config.data.source=jsonl --config.data.path=train.jsonl \
        --config.data.eval_path=test.jsonl
"""

from grpo_jax.config import default_config


def get_config():
    """64 prompts of 256 tokens x 8 completions of 512, bfloat16 with float32 masters, a reference."""
    c = default_config()
    c.data.max_prompt_length = 256
    c.data.prompts_per_step = 64
    c.sampler.group_size = 8
    c.sampler.max_new_tokens = 512
    c.sampler.cache_dtype = "bfloat16"
    c.model.compute_dtype = "bfloat16"
    c.model.matmul_precision = "default"
    c.model.remat = "full"
    c.model.logits_chunk = 1024
    c.objective.beta = 0.001
    c.rewards.names = ("answer", "format")
    c.train.share_prefix = False  # one completion a device in a gradient pass: the least memory
    c.objective.micro_batch_size = 0
    c.mesh.sampling = "tensor"
    c.optim.lr = 1e-6
    return c
