"""A run that hangs says where: the stacks of all threads and the step they are in, after minutes without progress."""

import datetime
import faulthandler
import pathlib
import signal
import sys
import threading
import time
from typing import IO, Self


class Watchdog:
    """Writes the stacks of all threads to stderr and to `path` when `progress` is not called for so many minutes.

    It writes once a silence, and goes on watching. While it is entered, SIGUSR1 writes the stacks at once, even while a
    function holds the interpreter's lock, which would keep this thread from running: `kill -USR1 PID`.
    """

    def __init__(self, minutes: float, path: pathlib.Path, stream: IO[str] | None = None):
        self._seconds, self._path, self._stream = minutes * 60.0, path, stream
        self._doing, self._since, self._told = "the start", time.monotonic(), False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self, doing: str) -> None:
        """Says that the run has got on, and what it begins now."""
        self._doing, self._since, self._told = doing, time.monotonic(), False

    def __enter__(self) -> Self:
        if self._seconds > 0:
            self._since = time.monotonic()
            if threading.current_thread() is threading.main_thread() and sys.__stderr__ is not None:
                faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(min(self._seconds / 4, 10.0)):
            silent = time.monotonic() - self._since
            if silent >= self._seconds and not self._told:
                self._told = True
                self._tell(silent)

    def _tell(self, silent: float) -> None:
        now = datetime.datetime.now().isoformat(timespec="seconds")
        with open(self._path, "a+", encoding="utf-8") as file:
            file.write(f"{now}: no progress for {silent:.0f} seconds, in {self._doing}; all threads:\n")
            file.flush()
            start = file.tell()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(start)
            stacks = file.read()
        print(
            f"warning: no progress for {silent:.0f} seconds, in {self._doing} (log.watchdog_minutes); all threads, "
            f"also in {self._path}:\n{stacks}",
            file=self._stream or sys.stderr,
            flush=True,
        )
