"""Host rewards: what they are given, what they may return, and that each completion is scored once on any mesh."""

import asyncio
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.config import MeshConfig
from grpo_jax.errors import InputError
from grpo_jax.parallel import make_mesh
from grpo_jax.rewards.host import HostRewards, Progress, decoded, score_in_program
from grpo_jax.rewards.pool import Pool, Pooled

ROWS = [{"prompt": f"prompt {i}", "answer": str(i), "level": i} for i in range(4)]
B, T = 16, 3
TRL_KEYWORDS = ("trainer_state", "log_extra", "log_metric")
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 2, 4)]


def decode(ids):
    return " ".join(map(str, ids))


def host_of(*functions, timeout=10.0, rows=ROWS, **options):
    named = {f"reward_{i}": function for i, function in enumerate(functions)}
    return HostRewards(named, rows, decode, timeout, **options)


def batch():
    row = np.arange(B) % 4
    tokens = np.arange(B * T).reshape(B, T)
    return row, tokens, np.arange(B) % (T + 1)


def one_call(host):
    return host.call(*(part[:4] for part in batch()))


def mesh_of(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return make_mesh(MeshConfig(*shape), devices)


@pytest.mark.parametrize("shape", MESHES)
def test_each_completion_is_scored_once_on_every_mesh(shape):
    seen = []

    def length(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, columns["answer"], strict=True))
        return [float(len(c)) for c in completions]

    def level(completions, level):
        return [None if x == 3 else x for x in level]

    host, mesh = host_of(length, level), mesh_of(shape)
    over_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    row, tokens, lengths = batch()

    @jax.jit
    def program(row, tokens, lengths):
        values, valid, failed = score_in_program(host, mesh, row, tokens * 1, lengths)
        return values, valid, failed, (values * valid).sum()

    inputs = jax.device_put((row, tokens, lengths), over_rows)
    values, valid, failed, total = jax.device_get(program(*inputs))
    texts = [decode(line[:n].tolist()) for line, n in zip(tokens, lengths, strict=True)]
    assert sorted(seen) == sorted((f"prompt {r}", text, str(r)) for r, text in zip(row, texts, strict=True))
    np.testing.assert_array_equal(values[:, 0], [len(text) for text in texts])
    np.testing.assert_array_equal(values[:, 1], np.where(row == 3, 0, row))
    np.testing.assert_array_equal(valid, np.stack([np.ones(B), row != 3], axis=1))
    assert total == values.sum() and not failed
    assert host.scored == B and host.calls == shape[0] * shape[1] and host.seconds > 0
    assert host.take_error() is None


def raises(completions, **columns):
    raise ValueError("two\nlines")


def hangs(completions, **columns):
    time.sleep(30)


def leaves(completions, **columns):
    raise SystemExit(3)


