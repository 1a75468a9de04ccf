"""The client of an API server, against one over HTTP that keeps objects in memory."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from cat_cluster.cluster.kuberay.client.api import Api, open_api
from cat_cluster.errors import KubernetesError, SpecError
from tests.support.api_server import ApiServer


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


def test_a_character_may_be_in_two_pieces_of_a_log(api: Api, server: ApiServer) -> None:
    server.logs["pod"] = "a" * 65535 + "ä€\n"  # pieces are of 64 KiB
    assert "".join(api.log("pod", "ray-head")) == server.logs["pod"]


def test_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = ApiServer(url="http://127.0.0.1:9")
    monkeypatch.setenv("KUBECONFIG", str(nowhere.kubeconfig(tmp_path)))
    with pytest.raises(KubernetesError, match=r"http://127\.0\.0\.1:9 of context test cannot be reached: .*refused"):
        open_api(None, "cat-cluster").version()


def test_a_connection_that_breaks_off_within_a_reply(api: Api, server: ApiServer) -> None:
    server.cut = 3
    with pytest.raises(KubernetesError, match=r"cannot be reached: .*Connection broken"):
        api.list("ray.io/v1", "RayJob")


@pytest.mark.parametrize("page", ["<html>log in</html>", "", "[]"])
def test_what_is_no_api_server_is_named(api: Api, server: ApiServer, page: str) -> None:
    server.answer = lambda *_: (200, page)  # type: ignore[method-assign]
    with pytest.raises(KubernetesError, match=r"\(context test\) is no API server of Kubernetes, or a proxy before it"):
        api.list("ray.io/v1", "RayJob")


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (520, "", "HTTP status 520"),
        (503, f"<html>{'x' * 5000}</html>", "<html>x{194}$"),
        (422, {"message": "wrong", "details": {"causes": ["text"]}}, "wrong"),
    ],
)
def test_refusals_of_another_form(api: Api, server: ApiServer, status: int, body: object, says: str) -> None:
    server.answer = lambda *_: (status, body)  # type: ignore[method-assign]
    with pytest.raises(KubernetesError, match=says) as hit:
        api.version()
    assert hit.value.status == status


def test_who_has_no_credentials_logs_in(api: Api, server: ApiServer) -> None:
    server.refused["GET rayjobs"] = (403, 'rayjobs is forbidden: User "system:anonymous" cannot list resource')
    with pytest.raises(KubernetesError, match="does not know who asks: log in to context test again"):
        api.list("ray.io/v1", "RayJob")


def test_a_list_whose_rest_has_expired_is_asked_for_as_a_whole(api: Api, server: ApiServer) -> None:
    everything = {"items": [job("tea"), job("cup")], "metadata": {}}
    first = {"items": [job("tea")], "metadata": {"continue": "there"}}
    answer = server.answer

    def pages(method: str, path: str, query: Mapping[str, str], body: object) -> tuple[int, object]:
        if not path.endswith("/rayjobs"):
            return answer(method, path, query, None)
        if "limit" not in query:
            return 200, everything
        return (410, {"message": "too old"}) if "continue" in query else (200, first)

    server.answer = pages  # type: ignore[method-assign]
    assert [one["metadata"]["name"] for one in api.list("ray.io/v1", "RayJob")] == ["tea", "cup"]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_what_is_no_name_asks_about_nothing_else(api: Api, server: ApiServer, name: str) -> None:
    server.put(job("tea"))  # type: ignore[arg-type]
    assert api.get("ray.io/v1", "RayJob", name) is None
    with pytest.raises(KubernetesError, match="can be no name"):
        api.delete("ray.io/v1", "RayJob", name)
    assert not any("/rayjobs" in asked for asked in server.asked)


@pytest.mark.parametrize("version", ["apps/", "a/b/c", ""])
def test_what_is_no_api_version_has_no_kinds(api: Api, server: ApiServer, version: str) -> None:
    server.answer = lambda *_: (200, {"kind": "APIGroup"})  # type: ignore[method-assign]
    assert api.resource(version, "Deployment") is None


@pytest.mark.parametrize("namespace", ["", ".", "Team", "a/b", "x" * 64])
def test_what_is_no_namespace(namespace: str) -> None:
    with pytest.raises(SpecError, match=r"--namespace .*: must hold a-z, 0-9 and -"):
        open_api(None, namespace)


@pytest.mark.parametrize(
    ("ahead", "date"),
    [
        (timedelta(hours=1), None),
        (timedelta(minutes=-10), None),
        (timedelta(0), ""),
        (timedelta(0), "yesterday"),
        (timedelta(0), "Sun, 29 Nov 2026 16:00:00 +99999999999999"),
        (timedelta(0), "Sun, 29 Nov 99999999999999999999 16:00:00 GMT"),
    ],
)
def test_the_time_is_that_of_the_server(ahead: timedelta, date: str | None, api: Api, server: ApiServer) -> None:
    server.date = format_datetime(datetime.now(UTC) + ahead, usegmt=True) if date is None else date
    api.version()
    assert abs(api.now() - datetime.now(UTC) - ahead) < timedelta(seconds=5)


def test_clocks_that_agree_are_not_corrected_by_the_rest_of_a_second(api: Api, server: ApiServer) -> None:
    server.date = format_datetime(datetime.now(UTC) - timedelta(seconds=1), usegmt=True)
    api.version()
    assert abs(api.now() - datetime.now(UTC)) < timedelta(seconds=0.1)
