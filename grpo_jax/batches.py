"""From a rollout to what the loss reads: rows, minibatches, and the packs that gradient passes run over.

Rows are [B, ...]; the pieces of `split` are [M, D, N, G, ...]: M minibatches, D parts (the devices that rows are split
over), N groups of G rows that go into a pack together. With shared prompts those are the groups of the rollout, else
each completion is a group of its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.config import Config
from grpo_jax.ops.packing import (
    Pack,
    Packing,
    gather_groups,
    move,
    pack_groups,
    pack_index,
    plain_pack,
    plain_sequences,
    rows_apart,
    shared_pack,
)
from grpo_jax.sampler.types import Rollout

PACKS = "packs"  # name of the loop in the compiled program, where reports look for it


class TrainingBatch(flax.struct.PyTreeNode):
    """What the loss reads, row by row; the last five are made on the way where an option asks for them."""

    prompt_tokens: Int[Array, "*B P"]
    prompt_lengths: Int[Array, "*B"]
    tokens: Int[Array, "*B T"]
    lengths: Int[Array, "*B"]
    old_logps: Float[Array, "*B T"]
    sampled_logps: Float[Array, "*B T"]
    advantages: Float[Array, "*B T"]
    mask: Float[Array, "*B T"]
    weight: Float[Array, "*B"]
    ref_logps: Float[Array, "*B T"] | None = None
    policy_logps: Float[Array, "*B T"] | None = None  # the trainer's own, before its first update
    corrections: Float[Array, "*B T"] | None = None
    selected: Float[Array, "*B T"] | None = None
    old_values: Float[Array, "*B T"] | None = None
    returns: Float[Array, "*B T"] | None = None


def training_batch(rollout: Rollout, mask_truncated: bool) -> TrainingBatch:
    """The rows of a rollout; the loss mask leaves out filler and, when asked, what did not end."""
    counted = rollout.weight * (rollout.ended if mask_truncated else 1.0)
    return TrainingBatch(
        prompt_tokens=rollout.prompt_tokens,
        prompt_lengths=rollout.prompt_lengths,
        tokens=rollout.tokens,
        lengths=rollout.lengths,
        old_logps=rollout.logps,
        sampled_logps=rollout.sampled_logps,
        advantages=jnp.zeros_like(rollout.mask) if rollout.advantages is None else rollout.advantages,
        mask=rollout.mask * counted[:, None],
        weight=rollout.weight,
    )


@dataclasses.dataclass(frozen=True)
class PackShape:
    """The static shape of packs on each of `parts` devices: `rows` rows of T tokens (P + T where prompts are not
    shared), `prompts` groups of `group` completions. Each lies over `chunks` devices, by columns.
    """

    parts: int
    group: int
    rows: int
    prompts: int
    shared: bool
    chunks: int = 1

    @property
    def apart(self) -> bool:
        """Whether a pack's prompts have rows of their own."""
        return self.shared and rows_apart(self.rows, self.prompts, self.group)


