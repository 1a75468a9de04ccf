"""What is made of failed workers: a message and a restart, or the end of their pack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError as RaysOutOfMemoryError
from ray.train.v2.api.exceptions import ControllerError

from cat_cluster.cluster.failures import failure_of
from cat_cluster.cluster.trainer import Restarts
from cat_cluster.errors import CatClusterError, ConceptError, OutOfMemoryError, StoreError, StoreRefusedError


class Told:
    """Stands in for the messages, whose actor needs a Ray."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []

    def adapters(self, pack: int) -> int:
        return 2

    def put(self, *event: Any) -> None:
        self.all.append(event)


def test_each_restart_is_reported_and_the_last_failure_is_left_to_the_task() -> None:
    told = Told()
    restarts = Restarts(told, 7, 2)  # type: ignore[arg-type]
    for _ in range(3):
        restarts.after_exception(None, {0: StoreError("the bucket is gone")})
    begin = "workers failed (the bucket is gone); they go on from the last checkpoint"
    assert told.all == [("restart", 7, f"{begin}, restart {number} of at most 2") for number in (1, 2)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RaysOutOfMemoryError("1 worker(s) were killed"), OutOfMemoryError),
        (StoreRefusedError("access was denied"), StoreRefusedError),
        (ConceptError("no photo"), ConceptError),
    ],
)
def test_what_no_restart_would_help_ends_the_training_at_once(error: Exception, kind: type[CatClusterError]) -> None:
    told = Told()
    with pytest.raises(kind) as raised:
        Restarts(told, 7, 3).after_exception(None, {1: error})  # type: ignore[arg-type]
    assert told.all == []
    # Ray Train makes an error of its controller of it, and the pack's task returns what it was.
    assert failure_of(ControllerError(raised.value)) is raised.value


def test_ray_train_gives_up_what_its_callback_refuses() -> None:
    """Of the installed Ray Train: the callback's error passes, is one of the controller, and is not tried again."""
    from ray.train import FailureConfig
    from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
    from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerStatus

    restarts = Restarts(Told(), 7, 3)  # type: ignore[arg-type]
    refused = UserExceptionWithTraceback(StoreRefusedError("access was denied"), "Traceback")
    group = SimpleNamespace(
        _assert_active=lambda: None,
        _poll_workers_and_collect_errors=lambda _: [WorkerStatus(running=False, error=refused)],
        _worker_rank_to_replica_group_rank=None,
        _callbacks=[UserCallbackHandler([restarts], None)],
    )
    with pytest.raises(StoreRefusedError) as raised:
        WorkerGroup.poll_status(group)
    policy = create_failure_policy(FailureConfig(max_failures=3))
    assert policy.make_decision(ControllerError(raised.value)) is FailureDecision.RAISE
