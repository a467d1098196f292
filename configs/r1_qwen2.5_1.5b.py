r"""The DeepSeek-R1 recipe on Qwen2.5-1.5B, distilled into Qwen2.5-0.5B: the stages of `r1_toy` with real data.

    grpo-jax pipeline --config r1_qwen2.5_1.5b --dry_run
    grpo-jax pipeline --config r1_qwen2.5_1.5b --workdir runs/r1_1.5b

It reads files in the folder `data`, made by its user:

- reasoning.jsonl, reasoning_eval.jsonl: columns 'question' and 'answer';
- general.jsonl, general_eval.jsonl: prompts without an answer, column 'question';
- chats.jsonl: writing, questions, translation, as `grpo-jax sft` reads them;
- helpful.jsonl (pairs), harmless.jsonl (points): as `grpo-jax reward-model train` reads them;
- math_500.jsonl: MATH-500's test.jsonl.

Numbers are the papers' (arXiv 2501.12948) where a line says so; lengths and batches are smaller.
"""

from grpo_jax.config import config_file, read_config_file

MODEL, STUDENT = "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-0.5B"
LENGTH = 4096  # the papers' 32,768 are for models that have learned to use them


def get_config():
    """R1-Zero's fields with shorter completions and fewer of them a step."""
    c = read_config_file(config_file("presets/r1_zero"))
    c.model.path = MODEL
    c.model.compute_dtype = "bfloat16"
    c.model.matmul_precision = "default"
    c.data.source = "jsonl"
    c.data.path = "data/reasoning.jsonl"
    c.data.eval_path = "data/reasoning_eval.jsonl"
    c.data.prompts_per_step = 32
    c.sampler.max_new_tokens = LENGTH
    c.sampler.cache_dtype = "bfloat16"
    c.rewards.names = ("math", "format")
    c.objective.minibatches = 1
    c.objective.reference_every = 400
    c.objective.micro_batch_size = 0
    c.train.steps = 1000
    c.eval.every = 50
    c.sft.batch_size = 128  # paper: stage 3
    c.sft.max_length = 8192
    c.reward_model.lr = 6e-6  # paper
    c.reward_model.batch_size = 128
    c.reward_model.max_length = 4096
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.sampling = "tensor"
    return c


def get_pipeline():
    """The papers' stages in order."""
    drawn = {"temperature": 1.0, "max_new_tokens": LENGTH, "dtype": "bfloat16", "template": "r1_zero"}
    kept = {"set": ["jsonl=data/reasoning.jsonl"], "against": ["math_500=data/math_500.jsonl"]}
    chat = {"text.template": "chat"}
    helpful = {"rewards.helpful.path": "{helpful}/model", "rewards.harmless.path": "{harmless}/model"}
    learned = {"sft.epochs": 2, "sft.lr": 5e-5, **chat}  # paper: cosine from 5e-5 to a tenth
    return {
        "title": "DeepSeek-R1's recipe on Qwen2.5-1.5B",
        "evaluation": {
            "set": ["math_500=data/math_500.jsonl"],
            "samples": 4,
            "max_new_tokens": 8192,
            "dtype": "bfloat16",
        },
        "stages": [
            {"name": "zero", "title": "R1-Zero", "command": "train", "model": "{zero}"},
            {
                "name": "chains",
                "title": "Cold start: chains of Zero",
                "command": "reject",
                "options": {
                    "model": "{zero}",
                    **{**kept, **drawn},
                    **{"problems": 5000, "samples": 4, "most": 1, "format": "think_answer"},
                    **{"summary": "model", "summary_model": "Qwen/Qwen2.5-1.5B-Instruct"},
                },
            },
            {
                "name": "cold_start",
                "title": "Cold start",
                "command": "sft",
                "fields": {"sft.path": "{chains}/chats.jsonl", **learned},
                "model": "{cold_start}/model",
            },
            {
                "name": "reasoning",
                "title": "Reasoning RL",
                "command": "train",
                "fields": {
                    "model.path": "{cold_start}/model",
                    **chat,
                    "rewards.names": ("math", "format", "language"),
                    "rewards.weights": (1.0, 1.0, 1.0),
                },
                "model": "{reasoning}",
            },
            {
                "name": "rejection",
                "title": "Rejection sampling",
                "command": "reject",
                "options": {"model": "{reasoning}", **{**kept, **drawn, "template": "chat"}, "samples": 8, "most": 4},
            },
            {
                "name": "mix",
                "title": "Reasoning and other chats, 3 to 1",
                "command": "mix",
                "options": {
                    "part": ["reasoning={rejection}/chats.jsonl", "general=data/chats.jsonl"],
                    "weight": ["reasoning=3", "general=1"],  # paper: 600k and 200k
                    "thoughts": ["general=simple"],  # paper: no chain of thought for simple queries
                },
            },
            {
                "name": "sft",
                "title": "SFT from the base",
                "command": "sft",
                "fields": {"sft.path": "{mix}/chats.jsonl", **learned},
                "model": "{sft}/model",
            },
            {
                "name": "helpful",
                "title": "Reward model: helpful, by pairs",
                "command": "reward-model train",
                "fields": {"model.path": "{sft}/model", "reward_model.path": "data/helpful.jsonl", **chat},
            },
            {
                "name": "harmless",
                "title": "Reward model: harmless, by points",
                "command": "reward-model train",
                "fields": {"model.path": "{sft}/model", "reward_model.path": "data/harmless.jsonl", **chat},
            },
            {
                "name": "all_scenarios",
                "title": "RL for all scenarios",
                "command": "train",
                "fields": {
                    "model.path": "{sft}/model",
                    **chat,
                    **{"data.path": "", "data.eval_path": ""},
                    "data.sets": (
                        {
                            "name": "reasoning",
                            "path": "data/reasoning.jsonl",
                            "eval_path": "data/reasoning_eval.jsonl",
                            "weight": 2.0,
                            "rewards": ("math", "format", "language"),
                        },
                        {
                            "name": "general",
                            "path": "data/general.jsonl",
                            "eval_path": "data/general_eval.jsonl",
                            "answer_column": "",
                            "rewards": ("format", "language", "helpful", "harmless"),
                            "late": True,
                        },
                    ),
                    "rewards.names": ("math", "format", "language", "helpful", "harmless"),
                    "rewards.weights": (1.0, 1.0, 1.0, 1.0, 1.0),
                    "rewards.late_names": ("helpful", "harmless"),
                    "rewards.late_from": 1300,
                    **helpful,
                    "train.steps": 1700,  # paper; general data and preference rewards in the last 400
                    "sampler.temperature": 0.7,  # paper
                },
                "model": "{all_scenarios}",
            },
            {
                "name": "distilled",
                "title": "Student, SFT",
                "command": "sft",
                "fields": {
                    "model.path": STUDENT,
                    "sft.path": "{mix}/chats.jsonl",
                    **learned,
                    "sft.lr": 1e-4,  # paper: for 1.5B, its smallest student
                    "sft.batch_size": 64,  # paper
                },
                "model": "{distilled}/model",
            },
            {
                "name": "taught",
                "title": "Student, on-policy distillation",
                "command": "train",
                "fields": {"model.path": "{distilled}/model", "distill.teacher": "{all_scenarios}", **chat},
                "model": "{taught}",
            },
            {
                "name": "student_rl",
                "title": "Student, RL alone",
                "command": "train",
                "fields": {"model.path": STUDENT},
                "model": "{student_rl}",
            },
        ],
    }
