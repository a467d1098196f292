"""Losses against the golden numbers and a float64 numpy oracle; the same for any split; finite where exp is not."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.masked import safe_divide
from grpo_jax.ops.objectives import (
    AGGREGATIONS,
    LOG_RATIO_LIMIT,
    OBJECTIVES,
    add_terms,
    bounded_exp,
    denominators,
    k3,
    mean_metrics,
    policy_loss,
    policy_loss_terms,
)

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
GOLDEN_KEY = {"grpo": "grpo", "bnpo": "token_mean", "dapo": "token_mean", "dr_grpo": "dr_grpo"}
METRICS = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio_outside_fraction")
TOLERANCE = {"float32": (2e-4, 2e-6), "float64": (1e-9, 1e-12)}  # relative, absolute: the golden numbers' own
CASES = (
    "plain on_policy entropy clip_higher zero_std_group all_zero_std tied_tenth length_one empty_row large_ratio "
    "constant_length fp32_overflow masked_junk holes"
).split()
ROWS, LENGTH = 12, 8  # of every batch below: a multiple of the rows, and the greatest width, of the golden cases


def loss_and_gradient(logps, old, ref, adv, mask, config, weight=None, max_completion_length=None):
    """`policy_loss` and its gradient by logps, in numpy. Not jitted: a compile of a second for each config adds up."""
    compute = jax.value_and_grad(policy_loss, has_aux=True)
    (loss, metrics), grad = compute(logps, old, ref, adv, mask, config, weight, max_completion_length)
    return jax.tree.map(np.asarray, (loss, metrics, grad))


def assert_close(got, want, dtype, name=""):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    relative, absolute = TOLERANCE[dtype]
    error = abs(got - want)
    assert got.shape == want.shape, name
    assert np.all(error <= relative * abs(want) + absolute * max(1.0, abs(want).max())), (name, error.max())


# The golden numbers.


@pytest.fixture(scope="module")
def golden(shared_dir):
    cases = json.loads((shared_dir / "golden" / "golden_grpo.json").read_text())["cases"]
    return {case["name"]: case for case in cases}


def config_of(inputs, loss_type):
    return ObjectiveConfig(
        loss_type=loss_type, epsilon=inputs["eps_low"], epsilon_high=inputs["eps_high"], beta=inputs["beta"]
    )


def arrays_of(case, loss_type, dtype, rows=slice(None)):
    """The arguments of a loss, rows repeated to ROWS (which no mean sees) and masked to LENGTH, and the repetitions.

    So all cases have one shape, and each operation is compiled once.
    """
    inputs, expected = case["inputs"], case["expected"]
    adv = np.array(expected["advantages"][expected["losses"][GOLDEN_KEY[loss_type]]["advantage"]])
    mask = np.array(inputs["mask"], dtype)
    arrays = [np.array(inputs[name], dtype) for name in ("logp_new", "logp_old", "logp_ref")]
    arrays = [x[rows] for x in (*arrays, np.broadcast_to(adv[:, None], mask.shape).astype(dtype), mask)]
    times = ROWS // len(arrays[0])
    wide = [(0, 0), (0, LENGTH - mask.shape[1])]
    return [jnp.array(np.tile(np.pad(x, wide), (times, 1))) for x in arrays], times


def test_the_golden_cases_are_all_here(golden):
    # delta_clip needs an upper bound for negative advantages, which no option offers.
    assert sorted(golden) == sorted([*CASES, "delta_clip"])
    assert all(golden[name]["inputs"]["delta"] is None for name in CASES)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_golden(golden, name, dtype):
    inputs, expected = golden[name]["inputs"], golden[name]["expected"]
    shape = np.shape(inputs["mask"])
    for loss_type in LOSS_TYPES:
        with jax.enable_x64(dtype == "float64"):
            arrays, times = arrays_of(golden[name], loss_type, dtype)
            loss, metrics, grad = loss_and_gradient(
                *arrays,
                config=config_of(inputs, loss_type),
                max_completion_length=inputs["max_completion_length"],
            )
        want = expected["losses"][GOLDEN_KEY[loss_type]]
        assert loss.dtype == grad.dtype == dtype
        assert_close(loss, want["loss"], dtype, loss_type)
        assert_close(grad[: shape[0], : shape[1]] * times, want["grad_logp_new"], dtype, loss_type)
        assert np.all(grad[np.array(arrays[-1]) == 0] == 0)
        if loss_type == "dr_grpo":  # its advantages are other ones
            continue
        for metric in METRICS:
            assert_close(metrics[metric], expected["metrics"][metric], dtype, metric)
        assert_close(metrics["kl"], expected["metrics"]["k3_token_mean"], dtype)
        if name != "fp32_overflow":  # a ratio of e^100 reads as a smaller one
            ratio = (np.array(expected["token_ratio"]) * inputs["mask"]).sum() / np.sum(inputs["mask"])
            assert_close(metrics["ratio"], ratio, dtype)
    if name in ("all_zero_std", "tied_tenth"):
        assert loss == 0 and np.all(grad == 0)


@pytest.mark.parametrize("name", CASES)
def test_golden_two_micro_batches(golden, name):
    """The file's halves are minibatches here: each has its own denominator, the loss is their average."""
    inputs, expected = golden[name]["inputs"], golden[name]["expected"]["two_micro_batches"]
    shape, half = np.shape(inputs["mask"]), len(inputs["mask"]) // 2
    for loss_type in LOSS_TYPES:
        config, losses, grads = config_of(inputs, loss_type), [], []
        with jax.enable_x64(True):
            halves = [arrays_of(golden[name], loss_type, "float64", rows) for rows in (slice(half), slice(half, None))]
            rollout_mask = jnp.concatenate([arrays[-1] for arrays, _ in halves])
            for (new, *rest), times in halves:
                terms, grad = numerator_and_gradient(new, *rest, config=config)
                denominator = denominators(
                    rest[-1], rollout_mask, config, max_completion_length=inputs["max_completion_length"]
                )
                losses.append(float(safe_divide(terms.numerator, denominator)))
                grads.append(np.asarray(safe_divide(grad, denominator))[:half, : shape[1]] * times)
        assert_close(sum(losses) / 2, expected[loss_type]["loss"], "float64", loss_type)
        assert_close(np.concatenate(grads) / 2, expected[loss_type]["grad_logp_new"], "float64", loss_type)


