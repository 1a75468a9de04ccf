"""What a training service tells of itself: its queue in metrics, who trains with whom in a record of the store."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Self

from cat_cluster import telemetry
from cat_cluster.cluster.groups import Group
from cat_cluster.cluster.queued_run import QueuedRun
from cat_cluster.cluster.trainer import most_workers
from cat_cluster.cluster.work import Work
from cat_cluster.runs.progress import timestamp
from cat_cluster.runs.queue import QueueEntry
from cat_cluster.runs.services import GroupRecord, PlacedAdapter, ServiceRecord, ServiceWriter
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.store import ObjectStore
from cat_cluster.telemetry.ray_backend import RayBackend


class ServiceReport:
    """Tells how a service is; call `show` when it has looked at its queue. A context manager."""

    def __init__(self, store: ObjectStore, name: str, cluster: ClusterSpec) -> None:
        now = timestamp()
        record = ServiceRecord(
            name=name,
            host=socket.gethostname(),
            started=now,
            updated=now,
            workers=most_workers(cluster.workers),
        )
        self._writer = ServiceWriter(store, record)
        self._metrics = telemetry.Metrics(RayBackend(), (telemetry.QUEUE_WAITING, telemetry.QUEUE_OLDEST))

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.__exit__()

    def show(
        self,
        entries: Sequence[QueueEntry],
        held: Mapping[str, QueuedRun],
        groups: Iterable[Group],
        measuring: Iterable[Work],
    ) -> None:
        """Say what waits and how long the first of it has, who trains with whom, and what is being measured."""
        waits = [(entry, _waiting(entry, held.get(entry.run_id))) for entry in entries]
        since = [entry.submitted for entry, waiting in waits if waiting]
        oldest = (datetime.now(UTC) - min(since)).total_seconds() if since else 0.0
        waiting = sum(count for _, count in waits)
        self._metrics.set(telemetry.QUEUE_WAITING, waiting)
        self._metrics.set(telemetry.QUEUE_OLDEST, max(0.0, oldest))
        self._writer.show(tuple(map(_group_record, groups)), tuple(map(_placed, measuring)), waiting)


def _waiting(entry: QueueEntry, held: QueuedRun | None) -> int:
    """How many adapters of a run wait for a place; of one that is not held here all may."""
    if held is None:
        return entry.adapters
    return sum(one.state == "waiting" for one in held.run.writer.progress.adapters)


def _group_record(group: Group) -> GroupRecord:
    works = list(group.works.values())
    if not works:
        return GroupRecord(number=group.number, slots=group.places)
    first = works[0].adapter
    return GroupRecord(
        number=group.number,
        slots=max(group.places, len(works)),
        base=first.resolved.base,
        resolution=first.resolution,
        adapters=tuple(map(_placed, works)),
    )


def _placed(work: Work) -> PlacedAdapter:
    return PlacedAdapter(run_id=work.run.run_id, adapter=work.adapter_id, steps=work.steps)
