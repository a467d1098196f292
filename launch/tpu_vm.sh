#!/usr/bin/env bash
# Trains on a Cloud TPU: asks for the TPU, installs this checkout on each of its hosts, runs `grpo-jax train`.
# Run from a machine with gcloud. The same command again goes on where the run stopped, preempted or not.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE --workdir gs://BUCKET/FOLDER [flags] [-- train flags]

  --name NAME      name of the queued resource and of its TPU VM
  --zone ZONE      such as us-west4-a
  --type TYPE      accelerator type of one host, such as v5litepod-8, v5p-8, v6e-4 (at most -8)
  --workdir URL    gs://BUCKET/FOLDER of the run; a VM's own disk is lost with the VM. The bucket is mounted on
                   every host; one with a hierarchical namespace renames folders at once, as checkpoints want
  --config CONFIG  named config, or path of one inside the checkout (default: arithmetic)
  --version IMAGE  runtime version (default: the one that goes with TYPE)
  --project ID     Google Cloud project (default: gcloud's own)
  --spot           spot capacity: cheaper, may be preempted
  --dry_run        print the commands instead of running them
  --help           this text

What follows -- goes to `grpo-jax train`, for instance -- --config.train.steps=500
The committed state of the checkout is what is sent. Deleting the TPU is left to you:
  gcloud compute tpus queued-resources delete NAME --zone ZONE --force
END
}

fail() {
  echo "tpu_vm.sh: $1 (see --help)" >&2
  exit 2
}

# Prints a command so that it can be pasted, then runs it unless this is a dry run.
run() {
  local word line=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
      word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
    line+="$word "
  done
  echo "${line% }"
  if [[ -z "$dry_run" ]]; then "$@"; fi
}

name="" zone="" type="" version="" project="" config="arithmetic" workdir="" spot="" dry_run=""
train_flags=()
while [[ $# -gt 0 ]]; do
  flag="${1%%=*}"
  case "$flag" in
    --spot | --dry_run)
      [[ "$1" == "$flag" ]] || fail "$flag takes no value"
      printf -v "${flag#--}" 1
      shift
      ;;
    --name | --zone | --type | --version | --project | --config | --workdir)
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
for flag in name zone type workdir; do
  [[ -n "${!flag}" ]] || fail "--$flag is missing"
done
[[ "$workdir" =~ ^gs://([a-z0-9][a-z0-9._-]+)/(.+)$ ]] || fail "--workdir $workdir is not gs://BUCKET/FOLDER"
bucket="${BASH_REMATCH[1]}" folder="${BASH_REMATCH[2]%/}"
[[ "$type" =~ -([0-9]+)$ ]] || fail "--type $type does not end in a size, such as -8"
# Every generation has hosts of up to 8 cores or chips. `grpo-jax train` does not join hosts yet: each would train
# alone, into one folder.
[[ "${BASH_REMATCH[1]}" -le 8 ]] || fail "--type $type has several hosts, training runs on one so far: take -8 or less"

if [[ -z "$version" ]]; then
  case "$type" in
    v5litepod-*) version="v2-alpha-tpuv5-lite" ;;
    v5p-*) version="v2-alpha-tpuv5" ;;
    v6e-*) version="v2-alpha-tpuv6e" ;;
    v2-* | v3-* | v4-*) version="tpu-ubuntu2204-base" ;;
    *) fail "--type $type: its runtime version is not known here, give --version" ;;
  esac
fi

place=(--zone "$zone")
if [[ -n "$project" ]]; then place+=(--project "$project"); fi
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

state() {
  "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)' 2>/dev/null || true
}

create() {
  local more=()
  if [[ -n "$spot" ]]; then more=(--spot); fi
  run "${queue[@]}" create "$name" --node-id "$name" "${place[@]}" \
    --accelerator-type "$type" --runtime-version "$version" ${more[@]+"${more[@]}"}
}

remove() {
  run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
}

# A queued resource whose VM was preempted stays, SUSPENDED, and never comes back by itself.
ask_for_tpu() {
  if [[ -n "$dry_run" ]]; then
    echo "# only when $name exists and is SUSPENDED (preempted) or FAILED:"
    remove
    echo "# only when $name does not exist:"
    create
    return
  fi
  case "$(state)" in
    "") create ;;
    SUSPENDED | FAILED) remove && create ;;
    SUSPENDING | DELETING)
      echo "tpu_vm.sh: $name is being taken down; run this again in a minute" >&2
      exit 1
      ;;
  esac
}

wait_for_tpu() {
  local now
  if [[ -n "$dry_run" ]]; then
    echo "# every 30 seconds until it says ACTIVE:"
    run "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)'
    return
  fi
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE) return ;;
      SUSPENDED | FAILED | SUSPENDING)
        echo "tpu_vm.sh: $name is $now; run this again to ask anew" >&2
        exit 1
        ;;
    esac
    echo "waiting for $name: ${now:-not listed yet}"
    sleep 30
  done
}

on_all_hosts() {
  run "${vm[@]}" ssh "$name" "${place[@]}" --worker=all --command "$1"
}

install() {
  local parcel="${TMPDIR:-/tmp}/grpo_jax_$name.tar.gz"
  if [[ -n "$(git -C "$checkout" status --porcelain 2>/dev/null)" ]]; then
    echo "tpu_vm.sh: note: uncommitted changes are not sent" >&2
  fi
  run git -C "$checkout" archive --format=tar.gz --output="$parcel" HEAD
  run "${vm[@]}" scp "$parcel" "$name:grpo_jax.tar.gz" "${place[@]}" --worker=all
  # The images' own Python may be older than 3.11, hence uv; it brings one.
  # shellcheck disable=SC2016  # $HOME is the host's
  on_all_hosts 'set -e
rm -rf "$HOME/grpo_jax" && mkdir "$HOME/grpo_jax" && tar -xzf "$HOME/grpo_jax.tar.gz" -C "$HOME/grpo_jax"
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
"$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 "$HOME/grpo_jax_venv"
"$HOME/.local/bin/uv" pip install --quiet --reinstall-package grpo-jax --python "$HOME/grpo_jax_venv/bin/python" "$HOME/grpo_jax[tpu]"'
}

mount_bucket() {
  # No metadata cache: a host must see at once what another has written.
  # shellcheck disable=SC2016  # $HOME and the rest are the host's
  on_all_hosts 'set -e
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
fi
mkdir -p "$HOME/gcs/'"$bucket"'"
mountpoint -q "$HOME/gcs/'"$bucket"'" || gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 '"$bucket"' "$HOME/gcs/'"$bucket"'"'
}

train() {
  local words
  words="$(printf '%q ' "$config" --workdir)\"\$HOME\"/$(printf '%q ' "gcs/$bucket/$folder" ${train_flags[@]+"${train_flags[@]}"})"
  # A config's path is one inside the checkout.
  on_all_hosts "cd \"\$HOME/grpo_jax\" && exec \"\$HOME/grpo_jax_venv/bin/grpo-jax\" train --config ${words% }"
}

ask_for_tpu
wait_for_tpu
install
mount_bucket
train
