#!/usr/bin/env bash
# A SLURM job over GPU hosts, one process a GPU, which is how JAX takes its variables. The environment that is active,
# and this folder, must be on a file system that the hosts share:
#   HOSTS=4 GPUS=8 CONFIG=conditional_detr_r50 WORKDIR=/shared/r50 \
#       launch/slurm.sh [--dry-run] [--config.FIELD=VALUE ...]
#   WORKDIR=/shared/r50 launch/slurm.sh logs|stop
# HOSTS: how many, GPUS: of each. Partition, account and time limit: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT.
# The job goes back to the queue when it is preempted, and 2 minutes before its time limit.
[[ ${1-} == job ]] || cd "$(dirname "$0")/.." # SLURM runs a copy of the script, in the folder it was sent from
. launch/common.sh

case $action in
  logs) run tail -n 100 -F "$logs/slurm.txt" ;;
  stop)
    tools scancel
    run scancel --me --name="$NAME"
    ;;
  job) # the batch script, on the first host
    requeue="" status=75
    # The tasks that are left have 60 seconds to save after the first has ended.
    launch/restart.sh "$WORKDIR" srun --kill-on-bad-exit=0 --wait=60 "${train[@]}" --multihost &
    trap 'requeue=yes interrupted=yes; kill -TERM $! || true' USR1
    trap 'interrupted=yes; kill -TERM $! || true' TERM
    interrupted=yes
    while [[ -n $interrupted ]]; do # a signal ends `wait`, whose status is then not the command's
      interrupted="" status=0
      wait $! || status=$?
    done
    [[ -z $requeue || $status == 0 ]] || run scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
    ;;
  *)
    whole HOSTS "how many hosts"
    whole GPUS "how many GPUs each host has"
    tools sbatch srun scontrol cdetr python3
    shared_workdir
    export CONFIG WORKDIR NAME
    # No --gpus-per-task: JAX chooses by SLURM_LOCALID among all GPUs of the host. USR1 is for the batch script alone.
    # https://slurm.schedmd.com/sbatch.html#OPT_signal https://slurm.schedmd.com/preempt.html
    run sbatch --job-name="$NAME" --nodes="$HOSTS" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --exclusive \
      --requeue --open-mode=append --output="$logs/slurm.txt" --signal=B:USR1@120 launch/slurm.sh job "${fields[@]}"
    note "the log will be $logs/slurm.txt"
    ;;
esac
