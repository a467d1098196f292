"""A judge in the program: a generative model reads each completion and writes {"analysis": ..., "correctness": ...}.

The judge is a frozen decoder that samples greedily inside the step, right after the policy, so judging never leaves the
devices. Its prompt is put together from token ids: those before the completion (made once a dataset row), the
completion's own, those after it. Special tokens of the completion are left out, so it cannot end its turn and speak for
the judge; that it may argue in plain text for itself is in the nature of judges.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from grpo_jax.config import ModelConfig, ModelJudgeConfig, SamplerConfig, TextConfig
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder, DecoderModule, unstack
from grpo_jax.models.families import read_config
from grpo_jax.parallel import constrain_rows, row_shards
from grpo_jax.rewards.verifiers import WHITESPACE, ByteTable, completion_bytes
from grpo_jax.sampler.sample import sample
from grpo_jax.sampler.types import Prompts, Rollout
from grpo_jax.text import Tokenizer, render

PROMPT = """You grade a response to a question against a reference answer.

Question:
{prompt}

Reference answer:
{answer}

Response:
{completion}

Reply with one JSON object and nothing else: {"analysis": "your reasons in a sentence", "correctness": true}
where correctness is true if the response reaches the reference answer, else false."""
KEY = b'"correctness"'
VERDICT = re.compile(r'"correctness"[ \t\n\r\v\f]*:[ \t\n\r\v\f]*(true|false)[ \t\n\r\v\f]*[},]')
COLUMN = "model_judge"  # of Prompts.columns: ids before the completion, padded on the left, and how many


@dataclasses.dataclass(frozen=True, eq=False)
class ModelJudge:
    """The component `model_judge`, without its variables, which travel in the step's state.

    Attributes:
      sampler: greedy, one verdict a completion.
      module: the judge's decoder.
      mesh: where rows lie.
      end_ids: tokens that end a verdict.
      columns: the ids before the completion of each dataset row.
      after: the ids after it.
    """

    sampler: SamplerConfig
    module: DecoderModule
    mesh: Mesh
    end_ids: tuple[int, ...]
    columns: Mapping[str, np.ndarray]
    after: tuple[int, ...]

    def score(
        self, variables: Mapping[str, Any], table: ByteTable, prompts: Prompts, rollout: Rollout
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """1 where the verdict says true, 0 where it says false; does not apply where it says neither."""
        judged = self.verdicts(variables, table, prompts, rollout)
        return read_verdicts(*completion_bytes(table, judged.tokens, judged.lengths))

    def verdicts(self, variables: Mapping[str, Any], table: ByteTable, prompts: Prompts, rollout: Rollout) -> Rollout:
        """What the judge writes of each completion."""
        return sample(
            self.module.clone(scanned=False, remat="none"),
            unstack({"params": variables["params"]}, self.module.architecture),
            self.prompts(table, prompts, rollout),
            jax.random.key(0),  # greedy: nothing is drawn
            self.sampler,
            self.end_ids,
            shards=row_shards(self.mesh),
            constrain=lambda tree: constrain_rows(tree, self.mesh),
        )

    def prompts(self, table: ByteTable, prompts: Prompts, rollout: Rollout) -> Prompts:
        """The judge's prompts, one a completion, padded on the left."""
        rows = rollout.tokens.shape[0]
        before, length = (prompts.columns[name][rollout.group] for name in (COLUMN, f"{COLUMN}_lengths"))
        after = jnp.broadcast_to(jnp.asarray(self.after, jnp.int32), (rows, len(self.after)))
        spoken = jnp.asarray(table.lengths).at[rollout.tokens].get(mode="fill", fill_value=0) > 0
        held = jnp.concatenate(
            [
                jnp.arange(before.shape[1]) >= before.shape[1] - length[:, None],
                spoken & (jnp.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]),
                jnp.ones_like(after, bool),
            ],
            axis=1,
        )
        # A stable sort by what is held moves all gaps to the left and keeps the order of the rest.
        order = jnp.argsort(held, axis=1, stable=True)
        tokens = jnp.concatenate([before, rollout.tokens, after], axis=1)
        numbers = jnp.arange(rows, dtype=jnp.int32)
        return Prompts(
            tokens=jnp.take_along_axis(tokens, order, axis=1),
            lengths=held.sum(axis=1).astype(jnp.int32),
            draw=numbers,
            row=numbers,
            weight=rollout.weight,
            columns={},
        )


