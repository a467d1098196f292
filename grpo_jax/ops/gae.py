"""PPO's parts beside the surrogate: rewards by token, generalized advantages, the value loss.

Masks are any 0 or 1 (from lengths, or with holes where a turn is not the policy's): a masked cell is passed over.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.ops.masked import masked_mean, masked_select, safe_divide


def token_rewards(
    rewards: Float[Array, "B"], mask: Float[Array, "B T"], penalty: Float[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """Rewards by token: -penalty at each, and the completion's reward at its last one; 0 in masked cells.

    With penalty beta (log pi_old - log pi_ref) it is InstructGPT's reward (arXiv 2203.02155 eq. 2). A row without
    tokens earns nothing.
    """
    chex.assert_rank([rewards, mask], [1, 2])
    after = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    terminal = jnp.where((mask != 0) & (after == 1), rewards[:, None], 0.0)
    return terminal if penalty is None else terminal - masked_select(penalty, mask)


def gae(
    rewards: Float[Array, "B T"], values: Float[Array, "B T"], mask: Float[Array, "B T"], gamma: float, lam: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalized advantages and the returns A + V that values are fitted to (arXiv 1506.02438 eq. 16).

        delta_t = r_t + gamma V_(t+1) - V_t        A_t = delta_t + gamma lam A_(t+1)

    V and A after the last token are 0, cut completions included: they get no other reward either. `values` are those of
    the states before each token. Both results are 0 in masked cells and carry no gradient.
    """
    chex.assert_equal_shape([rewards, values, mask])
    rewards, values = jax.lax.stop_gradient((masked_select(rewards, mask), masked_select(values, mask)))

    def before(later: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = later
        reward, value, counted = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jax.tree.map(lambda new, old: jnp.where(counted != 0, new, old), (value, advantage), later)
        return carry, masked_select(advantage, counted)

    nothing = jnp.zeros(values.shape[0], values.dtype)
    _, by_token = jax.lax.scan(before, (nothing, nothing), (rewards.T, values.T, mask.T), reverse=True)
    advantages = by_token.T
    return advantages, masked_select(advantages + values, mask)


def whiten(x: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """(x - mean) / sqrt(variance + 1e-8) over unmasked cells, ddof 1 (TRL's masked_whiten); 0 in masked ones."""
    count = jnp.sum(mask)
    centred = masked_select(x - masked_mean(x, mask), mask)
    variance = safe_divide(jnp.sum(jnp.square(centred)), jnp.maximum(count - 1, 0))
    return centred * jax.lax.rsqrt(variance + 1e-8)


def value_losses(
    values: Float[Array, "b T"],
    old_values: Float[Array, "b T"],
    returns: Float[Array, "b T"],
    mask: Float[Array, "b T"],
    clip: float,
) -> tuple[Float[Array, "b T"], Bool[Array, "b T"]]:
    """Half the squared error of each value, and whether it was clipped.

        l = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

    PPO's clipped value loss (openai/baselines ppo2, TRL's PPOTrainer); c = 0 leaves (V - R)^2 / 2. Where the clipped
    error is the larger, the gradient is 0. Only `values` carries one; masked cells are 0 in loss and gradient.
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    old_values, returns = jax.lax.stop_gradient((masked_select(old_values, mask), masked_select(returns, mask)))
    values = masked_select(values, mask)
    error = jnp.square(values - returns)
    if clip == 0:
        return error / 2, jnp.zeros(error.shape, bool)
    bounded = jnp.square(jax.lax.stop_gradient(jnp.clip(values, old_values - clip, old_values + clip)) - returns)
    outside = (jnp.abs(values - old_values) > clip) & (bounded > error)
    # Chosen by `where` and not by `maximum`: within the bounds both are equal, and a tie would halve the gradient.
    return jnp.where(outside, bounded, error) / 2, outside


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """1 - Var(R - V) / Var(R) over unmasked cells; 0 where the returns do not vary."""

    def variance(x: Array) -> Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)

    spread = variance(returns)
    return masked_select(1.0 - safe_divide(variance(returns - values), spread), spread > 0)
