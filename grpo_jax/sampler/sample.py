"""The sampler: a pure function from parameters and prompts to a rollout, meant to be inside a program.

With `sampler.slots` = 0 every completion has a row of its own, and decoding ends when the last one has. With fewer
slots than completions a slot whose row has ended takes the next completion: an outer loop writes out and refills, an
inner one decodes until enough slots are free (a refill by `lax.cond` inside the decode loop would copy the whole cache
at every token). All rows write the same column of their buffers and of the cache, `clock` modulo T, each from a start
of its own, so that a write is one slice. The tokens do not depend on the slots: noise is named by completion and
position.

Without slots decoding may be cut into pieces (`sampler.cache_pieces`): loops one after another, between which the cache
grows, so that attention does not read what no token can lie in yet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from grpo_jax.config import SamplerConfig
from grpo_jax.models.cache import Cache, end_prompt, init_cache, lengthen, take_prompts
from grpo_jax.models.decoder import DecoderModule
from grpo_jax.sampler.draw import draw_tokens, row_noise
from grpo_jax.sampler.stops import StopTable
from grpo_jax.sampler.types import Prompts, Rollout

# Names of the loops in the compiled program, where reports look for them; decode_1 and so on are its later pieces.
DECODE, REFILL = "decode", "refill"
PIECES, PIECES_FROM = 4, 512  # pieces that decoding is cut into on CPUs, from so many new tokens up


class Slots(flax.struct.PyTreeNode):
    """What each slot holds: a completion (`row`; B: none yet), its tokens in columns `start`, `start` + 1, .. mod T.

    `count` tokens are drawn, the newest is `last`; `done` rows draw no more, and `ended` did so by an end token or a
    stop string, `stop` being the state of the automaton that looks for them. `started` is the clock at the first token.
    """

    row: Int[Array, "S"]
    start: Int[Array, "S"]
    count: Int[Array, "S"]
    last: Int[Array, "S"]
    done: Bool[Array, "S"]
    ended: Bool[Array, "S"]
    stop: Int[Array, "S"]
    started: Int[Array, "S"]
    tokens: Int[Array, "S T"]
    logps: Float[Array, "S T"]
    sampled_logps: Float[Array, "S T"]


class Decoding(flax.struct.PyTreeNode):
    """The state of the decode loop; `clock` counts passes through the decoder."""

    clock: Int[Array, ""]
    slots: Slots
    cache: Cache


class Written(flax.struct.PyTreeNode):
    """Completions by their number."""

    tokens: Int[Array, "B T"]
    logps: Float[Array, "B T"]
    sampled_logps: Float[Array, "B T"]
    count: Int[Array, "B"]
    ended: Bool[Array, "B"]
    started: Int[Array, "B"]


def left_positions(lengths: Int[Array, "R"], width: int) -> tuple[Int[Array, "R S"], Int[Array, "R S"]]:
    """Positions and segment ids (1, padding 0) of rows padded on the left, from their lengths."""
    place = jnp.arange(width)[None, :] - (width - lengths[:, None])
    return jnp.maximum(place, 0), (place >= 0).astype(jnp.int32)


def repeat_rows(x: Array, times: int) -> Array:
    """Each row `times` times, adjacent; a broadcast, so that a split over rows stays where it is."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:])).reshape(-1, *x.shape[1:])


def choose_pieces(config: SamplerConfig, platform: str) -> SamplerConfig:
    """The config with the pieces that `cache_pieces=0` stands for on devices of a platform."""
    many = platform == "cpu" and config.max_new_tokens >= PIECES_FROM
    return dataclasses.replace(config, cache_pieces=config.cache_pieces or (PIECES if many else 1))


