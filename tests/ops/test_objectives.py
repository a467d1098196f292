"""Losses against the golden numbers and a float64 numpy oracle; the same for any split; finite where exp is not."""

import dataclasses
import functools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from loss_oracle import correction_weights, exp_slope, exp_with_tangent, high_entropy, loss_and_gradients

import grpo_jax
from grpo_jax.config import ObjectiveConfig
from grpo_jax.ops.masked import safe_divide
from grpo_jax.ops.objectives import (
    AGGREGATIONS,
    LOG_RATIO_LIMIT,
    OBJECTIVES,
    add_terms,
    bounded_exp,
    clipped_surrogate,
    denominators,
    k3,
    mean_metrics,
    policy_loss,
    policy_loss_terms,
    top_entropy_mask,
)

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
GOLDEN_KEY = {"grpo": "grpo", "bnpo": "token_mean", "dapo": "token_mean", "dr_grpo": "dr_grpo"}
GOLDEN_KEY |= {"grpo_skip_empty": "grpo_skip_empty", "gspo": "gspo", "gspo_token": "gspo", "cispo": "cispo"}
METRICS = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio_outside_fraction")
TOLERANCE = {"float32": (2e-4, 2e-6), "float64": (1e-9, 1e-12)}  # relative, absolute: the golden numbers' own
CASES = (
    "plain on_policy entropy clip_higher zero_std_group all_zero_std tied_tenth length_one empty_row large_ratio "
    "delta_clip constant_length fp32_overflow masked_junk holes"
).split()
ROWS, LENGTH = 12, 8  # of every batch below: a multiple of the rows, and the greatest width, of the golden cases


def loss_and_gradient(logps, old, ref, adv, mask, config, weight=None, max_completion_length=None, **given):
    """`policy_loss` and its gradient by logps, in numpy. Not jitted: a compile of a second for each config adds up."""
    compute = jax.value_and_grad(policy_loss, has_aux=True)
    (loss, metrics), grad = compute(logps, old, ref, adv, mask, config, weight, max_completion_length, **given)
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


def config_of(inputs, loss):
    kind = {"grpo_skip_empty": "grpo", "gspo": "grpo", "gspo_token": "grpo"}.get(loss, loss)
    bounds = ("gspo_eps_low", "gspo_eps_high") if loss.startswith("gspo") else ("eps_low", "eps_high")
    return ObjectiveConfig(
        loss_type=kind,
        importance_sampling_level={"gspo": "sequence", "gspo_token": "sequence_token"}.get(loss, "token"),
        epsilon=inputs[bounds[0]],
        epsilon_high=inputs[bounds[1]],
        delta=inputs["delta"] or 0.0,
        cispo_max_ratio=inputs["cispo_max_ratio"],
        beta=inputs["beta"],
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
    assert sorted(golden) == sorted(CASES)
    assert [name for name in CASES if golden[name]["inputs"]["delta"]] == ["delta_clip"]


HAZARDS = ("tied_tenth", "large_ratio", "delta_clip", "fp32_overflow", "masked_junk", "holes")  # of float32


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "float64") for name in CASES] + [(name, "float32") for name in HAZARDS]
)
def test_golden(golden, name, dtype):
    inputs, expected = golden[name]["inputs"], golden[name]["expected"]
    shape = np.shape(inputs["mask"])
    left_out = {"bnpo", *({"dapo", "gspo_token"} if dtype == "float32" else ())}  # one minibatch: bnpo is dapo
    if name != "empty_row":
        left_out.add("grpo_skip_empty")
    for loss_type, key in GOLDEN_KEY.items():
        if loss_type in left_out:
            continue
        with jax.enable_x64(dtype == "float64"):
            arrays, times = arrays_of(golden[name], loss_type, dtype)
            loss, metrics, grad = loss_and_gradient(
                *arrays,
                config=config_of(inputs, loss_type),
                weight=jnp.any(arrays[-1] != 0, axis=1).astype(dtype) if loss_type == "grpo_skip_empty" else None,
                max_completion_length=inputs["max_completion_length"],
            )
        want = expected["losses"][key]
        assert loss.dtype == grad.dtype == dtype
        assert_close(loss, want["loss"], dtype, loss_type)
        assert_close(grad[: shape[0], : shape[1]] * times, want["grad_logp_new"], dtype, loss_type)
        assert np.all(grad[np.array(arrays[-1]) == 0] == 0)
        if loss_type == "cispo":
            assert_close(metrics["clip_fraction_high"], expected["metrics"]["cispo_clip_fraction"], dtype)
        if loss_type not in ("grpo", "bnpo", "dapo"):  # advantages or ratios are other ones
            continue
        for metric in METRICS:
            assert_close(metrics[metric], expected["metrics"][metric], dtype, metric)
        if inputs["delta"]:
            assert_close(metrics["clip_fraction_delta"], expected["metrics"]["delta_clip_fraction"], dtype)
            assert metrics["clip_fraction_delta"] > 0
        assert_close(metrics["kl"], expected["metrics"]["k3_token_mean"], dtype)
        if name != "fp32_overflow":  # a ratio of e^100 reads as a smaller one
            ratio = (np.array(expected["token_ratio"]) * inputs["mask"]).sum() / np.sum(inputs["mask"])
            assert_close(metrics["ratio"], ratio, dtype)
    if name in ("all_zero_std", "tied_tenth"):
        assert loss == 0 and np.all(grad == 0)


