"""The step: sampling, reward, advantage, clipped loss, KL and update as one pure function.

    train_step(parts, state, prompts) -> (state, metrics, rollout)

It is three functions, `sample_rollout`, `score_rollout` and `update`, called one after another; with dynamic sampling
the first two are rounds of a loop that fills the batch. Fused mode compiles their composition once; staged mode
compiles each on its own, for slow rewards and for looking in between. `parts` holds what never changes in a run;
everything that does is in `state`.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.batches import PackShape, TrainingBatch, by_row, join, loop, make_packs, pack_shape, split, training_batch
from grpo_jax.config import Config, SamplerConfig
from grpo_jax.metrics import Fetcher, Mean
from grpo_jax.models.decoder import DecoderModule, unstack
from grpo_jax.models.value import TEACHER, init_value, read_values, without_value
from grpo_jax.ops.advantages import advantages
from grpo_jax.ops.corrections import correction_weights
from grpo_jax.ops.gae import explained_variance, gae, token_rewards, value_losses, whiten
from grpo_jax.ops.logprobs import distilled_logps, token_logps
from grpo_jax.ops.masked import masked_mean, masked_select, safe_divide
from grpo_jax.ops.objectives import denominators, policy_loss_terms, top_entropy_mask, weighted_sum
from grpo_jax.ops.packing import Pack
from grpo_jax.optimizer import keep_if, keep_state_if, move_routing_biases, split_routing_biases, sums_of_squares
from grpo_jax.parallel import (
    PACK_AXES,
    constrain_rows,
    gather_columns,
    give_back_host_memory,
    in_host_memory,
    moved,
    options_of_cpu,
    pack_shards,
    path_name,
    replicated,
    row_sharding,
    row_shards,
    sampling_layout,
    shardings,
    spread_columns,
)
from grpo_jax.rewards.reward_model import COLLECTION
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.sampler.pool import Filling, empty, filling_means, keep, round_prompts, wanting
from grpo_jax.sampler.sample import anywhere, choose_pieces, sample
from grpo_jax.sampler.stops import StopTable
from grpo_jax.sampler.types import Prompts, Rollout, Scores

TRAINING, EVALUATION = 0, 1  # streams of sampling noise
Means = dict[str, Mean]

# Metrics of the objective, by the names that a run writes.
METRIC_NAMES = {
    "clip_fraction_low": "clip/low",
    "clip_fraction_high": "clip/high",
    "clip_fraction_delta": "clip/delta",
    "gate": "sapo/gate",
    "sequence_weight": "vespo/weight",
    "selected_fraction": "entropy/selected",
    "ratio": "ratio/mean",
    "kl": "kl",
}


class TrainState(flax.struct.PyTreeNode):
    """All that changes in a run; one pytree for full training and for adapters, donated at every step.

    Attributes:
      step: rollouts so far.
      draws: draw number of the next prompt.
      updates: optimizer updates so far, skipped ones left out.
      skipped: updates skipped so far because something was not finite.
      skipped_in_row: how many of them since the last good one.
      trainable: collections that the optimizer changes, {"params": ...} or {"adapters": ...}, with PPO a value model's.
      frozen: collections that it does not.
      reference: the reference's copy of the policy in `trainable`, {} where it is `frozen` alone; None when beta is 0.
      opt_state: the optimizer's.
    """

    step: Int[Array, ""]
    draws: Int[Array, ""]
    updates: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    trainable: Any
    frozen: Any
    reference: Any
    opt_state: Any


class Metrics(flax.struct.PyTreeNode):
    """What a step tells.

    Attributes:
      means: (sum, count) by name; the host divides once.
      nonfinite: updates in which a parameter's gradient was not finite, one entry a leaf of `trainable`.
      failed: a host reward failed.
      skipped_in_row: updates skipped since the last good one.
    """

    means: Means
    nonfinite: Float[Array, "leaves"]
    failed: Bool[Array, ""]
    skipped_in_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class StepParts:
    """What a step is made of: the config, the model's functions, optimizer, rewards, mesh, end tokens, stops.

    `seed_axis` names the axis of a `vmap` over seeds; loops then go on until they may end for every seed. A predicate
    with an axis of its own would make XLA select whole caches at every token.
    """

    config: Config
    module: DecoderModule
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    scorer: Scorer
    mesh: Mesh
    end_ids: tuple[int, ...]
    stops: StopTable | None = None
    seed_axis: str | None = None
    teacher: DecoderModule | None = None


def init_state(
    parts: StepParts,
    variables: dict[str, Any],
    frozen: dict[str, Any] | None = None,
    base_is_reference: bool = False,
) -> TrainState:
    """A state at step 0 on the mesh, with PPO's value model; the reference is a copy with buffers of its own.

    With `base_is_reference` it is the frozen collections alone, as long as it is never refreshed: adapters whose B is
    zero add nothing.
    """
    nothing = base_is_reference and refresh_interval(parts.config) == 0

    def make(variables: Any, frozen: Any) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        copy = {} if nothing else jax.tree.map(jnp.copy, variables)
        reference = copy if parts.config.objective.beta > 0 else None
        if parts.config.objective.baseline == "value":
            params, dtype = {**frozen, **variables}["params"], jnp.dtype(parts.config.model.param_dtype)
            width = parts.module.architecture.width
            variables = variables | init_value(parts.config.ppo.critic, width, params, dtype)
        return TrainState(zero, zero, zero, zero, zero, variables, frozen, reference, parts.optimizer.init(variables))

    frozen = frozen or {}
    layout = state_layout(parts, jax.eval_shape(make, variables, frozen))
    return jax.jit(make, out_shardings=layout)(variables, frozen)


def state_layout(parts: StepParts, shapes: TrainState) -> Any:
    """Where each leaf of a state lies: by the rules of the mesh, and in the host's memory what `mesh.offload` names."""
    layout = shardings(shapes, parts.mesh)
    for part in offloaded(parts):
        layout = layout.replace(**{part: in_host_memory(getattr(shapes, part), getattr(layout, part))})
    return layout


