#!/usr/bin/env bash
# All GPUs of this machine; XLA takes memory as it needs it, so that decoding threads keep theirs:
#   CONFIG=configs/conditional_detr_r50.py WORKDIR=runs/r50 launch/gpu.sh
set -euo pipefail
XLA_PYTHON_CLIENT_PREALLOCATE=false cdetr train --config="$CONFIG" --workdir="$WORKDIR" "$@"
