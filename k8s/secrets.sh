#!/usr/bin/env bash
# Makes the Secrets that the manifests name and the namespace lacks, with random values that are written nowhere else:
#
#     k8s/secrets.sh [--namespace NAME] [--local-s3]
#
# --local-s3: also keys for the S3 server of overlays/local. Keys of a bucket of yours, a token of the model hub and the
# password of Redis are yours to give:
#
#     kubectl -n cat-cluster create secret generic cat-cluster-s3 --from-env-file=FILE   # AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY
#     kubectl -n cat-cluster create secret generic cat-cluster-hub --from-env-file=FILE  # HF_TOKEN
#     kubectl -n cat-cluster create secret generic cat-cluster-redis --from-file=password=FILE
set -euo pipefail
umask 077

namespace=cat-cluster
local_s3=false
while [ $# -gt 0 ]; do
  case $1 in
    --namespace) namespace=${2:?--namespace needs a name}; shift 2 ;;
    --local-s3) local_s3=true; shift ;;
    *) echo "unknown option $1: usage k8s/secrets.sh [--namespace NAME] [--local-s3]" >&2; exit 2 ;;
  esac
done

random() { openssl rand -hex 32; }

# The values go through a pipe: arguments of a process can be read by others on this machine.
make_secret() {
  if kubectl -n "$namespace" get secret "$1" >/dev/null 2>&1; then
    cat >/dev/null   # so that who writes the value does not find the pipe closed
    echo "$1 is there already" >&2
  else
    kubectl -n "$namespace" create secret generic "$1" --from-env-file=/dev/stdin
  fi
}

printf 'auth_token=%s\n' "$(random)" | make_secret cat-training-ray-token
printf 'auth_token=%s\n' "$(random)" | make_secret cat-serving-ray-token
printf 'CAT_API_KEYS=%s\nCAT_ADMIN_KEYS=%s\n' "$(random)" "$(random)" | make_secret cat-cluster-api-keys
if $local_s3; then
  printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$(openssl rand -hex 10)" "$(random)" | make_secret cat-cluster-s3
fi