BAD = {
    "raised ValueError: two lines": raises,
    "raised SystemExit: 3": leaves,
    "did not return within rewards.timeout=0.2 seconds": hangs,
    "returned 1 scores for 4 completions": lambda completions: [1.0],
    "returned 5 scores for 4 completions": lambda completions: [1.0] * 5,
    "returned nan (float)": lambda completions: [1.0, 2.0, float("nan"), 3.0],
    "returned inf (float)": lambda completions: [1.0, 2.0, float("inf"), 3.0],
    "returned -inf (float)": lambda completions: [1.0, 2.0, -float("inf"), 3.0],
    "returned 1e+39 (float)": lambda completions: [1.0, 2.0, 1e39, 3.0],
    "returned 1000": lambda completions: [1.0, 2.0, 10**400, 3.0],
    "returned '1.0' (str)": lambda completions: [1.0, 2.0, "1.0", 3.0],
    "returned [1.0] (list)": lambda completions: [1.0, 2.0, [1.0], 3.0],
    "logged 1 values in log_extra('why') for 4 completions": lambda completions, log_extra: (
        log_extra("why", ["x"]) or [1.0] * 4
    ),
    "returned {0: 1.0} (dict)": lambda completions: {0: 1.0},
    "returned None (NoneType)": lambda completions: None,
    "returned 1.0 (float)": lambda completions: 1.0,
    "returned 'abcd' (str)": lambda completions: "abcd",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_reward_gives_the_sentinel_and_one_line(what):
    calls = []

    def good(completions):
        calls.append(1)
        return [1.0] * len(completions)

    host = host_of(good, BAD[what], timeout=0.2 if "timeout" in what else 10.0)
    values = one_call(host)
    assert values.dtype == np.float32 and values.shape == (4, 2) and np.isnan(values).all()
    assert bool(decoded(jnp.asarray(values))[2])
    assert np.isnan(one_call(host)).all() and len(calls) == 1  # fails at once until the error is taken
    error = host.take_error()
    assert isinstance(error, InputError) and "\n" not in str(error)
    assert str(error).startswith("reward 'reward_1' ") and what in str(error)
    bad_entry = "for completion '6 7'" if "(list)" in what or ", 3.0" in what else "completion '"
    assert bad_entry in str(error)
    assert host.take_error() is None
    one_call(host)
    assert len(calls) == 2


def test_the_completion_at_fault_is_named_and_cut():
    host = host_of(lambda completions: [0.0, 0.0, float("nan"), 0.0])
    host.decode = lambda ids: "x" * 1_000_000 if len(ids) == 2 else "y"
    one_call(host)
    message = str(host.take_error())
    assert "for completion 'xxx" in message and "yyy" not in message and len(message) < 300


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["raises", "hangs"])
def test_a_bad_reward_in_one_shard_does_not_hang_the_program(shape, kind):
    def bad_at_row_0(completions, level, **columns):
        if 0 in level:
            return raises(completions) if kind == "raises" else hangs(completions)
        return [1.0] * len(completions)

    host, mesh = host_of(bad_at_row_0, timeout=0.2), mesh_of(shape)
    begin = time.perf_counter()
    program = jax.jit(lambda *inputs: score_in_program(host, mesh, *inputs))
    values, valid, failed = jax.device_get(program(*batch()))
    assert failed and np.isfinite(values).all() and valid.shape == (B, 1)
    assert "bad_at_row_0" not in str(error := host.take_error()) and "reward_0" in str(error)
    assert time.perf_counter() - begin < 20


def test_trl_calling_convention():
    got = {}

    def everything(prompts, completions, completion_ids, **columns):
        got.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        completions.clear()  # may not harm the next one
        return np.array([1, 2, 3, 4])

    def typed(completions, answer):
        return [len(completions), np.float64(0.5), np.True_, False]

    values = one_call(host_of(everything, typed))
    np.testing.assert_array_equal(values, [[1, 4], [2, 0.5], [3, 1], [4, 0]])
    assert got["prompts"] == [f"prompt {i}" for i in range(4)]
    assert got["answer"] == ["0", "1", "2", "3"] and got["level"] == [0, 1, 2, 3]
    assert got["completion_ids"] == [[], [3], [6, 7], [9, 10, 11]]
    assert set(got) == {"prompts", "completions", "completion_ids", "answer", "level", *TRL_KEYWORDS}
    assert got["trainer_state"].global_step == 0


def test_what_rewards_log_is_kept_by_completion_and_by_step():
    def tells(completions, log_extra, log_metric, trainer_state):
        log_extra("size", [len(c) for c in completions])
        log_extra("odd", [float("nan"), object(), [1, "x"], None])
        log_metric("mean", np.float32(len(completions[0])))
        log_metric("step", trainer_state.global_step)
        return [0.0] * 4

    host = host_of(tells, progress=Progress(draws_per_step=2, max_steps=7))
    row, tokens, lengths = (part[:4] for part in batch())
    for step in range(3):
        host.call(row, tokens, lengths, np.full(4, 2 * step + 1))
    first, others = host.take(4), host.take()
    keys = [(r, tuple(line[:n].tolist())) for r, line, n in zip(row, tokens, lengths, strict=True)]
    assert [first.extra[key]["size"] for key in keys] == [0, 1, 3, 7]
    assert [first.extra[key]["odd"] for key in keys][0::2] == [None, [1, "x"]]
    assert first.metrics == {"mean": [0.0], "step": [0.0]} and others.metrics["step"] == [1.0, 2.0]
    assert first.seconds > 0 and not first.failures and host.take().seconds == 0


def picky(completions, log_extra):
    if any(c == "6 7" for c in completions):
        raise ValueError("not this one")
    log_extra("n", [len(c) for c in completions])
    return [1.0] * len(completions)