def numerator_and_gradient(new, old, ref, adv, mask, config, weight=None):
    def numerator(new):
        terms = policy_loss_terms(new, old, ref, adv, mask, config, weight)
        return terms.numerator, terms

    grad, terms = jax.grad(numerator, has_aux=True)(new)
    return terms, grad


# An independent oracle: loops, one token at a time.


def oracle(new, old, ref, adv, mask, config, weight, length, rollout_mask=None, rollout_weight=None):
    """Loss and gradient of one minibatch in plain Python floats."""
    rollout_mask = mask if rollout_mask is None else rollout_mask
    rollout_weight = weight if rollout_weight is None else rollout_weight
    rows = sum(weight)
    tokens = sum(mask[b].sum() for b in range(len(mask)) if weight[b])
    rollout_tokens = sum(rollout_mask[b].sum() for b in range(len(rollout_mask)) if rollout_weight[b])
    loss, grad = 0.0, np.zeros(new.shape)
    for b in range(len(new)):
        for t in range(new.shape[1]):
            if not (mask[b, t] and weight[b]):
                continue
            w = {
                "grpo": lambda b=b: 1 / (rows * mask[b].sum()),
                "bnpo": lambda: 1 / tokens,
                "dapo": lambda: len(rollout_mask) / len(mask) / rollout_tokens,
                "dr_grpo": lambda: 1 / (rows * length),
            }[config.loss_type]()
            ratio, a = exp_with_tangent(new[b, t] - old[b, t]), adv[b, t]
            slope = exp_slope(new[b, t] - old[b, t])
            bound = min(max(ratio, 1 - config.epsilon), 1 + config.epsilon_high)
            value = -min(ratio * a, bound * a)
            clipped = (a > 0 and ratio > 1 + config.epsilon_high) or (a < 0 and ratio < 1 - config.epsilon)
            slope = 0.0 if clipped else -a * slope
            if config.beta:
                d = ref[b, t] - new[b, t]
                value += config.beta * (exp_with_tangent(d) - d - 1)
                slope += config.beta * (1 - exp_slope(d))
            loss += w * value
            grad[b, t] = w * slope
    return loss, grad


