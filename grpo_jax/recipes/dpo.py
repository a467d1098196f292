"""Direct preference optimisation: pairs of a chosen and a rejected answer, no sampling and no reward.

The reference is the model that the run starts from (with `lora.rank`, the base and the adapters at the start); it is
made again when a run goes on.
"""

import functools
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from grpo_jax.config import Config, DpoConfig, TextConfig
from grpo_jax.errors import InputError
from grpo_jax.metrics import Mean, read_jsonl
from grpo_jax.models.decoder import DecoderModule
from grpo_jax.ops.logprobs import token_logps
from grpo_jax.ops.preference import dpo_losses, sequence_logps
from grpo_jax.recipes.loop import Stop
from grpo_jax.recipes.sft import Example
from grpo_jax.recipes.supervised import descend, drawn_batch, supervised_optim, supervised_program, train_on_rows
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_chat

Pair = tuple[Example, Example]  # chosen, rejected: token ids, and 1 where the answer is


class PreferenceBatch(flax.struct.PyTreeNode):
    """Pairs of sequences, chosen first, padded on the right; `mask` is 1 on the tokens of the answers."""

    tokens: Int[Array, "B 2 S"]
    lengths: Int[Array, "B 2"]
    mask: Float[Array, "B 2 S"]


def read_preferences(path: str, config: TextConfig, tokenizer: Tokenizer, max_length: int) -> list[Pair]:
    """Pairs of a JSONL file, rows as TRL has them.

    {'prompt', 'chosen', 'rejected'} as texts or as lists of messages, or {'chosen', 'rejected'} as whole conversations
    that differ in their last message. Raises InputError naming file, row and fix.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"dpo.path={path!r}: no such file; give a JSONL file of preferences")
    pairs = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            prompt, answers = conversation(row)
            pair = [encode_answer(prompt, answer, config, tokenizer) for answer in answers]
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from None
        longest = max(len(ids) for ids, _ in pair)
        if longest > max_length:
            raise InputError(f"{path}: row {number} has {longest} tokens, more than dpo.max_length={max_length}")
        if pair[0] == pair[1]:
            raise InputError(f"{path}: row {number}: chosen and rejected are the same: it prefers nothing, remove it")
        pairs.append((pair[0], pair[1]))
    if not pairs:
        raise InputError(f"dpo.path={path!r}: has no rows")
    return pairs


def conversation(row: dict[str, Any]) -> tuple[list[dict], list[list[dict]]]:
    """(messages of the prompt, [messages of the chosen answer, of the rejected one])."""
    if not {"chosen", "rejected"} <= row.keys():
        raise InputError(f"has {sorted(row)}, not 'chosen' and 'rejected' (and 'prompt')")
    answers = [_messages(row[name], "assistant", name) for name in ("chosen", "rejected")]
    if "prompt" in row:
        return _messages(row["prompt"], "user", "prompt"), answers
    if isinstance(row["chosen"], str) or answers[0][:-1] != answers[1][:-1] or len(answers[0]) < 2:
        raise InputError(
            "'chosen' and 'rejected' must be conversations with the same messages but the last: add 'prompt'"
        )
    return answers[0][:-1], [answer[-1:] for answer in answers]


def _messages(value: Any, role: str, name: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise InputError(f"{name!r} is {type(value).__name__}: must be a text or a list of messages")
    return value


def encode_answer(prompt: list[dict], answer: list[dict], config: TextConfig, tokenizer: Tokenizer) -> Example:
    """Ids of prompt and answer, and 1 on the answer's own tokens: earlier turns of the assistant do not count."""
    ids, mask = encode_chat([*prompt, *answer], config, tokenizer)
    earlier = sum(message.get("role") == "assistant" for message in prompt)
    starts = [i for i, (before, now) in enumerate(zip([0, *mask], mask, strict=False)) if now > before]
    first = starts[earlier] if earlier < len(starts) else len(mask)
    return ids, [0] * first + mask[first:]


