"""The embedded default made so small that a whole run takes seconds once it is compiled; it learns nothing.

Groups do differ in reward, so that each step changes the parameters.
"""

from grpo_jax.config import default_config


def get_config():
    c = default_config()
    c.base.layers, c.base.width, c.base.heads, c.base.kv_heads, c.base.mlp_width = 1, 16, 2, 1, 32
    c.base.vocabulary, c.base.worked_sums, c.base.right_share = 32, 200, 0.0
    c.base.sft.steps, c.base.sft.batch_size, c.base.sft.max_length, c.base.sft.lr = 20, 16, 32, 3e-2
    c.data.digits, c.data.max_prompt_length, c.data.prompts_per_step = 1, 4, 2
    c.sampler.group_size, c.sampler.max_new_tokens = 8, 6
    c.rewards.names, c.rewards.weights = ("answer_format",), (0.5,)  # the verifier that compiles fastest
    c.objective.beta, c.objective.reference_every = 0.04, 4
    c.optim.lr = 1e-2
    c.train.steps = 6
    c.eval.every, c.eval.problems, c.eval.samples, c.eval.final_problems, c.eval.majority = 3, 4, 2, 4, 2
    c.checkpoint.every = 1
    c.log.tensorboard, c.log.samples_every, c.log.samples = False, 1, 2
    return c
