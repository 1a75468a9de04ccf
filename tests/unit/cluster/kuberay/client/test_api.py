"""The client of an API server, against one over HTTP that keeps objects in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cat_cluster.cluster.kuberay.client.api import Api, open_api
from cat_cluster.errors import KubernetesError, SpecError
from tests.support.api_server import ApiServer, api_server


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


@pytest.fixture
def api(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
    return open_api(namespace="cat-cluster")


def job(name: str, **labels: str) -> dict[str, object]:
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name, "labels": labels}, "spec": {}}


def test_an_object_is_applied_found_and_deleted(api: Api, server: ApiServer) -> None:
    api.apply(job("tea"))
    assert api.get("ray.io/v1", "RayJob", "tea")["metadata"]["name"] == "tea"  # type: ignore[index]
    assert "PATCH /apis/ray.io/v1/namespaces/cat-cluster/rayjobs/tea?fieldManager=cat-cluster&force=true" in "".join(
        server.asked
    )
    assert api.delete("ray.io/v1", "RayJob", "tea")
    assert not api.delete("ray.io/v1", "RayJob", "tea")
    assert api.get("ray.io/v1", "RayJob", "tea") is None


def test_a_dry_run_makes_nothing(api: Api) -> None:
    api.apply(job("tea"), dry_run=True)
    api.create(job("cup"), dry_run=True)
    assert api.list("ray.io/v1", "RayJob") == []


def test_objects_are_found_by_labels(api: Api) -> None:
    api.apply(job("tea", kind="a"))
    api.apply(job("cup", kind="b"))
    assert [one["metadata"]["name"] for one in api.list("ray.io/v1", "RayJob", labels="kind=b")] == ["cup"]


def test_a_kind_that_is_not_installed(api: Api, server: ApiServer) -> None:
    del server.kinds["ray.io/v1"]
    assert api.get("ray.io/v1", "RayJob", "tea") is None
    assert api.list("ray.io/v1", "RayJob") == []
    with pytest.raises(KubernetesError, match=r"no kind RayJob of ray\.io/v1: KubeRay is not installed"):
        api.apply(job("tea"))


def test_a_missing_right_names_the_role(api: Api, server: ApiServer) -> None:
    server.forbidden.add("rayjobs")
    with pytest.raises(
        KubernetesError, match=r'a right is missing to list rayjobs .*User "ada".*Role training-jobs'
    ) as hit:
        api.list("ray.io/v1", "RayJob")
    assert hit.value.status == 403
    assert not api.allows("list", "ray.io", "rayjobs")
    assert api.allows("list", "", "pods")


def test_a_refusal_says_what_the_server_says(api: Api, server: ApiServer) -> None:
    server.refused["PATCH rayjobs"] = (422, "spec.entrypoint: required")
    with pytest.raises(KubernetesError, match=r"refuses to apply RayJob tea .*: spec\.entrypoint: required"):
        api.apply(job("tea"))


def test_a_log_is_text(api: Api, server: ApiServer) -> None:
    server.logs["pod"] = "one\ntwo\n"
    assert "".join(api.log("pod", "ray-head")) == "one\ntwo\n"


def test_a_server_that_is_away(api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = ApiServer(url="http://127.0.0.1:9")
    monkeypatch.setenv("KUBECONFIG", str(nowhere.kubeconfig(tmp_path)))
    with pytest.raises(KubernetesError, match=r"http://127\.0\.0\.1:9 of context test cannot be reached: .*refused"):
        open_api().version()


def test_the_namespace_is_the_contexts_own_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(ApiServer(url="http://127.0.0.1:9").kubeconfig(tmp_path, namespace="team")))
    assert open_api().namespace == "team"
    assert open_api(namespace="other").namespace == "other"


def test_an_unknown_context_and_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(ApiServer(url="http://127.0.0.1:9").kubeconfig(tmp_path)))
    with pytest.raises(SpecError, match="--context prod: kubeconfig has none of this name; it has test"):
        open_api("prod")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(SpecError, match=r"no cluster is configured: .*; set KUBECONFIG"):
        open_api()