def read_verdicts(text: UInt8[Array, "B L"], n: Int[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """(correctness, whether there is one) of verdicts: true or false after the last key "correctness" in an object."""

    def one(text: UInt8[Array, "L"], n: Int[Array, ""]) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        place = jnp.arange(text.shape[0])
        solid = (place < n) & ~jnp.isin(text, jnp.asarray(list(WHITESPACE), jnp.uint8))

        def found(word: bytes) -> Bool[Array, "L"]:
            padded = jnp.pad(text, (0, len(word)))
            return jnp.stack([padded[i : i + len(text)] == byte for i, byte in enumerate(word)]).all(axis=0)

        def next_solid(start: Int[Array, ""]) -> Int[Array, ""]:
            return jnp.min(jnp.where(solid & (place >= start), place, len(text)))

        def at(mask: Bool[Array, "L"], where: Int[Array, ""]) -> Bool[Array, ""]:
            return mask.at[where].get(mode="fill", fill_value=False)

        key = jnp.max(jnp.where(found(KEY), place, -1))
        colon = next_solid(key + len(KEY))
        value = next_solid(colon + 1)
        right, wrong = at(found(b"true"), value), at(found(b"false"), value)
        end = next_solid(value + jnp.where(right, 4, 5))
        closed = at((text == ord("}")) | (text == ord(",")), end)
        opened = jnp.any((text == ord("{")) & (place < key))
        told = (key >= 0) & opened & at(text == ord(":"), colon) & (right | wrong) & closed
        return right & told, told

    right, told = jax.vmap(one)(text, n)
    return right.astype(jnp.float32), told.astype(jnp.float32)


def verdict_of(text: str) -> bool | None:
    """The text twin of `read_verdicts`: None where a verdict says neither."""
    start = text.rfind(KEY.decode())
    match = VERDICT.match(text, start) if start >= 0 and "{" in text[:start] else None
    return None if match is None else match[1] == "true"


def open_model_judge(
    config: ModelJudgeConfig,
    model: ModelConfig,
    text: TextConfig,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    mesh: Mesh,
) -> ModelJudge:
    """The judge of a config, its weights not yet read; raises InputError for a folder or a prompt that will not do."""
    where = f"rewards.model_judge.path={config.path!r}"
    architecture, own = read_config(f"{config.path}/config.json"), Tokenizer.from_folder(config.path)
    if own.backend.pieces != tokenizer.backend.pieces:
        raise InputError(f"{where}: its tokenizer is not the policy's: use a model of the same family")
    own = own.with_end_tokens(text.end_tokens)
    if not own.end_ids:
        raise InputError(f"{where}: names no end token: set text.end_tokens")
    question = question_of(config)
    halves = [judge_halves(question, row, own) for row in rows]
    width = max((len(before) for before, _ in halves), default=1)
    table, lengths = np.zeros((len(halves), width), np.int32), np.zeros(len(halves), np.int32)
    for number, (before, _) in enumerate(halves):
        table[number, width - len(before) :], lengths[number] = before, len(before)
    sampler = SamplerConfig(
        group_size=1, max_new_tokens=config.max_new_tokens, temperature=0.0, cache_dtype=model.compute_dtype
    )
    module = Decoder(architecture, dtype=jnp.dtype(model.compute_dtype))
    columns = {COLUMN: table, f"{COLUMN}_lengths": lengths}
    return ModelJudge(sampler, module, mesh, own.end_ids, columns, tuple(halves[0][1]) if halves else ())


def question_of(config: ModelJudgeConfig) -> str:
    """The judge's prompt with its placeholders; raises InputError for a file that will not do."""
    question = PROMPT
    if config.prompt:
        if not pathlib.Path(config.prompt).is_file():
            raise InputError(
                f"rewards.model_judge.prompt={config.prompt!r}: no such file; give a text with {{completion}}"
            )
        question = pathlib.Path(config.prompt).read_text(encoding="utf-8")
    if question.count("{completion}") != 1:
        raise InputError(f"rewards.model_judge.prompt={config.prompt!r}: must hold {{completion}} once")
    return question


def judge_halves(question: str, row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids before and after the completion of a row, under the judge's own chat template where it has one."""
    template = "chat" if tokenizer.chat_template else "plain"
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(str(message["content"]) for message in prompt if message["role"] == "user")
    filled = question.partition("{completion}")
    specials = tokenizer.backend.specials
    texts = {"{prompt}": plain(prompt, specials), "{answer}": plain(str(row.get("answer", "")), specials)}
    gap = "\ufdd0"  # a character that no text holds
    message = gap.join(texts_in(half, texts) for half in (filled[0], filled[2]))
    before, _, after = render(message, template, tokenizer).partition(gap)
    ids = tokenizer.encode(before, special=True)
    if template == "plain" and tokenizer.add_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    return ids, tokenizer.encode(after, special=True)


def texts_in(text: str, values: Mapping[str, str]) -> str:
    """The text with its placeholders filled in one pass: a value's own braces stay."""
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], text)


def plain(text: str, specials: Mapping[str, int]) -> str:
    """A dataset's text without strings that would become control tokens."""
    for special in specials:
        text = text.replace(special, "")
    return text