def pack_shape(config: Config, parts: int, chunks: int = 1) -> PackShape:
    """The shape that a config asks for, for gradient passes on `parts` x `chunks` devices."""
    shared, size = config.train.share_prefix, config.sampler.group_size
    group = size if shared else 1
    rows = max(math.ceil(config.objective.micro_batch_size / parts), group)
    prompts = config.train.pack_prompts or (rows // group if shared else 4 * rows)
    rows = min(rows, prompts * group)  # more hold nothing
    return PackShape(parts, group, rows, prompts, shared, chunks)


def split(batch: Any, minibatches: int, shape: PackShape) -> Any:
    """[B, ...] to [M, D, N, G, ...]: of each part, group g belongs to minibatch g % M."""

    def leaf(x: Array) -> Array:
        groups = x.reshape(shape.parts, -1, minibatches, shape.group, *x.shape[1:])
        return jnp.moveaxis(groups, 2, 0)

    return jax.tree.map(leaf, batch)


def join(x: Array) -> Array:
    """The inverse of `split` for one array."""
    return jnp.moveaxis(x, 0, 2).reshape(-1, *x.shape[4:])


class Packs(flax.struct.PyTreeNode):
    """The packs of a minibatch; the same number on all devices, `count`."""

    piece: TrainingBatch
    sizes: Int[Array, "D N G"]
    packing: Packing
    count: Int[Array, ""]
    shape: PackShape = flax.struct.field(pytree_node=False)

    @property
    def at_most_one(self) -> bool:
        """Whether one pack holds the minibatch whatever its lengths: its rows and prompts are as many."""
        _, groups, group = self.piece.lengths.shape
        return groups <= self.shape.prompts and groups * group <= self.shape.rows

    def pick(self, number: Int[Array, ""]) -> tuple[Pack, TrainingBatch]:
        """A pack for the model, and the rows [R, ...] of its completions (R = D x prompts x group)."""
        shape = (self.shape.prompts, self.shape.rows, pack_width(self.piece, self.shape))
        index = pack_index(self.packing, self.sizes, number, shape)
        held = gather_groups(self.piece, index.groups)
        real = (index.groups >= 0)[..., None]
        held = held.replace(mask=held.mask * real[..., None], weight=held.weight * real)
        prompts, prompt_lengths = held.prompt_tokens[:, :, 0], held.prompt_lengths[:, :, 0]
        if self.shape.shared:
            pack = shared_pack(prompts, prompt_lengths, held.tokens, index, self.shape.chunks)
        else:
            sequences = plain_sequences(prompts, prompt_lengths, held.tokens)
            pack = plain_pack(sequences, prompt_lengths, held.tokens.shape[-1], index)
        return pack, jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), held)

    def collect(self, make: Callable[[Pack], Any], seed_axis: str | None = None) -> Any:
        """What `make` gives for each pack, leaves [R, T], as pieces [D, N, G, T]."""
        parts, groups, group = self.piece.lengths.shape
        rows = (parts, self.shape.prompts, group)

        def one(number: Array) -> Any:
            return jax.tree.map(lambda x: x.reshape(*rows, -1), make(self.pick(number)[0]))

        def body(number: Array, stored: Any) -> Any:
            return jax.tree.map(lambda s, x: s.at[number].set(x), stored, one(number))

        shapes = jax.eval_shape(one, jnp.zeros((), jnp.int32))
        stored = jax.tree.map(lambda x: jnp.zeros((groups, *x.shape), x.dtype), shapes)
        stored = loop(self.count, body, stored, seed_axis)
        pack, slot = self.packing.pack, self.packing.slot
        return jax.tree.map(lambda x: jax.vmap(lambda s, k, n: s[k, n], (1, 0, 0))(x, pack, slot), stored)


def make_packs(piece: TrainingBatch, shape: PackShape) -> Packs:
    """The packs of a minibatch [D, N, G, ...]; rows that count nowhere lie in none."""
    counted = jnp.any(piece.mask > 0, axis=-1)
    sizes = piece.lengths if shape.shared else piece.lengths + piece.prompt_lengths
    sizes = jnp.where(counted, sizes, 0)
    packing = pack_groups(sizes, shape.rows, pack_width(piece, shape), shape.prompts)
    return Packs(piece, sizes, packing, jnp.max(packing.count), shape)


def pack_width(piece: TrainingBatch, shape: PackShape) -> int:
    """Columns of a pack's rows: T, or P + T where completions bring their prompts."""
    return piece.tokens.shape[-1] + (0 if shape.shared else piece.prompt_tokens.shape[-1])


def loop(count: Int[Array, ""], body: Callable[[Array, Any], Any], carry: Any, seed_axis: str | None = None) -> Any:
    """`body` of 0 to count - 1; under a `vmap` over seeds to the largest count, so that nothing is selected."""
    count = count if seed_axis is None else jax.lax.pmax(count, seed_axis)
    with jax.named_scope(PACKS):
        return jax.lax.fori_loop(0, count, body, carry)


def by_row(pack: Pack, values: Float[Array, "D Q"]) -> Float[Array, "R T"]:
    """What stands at a pack's predictions, where it belongs: a row a completion, 0 in the padding."""
    return move(values, pack.rows, pack.back).reshape(-1, pack.rows.shape[-1])
