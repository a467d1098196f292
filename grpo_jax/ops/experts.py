"""Mixture of experts without dropping: every token reaches all the experts that it chose, whatever its batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def route(
    logits: Float[Array, "R X"],
    bias: Float[Array, "X"] | None,
    chosen: int,
    groups: int = 1,
    chosen_groups: int = 1,
    normalised: bool = True,
    scale: float = 1.0,
) -> tuple[Int[Array, "R k"], Float[Array, "R k"]]:
    """The experts that each token goes to, and their weights, float32.

    Without a bias: softmax scores, the `chosen` best (arXiv 2101.03961; Qwen3). With one: sigmoid scores; the bias is
    added for the choice alone, of the `chosen_groups` groups whose two best experts score most (DeepSeek-V3,
    arXiv 2412.19437, equations 12 to 16). `normalised` weights sum to `scale`.
    """
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if bias is None else jax.nn.sigmoid(logits)
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias.astype(jnp.float32))
    if groups > 1:
        by_group = ranked.reshape(len(ranked), groups, -1)
        best_two = jax.lax.top_k(by_group, 2)[0].sum(axis=-1)
        allowed = (
            jnp.zeros(best_two.shape, bool)
            .at[jnp.arange(len(ranked))[:, None], jax.lax.top_k(best_two, chosen_groups)[1]]
            .set(True)
        )
        ranked = jnp.where(allowed[:, :, None], by_group, -jnp.inf).reshape(ranked.shape)
    experts = jax.lax.top_k(ranked, chosen)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if normalised:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)  # DeepSeek-V3's guard against 0 / 0
    return experts, weights * scale


@jax.custom_vjp
def report_excess(
    weights: Float[Array, "R k"], bias: Float[Array, "X"], excess: Float[Array, "X"]
) -> Float[Array, "R k"]:
    """The weights; in the backward pass `excess` becomes the gradient of the bias.

    The bias has no gradient of its own, as it only chooses. What its update needs, each expert's load, is known deep in
    the layers; sent as a gradient it is summed over micro-batches and devices, and set out by layer, as gradients are.
    """
    return weights


def _report_forward(weights: Array, bias: Array, excess: Array) -> tuple[Array, Array]:
    return weights, excess


def _report_backward(excess: Array, cotangent: Array) -> tuple[Array, Array, Array]:
    return cotangent, excess, jnp.zeros_like(excess)


report_excess.defvjp(_report_forward, _report_backward)


def load_excess(experts: Int[Array, "R k"], real: Shaped[Array, "R"], count: int) -> Float[Array, "X"]:
    """Tokens that each expert got, above (or below) the mean of all; tokens that are not real count for nothing."""
    got = jnp.zeros(count, jnp.float32).at[experts].add(real.astype(jnp.float32)[:, None])
    return got - jnp.mean(got)


def mix_experts(
    rows: Float[Array, "R D"],
    experts: Int[Array, "R k"],
    weights: Float[Array, "R k"],
    kernels: tuple[Float[Array, "X D F"], Float[Array, "X D F"], Float[Array, "X F D"]],
    activation: Callable[[Array], Array],
) -> Float[Array, "R D"]:
    """Each row's weighted sum of down_e(activation(gate_e(x)) * up_e(x)) over its experts e.

    Rows are sorted by expert, and each expert multiplies its own rows (`jax.lax.ragged_dot`): no capacity, hence no
    row that is dropped, and no number that depends on how full an expert is.
    """
    gate, up, down = kernels
    count, chosen = experts.shape
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.bincount(experts.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    taken = rows[order // chosen]
    hidden = activation(jax.lax.ragged_dot(taken, gate, sizes)) * jax.lax.ragged_dot(taken, up, sizes)
    out = jax.lax.ragged_dot(hidden, down, sizes)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    out = out[back].reshape(count, chosen, -1)
    return jnp.einsum("rkd,rk->rd", out, weights.astype(out.dtype))
