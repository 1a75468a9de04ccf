"""What API server and KubeRay's operator take without a word, and no pod, or no job, ever comes of.

Nothing in the object's status tells of these. The reasons are in the operator's code (v1.7.0), named at each rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cat_cluster.cluster.kuberay.checks.validation import FieldPath, Finding

Json = Mapping[str, Any]

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
GENERATED = 5  # characters that Kubernetes and the operator append to a prefix
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_HEAD_GROUP = "headgroup"
_PREFIX = 50  # of `<cluster>-<group>`, as much as goes into a pod's name (PodName)
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_CLUSTER_SUFFIX = {"RayCluster": 0, "RayJob": GENERATED + 1, "RayService": GENERATED + 1}


def manager_findings(holders: Mapping[FieldPath, Any]) -> Iterator[Finding]:
    """Yield wrong `managedBy` of objects and of the clusters inside them, by their paths: a rule of the CRDs in CEL."""
    for path, holder in holders.items():
        value = (holder or {}).get("managedBy")
        if value is not None and value not in _MANAGERS:
            yield (*path, "managedBy"), f"{value!r} is not one of {', '.join(_MANAGERS)}; leave it out"


def job_findings(spec: Json) -> Iterator[Finding]:
    """Yield what keeps a RayJob from being submitted. spec: the job's."""
    mode = spec.get("submissionMode", SUBMISSION_MODES[0])
    if mode not in SUBMISSION_MODES:
        yield ("spec", "submissionMode"), f"{mode!r} is not one of {', '.join(SUBMISSION_MODES)}"
    template = spec.get("submitterPodTemplate")
    if template and mode == "K8sJobMode":
        policy = template.get("spec", {}).get("restartPolicy")
        if policy not in ("Never", "OnFailure"):  # the submitter is a Job, whose pods may have no other
            place = ("spec", "submitterPodTemplate", "spec", "restartPolicy")
            given = "it is missing" if policy is None else f"got {policy!r}"
            yield place, f"must be Never or OnFailure, {given}: the submitter's Job would be refused"
    for name in ("entrypointNumCpus", "entrypointNumGpus"):
        if spec.get(name, 0) < 0:
            yield ("spec", name), f"must be 0 or more, got {spec[name]}"
    if spec.get("entrypointResources"):
        try:
            resources = json.loads(spec["entrypointResources"])
        except ValueError:
            resources = None
        if not isinstance(resources, dict):
            yield ("spec", "entrypointResources"), 'must be JSON of a mapping, such as {"accelerator": 1}'


def group_findings(path: FieldPath, group: Json, kind: str, name: str) -> Iterator[Finding]:
    """Yield what keeps the pods of a worker group from being made. kind, name: of the object that the group is in."""
    group_name = group.get("groupName", "")
    place = (*path, "groupName")
    # The name is a label's value (labelPod), and in lower case a part of a pod's name.
    in_pod_name = group_name[: max(0, _PREFIX - len(name) - _CLUSTER_SUFFIX[kind] - 1)]
    if group_name == _HEAD_GROUP:
        yield place, f"{_HEAD_GROUP} is the head's own: it would count as a worker, and one too few be made"
    elif len(group_name) > 63 or not _LABEL.fullmatch(group_name) or "_" in in_pod_name:
        yield (
            place,
            f"{group_name!r} can be no part of a pod's name and no label: a-z, 0-9 and -, at most 63 characters",
        )
    if group.get("numOfHosts", 1) < 1:  # replicas times it is the number of pods
        yield (*path, "numOfHosts"), f"must be 1 or more, got {group['numOfHosts']}: the group would have no pod"
