#!/usr/bin/env bash
# A Cloud TPU VM or pod slice (v2 to v6e) as a queued resource, with an image of launch/Dockerfile:
#   PROJECT=my-project ZONE=us-west4-a TPU=v5litepod-16 IMAGE=us-docker.pkg.dev/my-project/my/cdetr:tpu \
#       CONFIG=conditional_detr_r50 WORKDIR=gs://my-bucket/r50 \
#       launch/tpu.sh [--dry-run] [--config.FIELD=VALUE ...]
#   PROJECT=... ZONE=... WORKDIR=gs://my-bucket/r50 launch/tpu.sh logs|stop
# SPOT=no: not a spot VM. DATA_DISK=projects/P/zones/Z/disks/D: a disk that every host sees read only as /data.
# A loop stays behind on this machine, which asks every minute: it makes a slice that was taken away again, and deletes
# it when the run has ended. Without it the run goes on, up to the next preemption; `start` starts it again.
cd "$(dirname "$0")/.."
. launch/common.sh

need PROJECT "the Google Cloud project"
need ZONE "such as us-west4-a"
tools gcloud
shared_workdir gs
tpus=(gcloud compute tpus queued-resources)
where=("$NAME" "--project=$PROJECT" "--zone=$ZONE")
ended=$WORKDIR/launch/exit_status

# https://cloud.google.com/tpu/docs/runtimes
runtime() {
  case $TPU in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# Runs as root on every host each time that it starts. Preemption gives a container 30 seconds, of which it gets 25.
# https://cloud.google.com/tpu/docs/run-in-container https://cloud.google.com/compute/docs/instances/spot
startup() {
  cat <<SCRIPT
#!/bin/bash
export HOME=/root
log=/var/log/cdetr-\$(hostname)-\$(date +%Y%m%d-%H%M%S).txt
exec >>"\$log" 2>&1
keep_log() { gcloud storage cp --quiet "\$log" '$WORKDIR/launch/' >/dev/null 2>&1; }
while sleep 60; do keep_log; done &
gcloud auth configure-docker --quiet '${IMAGE%%/*}'
mkdir -p /data
${DATA_DISK:+mount -o ro,noload /dev/disk/by-id/google-persistent-disk-1 /data}
docker rm --force cdetr
docker run --name=cdetr --privileged --net=host --shm-size=16g --stop-timeout=25 --volume=/data:/data:ro \\
  --env=JAX_COMPILATION_CACHE_DIR='$JAX_COMPILATION_CACHE_DIR' \\
  '$IMAGE' /cdetr_jax/launch/restart.sh$(quoted "$WORKDIR" "${train[@]}") --multihost
status=\$?
keep_log
case \$status in 75 | 137 | 143) exit ;; esac # stopped with the host
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
if [ "\$(curl -s -H Metadata-Flavor:Google \$metadata/agent-worker-number)" = 0 ]; then
  echo \$status | gcloud storage cp - '$ended'
fi
SCRIPT
}

create() {
  local spot=(--spot) disk=()
  [[ ${SPOT-} != no ]] || spot=()
  [[ -z ${DATA_DISK-} ]] || disk=("--data-disk=source=$DATA_DISK,mode=read-only")
  run "${tpus[@]}" create "${where[@]}" --node-id="$NAME" --accelerator-type="$TPU" --runtime-version="$(runtime)" \
    --metadata-from-file=startup-script="$logs/startup.sh" "${spot[@]}" "${disk[@]}" --async --quiet
}

delete() { run "${tpus[@]}" delete "${where[@]}" --force --quiet; }
fetch() { run gcloud storage cp --recursive "$WORKDIR/launch/*" "$logs/"; }

case $action in
  logs) fetch ;;
  stop)
    ! is_running || run kill "$(<"$logs/pid")"
    delete
    ;;
  watch)
    while sleep "${WATCH_S:-60}"; do
      if status=$(gcloud storage cat "$ended" 2>/dev/null); then
        echo "the run has ended with exit status $status"
        fetch || true
        delete || true # it costs money until it is gone
        exit "$status"
      fi
      state=$("${tpus[@]}" describe "${where[@]}" --format="value(state.state)" 2>/dev/null) || state=MISSING
      echo "$(date +%H:%M:%S) $state"
      case $state in
        MISSING) create || true ;;
        SUSPENDED | FAILED) delete || true ;; # https://cloud.google.com/tpu/docs/queued-resources
      esac
    done
    ;;
  *)
    need TPU "the accelerator type, such as v5litepod-16"
    need IMAGE "of launch/Dockerfile, such as us-docker.pkg.dev/project/repository/cdetr:tpu"
    committed
    ! is_running || die "it runs already: see $logs/watch.txt"
    bucket=${WORKDIR#gs://}
    run gcloud storage buckets describe "gs://${bucket%%/*}" --format="value(location)"
    run gcloud artifacts docker images describe "$IMAGE" --format="value(image_summary.digest)"
    if [[ -n $dry_run ]]; then startup; else startup >"$logs/startup.sh"; fi
    run gcloud storage rm "$ended" 2>/dev/null || true
    create
    detach watch.txt launch/tpu.sh watch
    note "what becomes of it is in $logs/watch.txt; \`$0 logs\` fetches the logs of the hosts"
    ;;
esac
