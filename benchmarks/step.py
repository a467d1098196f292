"""Times the training step on a fixed synthetic task and prints one JSON line.

    python benchmarks/step.py --workload small --steps 15

The work of a step: `--prompts` distinct sums, each sampled `--group` times, every prompt `--prompt-len` tokens, every
completion `--new-tokens` tokens (no end token, unless `--natural-end`), one reference forward (beta 0.04), one forward
and backward, one AdamW update at learning rate 1e-5 with clip norm 1; float32, temperature 1, a randomly initialised
Llama. The compiled program is the one that `grpo-jax train` runs; the reward is computed in it.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import default_config, from_dict
from grpo_jax.models.abstract import abstract_params
from grpo_jax.models.architecture import llama
from grpo_jax.models.build import build_decoder
from grpo_jax.models.decoder import init_params
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import keep_host_memory, make_mesh, row_sharding
from grpo_jax.recipes.doctor import measure
from grpo_jax.recipes.plan import plan_work, sizes_of
from grpo_jax.sampler.types import Prompts, Scores
from grpo_jax.step import Program, StepParts, init_state

PAD, EOS = 0, 1
CHARACTERS = "0123456789+-*/= abcdefghijklmnopqrstuvwxyz"
SHAPE = {
    "prompts": 8,
    "group": 8,
    "prompt_len": 16,
    "new_tokens": 64,
    "layers": 4,
    "hidden": 256,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 688,
    "vocab": 512,
    "natural_end": False,
    "micro": 0,
    "pack_prompts": 0,
    "slots": 0,
    "devices": 1,
    "chunk": 0,
    "remat": "none",
}
# Options of this trainer alone: no part of the work.
OURS = ("micro", "pack_prompts", "slots", "devices", "chunk", "remat")
TINY = {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 2, "ffn": 172, "vocab": 64}
SMOLLM2 = {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocab": 49152}
WORKLOADS: dict[str, dict[str, Any]] = {
    "small": {"micro": 8, "devices": 2},
    "smollm2": {"prompts": 4, "group": 4, "prompt_len": 32, **SMOLLM2, "micro": 16, "chunk": 128, "remat": "full"},
    "tiny": {"prompts": 16, "prompt_len": 8, "new_tokens": 32, **TINY, "micro": 128, "devices": 2},
    "ragged": {
        "prompts": 16,
        "new_tokens": 256,
        "vocab": 48,
        "natural_end": True,
        "micro": 8,
        "pack_prompts": 5,
        "slots": 32,
    },
    "long_prompt": {"prompts": 4, "group": 16, "prompt_len": 512, "new_tokens": 32, "devices": 2},
}


@dataclasses.dataclass(frozen=True, eq=False)
class DigitReward:
    """Share of the answer's leading digits that are right, and a tenth of a dense term, so that groups do not tie."""

    answers: jax.Array
    lengths: jax.Array
    names: tuple[str, ...] = ("digits",)
    weights: tuple[float, ...] = (1.0,)

    def score(self, prompts: Prompts, rollout: Any, variables: Any = None) -> Scores:
        """Scores [B, 1], in the program."""
        answer = self.answers[prompts.row][rollout.group]
        length = self.lengths[prompts.row][rollout.group]
        width = answer.shape[1]
        given = jnp.where(rollout.mask > 0, rollout.tokens, PAD)[:, :width]
        inside = jnp.arange(width) < length[:, None]
        right = jnp.sum(jnp.cumprod((given == answer) & inside, axis=1), axis=1) / length
        dense = jnp.sum((rollout.tokens % 7) * rollout.mask, axis=1) / (7 * jnp.maximum(rollout.lengths, 1))
        values = (right + 0.1 * dense)[:, None]
        return Scores(values, jnp.ones_like(values), failed=jnp.bool_(False))

    def total(self, scores: Scores) -> jax.Array:
        """The one component."""
        return scores.values[:, 0]

    def row_weights(self, scores: Scores) -> jax.Array:
        """One weight."""
        return jnp.ones(1)

    def score_in_graph(self, prompts: Prompts, rollout: Any, variables: Any = None) -> tuple[jax.Array, jax.Array]:
        """The same as a pair, for staged mode."""
        scores = self.score(prompts, rollout)
        return scores.values, scores.valid

    def score_on_host(self, prompts: Prompts, rollout: Any, in_graph: Any, fetch: Any) -> Scores:
        """The same for staged mode."""
        return Scores(*in_graph(prompts, rollout), failed=jnp.bool_(False))


