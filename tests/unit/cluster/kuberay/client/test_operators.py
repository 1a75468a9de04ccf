"""KubeRay's operator is found however it was installed, and so are the feature gates that it is started with."""

from __future__ import annotations

from typing import Any

import pytest

from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.client.operators import find_operators, given_gates, operator_container
from tests.support.api_server import ApiServer, made


def deployment(its_name: str, *images: str, args: list[str] | None = None, **labels: str) -> dict[str, Any]:
    containers = [{"image": image, "args": args or []} for image in images]
    named = {f"app.kubernetes.io/{key}": value for key, value in labels.items()}
    return made("Deployment", its_name, "ops", labels=named, spec={"template": {"spec": {"containers": containers}}})


@pytest.mark.parametrize(
    ("one", "is_operator"),
    [
        (deployment("kuberay-operator", "mirror.example/a@sha256:0"), True),
        (deployment("prod-kuberay-operator", "mirror.example/a"), True),
        (deployment("ray", "mirror.example/a", name="kuberay-operator"), True),
        (deployment("ray", "mirror.example/a", name="kuberay", component="kuberay-operator"), True),
        (deployment("ray", "mesh:1", "quay.io/kuberay/operator:v1.7.0"), True),
        (deployment("ray", "mirror.example/kuberay-operator:7"), True),
        (deployment("kuberay-apiserver", "quay.io/kuberay/apiserver:v1.7.0", name="kuberay-apiserver"), False),
        (deployment("uses-it", "tools:1", args=["--namespace=kuberay-operator"]), False),
    ],
)
def test_an_operator_is_known_by_name_labels_or_image(
    one: dict[str, Any], is_operator: bool, api: Api, server: ApiServer
) -> None:
    server.put(one)
    found = find_operators(api)
    assert found is not None
    assert len(found) == is_operator


def test_who_may_not_list_deployments_sees_no_answer(api: Api, server: ApiServer) -> None:
    server.forbidden.add("deployments")
    assert find_operators(api) is None


def test_the_operator_is_not_what_was_put_beside_it() -> None:
    image = "quay.io/kuberay/operator:v1.7.0"
    assert operator_container(deployment("ray", "mesh:1", image))["image"] == image
    assert operator_container(deployment("kuberay-operator", "mirror.example/a"))["image"] == "mirror.example/a"


@pytest.mark.parametrize(
    ("args", "gates"),
    [
        (["--feature-gates=A=true,B=false", "--qps=1"], "A=true,B=false"),
        (["--feature-gates", "A=true", "--qps=1"], "A=true"),
        (["-feature-gates", "A=true"], "A=true"),
        (["--feature-gates=A=true", "--feature-gates=B=true"], "B=true"),
        (["--feature-gates"], ""),
        (["--config", "/etc/kuberay/config.yaml"], ""),
        (["--feature-gates-file=x"], ""),
        (["-c", "exec /manager --feature-gates=A=true,B=true --qps=1"], "A=true,B=true"),
        (["-c", "/manager --feature-gates 'A=true' --qps=1"], "A=true"),
        (["--feature-gates=A=true, B=true"], "A=true, B=true"),
    ],
)
def test_gates_are_read_as_go_reads_flags(args: list[str], gates: str) -> None:
    assert given_gates(deployment("ray", "kuberay/operator", args=args)) == gates
