#!/bin/bash
# usage: mps.sh RANKS COMMAND [ARGUMENT ...]
# Runs a command under an MPS daemon of its own, in which each of RANKS processes gets an equal share of the GPU.
set -u
ranks=$1
shift
folder=$(mktemp -d)
mkdir "$folder/pipe" "$folder/log"
export CUDA_MPS_PIPE_DIRECTORY=$folder/pipe CUDA_MPS_LOG_DIRECTORY=$folder/log
timeout 20 nvidia-cuda-mps-control -d || exit 3
leave() {
    local daemon
    daemon=$(cat "$folder/pipe/nvidia-cuda-mps-control.pid" 2>/dev/null)
    echo "quit -t 3" | timeout 15 nvidia-cuda-mps-control >/dev/null 2>&1
    [ -n "$daemon" ] && kill "$daemon" 2>/dev/null
    rm -rf "$folder"
}
trap leave EXIT
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$((100 / ranks)) "$@"