def arguments() -> argparse.Namespace:
    """The command line; a workload sets what is not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, help="a named shape")
    for name, value in SHAPE.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true", default=None)
        else:
            parser.add_argument(flag, type=type(value))
    parser.add_argument("--steps", type=int, default=15, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps run first and not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="recorded only: XLA takes all processors")
    parser.add_argument("--phases", action="store_true", help="staged programs: seconds by phase")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="any config field")
    options = parser.parse_args()
    known = SHAPE | WORKLOADS.get(options.workload or "", {})
    for name in SHAPE:
        if getattr(options, name) is None:
            setattr(options, name, known[name])
    return options


def sums(count: int, length: int, seed: int) -> tuple[list[str], list[str]]:
    """Additions written with leading zeros, each exactly `length` characters, and their answers."""
    rng = random.Random(seed)
    first = (length - 2) // 2
    second = length - 2 - first
    top = 10 ** min(2, first, second) - 1
    texts, answers = [], []
    for _ in range(count):
        a, b = rng.randint(0, top), rng.randint(0, top)
        texts.append(f"{a:0{first}d}+{b:0{second}d}=")
        answers.append(str(a + b))
    return texts, answers


def build(options: argparse.Namespace) -> tuple[StepParts, Any, list[Prompts]]:
    """Parts, state and the prompts of every step."""
    total = options.warmup + options.steps
    ids = {character: i + 2 for i, character in enumerate(CHARACTERS)}
    texts, answers = sums(options.prompts * total, options.prompt_len, options.seed)
    raw = default_config()
    raw.data.prompts_per_step = options.prompts
    raw.data.max_prompt_length = options.prompt_len
    raw.sampler.group_size = options.group
    raw.sampler.max_new_tokens = options.new_tokens
    raw.objective.loss_type = "grpo"
    raw.objective.beta = 0.04
    raw.objective.micro_batch_size = options.micro
    raw.optim.lr = 1e-5
    raw.optim.clip_norm = 1.0
    raw.seed = options.seed
    raw.train.steps = total
    raw.step.mode = "staged" if options.phases else "fused"
    raw.sampler.slots = options.slots
    raw.train.pack_prompts = options.pack_prompts
    raw.model.logits_chunk = options.chunk
    raw.model.remat = options.remat
    for setting in options.set:
        field, _, value = setting.partition("=")
        section, name = field.rsplit(".", 1)
        setattr(raw[section], name, json.loads(value))
    config = from_dict(raw)
    mesh = make_mesh(config.mesh, jax.devices()[: options.devices])
    architecture = llama(
        options.layers,
        vocabulary=options.vocab,
        width=options.hidden,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_size=options.hidden // options.heads,
        mlp_width=options.ffn,
        rope_theta=10000.0,
        tied=True,
    )
    module = build_decoder(config, architecture, mesh)
    width = max(map(len, answers))
    table = np.array([[ids[c] for c in a] + [PAD] * (width - len(a)) for a in answers], np.int32)
    reward: Any = DigitReward(jnp.asarray(table), jnp.asarray([len(a) for a in answers], jnp.int32))
    optimizer, schedule = make_optimizer(config.optim, total), make_schedule(config.optim, total)
    parts = StepParts(config, module, optimizer, schedule, reward, mesh, (EOS,) if options.natural_end else ())
    params = jax.jit(lambda key: init_params(module, key))(jax.random.key(options.seed))
    smaller = jax.jit(lambda x: x * 0.2, donate_argnums=0)  # near-uniform, as normal(0.02) gives
    params = jax.tree.map(lambda x: smaller(x) if x.ndim > 1 else x, params)
    batches = []
    for step in range(total):
        rows = np.arange(step * options.prompts, (step + 1) * options.prompts, dtype=np.int32)
        tokens = np.array([[ids[c] for c in texts[r]] for r in rows], np.int32)
        batch = Prompts(
            tokens=tokens,  # pyright: ignore[reportArgumentType]
            lengths=np.full(options.prompts, options.prompt_len, np.int32),  # pyright: ignore[reportArgumentType]
            draw=rows,  # pyright: ignore[reportArgumentType]
            row=rows,  # pyright: ignore[reportArgumentType]
            weight=np.ones(options.prompts, np.float32),  # pyright: ignore[reportArgumentType]
            columns={},
        )
        batches.append(jax.device_put(batch, row_sharding(mesh)))
    return parts, init_state(parts, {"params": params}), batches


def model_flops(parts: StepParts, tokens: float) -> float:
    """FLOPs of a step's model by formula, where `tokens` are sampled: what is computed again does not count."""
    config, architecture = parts.config, parts.module.architecture
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="none", logits_chunk=0),
        sampler=dataclasses.replace(config.sampler, max_new_tokens=max(round(tokens / config.completions), 2)),
    )
    work = plan_work(plain, architecture, sizes_of(plain, parts.mesh.size), abstract_params(architecture))
    return work.sampling + work.update


