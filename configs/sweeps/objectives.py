"""Objectives side by side on the embedded default: 7 configs x 3 seeds, solve rate by step in one plot.

    grpo-jax sweep --config sweeps/objectives --workdir runs/objectives

Every run starts from the same base model. A rollout is two minibatches: with one update a rollout all ratios are 1, and
objectives that differ in what they do to ratios would be the same.
"""

from grpo_jax.config import config_file, read_config_file

SEEDS = (0, 1, 2)

RUNS = {
    "grpo": {"objective.loss_type": "grpo"},
    "dapo": {"objective.loss_type": "dapo", "objective.epsilon_high": 0.28, "data.pool_factor": 2},
    "dr_grpo": {"objective.loss_type": "dr_grpo", "objective.scale_rewards": "none"},
    "gspo": {
        "objective.loss_type": "grpo",
        "objective.importance_sampling_level": "sequence",
        "objective.epsilon": 3e-4,
        "objective.epsilon_high": 4e-4,
    },
    "cispo": {"objective.loss_type": "cispo"},
    "rloo": {
        "objective.loss_type": "dr_grpo",
        "objective.baseline": "leave_one_out",
        "objective.scale_rewards": "none",
    },
    "ppo": {"objective.loss_type": "dapo", "objective.baseline": "value"},
}


def get_config():
    """The embedded default with two minibatches, half as long."""
    c = read_config_file(config_file("arithmetic"))
    c.objective.minibatches = 2
    c.train.steps = 60  # half of the default's: 21 runs
    return c


def get_sweep():
    """Seeds, and by run the fields in which it differs."""
    return {"seeds": SEEDS, "runs": RUNS}
