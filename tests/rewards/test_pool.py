"""Worker processes: what they answer, how they are killed, and that they end with the trainer."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from grpo_jax.rewards.pool import Pool


@pytest.fixture(scope="module")
def pool():
    made = Pool(2)
    yield made
    made.close()


def gone(pid, seconds=10.0):
    """Whether a process ends in time; one that is only not waited for has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def scores(replies):
    return [reply.get("scores", reply) for reply in replies]


def test_tasks_are_answered_in_order_by_few_processes(pool):
    tasks = [("reward_functions:echo", {"value": "x" * n}) for n in (0, 5, 3_000_000, 1, 7)]
    assert scores(pool.run(tasks, 30.0)) == [[0.0], [5.0], [3e6], [1.0], [7.0]]
    assert 1 <= len(pool.pids()) <= 2 and os.getpid() not in pool.pids()
    before = pool.pids()
    assert scores(pool.run(tasks[:2], 30.0)) == [[0.0], [5.0]]
    assert set(pool.pids()) == set(before)
    assert pool.run([], 1.0) == []


def test_a_worker_loads_neither_jax_nor_numpy(pool):
    assert scores(pool.run([("reward_functions:loaded", {})], 30.0)) == [[1.0, 0.0, 0.0]]


def test_what_goes_wrong_is_a_reply(pool):
    tasks = [
        ("reward_functions:ends", {"code": 3}),
        ("reward_functions:nothing", {}),
        ("no_such_module:f", {}),
        ("reward_functions:echo", {"value": 3}),
        ("reward_functions:echo", {"value": lambda: 0}),
        ("reward_functions:echo", {"value": "fine"}),
    ]
    died, absent, module, raised, kept, fine = pool.run(tasks, 30.0)
    assert died["error"][:2] == ["WorkerDied", "its process ended with exit code 3"]
    assert absent["error"][0] == "AttributeError" and module["error"][0] == "ModuleNotFoundError"
    assert raised["error"][0] == "TypeError" and "reward_functions.py" in raised["error"][2]
    assert "pickle" in kept["error"][1].lower() and fine["scores"] == [4.0]


def test_time_limits_of_one_and_of_all(pool):
    begin = time.monotonic()
    replies = pool.run([("reward_functions:sleeps", {"seconds": s}) for s in (60.0, 0.0)], 0.5)
    assert replies[0] == {"timeout": 0.5} and replies[1]["scores"] == [0.0]
    replies = pool.run([("reward_functions:sleeps", {"seconds": 60.0})] * 6, 30.0, total=1.0)
    assert replies == [{"timeout": 1.0}] * 6
    assert time.monotonic() - begin < 40
    assert scores(pool.run([("reward_functions:echo", {"value": "a"})], 30.0)) == [[1.0]]


def test_what_a_worker_has_started_ends_with_it(pool, tmp_path):
    path = tmp_path / "pid"
    assert pool.run([("reward_functions:starts_a_child", {"path": str(path)})], 6.0) == [{"timeout": 6.0}]
    assert gone(int(path.read_text()))


def test_a_closed_pool_starts_again():
    pool = Pool(1)
    task = [("reward_functions:echo", {"value": "a"})]
    assert scores(pool.run(task, 30.0)) == [[1.0]]
    (pid,) = pool.pids()
    pool.close()
    assert gone(pid) and pool.pids() == []
    assert scores(pool.run(task, 30.0)) == [[1.0]]
    (pid,) = pool.pids()
    del pool
    assert gone(pid)


TRAINER = """
import threading, time
from grpo_jax.rewards.pool import Pool
pool = Pool(2)
pool.run([("reward_functions:echo", {"value": "a"})], 30.0)
hang = {"completions": ["a"], "level": [2]}
threading.Thread(target=pool.run, args=([("reward_functions:hangs_at_level_2", hang)] * 2, 600.0), daemon=True).start()
while len(pool.pids()) < 2:
    time.sleep(0.05)
time.sleep(1.0)
print(*pool.pids(), flush=True)
END
"""


@pytest.mark.parametrize("how", ["killed", "returns"])
def test_workers_end_with_the_trainer_even_when_they_hang(cli_env, how):
    folder = str(pathlib.Path(__file__).parents[1])
    env = cli_env | {"PYTHONPATH": f"{cli_env['PYTHONPATH']}:{folder}"}
    code = TRAINER.replace("END", "time.sleep(600)" if how == "killed" else "")
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        if how == "killed":
            trainer.send_signal(signal.SIGKILL)
        trainer.wait(30)
    assert all(gone(pid) for pid in pids)