def make_preference_batch(pairs: Sequence[Pair], length: int) -> PreferenceBatch:
    """The pairs as numpy arrays."""
    tokens, lengths = np.zeros((len(pairs), 2, length), np.int32), np.zeros((len(pairs), 2), np.int32)
    mask = np.zeros((len(pairs), 2, length), np.float32)
    for row, pair in enumerate(pairs):
        for side, (ids, counted) in enumerate(pair):
            tokens[row, side, : len(ids)], mask[row, side, : len(ids)] = ids, counted
            lengths[row, side] = len(ids)
    return PreferenceBatch(tokens, lengths, mask)  # pyright: ignore[reportArgumentType]


def answer_logps(
    module: DecoderModule, variables: dict[str, Any], batch: PreferenceBatch, loss_type: str, chunk: int = 0
) -> Float[Array, "B 2"]:
    """`sequence_logps` of both answers of each pair, at temperature 1."""
    pairs, _, length = batch.tokens.shape
    tokens, mask = (x.reshape(2 * pairs, length) for x in (batch.tokens, batch.mask))
    place = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    segments = (place < batch.lengths.reshape(-1, 1)).astype(jnp.int32)
    hidden = module.apply(variables, tokens, place, segments)

    def unembed(hidden: Array) -> Array:
        return module.apply(variables, hidden, method="logits")

    logps, _ = token_logps(hidden[:, :-1], unembed, tokens[:, 1:], 1.0, chunk)
    return sequence_logps(logps, mask[:, 1:], loss_type).reshape(pairs, 2)


def dpo_loss(
    module: DecoderModule,
    variables: dict[str, Any],
    reference: dict[str, Any],
    batch: PreferenceBatch,
    dpo: DpoConfig,
    chunk: int = 0,
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The mean loss of the pairs, and their metrics."""
    policy, fixed = (
        answer_logps(module, given, batch, dpo.loss_type, chunk)
        for given in (variables, jax.lax.stop_gradient(reference))
    )
    losses, metrics = dpo_losses(policy[:, 0], policy[:, 1], fixed[:, 0], fixed[:, 1], dpo)
    count = float(losses.shape[0])
    means = {f"dpo/{name}": (jnp.sum(value), count) for name, value in metrics.items()}
    return jnp.mean(losses), means | {"dpo/loss": (jnp.sum(losses), count)}


def prefer(
    config: Config,
    module: DecoderModule,
    collections: tuple[Any, Any],
    pairs: Sequence[Pair],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
    name: str,
    about: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """The trained collections after `dpo.steps` steps from `collections`, (trainable, frozen), the reference's too."""
    dpo, (trainable, frozen) = config.dpo, collections

    def loss(trainable: Any, fixed: tuple[Any, Any], batch: PreferenceBatch) -> tuple[Array, dict[str, Mean]]:
        frozen, reference = fixed
        policy, start = {**frozen, **trainable}, {**frozen, **reference}
        return dpo_loss(module, policy, start, batch, dpo, config.model.logits_chunk)

    def batch(step: int) -> PreferenceBatch:
        return drawn_batch(config, dpo, step, pairs, lambda own: make_preference_batch(own, dpo.max_length), mesh)

    reference = jax.tree.map(jnp.copy, trainable)  # buffers of its own: the state's are donated
    given = (trainable, (frozen, reference))
    program = supervised_program(config, supervised_optim(dpo), dpo.steps, loss, given, mesh)
    return descend(config, dpo.steps, program, given, batch, workdir, stop, terminal, name, about)


def run(config: Config, workdir: pathlib.Path, terminal: Terminal | None = None) -> str:
    """`grpo-jax dpo`: trains `model.path` on the preferences in `dpo.path`; returns the folder of the result.

    Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    train = functools.partial(prefer, config)
    return train_on_rows(config, config.dpo, "dpo", read_preferences, train, workdir, terminal)
