"""Host rewards: ordinary Python on text, called from inside the compiled step.

An exception in one shard's callback would leave the other shards waiting in a collective until the process
aborts (40 s seen). So a call never raises: what goes wrong is kept as an error for the host to raise after the step,
and the program gets a sentinel by which it masks the update.
"""

import collections
import dataclasses
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import processes
from grpo_jax.errors import InputError
from grpo_jax.parallel import ROW_AXES
from grpo_jax.rewards.pool import LOADING, Pool, Pooled
from grpo_jax.rewards.worker import KEYWORDS, Reply, TrainerState, invoke, short

# Between callback and program, +inf says that a reward does not apply and NaN that it failed; none may return them.
NOT_APPLICABLE = np.float32(np.inf)
FAILED = np.float32(np.nan)
# Numbers in an argument of a callback on CPU devices: 64 KiB.
CPU_PIECE = 16384

Key = tuple[int, tuple[int, ...]]
"""A completion: its dataset row and its ids."""

HostScores = tuple[Float[Array, "B C"], Float[Array, "B C"], Bool[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a draw number says about where a run stands: draws of a step, and steps of the run."""

    draws_per_step: int
    max_steps: int


@dataclasses.dataclass
class Record:
    """What calls told beside scores.

    Attributes:
      seconds: time spent in them.
      failures: completions scored 0 by `rewards.on_error`, by reward, with a line that says what went wrong.
      metrics: values of `log_metric` by name.
      extra: values of `log_extra` by column, of each completion.
      sources: the reward that has logged a column.
    """

    seconds: float = 0.0
    failures: dict[str, list[tuple[Key, str]]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    extra: dict[Key, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, other: "Record") -> None:
        """Takes in what another record holds."""
        self.seconds += other.seconds
        self.extra |= other.extra
        self.sources |= other.sources
        for name, found in other.failures.items():
            self.failures.setdefault(name, []).extend(found)
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)

    def of_all(self) -> "Record":
        """What the records of all processes hold together; the seconds are those of the slowest."""
        if not processes.several():
            return self
        fields = dataclasses.asdict(self) | {"extra": [(*key, values) for key, values in self.extra.items()]}
        joined, told = Record(), processes.exchange(fields)
        for fields in told:
            failures = {
                name: [((row, tuple(ids)), line) for (row, ids), line in found]
                for name, found in fields["failures"].items()
            }
            extra = {(row, tuple(ids)): values for row, ids, values in fields["extra"]}
            joined.add(Record(**fields | {"failures": failures, "extra": extra}))
        joined.seconds = max(fields["seconds"] for fields in told)
        return joined


class HostRewards:
    """Reward functions with TRL's signature, and the dataset rows that they read.

    Each is called as `fn(prompts=[...], completions=[...], **columns)`, plus `completion_ids`, `trainer_state`,
    `log_extra` and `log_metric`, with what it accepts; lists are aligned with the completions. A row whose prompt is a
    list of messages has its completions as messages too. A `Pooled` one runs in a worker process, which is killed at
    its time limit. The others run one at a time in a thread with a time limit: a function that holds the interpreter's
    lock (a runaway regular expression) cannot be stopped by it. A function that itself runs jax needs staged mode: the
    devices of the step wait for it.

    A call that fails is made again for each completion alone, to find those at fault. With `on_error` 'zero' they are
    scored 0, counted and shown; with 'raise' the step's update is masked and the host raises.

    Attributes:
      calls: calls made.
      scored: completions scored.
      seconds: time spent in calls.
      step: steps done, where calls give no draw numbers.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any] | Pooled],
        rows: Sequence[dict[str, Any]],
        decode: Callable[[list[int]], str],
        timeout: float,
        on_error: str = "raise",
        pool: Pool | None = None,
        progress: Progress | None = None,
    ):
        self.functions, self.rows, self.decode, self.timeout = dict(functions), rows, decode, timeout
        self.on_error, self.pool, self.progress = on_error, pool, progress
        self.seconds, self.calls, self.scored, self.step = 0.0, 0, 0, 0
        self._records: collections.deque[tuple[int, Record]] = collections.deque()
        self._error: InputError | None = None
        self._lock = threading.Lock()

    def call(
        self,
        row: Int[np.ndarray, "B"],
        tokens: Int[np.ndarray, "B T"],
        lengths: Int[np.ndarray, "B"],
        draw: Int[np.ndarray, "B"] | None = None,
        asked: Float[np.ndarray, "B C"] | None = None,
    ) -> Float[np.ndarray, "B C"]:
        """Scores by function: NOT_APPLICABLE where one returned None, all FAILED after an error; never raises.

        Where `asked` is 0 a function is not called with that completion, and does not apply.

        After an error every call fails at once until `take_error`, so that one hanging reward costs one time limit.
        """
        with self._lock:
            begin, record = time.perf_counter(), Record()
            values = np.full((len(row), len(self.functions)), FAILED, np.float32)
            try:
                if self._error is None:
                    ids = [line[:n].tolist() for line, n in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]
                    texts = [self.decode(line) for line in ids]
                    values = self._score(np.asarray(row).tolist(), texts, ids, draw, record, asked)
            except InputError as error:
                self._error = error
            except Exception as error:
                self._error = InputError(f"host rewards: {type(error).__name__}: {error}")
            record.seconds = time.perf_counter() - begin
            self._records.append((len(row), record))
            self.seconds += record.seconds
            self.calls += 1
            self.scored += len(row) if asked is None else int(np.count_nonzero(np.any(asked, axis=1)))
            return values

    def score_texts(self, texts: Sequence[str], ids: Sequence[list[int]]) -> tuple[Float[np.ndarray, "B C"], Record]:
        """Scores and record of one text for each dataset row; raises InputError where `on_error` says so."""
        record = Record()
        return self._score(list(range(len(texts))), list(texts), list(ids), None, record), record

    def take(self, completions: int | None = None) -> Record:
        """What the oldest calls not asked for so far told that scored so many completions: those of one step.

        None: what all calls told.
        """
        with self._lock:
            total = Record()
            while self._records and (completions is None or completions > 0):
                count, record = self._records.popleft()
                completions = None if completions is None else completions - count
                total.add(record)
            return total

    def take_error(self) -> InputError | None:
        """The first failure since the last time, and forgets it; None when all went well."""
        with self._lock:
            error, self._error = self._error, None
            return error

    def _score(
        self,
        row: list[int],
        texts: list[str],
        ids: list[list[int]],
        draw: Any,
        record: Record,
        asked: Float[np.ndarray, "B C"] | None = None,
    ) -> Float[np.ndarray, "B C"]:
        state, keys = self._state(draw), [(r, tuple(line)) for r, line in zip(row, ids, strict=True)]
        inputs: dict[tuple[int, ...], dict[str, Any]] = {}  # of the completions that are asked about, by their places
        places: dict[str, tuple[int, ...]] = {}
        for c, name in enumerate(self.functions):
            at = tuple(range(len(row)) if asked is None else np.flatnonzero(asked[:, c]).tolist())
            if at not in inputs:
                rows = [self.rows[row[i]] for i in at]
                inputs[at] = reward_inputs(rows, [texts[i] for i in at], [ids[i] for i in at], state)
            places[name] = at
        replies = self._replies({name: inputs[at] for name, at in places.items() if at})
        values = np.full((len(row), len(self.functions)), NOT_APPLICABLE, np.float32)
        for c, (name, at) in enumerate(places.items()):
            if at:
                about = ([texts[i] for i in at], [keys[i] for i in at], record)
                values[list(at), c] = self._read(name, replies[name], inputs[at], *about)
        return values

    def _state(self, draw: Any) -> TrainerState:
        if self.progress is None:
            return TrainerState(self.step)
        count = self.progress.draws_per_step
        step = self.step if draw is None or not len(draw) else int(np.max(draw)) // count
        return TrainerState(step, self.progress.max_steps, step * count / max(len(self.rows), 1))

    def _replies(self, inputs: Mapping[str, dict[str, Any]]) -> dict[str, Reply]:
        """The reply of each function to its completions; those in worker processes run side by side."""
        functions = {name: self.functions[name] for name in inputs}
        pooled = {name: f for name, f in functions.items() if isinstance(f, Pooled)}
        replies: dict[str, Reply] = {}
        if pooled:
            assert self.pool is not None
            tasks = [(f.target, {**inputs[name], **f.options}) for name, f in pooled.items()]
            replies = dict(zip(pooled, self.pool.run(tasks, self.timeout), strict=True))
        for name, function in functions.items():
            if not isinstance(function, Pooled):
                run = partial(invoke, function, inputs[name])
                replies[name] = _within(self.timeout, run, name) or {"timeout": self.timeout}
        return replies

    def _read(
        self, name: str, reply: Reply, inputs: dict[str, Any], texts: list[str], keys: list, record: Record
    ) -> Float[np.ndarray, "B"]:
        """The scores of a reply; what failed raises InputError or is counted, as `on_error` says."""
        scores, failures = read_reply(name, reply, texts)
        if len(failures) == len(texts) > 1 and ("error" in reply or "timeout" in reply):
            alone = self._alone(name, reply, inputs, len(texts))
            single = [read_reply(name, one, [text]) for one, text in zip(alone, texts, strict=True)]
            if any(found for _, found in single):
                # Whoever fails alone is at fault; the others keep the score that they get alone.
                scores = np.concatenate([part for part, _ in single])
                failures = {i: found[0] for i, (_, found) in enumerate(single) if found}
                reply = merged([one if "scores" in one else {"scores": [None]} for one in alone])
        if failures and self.on_error == "raise":
            raise next(iter(failures.values()))
        if failures:
            record.failures[name] = [(keys[i], str(error)) for i, error in failures.items()]
            scores[list(failures)] = 0.0
        for column, values in reply.get("extra", {}).items():
            record.sources[column] = name
            for key, value in zip(keys, values, strict=False):
                record.extra.setdefault(key, {})[column] = value
        for metric, values in reply.get("metrics", {}).items():
            record.metrics.setdefault(metric, []).extend(values)
        return scores

    def _alone(self, name: str, reply: Reply, inputs: dict[str, Any], count: int) -> list[Reply]:
        """The reply to each completion by itself, within not much more time; none when a thread still hangs."""
        singles = [{k: [v[i]] if isinstance(v, list) else v for k, v in inputs.items()} for i in range(count)]
        function = self.functions[name]
        if isinstance(function, Pooled):
            assert self.pool is not None
            tasks = [(function.target, {**single, **function.options}) for single in singles]
            return self.pool.run(tasks, self.timeout, self.timeout + LOADING)
        if "timeout" in reply:
            return [{"scores": [None]}] * count
        found: list[Reply] = []
        _within(self.timeout, lambda: found.extend(invoke(function, single) for single in singles) or found, name)
        return found + [{"timeout": self.timeout}] * (count - len(found))