def piece_lengths(config: SamplerConfig) -> list[int]:
    """Tokens a completion that the cache has room for in each piece of decoding, in rising order; the last is T."""
    length = config.max_new_tokens
    return sorted({-(-length // 2**i) for i in range(max(config.cache_pieces, 1))})


def piece_passes(config: SamplerConfig) -> list[int]:
    """Passes through the decoder in each piece of decoding, where a completion takes all of its tokens."""
    ends = [min(room, config.max_new_tokens - 1) for room in piece_lengths(config)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@jax.named_scope("sampling")
def sample(
    module: DecoderModule,
    variables: Any,
    prompts: Prompts,
    key: PRNGKeyArray,
    config: SamplerConfig,
    end_ids: tuple[int, ...],
    stops: StopTable | None = None,
    shards: int = 1,
    constrain: Callable[[Any], Any] = lambda tree: tree,
    seed_axis: str | None = None,
) -> Rollout:
    """Draws `config.group_size` completions of every prompt; ends early when every row has ended.

    `module` and `variables` are in the unstacked layout, `key` is that of the seed and the step. Prompts and slots are
    cut into `shards` parts that refill from their own completions, so that nothing crosses devices; `constrain` lays
    arrays of rows out over them. Under a `vmap` whose axis is named `seed_axis` it ends when the rows of every seed
    have (without slots): a condition by seed would make XLA select the whole cache at every token.
    """
    group, length = config.group_size, config.max_new_tokens
    count, width = prompts.tokens.shape
    rows = count * group
    slots = min(config.slots or rows, rows)
    own = rows if slots == rows else 0  # with fewer slots the prompts' cache is only copied from
    pieces = piece_lengths(config) if slots == rows else [length]
    dtype = jnp.dtype(config.cache_dtype)
    cache = init_cache(module.architecture, count, width, own, length, dtype, pieces[0])
    hidden, cache = module.apply(variables, prompts.tokens, *left_positions(prompts.lengths, width), cache)
    last_hidden = hidden[:, -1]
    prompt_lengths = repeat_rows(prompts.lengths, group)
    filler = repeat_rows(prompts.weight, group) == 0
    noise = row_noise(key, prompts.draw, group, length, prompts.first_sample)
    draw = _Drawing(noise, config, end_ids, stops, shards)

    def decode(state: Decoding) -> Decoding:
        held = state.slots
        # The newest token stands `count` - 1 after the prompt. A slot that holds nothing takes the first row's place.
        place = (pick(prompt_lengths, shards, held.row) + held.count - 1)[:, None]
        live = jnp.ones_like(place)
        hidden, cache = module.apply(variables, held.last[:, None], place, live, state.cache)
        logits = module.apply(variables, hidden[:, 0], method="logits")
        clock = state.clock + 1
        return Decoding(clock, draw(held, logits, clock, ~held.done), cache)

    def unembed(hidden: Array) -> Array:
        return module.apply(variables, hidden, method="logits")

    if slots == rows:
        held = _empty(rows, length).replace(row=jnp.arange(rows, dtype=jnp.int32), done=filler)
        held = draw(held, repeat_rows(unembed(last_hidden), group), jnp.int32(0), ~held.done)
        state = Decoding(jnp.int32(0), held, end_prompt(cache))
        for number, room in enumerate(pieces):
            if number:
                state = state.replace(cache=lengthen(state.cache, room))

            def going(state: Decoding, room: int = room) -> Bool[Array, ""]:
                return anywhere(~jnp.all(state.slots.done), seed_axis) & (state.clock < room)

            with jax.named_scope(f"{DECODE}_{number}" if number else DECODE):
                state = jax.lax.while_loop(going, decode, state)
        written = Written(**{name: getattr(state.slots, name) for name in Written.__dataclass_fields__})
    else:
        into = init_cache(module.architecture, slots, width, slots, length, dtype)
        refill = _Refill(cache, last_hidden, unembed, filler, draw, group, shards)
        first = Decoding(jnp.int32(0), _empty(slots, length).replace(row=jnp.full(slots, rows)), end_prompt(into))
        first = constrain_slots(first, slots, constrain)
        written = _decode_refilled(first, decode, refill, constrain(_nothing_written(rows, length)))
    return Rollout(
        tokens=written.tokens,
        lengths=written.count,
        logps=written.logps,
        sampled_logps=written.sampled_logps,
        ended=written.ended,
        started=written.started,
        mask=(jnp.arange(length)[None, :] < written.count[:, None]).astype(jnp.float32),
        weight=repeat_rows(prompts.weight, group),
        draw=repeat_rows(prompts.draw, group),
        group=repeat_rows(jnp.arange(count, dtype=jnp.int32), group),
        prompt_tokens=repeat_rows(prompts.tokens, group),
        prompt_lengths=prompt_lengths,
    )


def constrain_slots(state: Decoding, slots: int, constrain: Callable[[Any], Any]) -> Decoding:
    """The state with every array that has a row a slot laid out as rows are."""
    return jax.tree.map(lambda x: constrain(x) if x.ndim and x.shape[0] == slots else x, state)


def anywhere(condition: Bool[Array, ""], seed_axis: str | None) -> Bool[Array, ""]:
    """Whether a condition holds for any seed of a `vmap` whose axis has this name: one number for all of them."""
    return condition if seed_axis is None else jax.lax.psum(condition.astype(jnp.int32), seed_axis) > 0


def _empty(slots: int, length: int) -> Slots:
    zero, no = jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool)
    empty = jnp.zeros((slots, length), jnp.float32)
    return Slots(zero, zero, zero, zero, ~no, no, zero, zero, empty.astype(jnp.int32), empty, empty)


def _nothing_written(rows: int, length: int) -> Written:
    empty = jnp.zeros((rows, length), jnp.float32)
    zero = jnp.zeros(rows, jnp.int32)
    return Written(empty.astype(jnp.int32), empty, empty, zero, zero.astype(bool), zero)


class _Drawing:
    """Draws the next token of the rows that are live, and notes which ended with it."""

    def __init__(
        self, noise: Array, config: SamplerConfig, end_ids: tuple[int, ...], stops: StopTable | None, shards: int
    ):
        self.noise, self.config, self.stops, self.shards = noise, config, stops, shards
        self.end_ids = jnp.asarray(end_ids, jnp.int32)

    def __call__(self, held: Slots, logits: Array, clock: Array, live: Array) -> Slots:
        length = self.noise.shape[1]
        noise = pick(self.noise, self.shards, held.row, jnp.minimum(held.count, length - 1))
        drawn, logp, sampled_logp = draw_tokens(logits, noise, self.config, self._forbidden(held, logits))
        drawn = jnp.where(live, drawn, 0)
        column = clock % length

        def put(buffer: Array, values: Array) -> Array:
            # A row that has ended keeps what it holds: its column may come round again before it is written out.
            before = jax.lax.dynamic_slice_in_dim(buffer, column, 1, axis=1)
            values = jnp.where(live[:, None], values[:, None], before)
            return jax.lax.dynamic_update_slice_in_dim(buffer, values, column, axis=1)

        ends = jnp.isin(drawn, self.end_ids)
        stop = held.stop
        if self.stops is not None:
            stop = jnp.where(live, self.stops.step(stop, drawn), stop)
            ends |= self.stops.found(stop)
        count = held.count + live
        return held.replace(
            count=count,
            last=jnp.where(live, drawn, held.last),
            done=held.done | (live & (ends | (count >= length))),
            ended=held.ended | (live & ends),
            stop=stop,
            tokens=put(held.tokens, drawn),
            logps=put(held.logps, logp),
            sampled_logps=put(held.sampled_logps, sampled_logp),
        )

    def _forbidden(self, held: Slots, logits: Array) -> Array | None:
        """End tokens before a row has `min_new_tokens`."""
        if not self.config.min_new_tokens:
            return None
        ends = jnp.isin(jnp.arange(logits.shape[-1]), self.end_ids)
        return (held.count + 1 < self.config.min_new_tokens)[:, None] & ends[None, :]


class _Refill:
    """Gives free slots the next completions; `queue` holds each shard's completions, real ones first."""

    def __init__(
        self, prompts: Cache, hidden: Array, unembed: Any, filler: Array, draw: _Drawing, group: int, shards: int
    ):
        self.prompts, self.hidden, self.unembed, self.draw = prompts, hidden, unembed, draw
        self.group, self.shards = group, shards
        by_shard = filler.reshape(shards, -1)
        self.queue = jnp.argsort(by_shard, axis=1, stable=True).astype(jnp.int32)
        self.total = jnp.sum(~by_shard, axis=1)

    def waiting(self, taken: Int[Array, "D"]) -> Bool[Array, "D"]:
        """Whether a shard has completions that no slot has taken."""
        return taken < self.total

    def due(self, held: Slots, taken: Int[Array, "D"]) -> Bool[Array, ""]:
        """Whether a sixteenth of some shard's slots are free while completions wait there."""
        free = jnp.sum(held.done.reshape(self.shards, -1), axis=1)
        slots = held.done.shape[0] // self.shards
        return jnp.any(self.waiting(taken) & (free >= max(slots // 16, 1)))

    def __call__(self, state: Decoding, taken: Int[Array, "D"]) -> tuple[Decoding, Array]:
        """The state with new completions in free slots, their first tokens drawn."""
        held, shards = state.slots, self.shards
        free = held.done.reshape(shards, -1)
        place = taken[:, None] + jnp.cumsum(free, axis=1) - 1
        new = free & (place < self.total[:, None])
        inside = jnp.take_along_axis(self.queue, jnp.minimum(place, self.queue.shape[1] - 1), axis=1)
        row = (inside + jnp.arange(shards, dtype=jnp.int32)[:, None] * self.queue.shape[1]).reshape(-1)
        prompt = inside // self.group
        taken, new = taken + jnp.sum(new, axis=1), new.reshape(-1)
        held = held.replace(
            row=jnp.where(new, row, held.row),
            start=jnp.where(new, state.clock % held.tokens.shape[1], held.start),
            count=jnp.where(new, 0, held.count),
            done=held.done & ~new,
            ended=held.ended & ~new,
            stop=jnp.where(new, 0, held.stop),
            started=jnp.where(new, state.clock, held.started),
        )
        logits = self.unembed(take_rows(self.hidden, prompt))
        held = self.draw(held, logits, state.clock, new)
        return Decoding(state.clock, held, take_prompts(state.cache, self.prompts, prompt, new)), taken

    def write(self, written: Written, held: Slots) -> Written:
        """The completions with those that have ended in their slots written out."""
        length, rows = held.tokens.shape[1], written.count.shape[0] // self.shards
        columns = (held.start[:, None] + jnp.arange(length)) % length
        inside = jnp.arange(length)[None, :] < held.count[:, None]
        target = jnp.where(held.done, held.row % rows, rows).reshape(self.shards, -1)
        target = jnp.where((held.row < rows * self.shards).reshape(target.shape), target, rows)

        def put(name: str) -> Array:
            new, old = getattr(held, name), getattr(written, name)
            if new.ndim > 1:
                new = jnp.where(inside, jnp.take_along_axis(new, columns, axis=1), 0)
            new, by_shard = (x.reshape(self.shards, -1, *x.shape[1:]) for x in (new, old))
            return jax.vmap(lambda o, i, n: o.at[i].set(n, mode="drop"))(by_shard, target, new).reshape(old.shape)

        return Written(**{name: put(name) for name in Written.__dataclass_fields__})


def pick(x: Shaped[Array, "B *rest"], shards: int, row: Int[Array, "S"], *index: Int[Array, "S"]) -> Array:
    """x[row, *index] where each of the equal parts of slots holds rows of its own part of x; beyond B any row.

    A plain gather would not know that no row crosses parts: it is two collectives in every decode pass.
    """
    parts = x.reshape(shards, -1, *x.shape[1:])
    inside, *rest = (i.reshape(shards, -1) for i in (row % parts.shape[1], *index))
    picked = jax.vmap(lambda part, *i: part[i])(parts, inside, *rest)
    return picked.reshape(-1, *picked.shape[2:])


def take_rows(x: Array, index: Int[Array, "D s"]) -> Array:
    """Rows of each of D parts of x by their numbers in the part, so that no row crosses parts."""
    parts = x.reshape(index.shape[0], -1, *x.shape[1:])
    return jax.vmap(lambda part, i: part[i])(parts, index).reshape(-1, *x.shape[1:])


def _decode_refilled(
    state: Decoding, decode: Callable[[Decoding], Decoding], refill: _Refill, written: Written
) -> Written:
    """All completions, decoded in fewer slots."""

    def unfinished(carry: tuple[Decoding, Array, Written]) -> Bool[Array, ""]:
        state, taken, _ = carry
        return ~jnp.all(state.slots.done) | jnp.any(refill.waiting(taken))

    def turn(carry: tuple[Decoding, Array, Written]) -> tuple[Decoding, Array, Written]:
        state, taken, written = carry
        written = refill.write(written, state.slots)
        state, taken = refill(state, taken)

        def busy(state: Decoding) -> Bool[Array, ""]:
            return ~jnp.all(state.slots.done) & ~refill.due(state.slots, taken)

        with jax.named_scope(DECODE):
            return jax.lax.while_loop(busy, decode, state), taken, written

    with jax.named_scope(REFILL):
        state, _, written = jax.lax.while_loop(unfinished, turn, (state, jnp.zeros_like(refill.total), written))
    return refill.write(written, state.slots)
