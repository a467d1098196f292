"""The optax chain that a config names."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from grpo_jax.config import OptimConfig

ROUTING_BIAS = "routing_bias"  # the name of the leaf, in every layer with sigmoid routing
MOMENTS = "moments"  # name of the loop in the compiled program, where reports look for it


def make_schedule(config: OptimConfig, updates: int) -> optax.Schedule:
    """Learning rate by optimizer update: linear warm-up from 0, then constant, linear or cosine to the end."""
    after = max(updates - config.warmup_steps, 1)
    last = config.lr * config.final_lr_fraction
    shapes = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "linear": lambda: optax.linear_schedule(config.lr, last, after),
        "cosine": lambda: optax.cosine_decay_schedule(config.lr, after, config.final_lr_fraction),
    }
    shape = shapes[config.schedule]()
    if config.warmup_steps == 0:
        return shape
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, shape], [config.warmup_steps])


def decay_mask(params: Any, config: OptimConfig) -> Any:
    """True for the leaves that decay: kernels, embeddings and adapters, or everything."""
    if config.decay_mask == "all":
        return jax.tree.map(lambda _: True, params)
    names = {"kernel", "embedding", "a", "b"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformationExtraArgs:
    """Clip, then AdamW (arXiv 1711.05101) or Adafactor (1804.04235), scheduled over `updates` optimizer updates.

    `update(gradient, state, params, good=False)` leaves the moments as they are; see `keep_state_if`.
    """
    schedule = make_schedule(config, updates)

    def mask(params: Any) -> Any:
        return decay_mask(params, config)

    decay = [optax.add_decayed_weights(config.weight_decay, mask)] if config.weight_decay else []
    last = [*decay, optax.scale_by_learning_rate(schedule)]
    if config.name == "adafactor":
        return optax.chain(clip_by_global_norm(config.clip_norm), optax.scale_by_factored_rms(), *last)
    return optax.chain(scale_by_adam(config), *last)


def scale_by_adam(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` of the clipped gradient, whose state it has, as XLA's CPU backend needs little memory for.

    That makes the new parameters of the old moments and the gradient, which is the new moments once more, and copies
    the old ones first, as nothing tells it to write them last: 1.1 GB for SmolLM2-135M. Here moments come out of a loop
    of one turn, or none, with which nothing is fused. Other backends make all of it in one pass, and do. The change is
    made of the moments as they are kept, rounded to `moment_dtype`.
    """
    b1, b2 = config.b1, config.b2
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps, mu_dtype=jnp.dtype(config.moment_dtype))

    def moments(gradient: Any, factor: Array, mu: Any, nu: Any) -> tuple[Any, Any]:
        clipped = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)
        mu = jax.tree.map(lambda g, m: (b1 * m + (1 - b1) * g).astype(m.dtype), clipped, mu)
        return mu, jax.tree.map(lambda g, v: (b2 * v + (1 - b2) * jnp.square(g)).astype(v.dtype), clipped, nu)

    def at_once(good: Array, gradient: Any, factor: Array, mu: Any, nu: Any) -> tuple[Any, Any]:
        return keep_if(good, moments(gradient, factor, mu, nu), (mu, nu))

    def in_a_loop(good: Array, gradient: Any, factor: Array, mu: Any, nu: Any) -> tuple[Any, Any]:
        def turn(_: Array, held: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
            return jnp.zeros_like(held[0]), *moments(gradient, *held)  # one that stayed would be applied outside

        with jax.named_scope(MOMENTS):
            return jax.lax.fori_loop(0, good.astype(jnp.int32), turn, (factor, mu, nu))[1:]

    def update(
        updates: Any, state: Any, params: Any = None, *, good: Bool[Array, ""] | bool = True, **_: Any
    ) -> tuple[Any, Any]:
        count = jnp.where(good, optax.safe_increment(state.count), state.count)
        given = (good & (count > 0), updates, clip_factor(updates, config.clip_norm), state.mu, state.nu)
        mu, nu = jax.lax.platform_dependent(*given, cpu=in_a_loop, default=at_once)
        first, second = (1 - beta ** count.astype(jnp.float32) for beta in (b1, b2))
        changes = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + config.eps), mu, nu)
        return changes, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by `clip_factor`; 0 clips nothing."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = clip_factor(updates, max_norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_factor(gradient: Any, max_norm: float) -> Float[Array, ""]:
    """The largest factor up to 1 with which the gradient's norm is at most this; 1 where that is 0.

    One for all entries: where each is divided XLA's CPU backend keeps the quotients beside the gradient.
    """
    if not max_norm:
        return jnp.ones(())
    return max_norm / jnp.maximum(jnp.sqrt(jnp.sum(sums_of_squares(gradient))), max_norm)


def sums_of_squares(gradient: Any) -> Float[Array, "leaves"]:
    """Each leaf's sum of squares, one leaf after another: XLA's CPU backend stores the squares, else of all at once."""
    sums: list[Array] = []
    for leaf in jax.tree.leaves(gradient):
        # Not below 0, unless it is not a number: then what is one becomes 0 here and what is none stays.
        leaf = jnp.where(sums[-1] >= 0, leaf, 0 * leaf) if sums else leaf
        sums.append(jnp.sum(jnp.square(leaf)))
    return jnp.stack(sums)


def split_routing_biases(gradient: Any) -> tuple[Any, Any]:
    """The gradient with 0 for routing biases, and what stood there: loads, which no clip and no moment may see."""

    def is_bias(path: tuple) -> bool:
        return path[-1].key == ROUTING_BIAS

    rest = jax.tree_util.tree_map_with_path(lambda p, g: jnp.zeros_like(g) if is_bias(p) else g, gradient)
    loads = jax.tree_util.tree_map_with_path(lambda p, g: g if is_bias(p) else None, gradient)
    return rest, loads


def move_routing_biases(changes: Any, loads: Any, rate: float) -> Any:
    """The optimizer's changes, with -rate * sign(load above the mean) for routing biases (arXiv 2408.15664).

    With rate 0 they stay as they are, whatever the optimizer's decay.
    """

    def change(old: Any, load: Any) -> Any:
        return old if load is None else -rate * jnp.sign(load).astype(old.dtype)

    return jax.tree.map(change, changes, loads, is_leaf=lambda x: x is None)


def keep_if(good: Bool[Array, ""] | bool, new: Any, old: Any) -> Any:
    """The new values, or the old ones."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def keep_state_if(good: Bool[Array, ""], new: optax.OptState, old: optax.OptState) -> Any:
    """`keep_if` for the state of an optimizer whose `update` was told `good`: Adam's has followed it."""

    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    return jax.tree.map(lambda n, o: n if is_adam(n) else jnp.where(good, n, o), new, old, is_leaf=is_adam)