def test_on_error_zero_scores_counts_and_shows_those_at_fault():
    host = host_of(picky, lambda completions: [1.0, float("nan"), None, 2.0], on_error="zero")
    values = one_call(host)
    np.testing.assert_array_equal(values, [[1, 1], [1, 0], [0, np.inf], [1, 2]])
    record = host.take()
    assert {name: len(found) for name, found in record.failures.items()} == {"reward_0": 1, "reward_1": 1}
    assert "raised ValueError: not this one" in record.failures["reward_0"][0][1]
    assert "completion '6 7'" in record.failures["reward_0"][0][1]
    assert "returned nan (float), for completion '3'" in record.failures["reward_1"][0][1]
    assert [extra["n"] for extra in record.extra.values()] == [0, 1, None, 7] and host.take_error() is None


def test_on_error_raise_shows_the_completion_at_fault():
    host = host_of(picky)
    assert np.isnan(one_call(host)).all()
    assert "not this one" in str(error := host.take_error()) and "completion '6 7'" in str(error)


def test_a_batch_that_fails_only_as_a_whole_is_all_at_fault():
    def wants_two(completions):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    host = host_of(wants_two, on_error="zero")
    assert one_call(host).tolist() == [[0.0]] * 4 and len(host.take().failures["reward_0"]) == 4


def test_rewards_in_worker_processes():
    pool = Pool(2)
    host = host_of(Pooled("reward_functions:measure"), Pooled("reward_functions:later"), pool=pool, on_error="zero")
    try:
        values = one_call(host)
        record = host.take()
        assert values.tolist() == [[0, 2], [1, 2], [3, 2], [np.inf, 2]]
        extra = list(record.extra.values())
        assert all(row["pid"] in pool.pids() and not row["jax"] for row in extra) and len(pool.pids()) <= 2
        assert record.metrics == {"level": [1.5]}
    finally:
        pool.close()


def test_a_worker_that_hangs_is_killed_and_the_completion_at_fault_is_found():
    pool = Pool(2)
    host = host_of(Pooled("reward_functions:hangs_at_level_2"), pool=pool, on_error="zero", timeout=1.0)
    try:
        assert one_call(host).tolist() == [[1.0], [1.0], [0.0], [1.0]]
        ((key, message),) = host.take().failures["reward_0"]
        assert key[0] == 2 and "did not return within rewards.timeout=1 seconds" in message and "'6 7'" in message
    finally:
        pool.close()


def test_prompts_that_are_chats_get_completions_that_are_chats():
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "x": 1}, {"prompt": "hi"}] * 2
    got = []

    def look(prompts, completions, x):
        got.append((prompts[0], completions[2], completions[3], x))
        return [0.0] * 4

    one_call(host_of(look, rows=rows))
    chat = [{"role": "assistant", "content": "6 7"}]
    assert got == [([{"role": "user", "content": "hi"}], chat, "9 10 11", [1, None, 1, None])]


def test_async_rewards_are_awaited():
    async def later(completions, **columns):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    np.testing.assert_array_equal(one_call(host_of(later)), np.full((4, 1), 2, np.float32))


def test_none_does_not_apply_and_is_no_failure():
    host = host_of(lambda completions: [None, 1.5, None, 0.0])
    values, valid, failed = decoded(jnp.asarray(one_call(host)))
    assert values[:, 0].tolist() == [0, 1.5, 0, 0] and valid[:, 0].tolist() == [0, 1, 0, 1] and not failed


def test_a_row_outside_of_the_dataset_is_an_error_and_no_crash():
    host = host_of(lambda completions: [1.0])
    assert np.isnan(host.call(np.array([99]), np.zeros((1, T), int), np.array([1]))).all()
    assert "IndexError" in str(host.take_error())


def test_rewards_run_one_at_a_time():
    inside, most = [], []

    def counts(completions, **columns):
        inside.append(threading.get_ident())
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return [0.0] * len(completions)

    host, mesh = host_of(counts), mesh_of((8, 1, 1))
    jax.block_until_ready(jax.jit(lambda *inputs: score_in_program(host, mesh, *inputs))(*batch()))
    assert len(most) == 8 and max(most) == 1


def test_large_batches_do_not_deadlock():
    host, mesh = host_of(lambda completions: [1.0] * len(completions)), mesh_of((8, 1, 1))
    host.decode = lambda ids: ""
    tokens = np.zeros((64, 16384), np.int32)
    program = jax.jit(lambda *inputs: score_in_program(host, mesh, *inputs))
    for _ in range(3):
        values, _, failed = jax.device_get(program(np.zeros(64, np.int32), tokens + 1, np.full(64, 4, np.int32)))
        assert values.sum() == 64 and not failed
