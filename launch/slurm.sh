#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster, a process for each GPU: writes the batch script from flags and submits it.
# The same command again goes on where the run stopped; a job that is preempted, or out of time, is queued again.
set -euo pipefail
me="slurm.sh"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/slurm.sh --name NAME --workdir DIR [flags] [-- train flags]

  --name NAME        name of the job; two of one name never run at a time
  --workdir DIR      folder of the run, which all nodes see
  --nodes N          nodes (default: 1)
  --gpus N           GPUs of a node (default: 8)
  --cpus N           CPU cores for each GPU (default: 8)
  --time TIME        limit of one job, as sbatch wants it (default: 24:00:00); the run saves two minutes before
  --partition NAME   partition (default: the cluster's)
  --account NAME     account (default: yours)
  --config CONFIG    named config, or path of one (default: arithmetic)
  --venv DIR         virtual environment with grpo-jax on all nodes (default: .venv-gpu in the checkout, by gpu.sh)
  --dry_run          print the batch script and the command instead of submitting it
  --help             this text

What follows -- goes to `grpo-jax train`, for instance -- --config.mesh.fsdp=8
END
}

checkout="$(dirname "$here")"
name="" workdir="" nodes="1" gpus="8" cpus="8" time="24:00:00" partition="" account="" config="arithmetic"
venv="$checkout/.venv-gpu" dry_run=""
parse_flags "" "" "name workdir nodes gpus cpus time partition account config venv" "$@"
need name workdir
number nodes gpus cpus
[[ "$name" =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name $name: letters, digits, dots, - and _"

batch() {
  local more=""
  if [[ -n "$partition" ]]; then more+="#SBATCH --partition=$partition"$'\n'; fi
  if [[ -n "$account" ]]; then more+="#SBATCH --account=$account"$'\n'; fi
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=$name.log
${more}set -euo pipefail
# SIGTERM, two minutes before the limit or when the job is preempted, reaches every process: the run saves and ends.
srun --kill-on-bad-exit=1 $(show "$venv/bin/grpo-jax" train --config "$config" --workdir "$workdir" ${train_flags[@]+"${train_flags[@]}"})
# It ended well but is not finished: there was a reason to stop.
if [[ ! -e $(show "$workdir/summary.json") ]]; then scontrol requeue "\$SLURM_JOB_ID"; fi
END
}

script="$(batch)"
echo "$script"
show sbatch
if [[ -z "$dry_run" ]]; then sbatch <<<"$script"; fi
