r"""Dr. GRPO (arXiv 2503.20783; numbers from the training scripts of its repository, sail-sg/understand-r1-zero).

    grpo-jax train --config presets/dr_grpo --config.model.path=FOLDER \
        --config.data.source=jsonl --config.data.path=train.jsonl --config.data.eval_path=test.jsonl

The paper trains Qwen2.5-Math-7B to 43.3 on AIME 2024.
"""

from grpo_jax.config import default_config


def get_config():
    """128 prompts x 8 completions of up to 3,000 tokens, no deviation, no length in the divisor, no KL."""
    c = default_config()
    c.text.template = "r1_zero"  # "R1 template"; the Qwen-Math template is better for that model
    c.data.prompts_per_step = 128  # rollout_batch_size
    c.data.max_prompt_length = 1024  # prompt_max_length
    c.sampler.group_size = 8  # num_samples
    c.sampler.max_new_tokens = 3000  # generate_max_length, and the constant that the loss is divided by
    c.sampler.temperature = 1.0
    c.sampler.top_p = 1.0
    c.rewards.names = ("answer",)
    c.rewards.weights = (1.0,)
    c.objective.loss_type = "dr_grpo"  # no 1 / |o|
    c.objective.scale_rewards = "none"  # no std
    c.objective.epsilon = 0.2
    c.objective.epsilon_high = 0.2
    c.objective.beta = 0.0
    c.objective.num_iterations = 1  # num_ppo_epochs
    c.objective.minibatches = 8  # train_batch_size 128, of 1,024 completions
    c.train.share_prefix = False  # memory alone: one completion a device in a gradient pass
    c.model.logits_chunk = 1024
    c.model.remat = "full"
    c.optim.lr = 1e-6
    c.optim.schedule = "constant"
    c.train.steps = 500  # not stated
    return c
