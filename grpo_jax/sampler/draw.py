"""One token a row from logits: temperature, truncation, and noise that is a function of names alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grpo_jax.config import SamplerConfig

NEVER = -jnp.inf


def row_keys(key: PRNGKeyArray, draw: Int[Array, "N"], group_size: int) -> PRNGKeyArray:
    """[N*G] keys from (key of seed and step, draw number, sample index); positions are folded in at use."""

    def one(draw_number, sample):
        return jax.random.fold_in(jax.random.fold_in(key, draw_number), sample)

    samples = jnp.arange(group_size)
    return jax.vmap(lambda d: jax.vmap(lambda s: one(d, s))(samples))(draw).reshape(-1)


def truncate(logits: Float[Array, "B V"], config: SamplerConfig) -> Float[Array, "B V"]:
    """Logits with -inf outside the k likeliest tokens, then outside the likeliest that hold mass top_p.

    Ties at the border stay in; the likeliest token always stays (arXiv 1904.09751).
    """
    if 0 < config.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, NEVER, logits)
    if config.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the likelier tokens
        least = jnp.min(jnp.where(before < config.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, NEVER, logits)
    return logits


def draw_tokens(
    logits: Float[Array, "B V"], keys: PRNGKeyArray, position: Int[Array, ""], config: SamplerConfig
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Tokens, their log-probabilities under the full softmax, and under the law they were drawn from.

    argmax(logits + Gumbel noise) draws from the softmax. Temperature 0 is greedy; its
    log-probabilities are those of temperature 1.
    """
    greedy = config.temperature == 0
    scaled = logits.astype(jnp.float32) / (1.0 if greedy else config.temperature)
    kept = truncate(scaled, config)
    noise = 0.0
    if not greedy:
        at = jax.vmap(lambda k: jax.random.fold_in(k, position))(keys)
        noise = jax.vmap(lambda k: jax.random.gumbel(k, scaled.shape[-1:], jnp.float32))(at)
    tokens = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)

    def logp(values):
        chosen = jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(values, axis=-1)

    full = logp(scaled)
    return tokens, full, full if kept is scaled else logp(kept)
