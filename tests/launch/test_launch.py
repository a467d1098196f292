"""The launch scripts: what a dry run prints, what they refuse, what they do against a stand-in for the cloud."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

EXPECTED = pathlib.Path(__file__).parent / "expected"
SCRIPTS = ("tpu_vm.sh", "gpu.sh", "gke.sh", "slurm.sh", "image.sh")
GKE = [
    "--name",
    "run-1",
    "--chip",
    "v5e",
    "--topology",
    "4x4",
    "--image",
    "repo/grpo-jax:1",
    "--workdir",
    "gs://b1/runs/a",
]
POOLS = ["--cluster", "c1", "--location", "us-east5", "--zone", "us-east5-b", "--project", "my-project"]
TPU = ["--name", "run-1", "--zone", "us-west4-a", "--type", "v5litepod-8", "--workdir", "gs://my-bucket/runs/first"]


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
        ("tpu_vm_slices.txt", "tpu_vm.sh", ["run", *TPU, "--type", "v6e-16", "--slices=2", "--spot", "--detach"]),
        ("tpu_vm_now.txt", "tpu_vm.sh", ["run", *TPU, "--now", "--spot"]),
        ("tpu_vm_logs.txt", "tpu_vm.sh", ["logs", *TPU[:4], "--project=p1"]),
        ("tpu_vm_status.txt", "tpu_vm.sh", ["status", *TPU[:4]]),
        ("tpu_vm_delete.txt", "tpu_vm.sh", ["delete", *TPU[:4]]),
        ("gke_run.txt", "gke.sh", GKE),
        (
            "gke_slices.txt",
            "gke.sh",
            ["run", *GKE, "--slices=3", "--spot", "--account=writer", "--config=gsm8k", "--restarts=5", "--"]
            + ["--config.train.steps=500", '--config.text.system_prompt=It\'s "$HOME" \\ here'],
        ),
        ("gke_cluster.txt", "gke.sh", ["cluster", "--name=run-1", *POOLS]),
        ("gke_pools.txt", "gke.sh", ["pools", *GKE[:6], *POOLS, "--slices=2", "--spot"]),
        ("gke_one_host.txt", "gke.sh", ["pools", "--name=r", "--chip=v6e", "--topology=2x4", *POOLS]),
        ("gke_logs.txt", "gke.sh", ["logs", "--name=run-1"]),
        ("gke_status.txt", "gke.sh", ["status", "--name=run-1"]),
        ("gke_delete.txt", "gke.sh", ["delete", "--name=run-1"]),
        ("gke_delete_pools.txt", "gke.sh", ["delete_pools", "--name=run-1", *POOLS, "--slices=2"]),
        ("slurm_default.txt", "slurm.sh", ["--name=run-1", "--workdir=/scratch/run 1"]),
        (
            "slurm_all.txt",
            "slurm.sh",
            ["--name=r", "--workdir=/s/r", "--nodes=4", "--gpus=4", "--cpus=12", "--time=02:00:00", "--partition=h100"]
            + ["--account=lab", "--config=gsm8k", "--venv=/opt/venv", "--", "--config.mesh.fsdp=16"],
        ),
        ("image_tpu.txt", "image.sh", ["--kind=tpu", "--image=us-docker.pkg.dev/p/r/grpo-jax:1", "--push"]),
        ("image_cuda.txt", "image.sh", ["--kind=cuda", "--image=grpo-jax:cuda", "--cuda=13"]),
        ("image_cpu.txt", "image.sh", ["--kind=cpu", "--image=grpo-jax:cpu"]),
        ("gpu_default.txt", "gpu.sh", ["--dry_run"]),
        ("gpu_processes.txt", "gpu.sh", ["--processes=8", "--restarts=3", "--", "--config.mesh.fsdp=8"]),
        (
            "gpu_all.txt",
            "gpu.sh",
            ["--config=gsm8k", "--workdir", "my runs/a", "--venv=/opt/venv", "--python=python3.12", "--cuda=13"]
            + ["--dry_run", "--", "--config.mesh.fsdp=2"],
        ),
    ],
)
def test_a_dry_run_prints_the_commands(launch, repo_root, file, name, flags):
    """Stored output; UPDATE_EXPECTED=1 writes it anew."""
    action, flags = (flags[:1], flags[1:]) if flags[:1] and flags[0][0] != "-" else ([], flags)
    done = launch(name, *action, "--dry_run", *flags)
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
        ("tpu_vm.sh", [*TPU, "--type", "v5p"], "--type v5p does not end in a size, such as -8"),
        ("tpu_vm.sh", [*TPU, "--now", "--slices=2"], "--now makes one slice: leave --slices or --now out"),
        ("tpu_vm.sh", [*TPU, "--tries=0"], "--tries 0 is not a number from 1 on"),
        ("gpu.sh", ["--restarts=1"], "--restarts needs --processes"),
        ("gpu.sh", ["--processes=all"], "--processes all is not a number from 1 on"),
        ("gke.sh", GKE[2:], "--name is missing"),
        ("gke.sh", ["--name=Big"], "--name Big: small letters, digits and -, at most 32"),
        ("gke.sh", GKE[:4] + GKE[6:], "--topology is missing"),
        ("gke.sh", [*GKE, "--topology=16"], "--topology 16 is not like 4x4 or 2x2x4"),
        ("gke.sh", [*GKE, "--chip=v3"], "--chip v3 is none of v4, v5e, v5p, v6e"),
        ("gke.sh", [*GKE, "--chips_per_host=3"], "--chips_per_host 3 does not divide the 16 of --topology 4x4"),
        ("gke.sh", [*GKE, "--workdir=runs"], "--workdir runs is not gs://BUCKET/FOLDER"),
        ("slurm.sh", ["--name=a"], "--workdir is missing"),
        ("slurm.sh", ["--name=a b", "--workdir=/a"], "--name a b: letters, digits, dots, - and _"),
        ("slurm.sh", ["--name=a", "--workdir=/a", "--gpus=0"], "--gpus 0 is not a number from 1 on"),
        ("image.sh", ["--kind=rocm", "--image=a"], "--kind rocm is none of tpu, cuda, cpu"),
        ("image.sh", ["--kind=cpu"], "--image is missing"),
        ("gpu.sh", ["--confg=x"], "unknown flag --confg=x"),
        ("gpu.sh", ["--workdir"], "--workdir needs a value"),
        ("gpu.sh", ["--cuda=11"], "--cuda 11 is neither 12 nor 13"),
        ("gpu.sh", ["--dry_run=1"], "--dry_run takes no value"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(launch, name, flags, says):
    done = launch(name, "--dry_run", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: {says} (see --help)\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_flag_and_action(launch, repo_root, name):
    done = launch(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: launch/{name}")
    text = (repo_root / "launch" / name).read_text().replace("\\\n", "")
    actions, switches, flags = re.search(r'^parse_flags "(.*?)" "(.*?)" +"(.*?)"', text, re.MULTILINE).groups()
    assert len(flags.split()) >= 3
    assert [f for f in f"{switches} {flags} dry_run help".split() if f"\n  --{f} " not in done.stdout] == []
    assert [a for a in actions.split() if f"\n  {a} " not in done.stdout] == []


def test_the_scripts_are_clean_by_shellcheck(repo_root):
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    if tool is None:
        pytest.skip("shellcheck is not installed: it comes with grpo-jax[dev]")
    found = subprocess.run(
        [tool, "-x", *(f"launch/{name}" for name in (*SCRIPTS, "common.sh"))],
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_the_images_hold_what_the_package_needs(repo_root):
    """Each file that a Dockerfile copies is there and is not left out by the ignore file beside it."""
    for kind, extra in (("cpu", "/src"), ("tpu", '"/src[tpu]"'), ("cuda", '"/src[cuda${CUDA}]"')):
        text = (repo_root / "launch" / "docker" / f"{kind}.Dockerfile").read_text()
        kept = (repo_root / "launch" / "docker" / f"{kind}.Dockerfile.dockerignore").read_text().splitlines()
        copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
        assert {"pyproject.toml", "grpo_jax", "configs"} <= set(copied)
        for path in copied:
            assert (repo_root / path).exists() and f"!{path}" in kept
        assert f"RUN pip install --no-cache-dir {extra}\n" in text
        assert 'ENTRYPOINT ["grpo-jax"]' in text


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


PREEMPTED = """
case "$*" in
  *train*) if [[ ! -e "$STATE.once" ]]; then : >"$STATE.once"; echo SUSPENDED >"$STATE"; exit 255; fi ;;
