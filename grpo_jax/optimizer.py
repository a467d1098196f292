"""The optax chain that a config names."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.config import OptimConfig

ROUTING_BIAS = "routing_bias"  # the name of the leaf, in every layer with sigmoid routing


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


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """Clip, then AdamW (arXiv 1711.05101) or Adafactor (1804.04235), scheduled over `updates` optimizer updates."""
    schedule = make_schedule(config, updates)

    def mask(params: Any) -> Any:
        return decay_mask(params, config)

    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "adafactor":
        decay = [optax.add_decayed_weights(config.weight_decay, mask)] if config.weight_decay else []
        factored = optax.scale_by_factored_rms()
        return optax.chain(*clip, factored, *decay, optax.scale_by_learning_rate(schedule))
    return optax.chain(
        *clip,
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=mask,
            mu_dtype=jnp.dtype(config.moment_dtype),
        ),
    )


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
