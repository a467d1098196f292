"""A model with latent attention and routed experts goes through the whole step."""

import dataclasses

import jax
import numpy as np
import tiny

from grpo_jax.models.architecture import Experts, Latent, Stack
from grpo_jax.models.decoder import Decoder, init_params
from grpo_jax.models.weights import take
from grpo_jax.step import Program

ROUTED = dataclasses.replace(
    tiny.architecture(kv_heads=4, head_size=6),
    stacks=(Stack((0,), experts=True),),
    latent=Latent(rank=6, query_rank=5, plain=4, rotary=2, value=3),
    experts=Experts(
        count=6, chosen=2, width=7, shared_width=8, scoring="sigmoid", scale=2.5, groups=3, chosen_groups=2
    ),
)
RATE = 0.03125  # a power of two: its steps are exact


def test_one_step_of_experts_and_latent_attention():
    """The sampler's absorbed attention and the trainer's expanded one agree; the routing bias follows the load."""
    config = tiny.config(**{"optim.routing_bias_rate": RATE, "optim.weight_decay": 0.5, "optim.decay_mask": "all"})
    parts = tiny.parts(config)
    parts = dataclasses.replace(parts, module=Decoder(ROUTED, balance=True))
    params = tiny.drawn(ROUTED)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, jax.eval_shape(lambda: init_params(Decoder(ROUTED), jax.random.key(0)))
    )
    state = tiny.state(parts, {"params": params})
    program = Program(parts, state)
    after, metrics, rollout = program(state, tiny.on_mesh(tiny.prompts(config), parts.mesh))
    means = {name: total / count for name, (total, count) in jax.device_get(metrics.means).items() if count}
    assert means["sampler_gap/max"] < 1e-5 and means["skipped"] == 0 and means["grad_norm"] > 0
    trained = jax.device_get(after.trainable["params"])
    moved = (trained["stack_0"]["mlp"]["routing_bias"] - params["stack_0"]["mlp"]["routing_bias"]) / RATE
    assert set(np.round(moved.ravel(), 3)) <= {-1.0, 0.0, 1.0} and 1.0 in moved.round(3) and -1.0 in moved.round(3)
    for path in ("attention/key_up", "attention/query_latent", "mlp/router", "mlp/experts_up", "mlp/shared/down"):
        kernel, before = (take(tree, f"stack_0/{path}/kernel") for tree in (trained, params))
        assert np.isfinite(kernel).all() and not np.array_equal(kernel, before), path
    assert rollout.tokens.shape == (8, 6)
