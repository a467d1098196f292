"""Dynamic sampling: rounds over a pool of prompts until a batch is full of groups that have something to teach.

DAPO, arXiv 2503.14476, 3.2: a group whose rewards are all equal has advantages of 0 and is sampled anew from other
prompts. A step is given a fixed pool of K x N prompts, so that its shapes and the order of the data are known
beforehand: the pool of step s holds draws s K N to (s + 1) K N - 1, whether they are sampled or not. (Prompts left
over could only be handed in again by a host that waits for each step's outcome; here it runs a step ahead.)
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.metrics import Mean
from grpo_jax.sampler.types import Prompts, Rollout

STEP_TOTALS = ("groups/all_right", "groups/all_wrong", "tokens")  # metrics that count in a step, not in a round


class Filling(flax.struct.PyTreeNode):
    """How far the filling of a batch of N groups has come.

    Attributes:
      kept: the groups kept so far, in the order of their rounds; rows of places that are empty have weight 0.
      groups: how many those are.
      next: number of the next round, the same for all that run side by side.
      rounds: rounds that this batch took part in.
      sampled: prompts sampled.
      without_signal: their groups whose advantages were all 0.
      means: metrics over everything sampled, kept or not.
      failed: a host reward failed.
    """

    kept: Rollout
    groups: Int[Array, ""]
    next: Int[Array, ""]
    rounds: Int[Array, ""]
    sampled: Float[Array, ""]
    without_signal: Float[Array, ""]
    means: dict[str, Mean]
    failed: Bool[Array, ""]


def empty(rollout: Rollout, means: dict[str, Mean]) -> Filling:
    """Nothing kept yet, by the shapes of a scored rollout of one round and of its metrics."""
    kept, means = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (rollout, means))
    zero = jnp.zeros((), jnp.int32)
    return Filling(kept, zero, zero, zero, jnp.zeros(()), jnp.zeros(()), means, jnp.bool_(False))


def wanting(filling: Filling, factor: int, groups: int) -> Bool[Array, ""]:
    """Whether a batch of `groups` takes another round: places are empty, the pool is not, and no reward failed."""
    return (filling.groups < groups) & (filling.next < factor) & ~filling.failed


def round_prompts(pool: Prompts, number: Int[Array, ""], factor: int) -> Prompts:
    """The prompts of a round: every `factor`-th of the pool, so that devices that share its rows share the round's."""

    def leaf(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x.reshape(-1, factor, *x.shape[1:]), number, 1, keepdims=False)

    return jax.tree.map(leaf, pool)


def keep(filling: Filling, rollout: Rollout, means: dict[str, Mean], group_size: int, live: Bool[Array, ""]) -> Filling:
    """The filling after a round: its groups with an advantage that is not 0 take the empty places, in order.

    Tokens, lengths and log-probabilities of whole groups move; caches do not. Where `live` is False nothing changes
    but the number of the next round.
    """
    assert rollout.scores is not None and rollout.advantages is not None
    groups = rollout.weight.shape[0] // group_size

    def by_group(x: Array) -> Bool[Array, "N"]:
        return jnp.any(x.reshape(groups, -1) != 0, axis=1)

    real = by_group(rollout.weight)
    signal = real & by_group(rollout.advantages)
    places = jnp.arange(groups)
    # Stable: those kept before, those with a signal, then empty places (of which there are enough), then the rest.
    order = jnp.argsort(jnp.concatenate([jnp.where(places < filling.groups, 0, 2), jnp.where(signal, 1, 3)]))[:groups]
    rows = (order[:, None] * group_size + jnp.arange(group_size)).reshape(-1)
    kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], filling.kept, rollout)
    new = Filling(
        kept=kept.replace(group=jnp.repeat(places.astype(jnp.int32), group_size)),
        groups=jnp.minimum(filling.groups + jnp.sum(signal), groups).astype(jnp.int32),
        next=filling.next,
        rounds=filling.rounds + 1,
        sampled=filling.sampled + jnp.sum(real),
        without_signal=filling.without_signal + jnp.sum(real & ~signal),
        means=jax.tree.map(jnp.add, filling.means, means),
        failed=filling.failed | jnp.any(rollout.scores.failed),
    )
    new = jax.tree.map(lambda n, o: jnp.where(live, n, o), new, filling)
    return new.replace(next=filling.next + 1)


def filling_means(filling: Filling, pool: Prompts, group_size: int) -> dict[str, Mean]:
    """Metrics of the step: those of everything sampled, and what became of the pool.

    `pool/sampled` = groups kept + `pool/without_signal` + `pool/surplus` (with a signal, but the batch was full);
    `pool/empty` places of the batch hold no group; `pool/unused` prompts were drawn and not sampled.
    """
    groups = filling.kept.weight.shape[0] // group_size
    told = {
        "pool/rounds": filling.rounds,
        "pool/sampled": filling.sampled,
        "pool/without_signal": filling.without_signal,
        "pool/surplus": filling.sampled - filling.without_signal - filling.groups,
        "pool/empty": groups - filling.groups,
        "pool/unused": jnp.sum(pool.weight) - filling.sampled,
    }
    totals = {name: (filling.means[name][0], 1.0) for name in STEP_TOTALS}
    return filling.means | totals | {name: (value.astype(jnp.float32), 1.0) for name, value in told.items()}