def offloaded(parts: StepParts) -> tuple[str, ...]:
    """The parts of a state that lie in the host's memory between their uses."""
    both = ("opt_state", "reference")
    return {"none": (), "optimizer": both[:1], "reference": both[1:], "both": both}[parts.config.mesh.offload]


def at_hand(parts: StepParts, part: str, tree: Any) -> Any:
    """A part of the state in the devices' memory, for its use."""
    return moved(tree, parts.mesh, to_host=False) if part in offloaded(parts) else tree


def put_away(parts: StepParts, part: str, tree: Any) -> Any:
    """A part of the state after its use."""
    return moved(tree, parts.mesh, to_host=True) if part in offloaded(parts) else tree


def train_step(parts: StepParts, state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Rollout]:
    """One step of GRPO: sample, score, update."""
    if parts.config.data.pool_factor > 1:
        return update(parts, state, *fill_batch(parts, state, prompts))
    rollout = sample_rollout(parts, state, prompts)
    return update(parts, state, score_rollout(parts, prompts, rollout, state.frozen.get(COLLECTION)))


def noise_key(seed: int, stream: int, step: Int[Array, ""] | int) -> Array:
    """The key of a step's sampling noise; draw number, sample and position are folded in by the sampler."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def casts(path: str, x: Array) -> bool:
    """Whether sampling reads a leaf in the compute dtype; what routes stays as training has it, or experts differ."""
    return jnp.issubdtype(x.dtype, jnp.floating) and re.search(r"/(router/kernel|routing_bias)$", path) is None


def sampling_variables(parts: StepParts, variables: dict[str, Any]) -> dict[str, Any]:
    """The policy as sampling wants it: cast once, each layer's leaves on their own, laid out once.

    In this order: what is cast of a stack stays where it lies, or devices would send float32; and a layer is gathered
    on its own, or whole stacks would stand beside their layers. The output matrix is left to the compiler, which for
    TPUs finds that training gathers the same.
    """
    dtype = jnp.dtype(parts.config.model.compute_dtype)
    others = (COLLECTION, TEACHER)
    policy = {name: tree for name, tree in without_value(variables).items() if name not in others}
    cast = jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtype) if casts(path_name(path), x) else x, policy)
    stacks = jax.tree_util.tree_map_with_path(
        lambda path, x, at: jax.lax.with_sharding_constraint(x, at) if "stack_" in path_name(path) else x,
        cast,
        shardings(cast, parts.mesh),
    )
    layers = unstack(stacks, parts.module.architecture)
    return sampling_layout(layers, parts.mesh, parts.config.mesh.sampling)


def sample_rollout(
    parts: StepParts, state: TrainState, prompts: Prompts, variables: dict[str, Any] | None = None
) -> Rollout:
    """The policy's completions of the prompts; `variables` are its `sampling_variables` where they are made already."""
    if variables is None:
        variables = sampling_variables(parts, {**state.frozen, **state.trainable})
    key = noise_key(parts.config.seed, TRAINING, state.step)
    return draw_completions(parts, variables, prompts, key, parts.config.sampler)


def draw_completions(
    parts: StepParts, variables: dict[str, Any], prompts: Prompts, key: Array, config: SamplerConfig
) -> Rollout:
    """`sample` on the mesh: rows of prompts, slots and completions split over ROW_AXES."""
    mesh = parts.mesh

    def constrain(tree: Any) -> Any:
        return constrain_rows(tree, mesh)

    module = parts.module.clone(scanned=False, remat="none")
    config = choose_pieces(config, mesh.devices.flat[0].platform)
    more = (parts.end_ids, parts.stops, row_shards(mesh), constrain, parts.seed_axis)
    return constrain(sample(module, variables, constrain(prompts), key, config, *more))


def score_rollout(
    parts: StepParts, prompts: Prompts, rollout: Rollout, reward_variables: dict[str, Any] | None = None
) -> Rollout:
    """The rollout with its scores and advantages."""
    return add_advantages(parts, rollout, parts.scorer.score(prompts, rollout, reward_variables))


