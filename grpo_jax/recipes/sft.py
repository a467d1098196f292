"""Supervised fine-tuning: next-token cross-entropy on assistant tokens only."""

import dataclasses
import functools
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from grpo_jax.config import Config, SftConfig, TextConfig
from grpo_jax.data.order import row_order
from grpo_jax.errors import InputError
from grpo_jax.metrics import Mean, read_jsonl
from grpo_jax.models.decoder import DecoderModule
from grpo_jax.ops.logprobs import token_logps
from grpo_jax.ops.masked import safe_divide
from grpo_jax.parallel import place
from grpo_jax.recipes.loop import Stop
from grpo_jax.recipes.supervised import descend, drawn_batch, supervised_optim, supervised_program, train_on_rows
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_chat

OPEN_PACKS = 64  # packs that first fit looks at: the last ones, so that packing n examples takes O(n)

Example = tuple[list[int], list[int]]  # token ids, and 1 where the loss counts


class SftBatch(flax.struct.PyTreeNode):
    """Packs of examples: `segments` numbers a pack's examples from 1 (0 is padding), `mask` is 1 on what is learned."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    mask: Float[Array, "B S"]


def read_chats(path: str, config: TextConfig, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Examples of a JSONL file of {'messages': [...]} or {'prompt', 'completion'} rows.

    Raises InputError naming file, row and fix: no such file, no rows, other columns, rows that are too long.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"sft.path={path!r}: no such file; give a JSONL file of chats")
    examples = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if "messages" in row:
            messages = row["messages"]
        elif {"prompt", "completion"} <= row.keys():
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        else:
            raise InputError(f"{path}: row {number} has {sorted(row)}, not 'messages' nor 'prompt' and 'completion'")
        try:
            ids, mask = encode_chat(messages, config, tokenizer)
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from None
        if len(ids) > max_length:
            raise InputError(f"{path}: row {number} has {len(ids)} tokens, more than max_length={max_length}")
        examples.append((ids, mask))
    if not examples:
        raise InputError(f"sft.path={path!r}: has no rows")
    return examples


def pack(examples: Sequence[Example], length: int, seed: int) -> list[list[int]]:
    """Examples by number, put together in packs of at most `length` tokens: first fit in a seeded order.

    Examples of a pack do not see each other, so the loss is that of separate rows.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for number in row_order(np.arange(len(examples)), len(examples), seed, True).tolist():
        size = len(examples[number][0])
        place = next((i for i in range(max(len(packs) - OPEN_PACKS, 0), len(packs)) if room[i] >= size), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(length)
        packs[place].append(number)
        room[place] -= size
    return packs


def make_sft_batch(examples: Sequence[Example], packs: Sequence[Sequence[int]], length: int) -> SftBatch:
    """The packs as numpy arrays [B, length]."""
    arrays = {name: np.zeros((len(packs), length), np.int32) for name in ("tokens", "positions", "segments")}
    mask = np.zeros((len(packs), length), np.float32)
    for row, numbers in enumerate(packs):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            ids, counted = examples[number]
            here = slice(start, start + len(ids))
            arrays["tokens"][row, here], mask[row, here] = ids, counted
            arrays["positions"][row, here], arrays["segments"][row, here] = np.arange(len(ids)), segment
            mask[row, start] = 0.0  # nothing before it says what an example's first token is
            start += len(ids)
    return SftBatch(**arrays, mask=mask)  # pyright: ignore[reportArgumentType]


def sft_loss(module: DecoderModule, variables: Any, batch: SftBatch, chunk: int = 0) -> tuple[Array, dict[str, Mean]]:
    """Mean over counted tokens of -log p(token | tokens before it)."""
    hidden = module.apply(variables, batch.tokens, batch.positions, batch.segments)

    def unembed(hidden: Array) -> Array:
        return module.apply(variables, hidden, method="logits")

    logps, _ = token_logps(hidden[:, :-1], unembed, batch.tokens[:, 1:], 1.0, chunk)
    mask = batch.mask[:, 1:]
    total, count = -jnp.sum(logps * mask), jnp.sum(mask)
    return safe_divide(total, count), {"sft/loss": (total, count)}


def steps_of(sft: SftConfig, packs: int) -> int:
    """Optimizer steps: as many as `epochs` of the packs take, the last batch filled up; else `steps`."""
    return -(-sft.epochs * packs // sft.batch_size) if sft.epochs else sft.steps


def fine_tune(
    config: Config,
    sft: SftConfig,
    module: DecoderModule,
    params: Any,
    examples: Sequence[Example],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
    name: str,
) -> Any:
    """Parameters after `sft.steps` steps from `params`; checkpoints and metrics lie in `workdir`."""
    collections = (place({"params": params}, mesh), {})
    return fit(config, sft, module, collections, examples, mesh, workdir, stop, terminal, name)["params"]


def fit(
    config: Config,
    sft: SftConfig,
    module: DecoderModule,
    collections: tuple[Any, Any],
    examples: Sequence[Example],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
    name: str,
    about: Mapping[str, Any] = types.MappingProxyType({}),
    save_last: bool = True,
) -> Any:
    """The trained collections after `sft.steps` steps, or `sft.epochs`, from `collections`, (trainable, frozen).

    `about` is what checkpoints say of a frozen base, which they do not hold; `save_last` as in `Loop`.
    """

    def loss(trainable: Any, frozen: Any, batch: SftBatch) -> tuple[Array, dict[str, Mean]]:
        return sft_loss(module, {**frozen, **trainable}, batch, config.model.logits_chunk)

    packs = pack(examples, sft.max_length, config.seed)
    sft = dataclasses.replace(sft, steps=steps_of(sft, len(packs)))
    if sft.epochs:
        terminal.say(f"{len(packs)} packs, {sft.epochs} epochs: {sft.steps} steps")

    def batch(step: int) -> SftBatch:
        return drawn_batch(config, sft, step, packs, lambda own: make_sft_batch(examples, own, sft.max_length), mesh)

    program = supervised_program(config, supervised_optim(sft), sft.steps, loss, collections, mesh)
    return descend(config, sft.steps, program, collections, batch, workdir, stop, terminal, name, about, save_last)


def run(config: Config, workdir: pathlib.Path, terminal: Terminal | None = None) -> str:
    """`grpo-jax sft`: fine-tunes `model.path` on `sft.path`; returns the folder of the result.

    Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    train = functools.partial(fit, config, config.sft)
    return train_on_rows(config, config.sft, "sft", read_chats, train, workdir, terminal)
