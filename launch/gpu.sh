#!/usr/bin/env bash
# Trains on the GPUs of this machine: makes a virtual environment, installs this checkout, runs `grpo-jax train`.
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
  --processes N     processes, each with one GPU, joined by jax.distributed (default: 1 process with all GPUs)
  --port PORT       where those processes meet (default: 8476)
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
config="arithmetic" workdir="" venv="$checkout/.venv-gpu" python="python3" cuda="12" processes="1" port="8476" dry_run=""
train_flags=()
while [[ $# -gt 0 ]]; do
  flag="${1%%=*}"
  case "$flag" in
    --dry_run)
      [[ "$1" == "$flag" ]] || fail "$flag takes no value"
      dry_run=1
      shift
      ;;
    --config | --workdir | --venv | --python | --cuda | --processes | --port)
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
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--processes $processes is not a positive number"
[[ "$port" =~ ^[1-9][0-9]*$ ]] || fail "--port $port is not a positive number"

install() {
  if [[ -n "$dry_run" ]]; then echo "# only when $venv does not exist:"; fi
  if [[ -n "$dry_run" || ! -x "$venv/bin/python" ]]; then run "$python" -m venv "$venv"; fi
  run "$venv/bin/python" -m pip install --quiet "${checkout}[cuda$cuda]"
}

start_processes() {
  local i
  for ((i = 0; i < processes; i++)); do
    local environment=(
      "CUDA_VISIBLE_DEVICES=$i" "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i"
    )
    echo "$(show env "${environment[@]}" "${command[@]}") &"
    if [[ -z "$dry_run" ]]; then
      env "${environment[@]}" "${command[@]}" &
      pids+=("$!")
    fi
  done
}

# When one process fails, or this script is told to stop, all are told to stop (and save). The exit status is that of
# the first that failed.
wait_for_processes() {
  local left="${#pids[@]}" status=0 code
  trap 'told_to_stop=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
  while [[ "$left" -gt 0 ]]; do
    code=0 told_to_stop=""
    wait -n || code=$?
    if [[ -n "$told_to_stop" ]]; then continue; fi # the signal ended `wait`, no process did
    left=$((left - 1))
    if [[ "$code" -ne 0 && "$status" -eq 0 ]]; then
      status="$code"
      kill -TERM "${pids[@]}" 2>/dev/null || true
    fi
  done
  exit "$status"
}

command=("$venv/bin/grpo-jax" train --config "$config")
if [[ -n "$workdir" ]]; then command+=(--workdir "$workdir"); fi
command+=(${train_flags[@]+"${train_flags[@]}"})

install
if [[ "$processes" -gt 1 ]]; then
  pids=()
  start_processes
  wait_for_processes
else
  show "${command[@]}"
  if [[ -z "$dry_run" ]]; then exec "${command[@]}"; fi
fi