def add_advantages(parts: StepParts, rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout with scores, and the advantages [B, T] that follow from them."""
    by_value = parts.config.objective.baseline == "value"  # whose advantages `update` makes
    by_token = jnp.zeros_like(rollout.mask) if by_value else token_advantages(parts, rollout, scores)
    scores = scores.replace(failed=jnp.broadcast_to(scores.failed, rollout.weight.shape))
    return rollout.replace(scores=scores, advantages=by_token * rollout.mask)


def token_advantages(parts: StepParts, rollout: Rollout, scores: Scores) -> Float[Array, "B T"] | Float[Array, "B 1"]:
    """Advantages of the outcome, the same for a whole row, or of steps where the scorer rewards steps.

    With steps, the outcome (the weighted components) is the reward of the last token, unless all its weights are 0.
    """
    group, o = parts.config.sampler.group_size, parts.config.objective
    values, valid, weights = scores.values, scores.valid, parts.scorer.row_weights(scores)
    if scores.step_rewards is None or scores.step_ends is None:
        by_row = advantages(values, group, o, rollout.weight, component_weights=weights, valid=valid)
        return by_row[:, None]
    rewards, ends = scores.step_rewards, scores.step_ends
    if any(parts.scorer.weights) or scores.rewards is not None:
        last = jnp.arange(rewards.shape[1]) == rollout.lengths[:, None] - 1
        rewards = rewards + last * jnp.sum(values * valid * weights, axis=1, keepdims=True)
        ends = jnp.maximum(ends, last)
    return advantages(rewards, group, o, rollout.weight, step_ends=ends)


def fill_batch(parts: StepParts, state: TrainState, pool: Prompts) -> tuple[Rollout, "Drawn"]:
    """A scored rollout from as many rounds over the pool as it takes to fill it with groups that have an advantage."""
    variables = sampling_variables(parts, {**state.frozen, **state.trainable})

    def one_round(number: Array) -> tuple[Rollout, Means]:
        prompts = round_prompts(pool, number, parts.config.data.pool_factor)
        rollout = sample_rollout(parts, state, prompts, variables)
        rollout = score_rollout(parts, prompts, rollout, state.frozen.get(COLLECTION))
        return rollout, rollout_means(parts, rollout)

    def go_on(filling: Filling) -> Bool[Array, ""]:
        return anywhere(unfilled(parts, filling), parts.seed_axis)

    def body(filling: Filling) -> Filling:
        return keep_round(parts, filling, *one_round(filling.next), unfilled(parts, filling))

    filling = jax.lax.while_loop(go_on, body, empty(*jax.eval_shape(one_round, jnp.zeros((), jnp.int32))))
    return filled_batch(parts, filling, pool)


def unfilled(parts: StepParts, filling: Filling) -> Bool[Array, ""]:
    """Whether the batch takes another round."""
    return wanting(filling, parts.config.data.pool_factor, parts.config.data.prompts_per_step)


def keep_round(parts: StepParts, filling: Filling, rollout: Rollout, means: Means, live: Array) -> Filling:
    """The filling after a round, its rows laid out as rows are."""
    filling = keep(filling, rollout, means, parts.config.sampler.group_size, live)
    return filling.replace(kept=constrain_rows(filling.kept, parts.mesh))


def pool_round(parts: StepParts, pool: Prompts, filling: Filling | None) -> Prompts:
    """The prompts of the next round, of the first one without a filling: a program of staged mode."""
    number = jnp.zeros((), jnp.int32) if filling is None else filling.next
    return round_prompts(pool, number, parts.config.data.pool_factor)


def keep_scored(parts: StepParts, filling: Filling | None, rollout: Rollout) -> Filling:
    """The filling after a round: a program of staged mode."""
    means = rollout_means(parts, rollout)
    filling = empty(*jax.eval_shape(lambda: (rollout, means))) if filling is None else filling
    return keep_round(parts, filling, rollout, means, jnp.bool_(True))


def filled_batch(parts: StepParts, filling: Filling, pool: Prompts) -> tuple[Rollout, "Drawn"]:
    """The kept groups with the advantages that they have in this batch, and what the step tells of its pool."""
    scores = filling.kept.scores
    assert scores is not None
    rollout = add_advantages(parts, filling.kept, scores.replace(failed=filling.failed))
    means = filling_means(filling, pool, parts.config.sampler.group_size)
    return rollout, Drawn(means, jnp.sum(pool.weight > 0).astype(jnp.int32))


class Drawn(flax.struct.PyTreeNode):
    """What was sampled: metrics, and how many prompts count as drawn (with dynamic sampling: the whole pool)."""

    means: Means
    prompts: Int[Array, ""]


def shape_of_packs(parts: StepParts) -> PackShape:
    """The shape of gradient passes on the mesh."""
    return pack_shape(parts.config, pack_shards(parts.mesh), parts.mesh.shape["sequence"])


def completion_hidden(parts: StepParts, variables: dict[str, Any], pack: Pack) -> Float[Array, "D Q W"]:
    """The hidden state before each completion token of a pack, in the order of `pack.targets`."""
    return pack.predictions(parts.module.apply(variables, pack.tokens, pack.positions, pack.segments))


def completion_logps(
    parts: StepParts, variables: dict[str, Any], pack: Pack, hidden: Float[Array, "D Q W"] | None = None
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probability and entropy at the sampling temperature of each completion token, a row a completion."""
    hidden = completion_hidden(parts, variables, pack) if hidden is None else hidden
    given = (spread_columns(hidden, parts.mesh), unembedding(parts, variables))
    laws = token_logps(*given, spread_columns(pack.targets, parts.mesh), **law_options(parts))
    logps, entropies = (gather_columns(law, pack.targets.shape, parts.mesh) for law in laws)
    return by_row(pack, logps), by_row(pack, entropies)


def unembedding(parts: StepParts, variables: dict[str, Any]) -> Callable[[Array], Array]:
    """From hidden states [R, t, D] to logits."""
    return lambda hidden: parts.module.apply(variables, hidden, method="logits")


def law_options(parts: StepParts) -> dict[str, Any]:
    """How the laws of tokens are made: at the sampling temperature, so many positions at once."""
    config = parts.config
    return {
        "temperature": config.sampler.temperature,
        "chunk": config.model.logits_chunk,
        "entropy_gradient": config.objective.entropy_coef > 0,
    }


def teacher_of(parts: StepParts, variables: dict[str, Any]) -> tuple[StepParts, dict[str, Any]]:
    """Parts and variables with which the teacher reads a pack as the policy does."""
    assert parts.teacher is not None
    return dataclasses.replace(parts, module=parts.teacher), variables[TEACHER]


def distilled_laws(
    parts: StepParts, variables: dict[str, Any], pack: Pack, hidden: Float[Array, "D Q W"]
) -> tuple[Float[Array, "R T"], Float[Array, "R T"], Float[Array, "R T"]]:
    """What `completion_logps` gives, and the reverse KL of each token's law to the teacher's."""
    taught, frozen = teacher_of(parts, variables)
    laws = distilled_logps(
        spread_columns(hidden, parts.mesh),
        unembedding(parts, variables),
        spread_columns(jax.lax.stop_gradient(completion_hidden(taught, frozen, pack)), parts.mesh),
        unembedding(taught, frozen),
        spread_columns(pack.targets, parts.mesh),
        **law_options(parts),
    )
    logps, entropies, kl = (by_row(pack, gather_columns(law, pack.targets.shape, parts.mesh)) for law in laws)
    return logps, entropies, kl


def update(
    parts: StepParts, state: TrainState, rollout: Rollout, drawn: Drawn | None = None
) -> tuple[TrainState, Metrics, Rollout]:
    """Epochs of minibatches of micro-batches: objective, gradient, accumulation, optimizer.

    `drawn` is what dynamic sampling tells; without it the rollout is all that was sampled.
    """
    objective = parts.config.objective
    batch = training_batch(rollout, objective.mask_truncated)
    pieces = constrain_pieces(split(batch, objective.minibatches, shape_of_packs(parts)), parts.mesh)
    if state.reference is not None:
        reference = at_hand(parts, "reference", state.reference)
        pieces = pieces.replace(ref_logps=fixed_law(parts, {**state.frozen, **reference}, pieces)[0])
    pieces, corrected = with_sampled_law(parts, state, pieces)
    if objective.baseline == "value":
        rollout, pieces, told = add_gae(parts, state, rollout, pieces)
        corrected |= told
    if parts.teacher is not None:
        rollout, pieces, told = with_teacher(parts, state, rollout, pieces)
        corrected |= told
    if drawn is None:
        prompts = jnp.sum(rollout.weight > 0) // parts.config.sampler.group_size
        drawn = Drawn(rollout_means(parts, rollout), prompts.astype(jnp.int32))
    divisors = jax.vmap(
        lambda piece: denominators(
            piece.mask.reshape(-1, piece.mask.shape[-1]), batch.mask, objective, piece.weight.reshape(-1), batch.weight
        )
    )(pieces)
    assert rollout.scores is not None
    failed = jnp.any(rollout.scores.failed)

    reference, state = state.reference, state.replace(reference=None)

    def minibatch(state: TrainState, part: tuple[TrainingBatch, Array]) -> tuple[TrainState, UpdateReport]:
        return update_once(parts, state, *part, failed)

    def epoch(state: TrainState, _: None) -> tuple[TrainState, UpdateReport]:
        return jax.lax.scan(minibatch, state, (pieces, divisors))

    state, reports = jax.lax.scan(epoch, state, None, length=objective.num_iterations)
    first = jax.tree.map(lambda x: x[0, 0], reports)  # before any update: the sampler's own parameters
    means = jax.tree.map(jnp.sum, reports.means)
    means |= {name: first.means[name] for name in ("sampler_gap/mean", "entropy")}
    means |= drawn.means | corrected
    means |= {"sampler_gap/max": (first.gap, 1.0), "lr": (parts.schedule(jnp.maximum(state.updates - 1, 0)), 1.0)}
    means |= {"skipped": (jnp.sum(reports.skipped), 1.0)}
    metrics = Metrics(means, jnp.sum(reports.nonfinite, (0, 1)), failed, state.skipped_in_row)
    state = state.replace(step=state.step + 1, draws=state.draws + drawn.prompts, reference=reference)
    return refresh_reference(parts, state), metrics, rollout


class UpdateReport(flax.struct.PyTreeNode):
    """What one optimizer update tells; `gap` is the largest difference to the sampler's log-probabilities."""

    means: Means
    gap: Float[Array, ""]
    skipped: Float[Array, ""]
    nonfinite: Float[Array, "leaves"]


def constrain_pieces(pieces: Any, mesh: Mesh) -> Any:
    """Pieces [M, D, ...] with each part on its devices: with the axis sequence, on all those of its packs' columns."""
    if mesh.shape["sequence"] == 1:
        return pieces
    layout = NamedSharding(mesh, PartitionSpec(None, PACK_AXES))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, layout), pieces)


