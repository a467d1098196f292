r"""GSM8K with any Llama folder or GGUF file, in R1-Zero's manner with a chat template.

    grpo-jax train --config gsm8k --config.model.path=FOLDER
    grpo-jax train --config gsm8k --config.data.source=jsonl --config.data.path=train.jsonl \
        --config.data.eval_path=test.jsonl

Rows come from tensorflow-datasets (`gsm8k`, prepared once: the error says how), a JSONL file, or a
Hugging Face dataset folder (data.source=hf). The answer is the number after '####'. Memory and time
depend on the model; SmolLM2-135M solves almost none of these, so take a stronger one.
"""

from grpo_jax.config import default_config


def get_config():
    """16 prompts x 8 completions of up to 512 tokens."""
    c = default_config()
    c.model.path = "smollm2-135m"
    c.text.template = "chat"
    c.text.system_prompt = (
        "Think step by step inside <think></think>, then give the final number alone inside <answer></answer>."
    )
    c.data.source = "tfds"
    c.data.path = "gsm8k"
    c.data.answer_marker = "####"
    c.data.max_prompt_length = 320
    c.data.prompts_per_step = 16
    c.sampler.group_size = 8
    c.sampler.max_new_tokens = 512
    c.rewards.names = ("answer", "format")
    c.rewards.weights = (1.0, 0.2)
    c.objective.micro_batch_size = 8
    c.objective.beta = 0.001
    c.model.logits_chunk = 1024
    c.model.remat = "full"
    c.optim.lr = 1e-6
    c.optim.warmup_steps = 5
    c.train.steps = 500
    c.eval.final_problems = 200
    c.eval.samples = 1
    c.eval.majority = 0
    return c
