"""A training service as an object of Kubernetes: how its cluster grows, what it runs, what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cat_cluster.cli import k8s_train_service, train_service
from cat_cluster.cli.k8s import k8s_app
from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.cluster.kuberay.rendering.sizes import Overrides
from cat_cluster.cluster.kuberay.rendering.train_service import (
    TrainServiceOptions,
    render_train_service,
    sizes_of_service,
)
from cat_cluster.errors import SpecError
from cat_cluster.spec.sections import ClusterSpec

BUCKET = "s3://bucket/prod"


def options(**changes: Any) -> TrainServiceOptions:
    fields: dict[str, Any] = {
        "storage": BUCKET,
        "service": ("--storage", BUCKET),
        "groups": (1, 1),
        "cluster": ClusterSpec(),
        "bases": ("pocket",),
    }
    return TrainServiceOptions(**{**fields, **changes})


def workers_of(groups: tuple[int, int], workers: int = 1, **changes: Any) -> dict[str, Any]:
    cluster = ClusterSpec(workers=workers)
    ray_job = render_train_service(options(groups=groups, cluster=cluster, **changes))
    found: dict[str, Any] = ray_job["spec"]["rayClusterSpec"]
    return found


@pytest.mark.parametrize(
    ("groups", "workers", "evaluations", "least", "most"),
    [((1, 1), 1, 1, 2, 2), ((1, 4), 2, 1, 3, 9), ((0, 4), 2, 3, 5, 11), ((2, 2), 1, 2, 4, 4)],
)
def test_the_cluster_has_room_for_groups_and_what_is_measured_beside_them(
    groups: tuple[int, int], workers: int, evaluations: int, least: int, most: int
) -> None:
    cluster = workers_of(groups, workers, evaluations=evaluations)
    [group] = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (least, most)
    assert group.get("replicas") == (None if most > least else least), "the autoscaler's are its own"
    assert cluster.get("enableInTreeAutoscaling", False) == (most > least)


def test_it_has_no_end_and_goes_on_after_the_loss_of_its_cluster() -> None:
    spec = render_train_service(options(groups=(1, 4)))["spec"]
    assert "activeDeadlineSeconds" not in spec
    assert min(spec["backoffLimit"], spec["submitterConfig"]["backoffLimit"]) >= 1000


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (0, 4)])
def test_every_one_is_what_the_operator_takes(groups: tuple[int, int], gpu: bool) -> None:
    ray_job = render_train_service(options(groups=groups, gpu=gpu, image="registry.example/cats:7", name="night"))
    assert not check_manifests([Document("service", 1, ray_job)], load_schemas())


def test_a_pod_has_room_for_a_full_group_of_the_largest_base() -> None:
    def mib(**changes: Any) -> float:
        memory = sizes_of_service(options(**changes)).worker_memory
        return float(memory.removesuffix("Gi")) * 1024 if memory.endswith("Gi") else float(memory.removesuffix("Mi"))

    one, many = ClusterSpec(max_pack=1), ClusterSpec(max_pack=32)
    assert mib(cluster=one) < mib(cluster=many)
    assert mib(bases=("pocket", "stable-diffusion-v1-5/stable-diffusion-v1-5")) > mib()
    given = sizes_of_service(options(sizes=Overrides(worker_memory="1Gi")))
    assert [given.worker_memory, len(given.warnings)] == ["1Gi", 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "file:///data"}, "storage: file:///data is a folder"),
        ({"bases": ()}, "--base: "),
        ({"bases": ("/models/sd15",)}, "base: /models/sd15 is a folder"),
        ({"name": "Cats"}, "--name Cats"),
        ({"namespace": "Cats"}, "namespace"),
        ({"image": "no image"}, "--image"),
    ],
)
def test_what_no_cluster_could_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        render_train_service(options(**changes))


def test_the_command_writes_what_runs_the_same_service(tmp_path: Path) -> None:
    out = tmp_path / "service.yaml"
    given = ["--base", "pocket", "--groups", "1:3", "--max-pack", "4", "--owner-limit", "ann lee=2", "--name", "night"]
    command = ["train-service", "--storage", BUCKET, *given, "--gpu", "--out", str(out)]
    written = CliRunner().invoke(k8s_app, command)
    assert written.exit_code == 0, written.output
    ray_job = yaml.safe_load(out.read_text())
    assert ray_job["metadata"]["name"] == "night"
    assert ray_job["spec"]["entrypoint"] == (
        f"python -m jobs.train_service --storage {BUCKET} --name night --groups 1:3 --workers 1 --max-pack 4 "
        "--checkpoint-every 50 --owner-limit 'ann lee=2' --base pocket"
    )
    assert CliRunner().invoke(k8s_app, ["train-service", "--storage", BUCKET, "--groups", "2:1"]).exit_code != 0


def test_the_command_has_every_option_of_the_service_with_the_same_default() -> None:
    here, there = (inspect.signature(one.train_service).parameters for one in (train_service, k8s_train_service))
    shared = here.keys() - {"address", "storage"}  # where Ray is, and a folder, are not asked in Kubernetes
    assert {name: here[name] for name in shared} == {name: there[name] for name in shared}
