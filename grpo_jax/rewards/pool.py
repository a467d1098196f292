"""Worker processes that run functions with a time limit and can be killed.

They are started as `python -c`, not forked: the trainer's process holds devices and threads. They end with it, on any
end of it: the kernel kills them when the thread that started them is gone, and that thread lives as long as the pool.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.rewards.worker import Reply

# Seconds that loading a function's module may take, before its own time limit begins.
LOADING = 120.0
REPLY_LIMIT = 64 * 2**20
START = (
    "import json, sys; path, parent, setup = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from grpo_jax.rewards.worker import serve; serve(parent, setup)"
)

Task = tuple[str, Mapping[str, Any]]
"""'module:function' and its keyword arguments."""


@dataclasses.dataclass(frozen=True)
class Pooled:
    """A reward that runs in worker processes: 'module:function', and keyword arguments of its own."""

    target: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Worker:
    """A process and the task that it is at."""

    process: subprocess.Popen[bytes]
    task: int = -1
    deadline: float = 0.0
    out: memoryview = dataclasses.field(default_factory=lambda: memoryview(b""))
    got: bytearray = dataclasses.field(default_factory=bytearray)

    def kill(self) -> None:
        """Ends the process and what it has started, and takes its pipes down."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait()


class Pool:
    """Up to `size` worker processes, started when they are first needed.

    `setup` names a function, 'module:function', that each calls first. One `run` at a time; others wait.
    """

    def __init__(self, size: int = 0, setup: str = ""):
        self.size = size or min(len(os.sched_getaffinity(0)), 8)
        self.setup = setup
        self._idle: list[Worker] = []
        self._busy: list[Worker] = []
        self._lock = threading.Lock()
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "reward workers")
        self._finalizer = weakref.finalize(self, _end, self._idle, self._busy)

    def run(self, tasks: Sequence[Task], limit: float, total: float = float("inf")) -> list[Reply]:
        """The reply to each task; `limit` is what one may take in seconds, `total` what all of them may.

        A task beyond its time, or beyond the total, has the reply {"timeout": seconds}; its process is killed.
        """
        replies: list[Reply] = [{"timeout": total}] * len(tasks)
        waiting = collections.deque(range(len(tasks)))
        end = time.monotonic() + total
        with self._lock, selectors.DefaultSelector() as selector:
            while (waiting or self._busy) and time.monotonic() < end:
                while waiting and len(self._busy) < self.size:
                    number = waiting.popleft()
                    try:
                        request = pickle.dumps(tasks[number])
                    except Exception as error:
                        replies[number] = {"error": [type(error).__name__, str(error), "while it was handed over"]}
                        continue
                    self._begin(number, request, selector)
                if not self._busy:
                    continue
                nearest = min(end, *(worker.deadline for worker in self._busy))
                for key, _ in selector.select(max(nearest - time.monotonic(), 0.0)):
                    self._advance(key.data, key.fileobj, selector, replies, limit)
                for worker in [w for w in self._busy if w.deadline <= time.monotonic()]:
                    self._advance(worker, worker.process.stdout, selector, replies, limit)  # it may just have come
                    if worker in self._busy and worker.deadline <= time.monotonic():
                        self._finish(worker, selector, replies, {"timeout": limit}, alive=False)
            for worker in list(self._busy):
                self._finish(worker, selector, replies, {"timeout": total}, alive=False)
        return replies

    def close(self) -> None:
        """Ends all processes; a later `run` starts new ones."""
        with self._lock:
            _end(self._idle, self._busy)

    def pids(self) -> list[int]:
        """The processes there are."""
        return [worker.process.pid for worker in (*self._idle, *self._busy)]

    def _begin(self, number: int, request: bytes, selector: selectors.BaseSelector) -> None:
        while self._idle and self._idle[-1].process.poll() is not None:
            self._idle.pop().kill()  # it has died since
        worker = self._idle.pop() if self._idle else self._starter.submit(_start, self.setup).result()
        worker.task, worker.deadline = number, time.monotonic() + LOADING
        worker.out, worker.got = memoryview(len(request).to_bytes(8, "little") + request), bytearray()
        self._busy.append(worker)
        selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)  # type: ignore[arg-type]
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

    def _advance(
        self, worker: Worker, pipe: Any, selector: selectors.BaseSelector, replies: list[Reply], limit: float
    ) -> None:
        """Writes on, or reads on, and notes what arrived."""
        if worker not in self._busy:
            return
        if pipe is worker.process.stdin:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                worker.out = worker.out[os.write(pipe.fileno(), worker.out) :]
            if not worker.out:
                selector.unregister(pipe)
            return
        with contextlib.suppress(BlockingIOError):
            part = os.read(pipe.fileno(), 2**16)
            worker.got += part
            if not part or len(worker.got) > REPLY_LIMIT:
                what = f"its process ended with {_status(worker)}" if not part else "its reply is too long"
                self._finish(worker, selector, replies, {"error": ["WorkerDied", what, "its process"]}, alive=False)
                return
        while worker in self._busy and b"\n" in worker.got:
            line, _, rest = bytes(worker.got).partition(b"\n")
            worker.got = bytearray(rest)
            reply = json.loads(line)
            if reply.get("started"):
                worker.deadline = time.monotonic() + limit
            else:
                self._finish(worker, selector, replies, reply, alive=True)

    def _finish(
        self, worker: Worker, selector: selectors.BaseSelector, replies: list[Reply], reply: Reply, alive: bool
    ) -> None:
        replies[worker.task] = reply
        for pipe in (worker.process.stdin, worker.process.stdout):
            with contextlib.suppress(KeyError):
                selector.unregister(pipe)  # type: ignore[arg-type]
        self._busy.remove(worker)
        if alive:
            self._idle.append(worker)
        else:
            worker.kill()


def _start(setup: str) -> Worker:
    """A new worker; to be called in a thread that lives as long as it, since with its thread it ends."""
    arguments = json.dumps([sys.path, os.getpid(), setup])
    process = subprocess.Popen(
        [sys.executable, "-c", START, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,  # a group of its own: ended with its children, and out of reach of Ctrl-C
    )
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
    return Worker(process)


def _status(worker: Worker) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = worker.process.wait(1.0)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "its pipe closed"


def _end(*groups: list[Worker]) -> None:
    for group in groups:
        while group:
            group.pop().kill()
