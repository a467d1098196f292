#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for the TPU, installs this checkout on each of its hosts, runs `grpo-jax train` on all.
# Run from a machine with gcloud. The same command again goes on where the run stopped, preempted or not.
set -euo pipefail
me="tpu_vm.sh"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh [ACTION] --name NAME --zone ZONE [flags] [-- train flags]

ACTION is one of
  run      up, setup and train, one after another (default)
  up       ask for the TPU and wait until it is there
  setup    send and install the committed checkout on every host, mount the bucket
  train    grpo-jax train on every host
  logs     the end of what training says on the first host, and what comes after it
  status   what the queued resource (with --now the VM) is at
  delete   delete the TPU; the run stays in its bucket

  --name NAME      name of the queued resource and of its TPU VM
  --zone ZONE      such as us-west4-a
  --type TYPE      accelerator type, such as v5litepod-8, v5p-8, v6e-16; hosts join by themselves (up)
  --slices N       so many slices of that type, joined over the data center's network (default: 1)
  --workdir URL    gs://BUCKET/FOLDER of the run (setup, train). The bucket is mounted on every host; one with a
                   hierarchical namespace renames folders at once, as checkpoints want
  --config CONFIG  named config, or path of one inside the checkout (default: arithmetic)
  --version IMAGE  runtime version (default: the one that goes with TYPE)
  --project ID     Google Cloud project (default: gcloud's own)
  --spot           spot capacity: cheaper, may be preempted (default: on demand)
  --now            create the TPU VM at once or fail, instead of waiting in the queue; one slice
  --detach         leave training to the hosts and return; see the action logs
  --tries N        when training ends early and the TPU was preempted, ask anew, N tries in all (default: 1)
  --dry_run        print the commands instead of running them
  --help           this text

What follows -- goes to `grpo-jax train`, for instance -- --config.train.steps=500
END
}

action="run" name="" zone="" type="" slices="1" version="" project="" config="arithmetic" workdir="" tries="1"
spot="" now="" detach="" dry_run=""
parse_flags "run up setup train logs status delete" "spot now detach" \
  "name zone type slices version project config workdir tries" "$@"
need name zone
number slices tries
[[ -z "$now" || "$slices" == 1 ]] || fail "--now makes one slice: leave --slices or --now out"
if [[ "$action" == run || "$action" == up ]]; then
  need type
  [[ "$type" =~ -[0-9]+$ ]] || fail "--type $type does not end in a size, such as -8"
fi
if [[ "$action" == run || "$action" == setup || "$action" == train ]]; then
  need workdir
  [[ "$workdir" =~ ^gs://([a-z0-9][a-z0-9._-]+)/(.+)$ ]] || fail "--workdir $workdir is not gs://BUCKET/FOLDER"
  bucket="${BASH_REMATCH[1]}" folder="${BASH_REMATCH[2]%/}"
fi
if [[ -n "$type" && -z "$version" ]]; then
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
resource=("${queue[@]}") format='--format=value(state.state)' nodes=(--node=all) first_node=(--node=0)
if [[ -n "$now" ]]; then
  resource=("${vm[@]}") format='--format=value(state)' nodes=() first_node=()
fi
checkout="$(dirname "$here")"

state() {
  "${resource[@]}" describe "$name" "${place[@]}" "$format" 2>/dev/null || true
}

create() {
  local more=()
  if [[ -n "$spot" ]]; then more=(--spot); fi
  if [[ -n "$now" ]]; then
    run "${vm[@]}" create "$name" "${place[@]}" --accelerator-type "$type" --version "$version" ${more[@]+"${more[@]}"}
    return
  fi
  if [[ "$slices" == 1 ]]; then
    more=(--node-id "$name" ${more[@]+"${more[@]}"})
  else
    more=(--node-count "$slices" --node-prefix "$name" ${more[@]+"${more[@]}"})
  fi
  run "${queue[@]}" create "$name" "${place[@]}" --accelerator-type "$type" --runtime-version "$version" "${more[@]}"
}

remove() {
  if [[ -n "$now" ]]; then
    run "${vm[@]}" delete "$name" "${place[@]}" --quiet
  else
    run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
  fi
}

# What was preempted stays listed (SUSPENDED, PREEMPTED) and never comes back by itself.
up() {
  if [[ -n "$dry_run" ]]; then
    echo "# only when $name exists and is SUSPENDED or PREEMPTED (preempted), FAILED or TERMINATED:"
    remove
    echo "# only when $name does not exist:"
    create
    echo "# every 30 seconds until it says ACTIVE or READY:"
    run "${resource[@]}" describe "$name" "${place[@]}" "$format"
    return
  fi
  case "$(state)" in
    "") create ;;
    SUSPENDED | FAILED | PREEMPTED | TERMINATED) remove && create ;;
    SUSPENDING | DELETING)
      echo "$me: $name is being taken down; run this again in a minute" >&2
      exit 1
      ;;
  esac
  local current
  while true; do
    current="$(state)"
    case "$current" in
      ACTIVE | READY) return ;;
      SUSPENDED | FAILED | SUSPENDING | PREEMPTED | TERMINATED)
        echo "$me: $name is $current; run this again to ask anew" >&2
        exit 1
        ;;
    esac
    echo "waiting for $name: ${current:-not listed yet}"
    sleep 30
  done
}

