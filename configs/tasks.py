"""Reasoning tasks in two languages, made in the run: what DeepSeek-R1-Zero does, in miniature.

    grpo-jax train --config tasks

Sums, countdown and comparisons in English and Russian. The run makes its own base (a SentencePiece tokenizer of both
scripts and a decoder of 0.7 million parameters, learned in a few minutes on two CPU cores from worked texts
of mixed quality, many of which mix the languages), then GRPO with accuracy and format rewards inside the step. Add
"language" to rewards.names for chains in the prompt's language. No download, no account.
"""

from grpo_jax.config import default_config


def get_config():
    """Three kinds of tasks in two languages, 16 prompts x 8 completions a step."""
    c = default_config()
    c.base.layers = 3
    c.base.width = 128
    c.base.heads = 4
    c.base.kv_heads = 2
    c.base.mlp_width = 384
    c.base.vocabulary = 768
    c.base.worked_sums = 24_000
    c.base.right_share = 0.6
    c.base.sft.steps = 1800
    c.base.sft.batch_size = 8
    c.base.sft.max_length = 80
    c.base.sft.lr = 2e-3
    c.data.source = "tasks"
    c.data.path = "sums,countdown,comparison:en,ru"
    c.data.max_prompt_length = 24
    c.data.prompts_per_step = 16
    c.sampler.group_size = 8
    c.sampler.max_new_tokens = 64
    c.rewards.names = ("answer", "format")
    c.rewards.weights = (1.0, 0.2)
    c.objective.micro_batch_size = 16
    c.optim.lr = 3e-4
    c.optim.schedule = "cosine"
    c.optim.final_lr_fraction = 0.1
    c.mesh.cpu_devices = 0
    c.eval.final_problems = 128
    c.eval.reflective_words = ("wait", "стой")
    c.train.steps = 120
    return c
