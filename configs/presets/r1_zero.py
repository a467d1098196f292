r"""DeepSeek-R1-Zero (arXiv 2501.12948 v2 and the Nature version).

    grpo-jax train --config presets/r1_zero --config.model.path=FOLDER \
        --config.data.source=jsonl --config.data.path=train.jsonl --config.data.eval_path=test.jsonl

A step here is a rollout, which the paper cuts into 16 updates ("steps" there): its 400 and 10,400 steps are 25 and 650
here. From step 8,200 on the paper allows 65,536 tokens.
"""

from grpo_jax.config import default_config

# Reflective terms of the Nature version, Extended Data Fig. 1.
REFLECTIVE = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")


def get_config():
    """512 prompts x 16 completions of up to 32,768 tokens, 16 updates a rollout, KL 0.001."""
    c = default_config()
    c.text.template = "r1_zero"  # table 1 of v1, in this project's words
    c.data.prompts_per_step = 512  # 8,192 outputs a rollout; 32 questions an update
    c.data.max_prompt_length = 1024  # not stated
    c.sampler.group_size = 16  # "for each question, we sample 16 outputs"
    c.sampler.max_new_tokens = 32_768  # "with a maximum length of 32,768"
    c.sampler.temperature = 1.0
    c.rewards.names = ("answer", "format")  # rules alone
    c.rewards.weights = (1.0, 1.0)  # of equal weight
    c.objective.loss_type = "grpo"
    c.objective.epsilon = 10.0  # stated for the first RL stage of R1; for Zero not stated
    c.objective.epsilon_high = 10.0
    c.objective.beta = 0.001
    c.objective.kl_estimator = "k3"
    c.objective.scale_rewards = "group"
    c.objective.advantage_epsilon = 0.0  # none in the formula
    c.objective.num_iterations = 1  # "a single inner epoch"
    c.objective.minibatches = 16  # "split into 16 minibatches"
    c.objective.reference_every = 25  # "every 400 steps, we replace the reference model with the latest policy"
    c.train.share_prefix = False  # memory alone: one completion a device in a gradient pass
    c.model.logits_chunk = 1024
    c.model.remat = "full"
    c.optim.lr = 3e-6
    c.eval.reflective_words = REFLECTIVE
    c.train.steps = 650  # 10,400 updates, 1.6 epochs
    return c
