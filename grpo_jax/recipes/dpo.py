"""Direct preference optimisation: pairs of a chosen and a rejected answer, no sampling and no reward.

The reference is the model that the run starts from; it is read from `model.path` again when a run goes on.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, DpoConfig, LogConfig, OptimConfig, TextConfig, parse_duration
from grpo_jax.data.prompts import row_order
from grpo_jax.errors import InputError
from grpo_jax.metrics import Fetcher, Mean, RunWriter, divide, read_jsonl
from grpo_jax.models.decoder import Decoder, DecoderModule
from grpo_jax.models.loading import load_model
from grpo_jax.ops.logprobs import token_logps
from grpo_jax.ops.preference import dpo_losses, sequence_logps
from grpo_jax.optimizer import make_optimizer, make_schedule
from grpo_jax.parallel import make_mesh, place, replicated, row_sharding, shardings
from grpo_jax.recipes.loop import Loop, Stop, open_workdir
from grpo_jax.recipes.sft import Example, save_model
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_chat

Pair = tuple[Example, Example]  # chosen, rejected: token ids, and 1 where the answer is


class DpoState(flax.struct.PyTreeNode):
    """Parameters and optimizer state."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any


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
    module: DecoderModule, params: Any, reference: Any, batch: PreferenceBatch, dpo: DpoConfig, chunk: int = 0
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The mean loss of the pairs, and their metrics."""
    policy, fixed = (
        answer_logps(module, {"params": given}, batch, dpo.loss_type, chunk)
        for given in (params, jax.lax.stop_gradient(reference))
    )
    losses, metrics = dpo_losses(policy[:, 0], policy[:, 1], fixed[:, 0], fixed[:, 1], dpo)
    count = float(losses.shape[0])
    means = {f"dpo/{name}": (jnp.sum(value), count) for name, value in metrics.items()}
    return jnp.mean(losses), means | {"dpo/loss": (jnp.sum(losses), count)}


def dpo_optim(config: DpoConfig) -> OptimConfig:
    """AdamW, a warm-up of a twentieth, then a cosine to a tenth of the peak."""
    return OptimConfig(lr=config.lr, schedule="cosine", warmup_steps=config.steps // 20, final_lr_fraction=0.1)


def prefer(
    config: Config,
    module: DecoderModule,
    reference: Any,
    pairs: Sequence[Pair],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
) -> Any:
    """Parameters after `dpo.steps` steps from those of the reference; checkpoints and metrics lie in `workdir`."""
    dpo, rows = config.dpo, row_sharding(mesh)
    program, start = dpo_program(config, module, reference, mesh)

    def batch(step: int) -> PreferenceBatch:
        draws = step * dpo.batch_size + np.arange(dpo.batch_size)
        chosen = row_order(draws, len(pairs), config.seed, True)
        return jax.device_put(make_preference_batch([pairs[i] for i in chosen], dpo.max_length), rows)

    state = start(reference)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep, terminal.warn) as checkpoints:
        restored = checkpoints.restore(abstract)
        first, state = (restored[2], restored[0]) if restored else (0, state)
        if first == dpo.steps:
            return state.params
        with terminal.compiling("dpo"):
            compiled = functools.partial(program.lower(reference, abstract, batch(first)).compile(), reference)
        fetch = Fetcher()
        with RunWriter(workdir, dataclasses.replace(LogConfig(), tensorboard=False), first or None) as writer:

            def record(done: int, metrics: Any, _: Any, found: dict[str, float], seconds: float) -> None:
                line = divide(fetch(metrics)) | {"seconds/step": seconds}
                writer.step(done, line)
                terminal.step(done, dpo.steps, line)

            loop = Loop(dpo.steps, compiled, batch, record, checkpoints, config.checkpoint.every, stop)
            state = loop.run(state, first)
        terminal.end_steps()
        return state.params


def dpo_program(config: Config, module: DecoderModule, reference: Any, mesh: Mesh) -> tuple[Any, Any]:
    """(jitted step (reference, state, batch) -> (state, metrics, None), jitted start of a state from parameters)."""
    dpo = config.dpo
    optimizer, schedule = make_optimizer(dpo_optim(dpo), dpo.steps), make_schedule(dpo_optim(dpo), dpo.steps)

    def start(params: Any) -> DpoState:
        copied = jax.tree.map(jnp.copy, params)  # the state is donated, the reference is not
        return DpoState(step=jnp.zeros((), jnp.int32), params=copied, opt_state=optimizer.init(copied))

    def step(reference: Any, state: DpoState, batch: PreferenceBatch) -> tuple[DpoState, dict[str, Mean], None]:
        with jax.default_matmul_precision(config.model.matmul_precision):
            gradient, means = jax.grad(
                lambda p: dpo_loss(module, p, reference, batch, dpo, config.model.logits_chunk), has_aux=True
            )(state.params)
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        means |= {"grad_norm": (optax.tree.norm(gradient), 1.0), "lr": (schedule(state.step), 1.0)}
        new = DpoState(step=state.step + 1, params=optax.apply_updates(state.params, changes), opt_state=opt_state)
        return new, means, None

    layout = shardings(jax.eval_shape(start, reference), mesh)
    program = jax.jit(
        step,
        in_shardings=(shardings(reference, mesh), layout, row_sharding(mesh)),
        out_shardings=(layout, replicated(mesh), None),
        donate_argnums=1,
    )
    return program, jax.jit(start, out_shardings=layout)


def run(config: Config, workdir: pathlib.Path, terminal: Terminal | None = None) -> str:
    """`grpo-jax dpo`: trains `model.path` on the preferences in `dpo.path`; returns the folder of the result.

    Raises InputError for bad input and Stopped when it was asked to end before its time.
    """
    terminal = terminal or Terminal()
    if not config.model.path:
        raise InputError("config: model.path='' names no model to train")
    if config.lora.rank:
        raise InputError(f"config: lora.rank={config.lora.rank}: dpo trains all parameters: set it 0")
    mesh = make_mesh(config.mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.dpo.batch_size % shards:
        raise InputError(f"config: dpo.batch_size={config.dpo.batch_size} must divide by the {shards} devices")
    model = load_model(config.model.path)
    tokenizer = model.tokenizer.with_end_tokens(config.text.end_tokens)
    pairs = read_preferences(config.dpo.path, config.text, tokenizer, config.dpo.max_length)
    open_workdir(workdir, config)
    budget = parse_duration(config.train.time_budget) if config.train.time_budget else None
    module = Decoder(model.architecture, dtype=jnp.dtype(config.model.compute_dtype), remat=config.model.remat)
    terminal.say(f"{len(pairs)} preferences, {config.dpo.batch_size} a step, {config.dpo.steps} steps")
    with Stop(budget) as stop, terminal:
        dtype = jnp.dtype(config.model.param_dtype)
        reference = place(model.params, mesh, dtype)
        params = prefer(config, module, reference, pairs, mesh, workdir, stop, terminal)
    return save_model(workdir / "model", dataclasses.replace(model, tokenizer=tokenizer), jax.device_get(params))
