#!/usr/bin/env bash
# One process on every host of a Cloud TPU pod slice:
#   NAME=my-pod ZONE=us-central2-b CONFIG=configs/conditional_detr_r50.py WORKDIR=/shared/run launch/tpu_pod.sh
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command \
  "cd cdetr_jax && .venv/bin/cdetr train --config=$CONFIG --workdir=$WORKDIR --multihost"