def metrics_oracle(new, old, ref, adv, counted, config):
    """Means over the tokens that count; their log ratios stay below the bound here."""
    x, d, a = new[counted] - old[counted], ref[counted] - new[counted], adv[counted]
    r, low, high = np.exp(x), 1 - config.epsilon, 1 + config.epsilon_high
    by_token = {
        "clip_fraction_low": (r < low) & (a < 0),
        "clip_fraction_high": (r > high) & (a > 0),
        "clip_fraction": ((r < low) & (a < 0)) | ((r > high) & (a > 0)),
        "ratio_outside_fraction": (r < low) | (r > high),
        "ratio": r,
        "approx_kl": r - 1 - x,
        "kl": np.exp(d) - 1 - d,
    }
    return {name: value.mean() for name, value in by_token.items()}


def exp_with_tangent(x):
    return np.exp(x) if x <= 20 else np.exp(20) * (1 + x - 20)


def exp_slope(x):
    return np.exp(min(x, 20))


def ragged(seed, batch=ROWS, length=LENGTH, junk=True):
    """A rollout with holes, a row of one token, one of none, a filler row, huge ratios, junk under the mask."""
    random = np.random.default_rng(seed)
    new, old, ref = (-random.exponential(1.0, (batch, length)) for _ in range(3))
    mask = (np.arange(length) < random.integers(1, length + 1, batch)[:, None]).astype(float)
    mask[3] = random.random(length) < 0.5
    mask[0], mask[0, 0], mask[1] = 0, 1, 0
    weight = np.ones(batch)
    weight[5] = 0
    adv = random.normal(size=(batch, length))
    adv[2] = 0  # a group that ties
    mask[4:] = np.maximum(mask[4:], np.eye(length)[0])
    old[4, 0], old[6, 0], ref[7, 0] = new[4, 0] + 9, new[6, 0] - 9, new[7, 0] + 6
    if junk:
        hidden = (mask == 0) | (weight == 0)[:, None]
        for x in (new, old, ref, adv):
            x[hidden] = random.choice([np.nan, np.inf, -np.inf, -200.0, 1e30], hidden.sum())
    return new, old, ref, adv, mask, weight


