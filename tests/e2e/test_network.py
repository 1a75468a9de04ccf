"""Network policies, budgets and quota, tried from inside."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Figures
from tests.support.kubernetes import (
    CLIENTS,
    IMAGE,
    NAMESPACE,
    ROOT,
    STRANGERS,
    Json,
    command,
    documented,
    is_ready,
    name_of,
    objects,
    pods,
    run_in,
    shell,
    wait_until,
)

# Which of the targets each kind of pod reaches; all the others are closed to it.
REACHED = {
    "training head": {"training head", "S3 server", "API server"},
    "training worker": {"training head", "S3 server"},
    "serving head": {"serving head", "S3 server", "API server", "door"},
    "engine": {"serving head", "S3 server", "door"},
    "door": {"serving head", "S3 server", "door"},
    "client": {"door"},
    "stranger": set[str](),
}
CONNECT = """
import json, socket, sys
reached = []
for name, address in json.loads(sys.argv[1]).items():
    try:
        socket.create_connection(tuple(address), timeout=3).close()
        reached.append(name)
    except OSError:
        pass
print(json.dumps(reached))
"""
QUERY = """
import json, sys, urllib.error, urllib.parse, urllib.request
url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": sys.argv[1]})
try:
    print(json.dumps(json.load(urllib.request.urlopen(url, timeout=5))["data"]))
except urllib.error.URLError:  # not up yet
    print(json.dumps({"result": []}))
