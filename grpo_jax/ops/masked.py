"""Sums and divisions under a mask: the one place where either happens.

A masked cell is replaced before anything is computed from it. Multiplying by the mask afterwards would keep
inf * 0 = NaN, in the value or in the gradient.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def masked_select(x: Float[Array, "..."], mask: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Zero where the mask is 0, else x; what stands in a masked cell (NaN, inf) reaches neither value nor gradient."""
    return jnp.where(jnp.asarray(mask).astype(bool), x, jnp.zeros((), jnp.result_type(x)))


def safe_divide(numerator: Float[Array, "..."], denominator: Float[Array, "..."]) -> Float[Array, "..."]:
    """The quotient, and 0 with gradient 0 where the denominator is 0."""
    divisible = denominator != 0
    # Both operands are replaced: the branch that `where` drops must be finite for its gradient to be 0.
    return masked_select(numerator, divisible) / jnp.where(divisible, denominator, jnp.ones_like(denominator))


def masked_mean(
    x: Float[Array, "..."], mask: Shaped[Array, "..."], axis: int | Sequence[int] | None = None
) -> Float[Array, "..."]:
    """sum(x m) / sum(m) over `axis` for a mask of 0 and 1 that broadcasts to x; 0 where nothing is unmasked."""
    counted = jnp.broadcast_to(jnp.asarray(mask).astype(bool), jnp.shape(x))
    count = jnp.sum(counted, axis=axis, dtype=jnp.result_type(x))
    return safe_divide(jnp.sum(masked_select(x, counted), axis=axis), count)
