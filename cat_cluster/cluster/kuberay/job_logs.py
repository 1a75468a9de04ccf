"""Logs of the pods of a RayJob."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from queue import Queue
from threading import Thread
from typing import TypeVar

from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.cluster.kuberay.client.jobs import pods_of
from cat_cluster.errors import KubernetesError, RunError
from cat_cluster.spec.choices import JobLog

Item = TypeVar("Item")

_LONGEST_LINE = 1 << 16  # characters that are kept of a line which does not end: bars are drawn anew in one line
_WAITING_LINES = 1000  # of all logs together, that are kept for a reader who is slower
_CONTAINERS: dict[JobLog, str] = {"driver": "ray-job-submitter", "head": "ray-head", "workers": "ray-worker"}


@dataclass(frozen=True)
class JobPod:
    """A pod of a RayJob, and its container that is of interest."""

    name: str
    container: str


def pods_of_part(api: Api, job: Json, part: JobLog) -> list[JobPod]:
    """Return the pods of a part of a RayJob, oldest first: of the driver's log the one that prints it, the last one's.

    Raises RunError, which says what there is instead, where there is none; KubernetesError.
    """
    pods = pods_of(api, job)
    if not pods[part]:
        there = [name for name, found in pods.items() if found]
        name, status = job["metadata"]["name"], job.get("status", {}).get("jobDeploymentStatus") or "new"
        raise RunError(
            f"RayJob {name} ({status}) has no pod for the log of its {part}: "
            + (f"there is that of its {' and '.join(there)} (--of)" if there else _why_none(status))
        )
    shown = pods[part][-1:] if part == "driver" else pods[part]
    return [JobPod(pod["metadata"]["name"], _container(pod, part)) for pod in shown]


def read_logs(api: Api, pods: Sequence[JobPod], *, follow: bool, say: Callable[[str], None]) -> Iterator[str]:
    """Yield the log of a pod in pieces; of several pods lines, which begin as `kubectl logs --prefix` has them.

    follow: until they end, all pods at once. Where one of several logs cannot be read, `say` is told why and the others
    go on; KubernetesError is raised in the end.
    """
    if len(pods) == 1:
        yield from api.log(pods[0].name, pods[0].container, follow=follow)
        return
    logs = [_lines(api, pod, follow=follow) for pod in pods]
    broken = 0
    for line in _at_once(logs) if follow else chain.from_iterable(logs):
        if isinstance(line, str):
            yield line
        else:
            broken += 1
            say(str(line))
    if broken:
        raise KubernetesError(
            f"{broken} of {len(pods)} logs could not be read to their end, as is said above; ask again"
        )


def _lines(api: Api, pod: JobPod, *, follow: bool) -> Iterator[str | KubernetesError]:
    """Yield the lines of a log, and why it cannot be read further, where that is so."""
    before, rest = f"[pod/{pod.name}/{pod.container}] ", ""
    try:
        for piece in api.log(pod.name, pod.container, follow=follow):
            *lines, rest = f"{rest}{piece}".split("\n")
            for line in lines:
                yield f"{before}{line}\n"
            if len(rest) > _LONGEST_LINE:
                yield f"{before}{rest}\n"
                rest = ""
    except KubernetesError as error:
        yield error
    if rest:
        yield f"{before}{rest}\n"


def _at_once(sources: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """Yield what iterators yield, as it comes, until all have ended; None is no item."""
    found: Queue[Item | None] = Queue(_WAITING_LINES)

    def carry(source: Iterator[Item]) -> None:
        try:
            for one in source:
                found.put(one)
        finally:
            found.put(None)

    for source in sources:
        Thread(target=carry, args=(source,), daemon=True).start()
    for _ in sources:  # each ends once
        while (one := found.get()) is not None:
            yield one


def _container(pod: Json, part: JobLog) -> str:
    """Return the container of ours; of a job that others made the first one, which KubeRay takes."""
    names = [str(one["name"]) for one in pod["spec"]["containers"]]
    return _CONTAINERS[part] if _CONTAINERS[part] in names else names[0]


def _why_none(status: str) -> str:
    if status in ("Complete", "Failed"):
        return (
            "its pods are gone, as they are some minutes after its end; `cat-cluster jobs status` shows the run's end"
        )
    return "none of its pods is there yet; ask again"
