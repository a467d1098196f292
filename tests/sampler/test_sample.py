"""The sampler: noise by names alone, truncation and log-probabilities against numpy, ends and early exit."""

import dataclasses
import functools

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny

from grpo_jax.config import SamplerConfig
from grpo_jax.models.decoder import Decoder, unstack
from grpo_jax.sampler.draw import draw_tokens, row_noise, truncate
from grpo_jax.sampler.sample import choose_pieces, piece_lengths, piece_passes, sample
from grpo_jax.sampler.stops import stop_table
from grpo_jax.step import EVALUATION, TRAINING, draw_completions, noise_key, occupancy

ARCHITECTURE = tiny.architecture(layers=1)
PARAMS = tiny.params(ARCHITECTURE)
N, G, T = 3, 3, 6
CONFIG = SamplerConfig(group_size=G, max_new_tokens=T)
PROMPTS = tiny.prompts(tiny.config(**{"data.prompts_per_step": N}), first_draw=10)
KEY = noise_key(0, TRAINING, 0)


@functools.cache
def compiled():
    module, variables = Decoder(ARCHITECTURE, scanned=False), unstack({"params": PARAMS}, ARCHITECTURE)
    return jax.jit(lambda prompts, key: sample(module, variables, prompts, key, CONFIG, tiny.END_IDS))


def draw(prompts=PROMPTS, key=KEY):
    """A rollout of the decoder on the host."""
    return jax.device_get(compiled()(prompts, key))


@functools.cache
def compiled_bigram(config, end_ids, module):
    return jax.jit(lambda prompts, key: sample(module, {"params": bigram.params()}, prompts, key, config, end_ids))


def draw_bigram(config, prompts=PROMPTS, key=KEY, end_ids=tiny.END_IDS, module=None):
    """A rollout of the bigram table on the host."""
    return jax.device_get(compiled_bigram(config, end_ids, module or bigram.Bigram())(prompts, key))


@pytest.fixture(scope="module")
def base():
    return draw()


def rows_of(prompt):
    return slice(prompt * G, (prompt + 1) * G)


# Noise is a function of names.


def test_a_batch_of_one_draws_the_tokens_of_a_batch_of_many(base):
    for n in range(N):
        alone = draw(jax.tree.map(lambda x, n=n: x[n : n + 1], PROMPTS))
        for name in ("tokens", "lengths", "ended", "prompt_lengths", "draw"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(base, name)[rows_of(n)], err_msg=name)
        np.testing.assert_allclose(alone.logps, base.logps[rows_of(n)], atol=1e-5)


def test_the_order_of_prompts_permutes_rows(base):
    order = np.array([2, 0, 1])
    moved = draw(jax.tree.map(lambda x: x[order], PROMPTS))
    rows = (order[:, None] * G + np.arange(G)).reshape(-1)
    np.testing.assert_array_equal(moved.tokens, base.tokens[rows])
    np.testing.assert_array_equal(moved.draw, base.draw[rows])
    np.testing.assert_array_equal(moved.group, np.repeat(np.arange(N), G))


def test_padding_of_prompts_changes_no_token(base):
    more = np.full((N, 4), 9, np.int32)
    junk = np.where(np.arange(7) < 7 - PROMPTS.lengths[:, None], 9, PROMPTS.tokens)
    wide = draw(PROMPTS.replace(tokens=np.concatenate([more, junk], axis=1)))
    np.testing.assert_array_equal(wide.tokens, base.tokens)
    np.testing.assert_allclose(wide.logps, base.logps, atol=1e-5)


def test_filler_rows_are_empty_and_leave_the_others_alone(base):
    got = draw(PROMPTS.replace(weight=np.array([1, 0, 1], np.float32)))
    filler = rows_of(1)
    assert not got.tokens[filler].any() and not got.lengths[filler].any() and not got.ended[filler].any()
    assert not got.mask[filler].any() and not got.weight[filler].any() and not got.logps[filler].any()
    real = np.delete(np.arange(N * G), np.arange(N * G)[filler])
    np.testing.assert_array_equal(got.tokens[real], base.tokens[real])
    assert got.weight[real].all()


