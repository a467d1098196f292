"""Several processes that train as one: how they join, what they tell each other, and what the first one does alone.

All of them run the same host code in the same order; jax.distributed connects them and ends them when one is lost.
"""

import atexit
import collections
import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed as jax_distributed  # its key-value store has no public name (orbax uses it as well)

from grpo_jax.config import DistributedConfig
from grpo_jax.errors import InputError

T = TypeVar("T")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
METADATA = "metadata.google.internal"
POLL_MS = 5000  # a wait is cut into such pieces, or signals would wait as long
PIECE = 1 << 20  # characters of a message through the coordinator
_rounds = itertools.count()
_told: collections.deque[str] = collections.deque()  # names of this process' last exchanges
_agreements: list[Any] = []  # jax's preemption sync manager of this job, where there are several processes
_asked = itertools.count(1)  # how often `told_to_stop` was asked


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among the processes of a job; None where that is not given.

    Attributes:
      coordinator: HOST:PORT at which process 0 can be reached.
      count: processes there are.
      process: number of this one.
    """

    coordinator: str | None = None
    count: int | None = None
    process: int | None = None


def place_of(given: Place, environ: Mapping[str, str]) -> Place:
    """`given`, filled up from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; checked."""

    def number(value: int | None, name: str) -> int | None:
        if value is not None or not environ.get(name):
            return value
        if not environ[name].isdecimal():
            raise InputError(f"{name}={environ[name]!r} is not a number")
        return int(environ[name])

    place = Place(
        given.coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        number(given.count, "JAX_NUM_PROCESSES"),
        number(given.process, "JAX_PROCESS_ID"),
    )
    if place.coordinator and not place.coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator {place.coordinator}: has no port: write HOST:PORT")
    if place.count is not None and place.count < 1:
        raise InputError(f"--num_processes {place.count}: must be at least 1")
    if place.process is not None and not 0 <= place.process < (place.count or sys.maxsize):
        raise InputError(f"--process_id {place.process}: must lie from 0 to --num_processes - 1")
    return place


def among_several(environ: Mapping[str, str]) -> bool:
    """Whether a cluster that jax.distributed knows started this process as one of several.

    jax finds coordinator and number by itself, but not that there is just one process and nothing to join.
    """
    if all(environ.get(name) for name in SLURM):
        return int(environ["SLURM_NTASKS"]) > 1
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:  # GKE, and notebooks with one host
        return "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return _on_tpu_vm(environ)


def _on_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU VM: jax's import marks hosts with chips, and the metadata server knows the others."""
    if "TPU_ML_PLATFORM" not in environ or "TPU_SKIP_MDS_QUERY" in environ:
        return False
    try:
        socket.gethostbyname(METADATA)
    except OSError:
        return False
    return True


def join(given: Place, config: DistributedConfig, environ: Mapping[str, str]) -> None:
    """Makes this process one of a job, where it is one; must come before anything is computed.

    Where it stands is told by `given`, by the environment, or by the cluster. Raises InputError when that is not whole,
    and when the others do not come.
    """
    place = place_of(given, environ)
    told = [value for value in dataclasses.astuple(place) if value is not None]
    if place.count == 1 or jax.distributed.is_initialized():
        return
    cluster = among_several(environ)
    if not told and not cluster:
        return
    if len(told) < 3 and not cluster:
        raise InputError(
            f"--coordinator={place.coordinator} --num_processes={place.count} --process_id={place.process}: give all "
            "three, or start one process"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.process,
            cluster_detection_method=None if cluster else "deactivate",
            initialization_timeout=config.join_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            # Whoever is done waits for the others before, in `part`; after an error nobody should.
            shutdown_timeout_seconds=config.heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {place.process}: could not join the others at {place.coordinator} within "
            f"distributed.join_timeout={config.join_timeout} seconds ({_short(error)})"
        ) from error
    _take_agreement()