def reward_inputs(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], ids: Sequence[list[int]], state: TrainerState
) -> dict[str, Any]:
    """The keywords of a reward call: a list with one entry a completion each, and the trainer's state."""
    names = dict.fromkeys(name for r in rows for name in r if name not in ("prompt", "completion", "completion_ids"))
    inputs: dict[str, Any] = {name: [r.get(name) for r in rows] for name in names}
    inputs["prompts"] = [r["prompt"] for r in rows]
    inputs["completions"] = [
        text if isinstance(r["prompt"], str) else [{"role": "assistant", "content": text}]
        for r, text in zip(rows, texts, strict=True)
    ]
    return {**inputs, "completion_ids": list(ids), "trainer_state": state}


def _within(seconds: float, work: Callable[[], Any], name: str) -> Any:
    """What `work` returns, run in a thread; None when it takes longer."""
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(work()), name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else None


def merged(replies: Sequence[Reply]) -> Reply:
    """Replies to single completions as one reply; a column that some did not log holds None there."""
    columns = dict.fromkeys(column for reply in replies for column in reply.get("extra", {}))
    metrics: dict[str, list[float]] = {}
    for reply in replies:
        for name, values in reply.get("metrics", {}).items():
            metrics.setdefault(name, []).extend(values)
    extra = {c: [(reply.get("extra", {}).get(c) or [None])[0] for reply in replies] for c in columns}
    return {"scores": [reply["scores"][0] for reply in replies], "extra": extra, "metrics": metrics}


