"""Models by their shapes: the architecture that a name or a config stands for, and its parameter tree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import BaseConfig, Config
from grpo_jax.models import hub
from grpo_jax.models.architecture import Architecture, llama
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.models.families import from_fields
from grpo_jax.models.presets import PRESETS, preset
from grpo_jax.models.value import TEACHER


def with_model(config: Config, model: str) -> Config:
    """The config with a preset as its model, by name; raises InputError naming the nearest."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=preset(model).source))


def architecture_of(config: Config) -> Architecture:
    """The architecture of a config's model; where `model.path` is a preset's Hub id nothing is read.

    Raises InputError for what is neither known by name nor there as files.
    """
    return _by_name(config.model.path) or base_sizes(config.base, config.base.vocabulary)


def teacher_architecture(config: Config) -> Architecture | None:
    """The architecture of `distill.teacher`, found as that of the model; None without one."""
    return _by_name(config.distill.teacher, "distill.teacher")


def abstract_teacher(config: Config) -> dict[str, Any]:
    """Shapes of the teacher's variables in the dtype that it computes in; empty without one."""
    architecture, dtype = teacher_architecture(config), jnp.dtype(config.model.compute_dtype)
    if architecture is None:
        return {}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(architecture))
    return {TEACHER: {"params": shapes}}


def _by_name(path: str, field: str = "model.path") -> Architecture | None:
    """The architecture of a model by its path; None where that is empty."""
    known = {found.source.lower(): found for found in PRESETS.values()} | {hub.SMOLLM2: PRESETS["SmolLM2-135M"]}
    if found := known.get(path.lower().partition("@")[0]):
        return from_fields(found.source, found.fields)
    if path:
        from grpo_jax.models.loading import load_model  # slow to import, and seldom needed

        return load_model(path, field=field).architecture
    return None


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