"""


def pod_of(kind: str) -> Json:
    labels = {
        "training head": "ray.io/cluster=cat-training,ray.io/node-type=head",
        "training worker": "ray.io/cluster=cat-training,ray.io/node-type=worker",
        "serving head": "app.kubernetes.io/component=serving,ray.io/node-type=head",
        "engine": "app.kubernetes.io/component=serving,ray.io/group=engines",
        "door": "app.kubernetes.io/component=serving,ray.io/group=doors",
        "S3 server": "app.kubernetes.io/name=s3",
    }
    return next(pod for pod in pods(labels[kind]) if is_ready(pod))


@pytest.fixture(scope="module")
def outsiders() -> Iterator[dict[str, list[str]]]:
    """A pod that waits in each namespace beside the project's: kubectl's words to run something in it."""
    found = {}
    for kind, namespace in (("client", CLIENTS), ("stranger", STRANGERS)):
        words = ["kubectl", "-n", namespace]
        command(*words, "delete", "pod", "outsider", "--ignore-not-found", "--now", "--wait")
        done = command(*words, "run", "outsider", "--image", IMAGE, "--command", "--", "sleep", "3600")
        assert done.returncode == 0, done.stderr
        wait = command(*words, "wait", "pod/outsider", "--for=condition=Ready", "--timeout=120s")
        assert wait.returncode == 0, wait.stderr
        found[kind] = ["-n", namespace, "exec", "outsider"]
    yield found
    for namespace in (CLIENTS, STRANGERS):
        command("kubectl", "-n", namespace, "delete", "pod", "outsider", "--now", "--wait=false")


def test_the_network_policies(outsiders: dict[str, list[str]], figures: Figures) -> None:
    """Network policies, from inside pods: what is named is reached and nothing else"""

    def address(kind: str, port: int) -> list[object]:
        return [pod_of(kind)["status"]["podIP"], port]

    targets = {
        "training head": address("training head", 6379),
        "serving head": address("serving head", 6379),
        "door": address("door", 8000),
        "S3 server": address("S3 server", 8333),
        "API server": ["kubernetes.default.svc", 443],
        "dashboard": address("training head", 8265),
        "metadata": ["169.254.169.254", 80],
    }
    ours = {name: targets[name] for name in targets if name not in ("API server", "metadata")}
    found = {}
    for kind in REACHED:
        words = outsiders.get(kind) or ["-n", NAMESPACE, "exec", name_of(pod_of(kind))]
        # Where outsiders may go beside that is their own namespaces' affair.
        found[kind] = set(run_in(words, CONNECT, json.dumps(ours if kind in outsiders else targets)))
    training = {"training head", "training worker"}  # whose own dashboard is open to them
    expected = {kind: reached | ({"dashboard"} if kind in training else set()) for kind, reached in REACHED.items()}
    assert found == expected
    figures[""] = f"{(len(REACHED) - len(outsiders)) * len(targets) + len(outsiders) * len(ours)} pairs"


def test_what_may_be_evicted(figures: Figures) -> None:
    """Budgets: evicting the last engine, the last door or a head is refused, a worker that trains may go"""
    refused = {}
    for kind in ("training head", "training worker", "serving head", "engine", "door"):
        name = name_of(pod_of(kind))
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "deleteOptions": {"dryRun": ["All"]},
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/eviction"
        done = command("kubectl", "create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
        refused[kind] = done.returncode != 0 and "disruption budget" in done.stderr
    assert refused == {**dict.fromkeys(refused, True), "training worker": False}
    figures[""] = f"{sum(refused.values())} refused, 1 allowed"


def scraped_from(pod: Json) -> Json:
    """What Prometheus would find out of a pod by asking the API server, which Debian's cannot."""
    labels = pod["metadata"]["labels"]
    known = ("app.kubernetes.io/part-of", "ray.io/node-type", "ray.io/cluster")
    found = {
        "pod_phase": pod["status"]["phase"],
        "pod_name": name_of(pod),
        "namespace": NAMESPACE,
        "pod_container_port_name": "metrics",
        **{f"pod_label_{re.sub('[^a-z]', '_', label)}": labels[label] for label in known},
    }
    return {
        "targets": [f"{pod['status']['podIP']}:8080"],
        "labels": {f"__meta_kubernetes_{name}": value for name, value in found.items()},
    }


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[list[str]]:
    """A plain Prometheus with the project's settings in namespace `monitoring`: kubectl's words to ask beside it.

    Its binary is that of this machine, since a cluster may have no way to a registry.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("this machine has no Prometheus to put into a pod")
    settings = yaml.safe_load((ROOT / "k8s" / "monitoring" / "prometheus.yaml").read_text(encoding="utf-8"))
    ray_pods = settings["scrape_configs"][0]
    del ray_pods["kubernetes_sd_configs"]
    ray_pods["static_configs"] = [scraped_from(pod) for pod in ready_ray_pods()]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    words = ["kubectl", "-n", "monitoring"]
    command("kubectl", "create", "namespace", "monitoring")
    command(*words, "delete", "pod", "prometheus", "--ignore-not-found", "--now", "--wait")
    done = command(*words, "run", "prometheus", "--image", IMAGE, "--command", "--", "sleep", "600")
    assert done.returncode == 0, done.stderr
    wait = command(*words, "wait", "pod/prometheus", "--for=condition=Ready", "--timeout=120s")
    assert wait.returncode == 0, wait.stderr
    for file in (binary, tmp_path / "prometheus.yaml", "k8s/monitoring/rules.yaml"):
        copied = command(*words, "cp", str(file), f"prometheus:/tmp/{Path(file).name}")
        assert copied.returncode == 0, copied.stderr
    start = "chmod +x prometheus && nohup ./prometheus --config.file=prometheus.yaml --storage.tsdb.path=data >log 2>&1"
    begun = command(*words, "exec", "prometheus", "--", "sh", "-c", f"cd /tmp && {start} &")
    assert begun.returncode == 0, begun.stderr
    ready = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9090/-/ready')"
    answers = [*words, "exec", "prometheus", "--", "python", "-c", ready]
    wait_until("Prometheus", lambda: command(*answers).returncode == 0, 90)
    yield ["-n", "monitoring", "exec", "prometheus"]
    command(*words, "delete", "pod", "prometheus", "--now", "--wait=false")


def ready_ray_pods() -> list[Json]:
    return [pod for pod in pods("app.kubernetes.io/part-of=cat-cluster,ray.io/is-ray-node=yes") if is_ready(pod)]


def test_the_metrics_are_scraped_through_the_policy(prometheus: list[str], figures: Figures) -> None:
    """A plain Prometheus in namespace `monitoring` scrapes every Ray node"""
    wanted = {name_of(pod) for pod in ready_ray_pods()}

    def silent() -> set[str]:
        """Nodes that say nothing; those of a finished job may have gone meanwhile."""
        series = run_in(prometheus, QUERY, 'up{job="cat-cluster"}')["result"]
        up = {one["metric"]["pod"] for one in series if one["value"][1] == "1"}
        return wanted & {name_of(pod) for pod in ready_ray_pods()} - up

    wait_until("what every node says", lambda: not silent(), 90, 5)
    metrics = run_in(prometheus, QUERY, 'count(count by (__name__) ({job="cat-cluster", __name__=~"ray_cat_.*"}))')
    figures[""] = f"{len(wanted)} nodes, {metrics['result'][0]['value'][1]} metrics of the project"


def test_the_operator_of_prometheus_takes_the_monitors() -> None:
    """Step 8: monitors, rules and dashboards, on a server with the kinds of the Prometheus operator"""
    kinds = ("podmonitors.monitoring.coreos.com", "prometheusrules.monitoring.coreos.com")
    if command("kubectl", "get", "crd", *kinds).returncode != 0:
        pytest.skip("the cluster has no kinds of the Prometheus operator")
    with shell(documented("**8. Metrics.**")[0]) as done:
        assert done.returncode == 0, done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower(), done.stderr
    assert {name_of(one) for one in objects("podmonitors")} == {"cat-cluster-head", "cat-cluster-workers"}
