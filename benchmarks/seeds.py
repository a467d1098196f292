"""Times all seeds of a config in one program against running them one after another.

    python benchmarks/seeds.py --seeds 3 --steps 5

Both do the same: the same tokens by seed, from random weights, in-graph rewards. Steps of both are taken in turn.
`--batched_predicate` adds the program whose decode loop has a condition by seed, which selects whole caches.
"""

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from ppo import parts_of, prompts_of

from grpo_jax.config import config_file, from_dict, read_config_file
from grpo_jax.models.decoder import init_params
from grpo_jax.recipes.sweep import SeedsProgram, seed_rows, stack_states
from grpo_jax.step import Program, StepParts, init_state, train_step

SIZES = {
    "tiny": {
        "base.layers": 1,
        "base.width": 32,
        "base.heads": 2,
        "base.kv_heads": 1,
        "base.mlp_width": 64,
        "data.prompts_per_step": 4,
        "sampler.group_size": 4,
        "objective.micro_batch_size": 0,
    },
    "default": {},
}


def batched_predicate(parts: StepParts, seeds: Any, states: Any) -> Any:
    """`vmap` of the plain step: what the reduced condition avoids."""

    def one(seed: Any, state: Any, prompts: Any) -> Any:
        config = dataclasses.replace(parts.config, seed=seed)
        return train_step(dataclasses.replace(parts, config=config), state, prompts)

    program = jax.jit(jax.vmap(one), donate_argnums=1)
    return lambda states, prompts: program(seeds, states, prompts)


def seconds_of(step: Any) -> float:
    """Seconds of a call, its results waited for."""
    began = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - began


def main() -> None:
    """Compiles, runs both in turn, prints a JSON line."""
    parser = argparse.ArgumentParser(description="Seeds side by side against one after another.")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batched_predicate", action="store_true")
    options = parser.parse_args()
    values = read_config_file(config_file("arithmetic"))
    values.update_from_flattened_dict(SIZES[options.size])
    parts = parts_of(from_dict(values), {})
    params = jax.jit(lambda key: init_params(parts.module, key))(jax.random.key(0))
    prompts = prompts_of(parts)
    seeds = list(range(options.seeds))
    stacked = jax.device_put(
        jax.tree.map(lambda x: np.stack([np.asarray(x)] * len(seeds)), prompts), seed_rows(parts.mesh)
    )
    state = init_state(parts, {"params": params})
    held = {"together": stack_states(parts, state, len(seeds))}
    programs = {"together": SeedsProgram(parts, seeds, held["together"])}
    if options.batched_predicate:
        held["batched"] = stack_states(parts, state, len(seeds))
        programs["batched"] = batched_predicate(parts, programs["together"].seeds, held["batched"])
    alone, states = Program(parts, state), [init_state(parts, {"params": params}) for _ in seeds]
    found: dict[str, list[float]] = {name: [] for name in [*programs, "one after another"]}
    for _ in range(options.steps + 1):
        for name, program in programs.items():

            def step(name: str = name, program: Any = program) -> Any:
                held[name], metrics, _ = program(held[name], stacked)
                return metrics

            found[name].append(seconds_of(step))

        def each() -> Any:
            for i in range(len(seeds)):
                states[i], metrics, _ = alone(states[i], prompts)
            return metrics

        found["one after another"].append(seconds_of(each))
    medians = {name: round(statistics.median(times[1:]), 4) for name, times in found.items()}
    print(json.dumps({"size": options.size, "seeds": len(seeds), "steps": options.steps, "median_seconds": medians}))


if __name__ == "__main__":
    main()
