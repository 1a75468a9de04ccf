"""The manifests of k8s/, offline: who reaches whom, and by which port."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.autoscaler._private.kuberay import autoscaling_config, node_provider
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.serve._private.constants import DEFAULT_HTTP_PORT

from cat_cluster.cluster.kuberay.checks.check import check_manifests
from cat_cluster.cluster.kuberay.checks.gates import DEFAULT_GATES, EMBEDDED_STORAGE
from cat_cluster.cluster.kuberay.checks.schemas import Schemas
from cat_cluster.cluster.kuberay.rendering import pods as kuberay_pods
from jobs import probe
from serve.http.access import ADMIN_KEYS
from serve.http.streams import GRACE_S
from tests.support.manifests import (
    K8S,
    PLACES,
    built_in,
    clusters,
    deployment,
    lines,
    of_kind,
    pods,
    ray_pods,
    scheduled_pod,
    serve_config,
    serving,
    users_service,
    values,
)


@pytest.mark.parametrize("place", PLACES[1:])
def test_nightly_probes_reach_the_doors_and_nothing_else(place: str, tmp_path: Path, schemas: Schemas) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / ("local" if place == "overlays/local" else "gpu") / "kustomization.yaml"
    line = "  - ../../components/nightly-probes\n"
    before, components, after = overlay.read_text().partition("components:\n")
    overlay.write_text(f"{before}components:\n{line}{after}" if components else f"{before}components:\n{line}")
    documents = built_in(tmp_path / "k8s", place)
    findings = check_manifests(documents, schemas, gates=DEFAULT_GATES | {EMBEDDED_STORAGE})
    assert not findings, lines(findings)
    (night,) = (one.content for one in documents if one.content["kind"] == "CronJob")
    template = night["spec"]["jobTemplate"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert template["spec"]["automountServiceAccountToken"] is False
    assert template["spec"]["enableServiceLinks"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    (key,) = (one for one in container["env"] if "valueFrom" in one)
    assert (key["name"], key["valueFrom"]["secretKeyRef"]["key"]) == (ADMIN_KEYS, ADMIN_KEYS)
    python, _, module, address = container["command"]
    assert (python, module) == ("python", probe.__name__)
    service = users_service(place)
    assert address == f"http://{service['metadata']['name']}:{DEFAULT_HTTP_PORT}"
    assert container["image"] == next(values(serving(place)["doors"], "image"))

    worn = template["metadata"]["labels"]
    doors = {"app.kubernetes.io/component": "serving", "ray.io/group": "doors"}
    policies = [one.content for one in documents if one.content["kind"] == "NetworkPolicy"]
    rules = [
        (one["metadata"]["name"], rule)
        for one in policies
        if one["spec"]["podSelector"].get("matchLabels", {}).items() <= worn.items()
        for rule in one["spec"].get("egress", ())
    ]
    assert sorted(name for name, _ in rules) == ["dns", "nightly-probes"]
    way = dict(rules)["nightly-probes"]
    assert way["to"] == [{"podSelector": {"matchLabels": doors}}]
    assert [port["port"] for port in way["ports"]] == [DEFAULT_HTTP_PORT]
    into = next(one["spec"] for one in policies if one["metadata"]["name"] == "nightly-probes-to-doors")
    assert into["podSelector"]["matchLabels"] == doors
    assert into["ingress"][0]["from"] == [{"podSelector": {"matchLabels": worn}}]


@pytest.mark.parametrize("place", PLACES)
def test_traffic_goes_to_doors_alone_and_nothing_else_runs_there(place: str) -> None:
    users, (service,) = users_service(place)["spec"], of_kind(place, "RayService")
    (port,), groups = users["ports"], serving(place)
    assert port["port"] == DEFAULT_HTTP_PORT
    doors = groups["doors"]["template"]
    # KubeRay adds the group, and no selector may name a cluster: in an upgrade both answer.
    assert users["selector"].items() <= {**doors["metadata"]["labels"], "ray.io/group": "doors"}.items()
    assert users["selector"]["ray.io/group"] == "doors"
    assert {"name": port["targetPort"], "containerPort": port["port"]} in doors["spec"]["containers"][0]["ports"]
    starts, answers = (doors["spec"]["containers"][0][f"{kind}Probe"] for kind in ("startup", "readiness"))
    assert (starts["httpGet"]["path"], answers["httpGet"]["path"]) == ("/ready", "/-/healthz")
    cluster = {"metadata": {"name": "a", "namespace": "b"}, "spec": service["spec"]["rayClusterConfig"]}
    types = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    args, counted = deployment(place), {name: types[name]["resources"] for name in ("engines", "doors")}
    assert counted["engines"]["CPU"] >= args.engine_cpus > counted["doors"]["CPU"]
    for resource, share in args.ingress_resources.items():
        assert counted["doors"][resource] >= share
        assert resource not in counted["engines"]
    for labels, pod in ray_pods(place):
        if labels["app.kubernetes.io/component"] != "serving":
            continue
        waits = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert (
            args.settings.upload_timeout_s + args.settings.deadline_s + GRACE_S
            < waits
            < pod["terminationGracePeriodSeconds"]
        )
    callers = next(one for one in of_kind(place, "NetworkPolicy") if one["metadata"]["name"] == "serving-clients")
    assert callers["spec"]["podSelector"]["matchLabels"]["ray.io/group"] == "doors"
    budgets = [one["spec"]["selector"]["matchLabels"] for one in of_kind(place, "PodDisruptionBudget")]
    assert {"engines", "doors"} <= {labels.get("ray.io/group") for labels in budgets}


def test_ports_and_paths_are_those_of_ray() -> None:
    ours = kuberay_pods
    assert ours.GCS_PORT == ray_constants.DEFAULT_PORT
    assert ours.DASHBOARD_PORT == ray_constants.DEFAULT_DASHBOARD_PORT
    assert ours.AGENT_PORT == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert ours.AUTOSCALER_METRICS_PORT == AUTOSCALER_METRIC_PORT
    assert ours.DASHBOARD_METRICS_PORT == DASHBOARD_METRIC_PORT
    assert ours.HEALTH_PATH in PUBLIC_EXACT_PATHS  # probes have no token
    assert Path(node_provider.IN_CLUSTER_TOKEN_PATH).parent == Path(ours.TOKEN_FOLDER)
    assert Path(node_provider.IN_CLUSTER_CA_CERT_PATH).parent == Path(ours.TOKEN_FOLDER)


@pytest.mark.parametrize("place", PLACES)
def test_ports_of_manifests_agree_with_each_other(place: str) -> None:
    known = {
        "gcs-server": kuberay_pods.GCS_PORT,
        "dashboard": kuberay_pods.DASHBOARD_PORT,
        "serve": DEFAULT_HTTP_PORT,
        "metrics": kuberay_pods.METRICS_PORT,
        "as-metrics": kuberay_pods.AUTOSCALER_METRICS_PORT,
        "dash-metrics": kuberay_pods.DASHBOARD_METRICS_PORT,
    }
    assert serve_config(place)["http_options"]["port"] == DEFAULT_HTTP_PORT
    for labels, pod in ray_pods(place):
        container = pod["containers"][0]
        assert {one["name"]: one["containerPort"] for one in container["ports"]}.items() <= known.items()
        assert "metrics" in {one["name"] for one in container["ports"]}  # what PodMonitors look for
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[name]["httpGet"]
            is_service = labels["app.kubernetes.io/component"] == "serving" and labels["ray.io/node-type"] == "worker"
            if is_service and name == "readinessProbe":
                assert (asked["path"], asked["port"]) == ("/-/healthz", DEFAULT_HTTP_PORT)
            elif labels["ray.io/group"] == "doors" and name == "startupProbe":
                assert (asked["path"], asked["port"]) == ("/ready", DEFAULT_HTTP_PORT)
            else:
                assert (asked["path"], asked["port"]) == (kuberay_pods.HEALTH_PATH, kuberay_pods.AGENT_PORT)
    listened = {one["containerPort"] for pod in pods(place) for one in values(pod, "ports") for one in one}
    for policy in of_kind(place, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            assert {one["port"] for one in rule.get("ports", ())} <= listened, policy["metadata"]["name"]


@pytest.mark.parametrize("place", PLACES)
def test_every_selector_finds_a_pod_and_every_pod_a_policy(place: str) -> None:
    labels = [worn for worn, _ in ray_pods(place)]
    labels += [one["spec"]["template"]["metadata"]["labels"] for one in of_kind(place, "StatefulSet", "Deployment")]
    labels += [one["spec"]["submitterPodTemplate"]["metadata"]["labels"] for one in of_kind(place, "RayJob")]
    labels += [scheduled_pod()[0]]

    def fits(selector: Mapping[str, Any], worn: Mapping[str, str]) -> bool:
        return selector.get("matchLabels", {}).items() <= worn.items()

    for one in of_kind(place, "NetworkPolicy", "PodDisruptionBudget"):
        selector = one["spec"].get("podSelector") or one["spec"].get("selector") or {}
        assert any(fits(selector, worn) for worn in labels), one["metadata"]["name"]
    for one in of_kind(place, "PodDisruptionBudget"):  # Kubernetes finds no scale of KubeRay's objects
        assert isinstance(one["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in one["spec"]
    deny = next(one for one in of_kind(place, "NetworkPolicy") if one["metadata"]["name"] == "deny-all")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for one in of_kind(place, "Service"):
        assert one["spec"].get("type", "ClusterIP") == "ClusterIP"
    for _, spec in clusters(place):
        assert spec["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"


@pytest.mark.parametrize("place", PLACES)
def test_only_the_autoscaler_reaches_the_api_server(place: str) -> None:
    for pod in pods(place):
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert kuberay_pods.TOKEN_FOLDER not in {one["mountPath"] for one in container["volumeMounts"]}
    for one in of_kind(place, "ServiceAccount"):
        assert one["automountServiceAccountToken"] is False
    for one in of_kind(place, "Role"):
        for rule in one["rules"]:
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            # But for the keys of a bucket that is in the namespace, which every job has anyway.
            if "secrets" in rule["resources"]:
                assert (place, rule["resourceNames"], rule["verbs"]) == ("overlays/local", ["cat-cluster-s3"], ["get"])
    assert not of_kind(place, "ClusterRole", "ClusterRoleBinding")


@pytest.mark.parametrize("place", PLACES)
def test_no_service_puts_its_address_into_a_pod(place: str) -> None:
    """Service `s3` would give SeaweedFS S3_PORT=tcp://..., which it reads as a setting of its own and stops."""
    found = list(pods(place))
    assert len(found) >= 7
    for pod in found:
        assert pod["enableServiceLinks"] is False, pod["containers"][0]["name"]
