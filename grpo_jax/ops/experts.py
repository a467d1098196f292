"""Mixture of experts without dropping: every token reaches all the experts that it chose, whatever its batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from grpo_jax.parallel import partition_spec

Kernels = tuple[Float[Array, "X D F"], Float[Array, "X D F"], Float[Array, "X F D"]]


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
    kernels: Kernels,
    activation: Callable[[Array], Array],
    total: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "R D"]:
    """Each row's weighted sum of down_e(activation(gate_e(x)) * up_e(x)) over its experts e.

    Rows are sorted by expert, and each expert multiplies its own rows (`jax.lax.ragged_dot`): no capacity, hence no
    row that is dropped, and no number that depends on how full an expert is. Numbers outside 0 to X - 1 are experts
    that are elsewhere, which add nothing. `total` sums what the features at hand give to those of all devices.
    """
    gate, up, down = kernels
    count, chosen = experts.shape
    number = jnp.where((experts >= 0) & (experts < gate.shape[0]), experts, gate.shape[0]).reshape(-1)
    order = jnp.argsort(number, stable=True)
    sizes = jnp.bincount(number, length=gate.shape[0]).astype(jnp.int32)
    here = (number[order] < gate.shape[0])[:, None]
    # What stands in rows beyond the last expert's is not promised, in either direction: it is selected away.
    taken = jnp.where(here, rows[order // chosen], 0)
    hidden = activation(total(jax.lax.ragged_dot(taken, gate, sizes))) * total(jax.lax.ragged_dot(taken, up, sizes))
    out = jnp.where(here, jax.lax.ragged_dot(jnp.where(here, hidden, 0), down, sizes), 0)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    out = out[back].reshape(count, chosen, -1)
    return jnp.einsum("rkd,rk->rd", out, weights.astype(out.dtype))


def mix_experts_on(
    mesh: Mesh,
    rows: PartitionSpec,
    drop: tuple[str, ...],
    given: tuple[Float[Array, "B S D"], Int[Array, "B S k"], Float[Array, "B S k"]],
    kernels: Kernels,
    activation: Callable[[Array], Array],
) -> Float[Array, "B S D"]:
    """`mix_experts` of activations that lie over a mesh as `rows` says, and of kernels that are not split over `drop`.

    The devices along `expert` show each other their rows, each adds what its own experts give to all of them, and the
    sums go back to the rows' owners: as exact as one device, however many rows choose one expert. Exchanging the chosen
    rows alone would need buffers for the case that one device's experts are chosen by all, which are as large. Kernels
    that stay split over fsdp are treated alike: the rows travel, not the weights.
    """
    named = zip(("gate", "up", "down"), kernels, strict=True)
    specs = tuple(partition_spec(f"experts_{name}/kernel", kernel.shape, mesh, drop) for name, kernel in named)
    by_expert, by_feature, by_width = specs[0]
    shown = tuple(axis for axis in (by_feature, by_expert) if axis and mesh.shape[axis] > 1)

    def local(given: tuple[Array, Array, Array], kernels: Kernels) -> Array:
        shape = given[0].shape
        flat = [x.reshape(-1, x.shape[-1]) for x in given]
        if shown:
            flat = [jax.lax.all_gather(x, shown, axis=0, tiled=True) for x in flat]
        x, experts, weights = flat
        width = kernels[0].shape[1]
        if by_feature in shown:
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(by_feature) * width, width, axis=1)
        if by_expert in shown:
            experts = experts - jax.lax.axis_index(by_expert) * kernels[0].shape[0]

        def total(x: Array) -> Array:
            return jax.lax.psum(x, by_feature) if by_feature in shown else x

        out = mix_experts(x, experts, weights, kernels, activation, total)
        if by_width:
            out = jax.lax.psum(out, by_width)
        if by_feature in shown:
            out = jax.lax.all_to_all(out, by_feature, split_axis=0, concat_axis=1, tiled=True)
        if by_expert in shown:
            out = jax.lax.psum_scatter(out, by_expert, scatter_dimension=0, tiled=True)
        return out.reshape(shape)

    return jax.shard_map(local, mesh=mesh, in_specs=((rows, rows, rows), specs), out_specs=rows)(given, kernels)