def test_golden_rows_that_gspo_clips(golden):
    for name in CASES:
        inputs, expected = golden[name]["inputs"], golden[name]["expected"]
        with jax.enable_x64(True):
            (new, old, _, adv, mask), _ = arrays_of(golden[name], "gspo", "float64")
            _, metrics = clipped_surrogate(new, old, adv * mask, mask, config_of(inputs, "gspo"))
        clipped = np.any(np.asarray(metrics["clip_fraction"]), axis=1).mean()
        assert clipped == pytest.approx(expected["metrics"]["gspo_clip_fraction_rows"]), name


SPLIT = ("plain", "empty_row", "tied_tenth", "delta_clip", "holes")  # the others differ in values alone


@pytest.mark.parametrize(
    "name", [name if name in SPLIT else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
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


# An independent oracle: `loss_oracle`, in plain numpy.


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


BASE = ObjectiveConfig(epsilon=0.2, epsilon_high=0.28, beta=0.04)
KINDS = (*LOSS_TYPES, "cispo", "sapo", "luspo", "vespo", "gmpo")
OPTIONS = {
    **{name: {"loss_type": name} for name in KINDS},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "delta": 1.4},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.05},
    "gspo_token": {"loss_type": "grpo", "importance_sampling_level": "sequence_token", "beta": 0.0, "delta": 1.5},
    "cispo_sequence": {"loss_type": "cispo", "importance_sampling_level": "sequence", "cispo_max_ratio": 1.1},
    "sapo_sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence", "sapo_temperature_neg": 2.0},
    "vespo_gentle": {"loss_type": "vespo", "vespo_k_pos": 0.5, "vespo_lambda_pos": 0.4, "vespo_k_neg": 0.3},
    "gmpo_wide": {"loss_type": "gmpo", "epsilon": 0.9, "epsilon_high": 0.7},
    "no_kl": {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.1, "epsilon_high": 0.6},
    "dual_clip": {"loss_type": "dapo", "delta": 1.7},
    "k1": {"loss_type": "bnpo", "kl_estimator": "k1"},
    "k2": {"loss_type": "dr_grpo", "kl_estimator": "k2", "beta": 0.3},
    "k1_by_k2": {"loss_type": "dapo", "kl_estimator": "k1", "kl_gradient": "k2", "beta": 0.3},
    "k3_by_k2": {"loss_type": "grpo", "kl_gradient": "k2"},
    "entropy": {"loss_type": "grpo", "entropy_coef": 0.3},
    "entropy_luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "entropy_coef": 0.1},
    "top_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "corrected": {"loss_type": "dapo", "correction": "token_truncate", "correction_max": 1.5, "correction_min": 0.5},
    "corrected_rows": {"loss_type": "sapo", "correction": "sequence_truncate", "correction_max": 2.0},
    "ice_pop": {"loss_type": "grpo", "correction": "token_mask", "correction_max": 1.5, "correction_min": 0.5},
    "corrected_vespo": {"loss_type": "vespo", "correction": "token_mask", "correction_max": 1.5},
}


