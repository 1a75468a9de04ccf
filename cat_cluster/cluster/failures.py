"""Ray's and Ray Train's errors unwrapped: the error of ours that caused them, or one sentence of ours about them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray import exceptions as ray_errors

from cat_cluster import errors
from cat_cluster.errors import CatClusterError, LostWorkerError, OutOfMemoryError, WorkerError
from cat_cluster.models.out_of_memory import asked_for, short_of_memory

REASON_CHARACTERS = 500

_WRAPPED = ("cause", "controller_failure", "health_check_failure", "_base_exc")  # in Ray Core's and Ray Train's errors
_KILLED = "a process was killed or has crashed, as happens when its machine or pod runs out of memory"
_MACHINE_LOST = "a machine or pod of the cluster was lost (a pod also ends when it has no memory left)"
_LOST: Mapping[type[BaseException], str] = {
    ray_errors.WorkerCrashedError: _KILLED,
    ray_errors.NodeDiedError: _MACHINE_LOST,
    ray_errors.LocalRayletDiedError: _MACHINE_LOST,
    ray_errors.ActorUnavailableError: "a process cannot be reached over the network",
    ray_errors.ObjectLostError: "what a process had made was lost with it or its machine",
    ray_errors.ActorPlacementGroupRemoved: "its share of the cluster was taken from it",
    ray_errors.TaskPlacementGroupRemoved: "its share of the cluster was taken from it",
    ray_errors.TaskCancelledError: "it was cancelled",
}
_LOST_IN_TEXT = (  # of actors that died, for which Ray has one class
    ("the actor's node was preempted", "its machine was taken away"),
    ("its node has died", _MACHINE_LOST),
    ("its owner has died", "the process or machine that directs it was lost"),
    ("its worker process has died", _KILLED),
    ("The worker died unexpectedly", _KILLED),
)
_OWN = re.compile(r"cat_cluster\.errors\.(\w+): (.*)", re.DOTALL)
_FRAMES = re.compile(r"Traceback \(most recent call last\):$|\(pid=\d+, .*\)$")  # Python's head of them, and Ray's
_MODULES = re.compile(r"(?:\w+\.)+(?=\w+(?:: |\Z))")
_NODE = re.compile(r"was ([\d.]+)GB used / ([\d.]+)GB limit")
_HELD = re.compile(r"Selected to kill: .*?actual memory used=([\d.]+)GB")


@contextmanager
def unwrapped(doing: str) -> Iterator[None]:
    """Turn an error of Ray's inside the block into the one of ours behind it; doing: as for `failure_of`."""
    try:
        yield
    except ray_errors.RayError as error:
        raise failure_of(error, doing) from error


def failure_of(error: BaseException, doing: str = "training", adapters: int | None = None) -> CatClusterError:
    """Return the error of ours behind an error of Ray's, of Ray Train's, or of code that ran there.

    doing: what failed, with which the message begins where that error was not ours; adapters: how many of them trained
    together, for the remedy where memory ran out.
    """
    if isinstance(error, CatClusterError) and not isinstance(error, ray_errors.RayError):
        return error
    workers = getattr(error, "worker_failures", None)
    if workers:
        return worst_of(workers, doing, adapters)
    for name in _WRAPPED:
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return failure_of(inner, doing, adapters)
    if isinstance(error, ray_errors.OutOfMemoryError):
        return _ended_by_ray(str(error), adapters)
    for kind, sentence in _LOST.items():
        if isinstance(error, kind):
            return LostWorkerError(f"{doing} stopped: {sentence}")
    if (asked := asked_for(error)) is not None:
        return short_of_memory(asked, adapters)
    is_rays = type(error).__module__.partition(".")[0] == "ray"
    text = getattr(error, "error_message", None) or str(error)
    return failure_in(text, doing, adapters, kind="" if is_rays else type(error).__name__)


def worst_of(
    failures: Mapping[int, BaseException], doing: str = "training", adapters: int | None = None
) -> CatClusterError:
    """Return the failure that explains the others, of workers by rank: one that ends is missed by the others."""

    def weight(failure: CatClusterError) -> int:
        if isinstance(failure, WorkerError):
            return 2 if isinstance(failure, LostWorkerError) else 3
        return 0 if failure.permanent else 1

    return min((failure_of(failure, doing, adapters) for _, failure in sorted(failures.items())), key=weight)


def failure_in(text: str, doing: str, adapters: int | None = None, *, kind: str = "") -> CatClusterError:
    """Return the failure that a text tells of, a message or one that ends with a traceback. kind: the error's class."""
    last = _last_error(text)
    own = _OWN.fullmatch(last)
    known = None if own is None else getattr(errors, own[1], None)
    if own is not None and isinstance(known, type) and issubclass(known, CatClusterError):
        return known(own[2])
    if "running low on memory" in text:
        return _ended_by_ray(text, adapters)
    if (asked := asked_for(RuntimeError(last))) is not None:
        return short_of_memory(asked, adapters)
    for sign, sentence in _LOST_IN_TEXT:
        if sign in text:
            return LostWorkerError(f"{doing} stopped: {sentence}")
    first = _MODULES.sub("", last.partition("\n")[0].strip(), count=1)[:REASON_CHARACTERS]
    return WorkerError(f"{doing} stopped: {': '.join(part for part in (kind, first) if part) or 'no reason given'}")


def _ended_by_ray(text: str, adapters: int | None) -> OutOfMemoryError:
    """Return what Ray says when it ends processes before the kernel does; its GB are GiB."""
    node, held = _NODE.search(text), [float(one) for one in _HELD.findall(text)]
    if node is None:
        return short_of_memory("Ray ended a process, because its machine or pod had no memory left", adapters)
    by_one = f", {max(held):.2f} by the process that Ray then ended" if held else ""
    return short_of_memory(f"the machine or pod had {node[2]} GiB, and {node[1]} were in use{by_one}", adapters)


def _last_error(text: str) -> str:
    """Return class and message of the last exception of a text with tracebacks, the whole of one without."""
    lines = text.strip().splitlines()
    heads = [number for number, line in enumerate(lines) if _FRAMES.search(line)]
    if not heads:
        return text.strip()
    below = lines[heads[-1] + 1 :]
    # The frames are indented, the exception after them is not.
    return "\n".join(below[next((n for n, line in enumerate(below) if not line.startswith(" ")), len(below)) :])
