"""A step by shapes alone: the state, prompts and program of a config over devices that may not be there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import Config
from grpo_jax.errors import InputError
from grpo_jax.models.abstract import abstract_params, abstract_teacher, teacher_architecture
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.build import build_policy
from grpo_jax.models.lora import abstract_variables
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import row_sharding
from grpo_jax.rewards.reward_model import MODEL_REWARDS
from grpo_jax.rewards.scorer import build_scorer
from grpo_jax.rewards.verifiers import REWARDS
from grpo_jax.sampler.stops import stop_table
from grpo_jax.sampler.types import Prompts, RowRewards
from grpo_jax.step import Program, StepParts, TrainState, init_state, state_layout

TOKEN_BYTES = 16  # a token's longest text, where no tokenizer is read


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A step that can be lowered: its parts, and shapes with shardings of what it is called with."""

    parts: StepParts
    state: TrainState
    prompts: Prompts
    params: Any

    def lower(self) -> Any:
        """The fused step, lowered for the mesh's devices."""
        return Program(self.parts, self.state).fused.lower(self.state, self.prompts)


def abstract_step(config: Config, mesh: Mesh, architecture: Architecture) -> AbstractStep:
    """The fused step of a config, whatever `step.mode`: rewards are those of the config, texts stand-ins.

    Raises InputError for rewards that are models: their files would have to be read.
    """
    config = dataclasses.replace(config, step=dataclasses.replace(config.step, mode="fused"))
    models = [name for name in config.rewards.names if name in MODEL_REWARDS]
    if models:
        raise InputError(f"config: rewards.names has {models[0]!r}, a model whose files would be read: leave it out")
    parts = step_parts(config, mesh, architecture)
    params = abstract_params(architecture)
    trainable, frozen = abstract_variables(params, config.lora)
    dtype = jnp.dtype(config.model.param_dtype)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), trainable)
    frozen = {**frozen, **abstract_teacher(config)}
    state = jax.eval_shape(lambda t, f: init_state(parts, t, f, bool(config.lora.rank)), trainable, frozen)
    return AbstractStep(parts, placed(state, state_layout(parts, state)), _prompts(parts), params)


def placed(tree: Any, layout: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


def host_rewards(config: Config) -> list[str]:
    """The components that are ordinary Python."""
    return [name for name in config.rewards.names if name not in REWARDS and name not in MODEL_REWARDS]


def step_parts(config: Config, mesh: Mesh, architecture: Architecture) -> StepParts:
    """What a step is made of, with stand-ins for tokenizer, dataset and host rewards."""
    token_bytes = [b"", *[b"x" * TOKEN_BYTES] * (architecture.vocabulary - 1)]
    scorer = build_scorer(
        config.rewards,
        token_bytes,
        [{"prompt": "1 + 1", "answer": "2" if "choice" not in config.rewards.names else "B"}],
        lambda ids: "",
        mesh,
        {name: _stand_in for name in host_rewards(config)},
    )
    updates = config.train.steps * config.objective.num_iterations * config.objective.minibatches
    module = build_policy(config, architecture, mesh)
    optimizer, schedule = make_optimizer(config.optim, updates), make_schedule(config.optim, updates)
    stops = stop_table(config.sampler.stop, token_bytes)
    taught = teacher_architecture(config)
    teacher = None if taught is None else Decoder(taught, dtype=jnp.dtype(config.model.compute_dtype))
    return StepParts(config, module, optimizer, schedule, scorer, mesh, (0,), stops, teacher=teacher)


def _stand_in(prompts: list, completions: list, **columns: Any) -> list[float]:
    """In place of a host reward, which is called from the program and is no part of it."""
    return [0.0] * len(completions)


def _prompts(parts: StepParts) -> Prompts:
    """Shapes of a step's prompts."""
    config, layout = parts.config, row_sharding(parts.mesh)
    count, components = config.draws_per_step, len(config.rewards.names)

    def rows(dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *rest), dtype, sharding=layout)

    columns = {name: rows(values.dtype, *values.shape[1:]) for name, values in parts.scorer.answers.items()}
    one = rows(np.int32)
    by_set: Any = (one, rows(np.float32, components), rows(np.float32, components))
    rewards = RowRewards(*by_set) if config.data.sets or config.rewards.late_names else None
    made: Any = (rows(np.int32, config.data.max_prompt_length), one, one, one, rows(np.float32), columns, rewards)
    return Prompts(*made)
