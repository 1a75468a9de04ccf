"""What `build` makes of a deployment: how many engines Ray Serve may run, and when."""

from __future__ import annotations

from typing import Any

import pytest

from cat_cluster.errors import SpecError
from serve.app import ENGINE, INGRESS, build
from serve.http.streams import GRACE_S
from serve.settings import SLEEP_AFTER_S, Deployment


def deployments(**args: Any) -> dict[str, Any]:
    """Name -> deployment, as Ray Serve has them."""
    application = build(args)
    ingress = application._bound_deployment
    engine = ingress.init_args[1]._bound_deployment
    assert (ingress.name, engine.name) == (INGRESS, ENGINE)
    return {INGRESS: ingress, ENGINE: engine}


def scaling(**args: Any) -> Any:
    return deployments(**args)[ENGINE]._deployment_config.autoscaling_config


def test_engines_that_never_sleep_are_as_many_as_is_said() -> None:
    assert scaling() is None
    assert deployments(min_engines=2)[ENGINE].num_replicas == 2
    found = scaling(min_engines=1, max_engines=3)
    assert (found.min_replicas, found.max_replicas, found.initial_replicas) == (1, 3, None)
    assert found.downscale_to_zero_delay_s is None
    assert deployments()[INGRESS].init_args[2] is False


@pytest.mark.parametrize(("most", "sleep"), [(None, None), (1, 60.0), (4, 900.0)])
def test_the_last_engine_sleeps_after_its_time_and_the_first_one_starts_with_the_deployment(
    most: int | None, sleep: float | None
) -> None:
    args = {"min_engines": 0, "max_engines": most, "sleep_after_s": sleep}
    found = scaling(**args)
    assert (found.min_replicas, found.max_replicas) == (0, most or 1)
    assert found.initial_replicas == 1, "one that cannot start is told at once, and the doors are waited for"
    assert found.downscale_to_zero_delay_s == (sleep or SLEEP_AFTER_S)
    assert deployments(**args)[INGRESS].init_args[2] is True


def test_a_replica_that_goes_finishes_the_longest_request() -> None:
    """Of an ingress that is an edit, sent in the last moment and drawn in the last one."""
    found = deployments(settings={"deadline_s": 300.0, "upload_timeout_s": 90.0})
    engine, ingress = (found[name]._deployment_config.graceful_shutdown_timeout_s for name in (ENGINE, INGRESS))
    assert engine >= 300.0
    assert ingress >= 90.0 + 300.0 + GRACE_S


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"min_engines": -1}, "min_engines: Input should be greater than or equal to 0"),
        ({"min_engines": 0, "max_engines": 0}, "max_engines: Input should be greater than or equal to 1"),
        ({"sleep_after_s": 600}, "sleep_after_s: no engine sleeps unless min_engines is 0"),
        ({"min_engines": 0, "sleep_after_s": 5}, "sleep_after_s: Input should be greater than or equal to 60"),
    ],
)
def test_what_does_not_go_together_is_named(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        build(args)


def test_the_fewest_engines_are_the_most_where_nothing_else_is_said() -> None:
    assert [Deployment(min_engines=n).most_engines for n in (0, 1, 3)] == [1, 1, 3]
