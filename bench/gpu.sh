#!/usr/bin/env bash
# One command for a machine with a GPU: builds, tests, sanitizes and benchmarks this repository, in stages.
# It needs CUDA's compiler, PyTorch and Triton, and no network. `bench/gpu.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! command -v "$python" > /dev/null; then
    echo "bench/gpu.sh: $python was not found; set PYTHON to the Python that has PyTorch" >&2
    exit 2
fi
exec "$python" -m bench.gpu "$@"
