"""A pod that looks from inside a cluster whether network policies are enforced and the bucket can be used."""

from __future__ import annotations

import json
import time

from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.cluster.kuberay.obstacles.refusals import shortened
from cat_cluster.cluster.kuberay.rendering.pods import (
    ACCOUNT,
    container_security,
    part_of_project,
    pod_security,
    settings_environment,
)
from cat_cluster.errors import KubernetesError

PROBE_SECONDS = 120.0
_NEVER_STARTS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
)
# The bucket is reached from pods of this project, the API server from heads alone. Policies may take effect some
# seconds after a pod has started, so each is tried again: to be let through once is not yet to be let through.
_PROBE = """
import json, os, socket, time
def reaches_api():
    for _ in range(4):
        try:
            socket.create_connection((os.environ["KUBERNETES_SERVICE_HOST"], 443), timeout=3).close()
        except OSError:
            return False
        time.sleep(3)
    return True
def bucket():
    from cat_cluster.store import open_store
    for _ in range(3):
        try:
            open_store(os.environ["CAT_STORAGE"]).check_access()
            return None
        except Exception as error:
            last = str(error)
            time.sleep(3)
    return last
print(json.dumps({"reaches_api": reaches_api(), "storage": os.environ["CAT_STORAGE"], "bucket": bucket()}))
"""
_ANSWER = '{"reaches_api"'  # begins the line that the probe prints, among what libraries say


def look_inside(api: Api, image: str) -> Json:
    """Run the probe in a pod to its end, remove the pod, and return what it found; raises KubernetesError.

    reaches_api: whether it reached what no network policy names; storage: its address; bucket: why that could not be
    used, None where it could.
    """
    name = str(api.create(_probe_pod(image))["metadata"]["name"])
    try:
        if _end_of(api, name, image) == "Failed":
            raise KubernetesError(f"it failed: {''.join(api.log(name, 'probe', tail=3)).strip()}")
        said = "".join(api.log(name, "probe"))
        answers = [line for line in said.splitlines() if line.startswith(_ANSWER)]
        if not answers:
            raise KubernetesError(f"it ended without an answer: {shortened(said) or 'its log is empty'}")
        content: Json = json.loads(answers[-1])
    finally:
        api.delete("v1", "Pod", name)
    return content


def _end_of(api: Api, name: str, image: str) -> str:
    """Return the phase in which the probe's pod ends; raises KubernetesError where it does not."""
    end = time.monotonic() + PROBE_SECONDS
    while True:
        status = (api.get("v1", "Pod", name) or {}).get("status", {})
        phase = str(status.get("phase", "Failed"))
        if phase in ("Succeeded", "Failed"):
            return phase
        waiting = (status.get("containerStatuses") or [{}])[0].get("state", {}).get("waiting", {})
        if waiting.get("reason") in _NEVER_STARTS or time.monotonic() > end:
            unscheduled = [one.get("message") for one in status.get("conditions", ()) if one["status"] == "False"]
            why = next(filter(None, (waiting.get("message"), waiting.get("reason"), *unscheduled)), f"it is {phase}")
            raise KubernetesError(f"with image {image} it does not start: {why}; see --image")
        time.sleep(1)


def _probe_pod(image: str) -> Json:
    container = {
        "name": "probe",
        "image": image,
        "command": ["python", "-c", _PROBE],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "envFrom": settings_environment(),
        "securityContext": container_security(),
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "cat-doctor-", "labels": part_of_project("doctor")},
        "spec": {
            "serviceAccountName": ACCOUNT,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "activeDeadlineSeconds": int(PROBE_SECONDS) + 30,  # should whoever asked be gone
            "securityContext": pod_security(),
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }
