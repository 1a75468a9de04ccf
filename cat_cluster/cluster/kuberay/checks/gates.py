"""Feature gates of KubeRay's operator: which are on, and what of a manifest needs one that is not.

What needs a gate is refused by the operator without it (validation.go, v1.7.0), or never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from cat_cluster.cluster.kuberay.checks.releases import NEWEST, Release
from cat_cluster.cluster.kuberay.checks.validation import FieldPath, Finding, nearest
from cat_cluster.errors import SpecError

Json = Mapping[str, Any]

EMBEDDED_STORAGE = "GCSFaultToleranceEmbeddedStorage"
CRON_JOBS = "RayCronJob"
# Whether each is on by default (features.go).
_OLDER = {
    "RayClusterStatusConditions": True,
    "RayJobDeletionPolicy": True,
    "RayMultiHostIndexing": True,
    "RayServiceIncrementalUpgrade": False,
    CRON_JOBS: False,
}
GATES: Mapping[Release, Mapping[str, bool]] = {
    "1.6": {**_OLDER, "AsyncJobInfoQuery": False},
    "1.7": {
        **_OLDER,
        "RayServiceIncrementalUpgrade": True,
        "SidecarSubmitterRestart": False,
        "RayClusterNetworkPolicy": False,
        EMBEDDED_STORAGE: False,
        "RayClusterMTLS": False,
        "RayClusterHistoryServer": False,
        "KubernetesWAS": False,
    },
}
_FIELDS = {  # of a cluster
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_SWITCH = {"true": True, "false": False}


def gates_on(text: str, release: Release = NEWEST) -> frozenset[str]:
    """Return the gates that are on, given those that are not as by default: `NAME,NAME=false`; raises SpecError."""
    known = GATES[release]
    on = {name for name, is_on in known.items() if is_on}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in known:
            raise SpecError(f"--gates: {name!r} is no feature gate of KubeRay {release}; {nearest(name, known)}")
        is_on = _SWITCH.get(value.lower()) if equals else True
        if is_on is None:
            raise SpecError(f"--gates: {part!r}: write {name}=true or {name}=false")
        (on.add if is_on else on.discard)(name)
    return frozenset(on)


DEFAULT_GATES = gates_on("")


def gate_findings(document: Json, path: FieldPath, cluster: Json, gates: Set[str]) -> Iterator[Finding]:
    """Yield what of a RayCluster, RayJob or RayService needs a gate that is not on. path: where its cluster is."""
    for place, gate in _needed(document, path, cluster):
        if gate not in gates:
            yield place, needs_gate(gate)


def needs_gate(gate: str) -> str:
    """Return what is to be done about something that needs a gate."""
    instead = "use the CronJob of `k8s render --schedule --cron-job`" if gate == CRON_JOBS else "leave this out"
    return (
        f"needs the operator's feature gate {gate}: turn it on (featureGates in the values of its chart) and check "
        f"with --gates {gate}, or {instead}"
    )


def _needed(document: Json, path: FieldPath, cluster: Json) -> Iterator[tuple[FieldPath, str]]:
    """Yield each place that needs a gate, with the gate."""
    spec = document.get("spec", {})
    if document["kind"] == "RayJob" and "deletionStrategy" in spec:
        yield ("spec", "deletionStrategy"), "RayJobDeletionPolicy"
    if (spec.get("upgradeStrategy") or {}).get("type") == "NewClusterWithIncrementalUpgrade":
        yield ("spec", "upgradeStrategy", "type"), "RayServiceIncrementalUpgrade"
    if (cluster.get("gcsFaultToleranceOptions") or {}).get("backend") == "rocksdb":
        yield (*path, "gcsFaultToleranceOptions", "backend"), EMBEDDED_STORAGE
    for field, gate in _FIELDS.items():
        if field in cluster:
            yield (*path, field), gate
    for index, group in enumerate(cluster.get("workerGroupSpecs", ())):
        if group.get("suspend"):
            yield (*path, "workerGroupSpecs", index, "suspend"), "RayJobDeletionPolicy"
