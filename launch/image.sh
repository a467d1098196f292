#!/usr/bin/env bash
# Builds the container image of this checkout for TPU, CUDA or CPU, and pushes it.
set -euo pipefail
me="image.sh"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/image.sh --kind tpu|cuda|cpu --image NAME:TAG [flags]

  --kind KIND      tpu, cuda or cpu: which of launch/docker/ is built
  --image IMAGE    its name, such as us-docker.pkg.dev/my-project/my-repo/grpo-jax:1
  --cuda 12|13     with --kind cuda: major version of CUDA (default: 12)
  --push           push it to its registry as well
  --dry_run        print the commands instead of running them
  --help           this text
END
}

kind="" image="" cuda="12" push="" dry_run=""
parse_flags "" "push" "kind image cuda" "$@"
need kind image
[[ "$kind" == tpu || "$kind" == cuda || "$kind" == cpu ]] || fail "--kind $kind is none of tpu, cuda, cpu"
[[ "$cuda" == 12 || "$cuda" == 13 ]] || fail "--cuda $cuda is neither 12 nor 13"
[[ ${#train_flags[@]} -eq 0 ]] || fail "nothing is trained here: leave -- out"

more=()
if [[ "$kind" == cuda ]]; then more=(--build-arg "CUDA=$cuda"); fi
run docker build --file "$here/docker/$kind.Dockerfile" --tag "$image" ${more[@]+"${more[@]}"} "$(dirname "$here")"
if [[ -n "$push" ]]; then run docker push "$image"; fi
