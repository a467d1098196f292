"""Value models: what PPO's critic adds to the policy's variables, as collections beside "params".

`value_head` holds a linear map from hidden states to a number. With `critic` "model" the collection `critic` holds a
decoder of its own, started as a copy of the policy; with "head" the policy's hidden states are read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.heads import init_head, read_head

COLLECTIONS = ("value_head", "critic")
TEACHER = "teacher"  # of the step's frozen variables, a decoder of its own: {"params": ...}


def init_value(critic: str, width: int, params: Any, dtype: Any) -> dict[str, Any]:
    """The collections of a value model that says 0 everywhere; the decoder of its own is a copy of `params`."""
    made: dict[str, Any] = {"value_head": init_head(width, dtype)}
    return made | ({"critic": jax.tree.map(lambda x: jnp.array(x, dtype), params)} if critic == "model" else {})


def without_value(variables: dict[str, Any]) -> dict[str, Any]:
    """The policy's collections alone."""
    return {name: tree for name, tree in variables.items() if name not in COLLECTIONS}


def read_values(variables: dict[str, Any], hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The value head on hidden states, float32."""
    return read_head(variables["value_head"], hidden)