def option_sets():
    base = ObjectiveConfig(epsilon=0.2, epsilon_high=0.28, beta=0.04)
    return [dataclasses.replace(base, loss_type=name) for name in LOSS_TYPES] + [
        dataclasses.replace(base, loss_type="grpo", beta=0.0, epsilon=0.1, epsilon_high=0.6)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config", option_sets(), ids=lambda c: f"{c.loss_type}-{c.beta}")
def test_against_numpy(config, dtype):
    for seed in range(3):
        *rollout, mask, weight = ragged(seed)
        want_loss, want_grad = oracle(*rollout, mask=mask, config=config, weight=weight, length=11)
        with jax.enable_x64(dtype == "float64"):
            *given, mask, weight = (jnp.array(x, dtype) for x in (*rollout, mask, weight))
            loss, metrics, grad = loss_and_gradient(
                *given, mask=mask, config=config, weight=weight, max_completion_length=11
            )
        assert_close(loss, want_loss, dtype)
        assert_close(grad, want_grad, dtype)
        want_metrics = metrics_oracle(*rollout, counted=np.array(mask * weight[:, None]) != 0, config=config)
        assert set(metrics) == set(want_metrics)
        for name, want in want_metrics.items():
            assert_close(metrics[name], want, dtype, name)
        assert abs(want_loss) > 1e-3 and np.sum(want_grad != 0) > 5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_minibatches_against_numpy(loss_type):
    config = ObjectiveConfig(loss_type=loss_type, beta=0.1)
    *rollout, mask, weight = ragged(7)
    with jax.enable_x64(True):
        *given, all_masks, weights = (jnp.array(x) for x in (*rollout, mask, weight))
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
            want, _ = oracle(
                *(x[rows] for x in rollout),
                mask=mask[rows],
                config=config,
                weight=weight[rows],
                length=LENGTH,
                rollout_mask=mask,
                rollout_weight=weight,
            )
            terms, _ = numerator_and_gradient(
                *(x[rows] for x in given), mask=all_masks[rows], config=config, weight=weights[rows]
            )
            denominator = denominators(all_masks[rows], all_masks, config, weights[rows], weights)
            assert_close(terms.numerator / denominator, want, "float64")


def test_denominators_by_hand():
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], jnp.float32)
    weight = jnp.array([1.0, 1, 1, 1, 1, 0])
    first, last = slice(0, 3), slice(3, 6)
    want = {"grpo": (3, 2), "bnpo": (4, 6), "dapo": (5, 5), "dr_grpo": (12, 8)}
    for loss_type, numbers in want.items():
        config = ObjectiveConfig(loss_type=loss_type)
        for rows, number in zip((first, last), numbers, strict=True):
            assert denominators(mask[rows], mask, config, weight[rows], weight) == number, loss_type
    config = ObjectiveConfig(loss_type="dr_grpo")
    assert denominators(mask[last], mask, config, weight[last], weight, max_completion_length=10) == 20


def test_dapo_is_as_long_a_step_as_bnpo_in_expectation():
    mask = jnp.ones((8, 4))
    for rows in (8, 4, 2):
        by = [denominators(mask[:rows], mask, ObjectiveConfig(loss_type=name)) for name in ("bnpo", "dapo")]
        assert by[0] == by[1] == 4 * rows


