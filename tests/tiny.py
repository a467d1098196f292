"""The tiniest parts of a step, shared by tests: config, tokens, model, rewards, prompts, state.

config = tiny.config(**{"objective.beta": 0.04})
parts = tiny.parts(config)
state = tiny.state(parts)
prompts = tiny.prompts(config)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from grpo_jax.config import Config, from_dict
from grpo_jax.models.architecture import Architecture, llama
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.weights import layer_shapes, put
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import AXES, make_mesh, row_sharding, shardings
from grpo_jax.rewards.host import HostRewards
from grpo_jax.rewards.scorer import Scorer, build_scorer
from grpo_jax.rewards.verifiers import byte_table
from grpo_jax.sampler.types import Prompts, Rollout
from grpo_jax.step import StepParts, TrainState, init_state

# A character a token: 0 is padding, 1 and 2 end a completion.
CHARACTERS = "0123456789+-=?<>/ abc"
END_IDS = (1, 2)
TOKEN_BYTES = [b"", b"", b"", *(c.encode() for c in CHARACTERS)]
VOCABULARY = len(TOKEN_BYTES)  # 24

# Rows of a dataset: what the scorer reads, and the text that `prompts` encodes.
ROWS = [{"prompt": f"{a}+{b}=?", "answer": str(a + b)} for a, b in ((1, 2), (13, 4), (5, 5), (7, 20), (9, 0))]

DEFAULTS: dict[str, Any] = {
    "data.max_prompt_length": 7,
    "data.prompts_per_step": 2,
    "sampler.group_size": 4,
    "sampler.max_new_tokens": 6,
    "rewards.names": ("odd", "long"),
    "rewards.weights": (1.0, 0.5),
    "optim.lr": 1e-2,
    "train.steps": 10,
    "mesh.data": 1,
}


def encode(text: str) -> list[int]:
    """Ids of a text of CHARACTERS."""
    return [3 + CHARACTERS.index(c) for c in text]


def decode(ids: Sequence[int]) -> str:
    """Text of the ids; those without one are left out."""
    return b"".join(TOKEN_BYTES[i] for i in ids).decode()


def config(**fields: Any) -> Config:
    """A checked config from DEFAULTS and fields by dotted name: `config(**{"optim.lr": 0.0})`."""
    values: dict[str, Any] = {}
    for name, value in {**DEFAULTS, **fields}.items():
        section = values
        *above, leaf = name.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[leaf] = value
    return from_dict(values, "tiny")


def architecture(**sizes: Any) -> Architecture:
    """Two layers of width 16: 4 query heads of size 4 over 2 key heads."""
    given = {"vocabulary": VOCABULARY, "width": 16, "heads": 4, "kv_heads": 2, "head_size": 4, "mlp_width": 24}
    return llama(**({"layers": 2} | given | sizes))


def params(of: Architecture, seed: int = 0, scale: float = 0.3) -> dict[str, Any]:
    """Parameters as numpy arrays: normal(scale), norms near 1; made without compiling anything."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(0, scale, shape).astype(np.float32)

    def norm(*shape: int) -> dict[str, np.ndarray]:
        return {"scale": (1 + random.normal(0, 0.1, shape)).astype(np.float32)}

    d, f, q, k = of.width, of.mlp_width, of.heads * of.head_size, of.kv_heads * of.head_size
    tree: dict[str, Any] = {"embed": {"embedding": draw(of.vocabulary, d)}, "final_norm": norm(d)}
    if not of.tied:
        tree["head"] = {"kernel": draw(d, of.vocabulary)}
    for i, stack in enumerate(of.stacks):
        n = stack.layers
        shapes = {"query": (d, q), "key": (d, k), "value": (d, k), "out": (q, d)}
        tree[f"stack_{i}"] = {
            "attention_norm": norm(n, d),
            "mlp_norm": norm(n, d),
            "attention": {name: {"kernel": draw(n, *shape)} for name, shape in shapes.items()},
            "mlp": {name: {"kernel": draw(n, *shape)} for name, shape in (("gate", (d, f)), ("up", (d, f)))},
        }
        tree[f"stack_{i}"]["mlp"]["down"] = {"kernel": draw(n, f, d)}
    return tree


def drawn(of: Architecture, seed: int = 0, scale: float = 0.3) -> dict[str, Any]:
    """As `params`, for any architecture: every leaf of its layers, by the table of shapes that checkpoints have."""
    random, tree = np.random.default_rng(seed), params(dataclasses.replace(of, stacks=()), seed, scale)
    for i, stack in enumerate(of.stacks):
        for path, shape in layer_shapes(of, stack).items():
            shape = (*shape[:-2], *shape[-2:][::-1]) if path.endswith("kernel") else shape
            made = random.normal(0, scale, (stack.layers, *shape))
            put(tree, f"stack_{i}/{path}", (made / 3 + 1 if path.endswith("scale") else made).astype(np.float32))
    return tree


def adapters(of: Architecture, rank: int = 2, seed: int = 0, zero_b: bool = False) -> dict[str, Any]:
    """The adapters collection for every dense layer of the stacks."""
    random = np.random.default_rng(seed)
    tree: dict[str, Any] = {}
    for name, stack in params(of).items():
        for block in ("attention", "mlp") if name.startswith("stack_") else ():
            for dense, leaf in stack[block].items():
                layers, fan_in, fan_out = leaf["kernel"].shape
                a = random.normal(0, 0.3, (layers, fan_in, rank)).astype(np.float32)
                b = random.normal(0, 0.3, (layers, rank, fan_out)).astype(np.float32)
                made = {"a": a, "b": np.zeros_like(b) if zero_b else b}
                tree.setdefault(name, {}).setdefault(block, {})[dense] = made
    return tree


