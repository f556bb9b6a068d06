#!/usr/bin/env bash
# Runs the whole stack once on a host with the recipe's GPU: builds the images and the engine, starts the server, holds its
# readings against those of transformers, and prints a report to paste. Exit status 0 passed, 1 refused or failed, 2 usage.
set -euo pipefail

if [[ $# -lt 4 || $# -gt 5 ]]; then
    cat >&2 << 'USAGE'
usage: deploy/smoke.sh OUT CHECKPOINT PROFILE RECIPE [IMAGES]

  OUT         folder for weights and engine; what an earlier run left there is used
  CHECKPOINT  folder, or ORG/NAME on the hub
  PROFILE     name or YAML file, as nv-reason-cxr-3b
  RECIPE      name of a tensorrt-llm or vllm recipe, as h100-fp8-trtllm or h100-fp8-vllm
  IMAGES      folder of radiographs to calibrate and to verify on; synthetic phantoms without

ACCEPT_LICENCE=1  you accept the weights' non-commercial licence
DIGEST=sha256:…   of the container, if not the registry's
KEEP=1            leave the server running
USAGE
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case $4 in
    *-vllm) tag=26.08-vllm-python-py3 targets=(engine-vllm serve-vllm) service=server-vllm services=vllm ;;
    *) tag=26.07-trtllm-python-py3 targets=(engine serve) service=server services=tensorrt-llm ;;
esac
base=nvcr.io/nvidia/tritonserver
mkdir -p "$1"
out=$(cd "$1" && pwd)
checkpoint=$2 profile=$3 recipe=$4
images=${5:+$(cd "$5" && pwd)}
compose=(docker compose --file "$here/compose.yaml" --profile "$services")
export REPOSITORY=$out/repository GRAFANA_PASSWORD=${GRAFANA_PASSWORD:-unused}

say() { printf '\n== %s\n' "$*"; }

# Paths are the same inside and outside; what is named twice is mounted once.
mounts=(--volume "$out:$out")
arguments=(--recipe "$recipe" --out "$out" --cache "$out/plans" --json "$out/make-engine.json")
if [[ -d $checkpoint ]]; then
    checkpoint=$(cd "$checkpoint" && pwd)
    mounts+=(--volume "$checkpoint:$checkpoint:ro")
fi
if [[ -f $profile ]]; then
    profile=$(cd "$(dirname "$profile")" && pwd)/$(basename "$profile")
    mounts+=(--volume "$profile:$profile:ro")
fi
arguments+=(--profile "$profile")
golden=()
if [[ -n $images ]]; then
    mounts+=(--volume "$images:$images:ro")
    arguments+=(--images "$images")
    golden+=(--images "$images")
fi
if [[ ${ACCEPT_LICENCE:-} == 1 ]]; then
    arguments+=(--accept-licence)
fi
engine=(docker run --rm --user "$(id -u):$(id -g)" --env "HF_HOME=$out/hub" "${mounts[@]}")

say "machine"
for tool in docker nvidia-smi; do
    command -v "$tool" > /dev/null || { echo "$tool is not on the path; deploy/README.md lists what a host needs" >&2; exit 1; }
done
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader)
echo "$gpu"
docker compose version

say "images"
digest=${DIGEST:-$(docker buildx imagetools inspect "$base:$tag" --format '{{.Manifest.Digest}}')}
echo "$base:$tag is $digest"
for target in "${targets[@]}"; do
    docker build --build-arg "DIGEST=$digest" --target "$target" --tag "cxr-triton-${target%-vllm}:$tag" \
        --file "$here/Dockerfile" "$here/.."
done

say "engine"
"${engine[@]}" --gpus all --ipc host --ulimit memlock=-1 "cxr-triton-engine:$tag" \
    make-engine "$checkpoint" "${arguments[@]}"

say "server"
if [[ ${KEEP:-} != 1 ]]; then
    trap '"${compose[@]}" down --timeout 60' EXIT
fi
if ! "${compose[@]}" up --detach --wait --wait-timeout 1500 "$service"; then
    "${compose[@]}" logs --tail 100 "$service" >&2
    echo "the server did not become ready" >&2
    exit 1
fi

say "golden readings"
verdict=passed
"${engine[@]}" --network host "cxr-triton-engine:$tag" golden "$out" "${golden[@]}" --json "$out/golden.json" \
    || verdict=REFUSED

say "report to paste"
cat << REPORT
verdict:    $verdict
date:       $(date -u +%Y-%m-%dT%H:%MZ)
gpu:        $gpu
container:  $base:$tag@$digest
revision:   $(git -C "$here" rev-parse HEAD 2> /dev/null || echo "no git here")
recipe:     $recipe
make-engine $(cat "$out/make-engine.json")
golden      $(cat "$out/golden.json" 2> /dev/null || echo "no result: the server failed a reading")
REPORT
[[ $verdict == passed ]]
