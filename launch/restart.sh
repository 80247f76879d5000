#!/usr/bin/env bash
# Runs a training command again and again until it is done; every launcher uses it:
#   launch/restart.sh WORKDIR COMMAND [ARGUMENT ...]
# It ends with
#   0   the command has succeeded
#   2   the command, or this one, was called wrongly
#   70  the command has failed twice at the same step, that of the newest checkpoint in WORKDIR
#   75  this script got SIGTERM or SIGINT, which it passes on as SIGTERM: start it again to go on
# After anything else it waits for RESTART_WAIT_S (60) seconds, in which the run's other processes notice, and starts
# the command again. 75, and 130 and 143 for the two signals, mean that the command was stopped, or that another process
# of its run was lost: that is no failure.
set -uo pipefail

if (($# < 2)); then
  echo "restart.sh: error: expected WORKDIR COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
workdir=$1
shift
stopped="" child="" failed_at=""

say() { echo "restart.sh $(date +%H:%M:%S): $*" >&2; }

stop() {
  stopped=yes interrupted=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

# Of the newest checkpoint; 0 if there is none. Python, because the workdir may be gs://.
newest_step() {
  python3 - "$workdir" <<'PY' || echo unknown
import sys
from cdetr_jax.files import as_path
folder = as_path(sys.argv[1]) / "checkpoints"
print(max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0) if folder.exists() else 0)
PY
}

while true; do
  "$@" &
  child=$!
  [[ -z $stopped ]] || kill -TERM "$child" # told before it had a number
  interrupted=yes
  while [[ -n $interrupted ]]; do # a signal ends `wait`, whose status is then not the command's
    interrupted=""
    wait "$child"
    status=$?
  done
  child=""
  ((status == 0 || status == 2)) && exit "$status"
  [[ -z $stopped ]] || exit 75
  step=$(newest_step)
  case $status in
    75 | 130 | 143) say "the command was stopped (exit status $status); the newest checkpoint is that of step $step" ;;
    *)
      say "the command has failed (exit status $status); the newest checkpoint is that of step $step"
      if [[ $step == "$failed_at" ]]; then
        say "it has failed there before: see the log above, mend the cause, and start this again"
        exit 70
      fi
      failed_at=$step
      ;;
  esac
  say "starting it again in ${RESTART_WAIT_S:-60} seconds"
  sleep "${RESTART_WAIT_S:-60}" &
  wait $!
  [[ -z $stopped ]] || exit 75
done
