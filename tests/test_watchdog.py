"""A run that hangs says where, without being stopped."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from grpo_jax.recipes.loop import Stop
from grpo_jax.watchdog import Watchdog


def hang_here(until):
    until()


def test_a_hang_shows_every_thread_and_the_step(tmp_path):
    err, path, let_go = io.StringIO(), tmp_path / "watchdog.txt", threading.Event()
    other = threading.Thread(target=let_go.wait, name="other")
    with Stop(None, Watchdog(0.1 / 60, path, err)) as stop:
        other.start()
        stop.progress("step 3 of 9")

        def until():
            end = time.monotonic() + 20
            while "all threads" not in err.getvalue() and time.monotonic() < end:
                time.sleep(0.01)

        hang_here(until)
        said = err.getvalue()
        assert "in step 3 of 9" in said and "hang_here" in said and "test_watchdog.py" in said
        assert said.count("(most recent call first)") >= 3  # this thread, the other one, the watchdog's
        time.sleep(0.3)
        assert err.getvalue() == said  # once a silence
        stop.progress("step 4 of 9")
        hang_here(lambda: time.sleep(0.01) or until())
        end = time.monotonic() + 20
        while "step 4 of 9" not in err.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    let_go.set()
    other.join()
    written = path.read_text()
    assert "in step 3 of 9" in written and "in step 4 of 9" in written and "hang_here" in written


def test_progress_keeps_it_quiet(tmp_path):
    err, path = io.StringIO(), tmp_path / "watchdog.txt"
    with Watchdog(0.5 / 60, path, err) as dog:
        for step in range(20):
            dog.progress(f"step {step}")
            time.sleep(0.05)
    assert err.getvalue() == "" and not path.exists()


HOLDS_THE_LOCK = """
import pathlib, re, sys
from grpo_jax.watchdog import Watchdog
with Watchdog(30.0, pathlib.Path("watchdog.txt")):
    print("ready", flush=True)
    re.fullmatch("(a+)+b", "a" * 60)  # a regular expression that never ends and never lets go of the interpreter
"""


def test_a_signal_shows_the_stacks_even_when_the_interpreter_is_held(tmp_path, cli_env):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK],
        cwd=tmp_path,
        env=cli_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGUSR1)
        os.set_blocking(process.stderr.fileno(), False)
        said, end = b"", time.monotonic() + 30
        while b"fullmatch" not in said and time.monotonic() < end:
            said += process.stderr.read() or b""
            time.sleep(0.05)
        assert b"fullmatch" in said and b"watchdog.py" in said
    finally:
        process.kill()
        process.communicate()


def test_the_folder_of_the_run_is_named(tmp_path):
    err = io.StringIO()
    with Watchdog(0.05 / 60, tmp_path / "w.txt", err) as dog:
        dog.progress("saving")
        end = time.monotonic() + 20
        while "all threads" not in err.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert f"also in {tmp_path / 'w.txt'}" in err.getvalue()
    assert pathlib.Path(tmp_path / "w.txt").read_text().count("no progress") == 1
