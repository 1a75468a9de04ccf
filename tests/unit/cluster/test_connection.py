"""Which Ray a job is driven on: what cannot be a cluster's address is refused in a sentence, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from cat_cluster.cluster import connection
from cat_cluster.cluster.connection import ClusterSize, await_workers, check_size, cluster_address, ray_connection
from cat_cluster.cluster.driver import run_on_ray
from cat_cluster.errors import ClusterError, SpecError
from cat_cluster.settings import load_settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.spec.sections import ClusterSpec

REFUSED = [
    ("http://127.0.0.1:8265", "`cat-cluster submit SPEC --address http://127.0.0.1:8265`"),
    ("https://ray.example.com/x", "`cat-cluster submit SPEC --address https://ray.example.com/x`"),
    ("HTTP://127.0.0.1:8265", "`cat-cluster submit SPEC"),
    ("ray://10.0.0.5:10001", "`cat-cluster submit`"),
    ("garbage", "write host:port of its head, such as 10.0.0.5:6379"),
    ("host:port", "write host:port of its head"),
    ("host:99999", "write host:port of its head"),
    ("host:0", "write host:port of its head"),
    (":6379", "write host:port of its head"),
    ("foo://host:6379", "write host:port of its head"),
    ("a b:6379", "write host:port of its head"),
    ("user@host:6379", "write host:port of its head"),
    ("host:6379/path", "write host:port of its head"),
    ("[::1:6379", "write host:port of its head"),
]


@pytest.mark.parametrize(("address", "remedy"), REFUSED)
def test_what_is_no_address_of_a_cluster_is_refused_with_its_remedy(address: str, remedy: str) -> None:
    for given, name, here in (
        (None, f"RAY_ADDRESS={address}: ", "or unset RAY_ADDRESS to start Ray on this machine"),
        (address, f"--address {address}: ", "or leave it out to start Ray on this machine"),
    ):
        with pytest.raises(ClusterError) as refused:
            cluster_address(given, {"RAY_ADDRESS": address})
        message = str(refused.value)
        assert message.startswith(name)
        assert message.endswith(here)
        assert remedy in message
        assert "\n" not in message


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "head.cluster:6379", "localhost:1", "[::1]:6379", "auto"])
def test_an_address_is_taken_from_the_option_before_the_environment(address: str) -> None:
    assert cluster_address(address, {"RAY_ADDRESS": "http://else:1"}) == address
    assert cluster_address(None, {"RAY_ADDRESS": f" {address}"}) == address
    assert cluster_address("", {"RAY_ADDRESS": address}) == address


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": " "}, {"RAY_ADDRESS": "local"}])
def test_without_an_address_ray_starts_here_in_a_folder_that_it_can_use(environment: dict[str, str]) -> None:
    assert cluster_address(None, {**environment, "RAY_TMPDIR": "/tmp"}) is None
    with pytest.raises(ClusterError, match="RAY_TMPDIR"):
        cluster_address(None, {**environment, "RAY_TMPDIR": f"/tmp/{'a' * 90}"})


def test_a_cluster_that_runs_elsewhere_needs_no_folder_here() -> None:
    assert cluster_address("10.0.0.5:6379", {"TMPDIR": "/dev/null/x"}) == "10.0.0.5:6379"


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_TMPDIR"])
def test_a_job_is_refused_before_its_photos_are_read(
    tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv(variable, f"http://127.0.0.1:8265/{'a' * 90}")
    concepts = [{"token": "sks", "class_noun": "cup", "images": str(tmp_path / "no-such-folder")}]
    job = JobSpec.model_validate({"name": "one", "adapters": [{"id": "one", "concepts": concepts}]})
    with pytest.raises(ClusterError, match=variable):
        run_on_ray(job, str(tmp_path / "storage"), load_settings(), None)  # type: ignore[arg-type]
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("address", "raised", "told"),
    [
        (None, Exception("The node timed out.\nand more"), "Ray did not start on this machine: The node timed out; "),
        (None, OSError("no space"), "Ray did not start on this machine: no space; "),
        (
            "auto",
            ConnectionError("Could not find any.\nmore"),
            "no Ray cluster runs on this machine, .*`ray start --head`",
        ),
        (
            "10.0.0.5:1",
            ConnectionError("Failed to connect:\nmore"),
            "no Ray cluster at 10.0.0.5:1: Failed to connect; ",
        ),
    ],
)
def test_what_ray_says_is_one_sentence_with_its_remedy(
    address: str | None, raised: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ClusterError, match=f"^{told}") as refused, ray_connection(address):
        pass
    assert "\n" not in str(refused.value)


ALIVE, LOST, IDLE = {"Alive": True}, {"Alive": False, "DeathReason": 2}, {"Alive": False, "DeathReason": 4}


def cluster_of_two() -> ClusterSpec:
    return ClusterSpec(workers=2)


def small_cluster(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, object]], *cpus: float) -> None:
    """A cluster that has so many CPUs when it is asked, one time after the other."""
    left = list(cpus)
    monkeypatch.setattr(connection.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(connection.ray, "cluster_resources", lambda: {"CPU": left.pop(0)})
    monkeypatch.setattr(connection.time, "sleep", lambda _: None)


def test_a_lost_machine_is_waited_for_until_the_job_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    small_cluster(monkeypatch, [ALIVE, LOST], 1.0, 3.0)
    said: list[str] = []
    assert await_workers(cluster_of_two(), ClusterSize(0.0, 0.0), said.append) == ClusterSize(3.0, 0.0)
    (line,) = said
    assert line.startswith("the cluster has lost a machine or pod, and has too few CPUs for 2 workers: waiting 180 s")


def test_one_that_does_not_come_is_not_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    small_cluster(monkeypatch, [ALIVE, LOST], 1.0, 1.0, 1.0)
    times = iter([0.0, 1.0, 2.0, connection.REPLACED_SECONDS])
    monkeypatch.setattr(connection.time, "monotonic", lambda: next(times))
    assert await_workers(cluster_of_two(), ClusterSize(0.0, 0.0), lambda _: None) == ClusterSize(1.0, 0.0)


@pytest.mark.parametrize(("nodes", "cpus"), [([ALIVE], 0.0), ([ALIVE, IDLE], 0.0), ([ALIVE, LOST], 2.0)])
def test_nothing_is_waited_for_where_nothing_was_lost_or_the_job_fits(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, object]], cpus: float
) -> None:
    small_cluster(monkeypatch, nodes)
    size = ClusterSize(cpus, 0.0)
    assert await_workers(cluster_of_two(), size, pytest.fail) == size


@pytest.mark.parametrize(
    ("cpus", "remedy"),
    [(0.0, "has 0: let the cluster grow first"), (1.0, "has 1: ask for at most 1, or let the cluster grow first")],
)
def test_no_less_than_one_worker_is_proposed(cpus: float, remedy: str) -> None:
    with pytest.raises(SpecError, match=f"{remedy}$"):
        check_size(cluster_of_two(), "s3://bucket/prod", ClusterSize(cpus, 0.0))
