"""Several processes: how they find each other, what they share, and that a job outlives the loss of any of them."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import job
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import launcher, parallel, processes
from grpo_jax.config import DistributedConfig, MeshConfig
from grpo_jax.errors import InputError
from grpo_jax.processes import Place, among_several, place_of
from grpo_jax.recipes.loop import Stop
from grpo_jax.rewards.host import Record

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}


# Finding each other.


def test_arguments_come_before_the_environment():
    environ = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
    assert place_of(Place(), environ) == Place("a:1", 4, 2)
    assert place_of(Place("b:2", 8, 0), environ) == Place("b:2", 8, 0)
    assert place_of(Place(), {}) == Place(None, None, None)


@pytest.mark.parametrize(
    ("given", "environ", "says"),
    [
        (Place("host"), {}, "--coordinator host: has no port: write HOST:PORT"),
        (Place(count=0), {}, "--num_processes 0: must be at least 1"),
        (Place(count=2, process=2), {}, "--process_id 2: must lie from 0 to --num_processes - 1"),
        (Place(), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
        (Place("a:1", 2), {}, "give all three, or start one process"),
    ],
)
def test_a_place_that_is_not_whole_is_refused(given, environ, says):
    with pytest.raises(InputError, match=says):
        processes.join(given, DistributedConfig(), environ)


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, False),  # a shell of salloc: nothing was started by srun
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}, False),  # Colab
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_ML_PLATFORM": "JAX"}, False),  # Kaggle
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_clusters_are_told_from_single_machines(environ, several):
    assert among_several(environ) == several


def test_a_tpu_vm_is_known_by_its_metadata_server(monkeypatch):
    environ = {"TPU_ML_PLATFORM": "JAX"}
    asked = []
    monkeypatch.setattr(processes.socket, "gethostbyname", asked.append)
    assert among_several(environ) and asked == [processes.METADATA]

    def unknown(name):
        raise OSError(name)

    monkeypatch.setattr(processes.socket, "gethostbyname", unknown)
    assert not among_several(environ)


@pytest.mark.parametrize(
    ("given", "environ", "told"),
    [
        (Place("a:1", 2, 1), {}, ("a:1", 2, 1, "deactivate")),
        (Place(), SLURM, (None, None, None, None)),  # jax finds the rest
        (Place("a:1"), SLURM, ("a:1", None, None, None)),
        (Place(count=1), SLURM, None),
        (Place(), {}, None),
    ],
)
def test_what_jax_is_told(monkeypatch, given, environ, told):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    processes.join(given, DistributedConfig(heartbeat_timeout=11, join_timeout=22), environ)
    if told is None:
        assert calls == []
        return
    [(place, options)] = calls
    assert (*place, options["cluster_detection_method"]) == told
    assert (options["heartbeat_timeout_seconds"], options["initialization_timeout"]) == (11, 22)
    assert options["heartbeat_timeout_seconds"] < 60


# Whose rows.


def fake_mesh(shape: tuple[int, int, int], hosts: int) -> types.SimpleNamespace:
    """A mesh of devices that only know whose they are, in order, as many for each host."""
    count = int(np.prod(shape))
    devices = [types.SimpleNamespace(process_index=i * hosts // count) for i in range(count)]
    sizes = dict(zip(parallel.AXES, (*shape[:2], 1, 1, shape[2]), strict=True))
    return types.SimpleNamespace(devices=np.array(devices).reshape(*sizes.values()), shape=sizes)


def test_every_row_is_scored_by_one_process():
    assert parallel.scoring_process(8, fake_mesh((4, 1, 1), 2)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert parallel.scoring_process(4, fake_mesh((1, 2, 2), 4)).tolist() == [0, 0, 2, 2]  # copies on processes 1 and 3
    assert parallel.scored_rows(4, fake_mesh((1, 2, 2), 4)).tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_rows_are_put_where_device_put_puts_them(shape):
    mesh = parallel.make_mesh(MeshConfig(*shape))
    batch = {"a": np.arange(16.0).reshape(8, 2), "b": np.arange(8)}
    asked = []

    def make(own):
        asked.append(own.tolist())
        return jax.tree.map(lambda x: x[own], batch)

    with jax.transfer_guard("disallow"):
        made = parallel.put_rows(make, 8, parallel.row_sharding(mesh))
    want = jax.device_put(batch, parallel.row_sharding(mesh))
    assert asked == [list(range(8))]
    for name, x in made.items():
        assert x.sharding == want[name].sharding
        np.testing.assert_array_equal(x, want[name])


def test_rows_behind_an_axis_of_seeds():
    mesh = parallel.make_mesh(MeshConfig(4, 2, 1))
    sharding = NamedSharding(mesh, PartitionSpec(None, *parallel.ROWS))
    x = np.arange(48.0).reshape(2, 8, 3)
    made = parallel.put_rows(lambda own: x[:, own], 8, sharding)
    assert made.sharding == sharding
    np.testing.assert_array_equal(made, x)


def test_only_the_rows_of_this_host_are_made(monkeypatch):
    """Of eight devices the last four count as another host's: their rows are not asked for."""
    mesh = parallel.make_mesh(MeshConfig(8, 1, 1))
    sharding = parallel.row_sharding(mesh)
    whole = sharding.addressable_devices_indices_map

    def half(self, shape):
        return {d: i for d, i in whole(shape).items() if d.id < 4}

    monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", half)
    asked, put = [], []

    def make(own):
        asked.append(own.tolist())
        return own * 10

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, s, pieces: put.extend(pieces))
    parallel.put_rows(make, 16, sharding)
    assert asked == [list(range(8))]
    assert np.concatenate(put).tolist() == [n * 10 for n in range(8)]