def _take_agreement() -> None:
    """Keeps jax's agreement on a place to stop from others than `told_to_stop`, until the connection ends.

    Orbax would ask it about the number of each step that it saves, and asked out of turn it never answers yes.
    """
    state = jax_distributed.global_state
    if state.preemption_sync_manager is not None:
        _agreements.append(state.preemption_sync_manager)
        state.preemption_sync_manager = None
        atexit.register(_give_agreement_back)


def _give_agreement_back() -> None:
    """Lets jax end it before the connection."""
    if _agreements:
        jax_distributed.global_state.preemption_sync_manager = _agreements.pop()


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is process 0, which writes what only one may write."""
    return jax.process_index() == 0


def number() -> int:
    """Number of this process."""
    return jax.process_index()


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def exchange(value: Any) -> list[Any]:
    """What every process gives here, in order of their numbers; JSON values.

    It goes through the coordinator, not through the devices: those may be at work on a step.
    """
    if not several():
        return [value]
    client, name = jax_distributed.global_state.client, f"grpo_jax/exchange/{next(_rounds)}"
    assert client is not None
    _tell(client, f"{name}/{jax.process_index()}", json.dumps(value))
    found = [json.loads(_wait_for_pieces(client, f"{name}/{number}")) for number in range(jax.process_count())]
    # Whoever gave something here had read all of the exchange before.
    if len(_told) == 2:
        client.key_value_delete(_told.popleft())
    _told.append(f"{name}/{jax.process_index()}")
    return found


def _tell(client: Any, name: str, text: str) -> None:
    """Gives a text to the others, in pieces that the coordinator takes."""
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    for number, piece in enumerate(pieces):
        client.key_value_set(f"{name}/{number}", f"{len(pieces)}|{piece}")


def _wait_for_pieces(client: Any, name: str) -> str:
    """A text that was given in pieces."""
    count, _, text = _wait_for(client, f"{name}/0").partition("|")
    return text + "".join(_wait_for(client, f"{name}/{i}").partition("|")[2] for i in range(1, int(count)))


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns on process 0, which alone does it; its InputError is raised by all. JSON values."""
    if not several():
        return work()
    client, name = jax_distributed.global_state.client, f"grpo_jax/first/{next(_rounds)}"
    assert client is not None
    told: dict[str, Any]
    if first():
        try:
            told = {"value": work()}
        except InputError as error:
            told = {"error": str(error)}
        _tell(client, name, json.dumps(told))
    else:
        told = json.loads(_wait_for_pieces(client, name))
    if "error" in told:
        raise InputError(told["error"])
    return told["value"]


def _wait_for(client: Any, key: str) -> str:
    """The value of a key once it is there; a process that is lost ends the wait by ending this process."""
    while True:
        try:
            return client.blocking_key_value_get(key, POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def raise_any(error: InputError | None) -> None:
    """Raises the error that the first of the processes to have one gives."""
    found = [message for message in exchange(None if error is None else str(error)) if message is not None]
    if found:
        raise InputError(found[0])


def ask_all_to_stop() -> None:
    """Has every process reach `told_to_stop` at the same step: jax spreads the word from whoever gets SIGTERM."""
    signal.raise_signal(signal.SIGTERM)


def told_to_stop() -> bool:
    """Whether to stop here; all processes must ask at the same places."""
    _take_agreement()  # where the caller has connected the processes
    return bool(_agreements) and _agreements[0].reached_sync_point(next(_asked))


def part() -> None:
    """Waits until all processes are done, and lets go of them."""
    if several():
        exchange(None)
        _give_agreement_back()
        jax.distributed.shutdown()


def give_up(code: int, heartbeat_timeout: int = 0) -> None:
    """Ends this process at once with an exit code, after an error that the others do not share.

    A usual exit would wait for them. With `heartbeat_timeout` it waits until the coordinator has noticed who was lost:
    jax then ends this process by itself and names them, the tasks that stopped sending heartbeats or the leader, 0.
    """
    if heartbeat_timeout:
        traceback.print_exc()
        print(
            f"grpo-jax: process {jax.process_index()} of {jax.process_count()} failed, or lost another one; waiting "
            f"{heartbeat_timeout + 5} s for jax to name it (a task is a process, the leader is process 0)",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(heartbeat_timeout + 5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
