"""An engine waits for a door when its application starts, and at no other time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import pytest
from ray import serve as ray_serve
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from serve import doors

STARTING = {"Ingress": "STARTING", "Engine": "STARTING"}
OPEN = {"Ingress": "RUNNING", "Engine": "STARTING"}


def status(application: str, deployments: dict[str, str], *proxies: str) -> ServeStatus:
    each = {
        name: DeploymentStatusOverview(
            status="HEALTHY", status_trigger="CONFIG_UPDATE_STARTED", replica_states={state: 1}, message=""
        )
        for name, state in deployments.items()
    }
    overview = ApplicationStatusOverview(
        status=application,
        message="",
        last_deployed_time_s=0.0,
        deployments=each,  # type: ignore[arg-type]
    )
    return ServeStatus(
        proxies={str(place): proxy for place, proxy in enumerate(proxies)},  # type: ignore[misc]
        applications={"cats": overview},
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ServeStatus]:
    """What Ray Serve says, one after the other, the last for ever; what was asked for goes."""
    found: list[ServeStatus] = []
    monkeypatch.setattr(ray_serve, "status", lambda: found.pop(0) if len(found) > 1 else found[0])
    monkeypatch.setattr(doors, "_POLL_S", 0.001)
    monkeypatch.setattr(doors, "PROPAGATION_S", 0.0)
    return found


def wait(seen: list[ServeStatus], statuses: Iterable[ServeStatus]) -> int:
    """Wait for the doors; how many of the statuses were needed."""
    given = list(statuses)
    seen[:] = [*given, given[-1]]
    asyncio.run(doors.doors_open("cats", "Ingress"))
    return len(given) + 1 - len(seen)


def test_an_application_that_runs_waits_for_nothing(seen: list[ServeStatus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "PROPAGATION_S", 3600.0)
    assert wait(seen, [status("RUNNING", STARTING, "STARTING")]) == 1


def test_it_waits_for_an_ingress_and_for_the_proxies(seen: list[ServeStatus]) -> None:
    assert (
        wait(
            seen,
            [
                ServeStatus(),
                status("DEPLOYING", {}, "HEALTHY"),
                status("DEPLOYING", STARTING, "HEALTHY", "HEALTHY"),
                status("DEPLOYING", OPEN, "HEALTHY", "STARTING"),
                status("DEPLOYING", OPEN, "UNHEALTHY"),
                status("DEPLOYING", OPEN, "HEALTHY", "DRAINING"),
            ],
        )
        == 6
    )


def test_then_the_time_that_a_service_needs_to_know(seen: list[ServeStatus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "PROPAGATION_S", 3600.0)
    seen[:] = [status("DEPLOYING", OPEN, "HEALTHY")]
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(doors.doors_open("cats", "Ingress"), 0.2))


def test_a_door_that_never_opens_is_told(
    seen: list[ServeStatus], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doors, "PATIENCE_S", 0.05)
    with caplog.at_level(logging.WARNING, logger="cat_cluster.serve"):
        wait(seen, [status("DEPLOYING", OPEN, "STARTING")])
    assert "no door is open" in caplog.text
    assert "proxies: STARTING" in caplog.text
