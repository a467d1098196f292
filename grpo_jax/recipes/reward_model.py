"""Reward models: a scalar head on a decoder, trained by Bradley-Terry on pairs, or pointwise on labels."""

import pathlib
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from grpo_jax import processes
from grpo_jax.config import Config, TextConfig
from grpo_jax.errors import InputError
from grpo_jax.metrics import Fetcher, Mean, divide, read_jsonl, write_json_atomic
from grpo_jax.models.decoder import DecoderModule
from grpo_jax.models.heads import init_head, save_head
from grpo_jax.models.huggingface import write_folder
from grpo_jax.models.loading import LoadedModel
from grpo_jax.ops.masked import safe_divide
from grpo_jax.parallel import place, put_rows, row_sharding, whole
from grpo_jax.recipes.loop import Stop, open_terminal
from grpo_jax.recipes.supervised import (
    descend,
    drawn_batch,
    open_model,
    open_run,
    supervised_optim,
    supervised_program,
    written_whole,
)
from grpo_jax.rewards.reward_model import sequence_scores
from grpo_jax.terminal import Terminal
from grpo_jax.text import Tokenizer, encode_chat

# Token ids of each answer (chosen before rejected; a point has one), and the label of a point (1 for pairs).
Preference = tuple[list[list[int]], float]
COLUMNS = "'prompt', 'chosen' and 'rejected', or 'prompt', 'completion' and 'label'"


class PreferenceBatch(flax.struct.PyTreeNode):
    """Answers with their prompts, padded on the right: K is 2 for pairs, chosen first, or 1; weight 0 is filler."""

    tokens: Int[Array, "B K S"]
    lengths: Int[Array, "B K"]
    labels: Float[Array, "B"]
    weight: Float[Array, "B"]


def read_preferences(path: str, field: str, config: TextConfig, tokenizer: Tokenizer, length: int) -> list[Preference]:
    """The rows of a JSONL file, all pairs or all points; raises InputError naming file, row and fix.

    'prompt' is a text or a list of messages; an answer is a text, or messages that follow the prompt's (all of the
    conversation where there is no 'prompt'). 'label' is true or false, or a number from 0 to 1.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"{field}={path!r}: no such file; give a JSONL file of rows with {COLUMNS}")
    rows: list[Preference] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            rows.append(read_preference(row, config, tokenizer, length))
            if len(rows[-1][0]) != len(rows[0][0]):
                raise InputError("is a pair among points, or a point among pairs: give two files")
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from None
    if not rows:
        raise InputError(f"{field}={path!r}: has no rows")
    return rows


def read_preference(row: dict[str, Any], config: TextConfig, tokenizer: Tokenizer, length: int) -> Preference:
    """One row; raises InputError without the place."""
    if {"chosen", "rejected"} <= row.keys():
        answers, label = [row["chosen"], row["rejected"]], 1.0
    elif {"completion", "label"} <= row.keys():
        answers, label = [row["completion"]], row["label"]
    else:
        raise InputError(f"has {sorted(row)}, not {COLUMNS}")
    if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
        raise InputError(f"has label={label!r}: give true or false, or a number from 0 to 1")
    made = []
    for answer in answers:
        messages = [*_messages(row.get("prompt", []), "user"), *_messages(answer, "assistant")]
        ids, mask = encode_chat(messages, config, tokenizer)
        ids = ids[: len(mask) - mask[::-1].index(1)]  # to the end token, as a completion ends
        if len(ids) > length:
            raise InputError(f"has {len(ids)} tokens, more than reward_model.max_length={length}")
        made.append(ids)
    if len(made) == 2 and made[0] == made[1]:
        raise InputError("'chosen' and 'rejected' are the same: remove it")
    return made, float(label)


def _messages(value: Any, role: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InputError(f"has {str(value)[:60]!r} where a text or a list of messages belongs")
    return value


def make_preference_batch(rows: Sequence[Preference], count: int, length: int) -> PreferenceBatch:
    """The rows as numpy arrays; filler of weight 0 makes them `count`."""
    answers = len(rows[0][0])
    tokens, lengths = np.zeros((count, answers, length), np.int32), np.ones((count, answers), np.int32)
    labels, weight = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for number, (made, label) in enumerate(rows):
        labels[number], weight[number] = label, 1.0
        for side, ids in enumerate(made):
            tokens[number, side, : len(ids)], lengths[number, side] = ids, len(ids)
    return PreferenceBatch(tokens, lengths, labels, weight)  # pyright: ignore[reportArgumentType]


def answer_scores(module: DecoderModule, variables: Any, batch: PreferenceBatch) -> Float[Array, "B K"]:
    """The head's number at the last token of each answer."""
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (at < batch.lengths.reshape(-1, 1)).astype(jnp.int32)
    return sequence_scores(module, variables, tokens, at, segments).reshape(batch.lengths.shape)