def collected(parts: StepParts, make: Callable[[Pack], Any], pieces: TrainingBatch) -> Any:
    """What `make` gives for the packs of every minibatch, leaves [R, T], as pieces [M, D, N, G, T]."""
    shape = shape_of_packs(parts)
    return jax.lax.map(lambda piece: make_packs(piece, shape).collect(make, parts.seed_axis), pieces)


def fixed_law(
    parts: StepParts, variables: dict[str, Any], pieces: TrainingBatch
) -> tuple[Float[Array, "M D N G T"], Float[Array, "M D N G T"]]:
    """Log-probabilities and entropies by variables that the updates do not change, a pack at a time."""
    return collected(parts, lambda pack: completion_logps(parts, variables, pack), pieces)


def with_sampled_law(parts: StepParts, state: TrainState, pieces: TrainingBatch) -> tuple[TrainingBatch, Means]:
    """The pieces with corrections to the law that sampled and with the tokens of high entropy, where asked for.

    Both read one pass of the policy before its first update, so that no split of the rollout changes them.
    """
    o = parts.config.objective
    if o.correction == "none" and o.top_entropy_quantile == 1:
        return pieces, {}
    logps, entropies = fixed_law(parts, {**state.frozen, **state.trainable}, pieces)
    means: Means = {}
    if o.correction != "none":
        weights, means = correction_weights(logps, pieces.sampled_logps, pieces.mask, o)
        pieces = pieces.replace(policy_logps=logps, corrections=weights)
    if o.top_entropy_quantile < 1:
        pieces = pieces.replace(selected=top_entropy_mask(entropies, pieces.mask, o.top_entropy_quantile))
    return pieces, means


