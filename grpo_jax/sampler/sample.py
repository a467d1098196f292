"""The sampler: a pure function from parameters and prompts to a rollout, meant to be inside a program."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from grpo_jax.config import SamplerConfig
from grpo_jax.models.cache import Cache, end_prompt, init_cache
from grpo_jax.models.decoder import DecoderModule
from grpo_jax.sampler.draw import draw_tokens, row_keys
from grpo_jax.sampler.types import Prompts, Rollout


class Decoding(flax.struct.PyTreeNode):
    """The state of the decode loop; `position` is that of the token in `last`."""

    position: Int[Array, ""]
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    tokens: Int[Array, "B T"]
    logps: Float[Array, "B T"]
    sampled_logps: Float[Array, "B T"]
    lengths: Int[Array, "B"]
    cache: Cache


def left_positions(lengths: Int[Array, "R"], width: int) -> tuple[Int[Array, "R S"], Int[Array, "R S"]]:
    """Positions and segment ids (1, padding 0) of rows padded on the left, from their lengths."""
    place = jnp.arange(width)[None, :] - (width - lengths[:, None])
    return jnp.maximum(place, 0), (place >= 0).astype(jnp.int32)


def repeat_rows(x: Array, times: int) -> Array:
    """Each row `times` times, adjacent; a broadcast, so that a split over rows stays where it is."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:])).reshape(-1, *x.shape[1:])


def sample(
    module: DecoderModule,
    variables: Any,
    prompts: Prompts,
    key: PRNGKeyArray,
    config: SamplerConfig,
    end_ids: tuple[int, ...],
) -> Rollout:
    """Draws `config.group_size` completions of every prompt; ends early when every row has ended.

    `module` and `variables` are in the unstacked layout, `key` is that of the seed and the step.
    """
    group, length = config.group_size, config.max_new_tokens
    count, width = prompts.tokens.shape
    cache = init_cache(module.architecture, count, width, count * group, length, jnp.dtype(config.cache_dtype))
    positions, segments = left_positions(prompts.lengths, width)
    hidden, cache = module.apply(variables, prompts.tokens, positions, segments, cache)
    logits = repeat_rows(module.apply(variables, hidden[:, -1], method="logits"), group)
    keys = row_keys(key, prompts.draw, group)
    prompt_lengths = repeat_rows(prompts.lengths, group)

    rows = count * group
    empty = jnp.zeros((rows, length), jnp.float32)
    state = Decoding(
        position=jnp.zeros((), jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        tokens=jnp.zeros((rows, length), jnp.int32),
        logps=empty,
        sampled_logps=empty,
        lengths=jnp.zeros(rows, jnp.int32),
        cache=end_prompt(cache),
    )
    filler = repeat_rows(prompts.weight, group) == 0
    state = _append(state.replace(done=filler), logits, keys, config, end_ids)

    def decode(state: Decoding) -> Decoding:
        place = (prompt_lengths + state.position)[:, None]
        live = jnp.ones_like(place)
        hidden, cache = module.apply(variables, state.last[:, None], place, live, state.cache)
        logits = module.apply(variables, hidden[:, 0], method="logits")
        return _append(state.replace(cache=cache, position=state.position + 1), logits, keys, config, end_ids)

    def unfinished(state: Decoding) -> Bool[Array, ""]:
        return (state.position + 1 < length) & ~jnp.all(state.done)

    state = jax.lax.while_loop(unfinished, decode, state)
    mask = (jnp.arange(length)[None, :] < state.lengths[:, None]).astype(jnp.float32)
    return Rollout(
        tokens=state.tokens,
        lengths=state.lengths,
        logps=state.logps,
        sampled_logps=state.sampled_logps,
        ended=state.done & ~filler,
        mask=mask,
        weight=repeat_rows(prompts.weight, group),
        draw=repeat_rows(prompts.draw, group),
        group=repeat_rows(jnp.arange(count, dtype=jnp.int32), group),
        prompt_tokens=repeat_rows(prompts.tokens, group),
        prompt_lengths=prompt_lengths,
    )


def _append(state: Decoding, logits: Array, keys: Array, config: SamplerConfig, end_ids: tuple[int, ...]) -> Decoding:
    """Draws the token at `position` for the rows that have not ended, and notes which ended with it."""
    drawn, logp, sampled_logp = draw_tokens(logits, keys, state.position, config)
    live = ~state.done
    drawn = jnp.where(live, drawn, 0)

    def put(buffer: Array, values: Array) -> Array:
        values = jnp.where(live, values, 0)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(buffer, values, state.position, axis=1)

    ends = jnp.isin(drawn, jnp.asarray(end_ids, jnp.int32))
    return state.replace(
        last=drawn,
        done=state.done | ends,
        tokens=put(state.tokens, drawn),
        logps=put(state.logps, logp),
        sampled_logps=put(state.sampled_logps, sampled_logp),
        lengths=state.lengths + live,
    )