def matmul_flops(mesh: Mesh) -> float:
    """FLOPs a second of float32 products of 1,024 x 1,024, one on each device at once."""
    size = 1024
    x = jax.device_put(np.ones((mesh.size, size, size), np.float32), row_sharding(mesh))
    with jax.default_matmul_precision("highest"):
        return mesh.size * 2 * size**3 / measure(jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x)), x, times=20)


def machine_busy_s() -> float:
    """CPU seconds that all processes have used (Linux)."""
    with open("/proc/stat", encoding="ascii") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Compiles, runs, prints."""
    options = arguments()
    keep_host_memory(options.devices)
    if options.devices > 1:  # as `mesh.cpu_devices` does it
        jax.config.update("jax_num_cpu_devices", options.devices)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    parts, state, batches = build(options)
    program = Program(parts, state)
    began = time.perf_counter()
    program.compile(state, batches[0])
    compile_s = time.perf_counter() - began
    temporary = None
    if not options.phases:
        temporary = program.fused.memory_analysis().temp_size_in_bytes / 2**20
    steps, cpu, others, tokens, phases = [], [], [], [], []
    for number, batch in enumerate(batches):
        marks = time.perf_counter(), time.process_time(), machine_busy_s()
        state, metrics, _ = program(state, batch)
        jax.block_until_ready(state)
        now = time.perf_counter(), time.process_time(), machine_busy_s()
        if number >= options.warmup:
            wall, used, busy = (b - a for a, b in zip(marks, now, strict=True))
            steps.append(wall)
            cpu.append(used)
            others.append(max(busy - used, 0.0) / (wall * (os.cpu_count() or 1)))
            tokens.append(float(metrics.means["tokens"][0]))
            phases.append(dict(program.seconds))
        elif number == 0:
            first = now[0] - marks[0]
    median = statistics.median(steps)
    quiet = [s for s, o in zip(steps, others, strict=True) if o < 0.05]
    shape = {k: getattr(options, k) for k in SHAPE}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flops, rate = model_flops(parts, statistics.mean(tokens)), matmul_flops(parts.mesh)
    line = {
        "peer": "grpo_jax",
        "median_step_s": round(median, 4),
        "min_step_s": round(min(steps), 4),
        "max_step_s": round(max(steps), 4),
        "quiet_steps": len(quiet),
        "median_quiet_step_s": round(statistics.median(quiet), 4) if quiet else None,
        "others_cpu_share": round(statistics.median(others), 3),
        "generated_tokens_per_s": round(sum(tokens) / sum(steps), 1),
        "phase_median_s": {k: round(statistics.median(p[k] for p in phases), 4) for k in phases[0]},
        "median_step_cpu_s": round(statistics.median(cpu), 4),
        "first_step_s": round(compile_s + first, 3),
        "compile_s": round(compile_s, 1),
        "program_temporaries_mb": None if temporary is None else round(temporary, 1),
        "measured_steps": len(steps),
        "model_gflop": round(flops / 1e9, 2),
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(flops / median / rate, 3),
        "peak_rss_mb": round(peak / 1024, 1),
        "params": sum(x.size for x in jax.tree.leaves(state.trainable)),
        "shape": shape,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
