"""The launch scripts: what a dry run prints, what they refuse, what they do against a stand-in for the cloud."""

import os
import pathlib
import subprocess

import pytest

EXPECTED = pathlib.Path(__file__).parent / "expected"
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
        ("gpu_default.txt", "gpu.sh", ["--dry_run"]),
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
        ("tpu_vm.sh", [*TPU, "--type", "v5p"], "--type v5p does not end in a size, such as -8"),
        (
            "tpu_vm.sh",
            [*TPU, "--type=v5p-16"],
            "--type v5p-16 has several hosts, training runs on one so far: take -8 or less",
        ),
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
    assert len(cases) >= 6
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