# What they tell each other.


def test_records_of_all_processes_are_joined(monkeypatch):
    key = (3, (1, 2))
    mine = Record(1.0, {"a": [(key, "bad")]}, {"m": [1.0]}, {key: {"note": "x"}}, {"note": "a"})
    other = Record(4.0, {"a": [((4, (5,)), "worse")]}, {"m": [3.0]}, {(4, (5,)): {"note": "y"}}, {"note": "a"})
    assert mine.of_all() is mine

    def both(fields):
        monkeypatch.setattr(processes, "exchange", lambda value: json.loads(json.dumps([fields, value])))
        return other.of_all()

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "exchange", lambda value: [value])
    sent = []
    monkeypatch.setattr(processes, "exchange", lambda value: sent.append(value) or [value])
    mine.of_all()
    joined = both(sent[0])
    assert joined.seconds == 4.0
    assert joined.failures == {"a": [(key, "bad"), ((4, (5,)), "worse")]}
    assert joined.metrics == {"m": [1.0, 3.0]} and joined.sources == {"note": "a"}
    assert joined.extra == {key: {"note": "x"}, (4, (5,)): {"note": "y"}}


def test_an_error_of_any_process_is_raised_by_all(monkeypatch):
    processes.raise_any(None)
    monkeypatch.setattr(processes, "exchange", lambda value: [None, "of process 1", value])
    with pytest.raises(InputError, match="of process 1"):
        processes.raise_any(None)


def test_a_reason_to_stop_waits_for_the_place_that_all_agree_on(monkeypatch):
    """Asked at its 3rd question, this process goes on until the one at which jax says so, and spreads the word once."""
    spread, asked = [], itertools.count(1)
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "ask_all_to_stop", lambda: spread.append(1))
    monkeypatch.setattr(processes, "told_to_stop", lambda: next(asked) % 6 == 0)
    monkeypatch.setattr(processes, "exchange", lambda value: [None, value])
    stop = Stop(None)
    found = []
    for question in range(1, 7):
        if question == 3:
            stop._on_signal(signal.SIGINT, None)
        found.append(stop.reason())
    assert found == [None] * 5 + ["SIGINT"] and spread == [1]
    other = Stop(None)
    monkeypatch.setattr(processes, "exchange", lambda value: ["the time budget", value])
    assert [other.reason() for _ in range(6)] == [None] * 5 + ["the time budget"] and spread == [1]


