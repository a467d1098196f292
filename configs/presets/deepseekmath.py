r"""GRPO as DeepSeekMath ran it (arXiv 2402.03300, section 4.2).

    grpo-jax train --config presets/deepseekmath --config.model.path=FOLDER \
        --config.data.source=jsonl --config.data.path=train.jsonl --config.data.eval_path=test.jsonl

The paper's model has 7 billion parameters; its run took GSM8K from 82.9 to 88.2 and MATH from 46.8 to 51.7. Without a
model and data the embedded ones stand in, far too small for these sizes.
"""

from grpo_jax.config import default_config


def get_config():
    """16 prompts x 64 completions, one update a rollout, KL 0.04."""
    c = default_config()
    c.data.prompts_per_step = 16  # batch of 1,024, read as completions
    c.data.max_prompt_length = 1024  # not stated
    c.sampler.group_size = 64  # "we sample 64 outputs for each question"
    c.sampler.max_new_tokens = 1024  # "the max length is set to 1024"
    c.sampler.temperature = 1.0  # not stated
    c.rewards.names = ("answer",)  # the paper's is a reward model; any reward takes its place
    c.rewards.weights = (1.0,)
    c.objective.loss_type = "grpo"  # eq. 3: mean of each output, then of the outputs
    c.objective.epsilon = 0.2  # not stated
    c.objective.epsilon_high = 0.2
    c.objective.beta = 0.04  # "the KL coefficient is 0.04"
    c.objective.kl_estimator = "k3"  # eq. 4
    c.objective.scale_rewards = "group"  # section 4.1.2: (r - mean) / std
    c.objective.advantage_epsilon = 0.0  # none in the formula; its ddof is not stated
    c.objective.num_iterations = 1  # "a single update following each exploration stage"
    c.objective.minibatches = 1
    c.objective.outer_iterations = 1  # iterative GRPO (section 4.1.4): 2 or more, of train.steps in all
    c.train.share_prefix = False  # memory alone: one completion a device in a gradient pass
    c.model.logits_chunk = 1024
    c.model.remat = "full"
    c.optim.lr = 1e-6  # "the learning rate of the policy model is 1e-6"
    c.train.steps = 9_000  # not stated; one pass over the paper's 144K questions
    return c
