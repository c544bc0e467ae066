#!/usr/bin/env bash
# The check of one card: the tests that need CUDA, then benchmarks/gpu_check.py, in ten minutes in all.
#
#     benchmarks/gpu_check.sh                        BAGEL-7B-MoT, 80 GB or more
#     benchmarks/gpu_check.sh --model eighth         a small card
#     BUDGET=120 benchmarks/gpu_check.sh             seconds in all
#     PYTHON=python3 benchmarks/gpu_check.sh         an interpreter other than .venv's
#
# Arguments go to gpu_check.py. Fails if a test or a case does; docs/reference/gpu-check.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

budget=${BUDGET:-600}
python=${PYTHON:-.venv/bin/python}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/unigrpo-inductor}

status=0
timeout "$((budget / 3))" "$python" -m pytest -m gpu tests || status=$?
if [ "$status" = 5 ]; then status=0; fi # nothing was selected
"$python" benchmarks/gpu_check.py --budget "$((budget - SECONDS - 10))" "$@" || status=$?
exit "$status"