STOPPED = """
import sys, time, jax
from grpo_jax import processes
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import DistributedConfig
from grpo_jax.recipes.loop import Stop

port, number, connected = sys.argv[1:]
place = f"localhost:{port}", 2, int(number)
if connected == "by us":
    processes.join(processes.Place(*place), DistributedConfig(), {})
else:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(*place, cluster_detection_method="deactivate")
mesh = jax.make_mesh((2,), ("data",))
state = {"x": jax.jit(lambda: jax.numpy.zeros(2), out_shardings=jax.NamedSharding(mesh, jax.P("data")))()}
with Stop(None) as stop, Checkpoints("checkpoints", 1) as checkpoints:
    stop.check("before the first step")
    stop.check("before the first step")
    for step in range(1, 1_000):
        reason = stop.reason()
        if reason:
            break
        checkpoints.save(step, state, {})
        time.sleep(0.2)
print(step, reason, flush=True)
if connected == "by us":
    processes.part()
"""


@pytest.mark.parametrize("connected", ["by us", "by the caller"])
def test_a_signal_is_heard_between_saves(tmp_path, cli_env, connected):
    """SIGTERM to the second of two processes, which save as they go: both stop at the same question."""
    port, out = launcher.free_port(), [tmp_path / "0.out", tmp_path / "1.out"]
    with contextlib.ExitStack() as stack:
        started = []
        for i in (0, 1):
            command = [sys.executable, "-c", STOPPED, str(port), str(i), connected]
            started.append(job.started(tmp_path, job.environment(cli_env), command, str(i)))
            stack.callback(started[i].kill)
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "3").exists():
            assert time.monotonic() < deadline and all(process.poll() is None for process in started)
            time.sleep(0.05)
        started[1].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in started] == [0, 0]
    said = [path.read_text().splitlines()[-1] for path in out]
    assert said[0] == said[1] and said[0].endswith(" SIGTERM")


# The launcher.


LAUNCHER = """
import os, sys
from grpo_jax import launcher
launcher.ALONE = 0.3
text, count, nodes, node, coordinator, restarts = sys.argv[1:]
command = [sys.executable, "-S", "-c", text]
sys.exit(launcher.launch(command, int(count), int(nodes), int(node), coordinator, int(restarts), dict(os.environ)))
"""


def run_launcher(tmp_path, env, text, count=3, nodes=1, node=0, coordinator="", restarts=0):
    """`launch` of a Python text, in a process without jax, as it has on the command line: it forks."""
    given = [text, *map(str, (count, nodes, node, coordinator, restarts))]
    return subprocess.run(
        [sys.executable, "-c", LAUNCHER, *given], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )


def test_processes_learn_their_place(tmp_path, cli_env):
    text = (
        "import os, json\nnames = [n for n in os.environ if n.startswith('JAX_')]\n"
        "json.dump({n: os.environ[n] for n in names}, open('place' + os.environ['JAX_PROCESS_ID'], 'w'))"
    )
    ended = run_launcher(tmp_path, cli_env, text, 2, nodes=3, node=2, coordinator="head:99")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(p.name for p in tmp_path.glob("place*")) == ["place4", "place5"]
    found = json.loads((tmp_path / "place5").read_text())
    want = {"JAX_COORDINATOR_ADDRESS": "head:99", "JAX_NUM_PROCESSES": "6", "JAX_LOCAL_DEVICE_IDS": "1"}
    assert found | want == found


def test_the_launcher_names_who_was_lost_and_ends_the_rest(tmp_path, cli_env):
    text = (
        "import os, signal, time\n"
        "time.sleep(0.2) or os.kill(os.getpid(), 9) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(50)"
    )
    began = time.monotonic()
    ended = run_launcher(tmp_path, cli_env, text)
    assert ended.returncode == 128 + signal.SIGKILL and time.monotonic() - began < 30
    assert ended.stderr.startswith("grpo-jax launch: process 1 (pid ")
    assert "was killed by SIGKILL" in ended.stderr and "the 2 others" in ended.stderr


def test_the_launcher_starts_all_anew(tmp_path, cli_env):
    text = (
        "import os, pathlib, sys\nme = pathlib.Path('started' + os.environ['JAX_PROCESS_ID'])\n"
        "before = len(me.read_text()) if me.exists() else 0\nme.write_text('x' * (before + 1))\n"
        "sys.exit(7 if before == 0 and me.name == 'started0' else 0)"
    )
    ended = run_launcher(tmp_path, cli_env, text, 2, restarts=2)
    assert ended.returncode == 0 and "ended with exit code 7" in ended.stderr
    assert (tmp_path / "started0").read_text() == "xx"


