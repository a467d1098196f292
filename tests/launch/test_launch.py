"""The launch scripts: what a dry run prints, what they refuse, what they do against a stand-in for the cloud."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

EXPECTED = pathlib.Path(__file__).parent / "expected"
TPU = ["--name", "run-1", "--zone", "us-west4-a", "--type", "v5litepod-16", "--workdir", "gs://my-bucket/runs/first"]


@pytest.fixture
def launch(repo_root, tmp_path):
    """`launch("gpu.sh", "--dry_run")`: runs a script with stand-ins in `tmp_path/bin` found first."""
    (tmp_path / "bin").mkdir()

    def run(script, *flags, **env):
        return subprocess.run(
            [str(repo_root / "launch" / script), *map(str, flags)],
            env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": "/tmp", "HOME": str(tmp_path), **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("file", "name", "flags"),
    [
        ("tpu_vm_default.txt", "tpu_vm.sh", [*TPU, "--dry_run"]),
        (
            "tpu_vm_all.txt",
            "tpu_vm.sh",
            ["--name=r", "--zone=us-east5-b", "--type=v6e-8", "--workdir=gs://b1/a folder/x/", "--config", "gsm8k"]
            + ["--version=custom-image", "--project=my-project", "--spot", "--dry_run"]
            + ["--", "--config.train.steps=500", "--config.text.system_prompt=It's $HOME"],
        ),
        ("gpu_default.txt", "gpu.sh", ["--dry_run"]),
        (
            "gpu_processes.txt",
            "gpu.sh",
            ["--config=gsm8k", "--workdir", "my runs/a", "--venv=/opt/venv", "--python=python3.12", "--cuda=13"]
            + ["--processes=2", "--port=9000", "--dry_run", "--", "--config.mesh.fsdp=2"],
        ),
    ],
)
def test_a_dry_run_prints_the_commands(launch, repo_root, file, name, flags):
    """Stored output; UPDATE_EXPECTED=1 writes it anew."""
    done = launch(name, "--dry_run", *flags)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace(str(repo_root), "CHECKOUT")
    if os.environ.get("UPDATE_EXPECTED"):
        (EXPECTED / file).write_text(printed)
    assert printed == (EXPECTED / file).read_text()


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("tpu_vm.sh", [*TPU, "--nmae=x"], "unknown flag --nmae=x"),
        ("tpu_vm.sh", [*TPU, "extra"], "unknown flag extra"),
        ("tpu_vm.sh", TPU[2:], "--name is missing"),
        ("tpu_vm.sh", TPU[:2] + TPU[4:], "--zone is missing"),
        ("tpu_vm.sh", TPU[:4] + TPU[6:], "--type is missing"),
        ("tpu_vm.sh", TPU[:6], "--workdir is missing"),
        ("tpu_vm.sh", ["--name"], "--name needs a value"),
        ("tpu_vm.sh", ["--name", "--zone", "z"], "--name needs a value"),
        ("tpu_vm.sh", [*TPU, "--spot=yes"], "--spot takes no value"),
        ("tpu_vm.sh", [*TPU, "--workdir", "runs/a"], "--workdir runs/a is not gs://BUCKET/FOLDER"),
        ("tpu_vm.sh", [*TPU, "--type", "v9-8"], "--type v9-8: its runtime version is not known here, give --version"),
        ("gpu.sh", ["--confg=x"], "unknown flag --confg=x"),
        ("gpu.sh", ["--workdir"], "--workdir needs a value"),
        ("gpu.sh", ["--cuda=11"], "--cuda 11 is neither 12 nor 13"),
        ("gpu.sh", ["--processes=two"], "--processes two is not a positive number"),
        ("gpu.sh", ["--port=0"], "--port 0 is not a positive number"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(launch, name, flags, says):
    done = launch(name, "--dry_run", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: {says} (see --help)\n"


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gpu.sh"])
def test_help_lists_every_flag(launch, repo_root, name):
    done = launch(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: launch/{name}")
    cases = [
        word
        for line in (repo_root / "launch" / name).read_text().splitlines()
        if line.strip().startswith("--") and line.strip().endswith(")")
        for word in line.strip(" )").split(" | ")
        if word != "--"
    ]
    assert len(cases) >= 7
    assert [flag for flag in cases if f"\n  {flag}" not in done.stdout] == []


CLOUD = """
echo "$*" | tr '\\n' ' ' >>"$LOG"; echo >>"$LOG"
case "$*" in
  *"queued-resources describe"*) cat "$STATE" ;;
  *"queued-resources create"*) echo ACTIVE >"$STATE" ;;
  *"queued-resources delete"*) : >"$STATE" ;;
