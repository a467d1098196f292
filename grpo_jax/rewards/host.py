"""Host rewards: ordinary Python on text, called from inside the compiled step.

An exception in one shard's callback would leave the other shards waiting in a collective until the process
aborts (40 s seen). So a call never raises: what goes wrong is kept as an error for the host to raise after the step,
and the program gets a sentinel by which it masks the update.
"""

import asyncio
import collections
import inspect
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.errors import InputError

# Between callback and program, +inf says that a reward does not apply and NaN that it failed; none may return them.
NOT_APPLICABLE = np.float32(np.inf)
FAILED = np.float32(np.nan)
# Mesh axes over which completions are split; the others hold copies of them.
ROW_AXES = ("data", "fsdp")
# Numbers in an argument of a callback on CPU devices: 64 KiB.
CPU_PIECE = 16384

HostScores = tuple[Float[Array, "B C"], Float[Array, "B C"], Bool[Array, ""]]


class HostRewards:
    """Reward functions with TRL's signature, and the dataset rows that they read.

    Each is called as `fn(prompts=[...], completions=[...], **columns)`, plus `completion_ids`, with what it accepts;
    lists are aligned with the completions. A row whose prompt is a list of messages has its completions as
    messages too. Calls are one at a time, in a thread with a time limit: a function that holds the interpreter's lock
    (a runaway regular expression) cannot be stopped by it. A function that itself runs jax needs staged mode: the
    devices of the step wait for it.

    Attributes:
      seconds: time spent in calls.
      calls: calls made.
      scored: completions scored.
    """

    def __init__(
        self,
        functions: dict[str, Callable[..., Any]],
        rows: Sequence[dict[str, Any]],
        decode: Callable[[list[int]], str],
        timeout: float,
    ):
        self.functions, self.rows, self.decode, self.timeout = functions, rows, decode, timeout
        self.seconds, self.calls, self.scored = 0.0, 0, 0
        self._timed: collections.deque[tuple[int, float]] = collections.deque()
        self._error: InputError | None = None
        self._lock = threading.Lock()

    def call(
        self, row: Int[np.ndarray, "B"], tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"]
    ) -> Float[np.ndarray, "B C"]:
        """Scores by function: NOT_APPLICABLE where one returned None, all FAILED if anything went wrong; never raises.

        After a failure every call fails at once until `take_error`, so that one hanging reward costs one time limit.
        """
        with self._lock:
            begin = time.perf_counter()
            values = np.full((len(row), len(self.functions)), FAILED, np.float32)
            try:
                if self._error is None:
                    values = self._score(np.asarray(row), np.asarray(tokens), np.asarray(lengths))
            except InputError as error:
                self._error = error
            except Exception as error:
                self._error = InputError(f"host rewards: {type(error).__name__}: {error}")
            seconds = time.perf_counter() - begin
            self._timed.append((len(row), seconds))
            self.seconds += seconds
            self.calls += 1
            self.scored += len(row)
            return values

    def take_seconds(self, completions: int) -> float:
        """Seconds of the oldest calls not asked for so far that scored so many completions: those of one step."""
        with self._lock:
            total = 0.0
            while completions > 0 and self._timed:
                count, seconds = self._timed.popleft()
                completions, total = completions - count, total + seconds
            return total

    def take_error(self) -> InputError | None:
        """The first failure since the last time, and forgets it; None when all went well."""
        with self._lock:
            error, self._error = self._error, None
            return error

    def _score(self, row: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        ids = [line[:length].tolist() for line, length in zip(tokens, lengths, strict=True)]
        texts = [self.decode(line) for line in ids]
        rows = [self.rows[index] for index in row.tolist()]
        names = dict.fromkeys(name for r in rows for name in r if name != "prompt")
        inputs: dict[str, list] = {name: [r.get(name) for r in rows] for name in names}
        inputs["prompts"] = [r["prompt"] for r in rows]
        inputs["completions"] = [
            text if isinstance(r["prompt"], str) else [{"role": "assistant", "content": text}]
            for r, text in zip(rows, texts, strict=True)
        ]
        inputs["completion_ids"] = ids
        scores = [run_reward(name, fn, inputs, texts, self.timeout) for name, fn in self.functions.items()]
        return np.stack(scores, axis=1)


def run_reward(
    name: str, function: Callable[..., Any], inputs: dict[str, list], texts: list[str], timeout: float
) -> Float[np.ndarray, "B"]:
    """One float a completion, NOT_APPLICABLE for None; raises InputError for all else and after `timeout` seconds."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            # Copies, so that a function that edits its lists does not change what the next one reads.
            returned = function(**{key: list(value) for key, value in accepted(function, inputs).items()})
            if inspect.isawaitable(returned):
                returned = asyncio.run(_awaited(returned))
            outcome.append(checked(name, returned, texts))
        except InputError as error:
            outcome.append(error)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = f"raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            fix = "mend it, or return None where it does not apply"
            outcome.append(_failure(name, what, "called with", texts, 0, fix))

    worker = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    worker.start()
    worker.join(timeout)
    if not outcome:
        what = f"did not return within rewards.timeout={timeout:g} seconds"
        raise _failure(name, what, "called with", texts, 0, "make it faster or raise rewards.timeout")
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


async def _awaited(value: Any) -> Any:
    return await value


def accepted(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a function takes by name; all when it has `**kwargs` or no signature to read."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return inputs
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def missing(function: Callable[..., Any], inputs: Sequence[str]) -> list[str]:
    """Parameters that a function requires and `inputs` does not have."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.default is p.empty]
    return [p.name for p in named if p.name not in inputs]


def checked(name: str, returned: Any, texts: list[str]) -> Float[np.ndarray, "B"]:
    """What a reward returned as float32, NOT_APPLICABLE for None; raises InputError naming the completion at fault."""
    fix = "return a list with one finite number, or None, for each completion"
    if not isinstance(returned, list | tuple | np.ndarray):
        raise _failure(name, f"returned {_short(returned)} ({type(returned).__name__})", "for", texts, 0, fix)
    if len(returned) != len(texts):
        what = f"returned {len(returned)} scores for {len(texts)} completions"
        raise _failure(name, what, "called with", texts, 0, fix)
    scores = np.full(len(texts), NOT_APPLICABLE, np.float32)
    for i, value in enumerate(returned):
        if value is None:
            continue
        what = f"returned {_short(value)} ({type(value).__name__})"
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise _failure(name, what, "for", texts, i, fix)
        try:
            score = float(value)
        except (OverflowError, TypeError, ValueError):
            score = math.nan
        if not abs(score) <= float(np.finfo(np.float32).max):
            raise _failure(name, what, "for", texts, i, fix)
        scores[i] = score
    return scores


def _failure(name: str, what: str, link: str, texts: list[str], index: int, fix: str) -> InputError:
    completion = f"{link} completion {_short(texts[index])}" if texts else f"{link} no completion"
    return InputError(f"reward {name!r} {what}, {completion}; {fix}")


def _short(value: Any, limit: int = 80) -> str:
    # Cut before repr: a completion may be a megabyte.
    text = repr(value[:limit] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def score_in_program(
    host: HostRewards, mesh: Mesh, row: Int[Array, "B"], tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> HostScores:
    """(values, valid, failed) of host rewards inside a traced program, each completion scored once on any mesh.

    B must divide by the data x fsdp devices. Manual over all mesh axes: a bare callback on a sharded batch would gather
    everything to one device, and an ungated one would score again on each tensor replica.
    """
    rows_over = tuple(name for name in mesh.axis_names if name in ROW_AXES)
    copied_over = tuple(name for name in mesh.axis_names if name not in ROW_AXES)
    spec = PartitionSpec(rows_over)

    @partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def call(table):
        shape = jax.ShapeDtypeStruct((table.shape[0], len(host.functions)), jnp.float32)

        def receive(*pieces):
            whole = np.concatenate([np.asarray(piece) for piece in pieces]).reshape(table.shape)
            return host.call(whole[:, 0], whole[:, 2:], whole[:, 1])

        owner = jnp.bool_(True)
        for name in copied_over:
            owner &= jax.lax.axis_index(name) == 0
        # io_callback, since a pure_callback may be dropped or repeated.
        raw = jax.lax.cond(
            owner,
            lambda *pieces: io_callback(receive, shape, *pieces, ordered=False),
            lambda *pieces: jnp.zeros(shape.shape, shape.dtype),
            *_pieces(table.ravel(), mesh),
        )
        return jax.lax.psum(raw, copied_over) if copied_over else raw

    table = jnp.concatenate([row[:, None], lengths[:, None], tokens], axis=1).astype(jnp.int32)
    return decoded(call(table))


def _pieces(flat: Int[Array, "S"], mesh: Mesh) -> list[Int[Array, "S"]]:
    """The argument in pieces that a callback may read.

    On CPU devices io_callback copies arguments of 100 KiB and more with threads of the pool that the callbacks
    themselves hold: with as many shards as threads all wait forever (seen with 8 shards of 512 KiB on 2 cores).
    """
    if mesh.devices.flat[0].platform != "cpu":
        return [flat]
    return jnp.split(flat, list(range(CPU_PIECE, flat.shape[0], CPU_PIECE)))


def decoded(raw: Float[Array, "B C"]) -> HostScores:
    """(values, valid, failed) from what `HostRewards.call` returned."""
    valid = jnp.isfinite(raw)
    return jnp.where(valid, raw, 0.0), valid.astype(jnp.float32), jnp.isnan(raw).any()