def test_asked_to_end_the_launcher_asks_all_and_waits(tmp_path, cli_env):
    text = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('saved' + os.environ['JAX_PROCESS_ID'], 'w'), sys.exit(0)))\n"
        "open('ready' + os.environ['JAX_PROCESS_ID'], 'w')\ntime.sleep(50)"
    )
    command = [sys.executable, "-c", LAUNCHER, text, "2", "1", "0", "", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=cli_env)
    end = time.monotonic() + 40
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 0
    assert sorted(p.name for p in tmp_path.glob("saved*")) == ["saved0", "saved1"]


@pytest.mark.parametrize("given", [{"count": 0}, {"restarts": -1}, {"nodes": 2}, {"node": 1}])
def test_the_launcher_refuses_numbers_that_do_not_fit(given):
    given = {"count": 1, "nodes": 1, "node": 0, "restarts": 0} | given
    with pytest.raises(InputError, match="launch: --"):
        launcher.launch(["true"], coordinator="", environ={}, **given)


# Whole jobs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return job.write(tmp_path_factory.mktemp("job"))


def done(process: subprocess.Popen, folder: pathlib.Path, name: str, seconds: float = 500) -> str:
    """The output of a job that ended well."""
    process.wait(seconds)
    assert process.returncode == 0, (folder / f"{name}.err").read_text()[-3000:]
    return (folder / f"{name}.out").read_text()


