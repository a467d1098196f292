"""Times a step of GRPO beside PPO's on the embedded default's shapes, and prints what each program holds in memory.

    python benchmarks/ppo.py --steps 10

Three programs, called in turn so that a busy machine slows all alike: GRPO; PPO with a value head on the policy; PPO
with a value decoder of its own, as the papers compare. Weights are random and nothing ends a completion early, so that
all do the same sampling. Memory is the compiler's: arguments (the state, donated) and temporaries.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np

from grpo_jax.config import Config, config_file, from_dict, read_config_file
from grpo_jax.models.architecture import llama
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import make_mesh, row_sharding
from grpo_jax.rewards.scorer import build_scorer
from grpo_jax.sampler.types import Prompts
from grpo_jax.step import Program, StepParts, init_state

PROGRAMS = {
    "GRPO": {},
    "PPO, value head": {"baseline": "value", "critic": "head"},
    "PPO, value decoder": {"baseline": "value", "critic": "model"},
}
VOCABULARY = 30  # about what the embedded tokenizer comes out with
NEVER = (VOCABULARY,)  # no token ends a completion


def parts_of(config: Config, fields: dict[str, str]) -> StepParts:
    """The parts of a step of the config with these options."""
    baseline, critic = fields.get("baseline", "group"), fields.get("critic", "head")
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, baseline=baseline),
        ppo=dataclasses.replace(config.ppo, critic=critic),
    )
    b = config.base
    sizes = {"width": b.width, "heads": b.heads, "kv_heads": b.kv_heads, "mlp_width": b.mlp_width, "tied": b.tied}
    architecture = llama(b.layers, vocabulary=VOCABULARY, head_size=b.width // b.heads, **sizes)
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1), jax.devices()[:1])
    rows = [{"prompt": "1+1=", "answer": "2"}]
    scorer = build_scorer(config.rewards, [bytes([48 + i]) for i in range(VOCABULARY)], rows, lambda ids: "", mesh)
    optimizer, schedule = make_optimizer(config.optim, 100), make_schedule(config.optim, 100)
    return StepParts(config, Decoder(architecture), optimizer, schedule, scorer, mesh, NEVER)


def prompts_of(parts: StepParts) -> Prompts:
    """Random prompts that fill their width."""
    count, width = parts.config.data.prompts_per_step, parts.config.data.max_prompt_length
    row = np.zeros(count, np.int32)
    made = Prompts(
        tokens=np.random.default_rng(0).integers(1, VOCABULARY, (count, width)).astype(np.int32),
        lengths=np.full(count, width, np.int32),
        draw=np.arange(count, dtype=np.int32),
        row=row,
        weight=np.ones(count, np.float32),
        columns=parts.scorer.columns(row),
    )
    return jax.device_put(made, row_sharding(parts.mesh))


def main() -> None:
    """Compiles all, runs them in turn, prints a JSON line each."""
    parser = argparse.ArgumentParser(description="GRPO beside PPO: seconds and bytes of a step.")
    parser.add_argument("--config", default="arithmetic")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    config = from_dict(read_config_file(config_file(options.config)))
    runs = {}
    for name, fields in PROGRAMS.items():
        parts = parts_of(config, fields)
        params = jax.jit(lambda key, m=parts.module: init_params(m, key))(jax.random.key(0))
        state = init_state(parts, {"params": params})
        trained = sum(x.size for x in jax.tree.leaves(state.trainable))
        program = Program(parts, state)
        program.compile(state, prompts_of(parts))
        runs[name] = [program, state, prompts_of(parts), [], trained]
    for _ in range(options.steps + 1):
        for run in runs.values():
            began = time.perf_counter()
            run[1], metrics, _ = run[0](run[1], run[2])
            jax.block_until_ready(metrics)
            run[3].append(time.perf_counter() - began)
    for name, (program, _, _, seconds, trained) in runs.items():
        memory = program.fused.memory_analysis()
        line = {
            "program": name,
            "trained_parameters": trained,
            "median_seconds": round(statistics.median(seconds[1:]), 3),
            "fastest_seconds": round(min(seconds[1:]), 3),
            "steps": options.steps,
            "state_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