on_all_hosts() {
  run "${resource[@]}" ssh "$name" "${place[@]}" --worker=all ${nodes[@]+"${nodes[@]}"} --command "$1"
}

setup() {
  local parcel="${TMPDIR:-/tmp}/grpo_jax_$name.tar.gz"
  if [[ -n "$(git -C "$checkout" status --porcelain 2>/dev/null)" ]]; then
    echo "$me: note: uncommitted changes are not sent" >&2
  fi
  run git -C "$checkout" archive --format=tar.gz --output="$parcel" HEAD
  run "${resource[@]}" scp "$parcel" "$name:grpo_jax.tar.gz" "${place[@]}" --worker=all ${nodes[@]+"${nodes[@]}"}
  # The images' own Python may be older than 3.11, hence uv; it brings one.
  # shellcheck disable=SC2016  # $HOME is the host's
  on_all_hosts 'set -e
rm -rf "$HOME/grpo_jax" && mkdir "$HOME/grpo_jax" && tar -xzf "$HOME/grpo_jax.tar.gz" -C "$HOME/grpo_jax"
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
"$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 "$HOME/grpo_jax_venv"
"$HOME/.local/bin/uv" pip install --quiet --reinstall-package grpo-jax --python "$HOME/grpo_jax_venv/bin/python" "$HOME/grpo_jax[tpu]"'
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

# The lock keeps a second start of the same command from training beside the first.
train() {
  local words command
  words="$(printf '%q ' "$config" --workdir)\"\$HOME\"/$(printf '%q ' "gcs/$bucket/$folder" ${train_flags[@]+"${train_flags[@]}"})"
  # A config's path is one inside the checkout.
  command="flock -n -E 75 \"\$HOME/grpo_jax.lock\" \"\$HOME/grpo_jax_venv/bin/grpo-jax\" train --config ${words% }"
  if [[ -n "$detach" ]]; then
    on_all_hosts "cd \"\$HOME/grpo_jax\" && { nohup setsid $command >>\"\$HOME/grpo_jax.log\" 2>&1 </dev/null & }"
  else
    on_all_hosts "set -o pipefail; cd \"\$HOME/grpo_jax\" && $command 2>&1 | tee -a \"\$HOME/grpo_jax.log\""
  fi
}

logs() {
  # shellcheck disable=SC2016  # $HOME is the host's
  run "${resource[@]}" ssh "$name" "${place[@]}" --worker=0 ${first_node[@]+"${first_node[@]}"} \
    --command 'tail -n 100 -F "$HOME/grpo_jax.log"'
}

run_all() {
  local try code
  for ((try = 1; ; try++)); do
    up
    setup
    code=0
    train || code=$?
    if [[ "$code" == 0 || "$try" -ge "$tries" ]]; then exit "$code"; fi
    case "$(state)" in
      ACTIVE | READY) exit "$code" ;; # the TPU is there: it was the run that failed
    esac
    echo "$me: $name was lost; try $((try + 1)) of $tries" >&2
    while [[ "$(state)" == SUSPENDING || "$(state)" == DELETING ]]; do sleep 30; done
  done
}

case "$action" in
  run) run_all ;;
  status) run "${resource[@]}" describe "$name" "${place[@]}" "$format" ;;
  delete) remove ;;
  *) "$action" ;;
esac