def preference_loss(module: DecoderModule, variables: Any, batch: PreferenceBatch) -> tuple[Array, dict[str, Mean]]:
    """Mean of -log sigmoid(chosen - rejected) over pairs (Bradley-Terry), of the logistic loss over points."""
    scores = answer_scores(module, variables, batch)
    margin = scores[:, 0] - scores[:, 1] if scores.shape[1] == 2 else scores[:, 0]
    # With label 1 softplus(-margin) is -log sigmoid(margin).
    losses = batch.labels * jax.nn.softplus(-margin) + (1 - batch.labels) * jax.nn.softplus(margin)
    right = (margin > 0) == (batch.labels > 0.5)
    total, count = jnp.sum(losses * batch.weight), jnp.sum(batch.weight)
    means: dict[str, Mean] = {
        "reward_model/loss": (total, count),
        "reward_model/accuracy": (jnp.sum(right * batch.weight), count),
        "reward_model/score": (jnp.sum(scores.mean(axis=1) * batch.weight), count),
        "reward_model/margin": (jnp.sum(margin * batch.weight), count),
    }
    return safe_divide(total, count), means


def measure(
    config: Config, module: DecoderModule, variables: Any, rows: Sequence[Preference], mesh: Mesh
) -> dict[str, float]:
    """Loss, accuracy and margin over all the rows."""
    given, fetch = config.reward_model, Fetcher()

    def program(variables: Any, batch: PreferenceBatch) -> dict[str, Mean]:
        with jax.default_matmul_precision(config.model.matmul_precision):
            return preference_loss(module, variables, batch)[1]

    compiled, split = jax.jit(program), row_sharding(mesh)
    found: dict[str, Any] = {}
    for start in range(0, len(rows), given.batch_size):
        piece = rows[start : start + given.batch_size]
        made = make_preference_batch(piece, given.batch_size, given.max_length)
        batch = put_rows(lambda own, made=made: jax.tree.map(lambda x: x[own], made), given.batch_size, split)
        for name, (total, count) in fetch(compiled(variables, batch)).items():
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + float(total), before[1] + float(count))
    return {name.removeprefix("reward_model/"): value for name, value in divide(found).items()}


def fit(
    config: Config,
    module: DecoderModule,
    variables: Any,
    rows: Sequence[Preference],
    mesh: Mesh,
    workdir: pathlib.Path,
    stop: Stop,
    terminal: Terminal,
) -> Any:
    """Variables after `reward_model.steps` steps; checkpoints and metrics lie in `workdir`."""
    given = config.reward_model

    def loss(variables: Any, _: Any, batch: PreferenceBatch) -> tuple[Array, dict[str, Mean]]:
        return preference_loss(module, variables, batch)

    def batch(step: int) -> PreferenceBatch:
        def make(own: list[Preference]) -> PreferenceBatch:
            return make_preference_batch(own, len(own), given.max_length)

        return drawn_batch(config, given, step, rows, make, mesh)

    collections = (variables, {})
    program = supervised_program(config, supervised_optim(given), given.steps, loss, collections, mesh)
    return descend(config, given.steps, program, collections, batch, workdir, stop, terminal, "the reward model")


def run(config: Config, workdir: pathlib.Path, terminal: Terminal | None = None) -> str:
    """`grpo-jax reward-model train`: a reward model from `model.path`; returns its folder.

    Held-out accuracy before and after is in summary.json. Raises InputError for bad input and Stopped when it was
    asked to end before its time.
    """
    terminal = terminal or open_terminal()
    given = config.reward_model
    if config.lora.rank:
        raise InputError(f"config: lora.rank={config.lora.rank}: a reward model is trained whole; set lora.rank=0")
    model, mesh = open_model(config, given, "reward_model")
    rows, held = read_splits(config, model.tokenizer)
    module, stop = open_run(config, model, mesh, workdir)
    kind = "pairs" if len(rows[0][0]) == 2 else "points"
    terminal.say(f"{len(rows)} {kind}, {len(held)} held out; {given.batch_size} a step, {given.steps} steps")
    with stop, terminal:
        variables = {"params": model.params, "score": init_head(model.architecture.width)}
        variables = place(variables, mesh, jnp.float32)
        before = measure(config, module, variables, held, mesh)
        variables = fit(config, module, variables, rows, mesh, workdir, stop, terminal)
        after = measure(config, module, variables, held, mesh)
    summary = {"kind": kind, "rows": len(rows), "held_out": len(held), "before": before, "after": after}
    if processes.first():
        write_json_atomic(workdir / "summary.json", summary)
    terminal.say(f"held-out accuracy {before['accuracy']:.3f} before, {after['accuracy']:.3f} after")
    return save_reward_model(workdir / "model", model, whole(variables))


def read_splits(config: Config, tokenizer: Tokenizer) -> tuple[list[Preference], list[Preference]]:
    """Rows to learn from and held-out rows; raises InputError as `read_preferences`."""
    given = config.reward_model
    rest = (config.text, tokenizer, given.max_length)
    rows = read_preferences(given.path, "reward_model.path", *rest)
    if given.eval_path:
        held = read_preferences(given.eval_path, "reward_model.eval_path", *rest)
        if len(held[0][0]) != len(rows[0][0]):
            raise InputError(f"reward_model.eval_path={given.eval_path!r}: has not the columns of reward_model.path")
        return rows, held
    count = max(len(rows) // 10, 1)
    if len(rows) < 2:
        raise InputError(f"reward_model.path={given.path!r}: has one row; at least 2 are needed, one of them held out")
    return rows[:-count], rows[-count:]


def save_reward_model(folder: pathlib.Path, model: LoadedModel, variables: Any) -> str:
    """Writes a Hugging Face folder with the head beside it, whole or not at all; a finished one is left as it is."""

    def write(making: str) -> None:
        write_folder(making, model.architecture, variables["params"], model.tokenizer)
        save_head(making, variables["score"])

    return written_whole(folder, write)
