#!/usr/bin/env bash
# Make .venv with the locked versions and this checkout, editable. Called by `make setup`; argument: the Python to use.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

"$python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"error: Python {sys.version.split()[0]} is too old; yalis needs 3.11 or newer (make setup PYTHON=...)")
PY

has_gpu=false
command -v nvidia-smi >/dev/null && has_gpu=true
system_torch=false
if $has_gpu && "$python" -c 'import torch, sys; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
    system_torch=true
fi

# A creation that was interrupted, or failed for want of ensurepip, leaves a Python without pip behind: begin anew.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        echo "error: $python cannot make virtual environments (no ensurepip); apt-get install python3-venv" >&2
        exit 1
    fi
    rm -rf .venv
    # A CUDA build of torch that the machine brings matches its driver: use it instead of a second one.
    if $system_torch; then
        "$python" -m venv --system-site-packages .venv
    else
        "$python" -m venv .venv
    fi
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if $system_torch; then
    pip install --quiet -r <(grep -vE '^(torch|triton)==' requirements-lock.txt)
else
    # First and alone, pinned exactly: where the index offers a CPU build of this version (2.13.0+cpu) it wins, while
    # a bare `torch` pulls gigabytes of CUDA libraries.
    pip install --quiet "$(grep '^torch==' requirements-lock.txt)"
    pip install --quiet -r requirements-lock.txt
fi
# The build backend is in the lock, so nothing unpinned is fetched here.
pip install --quiet --no-build-isolation --no-deps -e .
.venv/bin/python -c 'import torch; print("torch", torch.__version__, "in .venv")'
