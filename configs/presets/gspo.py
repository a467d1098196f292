r"""GSPO (arXiv 2507.18071, section 5.1).

    grpo-jax train --config presets/gspo --config.model.path=FOLDER \
        --config.data.source=jsonl --config.data.path=train.jsonl --config.data.eval_path=test.jsonl

The paper trains a cold-started Qwen3-30B-A3B. It states the ratio, the bounds and the minibatches; sizes and learning
rate here are those of presets/dapo, which users of the loss commonly keep.
"""

from grpo_jax.config import default_config


def get_config():
    """512 prompts x 16 completions, a ratio for each sequence, 4 updates a rollout."""
    c = default_config()
    c.data.prompts_per_step = 512  # not stated
    c.data.max_prompt_length = 2048  # not stated
    c.sampler.group_size = 16  # not stated
    c.sampler.max_new_tokens = 20_480  # not stated
    c.sampler.temperature = 1.0
    c.rewards.names = ("answer",)
    c.rewards.weights = (1.0,)
    c.objective.loss_type = "grpo"  # eq. 5: mean over the sequences
    c.objective.importance_sampling_level = "sequence"  # eq. 7: (pi / pi_old)^(1 / length)
    c.objective.epsilon = 3e-4  # section 5.1
    c.objective.epsilon_high = 4e-4
    c.objective.beta = 0.0  # the equations leave the KL out
    c.objective.scale_rewards = "group"  # eq. 6
    c.objective.advantage_epsilon = 0.0  # none in the formula
    c.objective.num_iterations = 1
    c.objective.minibatches = 4  # "each batch of rollout data is partitioned into four minibatches"
    c.train.share_prefix = False  # memory alone: one completion a device in a gradient pass
    c.model.logits_chunk = 1024
    c.model.remat = "full"
    c.optim.lr = 1e-6  # not stated
    c.train.steps = 500  # not stated
    return c
