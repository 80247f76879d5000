#!/usr/bin/env bash
# All GPUs of this machine:
#   CONFIG=configs/conditional_detr_r50.py WORKDIR=runs/r50 launch/gpu.sh
set -euo pipefail
cdetr train --config="$CONFIG" --workdir="$WORKDIR" "$@"
