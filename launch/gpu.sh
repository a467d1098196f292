#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process: makes a virtual environment, installs this checkout, runs `grpo-jax train`.
# The same command again goes on where the run stopped.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gpu.sh [flags] [-- train flags]

  --config CONFIG   named config, or path of one (default: arithmetic)
  --workdir DIR     folder of the run (default: that of grpo-jax train, runs/CONFIG here)
  --venv DIR        virtual environment, made when absent (default: .venv-gpu in the checkout)
  --python PYTHON   what it is made with, 3.11 or newer (default: python3)
  --cuda 12|13      major version of CUDA that the NVIDIA driver can run (default: 12)
  --dry_run         print the commands instead of running them
  --help            this text

What follows -- goes to `grpo-jax train`, for instance -- --config.train.steps=500
END
}

fail() {
  echo "gpu.sh: $1 (see --help)" >&2
  exit 2
}

# Prints a command so that it can be pasted.
show() {
  local word line=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
      word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
    line+="$word "
  done
  echo "${line% }"
}

run() {
  show "$@"
  if [[ -z "$dry_run" ]]; then "$@"; fi
}

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
config="arithmetic" workdir="" venv="$checkout/.venv-gpu" python="python3" cuda="12" dry_run=""
train_flags=()
while [[ $# -gt 0 ]]; do
  flag="${1%%=*}"
  case "$flag" in
    --dry_run)
      [[ "$1" == "$flag" ]] || fail "$flag takes no value"
      dry_run=1
      shift
      ;;
    --config | --workdir | --venv | --python | --cuda)
      if [[ "$1" == *=* ]]; then
        value="${1#*=}"
        shift
      else
        [[ $# -ge 2 ]] || fail "$flag needs a value"
        value="$2"
        shift 2
      fi
      [[ -n "$value" && "$value" != --* ]] || fail "$flag needs a value"
      printf -v "${flag#--}" '%s' "$value"
      ;;
    --help) usage && exit 0 ;;
    --)
      shift
      train_flags=("$@")
      break
      ;;
    *) fail "unknown flag $1" ;;
  esac
done
[[ "$cuda" == 12 || "$cuda" == 13 ]] || fail "--cuda $cuda is neither 12 nor 13"

install() {
  if [[ -n "$dry_run" ]]; then echo "# only when $venv does not exist:"; fi
  if [[ -n "$dry_run" || ! -x "$venv/bin/python" ]]; then run "$python" -m venv "$venv"; fi
  run "$venv/bin/python" -m pip install --quiet "${checkout}[cuda$cuda]"
}

command=("$venv/bin/grpo-jax" train --config "$config")
if [[ -n "$workdir" ]]; then command+=(--workdir "$workdir"); fi
command+=(${train_flags[@]+"${train_flags[@]}"})

install
show "${command[@]}"
if [[ -z "$dry_run" ]]; then exec "${command[@]}"; fi