SPLITS = [[4, 4, 4], [1, 4, 1, 1, 4, 1], [1] * 12]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_any_split_into_micro_batches_gives_the_same_loss_gradient_and_metrics(loss_type):
    config = ObjectiveConfig(loss_type=loss_type, beta=0.04)
    with jax.enable_x64(True):
        *given, mask, weight = (jnp.array(x) for x in ragged(3))
        denominator = denominators(mask, mask, config, weight, weight)
        want = loss_and_gradient(*given, mask=mask, config=config, weight=weight)
        assert abs(want[0]) > 1e-3
        for split in SPLITS:
            stops = np.cumsum(split)
            parts = []
            for start, stop in zip(stops - split, stops, strict=True):
                part = [x[start:stop] for x in (*given, mask)]
                parts.append(numerator_and_gradient(*part, config=config, weight=weight[start:stop]))
            total = functools.reduce(add_terms, [terms for terms, _ in parts])
            grad = jnp.concatenate([grad for _, grad in parts]) / denominator
            got = total.numerator / denominator, mean_metrics(total.metrics), grad
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_stands_in_filler_rows_and_masked_cells_changes_no_bit(loss_type):
    config = ObjectiveConfig(loss_type=loss_type, beta=0.04)
    *junk, mask, weight = (jnp.array(x, jnp.float32) for x in ragged(4))
    *plain, _, _ = (jnp.array(x, jnp.float32) for x in ragged(4, junk=False))
    assert any(np.any(a != b) for a, b in zip(junk, plain, strict=True))
    got = loss_and_gradient(*junk, mask=mask, config=config, weight=weight)
    want = loss_and_gradient(*plain, mask=mask.at[5].set(1), config=config, weight=weight)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.all(got[2][5] == 0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_rollout_without_tokens_has_no_loss_and_no_gradient(loss_type):
    config = ObjectiveConfig(loss_type=loss_type, beta=0.04)
    shape = ROWS, LENGTH
    x = jnp.full(shape, -jnp.inf)
    for mask, weight in ((jnp.zeros(shape), jnp.ones(ROWS)), (jnp.ones(shape), jnp.zeros(ROWS))):
        loss, metrics, grad = loss_and_gradient(x, x, x, x, mask, config, weight)
        assert loss == 0 and np.all(grad == 0)
        assert all(value == 0 for value in metrics.values())


# Extremes.


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_log_ratios_of_a_hundred_are_finite_and_point_the_right_way(advantage, dtype):
    config = ObjectiveConfig(loss_type="grpo", beta=0.5)
    shape = ROWS, LENGTH
    with jax.enable_x64(dtype == "float64"):
        old = jnp.zeros(shape, dtype).at[0, :2].set(jnp.array([-100.0, 100.0], dtype))
        mask = jnp.zeros(shape, dtype).at[0, :2].set(1)
        new, adv, one = jnp.zeros(shape, dtype), jnp.full(shape, advantage, dtype), jnp.zeros(ROWS, dtype).at[0].set(1)
        _, metrics, policy_grad = loss_and_gradient(new, old, new, adv, mask, config, one)
        loss, _, grad = loss_and_gradient(new, old, -old, adv, mask, config, one)
    assert all(np.isfinite(value) for value in metrics.values())
    assert np.isfinite(loss) and np.all(np.isfinite(grad))
    # Ratio e^100: clipped if A > 0, pushed down if A < 0. Ratio e^-100: nothing to push.
    if advantage < 0:
        np.testing.assert_allclose(policy_grad[0, 0], np.exp(20) / 2, rtol=1e-5)
    else:
        assert policy_grad[0, 0] == 0
    assert abs(policy_grad[0, 1]) < 1e-30
    # The reference is e^100 likelier at the first token: the KL raises it. At the second it is far below: slope 1.
    kl_grad = grad.astype(np.float64) - policy_grad
    np.testing.assert_allclose(kl_grad[0, :2], [0.5 * (1 - np.exp(20)) / 2, 0.5 / 2], rtol=1e-5, atol=1e-6)
    assert kl_grad[0, 0] < 0


def test_bounded_exp_is_exp_then_its_tangent():
    x = jnp.array([-60.0, -1.0, 0.0, 5.0, 19.9, LOG_RATIO_LIMIT, 21.0, 100.0])
    np.testing.assert_allclose(bounded_exp(x), [exp_with_tangent(v) for v in np.array(x, np.float64)], rtol=1e-5)
    grad = jax.vmap(jax.grad(bounded_exp))(x)
    np.testing.assert_allclose(grad, [exp_slope(v) for v in np.array(x, np.float64)], rtol=1e-5)


def test_k3_of_nearly_equal_policies_in_float32():
    """By exp(d) - d - 1 in float32 the value is rounding, up to 1e-7; a run at learning rate 0 must show below 1e-9."""
    d = np.array([0.0, 1e-7, -3e-7, 1e-5, 1e-4, 1e-3, -1e-2, 0.3])
    new = jnp.zeros(d.shape)[None]
    got = k3(new, jnp.array(d, jnp.float32)[None], jnp.ones_like(new))[0]
    want = np.expm1(d) - d
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-12)
    assert np.all(np.asarray(got) >= 0) and got[0] == 0
    grad = jax.grad(lambda new: k3(new, jnp.array(d, jnp.float32)[None], jnp.ones_like(new)).sum())(new)[0]
    np.testing.assert_allclose(grad, 1 - np.exp(d), rtol=1e-4, atol=2e-7)
    masked = k3(new, jnp.full(new.shape, jnp.nan), jnp.zeros_like(new))
    np.testing.assert_array_equal(masked, np.zeros(masked.shape))


