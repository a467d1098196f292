"""`grpo-jax launch`: one command as several processes of this machine, watched until all are done or one is lost."""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.errors import InputError

ALONE = 5.0  # seconds that the others get to say what they saw when one is lost: nothing of theirs can go on
STOPPING = 600.0  # seconds that all get to save and end when the launcher is asked to
PR_SET_PDEATHSIG = 1


def launch(
    command: Sequence[str],
    count: int,
    nodes: int,
    node: int,
    coordinator: str,
    restarts: int,
    environ: Mapping[str, str],
) -> int:
    """Runs `command` as `count` processes of each of `nodes` machines, of which this is number `node`.

    The processes learn their place from the environment, and process i of this machine sees device i of it where there
    are GPUs. When one is lost (killed, or ended with an error), it is named, the rest is ended, and all are started
    anew up to `restarts` times. SIGTERM and Ctrl-C are handed on: a run saves and ends. Returns the exit code of what
    was lost first (128 + the signal's number), 0 when all went well. Raises InputError for numbers that do not fit.
    """
    if count < 1 or nodes < 1 or not 0 <= node < nodes or restarts < 0:
        raise InputError(f"launch: --processes {count} --nodes {nodes} --node {node} --restarts {restarts} do not fit")
    if nodes > 1 and not coordinator:
        raise InputError("launch: --nodes above 1 needs --coordinator HOST:PORT of machine 0")
    for attempt in range(restarts + 1):
        places = places_of(count, nodes, node, coordinator or f"localhost:{free_port()}")
        job = Job(command, [{**environ, **place} for place in places], node * count)
        code = job.watch()
        if code == 0 or job.asked or attempt == restarts:
            return code
        _say(f"starting all {count} processes anew ({attempt + 1} of {restarts})")
    raise AssertionError


def places_of(count: int, nodes: int, node: int, coordinator: str) -> list[dict[str, str]]:
    """What tells each process of machine `node` its place, as variables of its environment."""
    return [
        {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(nodes * count),
            "JAX_PROCESS_ID": str(node * count + local),
            "JAX_LOCAL_DEVICE_IDS": str(local),
        }
        for local in range(count)
    ]


class Job:
    """Processes of this machine that stand and fall together.

    `environs` has the environment of each (None: this one), `first` is the number of the first. They end with the
    launcher, or, given `holding`, an open file's number, outlive it and keep that file open, and so its lock: starting
    them then forks nothing, as a process that has loaded jax must not.
    """

    def __init__(
        self,
        command: Sequence[str],
        environs: Sequence[Mapping[str, str] | None],
        first: int = 0,
        holding: int | None = None,
    ):
        self.asked = 0
        self._first = first
        how: dict[str, Any] = {"preexec_fn": _end_with_launcher} if holding is None else {"pass_fds": (holding,)}
        # Sessions of their own: Ctrl-C on the terminal reaches the launcher alone, which hands it on.
        self._processes: list[subprocess.Popen[Any]] = [
            subprocess.Popen(command, env=environ, start_new_session=True, **how) for environ in environs
        ]

    def watch(self, until: float = math.inf) -> int:
        """Waits for all, asking them to end at `until` (`time.monotonic`); after a loss, ends the rest.

        Returns the exit code of what was lost first, else 0.
        """
        earlier = {number: signal.signal(number, self._hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            deadline, code = None, 0
            while any(process.poll() is None for process in self._processes):
                time.sleep(0.2)
                if code == 0 and (code := self._lost()):
                    deadline = time.monotonic() + ALONE
                if not self.asked and time.monotonic() > until:
                    self.ask_to_end()
                if self.asked and deadline is None:
                    deadline = time.monotonic() + STOPPING
                if deadline is not None and time.monotonic() > deadline:
                    self._end()
            return code or self._lost()
        finally:
            self._end()
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def ask_to_end(self) -> None:
        """SIGTERM for all: a run saves and ends; asked again, SIGKILL."""
        self.asked += 1
        for process in self._processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM if self.asked == 1 else signal.SIGKILL)

    def _hand_on(self, number: int, _: Any) -> None:
        self.ask_to_end()

    def _lost(self) -> int:
        """The exit code of a process that failed, which is named; 0 while there is none."""
        for local, process in enumerate(self._processes):
            code = process.poll()
            if not code:
                continue
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            running = sum(other.poll() is None for other in self._processes)
            if len(self._processes) > 1:
                how += f"; ending the {running} others that run here"
            _say(
                f"process {self._first + local} (pid {process.pid}) was lost: it {how}. The same command goes on from "
                "the last checkpoint"
            )
            return code if code > 0 else 128 - code
        return 0

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _end_with_launcher() -> None:
    """Has the kernel ask this process to end when the launcher is gone."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(text: str) -> None:
    print(f"grpo-jax launch: {text}", file=sys.stderr, flush=True)