def config_named(name):
    return dataclasses.replace(BASE, **OPTIONS[name])


def beside(seed, new, mask, weight, config):
    """Entropies, and what the config's correction and selection make: keyword arguments, junk where masked."""
    random = np.random.default_rng(seed + 100)
    counted = mask * weight[:, None]
    entropies = random.exponential(1.0, new.shape)
    given = {"entropies": entropies}
    if config.correction != "none":
        given["corrections"] = correction_weights(new, new + random.normal(0, 0.5, new.shape), counted, config)
    if config.top_entropy_quantile < 1:
        given["selected"] = high_entropy(entropies, counted, config.top_entropy_quantile)
    return given | {"entropies": np.where(counted, entropies, np.nan)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_numpy(name, dtype):
    config = config_named(name)
    seed = int(dtype == "float32")
    *rollout, mask, weight = ragged(seed)
    more = beside(seed, rollout[0], mask, weight, config)
    want_loss, *want_grads = loss_and_gradients(*rollout, mask=mask, config=config, weight=weight, length=11, **more)
    with jax.enable_x64(dtype == "float64"):
        *given, mask, weight = (jnp.array(x, dtype) for x in (*rollout, mask, weight))
        more = {key: jnp.array(x, dtype) for key, x in more.items()}
        if seed and "selected" in more:
            del more["selected"]  # chosen from the entropies inside
        compute = jax.value_and_grad(loss_beside, (0, 1), True)
        (loss, metrics), (grad, grads) = compute(given[0], more, *given[1:], mask, config, weight)
    assert loss.dtype == grad.dtype == dtype
    assert_close(loss, want_loss, dtype)
    assert_close(grad, want_grads[0], dtype)
    assert_close(grads.pop("entropies"), want_grads[1], dtype)
    assert all(np.all(np.asarray(g) == 0) for g in grads.values())
    assert abs(want_loss) > 1e-3 and np.sum(want_grads[0] != 0) > 5
    if name in LOSS_TYPES or name == "no_kl":
        want_metrics = metrics_oracle(*rollout, counted=np.array(mask * weight[:, None]) != 0, config=config)
        assert set(metrics) == set(want_metrics)
        for metric, want in want_metrics.items():
            assert_close(metrics[metric], want, dtype, metric)


def loss_beside(new, more, old, ref, adv, mask, config, weight):
    return policy_loss(new, old, ref, adv, mask, config, weight, 11, **more)


@pytest.mark.parametrize("name", [n for n in OPTIONS if not n.startswith(("cispo", "vespo", "corrected_vespo"))])
def test_the_gradients_of_the_oracle_by_central_differences(name):
    """Those whose weight is held constant are left out: their gradient is not that of their value."""
    config = dataclasses.replace(config_named(name), kl_gradient="estimator")
    level = "sequence" if config.importance_sampling_level == "sequence_token" else config.importance_sampling_level
    config = dataclasses.replace(config, importance_sampling_level=level)
    new, *rest, mask, weight = ragged(1, junk=False)
    more = beside(1, new, mask, weight, config)

    def loss(new):
        return loss_and_gradients(new, *rest, mask=mask, config=config, weight=weight, length=11, **more)

    grad = loss(new)[1]
    for b, t in ((0, 0), (3, int(np.argmax(mask[3]))), (6, 0), (7, 0), (8, 0), (5, 0), (1, 2)):
        step = np.zeros_like(new)
        step[b, t] = 1e-6
        slope = (loss(new + step)[0] - loss(new - step)[0]) / 2e-6
        np.testing.assert_allclose(grad[b, t], slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_minibatches_against_numpy(name):
    config = config_named(name)
    *rollout, mask, weight = ragged(7)
    with jax.enable_x64(True):
        *given, all_masks, weights = (jnp.array(x) for x in (*rollout, mask, weight))
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
            want, *_ = loss_and_gradients(
                *(x[rows] for x in rollout),
                mask=mask[rows],
                config=config,
                weight=weight[rows],
                length=LENGTH,
                rollout_mask=mask,
                rollout_weight=weight,
            )
            terms = policy_loss_terms(*(x[rows] for x in given), all_masks[rows], config, weights[rows])
            denominator = denominators(all_masks[rows], all_masks, config, weights[rows], weights)
            assert_close(terms.numerator / denominator, want, "float64")


def test_denominators_by_hand():
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], jnp.float32)
    weight = jnp.array([1.0, 1, 1, 1, 1, 0])
    first, last = slice(0, 3), slice(3, 6)
    want = {"grpo": (3, 2), "bnpo": (4, 6), "dapo": (5, 5), "dr_grpo": (12, 8), "luspo": (3, 2), "cispo": (5, 5)}
    want |= {"sapo": (3, 2), "vespo": (5, 5), "gmpo": (3, 2)}
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