def missing(function: Callable[..., Any], inputs: Sequence[str]) -> list[str]:
    """Parameters that a function requires and `inputs` does not have."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.default is p.empty]
    return [p.name for p in named if p.name not in (*inputs, *KEYWORDS)]


def read_reply(name: str, reply: Reply, texts: list[str]) -> tuple[Float[np.ndarray, "B"], dict[int, InputError]]:
    """Scores as float32, NOT_APPLICABLE for None, FAILED where something is wrong, and what that is by completion."""
    fix = "return a list with one finite number, or None, for each completion"
    scores, whole = np.full(len(texts), FAILED, np.float32), ""
    if "timeout" in reply:
        whole = f"did not return within rewards.timeout={reply['timeout']:g} seconds"
        fix = "make it faster or raise rewards.timeout"
    elif "error" in reply:
        kind, message, place = reply["error"]
        whole, fix = f"raised {kind}: {message} ({place})", "mend it, or return None where it does not apply"
    elif "returned" in reply:
        whole = f"returned {reply['returned'][0]} ({reply['returned'][1]})"
    elif len(reply["scores"]) != len(texts):
        whole = f"returned {len(reply['scores'])} scores for {len(texts)} completions"
    else:
        uneven = [c for c, values in reply.get("extra", {}).items() if len(values) != len(texts)]
        if uneven:
            count = len(reply["extra"][uneven[0]])
            whole = f"logged {count} values in log_extra({uneven[0]!r}) for {len(texts)} completions"
            fix = "log one value for each completion"
    if whole:
        link = "for" if "returned" in reply else "called with"
        return scores, {i: _failure(name, whole, link, text, fix) for i, text in enumerate(texts)}
    failures = {}
    for i, value in enumerate(reply["scores"]):
        if isinstance(value, list):
            failures[i] = _failure(name, f"returned {value[0]} ({value[1]})", "for", texts[i], fix)
        else:
            scores[i] = NOT_APPLICABLE if value is None else value
    return scores, failures


def _failure(name: str, what: str, link: str, text: str, fix: str) -> InputError:
    return InputError(f"reward {name!r} {what}, {link} completion {short(text)}; {fix}")


def score_in_program(
    host: HostRewards,
    mesh: Mesh,
    row: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    draw: Int[Array, "B"] | None = None,
    asked: Float[Array, "B C"] | None = None,
) -> HostScores:
    """(values, valid, failed) of host rewards inside a traced program, each completion scored once on any mesh.

    Functions are called with the completions for which `asked` is 1 (None: with all). B must divide by the devices that
    rows are split over. Manual over all mesh axes: a bare callback on a sharded batch would gather everything to one
    device, and an ungated one would score again on each tensor replica.
    """
    rows_over = tuple(name for name in mesh.axis_names if name in ROW_AXES)
    copied_over = tuple(name for name in mesh.axis_names if name not in ROW_AXES)
    spec = PartitionSpec(rows_over)
    start = 3 if asked is None else 3 + asked.shape[1]  # of the tokens in a line of the table

    @partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def call(table):
        shape = jax.ShapeDtypeStruct((table.shape[0], len(host.functions)), jnp.float32)

        def receive(*pieces):
            whole = np.concatenate([np.asarray(piece) for piece in pieces]).reshape(table.shape)
            number = None if draw is None else whole[:, 2]
            wanted = None if asked is None else whole[:, 3:start]
            return host.call(whole[:, 0], whole[:, start:], whole[:, 1], number, wanted)

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

    drawn = row if draw is None else draw
    about = [row[:, None], lengths[:, None], drawn[:, None]] + ([] if asked is None else [asked])
    table = jnp.concatenate([x.astype(jnp.int32) for x in (*about, tokens)], axis=1)
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