def test_gradients_by_central_differences():
    config = ObjectiveConfig(loss_type="grpo", beta=0.3)
    new, old, ref, adv, mask, weight = ragged(1, junk=False)
    with jax.enable_x64(True):
        given = [jnp.array(x) for x in (old, ref, adv, mask)]
        loss = jax.jit(lambda new: policy_loss(new, *given, config=config, weight=jnp.array(weight))[0])
        grad = np.asarray(jax.grad(loss)(jnp.array(new)))
        for b, t in ((0, 0), (3, int(np.argmax(mask[3]))), (6, 0), (7, 0), (5, 0), (1, 2)):
            step = np.zeros_like(new)
            step[b, t] = 1e-6
            slope = (loss(new + step) - loss(new - step)) / 2e-6
            np.testing.assert_allclose(grad[b, t], slope, rtol=1e-5, atol=1e-8)


# Options and contracts.


def test_no_gradient_reaches_old_reference_or_advantages():
    config = ObjectiveConfig(loss_type="dapo", beta=0.3)
    x = jnp.full((ROWS, LENGTH), -0.5)
    grads = jax.grad(
        lambda old, ref, adv: policy_loss(x * 1.1, old, ref, adv, jnp.ones_like(x), config)[0], argnums=(0, 1, 2)
    )(x, x, jnp.ones_like(x))
    assert all(np.all(np.asarray(g) == 0) for g in grads)


def test_on_policy_the_gradient_is_minus_the_advantage_whatever_the_bounds():
    x = jnp.full((ROWS, LENGTH), -0.5)
    adv = jnp.where(jnp.arange(ROWS) % 2, -2.0, 1.0)
    for epsilon in (0.0, 0.2):
        config = ObjectiveConfig(loss_type="bnpo", epsilon=epsilon, epsilon_high=epsilon)
        _, metrics, grad = loss_and_gradient(x, x, None, adv, jnp.ones_like(x), config)
        np.testing.assert_allclose(grad, np.tile(-adv[:, None] / x.size, LENGTH), rtol=1e-6)
        assert metrics["clip_fraction"] == metrics["approx_kl"] == 0 and metrics["ratio"] == 1


def test_advantages_by_row_equal_advantages_by_token():
    new, old, ref, adv, mask, weight = (jnp.array(x, jnp.float32) for x in ragged(2, junk=False))
    config = ObjectiveConfig(loss_type="dapo", beta=0.1)
    by_row = policy_loss(new, old, ref, adv[:, 0], mask, config, weight)
    by_token = policy_loss(new, old, ref, jnp.repeat(adv[:, :1], new.shape[1], axis=1), mask, config, weight)
    jax.tree.map(np.testing.assert_array_equal, by_row, by_token)


def test_the_reference_is_asked_for_and_its_metric_shown():
    x, adv, mask = jnp.zeros((ROWS, LENGTH)), jnp.ones(ROWS), jnp.ones((ROWS, LENGTH))
    with pytest.raises(ValueError, match=r"config\.beta=0\.1 needs ref_logps"):
        policy_loss(x, x, None, adv, mask, ObjectiveConfig(beta=0.1))
    assert "kl" not in policy_loss(x, x, None, adv, mask, ObjectiveConfig(beta=0.0))[1]
    loss, metrics = policy_loss(x, x, x + 1, adv, mask, ObjectiveConfig(beta=0.0))
    np.testing.assert_allclose(loss, -1, rtol=1e-6)  # beta 0: the reference is looked at and does not act
    np.testing.assert_allclose(metrics["kl"], np.e - 2, rtol=1e-6)


def test_every_loss_type_of_the_config_has_an_objective_and_an_aggregation():
    field = next(f for f in dataclasses.fields(ObjectiveConfig) if f.name == "loss_type")
    assert set(field.metadata["choices"]) == set(OBJECTIVES) == set(AGGREGATIONS)
