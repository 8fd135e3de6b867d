#!/usr/bin/env bash
# Compiles masks, blocks and head for an H100 (sm_90) on a machine without a GPU. Outside CI: it needs Triton, which brings ptxas.
#   pip install -t FOLDER triton                       about 190 MB to load; the torch of the environment is that of the CPU
#   bash tests/gpu_without_gpu/nightly.sh FOLDER [ARGUMENTS OF check.py]
# Needs g++. Half a minute to two for a check on a CPU core. Status 0: everything was compiled, 1: something was not, 2: wrong use.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [ "$#" -lt 1 ] || [ ! -d "$1/triton" ]; then
  echo "error: ${1:-no folder} holds no Triton; see the head of $0" >&2
  exit 2
fi
TRITON="$(cd "$1" && pwd)"
shift
BUILD="$(mktemp -d)"
trap 'rm -rf "$BUILD"' EXIT
TORCH="$(python -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")"
g++ -shared -fPIC -std=c++20 -I"$TORCH/include" "$HERE/device.cpp" -o "$BUILD/device.so" -L"$TORCH/lib" -lc10 -ltorch_cpu

export PYTHONPATH="$TRITON:$HERE/../..${PYTHONPATH:+:$PYTHONPATH}" LD_LIBRARY_PATH="$TORCH/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# One compiler process, which is this one and knows of the machine, and nothing from a cache.
export TORCHINDUCTOR_COMPILE_THREADS=1 TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 TORCHINDUCTOR_CACHE_DIR="$BUILD/inductor"
LD_PRELOAD="$BUILD/device.so" python -W ignore "$HERE/check.py" --device cuda "$@"
