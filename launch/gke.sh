#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster as a JobSet: node pools, the manifest, logs, and all of it away again.
# The same command again goes on where the run stopped; GKE starts the job anew when a node is preempted.
set -euo pipefail
me="gke.sh"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/gke.sh [ACTION] --name NAME [flags] [-- train flags]

ACTION is one of
  run      apply the JobSet of the run (default)
  cluster  make the cluster, with the bucket driver and the JobSet controller
  pools    make a node pool for each slice
  render   print the manifest, do nothing
  logs     what process 0 says
  status   the JobSet and its pods
  delete   delete the JobSet; the run stays in its bucket
  delete_pools  delete the node pools

  --name NAME       name of the JobSet and of the node pools
  --cluster NAME    the cluster (cluster, pools, delete_pools)
  --location PLACE  region or zone of the cluster (cluster, pools, delete_pools)
  --zone ZONE       zone of the TPUs (pools)
  --chip CHIP       v4, v5e, v5p or v6e (run, render, pools)
  --topology T      chips of a slice, such as 4x4 or 2x2x4 (run, render, pools)
  --slices N        slices (default: 1)
  --chips_per_host N  4 but for slices of one host, where it is all their chips (default: that)
  --image IMAGE     made by launch/image.sh --kind tpu --push (run, render)
  --workdir URL     gs://BUCKET/FOLDER of the run (run, render)
  --account NAME    Kubernetes service account that may write to the bucket (default: default)
  --config CONFIG   named config (default: arithmetic)
  --restarts N      times that the job starts anew after a failure or a preemption (default: 100)
  --jobset VERSION  of the JobSet controller (default: v0.8.0)
  --project ID      Google Cloud project (default: gcloud's own)
  --spot            spot capacity: cheaper, may be preempted
  --dry_run         print the commands instead of running them
  --help            this text

What follows -- goes to `grpo-jax train`, for instance -- --config.train.steps=500
END
}

action="run" name="" cluster="" location="" zone="" chip="" topology="" slices="1" chips_per_host="" image="" workdir=""
account="default" config="arithmetic" restarts="100" jobset="v0.8.0" project="" spot="" dry_run=""
parse_flags "run cluster pools render logs status delete delete_pools" "spot" \
  "name cluster location zone chip topology slices chips_per_host image workdir account config restarts jobset project" "$@"
need name
number slices restarts
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$ ]] || fail "--name $name: small letters, digits and -, at most 32"

# Accelerator and machine by chip: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
slice_of() {
  need chip topology
  [[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology $topology is not like 4x4 or 2x2x4"
  chips=$((${topology//x/*}))
  if [[ -z "$chips_per_host" ]]; then
    chips_per_host=$((chips < 4 || (chips == 8 && ${#topology} == 3) ? chips : 4))
  fi
  number chips_per_host
  ((chips % chips_per_host == 0)) || fail "--chips_per_host $chips_per_host does not divide the $chips of --topology $topology"
  hosts=$((chips / chips_per_host))
  case "$chip" in
    v4) accelerator="tpu-v4-podslice" machine="ct4p-hightpu-${chips_per_host}t" ;;
    v5e) accelerator="tpu-v5-lite-podslice" machine="ct5lp-hightpu-${chips_per_host}t" ;;
    v5p) accelerator="tpu-v5p-slice" machine="ct5p-hightpu-${chips_per_host}t" ;;
    v6e) accelerator="tpu-v6e-slice" machine="ct6e-standard-${chips_per_host}t" ;;
    *) fail "--chip $chip is none of v4, v5e, v5p, v6e" ;;
  esac
}

# A string of YAML, in double quotes.
quoted() {
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}

render() {
  need image workdir
  slice_of
  [[ "$workdir" =~ ^gs://([a-z0-9][a-z0-9._-]+)/(.+)$ ]] || fail "--workdir $workdir is not gs://BUCKET/FOLDER"
  local bucket="${BASH_REMATCH[1]}" folder="${BASH_REMATCH[2]%/}" word
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # A slice's pods lie on one node pool, and no other's beside them.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              serviceAccountName: $account
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
END
  if [[ -n "$spot" ]]; then
    cat <<'END'
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
END
  fi
  cat <<END
              containers:
                - name: train
                  image: $(quoted "$image")
                  args:
                    - train
                    - --config
                    - $(quoted "$config")
                    - --workdir
                    - $(quoted "/gcs/$folder")
END
  for word in ${train_flags[@]+"${train_flags[@]}"}; do echo "                    - $(quoted "$word")"; done
  cat <<END
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
                  volumeMounts:
                    - name: gcs
                      mountPath: /gcs
              volumes:
                - name: gcs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $bucket
                      # No metadata cache: a host must see at once what another has written.
                      mountOptions: implicit-dirs,rename-dir-limit=100000,metadata-cache:ttl-secs:0
END
}

# unless PROBE NAME COMMAND...: nothing is done when the probe finds what is asked for.
unless() {
  local probe="$1" there="$2"
  shift 2
  if [[ -n "$dry_run" ]]; then
    echo "# only when there is no $there:"
  elif "$probe" >/dev/null 2>&1; then
    echo "$there is there"
    return
  fi
  run "$@"
}

place=()
if [[ -n "$location" ]]; then place+=(--location "$location"); fi
if [[ -n "$project" ]]; then place+=(--project "$project"); fi

cluster() {
  need cluster location
  # shellcheck disable=SC2329  # called by name
  has_cluster() { gcloud container clusters describe "$cluster" "${place[@]}"; }
  unless has_cluster "cluster $cluster" gcloud container clusters create "$cluster" "${place[@]}" \
    --addons=GcsFuseCsiDriver --workload-pool="${project:-$(gcloud config get-value project 2>/dev/null)}.svc.id.goog" \
    --machine-type=e2-standard-8 --num-nodes=1
  run gcloud container clusters get-credentials "$cluster" "${place[@]}"
  run kubectl apply --server-side --filename \
    "https://github.com/kubernetes-sigs/jobset/releases/download/$jobset/manifests.yaml"
}

pools() {
  need cluster location zone
  slice_of
  local number more=()
  if [[ -n "$spot" ]]; then more=(--spot); fi
  if [[ "$hosts" -gt 1 ]]; then more+=(--tpu-topology="$topology"); fi
  for ((number = 0; number < slices; number++)); do
    # shellcheck disable=SC2329  # called by name
    has_pool() { gcloud container node-pools describe "$name-$number" --cluster "$cluster" "${place[@]}"; }
    unless has_pool "node pool $name-$number" gcloud container node-pools create "$name-$number" \
      --cluster "$cluster" "${place[@]}" --node-locations="$zone" --machine-type="$machine" --num-nodes="$hosts" \
      --workload-metadata=GKE_METADATA ${more[@]+"${more[@]}"}
  done
}

case "$action" in
  render) render ;;
  run)
    manifest="$(render)"
    show kubectl apply --filename -
    echo "$manifest"
    if [[ -z "$dry_run" ]]; then kubectl apply --filename - <<<"$manifest"; fi
    ;;
  logs) run kubectl logs --follow --selector "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" ;;
  status) run kubectl get jobset,pods --selector "jobset.sigs.k8s.io/jobset-name=$name" ;;
  delete) run kubectl delete jobset "$name" --ignore-not-found ;;
  delete_pools)
    need cluster location
    for ((number = 0; number < slices; number++)); do
      run gcloud container node-pools delete "$name-$number" --cluster "$cluster" "${place[@]}" --quiet
    done
    ;;
  *) "$action" ;;
esac
