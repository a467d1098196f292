"""The whole DeepSeek-R1 recipe in miniature, on two CPU cores and without a download.

    grpo-jax pipeline --config r1_toy --workdir runs/r1_toy
    grpo-jax pipeline --config r1_toy --dry_run        # each stage as a command

Sums, comparisons and countdown in English and Russian, so that languages mix and the mixing can be measured; general
prompts with a preference that the reward models have to learn. Everything is made in the run, a function of the seed.
"""

from grpo_jax.config import config_file, read_config_file

REASONING = "sums,comparison,countdown:en,ru"
KINDS = ("sums", "comparison", "countdown", "general")


def get_config():
    """What all stages share: the tasks of `tasks`, with general prompts, and its base of 0.7 million parameters."""
    c = read_config_file(config_file("tasks"))
    c.data.path = "sums,comparison,countdown,general:en,ru"
    c.tasks.held_out = 48
    c.tasks.chats = 600
    c.tasks.good_share = 0.5  # as writers differ: with good chats alone nothing is left for the last stage to lift
    c.tasks.pairs = 2400
    c.tasks.points = 800
    c.eval.problems = 48
    c.eval.final_problems = 48
    c.eval.majority = 0
    c.sft.batch_size = 24
    c.sft.max_length = 96
    c.reward_model.steps = 400
    c.reward_model.max_length = 96
    c.checkpoint.every = 100
    c.train.steps = 100
    return c


def get_pipeline():
    """The stages of the papers, in order; each is evaluated on the same held-out prompts."""
    reinforced = {"data.path": REASONING}
    drawn = {"set": ["jsonl={tasks}/train.jsonl"], "samples": 4, "max_new_tokens": 64, "seed": "{config.seed}"}
    kept = {"format": "think_answer", "against": [f"jsonl={{tasks}}/eval_{kind}.jsonl" for kind in KINDS]}
    # The base knows no line breaks.
    summarised = {"summary": "answer", "chat_form": "<think>{{reasoning}}</think>{{summary}}"}
    learned = {"sft.epochs": 2, "sft.lr": 1e-3}
    distilled = {"sft.epochs": 3, "sft.lr": 1e-3}
    return {
        "title": "DeepSeek-R1 in miniature",
        "evaluation": {
            "set": [f"jsonl={{tasks}}/eval_{kind}.jsonl" for kind in KINDS],
            "samples": 8,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 64,
            "batch_size": 128,
            "seed": "{config.seed}",
        },
        "stages": [
            {"name": "tasks", "title": "Tasks", "command": "tasks"},
            {"name": "base", "title": "Base", "command": "base", "model": "{base}/model"},
            {
                "name": "zero",
                "title": "R1-Zero",
                "command": "train",
                "fields": {"model.path": "{base}/model", **reinforced, "train.steps": 140},
                "model": "{zero}",
            },
            {
                "name": "chains",
                "title": "Cold start: chains of Zero",
                "command": "reject",
                "options": {"model": "{zero}", **drawn, "problems": 400, **summarised, **kept},
            },
            {
                "name": "cold_start",
                "title": "Cold start",
                "command": "sft",
                "fields": {"model.path": "{base}/model", "sft.path": "{chains}/chats.jsonl", **learned},
                "model": "{cold_start}/model",
            },
            {
                "name": "reasoning",
                "title": "Reasoning RL",
                "command": "train",
                "fields": {
                    "model.path": "{cold_start}/model",
                    **reinforced,
                    "rewards.names": ("answer", "format", "language"),
                    "rewards.weights": (1.0, 0.2, 0.5),
                },
                "model": "{reasoning}",
            },
            {
                "name": "rejection",
                "title": "Rejection sampling",
                "command": "reject",
                "options": {"model": "{reasoning}", **drawn, "problems": 800, **kept},
            },
            {
                "name": "mix",
                "title": "Reasoning and other chats, 3 to 1",
                "command": "mix",
                "options": {
                    "part": ["reasoning={rejection}/chats.jsonl", "general={tasks}/chats.jsonl"],
                    "weight": ["reasoning=3", "general=1"],
                    "used_up": "repeat",
                    "similarity": 1.0,
                    "seed": "{config.seed}",
                },
            },
            {
                "name": "sft",
                "title": "SFT from the base",
                "command": "sft",
                "fields": {"model.path": "{base}/model", "sft.path": "{mix}/chats.jsonl", **learned},
                "model": "{sft}/model",
            },
            {
                "name": "helpful",
                "title": "Reward model: helpful, by pairs",
                "command": "reward-model train",
                "fields": {
                    "model.path": "{sft}/model",
                    "reward_model.path": "{tasks}/helpful.jsonl",
                    "reward_model.eval_path": "{tasks}/eval_helpful.jsonl",
                    "reward_model.lr": 3e-4,
                },
            },
            {
                "name": "harmless",
                "title": "Reward model: harmless, by points",
                "command": "reward-model train",
                "fields": {
                    "model.path": "{sft}/model",
                    "reward_model.path": "{tasks}/harmless.jsonl",
                    "reward_model.eval_path": "{tasks}/eval_harmless.jsonl",
                    "reward_model.lr": 3e-4,
                },
            },
            {
                "name": "all_scenarios",
                "title": "RL for all scenarios",
                "command": "train",
                "fields": {
                    "model.path": "{sft}/model",
                    "data.path": "",
                    "data.sets": (
                        {
                            "name": "reasoning",
                            "path": "{tasks}/train.jsonl",
                            "eval_path": "{tasks}/eval.jsonl",
                            "prompt_column": "prompt",
                            "rewards": ("answer", "format", "language"),
                        },
                        {
                            "name": "general",
                            "path": "{tasks}/general.jsonl",
                            "eval_path": "{tasks}/eval_general.jsonl",
                            "prompt_column": "prompt",
                            "answer_column": "",
                            "rewards": ("language", "helpful", "harmless"),
                            "late": True,
                        },
                    ),
                    "rewards.names": ("answer", "format", "language", "helpful", "harmless"),
                    "rewards.weights": (1.0, 0.2, 0.5, 0.5, 0.5),
                    "rewards.late_names": ("helpful", "harmless"),
                    "rewards.late_from": 0.5,
                    "rewards.helpful.path": "{helpful}/model",
                    "rewards.harmless.path": "{harmless}/model",
                    "sampler.temperature": 0.7,
                    "train.steps": 240,
                },
                "model": "{all_scenarios}",
            },
            {
                "name": "student",
                "title": "Student's base",
                "command": "base",
                "fields": {"base.layers": 2, "base.width": 64, "base.mlp_width": 192},
                "model": "{student}/model",
            },
            {
                "name": "distilled",
                "title": "Student, SFT",
                "command": "sft",
                "fields": {"model.path": "{student}/model", "sft.path": "{mix}/chats.jsonl", **distilled},
                "model": "{distilled}/model",
            },
            {
                "name": "taught",
                "title": "Student, on-policy distillation",
                "command": "train",
                "fields": {
                    "model.path": "{distilled}/model",
                    **reinforced,
                    "distill.teacher": "{all_scenarios}",
                },
                "model": "{taught}",
            },
            {
                "name": "student_rl",
                "title": "Student, RL alone",
                "command": "train",
                "fields": {"model.path": "{student}/model", **reinforced},
                "model": "{student_rl}",
            },
        ],
    }