def completion_values(
    parts: StepParts, variables: dict[str, Any], pack: Pack, hidden: Float[Array, "D Q W"] | None = None
) -> Float[Array, "R T"]:
    """The critic's value before each completion token; `hidden` are the policy's states where they are there."""
    if parts.config.ppo.critic == "model":
        hidden = completion_hidden(parts, {"params": variables["critic"]}, pack)
    elif hidden is None:
        hidden = completion_hidden(parts, variables, pack)
    return by_row(pack, read_values(variables, hidden))


def add_gae(
    parts: StepParts, state: TrainState, rollout: Rollout, pieces: TrainingBatch
) -> tuple[Rollout, TrainingBatch, Means]:
    """Rollout and pieces with generalized advantages, returns and the values before any update, and their metrics."""
    ppo, scores = parts.config.ppo, rollout.scores
    assert scores is not None
    variables = {**state.frozen, **state.trainable}
    values = join(collected(parts, lambda pack: completion_values(parts, variables, pack), pieces))
    mask = rollout.mask * rollout.weight[:, None]
    penalty = None
    if ppo.kl_in_reward:
        assert pieces.ref_logps is not None
        penalty = parts.config.objective.beta * (rollout.logps - join(pieces.ref_logps))
    rewards = token_rewards(parts.scorer.total(scores), mask, penalty)
    if scores.step_rewards is not None:
        rewards = rewards + masked_select(scores.step_rewards, mask)
    advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.lam)
    means = {
        "value/mean": (masked_mean(values, mask), 1.0),
        "value/return": (masked_mean(returns, mask), 1.0),
        "value/explained_variance": (explained_variance(values, returns, mask), 1.0),
    }
    advantages = whiten(advantages, mask) if ppo.whiten_advantages else advantages
    made = {"advantages": advantages, "old_values": values, "returns": returns}
    made = constrain_pieces(split(made, pieces.tokens.shape[0], shape_of_packs(parts)), parts.mesh)
    return rollout.replace(advantages=advantages), pieces.replace(**made), means