SPLITS = [[4, 4, 4], [1, 4, 1, 1, 4, 1]]


@pytest.mark.parametrize("name", KINDS)
def test_any_split_into_micro_batches_gives_the_same_loss_gradient_and_metrics(name):
    config = config_named(name)
    with jax.enable_x64(True):
        *given, mask, weight = (jnp.array(x) for x in ragged(3))
        denominator = denominators(mask, mask, config, weight, weight)
        want = loss_and_gradient(*given, mask=mask, config=config, weight=weight)
        assert abs(want[0]) > 1e-3
        for split in SPLITS if name in ("grpo", "dapo") else SPLITS[:1]:
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


@pytest.mark.parametrize("name", KINDS)
def test_what_stands_in_filler_rows_and_masked_cells_changes_no_bit(name):
    config = config_named(name)
    *junk, mask, weight = (jnp.array(x, jnp.float32) for x in ragged(4))
    *plain, _, _ = (jnp.array(x, jnp.float32) for x in ragged(4, junk=False))
    assert any(np.any(a != b) for a, b in zip(junk, plain, strict=True))
    got = loss_and_gradient(*junk, mask=mask, config=config, weight=weight)
    want = loss_and_gradient(*plain, mask=mask.at[5].set(1), config=config, weight=weight)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.all(got[2][5] == 0)


@pytest.mark.parametrize("name", KINDS)
def test_a_rollout_without_tokens_has_no_loss_and_no_gradient(name):
    config = config_named(name)
    shape = ROWS, LENGTH
    x = jnp.full(shape, -jnp.inf)
    for mask, weight in ((jnp.zeros(shape), jnp.ones(ROWS)), (jnp.ones(shape), jnp.zeros(ROWS))):
        loss, metrics, grad = loss_and_gradient(x, x, x, x, mask, config, weight)
        assert loss == 0 and np.all(grad == 0)
        assert all(value == 0 for value in metrics.values())


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    name=strategies.sampled_from(sorted(OPTIONS)),
    seed=strategies.integers(0, 1000),
    rows=strategies.permutations(range(ROWS)),
    cut=strategies.sampled_from(SPLITS),
)
def test_rows_in_any_order_and_micro_batches_give_one_numerator(name, seed, rows, cut):
    config, rows = config_named(name), np.array(rows)
    *rollout, mask, weight = ragged(seed)
    more = beside(seed, rollout[0], mask, weight, config)
    want, *_ = loss_and_gradients(*rollout, mask=mask, config=config, weight=weight, length=LENGTH, **more)
    with jax.enable_x64(True):
        *given, mask, weight = (jnp.array(x) for x in (*rollout, mask, weight))
        denominator = denominators(mask, mask, config, weight, weight)
        total = 0.0
        for piece in np.split(rows, np.cumsum(cut)[:-1]):
            own = {key: jnp.array(x[piece]) for key, x in more.items()}
            part = [x[piece] for x in (*given, mask)]
            total += float(policy_loss_terms(*part, config, weight[piece], **own).numerator)
    assert total / float(denominator) == pytest.approx(want, rel=1e-9, abs=1e-12)


# Extremes.


