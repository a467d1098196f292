"""Schedules, AdamW and Adafactor step by step against numpy; clipping, decay mask, moment dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.config import OptimConfig
from grpo_jax.optimizer import decay_mask, keep_if, keep_state_if, make_optimizer, make_schedule, sums_of_squares

UPDATES = 10


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules(shape, warmup):
    config = OptimConfig(lr=2.0, schedule=shape, warmup_steps=warmup, final_lr_fraction=0.25)
    schedule = make_schedule(config, UPDATES)
    for update in range(UPDATES + 3):
        share = min(max(update - warmup, 0) / (UPDATES - warmup), 1)
        want = {
            "constant": 2.0,
            "linear": 2.0 + (0.5 - 2.0) * share,
            "cosine": 0.5 + (2.0 - 0.5) * (1 + np.cos(np.pi * share)) / 2,
        }[shape]
        want = 2.0 * update / warmup if update < warmup else want
        assert float(schedule(update)) == pytest.approx(want, rel=1e-6), update


def test_a_warm_up_longer_than_the_run_is_all_there_is():
    schedule = make_schedule(OptimConfig(lr=1.0, schedule="cosine", warmup_steps=20), UPDATES)
    assert [float(schedule(i)) for i in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])


PARAMS = {
    "layer": {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)},
    "norm": {"scale": np.full(3, 2, np.float32)},
}


def gradients(step):
    random = np.random.default_rng(step)
    return jax.tree.map(lambda x: random.normal(0, 3, x.shape).astype(np.float32), PARAMS)


def run(config, steps=4, params=PARAMS):
    optimizer = make_optimizer(config, UPDATES)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        changes, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, changes), state

    for i in range(steps):
        params, state = step(params, state, gradients(i))
    return jax.device_get(params), jax.device_get(state)


def adamw(config, steps=4):
    """AdamW of arXiv 1711.05101, algorithm 2, decay times the learning rate; float64."""
    params = jax.tree.map(lambda x: x.astype(np.float64), PARAMS)
    m, v = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for t in range(1, steps + 1):
        g = jax.tree.map(lambda x: x.astype(np.float64), gradients(t - 1))
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        scale = min(1, config.clip_norm / norm) if config.clip_norm else 1
        g = jax.tree.map(lambda x, scale=scale: x * scale, g)
        m = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, m, g)
        v = jax.tree.map(lambda v, g: config.b2 * v + (1 - config.b2) * g**2, v, g)
        lr = config.lr * (1 - (t - 1) / UPDATES) if config.schedule == "linear" else config.lr

        def move(path, p, m, v, t=t, lr=lr):
            decays = config.decay_mask == "all" or path[-1].key == "kernel"
            change = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
            return p - lr * (change + config.weight_decay * decays * p)

        params = jax.tree_util.tree_map_with_path(move, params, m, v)
    return params


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"clip_norm": 0.0, "schedule": "linear"},
        {"clip_norm": 0.01, "eps": 0.1},
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "decay_mask": "all", "b1": 0.5, "b2": 0.9},
    ],
    ids=lambda fields: "-".join(f"{k}_{v}" for k, v in fields.items()) or "defaults",
)
def test_adamw(fields):
    config = OptimConfig(lr=0.1, **fields)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), run(config)[0], adamw(config))


def test_adafactor():
    """The factored second moment of arXiv 1804.04235, eq. 2 to 4 (small tensors are not factored), beta2 1 - t^-0.8."""
    config = OptimConfig(name="adafactor", lr=0.1, clip_norm=0.5, weight_decay=0.3)
    params = jax.tree.map(lambda x: x.astype(np.float64), PARAMS)
    v = jax.tree.map(np.zeros_like, params)
    for t in range(1, 4):
        g = jax.tree.map(lambda x: x.astype(np.float64), gradients(t - 1))
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x, norm=norm: x * min(1, 0.5 / norm), g)
        decay = 1 - t**-0.8
        v = jax.tree.map(lambda v, g, decay=decay: decay * v + (1 - decay) * (g**2 + 1e-30), v, g)
        params = jax.tree_util.tree_map_with_path(
            lambda path, p, g, v: p - 0.1 * (g / np.sqrt(v) + 0.3 * (path[-1].key == "kernel") * p), params, g, v
        )
    got, _ = run(config, steps=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, params)


def test_adafactor_keeps_rows_and_columns_of_large_matrices_only():
    large = {"kernel": jnp.ones((256, 128))}
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(make_optimizer(OptimConfig(name=name), UPDATES).init(large)))
        for name in ("adafactor", "adamw")
    }
    assert sizes["adafactor"] < 256 + 128 + 10 and sizes["adamw"] >= 2 * 256 * 128


def test_clipping_bounds_the_norm_of_all_leaves_together():
    """Seen in Adam's first moment, (1 - b1) times the clipped gradient after one update."""
    for clip in (0.0, 0.5, 1e6):
        _, state = run(OptimConfig(lr=0.1, clip_norm=clip), steps=1)
        adam = next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(adam.mu))) / (1 - 0.9)
        full = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradients(0))))
        assert norm == pytest.approx(0.5 if clip == 0.5 else full, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_has_the_dtype_asked_for(dtype):
    params, state = run(OptimConfig(lr=0.1, moment_dtype=dtype))
    adam = next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {"float32"}
    want = adamw(OptimConfig(lr=0.1))
    error = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True))
    assert (error < 1e-5) if dtype == "float32" else (1e-5 < error < 0.02)


