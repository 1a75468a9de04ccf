"""What is reported of failed workers, from exceptions in the form in which Ray Train gives them."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from cat_cluster.cluster.trainer import RestartMessages, failure_reason
from cat_cluster.errors import CatClusterError, StoreError


class AsText(Exception):
    """An exception of a worker's code: Ray Train gives its traceback as text."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("".join(traceback.format_exception(error)))


def raised(error: Exception, cause: Exception | None = None) -> AsText:
    try:
        raise error from cause
    except Exception as caught:
        return AsText(caught)


@pytest.mark.parametrize(
    ("failures", "reason"),
    [
        ({0: raised(StoreError("the bucket is gone"))}, "the bucket is gone"),
        ({0: raised(StoreError("two\nlines"), KeyError("inner"))}, "two\nlines"),
        ({0: raised(ValueError("late")), 1: raised(CatClusterError("not finite"))}, "not finite"),
        ({1: raised(ValueError("second")), 0: raised(ValueError("first"))}, "training stopped: ValueError: first"),
        ({0: raised(ValueError("x"), StoreError("only the cause"))}, "training stopped: ValueError: x"),
        ({0: RuntimeError("the actor died\nits node was lost ")}, "training stopped: its node was lost"),
        ({0: RuntimeError()}, "training stopped: no reason given"),
    ],
)
def test_the_reason_is_our_own_errors_message_or_the_first_workers_last_line(
    failures: dict[int, Exception], reason: str
) -> None:
    assert failure_reason(failures) == reason


class Events:
    """Stands in for the event queue, whose actor needs a Ray."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []

    def put(self, *event: Any) -> None:
        self.all.append(event)


def test_each_restart_is_reported_and_the_last_failure_is_left_to_the_task() -> None:
    events = Events()
    messages = RestartMessages(events, ["cup", "mug", "bowl"], 2)  # type: ignore[arg-type]
    for _ in range(3):
        messages.after_exception(None, {0: raised(StoreError("the bucket is gone"))})
    begin = "cup and 2 more: workers failed (the bucket is gone); they go on from the last checkpoint"
    assert events.all == [("message", f"{begin}, restart {number} of at most 2") for number in (1, 2)]
