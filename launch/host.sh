#!/usr/bin/env bash
# All GPUs of this host (or its TPU, or its CPU), with the environment that is active:
#   CONFIG=conditional_detr_r50 WORKDIR=runs/r50 launch/host.sh [--dry-run] [--config.FIELD=VALUE ...]
#   WORKDIR=runs/r50 launch/host.sh logs    follows the log
#   WORKDIR=runs/r50 launch/host.sh stop    saves and ends; start again to go on
cd "$(dirname "$0")/.."
. launch/common.sh

case $action in
  logs) run tail -n 100 -F "$logs/log.txt" ;;
  stop)
    is_running || die "it does not run"
    run kill -TERM "$(<"$logs/pid")"
    ;;
  *)
    tools cdetr python3 setsid
    detach log.txt launch/restart.sh "$WORKDIR" "${train[@]}"
    note "the log is $logs/log.txt"
    ;;
esac
