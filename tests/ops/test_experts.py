"""Routing and mixing of experts against loops in numpy; no row knows of its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax.config import MeshConfig
from grpo_jax.ops.experts import load_excess, mix_experts, mix_experts_on, report_excess, route
from grpo_jax.parallel import PACK_AXES, make_mesh
from grpo_jax.parallel import ROWS as ROWS_OF_SAMPLING

RANDOM = np.random.default_rng(0)
ROWS, WIDTH, INNER, COUNT = 9, 6, 5, 8
LOGITS = RANDOM.normal(0, 2, (ROWS, COUNT)).astype(np.float32)
BIAS = RANDOM.normal(0, 0.5, COUNT).astype(np.float32)
X = RANDOM.normal(size=(ROWS, WIDTH)).astype(np.float32)
KERNELS = tuple(
    RANDOM.normal(size=shape).astype(np.float32)
    for shape in ((COUNT, WIDTH, INNER), (COUNT, WIDTH, INNER), (COUNT, INNER, WIDTH))
)


def chosen_by_hand(logits, bias, chosen, groups, chosen_groups):
    """One row: ids of the experts, best first, from the text of DeepSeek-V3's report."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    ranked = scores + bias
    members = np.arange(len(logits)).reshape(groups, -1)
    by_group = [np.sort(ranked[m])[-2:].sum() for m in members]
    allowed = np.concatenate([members[g] for g in np.argsort(by_group)[::-1][:chosen_groups]])
    return sorted(allowed, key=lambda e: -ranked[e])[:chosen], scores


@pytest.mark.parametrize("groups, chosen_groups, normalised", [(1, 1, True), (4, 2, False), (2, 1, True)])
def test_sigmoid_routing(groups, chosen_groups, normalised):
    experts, weights = jax.jit(lambda: route(LOGITS, BIAS, 3, groups, chosen_groups, normalised, 2.5))()
    for row in range(ROWS):
        want, scores = chosen_by_hand(LOGITS[row], BIAS, 3, groups, chosen_groups)
        assert experts[row].tolist() == want
        of_chosen = scores[want] / (scores[want].sum() if normalised else 1)  # the bias is in no weight
        np.testing.assert_allclose(weights[row], 2.5 * of_chosen, rtol=1e-5)


def test_softmax_routing():
    experts, weights = route(LOGITS, None, 2)
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    want = np.argsort(-LOGITS, axis=-1)[:, :2]
    np.testing.assert_array_equal(experts, want)
    kept = np.take_along_axis(probabilities, want, axis=-1)
    np.testing.assert_allclose(weights, kept / kept.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(route(LOGITS, None, 2, normalised=False)[1], kept, rtol=1e-5)


def mixed_by_hand(x, experts, weights):
    out = np.zeros(x.shape)
    gate, up, down = (kernel.astype(np.float64) for kernel in KERNELS)
    for r, row in enumerate(x.astype(np.float64)):
        for e, weight in zip(experts[r], weights[r], strict=True):
            out[r] += weight * (np.tanh(row @ gate[e]) * (row @ up[e])) @ down[e]
    return out


@jax.jit
def mix(x, experts, weights):
    return mix_experts(x, experts, weights, KERNELS, jnp.tanh)


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "all_to_two"])
def test_no_row_is_dropped_however_many_chose_an_expert(crowded):
    experts = np.array([[5, 2]] * ROWS) if crowded else np.asarray(route(LOGITS, None, 2)[0])
    weights = RANDOM.uniform(0.1, 1, experts.shape).astype(np.float32)
    np.testing.assert_allclose(mix(X, experts, weights), mixed_by_hand(X, experts, weights), rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    experts, weights = (np.asarray(a) for a in route(LOGITS, None, 2))
    together = np.asarray(mix(X, experts, weights))
    others = np.roll(X, 1, axis=0) * 100
    beside = mix(
        np.concatenate([others, X]), np.concatenate([np.full((ROWS, 2), 3), experts]), np.tile(weights, (2, 1))
    )
    np.testing.assert_array_equal(np.asarray(beside)[ROWS:], together)


def test_gradients_reach_rows_weights_and_chosen_experts_only():
    experts, weights = np.array([[5, 2]] * ROWS), np.full((ROWS, 2), 0.5, np.float32)

    def total(x, weights, gate):
        return jnp.sum(mix_experts(x, jnp.asarray(experts), weights, (gate, *KERNELS[1:]), jnp.tanh) * X)

    by_x, by_weights, by_gate = jax.jit(jax.grad(total, (0, 1, 2)))(X, weights, KERNELS[0])
    step = 1e-3

    def slope(function, at):
        moved = np.zeros(at.shape)
        moved.flat[3] = step
        at = at.astype(np.float64)
        return (function(at + moved) - function(at - moved)) / (2 * step)

    np.testing.assert_allclose(
        by_x.ravel()[3], slope(lambda x: np.sum(mixed_by_hand(x, experts, weights) * X), X), rtol=1e-3
    )
    np.testing.assert_allclose(
        by_weights.ravel()[3], slope(lambda w: np.sum(mixed_by_hand(X, experts, w) * X), weights), rtol=1e-3
    )
    assert (np.any(np.asarray(by_gate) != 0, axis=(1, 2)) == np.isin(np.arange(COUNT), [2, 5])).all()


def test_loads_arrive_as_the_gradient_of_the_bias():
    experts = jnp.array([[0, 1], [0, 2], [0, 3]])
    excess = load_excess(experts, np.array([1, 1, 0]), 4)
    np.testing.assert_allclose(excess, [1.0, 0.0, 0.0, -1.0])  # 2, 1, 1 and 0 tokens; the third row is padding
    weights = jnp.array([[0.3, 0.7]] * 3)
    value, pull = jax.vjp(lambda w, b: report_excess(w, b, excess), weights, jnp.zeros(4))
    np.testing.assert_array_equal(value, weights)
    by_weights, by_bias = pull(weights * 9)
    np.testing.assert_array_equal(by_weights, weights * 9)
    np.testing.assert_array_equal(by_bias, excess)


@pytest.mark.parametrize("sampling", [False, True], ids=["weights_gathered", "rows_gathered"])
def test_experts_over_devices_are_those_of_one_device(sampling):
    """Rows, features, widths and experts split in two each; two experts are chosen by half of all rows."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    random = np.random.default_rng(7)
    x, slope = (random.normal(size=(4, 2, WIDTH)).astype(np.float32) for _ in range(2))
    experts = random.integers(0, COUNT, (4, 2, 2))
    experts[:2] = [5, 2]
    weights = random.uniform(0.1, 1, experts.shape).astype(np.float32)
    rows, drop = (ROWS_OF_SAMPLING, ()) if sampling else (PartitionSpec(PACK_AXES), ("fsdp",))

    def spread(x, weights, kernels):
        return mix_experts_on(mesh, rows, drop, (x, jnp.asarray(experts), weights), kernels, jnp.tanh)

    def alone(x, weights, kernels):
        flat = [a.reshape(8, -1) for a in (x, experts, weights)]
        return mix_experts(flat[0], jnp.asarray(flat[1]), flat[2], kernels, jnp.tanh).reshape(x.shape)

    def both(mix):
        def total(*given):
            out = mix(*given)
            return jnp.sum(out * slope), out

        (_, out), gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(x, weights, KERNELS)
        return out, gradient

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both(spread), both(alone))