def test_what_decays():
    of = tiny.architecture(tied=False)
    variables = {"params": tiny.params(of), "adapters": tiny.adapters(of)}
    mask = decay_mask(variables, OptimConfig(decay_mask="matrices"))
    for path, decays in jax.tree_util.tree_flatten_with_path(mask)[0]:
        assert decays == (path[-1].key != "scale"), path
    assert all(jax.tree.leaves(decay_mask(variables, OptimConfig(decay_mask="all"))))


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_adam_is_that_of_optax(moment_dtype):
    """Clip and AdamW, with a step among them that is not good: nothing changes in it."""
    config = OptimConfig(lr=0.1, weight_decay=0.1, clip_norm=1.0, decay_mask="all", moment_dtype=moment_dtype)
    kinds = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "mu_dtype": jnp.dtype(moment_dtype)}
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1, **kinds))
    own = make_optimizer(config, UPDATES)

    @jax.jit
    def both(params, states, gradient, good):
        changes, after = own.update(gradient, states[0], params, good=good)
        states = keep_state_if(good, after, states[0]), plain.update(gradient, states[1], params)[1]
        return jax.tree.map(lambda p, c: jnp.where(good, p + c, p), params, changes), states, after

    params, states = PARAMS, (own.init(PARAMS), plain.init(PARAMS))
    want = PARAMS
    for step in range(4):
        changes, _ = plain.update(gradients(step), states[1], want)
        want = optax.apply_updates(want, changes)
        params, states, _ = both(params, states, gradients(step), True)
        broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), jax.tree.map(jnp.asarray, gradients(step)))
        held, kept, after = both(params, states, broken, False)
        jax.tree.map(np.testing.assert_array_equal, (params, states[0]), (held, kept[0]))
        assert int(optax.tree.get(after, "count", filtering=lambda path, _: "Adam" in str(path))) == step + 1
        near = 1e-6 if moment_dtype == "float32" else 1e-3  # optax makes changes of moments before they are rounded
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=near, atol=near), params, want)


def test_moments_are_written_in_place():
    """With optax's own the program copies them first, as new parameters are made of the old moments there."""
    params = {f"layer_{i}": {"kernel": jnp.full((256, 257), 1.0 + i), "scale": jnp.ones(257)} for i in range(8)}
    config = OptimConfig(clip_norm=1.0)
    kinds = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(config.lr, **kinds))

    def temporaries(optimizer, kept):
        def update(params, state, gradient):
            good = jnp.isfinite(jnp.sum(gradient["layer_0"]["scale"]))
            changes, after = optimizer.update(gradient, state, params, good=good)
            return optax.apply_updates(params, changes), kept(good, after, state)

        program = jax.jit(update, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params).compile()
        return program.memory_analysis().temp_size_in_bytes

    size = sum(x.nbytes for x in jax.tree.leaves(params))
    own = temporaries(make_optimizer(config, UPDATES), keep_state_if)
    assert own < 0.5 * size < temporaries(optax.with_extra_args_support(plain), keep_if), (own, size)


def test_sums_of_squares_tell_of_each_leaf_alone():
    bad, inf, good = jnp.asarray([1.0, jnp.nan]), jnp.asarray([jnp.inf, 2.0]), jnp.asarray([3.0, 4.0])
    sums = np.asarray(sums_of_squares({"a": good, "b": bad, "c": good, "d": inf, "e": good}))
    assert np.isfinite(sums).tolist() == [True, False, True, False, True] and sums[0] == 25
    assert np.asarray(sums_of_squares({"a": good, "b": 2 * good, "c": good})).tolist() == [25, 100, 25]
