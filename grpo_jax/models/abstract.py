"""Models by their shapes: the architecture that a name or a config stands for, and its parameter tree."""

import dataclasses
from typing import Any

import jax

from grpo_jax.config import BaseConfig, Config
from grpo_jax.models import hub
from grpo_jax.models.architecture import Architecture, llama
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.models.families import from_fields
from grpo_jax.models.presets import PRESETS, preset


def with_model(config: Config, model: str) -> Config:
    """The config with a preset as its model, by name; raises InputError naming the nearest."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=preset(model).source))


def architecture_of(config: Config) -> Architecture:
    """The architecture of a config's model; where `model.path` is a preset's Hub id nothing is read.

    Raises InputError for what is neither known by name nor there as files.
    """
    path = config.model.path
    known = {found.source.lower(): found for found in PRESETS.values()} | {hub.SMOLLM2: PRESETS["SmolLM2-135M"]}
    if found := known.get(path.lower().partition("@")[0]):
        return from_fields(found.source, found.fields)
    if path:
        from grpo_jax.models.loading import load_model  # slow to import, and seldom needed

        return load_model(path).architecture
    return base_sizes(config.base, config.base.vocabulary)


def abstract_params(architecture: Architecture) -> dict[str, Any]:
    """Shapes of the float32 parameter tree."""
    return jax.eval_shape(lambda: init_params(Decoder(architecture), jax.random.key(0)))


def base_sizes(b: BaseConfig, vocabulary: int) -> Architecture:
    """The architecture that `base` asks for."""
    return llama(
        b.layers,
        vocabulary=vocabulary,
        width=b.width,
        heads=b.heads,
        kv_heads=b.kv_heads,
        head_size=b.width // b.heads,
        mlp_width=b.mlp_width,
        rope_theta=b.rope_theta,
        tied=b.tied,
    )
