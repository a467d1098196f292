"""The embedded default: R1-Zero in miniature, on two-digit sums.

    grpo-jax train

Makes its own base model (a SentencePiece tokenizer and a decoder of a million parameters, learned in
about a minute from worked sums of mixed quality), then GRPO with accuracy and format rewards computed
inside the step. No download, no account.
"""

from grpo_jax.config import default_config


def get_config():
    """Two-digit sums, 32 prompts x 16 completions a step."""
    c = default_config()
    c.data.source = "arithmetic"
    c.data.max_prompt_length = 8
    c.data.prompts_per_step = 16
    c.sampler.group_size = 16
    c.sampler.max_new_tokens = 40
    c.rewards.names = ("answer", "format")
    c.rewards.weights = (1.0, 0.2)
    c.optim.lr = 3e-4
    c.train.steps = 80
    return c