def test_every_name_of_the_noise_changes_the_tokens(base):
    assert len({tuple(row) for row in base.tokens.tolist()}) == N * G  # sample indices, at the least
    changed = {
        "seed": draw(key=noise_key(1, TRAINING, 0)),
        "step": draw(key=noise_key(0, TRAINING, 1)),
        "stream": draw(key=noise_key(0, EVALUATION, 0)),
        "draw": draw(PROMPTS.replace(draw=PROMPTS.draw + N)),
    }
    for name, rollout in changed.items():
        assert not np.array_equal(rollout.tokens, base.tokens), name
    np.testing.assert_array_equal(draw().tokens, base.tokens)


def test_the_same_row_drawn_twice_in_a_step_gets_other_noise():
    twice = draw(jax.tree.map(lambda x: x[[0, 0, 1]], PROMPTS).replace(draw=np.array([4, 9, 5], np.int32)))
    assert not np.array_equal(twice.tokens[rows_of(0)], twice.tokens[rows_of(1)])
    np.testing.assert_array_equal(twice.prompt_tokens[rows_of(0)], twice.prompt_tokens[rows_of(1)])


def test_noise_does_not_depend_on_group_size_or_budget():
    small = draw_bigram(SamplerConfig(group_size=2, max_new_tokens=4))
    large = draw_bigram(SamplerConfig(group_size=3, max_new_tokens=6))
    first = large.tokens.reshape(N, 3, 6)[:, :2, :4].reshape(-1, 4)
    np.testing.assert_array_equal(small.tokens, first)


def test_positions_and_keys_give_noise_of_their_own():
    noise = np.asarray(row_noise(KEY, jnp.array([3, 4]), 2, 5))
    assert noise.shape == (4, 5, 2) and len(np.unique(noise)) == 40 and (0 <= noise).all() and (noise < 1).all()
    np.testing.assert_array_equal(row_noise(KEY, jnp.array([4]), 2, 5), noise[2:])
    np.testing.assert_array_equal(row_noise(KEY, jnp.array([3, 4]), 2, 3), noise[:, :3])
    np.testing.assert_array_equal(row_noise(KEY, jnp.array([3, 4]), 1, 5, jnp.array([1, 0])), noise[1:3])
    logits = jnp.zeros((4, 1000))
    drawn = jax.jit(lambda noise: draw_tokens(logits, noise, CONFIG)[0])
    tokens = [np.asarray(drawn(noise[:, p])) for p in range(5)]
    assert len(np.unique(tokens)) > 15  # of 20; equal noise anywhere would leave few


# What is drawn, and its log-probability.


