"""The manifests of k8s/, offline: what the pods ask for, and what they may."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, render_job
from cat_cluster.cluster.kuberay.rendering.sizes import quantity
from cat_cluster.spec.job import parse_spec
from tests.support.manifests import (
    PLACES,
    ROOT,
    clusters,
    deployment,
    of_kind,
    ray_pods,
    serve_config,
    serving,
)


@pytest.mark.parametrize("place", PLACES)
def test_the_service_has_room_for_a_second_version_of_itself(place: str) -> None:
    args, groups = deployment(place), serving(place)
    engines, doors = groups["engines"], groups["doors"]
    limits = engines["template"]["spec"]["containers"][0]["resources"]["limits"]
    each = int(int(limits["cpu"]) // args.engine_cpus)
    if args.engine_gpus:
        each = min(each, int(int(limits["nvidia.com/gpu"]) // args.engine_gpus))
    assert each == 1 or args.most_engines == 1  # else the loss of a pod is that of two engines
    assert engines["minReplicas"] * each >= args.min_engines
    assert engines["maxReplicas"] * each >= 2 * args.most_engines
    ((resource, share),) = args.ingress_resources.items()
    each = int(float(doors["resources"][resource]) // share)
    assert doors["minReplicas"] == args.ingresses  # each a door of its own, also where a new version has room beside it
    assert doors["maxReplicas"] * each >= 2 * args.ingresses


@pytest.mark.parametrize("place", PLACES)
def test_pods_have_limits_and_no_root_they_could_write_to(place: str) -> None:
    for _, pod in ray_pods(place):
        container = pod["containers"][0]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        empty = {one["name"] for one in pod["volumes"] if "emptyDir" in one}
        home = next(one["value"] for one in container["env"] if one["name"] == "HOME")
        assert mounted["/tmp"] in empty
        assert mounted[home] in empty
        assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys() >= {"cpu", "memory"}
    config = serve_config(place)["applications"][0]["args"]["settings"]
    assert config["disk_cache"].startswith("/scratch/")


def requests(*containers: dict[str, Any], pods: int = 1) -> Counter[str]:
    """What pods of these containers ask for: CPUs, and bytes of memory."""
    found: Counter[str] = Counter()
    for one in containers:
        for name, text in one["resources"]["requests"].items():
            amount = quantity(text)
            assert amount is not None, text
            found[name] += float(amount) * pods  # type: ignore[assignment]
    return found


def cluster_requests(spec: dict[str, Any]) -> Counter[str]:
    """What a Ray cluster asks for that has no more workers than it must."""
    scaler = [spec["autoscalerOptions"]] if spec.get("enableInTreeAutoscaling") else []
    found = requests(*spec["headGroupSpec"]["template"]["spec"]["containers"], *scaler)
    for group in spec["workerGroupSpecs"]:
        found += requests(*group["template"]["spec"]["containers"], pods=group["minReplicas"])
    return found


def test_all_of_operations_at_once_fits_a_small_machine() -> None:
    """Overlay local with its service, standing cluster and S3 server, and a job, on 4 cores and 16 GiB."""
    text = (ROOT / "jobs" / "specs" / "single.yaml").read_text().replace("../../out/demo/", "s3://cat-storage/")
    ray_job = render_job(parse_spec(text.encode(), "single.yaml"), "s3://cat-storage/prod", RenderOptions())
    found = cluster_requests(ray_job["spec"]["rayClusterSpec"])
    found += requests(*ray_job["spec"]["submitterPodTemplate"]["spec"]["containers"])
    for one, spec in clusters("overlays/local"):
        found += cluster_requests(spec) if not one["spec"].get("suspend") else Counter()
    for one in of_kind("overlays/local", "StatefulSet", "Deployment"):
        found += requests(*one["spec"]["template"]["spec"]["containers"], pods=one["spec"]["replicas"])
    assert 2 < found["cpu"] <= 4
    assert 8 << 30 < found["memory"] <= 12 << 30


def test_training_cannot_take_what_serving_needs() -> None:
    for place in PLACES:
        (quota,) = of_kind(place, "ResourceQuota")
        (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
        assert scope == {"scopeName": "PriorityClass", "operator": "In", "values": ["cat-cluster-training"]}
        training = next(one for one in of_kind(place, "PriorityClass") if "training" in one["metadata"]["name"])
        assert training["preemptionPolicy"] == "Never"
        spot = [pod for labels, pod in ray_pods(place) if "tolerations" in pod and labels["ray.io/node-type"] == "head"]
        assert not spot  # a head on a machine that is taken away takes its cluster along
