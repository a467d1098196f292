r"""CISPO, the objective of MiniMax-M1 (arXiv 2506.13585, section 3.1; optimizer from section 3.2).

    grpo-jax train --config presets/cispo --config.model.path=FOLDER \
        --config.data.source=jsonl --config.data.path=train.jsonl --config.data.eval_path=test.jsonl

The paper compares it with DAPO on DAPO's data and Qwen2.5-32B; sizes that it does not state are those of presets/dapo.
"""

from grpo_jax.config import default_config


def get_config():
    """512 prompts x 16 completions, clipped weights instead of clipped tokens, 16 updates a rollout, no KL."""
    c = default_config()
    c.text.template = "r1_zero"  # not stated
    c.data.prompts_per_step = 512  # not stated
    c.data.pool_factor = 3  # the dynamic sampling of DAPO
    c.data.max_prompt_length = 2048  # not stated
    c.sampler.group_size = 16  # not stated
    c.sampler.max_new_tokens = 20_480  # not stated
    c.sampler.temperature = 1.0
    c.rewards.names = ("answer", "overlong")  # the length penalty of DAPO
    c.rewards.weights = (2.0, 1.0)  # as presets/dapo
    c.rewards.overlong_cache = 4096
    c.objective.loss_type = "cispo"  # eq. 4, mean over tokens
    c.objective.cispo_max_ratio = 5.0  # the upper bound is tuned, its value not stated; 5 in arXiv 2510.13786
    c.objective.beta = 0.0  # no KL term
    c.objective.scale_rewards = "group"
    c.objective.advantage_epsilon = 0.0  # none in the formula
    c.objective.num_iterations = 1
    c.objective.minibatches = 16  # 16 rounds of off-policy updates a batch
    c.train.share_prefix = False  # memory alone: one completion a device in a gradient pass
    c.model.logits_chunk = 1024
    c.model.remat = "full"
    c.optim.lr = 1e-6  # not stated
    c.optim.b1 = 0.9  # section 3.2: gradients span 1e-18 to 1e-5
    c.optim.b2 = 0.95
    c.optim.eps = 1e-15
    c.train.steps = 500  # not stated
    return c