Reward = Callable[[Prompts, Rollout], Float[Array, "B"]]


def odd(prompts: Prompts, rollout: Rollout) -> Float[Array, "B"]:
    """Share of odd ids."""
    return jnp.sum((rollout.tokens % 2) * rollout.mask, axis=1) / jnp.maximum(rollout.lengths, 1)


def long(prompts: Prompts, rollout: Rollout) -> Float[Array, "B"]:
    """Length over the budget."""
    return rollout.lengths / rollout.tokens.shape[1]


def constant(prompts: Prompts, rollout: Rollout) -> Float[Array, "B"]:
    """The same for all: groups tie."""
    return jnp.full(rollout.lengths.shape, 0.1)


REWARDS: dict[str, Reward] = {"odd": odd, "long": long, "constant": constant}


@dataclasses.dataclass(frozen=True, eq=False)
class TinyScorer(Scorer):
    """A scorer whose in-graph components are the few operations of `rewards`: verifiers take seconds to compile."""

    rewards: Mapping[str, Reward] = dataclasses.field(default_factory=lambda: REWARDS)

    def score_in_graph(self, prompts: Prompts, rollout: Rollout, variables: Any = None) -> tuple[Array, Array]:
        functions = [self.rewards[name] for name in self.names if not self._on_host(name)]
        values = [function(prompts, rollout).astype(jnp.float32) for function in functions]
        made = jnp.stack(values, axis=1) if values else jnp.zeros((rollout.tokens.shape[0], 0), jnp.float32)
        return made, jnp.ones_like(made)


def scorer(
    config: Config,
    mesh: Mesh,
    rewards: Mapping[str, Reward] | None = None,
    callables: dict[str, Callable[..., Any]] | None = None,
) -> Scorer:
    """Components by name: those of `callables` on the host, those of `rewards` (REWARDS) in-graph.

    With other names than these, it is the scorer that a run builds, verifiers and all.
    """
    known, callables = {**REWARDS, **(rewards or {})}, callables or {}
    if not set(config.rewards.names) <= {*known, *callables}:
        return build_scorer(config.rewards, TOKEN_BYTES, ROWS, decode, mesh, callables)
    host = HostRewards(callables, ROWS, decode, config.rewards.timeout, config.rewards.on_error) if callables else None
    table = byte_table(TOKEN_BYTES)
    return TinyScorer(config.rewards.names, config.rewards.weights, table, host, mesh, {}, rewards=known)


def mesh(config: Config, devices: int | None = None) -> Mesh:
    """The config's mesh over the first `devices` fake devices (None: as many as it asks for)."""
    count = devices or max(int(np.prod([getattr(config.mesh, axis) for axis in AXES])), 1)
    return make_mesh(config.mesh, jax.devices()[:count])


def parts(
    config: Config,
    of: Architecture | None = None,
    optimizer: optax.GradientTransformation | None = None,
    rewards: Mapping[str, Reward] | None = None,
    callables: dict[str, Callable[..., Any]] | None = None,
    end_ids: tuple[int, ...] = END_IDS,
) -> StepParts:
    """What a step is made of, with the config's optimizer unless another is given."""
    updates = config.train.steps * config.objective.num_iterations * config.objective.minibatches
    on = mesh(config)
    return StepParts(
        config=config,
        module=Decoder(
            of or architecture(),
            dtype=jnp.dtype(config.model.compute_dtype),
            remat=config.model.remat,
            unroll=config.model.unroll or 1,  # the loop that larger models have
            mesh=on,
            sampling=config.mesh.sampling,
        ),
        optimizer=optimizer or make_optimizer(config.optim, updates),
        schedule=make_schedule(config.optim, updates),
        scorer=scorer(config, on, rewards, callables),
        mesh=on,
        end_ids=end_ids,
    )


def state(
    parts: StepParts,
    variables: dict[str, Any] | None = None,
    frozen: dict[str, Any] | None = None,
    **options: Any,
) -> TrainState:
    """A state at step 0 from `params` (or `variables`), on the mesh."""
    variables = {"params": params(parts.module.architecture)} if variables is None else variables
    variables = jax.device_put(variables, shardings(variables, parts.mesh))
    frozen = jax.device_put(frozen, shardings(frozen, parts.mesh)) if frozen else None
    return init_state(parts, variables, frozen, **options)


def prompts(config: Config, first_draw: int = 0, scorer: Scorer | None = None) -> Prompts:
    """`prompts_per_step` rows of ROWS as a host hands them in (numpy), draw numbers from `first_draw` on."""
    count, width = config.data.prompts_per_step, config.data.max_prompt_length
    draw = np.arange(first_draw, first_draw + count, dtype=np.int32)
    row = (draw % len(ROWS)).astype(np.int32)
    ids = [encode(ROWS[r]["prompt"]) for r in row]
    tokens = np.zeros((count, width), np.int32)
    for line, prompt in zip(tokens, ids, strict=True):
        line[width - len(prompt) :] = prompt
    return Prompts(
        tokens=tokens,
        lengths=np.array([len(prompt) for prompt in ids], np.int32),
        draw=draw,
        row=row,
        weight=np.ones(count, np.float32),
        columns={} if scorer is None else scorer.columns(row),
    )


def on_mesh(rows: Any, mesh: Mesh) -> Any:
    """Prompts, or a rollout, as a run hands them on: rows split over the mesh."""
    return jax.device_put(rows, row_sharding(mesh))