def test_log_probabilities_of_the_decoder_against_numpy(base):
    for b in range(N * G):
        prompt = PROMPTS.tokens[b // G, 7 - PROMPTS.lengths[b // G] :]
        n = base.lengths[b]
        want = numpy_decoder.completion_logps(PARAMS, ARCHITECTURE, prompt, base.tokens[b, :n])
        np.testing.assert_allclose(base.logps[b, :n], want, atol=1e-5)
    np.testing.assert_array_equal(base.logps, base.sampled_logps)
    padding = np.arange(T) >= base.lengths[:, None]
    assert not base.tokens[padding].any() and not base.logps[padding].any() and not base.mask[padding].any()
    assert base.mask[~padding].all()


def numpy_truncate(row, top_k, top_p, min_p=0.0):
    """Which tokens stay, one by one from the likeliest; ties at the border stay together."""
    row = row.astype(np.float64)
    kept = np.isfinite(row)
    if top_k:
        kept &= row >= np.sort(row)[::-1][top_k - 1]
    if top_p < 1:
        p = np.where(kept, np.exp(row - row[kept].max()), 0)
        p /= p.sum()
        mass, least = 0.0, None
        for i in np.argsort(-p, kind="stable"):
            if mass >= top_p:
                break
            mass, least = mass + p[i], row[i]
        kept &= row >= least
    if min_p:
        kept &= np.exp(row - row[kept].max()) >= min_p
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1, 0), (3, 1, 0), (0, 0.3, 0), (0, 0.9, 0), (5, 0.7, 0), (0, 1e-6, 0), (40, 1, 0), (0, 1, 0.2), (4, 0.9, 0.4)],
)
def test_truncation_against_numpy(top_k, top_p, min_p):
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (40, 11)).astype(np.float32)
    logits[10:20] = np.round(logits[10:20])  # ties
    logits[20:30][random.random((10, 11)) < 0.4] = -np.inf
    logits[30:] = logits[30:, :1]  # all equal
    logits[20:, 0] = np.maximum(logits[20:, 0], 0)
    config = SamplerConfig(top_k=top_k, top_p=top_p, min_p=min_p)
    got = np.asarray(jax.jit(lambda logits: truncate(logits, config))(logits))
    want = np.stack([numpy_truncate(row, min(top_k, 11), top_p, min_p) for row in logits])
    np.testing.assert_array_equal(np.isfinite(got), want)
    np.testing.assert_array_equal(got[want], logits[want])


def test_both_log_probabilities_after_temperature_and_truncation():
    config = SamplerConfig(group_size=G, max_new_tokens=T, temperature=0.7, top_k=6, top_p=0.8)
    rollout = draw_bigram(config)
    full, p = bigram.logps_of(bigram.params()["table"], rollout, 0.7)
    for b, t in zip(*np.nonzero(rollout.mask), strict=True):
        kept = numpy_truncate(np.log(p[b, t]), 6, 0.8)
        token = rollout.tokens[b, t]
        assert kept[token]
        np.testing.assert_allclose(rollout.logps[b, t], full[b, t], atol=2e-6)
        np.testing.assert_allclose(rollout.sampled_logps[b, t], full[b, t] - np.log(p[b, t][kept].sum()), atol=2e-6)
    assert (rollout.sampled_logps >= rollout.logps - 1e-6).all() and (rollout.sampled_logps > rollout.logps + 0.1).any()


def test_greedy_takes_the_likeliest_and_tells_the_law_of_temperature_one():
    rollout = draw_bigram(SamplerConfig(group_size=2, max_new_tokens=T, temperature=0.0), end_ids=(1,))
    table = bigram.params()["table"]
    for b, n in enumerate(rollout.lengths):
        token = rollout.prompt_tokens[b, -1]
        for t in range(n):
            token = table[token].argmax()
            assert rollout.tokens[b, t] == token
    logps, _ = bigram.logps_of(table, rollout)
    np.testing.assert_allclose(rollout.logps, np.where(rollout.mask == 1, logps, 0), atol=2e-6)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (2.0, 0), (1.0, 3)])
