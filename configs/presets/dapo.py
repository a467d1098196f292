r"""DAPO (arXiv 2503.14476, section 4.1; its equations in section 3).

    grpo-jax train --config presets/dapo --config.model.path=FOLDER \
        --config.data.source=jsonl --config.data.path=train.jsonl --config.data.eval_path=test.jsonl

The paper trains Qwen2.5-32B to 50 on AIME 2024.
"""

from grpo_jax.config import default_config


def get_config():
    """512 prompts x 16 completions of up to 20,480 tokens, 16 updates a rollout, no KL."""
    c = default_config()
    c.text.template = "r1_zero"  # the paper's asks for a last line with the answer
    c.data.prompts_per_step = 512  # "the prompt batch size is 512"
    c.data.pool_factor = 3  # dynamic sampling, section 3.2; the paper samples on without a bound, this is one
    c.data.max_prompt_length = 2048  # not stated
    c.sampler.group_size = 16  # "we sample 16 responses for each prompt"
    c.sampler.max_new_tokens = 20_480  # 16,384 and 4,096 of soft punishment
    c.sampler.temperature = 1.0
    c.rewards.names = ("answer", "overlong")
    c.rewards.weights = (2.0, 1.0)  # eq. 7 has 1 and -1; a group's mean takes the shift off
    c.rewards.overlong_cache = 4096  # eq. 13, soft overlong punishment
    c.objective.loss_type = "dapo"  # eq. 8, mean over tokens
    c.objective.epsilon = 0.2  # clip-higher
    c.objective.epsilon_high = 0.28
    c.objective.beta = 0.0  # section 2.3
    c.objective.scale_rewards = "group"  # eq. 9
    c.objective.advantage_epsilon = 0.0  # none in the formula
    c.objective.mask_truncated = True  # overlong filtering, section 3.4
    c.objective.num_iterations = 1
    c.objective.minibatches = 16  # "16 gradient updates for each rollout step"
    c.train.share_prefix = False  # memory alone: one completion a device in a gradient pass
    c.model.logits_chunk = 1024
    c.model.remat = "full"
    c.optim.name = "adamw"
    c.optim.lr = 1e-6  # constant
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 320  # "linear warm-up over 20 rollout steps", of 16 updates each
    c.eval.temperature = 1.0
    c.eval.top_p = 0.7
    c.eval.samples = 32  # avg@32
    c.train.steps = 500  # not stated
    return c
