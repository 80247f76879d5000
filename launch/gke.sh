#!/usr/bin/env bash
# GKE, with JobSet (https://jobset.sigs.k8s.io) in the cluster that kubectl talks to, and an image of launch/Dockerfile:
#   ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4 CHIPS=4 HOSTS=4     # a TPU slice: CHIPS of each host
#   ACCELERATOR=nvidia-h100-80gb GPUS=8 HOSTS=2                # GPU hosts: GPUS of each host
#       IMAGE=us-docker.pkg.dev/my-project/my/cdetr:tpu \
#       CONFIG=conditional_detr_r50 WORKDIR=gs://my-bucket/r50 \
#       launch/gke.sh [--dry-run] [--config.FIELD=VALUE ...]
#   WORKDIR=gs://my-bucket/r50 launch/gke.sh logs|stop
# SPOT=no: not on spot nodes. SERVICE_ACCOUNT (default): the Kubernetes one that may write to the bucket.
# DATA_BUCKET=bucket: one that every host sees read only as /data (Cloud Storage FUSE).
cd "$(dirname "$0")/.."
. launch/common.sh

tools kubectl
shared_workdir gs

# Words as a YAML list.
list() {
  local word
  for word in "$@"; do
    word=${word//\\/\\\\}
    printf '"%s", ' "${word//\"/\\\"}"
  done
}

# Any other end than 0, 2 and 70 of launch/restart.sh makes all pods anew.
# https://jobset.sigs.k8s.io/docs/concepts/ https://docs.cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
# TPU processes find each other by what GKE sets; GPU ones are told, by names that JobSet gives the pods.
jobset() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
${TOPOLOGY:+  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool\}}
spec:
  failurePolicy:
    maxRestarts: 1000
    rules: [{action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}]
  replicatedJobs:
  - name: host
    replicas: 1
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules: [{action: FailJob, onExitCodes: {containerName: cdetr, operator: In, values: [2, 70]}}]
        template:
          metadata:
            labels: {app: cdetr}
            ${DATA_BUCKET:+annotations: {gke-gcsfuse/volumes: "true"\}}
          spec:
            restartPolicy: Never
            serviceAccountName: ${SERVICE_ACCOUNT:-default}
            terminationGracePeriodSeconds: 25
            nodeSelector:
              ${TOPOLOGY:+cloud.google.com/gke-tpu-topology: $TOPOLOGY}
              $selector: $ACCELERATOR
              $([[ ${SPOT-} == no ]] || echo 'cloud.google.com/gke-spot: "true"')
            containers:
            - name: cdetr
              image: $IMAGE
              command: [$(list /cdetr_jax/launch/restart.sh "$WORKDIR" "${train[@]}" --multihost)]
              env:
              - {name: JAX_COMPILATION_CACHE_DIR, value: "$JAX_COMPILATION_CACHE_DIR"}
$(if [[ -n ${GPUS-} ]]; then cat <<ENV
              - {name: CDETR_COORDINATOR, value: "$NAME-host-0-0.$NAME:8476"}
              - {name: CDETR_NUM_PROCESSES, value: "$HOSTS"}
              - name: CDETR_PROCESS_ID
                valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
ENV
fi)
              resources: {limits: {$resource: $per_host}}
              volumeMounts:
              - {name: shm, mountPath: /dev/shm}
              ${DATA_BUCKET:+- {name: data, mountPath: /data, readOnly: true\}}
            volumes:
            - {name: shm, emptyDir: {medium: Memory}}
            ${DATA_BUCKET:+- name: data
              csi: {driver: gcsfuse.csi.storage.gke.io, readOnly: true, volumeAttributes: {bucketName: $DATA_BUCKET\}\}}
YAML
}

case $action in
  logs) run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --container=cdetr --prefix --tail=-1 ;;
  stop) run kubectl delete jobset "$NAME" ;;
  *)
    need ACCELERATOR "the node pool's, such as tpu-v6e-slice or nvidia-h100-80gb"
    need IMAGE "of launch/Dockerfile, such as us-docker.pkg.dev/project/repository/cdetr:tpu"
    whole HOSTS "how many hosts"
    if [[ -n ${TOPOLOGY-} ]]; then
      whole CHIPS "how many chips each host of the slice has"
      ((${TOPOLOGY//x/*} == HOSTS * CHIPS)) || die "TOPOLOGY $TOPOLOGY has other chips than $HOSTS hosts of $CHIPS"
      selector=cloud.google.com/gke-tpu-accelerator resource=google.com/tpu per_host=$CHIPS
    else
      whole GPUS "how many GPUs each host has; for a TPU slice set TOPOLOGY"
      selector=cloud.google.com/gke-accelerator resource=nvidia.com/gpu per_host=$GPUS
    fi
    committed
    run kubectl get crd jobsets.jobset.x-k8s.io
    if [[ -n $dry_run ]]; then jobset; else jobset >"$logs/jobset.yaml"; fi
    run kubectl create --filename="$logs/jobset.yaml"
    note "\`WORKDIR=$WORKDIR $0 logs\` shows the logs"
    ;;
esac