@pytest.mark.parametrize("name", OPTIONS)
def test_huge_ratios_are_finite_in_value_gradient_and_metrics(name):
    """Log ratios of 100 either way, to the old policy and to the reference, both signs of advantage, float32."""
    config = config_named(name)
    old = jnp.zeros((ROWS, LENGTH)).at[:, 0].set(-100.0).at[:, 1].set(100.0).at[6:, :].multiply(-1)
    mask = jnp.ones((ROWS, LENGTH)).at[::3, 1:].set(0).at[4].set(0)
    adv = jnp.where(jnp.arange(ROWS) % 2, 1.0, -1.0)
    more = beside(0, np.asarray(old), np.asarray(mask), np.ones(ROWS), config)
    more = {key: jnp.array(x, jnp.float32) for key, x in more.items()}
    loss, metrics, grad = loss_and_gradient(old * 0, old, -old, adv, mask, config, **more)
    assert np.isfinite(loss) and np.all(np.isfinite(grad)) and np.all(grad[np.asarray(mask) == 0] == 0)
    assert all(np.isfinite(value) for value in metrics.values())
    assert np.isfinite(np.sum(np.square(grad)))  # as the gradient norm would have it


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


def test_a_gradient_of_the_loss_by_central_differences():
    config = config_named("gspo")
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


def test_what_an_option_needs_is_asked_for():
    x, adv, mask = jnp.zeros((ROWS, LENGTH)), jnp.ones(ROWS), jnp.ones((ROWS, LENGTH))
    for fields in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        with pytest.raises(ValueError, match="needs entropies"):
            policy_loss(x, x, None, adv, mask, ObjectiveConfig(**fields))


def test_sequence_and_token_form_of_gspo_agree_where_advantages_are_of_rows():
    new, old, ref, adv, mask, weight = (jnp.array(x, jnp.float32) for x in ragged(2, junk=False))
    got = [loss_and_gradient(new, old, ref, adv[:, 0], mask, config_named("gspo"), weight)]
    token = dataclasses.replace(config_named("gspo"), importance_sampling_level="sequence_token")
    got.append(loss_and_gradient(new, old, ref, adv[:, 0], mask, token, weight))
    np.testing.assert_allclose(got[0][0], got[1][0], rtol=1e-6)
    np.testing.assert_allclose(got[0][2], got[1][2], rtol=1e-4, atol=1e-7)
    # With advantages of tokens the first spreads each over its row; the token form does not.
    by_token = [loss_and_gradient(new, old, ref, adv, mask, c, weight)[2] for c in (config_named("gspo"), token)]
    assert not np.allclose(*by_token, rtol=1e-2)


def test_top_entropy_mask():
    entropies = jnp.array([[0.1, 0.9, 0.5, 7.0], [0.3, 0.2, jnp.nan, 0.5]])
    mask = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    for share, want in ((0.4, [[0, 1, 1, 0], [0, 0, 0, 1]]), (0.01, [[0, 1, 0, 0], [0, 0, 0, 0]]), (1.0, mask)):
        np.testing.assert_array_equal(top_entropy_mask(entropies, mask, share), want)
        np.testing.assert_array_equal(high_entropy(np.nan_to_num(entropies), np.asarray(mask), share), want)
    np.testing.assert_array_equal(top_entropy_mask(entropies, jnp.zeros_like(mask), 0.5), jnp.zeros_like(mask))


def test_the_straight_through_gradient_leaves_the_value():
    new, ref = jnp.array([[-0.3, -2.0]]), jnp.array([[-0.9, -1.5]])
    mask, adv = jnp.ones((1, 2)), jnp.zeros(1)
    for estimator in ("k1", "k2", "k3"):
        own, through = (
            loss_and_gradient(
                new, new, ref, adv, mask, ObjectiveConfig(beta=1.0, kl_estimator=estimator, kl_gradient=gradient)
            )
            for gradient in ("estimator", "k2")
        )
        assert own[0] == through[0] and own[1]["kl"] == through[1]["kl"]
        np.testing.assert_allclose(through[2], (new - ref) / 2, rtol=1e-6)


def test_the_package_exports_the_two_functions():
    assert grpo_jax.policy_loss is policy_loss and grpo_jax.advantages.__module__ == "grpo_jax.ops.advantages"


def test_every_loss_type_of_the_config_has_an_objective_and_an_aggregation():
    field = next(f for f in dataclasses.fields(ObjectiveConfig) if f.name == "loss_type")
    assert set(field.metadata["choices"]) == set(OBJECTIVES) == set(AGGREGATIONS)