def with_teacher(
    parts: StepParts, state: TrainState, rollout: Rollout, pieces: TrainingBatch
) -> tuple[Rollout, TrainingBatch, Means]:
    """Rollout and pieces whose advantages are those of rewards times 1 - distill.weight, and metrics.

    With distill.loss 'sampled' distill.weight (log q - log p) of each token is added, p the law that sampled and q the
    teacher's at the same temperature: the policy gradient of minus the reverse KL's k1 estimate.
    """
    weight = parts.config.distill.weight
    if parts.config.distill.loss == "full":
        scaled = (1 - weight) * pieces.advantages
        assert rollout.advantages is not None
        return rollout.replace(advantages=(1 - weight) * rollout.advantages), pieces.replace(advantages=scaled), {}
    teacher = fixed_law(*teacher_of(parts, state.frozen), pieces)[0]
    distance = masked_select(pieces.old_logps - teacher, pieces.mask)
    mixed = (1 - weight) * pieces.advantages - weight * distance
    told: Means = {"distill/kl": (jnp.sum(distance), jnp.sum(pieces.mask))}
    return rollout.replace(advantages=join(mixed)), pieces.replace(advantages=mixed), told


def micro_loss(
    trainable: Any, parts: StepParts, frozen: Any, pack: Pack, micro: TrainingBatch
) -> tuple[Float[Array, ""], tuple[Means, Array]]:
    """The objective's numerator over the rows of a pack, its metrics, and the largest gap to the sampler."""
    variables, objective = {**frozen, **trainable}, parts.config.objective
    hidden = completion_hidden(parts, variables, pack)
    distance = None
    if parts.teacher is not None and parts.config.distill.loss == "full":
        logps, entropy, distance = distilled_laws(parts, variables, pack, hidden)
    else:
        logps, entropy = completion_logps(parts, variables, pack, hidden)
    if parts.config.ppo.kl_in_reward:
        objective = dataclasses.replace(objective, beta=0.0)  # its KL is a metric alone
    terms = policy_loss_terms(
        logps,
        micro.old_logps if micro.policy_logps is None else micro.policy_logps,
        micro.ref_logps,
        micro.advantages,
        micro.mask,
        objective,
        micro.weight,
        entropies=entropy,
        corrections=micro.corrections,
        selected=micro.selected,
    )
    numerator, count = terms.numerator, jnp.sum(micro.mask)
    gap = masked_select(jnp.abs(jax.lax.stop_gradient(logps) - micro.old_logps), micro.mask)
    means: Means = {METRIC_NAMES[name]: pair for name, pair in terms.metrics.items() if name in METRIC_NAMES}
    means |= {
        "entropy": (jnp.sum(masked_select(entropy, micro.mask)), count),
        "sampler_gap/mean": (jnp.sum(gap), count),
    }
    if distance is not None:
        numerator += parts.config.distill.weight * weighted_sum(distance, micro.mask, objective, micro.weight)
        means["distill/kl"] = (jnp.sum(masked_select(jax.lax.stop_gradient(distance), micro.mask)), count)
    if micro.returns is not None:
        value_numerator, value_means = value_terms(parts, variables, pack, micro, hidden)
        numerator, means = numerator + parts.config.ppo.vf_coef * value_numerator, means | value_means
    return numerator, (means, jnp.max(gap))


def value_terms(
    parts: StepParts, variables: dict[str, Any], pack: Pack, micro: TrainingBatch, hidden: Float[Array, "D Q W"]
) -> tuple[Float[Array, ""], Means]:
    """The value loss of a pack, its tokens weighed as the policy's are, and its metrics."""
    assert micro.returns is not None and micro.old_values is not None
    values = completion_values(parts, variables, pack, hidden)
    clip = parts.config.ppo.cliprange_value
    losses, clipped = value_losses(values, micro.old_values, micro.returns, micro.mask, clip)
    numerator = weighted_sum(losses, micro.mask, parts.config.objective, micro.weight)
    told = {"value/loss": jax.lax.stop_gradient(losses), "value/clip": clipped.astype(jnp.float32)}
    count = jnp.sum(micro.mask)
    return numerator, {name: (jnp.sum(masked_select(x, micro.mask)), count) for name, x in told.items()}


def update_once(
    parts: StepParts, state: TrainState, piece: TrainingBatch, divisor: Array, failed: Array
) -> tuple[TrainState, UpdateReport]:
    """One optimizer update from a minibatch [D, N, G, ...]; skipped when anything is not finite."""
    loss, gradient, means, gap = minibatch_gradient(parts, state, piece, divisor)
    gradient, loads = split_routing_biases(gradient)
    squares = sums_of_squares(gradient)
    norm = jnp.sqrt(jnp.sum(squares))
    good = jnp.isfinite(norm) & jnp.isfinite(loss) & ~failed
    before = at_hand(parts, "opt_state", state.opt_state)
    changes, opt_state = parts.optimizer.update(gradient, before, state.trainable, good=good)
    changes = move_routing_biases(changes, loads, parts.config.optim.routing_bias_rate)
    trainable = optax.apply_updates(state.trainable, changes)

    trainable = keep_if(good, trainable, state.trainable)
    opt_state = keep_state_if(good, opt_state, before)
    state = state.replace(
        trainable=trainable,
        opt_state=put_away(parts, "opt_state", opt_state),
        updates=state.updates + good,
        skipped=state.skipped + ~good,
        skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
    )
    means = means | {"loss": (loss, 1.0), "grad_norm": (norm, 1.0)}
    return state, UpdateReport(means, gap, 1.0 - good, 1.0 - jnp.isfinite(squares))


