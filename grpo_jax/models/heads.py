"""A scalar head: a linear map from hidden states to one number, beside any decoder; and where its file lies."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from grpo_jax.errors import InputError
from grpo_jax.models.weights import save_tensors

FILE = "score.safetensors"  # beside model.safetensors, which stays a file of the decoder alone


def init_head(width: int, dtype: Any = jnp.float32) -> dict[str, Array]:
    """A head that says 0 everywhere."""
    return {"kernel": jnp.zeros((width, 1), dtype), "bias": jnp.zeros(1, dtype)}


def read_head(head: dict[str, Any], hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """The number of each hidden state, float32."""
    kernel, bias = head["kernel"].astype(jnp.float32), head["bias"].astype(jnp.float32)
    return (hidden.astype(jnp.float32) @ kernel)[..., 0] + bias[0]


def save_head(folder: str, head: dict[str, Any]) -> None:
    """Writes the head into a model's folder, in the [out, in] order of other checkpoints."""
    tensors = {"score.weight": np.asarray(head["kernel"]).T, "score.bias": np.asarray(head["bias"])}
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    save_tensors(pathlib.Path(folder, FILE), tensors)


def load_head(folder: str, width: int) -> dict[str, np.ndarray]:
    """The head of a folder; raises InputError where there is none, or one of another shape."""
    path = pathlib.Path(folder, FILE)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file: {folder} is no reward model; make one by `grpo-jax reward-model train`"
        )
    try:
        tensors = safetensors.numpy.load_file(str(path))
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: is no whole safetensors file ({error}): train it again") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wanted = {"score.weight": (1, width), "score.bias": (1,)}
    if shapes != wanted or not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise InputError(f"{path}: holds {shapes}, not finite tensors of shape {wanted}: train it again")
    return {"kernel": tensors["score.weight"].T.astype(np.float32), "bias": tensors["score.bias"].astype(np.float32)}
