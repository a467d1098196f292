"""Reward models and the model judge from their folders: what the scorer holds of them, and their variables.

Apart from what runs in the program, which needs no tokenizer and no reader of checkpoints.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import ModelConfig, ModelJudgeConfig, RewardModelConfig, RewardsConfig, SamplerConfig, TextConfig
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.families import read_config
from grpo_jax.models.heads import load_head
from grpo_jax.models.loading import load_model
from grpo_jax.parallel import place
from grpo_jax.rewards.model_judge import COLUMN, ModelJudge, question_of, texts_in
from grpo_jax.rewards.reward_model import COLLECTION, RewardModel
from grpo_jax.text import Tokenizer, render


def used_models(config: RewardsConfig) -> dict[str, RewardModelConfig]:
    """The reward models among the components, by name."""
    sections = {"helpful": config.helpful, "harmless": config.harmless}
    return {name: sections[name] for name in config.names if name in sections}


def open_reward_models(
    config: RewardsConfig, model: ModelConfig, tokenizer: Tokenizer | None
) -> dict[str, RewardModel]:
    """The reward models of a config, their weights not yet read.

    Raises InputError for a folder that is none, and for one with another tokenizer than the policy's, whose tokens it
    reads (None: not yet known).
    """
    made = {}
    for name, section in used_models(config).items():
        where = f"rewards.{name}.path={section.path!r}"
        architecture = read_config(f"{section.path}/config.json")
        load_head(section.path, architecture.width)
        own = Tokenizer.from_folder(section.path)
        if tokenizer is not None and own.backend.pieces != tokenizer.backend.pieces:
            raise InputError(f"{where}: its tokenizer is not the policy's: train it from a model of the same family")
        made[name] = RewardModel(section, Decoder(architecture, dtype=jnp.dtype(model.compute_dtype)))
    return made


def load_reward_variables(config: RewardsConfig, model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The variables of a config's models on the mesh, in the dtype that they compute in; empty without any."""
    made: dict[str, Any] = {}
    if "model_judge" in config.names:
        params = load_model(config.model_judge.path).params
        made["model_judge"] = {"params": place(params, mesh, jnp.dtype(model.compute_dtype))}
    for name, section in used_models(config).items():
        loaded = load_model(section.path)
        head = load_head(section.path, loaded.architecture.width)
        made[name] = {
            "params": place(loaded.params, mesh, jnp.dtype(model.compute_dtype)),
            "score": place(head, mesh, jnp.float32),
        }
    return {COLLECTION: made} if made else {}


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


def plain(text: str, specials: Mapping[str, int]) -> str:
    """A dataset's text without strings that would become control tokens."""
    for special in specials:
        text = text.replace(special, "")
    return text