def test_two_processes_are_one_run(folder, cli_env):
    """The first one writes and speaks, both save."""
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in job.ROWS]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config.sft.path=chats.jsonl", "--config.sft.steps=2", "--config.sft.batch_size=2"]
    command = [sys.executable, "-m", "grpo_jax.cli", "launch", "--processes=2", "--", "sft", "--config", "config.py"]
    given = [*command, "--workdir", "chats", "--config.sft.max_length=16", "--config.mesh.fsdp=2", *flags]
    env = job.environment(cli_env)
    said = done(job.started(folder, env, [*given, "--config.mesh.data=1"], "chats"), folder, "chats")
    assert [line["step"] for line in job.lines(folder, "chats")] == [1, 2]
    assert said.count("step 2/2") == 1 and said.count("compiled sft") == 1
    shards = {path.name for path in (folder / "chats" / "checkpoints" / "2" / "state").glob("ocdbt.process_*")}
    assert shards == {"ocdbt.process_0", "ocdbt.process_1"}
    assert (folder / "chats" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_two_processes_train_as_one(folder, cli_env):
    """Two steps: one writes and speaks, both save, and each has scored its own half of the completions."""
    env, short = job.environment(cli_env), ("--config.train.steps=2",)
    said = done(job.launch(folder, env, 2, "two", *short), folder, "two")
    assert [line["step"] for line in job.lines(folder, "two")] == [1, 2]
    assert said.count("step 2/2") == 1 and said.count("compiled the step") == 1
    summary = json.loads((folder / "two" / "summary.json").read_text())
    assert (summary["processes"], summary["devices"]) == (2, 2)
    assert {line["reward_metrics/scored"] for line in job.lines(folder, "two")} == {4.0}
    scored = [[json.loads(x) for x in (folder / f"scored.{i}").read_text().splitlines()] for i in (0, 1)]
    trained = [{tuple(ids) for step, all_ids in one for ids in all_ids if len(all_ids) == 4} for one in scored]
    assert all(trained) and trained[0] != trained[1]
    shards = {path.name for path in (folder / "two" / "checkpoints" / "2" / "state").glob("ocdbt.process_*")}
    assert shards == {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.fixture(scope="module")
def uninterrupted(folder, cli_env):
    """`uninterrupted(2)`: the workdir of a whole run by so many processes."""
    made = {}

    def run(count):
        if count not in made:
            name = f"whole{count}"
            done(job.launch(folder, job.environment(cli_env), count, name), folder, name)
            made[count] = name
        return made[count]

    return run


def losing(folder, cli_env, count, number, launched) -> tuple[str, float]:
    """(workdir, seconds until the last process ended) of a job of which one process is killed after step 3."""
    name = f"lost{count}_{number}_{launched}"
    env = job.environment(cli_env) | {"PAUSE": "1"}
    if launched:
        started = [job.launch(folder, env, count, name)]
    else:
        train = ["train", "--config", "config.py", "--workdir", name, f"--coordinator=localhost:{launcher.free_port()}"]
        command = [sys.executable, "-m", "grpo_jax.cli", *train, f"--num_processes={count}"]
        started = [
            job.started(folder, env | {"JAX_PROCESS_ID": str(i)}, [*command, f"--process_id={i}"], name)
            for i in range(count)
        ]
    job.wait_for_step(folder, name, 3, started[0])
    os.kill(job.pid_of(started[0].pid, number) if launched else started[number].pid, signal.SIGKILL)
    began = time.monotonic()
    for process in started:
        process.wait(120)
        assert process.returncode != 0
    return name, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize(("count", "number"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_a_lost_process_ends_the_job_within_a_minute_and_the_restart_goes_on_bitwise(
    folder, cli_env, uninterrupted, count, number, launched
):
    name, seconds = losing(folder, cli_env, count, number, launched)
    print(f"{count} processes, {number} killed, launched={launched}: ended after {seconds:.1f} s")
    assert seconds < 60
    said = (folder / f"{name}.err").read_text()
    if launched:
        assert f"process {number} (pid " in said and "was killed by SIGKILL" in said
    else:
        assert ("the leader" if number == 0 else "stopped sending heartbeats):\n") in said
        assert number == 0 or f"heartbeats):\n{number}\n" in said
    done(job.launch(folder, job.environment(cli_env), count, name), folder, name)
    whole = uninterrupted(count)
    assert job.lines(folder, name) == job.lines(folder, whole)
    assert job.samples(folder, name) == job.samples(folder, whole)
    assert checkpoint(folder / name, 6) == checkpoint(folder / whole, 6)


def checkpoint(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """The arrays of a checkpoint as bytes, read without a mesh."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        item = workdir.absolute() / "checkpoints" / str(step) / "state"
        shapes = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), reader.metadata(item).item_metadata.tree)
        return {k: np.asarray(v).tobytes() for k, v in reader.restore(item, shapes).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "flags"),
    [
        (1, 1, ()),
        (1, 4, ("--config.mesh.fsdp=2", "--config.mesh.data=2")),
        (4, 1, ()),
        (2, 2, ("--config.mesh.tensor=2", "--config.mesh.fsdp=2", "--config.mesh.data=1")),
    ],
)
def test_a_run_goes_on_on_another_number_of_devices_or_hosts(folder, cli_env, uninterrupted, count, devices, flags):
    """Step 5, the first after a checkpoint of two processes: the same tokens, loss and rewards to 1e-5."""
    whole, name = uninterrupted(2), f"moved{count}_{devices}"
    shutil.copytree(folder / whole, folder / name)
    for step in (5, 6):
        shutil.rmtree(folder / name / "checkpoints" / str(step), ignore_errors=True)
    done(job.launch(folder, job.environment(cli_env, devices), count, name, *flags), folder, name)
    assert "going on after step 4" in (folder / f"{name}.out").read_text()
    before, after = (next(x for x in job.lines(folder, run) if x["step"] == 5) for run in (whole, name))
    assert abs(before["loss"] - after["loss"]) < 1e-5
    for metric in ("reward/total", "length/mean", "solve_rate"):
        assert after[metric] == pytest.approx(before[metric], abs=1e-6)
    drawn = [
        [(x["draw"], x["prompt"], x["completion"]) for x in job.samples(folder, run) if x["step"] == 5]
        for run in (whole, name)
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all_at_the_same_step(folder, cli_env, uninterrupted):
    name = "stopped"
    process = job.launch(folder, job.environment(cli_env) | {"PAUSE": "1"}, 2, name)
    job.wait_for_step(folder, name, 2, process)
    os.kill(job.pid_of(process.pid, 1), signal.SIGTERM)
    said = done(process, folder, name)
    stopped = len(job.lines(folder, name))
    assert f"stopped by SIGTERM after step {stopped} of 6; saved" in said and 2 <= stopped < 6
    done(job.launch(folder, job.environment(cli_env), 2, name), folder, name)
    assert job.lines(folder, name) == job.lines(folder, uninterrupted(2))


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(folder, cli_env, tmp_path):
    """Each process has a folder of its own: the second one does not see what the first wrote."""
    port, command = launcher.free_port(), [sys.executable, "-m", "grpo_jax.cli", "train", "--config", "config.py"]
    started = []
    for i in (0, 1):
        place = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
        own = [*command, *place, "--workdir", str(tmp_path / f"own{i}")]
        started.append(job.started(folder, job.environment(cli_env), own, f"own{i}"))
    assert [process.wait(300) for process in started] == [2, 2]
    for i in (0, 1):
        assert "process 1 does not see what process 0 wrote" in (folder / f"own{i}.err").read_text()


# What else is to be trained by several processes: the other recipes.


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dpo", "reward-model train"])
def test_other_recipes_train_by_two_processes_as_by_one(folder, cli_env, command):
    """The files of a model trained by two processes, and its metrics, are those of one process with two devices."""
    name = command.split()[0]
    chat = [{"prompt": row["question"], "completion": row["answer"]} for row in job.ROWS]
    pairs = [{"prompt": r["question"], "chosen": r["answer"], "rejected": "no"} for r in job.ROWS]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (chat if name == "sft" else pairs)))
    section = name.replace("-", "_")
    flags = [f"--config.{section}.{k}={v}" for k, v in {"path": f"{name}.jsonl", "steps": 3, "max_length": 32}.items()]
    flags += [f"--config.{section}.batch_size=4", "--config.mesh.fsdp=2", "--config.mesh.data=1"]
    losses = []
    for count, devices in ((2, 1), (1, 2)):
        run = f"{name}{count}"
        command_line = [sys.executable, "-m", "grpo_jax.cli", "launch", f"--processes={count}", "--", *command.split()]
        given = [*command_line, "--config", "config.py", "--workdir", run, *flags]
        done(job.started(folder, job.environment(cli_env, devices), given, run), folder, run)
        losses.append([x[f"{section}/loss"] for x in job.lines(folder, run)])
        assert (folder / run / "model").is_dir()
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-6)


@pytest.mark.slow
def test_two_processes_evaluate_and_reject_as_one(folder, cli_env):
    """The completions, grades and scores of two processes are those of one with two devices, and one of them writes."""
    rows = [{"prompt": row["question"], "answer": row["answer"]} for row in job.ROWS[:7]]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", "model", "--set", "jsonl=problems.jsonl", "--max_new_tokens=4", "--batch_size=8"]
    kept, scores = [], []
    for count, devices in ((2, 1), (1, 2)):
        name, env = f"eval{count}", job.environment(cli_env, devices)
        command = [sys.executable, "-m", "grpo_jax.cli", "launch", f"--processes={count}", "--"]
        for samples in (2, 3):  # the second time only what is missing is drawn
            flags = ["eval", *given, f"--samples={samples}", "--workdir", name]
            said = done(job.started(folder, env, [*command, *flags], name), folder, name)
        assert said.count("samples.jsonl") == 2  # a line of each start, of the first process
        records = [json.loads(x) for x in (folder / name / "problems" / "samples.jsonl").read_text().splitlines()]
        kept.append(sorted(({**r, "seconds": 0} for r in records), key=lambda r: (r["problem"], r["sample"] or -1)))
        summary = json.loads((folder / name / "summary.json").read_text())["sets"]["problems"]
        scores.append({k: v for k, v in summary.items() if "second" not in k})
        process = job.started(
            folder, env, [*command, "reject", *given, "--workdir", f"reject{count}"], f"reject{count}"
        )
        process.wait(300)
        assert process.returncode == 2  # an untrained model is never right, which the first process alone finds out
        assert "completions is kept" in (folder / f"reject{count}.err").read_text()
        assert len((folder / f"reject{count}" / "problems" / "samples.jsonl").read_text().splitlines()) == 7 * 8
    assert kept[0] == kept[1] and len(kept[0]) == 7 * 4
    assert scores[0] == scores[1]
