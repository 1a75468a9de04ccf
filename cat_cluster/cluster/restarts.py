"""Saying that a pack's workers were lost and start again, which Ray Train does in silence.

Ray calls this in the process that controls the pack: it imports no more than that process has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.train import UserCallback

from cat_cluster.cluster.event_queue import EventQueue


class RestartMessages(UserCallback):  # type: ignore[misc]
    """Leaves word on the board for each time that workers failed; the driver knows itself when a pack is given up."""

    def __init__(self, board: EventQueue, adapter_ids: Sequence[str], max_failures: int) -> None:
        self._board = board
        more = f" and {len(adapter_ids) - 1} more" if len(adapter_ids) > 1 else ""
        self._pack = f"{adapter_ids[0]}{more}"
        self._failures, self._most = 0, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Take in that workers of the group failed."""
        self._failures += 1
        if self._failures <= self._most:
            lines = str(next(iter(worker_exceptions.values()), "")).strip().splitlines()
            reason = lines[-1][:200] if lines else "no reason given"
            self._board.tell(
                "message",
                f"{self._pack}: workers failed ({reason}); they go on from the last checkpoint, restart "
                f"{self._failures} of at most {self._most}",
            )
