"""The embedded default: R1-Zero in miniature, on two-digit sums.

    grpo-jax train

Makes its own base model (a SentencePiece tokenizer and a decoder of a million parameters, learned in
about a minute from worked sums of mixed quality), then GRPO with accuracy and format rewards computed
inside the step. No download, no account.
"""

from grpo_jax.config import default_config


def get_config():
    """Two-digit sums, 16 prompts x 8 completions a step."""
    c = default_config()
    c.base.right_share = 0.36
    c.base.worked_sums = 12_000
    c.base.sft.steps = 600
    c.base.sft.batch_size = 32
    c.base.sft.max_length = 32
    c.data.source = "arithmetic"
    c.data.max_prompt_length = 6
    c.data.prompts_per_step = 16
    c.sampler.group_size = 8
    c.sampler.max_new_tokens = 26
    c.rewards.names = ("answer", "format")
    c.rewards.weights = (1.0, 0.2)
    c.objective.micro_batch_size = 32
    c.optim.lr = 3e-4
    c.optim.schedule = "cosine"
    c.optim.final_lr_fraction = 0.1
    c.mesh.cpu_devices = 0
    c.eval.final_problems = 128
    c.train.steps = 120
    return c
