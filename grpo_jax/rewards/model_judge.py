"""A judge in the program: a generative model reads each completion and writes {"analysis": ..., "correctness": ...}.

The judge is a frozen decoder that samples greedily inside the step, right after the policy, so judging never leaves the
devices. Its prompt is put together from token ids: those before the completion (made once a dataset row), the
completion's own, those after it. Special tokens of the completion are left out, so it cannot end its turn and speak for
the judge; that it may argue in plain text for itself is in the nature of judges.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from grpo_jax.config import ModelJudgeConfig, SamplerConfig
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import DecoderModule, unstack
from grpo_jax.parallel import constrain_rows, row_shards
from grpo_jax.rewards.verifiers import WHITESPACE, ByteTable, completion_bytes
from grpo_jax.sampler.sample import choose_pieces, sample
from grpo_jax.sampler.types import Prompts, Rollout

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
            choose_pieces(self.sampler, self.mesh.devices.flat[0].platform),
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


def texts_in(text: str, values: Mapping[str, str]) -> str:
    """The text with its placeholders filled in one pass: a value's own braces stay."""
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], text)