esac
"""


@pytest.mark.parametrize(("tries", "code", "trained"), [("1", 255, 1), ("3", 0, 2)])
def test_a_preempted_tpu_is_asked_for_anew(launch, tmp_path, tries, code, trained):
    script(tmp_path / "bin" / "gcloud", CLOUD + PREEMPTED)
    script(tmp_path / "bin" / "git", "exit 0\n")
    (tmp_path / "state").write_text("ACTIVE")
    done = launch("tpu_vm.sh", *TPU, "--spot", "--tries", tries, LOG=f"{tmp_path}/log", STATE=f"{tmp_path}/state")
    assert done.returncode == code, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("train --config" in line for line in lines) == trained
    assert sum(" create " in f" {line} " for line in lines) == trained - 1


def test_a_run_that_fails_on_a_tpu_that_is_there_is_not_tried_again(launch, tmp_path):
    script(tmp_path / "bin" / "gcloud", CLOUD + 'case "$*" in *"train --config"*) exit 2 ;; esac\n')
    script(tmp_path / "bin" / "git", "exit 0\n")
    (tmp_path / "state").write_text("ACTIVE")
    done = launch("tpu_vm.sh", *TPU, "--tries=3", LOG=f"{tmp_path}/log", STATE=f"{tmp_path}/state")
    assert done.returncode == 2
    assert (tmp_path / "log").read_text().count("train --config") == 1


def test_a_second_start_does_not_train_beside_the_first(launch, tmp_path):
    """The command of a host is run here twice: the lock that the first one holds turns the second one away."""
    script(tmp_path / "bin" / "gcloud", 'case "$*" in *describe*) echo ACTIVE ;; *train*) eval "${@: -1}" ;; esac\n')
    (tmp_path / "grpo_jax").mkdir()
    log, end = tmp_path / "grpo_jax.log", tmp_path / "end"
    text = f"echo training; until [[ -e {end} ]]; do sleep 0.1; done\n"
    script(tmp_path / "grpo_jax_venv" / "bin" / "grpo-jax", text)
    try:
        started = launch("tpu_vm.sh", "train", *TPU, "--detach")
        assert started.returncode == 0
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()):  # it has the lock once it trains
            assert time.monotonic() < deadline
            time.sleep(0.02)
        again = launch("tpu_vm.sh", "train", *TPU)
    finally:
        end.touch()
    assert again.returncode == 75
    assert log.read_text() == "training\n"


def test_slurm_submits_what_it_prints(launch, tmp_path):
    script(tmp_path / "bin" / "sbatch", f"cat >{tmp_path}/submitted\n")
    done = launch("slurm.sh", "--name=r", "--workdir=/scratch/r")
    assert done.returncode == 0
    submitted = (tmp_path / "submitted").read_text()
    assert done.stdout == f"{submitted}sbatch\n" and submitted.startswith("#!/usr/bin/env bash\n#SBATCH")


@pytest.mark.parametrize(("code", "finished", "requeued"), [(0, False, True), (0, True, False), (1, False, False)])
def test_a_slurm_job_that_was_stopped_is_queued_again(launch, tmp_path, code, finished, requeued):
    """The batch script is run here, with stand-ins for srun and scontrol."""
    script(tmp_path / "bin" / "srun", f'echo "$@" >"{tmp_path}/ran"; exit {code}\n')
    script(tmp_path / "bin" / "scontrol", f'echo "$@" >"{tmp_path}/requeued"\n')
    script(tmp_path / "bin" / "sbatch", f"cat >{tmp_path}/job.sh\n")
    workdir = tmp_path / "work dir"
    workdir.mkdir()
    if finished:
        (workdir / "summary.json").touch()
    launch("slurm.sh", "--name=r", f"--workdir={workdir}", "--venv=/v")
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    ran = subprocess.run(["bash", str(tmp_path / "job.sh")], env=env, timeout=60)
    assert ran.returncode == code
    assert (tmp_path / "ran").read_text() == (
        f"--kill-on-bad-exit=1 /v/bin/grpo-jax train --config arithmetic --workdir {workdir}\n"
    )
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 12\n"


def test_gke_applies_what_it_renders_and_makes_what_is_not_there(launch, tmp_path):
    script(tmp_path / "bin" / "kubectl", f'echo "$*" >>"{tmp_path}/log"; cat >{tmp_path}/manifest\n')
    rendered = launch("gke.sh", "render", *GKE)
    applied = launch("gke.sh", *GKE)
    assert applied.returncode == rendered.returncode == 0, applied.stderr
    assert (tmp_path / "manifest").read_text() == rendered.stdout
    assert applied.stdout == f"kubectl apply --filename -\n{rendered.stdout}"
    script(tmp_path / "bin" / "gcloud", f'echo "$*" >>"{tmp_path}/calls"; [[ "$*" != *"describe run-1-1"* ]]\n')
    made = launch("gke.sh", "pools", *GKE[:6], *POOLS, "--slices=3")
    assert made.returncode == 0, made.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line.split()[3] for line in calls if " create " in line] == ["run-1-1"]


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


def test_gpu_starts_a_process_for_each_gpu(launch, tmp_path):
    venv = fake_venv(tmp_path / "venv", 'printf "[%s]" "$@"\n')
    done = launch("gpu.sh", "--venv", venv, "--processes=4", "--", "--config.seed=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[launch][--processes][4][--][train][--config][arithmetic][--config.seed=3]")
