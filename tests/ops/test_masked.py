"""A masked cell reaches neither a value nor a gradient, whatever stands in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.ops.masked import masked_mean, masked_select, safe_divide

JUNK = [np.inf, -np.inf, np.nan, 3e38]


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.int32])
def test_select_before_exp_keeps_junk_out_of_value_and_gradient(dtype):
    x = jnp.array([0.5, *JUNK, -1.0])
    mask = jnp.array([1, 0, 0, 0, 0, 1], dtype)
    value, grad = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.exp(masked_select(x, mask)) * mask)))(x)
    np.testing.assert_allclose(value, np.exp(0.5) + np.exp(-1.0), rtol=1e-6)
    np.testing.assert_allclose(grad, [np.exp(0.5), 0, 0, 0, 0, np.exp(-1.0)], rtol=1e-6)


def test_safe_divide_is_division_where_it_is_defined():
    numerator, denominator = jnp.array([3.0, -1.0, 0.0]), jnp.array([2.0, -4.0, 5.0])
    np.testing.assert_array_equal(safe_divide(numerator, denominator), numerator / denominator)
    by = jax.jit(jax.grad(lambda n, d: jnp.sum(safe_divide(n, d)), argnums=(0, 1)))(numerator, denominator)
    np.testing.assert_allclose(by[0], 1 / denominator, rtol=1e-6)
    np.testing.assert_allclose(by[1], -numerator / denominator**2, rtol=1e-6)


def test_safe_divide_by_zero_is_zero_with_zero_gradient():
    compute = jax.jit(jax.value_and_grad(safe_divide, argnums=(0, 1)))
    for numerator in (0.0, 2.0, *JUNK):
        value, grads = compute(jnp.float32(numerator), jnp.float32(0))
        assert value == 0
        assert tuple(map(float, grads)) == (0, 0)


def test_safe_divide_broadcasts():
    got = safe_divide(jnp.ones((2, 3)), jnp.array([[2.0], [0.0]]))
    np.testing.assert_array_equal(got, [[0.5] * 3, [0.0] * 3])


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1), -1])
def test_masked_mean_against_numpy(axis):
    random = np.random.default_rng(0)
    x, mask = random.normal(size=(5, 7)), random.random((5, 7)) < 0.6
    mask[:2], mask[:, 3] = False, False
    total, count = (x * mask).sum(axis), mask.sum(axis)
    want = np.where(count == 0, 0, total / np.maximum(count, 1))
    given = jnp.array(np.where(mask, x, random.choice(JUNK, x.shape)), jnp.float32)

    @jax.jit
    def compute(x):
        mean = functools.partial(masked_mean, mask=jnp.array(mask), axis=axis)
        return mean(x), jax.grad(lambda x: jnp.sum(mean(x)))(x)

    got, grad = compute(given)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    if axis is None:
        np.testing.assert_allclose(grad, mask / mask.sum(), rtol=1e-6)
    assert np.all(np.isfinite(grad)) and np.all(grad[~mask] == 0) and np.all(grad[mask] > 0)


def test_masked_mean_broadcasts_the_mask():
    x = jnp.arange(6.0).reshape(2, 3)
    assert masked_mean(x, jnp.array([[1.0], [0.0]])) == 1.0
    assert masked_mean(x, jnp.zeros((1, 3))) == 0.0