def minibatch_gradient(
    parts: StepParts, state: TrainState, piece: TrainingBatch, divisor: Array
) -> tuple[Float[Array, ""], Any, Means, Float[Array, ""]]:
    """Loss, float32 gradient, metrics and largest sampler gap of a minibatch, summed over its packs.

    Where there can be one pack only its gradient is taken as it is: a sum holds two gradients at a time. It stands in a
    loop all the same, whose zeros are made of the number of packs: XLA makes constant ones, also those that the scan
    over layers needs, before sampling, and keeps them beside the cache.
    """
    packs = make_packs(piece, shape_of_packs(parts))

    def share(trainable: Any, *given: Any) -> tuple[Float[Array, ""], tuple[Means, Float[Array, ""]]]:
        numerator, told = micro_loss(trainable, parts, *given)
        return safe_divide(numerator, divisor), told  # here, where it costs no pass over the gradient

    def pass_over(number: Array) -> tuple[tuple[Array, tuple[Means, Array]], Any]:
        found, gradient = jax.value_and_grad(share, has_aux=True)(state.trainable, state.frozen, *packs.pick(number))
        return found, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

    def add(number: Array, total: tuple[Any, Array, Means, Array]) -> tuple[Any, Array, Means, Array]:
        (loss, (means, gap)), gradient = pass_over(number)
        if packs.at_most_one:
            return gradient, loss, means, gap
        gradient, loss, means = jax.tree.map(jnp.add, total[:3], (gradient, loss, means))
        return gradient, loss, means, jnp.maximum(total[3], gap)

    (loss, (means, gap)), gradient = jax.eval_shape(pass_over, jnp.zeros((), jnp.int32))
    nothing = (packs.count < 0).astype(jnp.float32)
    zeros = jax.tree.map(lambda x: jnp.full(x.shape, nothing, x.dtype), (gradient, loss, means, gap))
    gradient, loss, means, gap = loop(packs.count, add, zeros, parts.seed_axis)
    return loss, gradient, means, gap


def refresh_reference(parts: StepParts, state: TrainState) -> TrainState:
    """The reference becomes the policy after every `reference_every` steps, or at the end of an outer iteration."""
    every = refresh_interval(parts.config)
    if state.reference is None or every == 0:
        return state
    due = state.step % every == 0
    policy, before = without_value(state.trainable), at_hand(parts, "reference", state.reference)
    reference = jax.tree.map(lambda n, o: jnp.where(due, n, o), policy, before)
    return state.replace(reference=put_away(parts, "reference", reference))


def refresh_interval(config: Config) -> int:
    """Steps after which the reference becomes the policy; 0: never."""
    outer = config.objective.outer_iterations
    return config.train.steps // outer if outer > 1 else config.objective.reference_every


def rollout_means(parts: StepParts, rollout: Rollout) -> Means:
    """Rewards, groups and lengths; a completion is right when its first reward component is at least 1.

    Where prompts differ in rewards, those that the first component is not asked about are neither right nor wrong.
    """
    scores, weight = rollout.scores, rollout.weight
    assert scores is not None and rollout.advantages is not None
    rows, group = jnp.sum(weight), parts.config.sampler.group_size
    graded = weight if scores.rewards is None else weight * scores.rewards.applies[:, 0]
    right = graded * (scores.values[:, 0] >= 1.0) * scores.valid[:, 0]
    wrong = graded - right
    by_group = right.reshape(-1, group).sum(axis=1)
    real = graded.reshape(-1, group).sum(axis=1)
    lengths = rollout.lengths.astype(jnp.float32)
    tokens = jnp.sum(lengths * weight)
    means: Means = {
        "reward/total": (jnp.sum(parts.scorer.total(scores) * weight), rows),
        "solve_rate": (jnp.sum(right), jnp.sum(graded)),
        "groups/all_right": (jnp.sum((by_group == real) & (real > 0)) * 1.0, 1.0),
        "groups/all_wrong": (jnp.sum((by_group == 0) & (real > 0)) * 1.0, 1.0),
        "advantage/mean_abs": (jnp.sum(jnp.abs(rollout.advantages) * weight[:, None]), tokens),
        "length/mean": (tokens, rows),
        "length/right": (jnp.sum(lengths * right), jnp.sum(right)),
        "length/wrong": (jnp.sum(lengths * wrong), jnp.sum(wrong)),
        "truncated": (jnp.sum(weight * ~rollout.ended), rows),
        "occupancy": occupancy(rollout, parts.config.sampler.slots),
        "tokens": (tokens, 1.0),
    }
    for c, name in enumerate(parts.scorer.names):
        counted = scores.valid[:, c] * weight
        means[f"reward/{name}"] = (jnp.sum(scores.values[:, c] * counted), jnp.sum(counted))
    return means | set_means(parts, rollout, right, graded)


