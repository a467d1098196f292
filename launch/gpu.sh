#!/usr/bin/env bash
# Trains on the GPUs of this machine: makes a virtual environment, installs this checkout, runs `grpo-jax train`.
# The same command again goes on where the run stopped.
set -euo pipefail
me="gpu.sh"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/gpu.sh [flags] [-- train flags]

  --config CONFIG    named config, or path of one (default: arithmetic)
  --workdir DIR      folder of the run (default: that of grpo-jax train, runs/CONFIG here)
  --processes N      a process for each of N GPUs, watched by grpo-jax launch (default: one process with all GPUs)
  --restarts N       with --processes: times to start all anew when one is lost (default: 0)
  --venv DIR         virtual environment, made when absent (default: .venv-gpu in the checkout)
  --python PYTHON    what it is made with, 3.11 or newer (default: python3)
  --cuda 12|13       major version of CUDA that the NVIDIA driver can run (default: 12)
  --dry_run          print the commands instead of running them
  --help             this text

What follows -- goes to `grpo-jax train`, for instance -- --config.train.steps=500
END
}

checkout="$(dirname "$here")"
config="arithmetic" workdir="" processes="" restarts="" venv="$checkout/.venv-gpu" python="python3" cuda="12" dry_run=""
parse_flags "" "" "config workdir processes restarts venv python cuda" "$@"
[[ "$cuda" == 12 || "$cuda" == 13 ]] || fail "--cuda $cuda is neither 12 nor 13"
if [[ -n "$processes" ]]; then number processes; fi
if [[ -n "$restarts" ]]; then
  number restarts
  [[ -n "$processes" ]] || fail "--restarts needs --processes"
fi

install() {
  if [[ -n "$dry_run" ]]; then echo "# only when $venv does not exist:"; fi
  if [[ -n "$dry_run" || ! -x "$venv/bin/python" ]]; then run "$python" -m venv "$venv"; fi
  run "$venv/bin/python" -m pip install --quiet "${checkout}[cuda$cuda]"
}

command=("$venv/bin/grpo-jax")
if [[ -n "$processes" ]]; then
  command+=(launch --processes "$processes")
  if [[ -n "$restarts" ]]; then command+=(--restarts "$restarts"); fi
  command+=(--)
fi
command+=(train --config "$config")
if [[ -n "$workdir" ]]; then command+=(--workdir "$workdir"); fi
command+=(${train_flags[@]+"${train_flags[@]}"})

install
show "${command[@]}"
if [[ -z "$dry_run" ]]; then exec "${command[@]}"; fi
