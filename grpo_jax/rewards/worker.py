"""The call of a reward function, in the trainer's process or in a worker process of `pool`.

Loads nothing but the standard library: a worker starts in some 50 ms, and never loads jax, which would take the
trainer's devices. What it does load is the module of the function that it is asked for.
"""

import asyncio
import ctypes
import dataclasses
import importlib
import inspect
import json
import math
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

FLOAT32_MAX = 3.4028234663852886e38
# Keywords that a function may ask for beside the dataset's columns, as TRL 1.16 passes them.
KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

Reply = dict[str, Any]
"""What a call led to; JSON. One of

- scores: a number, None, or [text, type] of what is neither, for each item returned; extra and metrics: what was logged
- returned: [text, type] of something that is no list
- error: [type, message, place]
- timeout: seconds
"""


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Where the run stands, under the names of TRL's trainer state.

    Attributes:
      global_step: steps done before this one.
      max_steps: steps of the whole run.
      epoch: passes over the dataset so far.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


def invoke(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Reply:
    """Calls a reward function with what it accepts, awaits it if need be, and tells what came of it; never raises."""
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = {}

    def log_extra(column: str, values: list) -> None:
        extra.setdefault(str(column), []).extend(map(plain, values))

    def log_metric(name: str, value: float) -> None:
        metrics.setdefault(str(name), []).append(float(value))

    given = {**inputs, "log_extra": log_extra, "log_metric": log_metric}
    try:
        # Copies, so that a function that edits its lists does not change what the next one reads.
        chosen = {k: list(v) if isinstance(v, list) else v for k, v in accepted(function, given).items()}
        returned = function(**chosen)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
        if isinstance(returned, str | bytes | dict | set) or not hasattr(returned, "__len__"):
            return {"returned": _told(returned)}
        scores = [score(value) for value in returned]
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": [type(error).__name__, _message(error), f"{place.filename}:{place.lineno}"]}
    return {"scores": scores, "extra": extra, "metrics": metrics}


def score(value: Any) -> float | list[str] | None:
    """One item that a reward returned: a finite number, None, or its text and type."""
    if value is None:
        return None
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return _told(value)
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    return number if abs(number) <= FLOAT32_MAX else _told(value)


def accepted(function: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a function takes by name; all when it has `**kwargs` or no signature to read."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(inputs)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}


def plain(value: Any) -> Any:
    """A logged value as JSON has it; what it has not, as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    return short(value)


def short(value: Any, limit: int = 80) -> str:
    """The repr of a value, cut."""
    # Cut before repr: a completion may be a megabyte.
    text = repr(value[:limit] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def find(target: str) -> Any:
    """What 'module:name' or 'module:name.attribute' names; raises ImportError and AttributeError."""
    module_name, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def serve(parent: int, setup: str) -> None:
    """Answers requests on standard input until it ends; `setup` names a function that is called first.

    A request is its length in 8 bytes and a pickled (target, inputs): it comes from the trainer. Replies are lines of
    JSON, since a process that has read model output is not to be unpickled from: {"started": true} when the function
    is there, then the Reply. What the function prints goes to standard error.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    os.environ["JAX_PLATFORMS"] = "cpu"  # should the function's module load jax: the devices are the trainer's
    die_with(parent)
    if setup:
        find(setup)()
    while request := _read(requests):
        reply = _answer(request, replies)
        _write(replies, reply)


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _answer(request: bytes, replies: BinaryIO) -> Reply:
    try:
        target, inputs = pickle.loads(request)
        function = find(target)
    except BaseException as error:
        return {"error": [type(error).__name__, _message(error), "while it was loaded"]}
    _write(replies, {"started": True})
    return invoke(function, inputs)


def _read(file: BinaryIO) -> bytes:
    size = file.read(8)
    return file.read(int.from_bytes(size, "little")) if len(size) == 8 else b""


def _write(file: BinaryIO, reply: Reply) -> None:
    file.write(json.dumps(reply).encode() + b"\n")
    file.flush()


def _told(value: Any) -> list[str]:
    return [short(value), type(value).__name__]


def _message(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= 500 else text[:497] + "..."


async def _awaited(value: Any) -> Any:
    return await value