def set_means(parts: StepParts, rollout: Rollout, right: Float[Array, "B"], graded: Float[Array, "B"]) -> Means:
    """Reward, solve rate, length and share of the completions of each prompt set."""
    scores, weight, means = rollout.scores, rollout.weight, {}
    assert scores is not None
    for number, each in enumerate(parts.config.data.sets):
        assert scores.rewards is not None
        member = (scores.rewards.member == number).astype(weight.dtype)
        rows = jnp.sum(weight * member)
        means |= {
            f"set_reward/{each.name}": (jnp.sum(parts.scorer.total(scores) * weight * member), rows),
            f"set_solve_rate/{each.name}": (jnp.sum(right * member), jnp.sum(graded * member)),
            f"set_length/{each.name}": (jnp.sum(rollout.lengths * weight * member), rows),
            f"set_share/{each.name}": (rows, jnp.sum(weight)),
        }
    return means


def occupancy(rollout: Rollout, slots: int) -> Mean:
    """Decoding slots that held a live row, summed over passes, and slots x passes."""
    passes = jnp.maximum(rollout.lengths - 1, 0)
    slots = min(slots or passes.shape[0], passes.shape[0])
    return jnp.sum(passes) * 1.0, jnp.max(rollout.started + passes) * float(slots)


class Program:
    """The compiled step: `program(state, prompts) -> (state, metrics, rollout)`, the state donated.

    `traces` counts how often Python built a program: once in fused mode. In staged mode `seconds`
    holds what each phase of the last call took. `paths` names the leaves of `Metrics.nonfinite`.
    """

    def __init__(self, parts: StepParts, state: TrainState):
        self.parts = parts
        self.traces = 0
        self.seconds: dict[str, float] = {}
        self.paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.trainable)[0]]
        layout = jax.tree.map(lambda x: x.sharding, state)
        rows, whole = row_sharding(parts.mesh), replicated(parts.mesh)
        stepped = {"in_shardings": (layout, rows), "out_shardings": (layout, whole, rows), "donate_argnums": 0}
        self._staged = parts.config.step.mode == "staged"
        self._pooled = parts.config.data.pool_factor > 1
        if self._staged:
            self.sample = self._compiled(sample_rollout, in_shardings=(layout, rows), out_shardings=rows)
            self.score_in_graph = self._compiled(
                lambda parts, *given, **more: parts.scorer.score_in_graph(*given, **more)
            )
            self.add_advantages = self._compiled(add_advantages, out_shardings=rows)
            if self._pooled:
                stepped["in_shardings"] = (layout, rows, whole)
                self.round_prompts = self._compiled(pool_round, out_shardings=rows)
                self.keep = self._compiled(keep_scored)
                self.wanting = self._compiled(unfilled)
                self.filled = self._compiled(filled_batch, out_shardings=(rows, whole))
            self.update = self._compiled(update, **stepped)
        else:
            self.fused = self._compiled(train_step, **stepped)

    def _compiled(self, function: Callable[..., Any], **options: Any) -> Any:
        def program(*arguments: Any, **named: Any) -> Any:
            self.traces += 1
            with jax.default_matmul_precision(self.parts.config.model.matmul_precision):
                return function(self.parts, *arguments, **named)

        program.__name__ = function.__name__.strip("<>")  # what profiles and compile logs show
        return jax.jit(program, **options)

    def compile(self, state: TrainState, prompts: Prompts) -> None:
        """Compiles the fused step before the first call; staged programs compile when they first run."""
        if not self._staged:
            options = options_of_cpu(self.parts.mesh)
            give_back_host_memory()
            self.fused = self.fused.lower(state, prompts).compile(compiler_options=options)
            give_back_host_memory()

    def __call__(self, state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Rollout]:
        """Runs one step; in staged mode it waits for each phase."""
        if not self._staged:
            return self.fused(state, prompts)
        self.seconds = {"sample": 0.0, "score": 0.0}
        if self._pooled:
            rollout = self._fill_staged(state, prompts)
            return self._phase("update", lambda: self.update(state, *rollout))
        rollout = self._round_staged(state, prompts)
        return self._phase("update", lambda: self.update(state, rollout))

    def _round_staged(self, state: TrainState, prompts: Prompts) -> Rollout:
        rollout = self._phase("sample", lambda: self.sample(state, prompts))

        def score() -> Rollout:
            in_graph = functools.partial(self.score_in_graph, variables=state.frozen.get(COLLECTION))
            scores = self.parts.scorer.score_on_host(prompts, rollout, in_graph, Fetcher())
            return self.add_advantages(rollout, scores)

        return self._phase("score", score)

    def _fill_staged(self, state: TrainState, pool: Prompts) -> tuple[Rollout, Drawn]:
        """As `fill_batch`, by a loop of the host."""
        filling, fetch = None, Fetcher()
        while filling is None or fetch(self.wanting(filling)):
            prompts = self.round_prompts(pool, filling)
            filling = self.keep(filling, self._round_staged(state, prompts))
        return self.filled(filling, pool)

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = jax.block_until_ready(work())
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return result
