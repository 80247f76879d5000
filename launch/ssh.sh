#!/usr/bin/env bash
# Hosts that ssh reaches without a password, one process each, which has all of the host's GPUs:
#   HOSTS="node1 node2" JAX=cuda12 CONFIG=conditional_detr_r50 WORKDIR=/shared/r50 \
#       launch/ssh.sh [--dry-run] [--config.FIELD=VALUE ...]
#   HOSTS="node1 node2" WORKDIR=/shared/r50 launch/ssh.sh logs|stop
# The commit that is checked out is installed in ~/cdetr_jax_NAME of each host. JAX: jax's build, cuda12, cuda13 or tpu.
# PYTHON (python3): 3.11 or newer. The others reach the first host by its name here, at PORT (8476).
cd "$(dirname "$0")/.."
. launch/common.sh

need HOSTS "the names of the hosts, with spaces between them"
read -ra hosts <<<"${HOSTS-}"
folder=cdetr_jax_$NAME
python=${PYTHON:-python3}
install=".venv/bin/pip install --quiet --constraint constraints.txt '.[gcs]' 'jax[${JAX-}]'"
tools ssh scp git

on() { run ssh -n -o BatchMode=yes -o ConnectTimeout=20 "$1" "$2"; }

# On all hosts, at once unless it is a dry run; ends if one fails.
on_all() {
  local host job jobs=()
  for host in "${hosts[@]}"; do
    if [[ -n $dry_run ]]; then on "$host" "$1"; else
      on "$host" "$1" &
      jobs+=($!)
    fi
  done
  for job in "${jobs[@]}"; do wait "$job" || die "a host has failed, see above"; done
}

case $action in
  logs) for host in "${hosts[@]}"; do run scp -q "$host:$folder/log.txt" "$logs/${host#*@}.txt"; done ;;
  stop) on_all "kill -TERM \$(cat $folder/pid)" ;;
  *)
    need JAX "the build of jax: cuda12, cuda13 or tpu"
    committed
    shared_workdir
    on_all "! kill -0 \$(cat $folder/pid 2>/dev/null) 2>/dev/null || { echo \$(hostname) runs it already >&2; exit 1; }"
    on_all "$python -c 'import sys; sys.exit(sys.version_info < (3, 11) and sys.version)'"
    if [[ $WORKDIR == /* ]]; then # do all see it?
      sign="$NAME $(date +%s)"
      on "${hosts[0]}" "mkdir -p ${WORKDIR@Q} && echo $sign >${WORKDIR@Q}/.launch"
      on_all "grep -qx '$sign' ${WORKDIR@Q}/.launch || { echo \$(hostname) does not see ${WORKDIR@Q} >&2; exit 1; }"
    fi
    run git archive --format=tar.gz --output="$logs/code.tar.gz" HEAD
    for host in "${hosts[@]}"; do run scp -q "$logs/code.tar.gz" "$host:$folder.tar.gz"; done
    on_all "mkdir -p $folder && tar -xzf $folder.tar.gz -C $folder && cd $folder && $python -m venv .venv && $install"
    for i in "${!hosts[@]}"; do
      variables="JAX_COMPILATION_CACHE_DIR=${WORKDIR@Q}/compiled CDETR_COORDINATOR=${hosts[0]#*@}:${PORT:-8476}"
      variables+=" CDETR_NUM_PROCESSES=${#hosts[@]} CDETR_PROCESS_ID=$i"
      loop="setsid launch/restart.sh$(quoted "$WORKDIR" "${train[@]}") >>log.txt 2>&1 </dev/null"
      on "${hosts[i]}" "cd $folder && export PATH=\$PWD/.venv/bin:\$PATH $variables && { $loop & echo \$! >pid; }"
    done
    note "started on ${#hosts[@]} hosts; \`HOSTS=${HOSTS@Q} WORKDIR=$WORKDIR $0 logs\` fetches the logs"
    ;;
esac