esac
"""


@pytest.mark.parametrize(
    ("state", "calls"),
    [
        ("", ["describe", "create", "describe", "scp", "ssh", "ssh", "ssh"]),
        ("ACTIVE", ["describe", "describe", "scp", "ssh", "ssh", "ssh"]),
        ("SUSPENDED", ["describe", "delete", "create", "describe", "scp", "ssh", "ssh", "ssh"]),
        ("FAILED", ["describe", "delete", "create", "describe", "scp", "ssh", "ssh", "ssh"]),
    ],
)
def test_the_same_command_takes_up_whatever_state_the_tpu_is_in(launch, tmp_path, state, calls):
    script(tmp_path / "bin" / "gcloud", CLOUD)
    script(tmp_path / "bin" / "git", "exit 0\n")
    (tmp_path / "state").write_text(state)
    done = launch("tpu_vm.sh", *TPU, "--spot", LOG=f"{tmp_path}/log", STATE=f"{tmp_path}/state")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[3] for line in lines] == calls
    assert "grpo-jax" in lines[-1] and "train --config arithmetic" in lines[-1]
    assert all("--worker=all" in line for line in lines if line.split()[3] in ("scp", "ssh"))
    assert [line.endswith("--spot ") for line in lines if "create" in line.split()] == ["create" in calls] * (
        "create" in calls
    )


def test_a_tpu_on_its_way_down_is_left_alone(launch, tmp_path):
    script(tmp_path / "bin" / "gcloud", CLOUD)
    (tmp_path / "state").write_text("SUSPENDING")
    done = launch("tpu_vm.sh", *TPU, LOG=f"{tmp_path}/log", STATE=f"{tmp_path}/state")
    assert done.returncode == 1
    assert done.stderr == "tpu_vm.sh: run-1 is being taken down; run this again in a minute\n"
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_failing_install_stops_before_training(launch, tmp_path):
    script(tmp_path / "bin" / "gcloud", CLOUD + 'case "$*" in *"uv"*) exit 7 ;; esac\n')
    script(tmp_path / "bin" / "git", "exit 0\n")
    (tmp_path / "state").write_text("ACTIVE")
    done = launch("tpu_vm.sh", *TPU, LOG=f"{tmp_path}/log", STATE=f"{tmp_path}/state")
    assert done.returncode == 7
    assert "train --config" not in (tmp_path / "log").read_text()


def test_the_hosts_shell_reads_the_train_flags_as_given(launch, tmp_path):
    """The command that ssh hands over is run here: quoting must survive two shells."""
    script(tmp_path / "bin" / "gcloud", 'case "$*" in *describe*) echo ACTIVE ;; *train*) eval "${@: -1}" ;; esac\n')
    script(tmp_path / "bin" / "git", "exit 0\n")
    (tmp_path / "grpo_jax").mkdir()
    script(tmp_path / "grpo_jax_venv" / "bin" / "grpo-jax", 'printf "[%s]\\n" "$@"\n')
    flags = ['--config.text.system_prompt=It\'s $HOME; "rm"', "--config.data.path=a b"]
    done = launch("tpu_vm.sh", *TPU, "--", *flags)
    assert done.returncode == 0, done.stderr
    want = ["train", "--config", "arithmetic", "--workdir", f"{tmp_path}/gcs/my-bucket/runs/first", *flags]
    assert done.stdout.splitlines()[-len(want) :] == [f"[{word}]" for word in want]


def fake_venv(folder, grpo_jax):
    script(folder / "bin" / "python", f'echo "python $*" >>"{folder}/log"\n')
    script(folder / "bin" / "grpo-jax", grpo_jax)
    return folder


def test_gpu_installs_into_the_environment_that_is_there(launch, tmp_path, repo_root):
    venv = fake_venv(tmp_path / "venv", 'printf "[%s]" "$@"\n')
    done = launch("gpu.sh", "--venv", venv, "--workdir", "a b", "--", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[train][--config][arithmetic][--workdir][a b][--config.seed=3]")
    assert (venv / "log").read_text() == f"python -m pip install --quiet {repo_root}[cuda12]\n"


def test_gpu_makes_the_environment_when_absent(launch, tmp_path):
    maker = tmp_path / "maker"
    fake_venv(tmp_path / "template", "echo trained\n")
    script(maker, f'[[ "$1 $2" == "-m venv" ]] && cp -r "{tmp_path}/template" "$3"\n')
    done = launch("gpu.sh", "--venv", tmp_path / "new", "--python", maker)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("trained\n")


def test_gpu_processes_know_their_place(launch, tmp_path):
    say = 'echo "$CUDA_VISIBLE_DEVICES $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" >>"$OUT"\n'
    done = launch("gpu.sh", "--venv", fake_venv(tmp_path / "venv", say), "--processes=3", OUT=f"{tmp_path}/out")
    assert done.returncode == 0, done.stderr
    want = [f"{i} 127.0.0.1:8476 3 {i}" for i in range(3)]
    assert sorted((tmp_path / "out").read_text().splitlines()) == want


STOPPABLE = """
trap 'echo "$JAX_PROCESS_ID saved" >>"$OUT"; exit 0' TERM
echo "$JAX_PROCESS_ID started" >>"$OUT"
for _ in $(seq 300); do sleep 0.1; done
exit 9
"""


def test_gpu_when_one_process_fails_the_others_are_told_to_stop(launch, tmp_path):
    # It fails once the other has set its trap.
    wait = 'until grep -q "0 started" "$OUT"; do sleep 0.05; done'
    fails = f'if [[ "$JAX_PROCESS_ID" == 1 ]]; then {wait}; exit 5; fi\n'
    venv = fake_venv(tmp_path / "venv", fails + STOPPABLE)
    (tmp_path / "out").touch()
    done = launch("gpu.sh", "--venv", venv, "--processes=2", OUT=f"{tmp_path}/out")
    assert done.returncode == 5
    assert (tmp_path / "out").read_text().splitlines() == ["0 started", "0 saved"]


def test_gpu_passes_a_stop_on_and_waits_for_the_saving(repo_root, tmp_path):
    venv, out = fake_venv(tmp_path / "venv", STOPPABLE), tmp_path / "out"
    command = [str(repo_root / "launch" / "gpu.sh"), "--venv", str(venv), "--processes=2"]
    started = subprocess.Popen(command, env={**os.environ, "OUT": str(out)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not out.exists() or out.read_text().count("started") < 2:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=20) == 0
    assert sorted(out.read_text().splitlines()) == ["0 saved", "0 started", "1 saved", "1 started"]
