"""GRPO in JAX: a training step is one compiled program.

Importing the package imports no jax, so that flags and environment can still be set; the names below load
on first use.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from grpo_jax.generate import load
    from grpo_jax.models.loading import load_model
    from grpo_jax.ops.advantages import advantages
    from grpo_jax.ops.objectives import policy_loss
    from grpo_jax.recipes.grpo import train

    __version__: str

__all__ = ["__version__", "advantages", "load", "load_model", "policy_loss", "train"]

_HOMES = {
    "advantages": "grpo_jax.ops.advantages",
    "load": "grpo_jax.generate",
    "load_model": "grpo_jax.models.loading",
    "policy_loss": "grpo_jax.ops.objectives",
    "train": "grpo_jax.recipes.grpo",
}


def __getattr__(name: str) -> typing.Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("grpo-jax")
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
