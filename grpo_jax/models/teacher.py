"""A teacher in the step: a frozen decoder, of any size, that reads the student's tokenizer."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.config import DistillConfig, ModelConfig
from grpo_jax.errors import InputError
from grpo_jax.models.decoder import Decoder, DecoderModule
from grpo_jax.models.loading import load_model
from grpo_jax.models.value import TEACHER
from grpo_jax.parallel import place
from grpo_jax.text import Tokenizer

FIELD = "distill.teacher"


def open_teacher(config: DistillConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> DecoderModule | None:
    """The teacher's decoder, its weights not yet placed; None without one.

    Raises InputError where there is no such model, and where its tokenizer is not the student's (None: not yet known).
    """
    if not config.teacher:
        return None
    loaded = load_model(config.teacher, field=FIELD)
    if tokenizer is not None and loaded.tokenizer.backend.pieces != tokenizer.backend.pieces:
        raise InputError(
            f"{FIELD}={config.teacher!r}: its tokenizer is not the student's: take two models of one family, or "
            "fine-tune the student on the teacher's texts (grpo-jax sft)"
        )
    return Decoder(loaded.architecture, dtype=jnp.dtype(model.compute_dtype))


def load_teacher(config: DistillConfig, model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The teacher's variables on the mesh, in the dtype that it computes in; empty without one."""
    if not config.teacher:
        return {}
    params = load_model(config.teacher, field=FIELD).params
    return {TEACHER: {"params": place(params, mesh, jnp.dtype(model.compute_dtype))}}