def test_frequencies_are_those_of_the_law(temperature, top_k):
    count, logits = 20_000, np.array([2.0, 1.0, 0.5, 0.0, -1.0, -np.inf])
    config = SamplerConfig(temperature=temperature, top_k=top_k)
    noise = row_noise(KEY, jnp.arange(count // 4), 4, 3)[:, 2]
    tokens, _, sampled = jax.jit(lambda *given: draw_tokens(*given, config))(jnp.tile(logits, (count, 1)), noise)
    law = np.exp(logits / temperature) * numpy_truncate(logits, top_k, 1.0)
    law /= law.sum()
    got = np.bincount(np.asarray(tokens), minlength=6)
    assert not got[law == 0].any()
    np.testing.assert_allclose(np.exp(sampled), law[np.asarray(tokens)], rtol=1e-5)
    real = law > 0
    chi_square = ((got - count * law)[real] ** 2 / (count * law[real])).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: 0.999 of the law's own draws lie below


@pytest.mark.parametrize("vocabulary", [2, 3, 63, 64, 65, 1000])
def test_a_token_is_the_one_whose_share_of_its_block_and_of_all_the_noise_falls_in(vocabulary):
    random = np.random.default_rng(vocabulary)
    logits = random.normal(0, 2, (200, vocabulary)).astype(np.float32)
    logits[random.random(logits.shape) < 0.3] = -np.inf
    logits[:, -1] = 1.0
    noise = random.random((200, 2)).astype(np.float32)
    noise[:20], noise[20:40] = 0.0, np.float32(1 - 2**-24)  # the ends of what a uniform number may be
    tokens, logps, _ = (np.asarray(x) for x in jax.jit(lambda *given: draw_tokens(*given, CONFIG))(logits, noise))
    width = 2 ** int(np.ceil(np.log2(vocabulary) / 2))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    for row, token, u in zip(p, tokens, noise.astype(np.float64), strict=True):
        assert row[token] > 0
        block = token // width
        before, own = row[: block * width].sum(), row[block * width : (block + 1) * width].sum()
        assert before - 1e-6 <= u[0] <= before + own + 1e-6
        inside = row[block * width : token].sum()
        assert inside - 1e-6 <= u[1] * own <= inside + row[token] + 1e-6
    np.testing.assert_allclose(logps, np.log(p[np.arange(200), tokens]), atol=1e-5)


# Ends.


def test_each_end_token_ends_a_row_and_counts_as_its_last_token():
    ends = (1, 7, 20)
    rollout = draw_bigram(SamplerConfig(group_size=16, max_new_tokens=T), end_ids=ends)
    for tokens, n, ended in zip(rollout.tokens, rollout.lengths, rollout.ended, strict=True):
        assert not set(tokens[: n - 1].tolist()) & set(ends)
        assert ended == (tokens[n - 1] in ends) and (ended or n == T)
    last = {tokens[n - 1] for tokens, n in zip(rollout.tokens, rollout.lengths, strict=True)}
    assert set(ends) < last and not rollout.ended.all()  # each of them happened, and the budget too
    np.testing.assert_array_equal(rollout.mask, np.arange(T) < rollout.lengths[:, None])


def test_decoding_stops_when_every_row_has_ended():
    passes = []

    class Counting(bigram.Bigram):
        def __call__(self, tokens, positions, segments, cache=None):
            jax.debug.callback(lambda: passes.append(tokens.shape[1]))
            return super().__call__(tokens, positions, segments, cache)

    for ends, config in (((1, 7, 20), SamplerConfig(group_size=2, max_new_tokens=40)), ((1,), CONFIG)):
        passes.clear()
        rollout = draw_bigram(config, end_ids=ends, module=Counting())
        jax.effects_barrier()
        assert sorted(passes) == [1] * (rollout.lengths.max() - 1) + [7]  # the prompts once, then token by token
        assert rollout.ended.all() == (config is not CONFIG)
    assert rollout.lengths.max() == T


def test_nothing_is_decoded_after_a_first_token_that_ends_every_row():
    everything = tuple(range(tiny.VOCABULARY))
    rollout = draw_bigram(dataclasses.replace(CONFIG, max_new_tokens=9), end_ids=everything)
    assert (rollout.lengths == 1).all() and rollout.ended.all()


def test_no_end_token_is_drawn_before_the_minimum_and_the_full_law_is_told():
    config = SamplerConfig(group_size=32, max_new_tokens=T, min_new_tokens=4)
    rollout = draw_bigram(config, end_ids=(1, 7, 20))
    assert rollout.lengths.min() == 4 and rollout.ended.any()
    logps, p = bigram.logps_of(bigram.params()["table"], rollout)
    np.testing.assert_allclose(rollout.logps, np.where(rollout.mask == 1, logps, 0), atol=2e-6)
    kept = 1 - p[..., [1, 7, 20]].sum(-1)
    want = np.where(np.arange(T) < 3, logps - np.log(kept), logps)
    np.testing.assert_allclose(rollout.sampled_logps, np.where(rollout.mask == 1, want, 0), atol=2e-6)


def test_a_stop_string_ends_a_row_however_its_text_is_cut():
    pieces = [b"", b"a", b"b", b"ab", b"ba", b"abc", b"c", b"<", b"bc<"]
    stops = stop_table(("abab", "c<"), pieces)
    random = np.random.default_rng(0)
    for tokens in random.integers(0, len(pieces), (300, 7)):
        state, text, found = np.zeros(1, np.int32), b"", False
        for token in tokens:
            text += pieces[token]
            found |= b"abab" in text or b"c<" in text
            state = stops.step(state, np.array([token]))
            assert bool(stops.found(state)[0]) == found
    assert stop_table((), pieces) is None


def test_the_sampler_stops_at_a_stop_string():
    pieces = [bytes([97 + i % 3]) for i in range(tiny.VOCABULARY)]
    config = SamplerConfig(group_size=8, max_new_tokens=12)
    stops = stop_table(("ab",), pieces)
    run = jax.jit(lambda p: sample(bigram.Bigram(), {"params": bigram.params()}, p, KEY, config, (), stops))
    rollout, free = jax.device_get(run(PROMPTS)), draw_bigram(config, end_ids=())
    for tokens, n, ended, uncut in zip(rollout.tokens, rollout.lengths, rollout.ended, free.tokens, strict=True):
        text = b"".join(pieces[t] for t in uncut)
        assert n == (text.index(b"ab") + 2 if b"ab" in text else 12) and ended == (b"ab" in text)
        np.testing.assert_array_equal(tokens[:n], uncut[:n])
    assert rollout.ended.any()


# Slots that are refilled.

ENDS = (1, 7, 20)
LONG = SamplerConfig(group_size=8, max_new_tokens=16)


def first_come(lengths, slots):
    """Passes in all when a slot takes the next completion as soon as it is free."""
    free = [0] * slots
    for n in lengths:
        free[free.index(min(free))] += n - 1
    return max(free)


@pytest.mark.parametrize(("slots", "weight"), [(1, 1), (5, 1), (6, 0), (23, 1)])
def test_refilled_slots_draw_the_tokens_of_rows_of_their_own(slots, weight):
    prompts = PROMPTS.replace(weight=np.array([1, weight, 1], np.float32))
    want = draw_bigram(LONG, prompts, end_ids=ENDS)
    got = draw_bigram(dataclasses.replace(LONG, slots=slots), prompts, end_ids=ENDS)
    for name in want.__dataclass_fields__:
        if name not in ("started", "scores", "advantages"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert not want.started.any() and (slots == 23 or got.started.any())  # 23: a first token may have ended a row


def test_refilled_slots_of_the_decoder_draw_its_tokens(base):
    config = dataclasses.replace(CONFIG, slots=4)
    module, variables = Decoder(ARCHITECTURE, scanned=False), unstack({"params": PARAMS}, ARCHITECTURE)
    run = jax.jit(lambda prompts: sample(module, variables, prompts, KEY, config, tiny.END_IDS))
    got = jax.device_get(run(PROMPTS))
    np.testing.assert_array_equal(got.tokens, base.tokens)
    np.testing.assert_array_equal(got.lengths, base.lengths)
    np.testing.assert_allclose(got.logps, base.logps, atol=1e-5)


@pytest.mark.parametrize("pieces", [2, 4, 9])
def test_a_cache_that_grows_draws_the_same_tokens(base, pieces):
    """Of 6 tokens 1, 2, 3 have room first; rows that end early do not keep the loops behind from ending at once."""
    config = dataclasses.replace(CONFIG, cache_pieces=pieces)
    module, variables = Decoder(ARCHITECTURE, scanned=False), unstack({"params": PARAMS}, ARCHITECTURE)
    for end_ids in (tiny.END_IDS, ()):
        whole = jax.jit(lambda prompts, e=end_ids: sample(module, variables, prompts, KEY, CONFIG, e))(PROMPTS)
        got = jax.jit(lambda prompts, e=end_ids: sample(module, variables, prompts, KEY, config, e))(PROMPTS)
        np.testing.assert_array_equal(got.tokens, whole.tokens)
        np.testing.assert_array_equal(got.lengths, whole.lengths)
        np.testing.assert_allclose(got.logps, whole.logps, atol=1e-5)
    assert int(got.lengths.min()) == T


def test_attention_reads_no_more_than_there_can_be():
    config = dataclasses.replace(CONFIG, cache_pieces=3)
    assert piece_lengths(config) == [2, 3, 6] and piece_passes(config) == [2, 1, 2]
    module, variables = Decoder(ARCHITECTURE, scanned=False), unstack({"params": PARAMS}, ARCHITECTURE)
    program = jax.make_jaxpr(lambda prompts: sample(module, variables, prompts, KEY, config, ()))(PROMPTS)
    loops = [eqn for eqn in program.eqns if eqn.primitive.name == "while"]
    keys = (N * G, ARCHITECTURE.kv_heads, ARCHITECTURE.head_size)  # and how many there is room for
    read = [
        {x.aval.shape[3] for eqn in loop.params["body_jaxpr"].eqns for x in eqn.outvars if x.aval.shape[:3] == keys}
        for loop in loops
    ]
    assert [lengths for lengths in read if lengths] == [{1, 2}, {1, 3}, {1, 6}]  # 1: the key that is written


def test_pieces_are_chosen_where_they_pay():
    long = SamplerConfig(max_new_tokens=512)
    short = SamplerConfig(max_new_tokens=511)
    assert choose_pieces(long, "cpu").cache_pieces == 4 and piece_lengths(choose_pieces(long, "cpu"))[0] == 64
    for config, platform in ((short, "cpu"), (long, "tpu"), (long, "gpu")):
        assert choose_pieces(config, platform).cache_pieces == 1
    assert choose_pieces(dataclasses.replace(short, cache_pieces=2), "tpu").cache_pieces == 2


def test_slots_are_as_busy_as_on_a_first_come_schedule():
    config = SamplerConfig(group_size=64, max_new_tokens=64, slots=16)
    rollout = draw_bigram(config, end_ids=(1,))
    assert 10 < rollout.lengths.mean() < 40 and len(np.unique(rollout.lengths)) > 20
    passes = first_come(rollout.lengths, 16)
    done = (rollout.started + rollout.lengths - 1).max()
    busy, offered = jax.device_get(occupancy(rollout, 16))
    assert busy == (rollout.lengths - 1).sum() and offered == done * 16
    assert busy / offered >= 0.97 * (rollout.lengths - 1).sum() / (passes * 16)
    last = rollout.started.max()  # until then completions wait
    held = np.minimum(rollout.started + rollout.lengths - 1, last) - rollout.started
    assert held.sum() / (last * 16) >= 0.95


def test_slots_of_each_device_refill_from_its_own_completions():
    config = tiny.config(**{"mesh.data": 4, "data.prompts_per_step": 8, "sampler.slots": 8})
    plain = tiny.config(**{"mesh.data": 4, "data.prompts_per_step": 8})
    drawn = []
    for c in (config, plain):
        parts = bigram.parts(c)
        prompts = tiny.on_mesh(tiny.prompts(c), parts.mesh)
        run = jax.jit(
            lambda prompts, parts=parts: draw_completions(
                parts, {"params": bigram.params()}, prompts, KEY, parts.config.sampler
            )
        )
        drawn.append(run(prompts))
    refilled, want = drawn
    assert len(refilled.tokens.sharding.device_set) == 4 and not refilled.tokens.sharding.is_fully_replicated
    refilled, want = jax.device_get((refilled, want))
    for name in ("tokens", "lengths", "logps", "ended", "draw", "group"):
        np.testing.assert_array_equal(getattr(refilled, name), getattr(want, name), err_msg=name)
    assert refilled.started.any() and not want.started.any()
