"""Why a pod does not run, in words: of its status, the events about it, and the last lines of what crashes in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from cat_cluster.cluster.kuberay.obstacles.refusals import Cause, shortened, unschedulable

Json = dict[str, Any]

LOOP = 3  # starts of a container that failed; another would too
START_SECONDS = 180  # in which Ray is up
LINES = 3  # of a log that are shown
_PULL = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError")
_STARTS = ("CreateContainerError", "RunContainerError", "StartError", "PreCreateHookError", "PostStartHookError")
_BEFORE = (  # what the kubelet puts before the reason why an image cannot be pulled
    re.compile(r'^Back-off pulling image "[^"]*":? ?(ErrImagePull: )?'),
    re.compile(r'^(failed to pull and unpack image|failed to resolve reference|failed to copy) "?[^"]*"?: '),
    re.compile(r"^failed to do request: "),
    re.compile(r"^rpc error: code = \w+ desc = "),
)
_BEFORE_START = re.compile(r"^.*unable to start container process: ", re.DOTALL)
_ABSENT = re.compile(r'^(?P<kind>secret|configmap) "(?P<name>[^"]+)" not found', re.IGNORECASE)
_NO_KEY = re.compile(r"^couldn't find key (?P<key>\S+) in (?P<kind>Secret|ConfigMap) [^/]+/(?P<name>\S+)")
_NOT_MOUNTED = re.compile(r'^MountVolume\.SetUp failed for volume "(?P<volume>[^"]+)" : (?P<why>.*)', re.DOTALL)
_VOLUME_REASONS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")
_KINDS = {"secret": "Secret", "configmap": "ConfigMap"}
_KILLED = "OOMKilled"  # the kubelet's word for a container that took more memory than its limit
_MORE_MEMORY = {  # by what is in the pod
    "head": "give it more (--head-memory), or train fewer packs side by side (--packs)",
    "worker": "give it more (--worker-memory), or train fewer adapters in a pack (cluster.max_pack)",
    "autoscaler": "give it more (autoscalerOptions.resources of the manifest)",
    "submitter": "give it more (submitterPodTemplate of the manifest)",
}
_HOW = {  # who makes a Secret or ConfigMap
    "cat-cluster-settings": "apply the overlay of k8s/ to the namespace",
    **dict.fromkeys(
        ("cat-training-ray-token", "cat-serving-ray-token", "cat-cluster-api-keys"), "k8s/secrets.sh makes it"
    ),
    "cat-cluster-s3": "k8s/secrets.sh says how to make it",
}


def crashes(pod: Json) -> Iterator[Json]:
    """Yield the status of each container that ended with an error, and is not back or was killed for memory."""
    for status in _statuses(pod):
        ended = _ended(status)
        if ended is not None and (not _runs(status) or ended.get("reason") == _KILLED):
            yield status


def was_killed(pod: Json) -> bool:
    """Say whether a container of a pod was killed for memory when it last ended."""
    return any((_ended(status) or {}).get("reason") == _KILLED for status in _statuses(pod))


def logs_wanted(pod: Json) -> Iterator[tuple[str, bool]]:
    """Yield container, and whether it was restarted since, of each log that tells why a pod does not run."""
    for status in crashes(pod):
        if (_ended(status) or {}).get("reason") not in (_KILLED, "StartError", "ContainerCannotRun"):
            yield status["name"], "terminated" not in status.get("state", {})


def pod_cause(pod: Json, warnings: Sequence[Json], logs: Mapping[str, str], *, now: datetime) -> Cause | None:
    """Return why a pod does not run, in a sentence with its remedy, and whether waiting cannot help.

    warnings: the events about the pod that are warnings, oldest first; logs: by container, the end of what it wrote.
    None for a pod that runs, has done its work or is being removed.
    """
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp") or status.get("phase") == "Succeeded":
        return None
    if status.get("reason") == "Evicted":
        return evicted(status.get("message", ""))
    scheduled: Json = next((one for one in status.get("conditions", ()) if one.get("type") == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        return unschedulable(scheduled.get("message", ""), pod)
    for container in _statuses(pod):
        waiting = container.get("state", {}).get("waiting")
        if waiting and (found := _waiting_cause(pod, container, waiting)):
            return found
    for container in crashes(pod):
        return _crash_cause(pod, container, logs.get(container["name"], ""))
    if status.get("phase") == "Pending":
        return _event_cause(warnings[-1]) if warnings else None
    return _unready_cause(pod, warnings, now)


def evicted(message: str) -> Cause:
    """Return that a pod was evicted, and for what."""
    return (
        f"was evicted: {shortened(message)}; another takes its place, and ends the same way unless its limits "
        "(scratch, memory) or the machine's room grow",
        False,
    )


def killed_and_deleted(pod_type: str, alike: Json | None) -> Cause:
    """Return that a pod was killed for memory and is gone. pod_type: head, worker; alike: one of its group, if any."""
    had = "" if alike is None else _had(alike, f"ray-{pod_type}")
    return f"was killed for memory{had}; another takes its place: {_MORE_MEMORY[pod_type]}", False


def _waiting_cause(pod: Json, container: Json, waiting: Json) -> Cause | None:
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    name, image = container["name"], container.get("image", "")
    if reason in _PULL:
        return _pull_cause(image, message)
    if reason == "InvalidImageName":
        return f"{image!r} is no name of an image; correct --image", True
    if reason == "ErrImageNeverPull":
        return f"image {image} is not on its machine, and imagePullPolicy is Never; load it there", True
    if reason == "CreateContainerConfigError":
        return _config_cause(name, message)
    if reason in _STARTS:
        return f"container {name} cannot be started: {_start_error(message)}; correct its command or image", True
    return None


def _pull_cause(image: str, message: str) -> Cause:
    why = message
    while (short := _stripped(why)) != why:
        why = short
    known = any(word in why for word in ("not found", "unauthorized", "denied", "authorization failed"))
    return (
        f"image {image} cannot be pulled{f': {shortened(why)}' if why else ''}; push it, correct --image, or let the "
        "machines log in to its registry",
        known,
    )


def _stripped(text: str) -> str:
    for pattern in _BEFORE:
        text = pattern.sub("", text)
    return text


def _start_error(message: str) -> str:
    return shortened(_BEFORE_START.sub("", message))


def _config_cause(name: str, message: str) -> Cause:
    if found := _ABSENT.match(message):
        absent = found["name"]
        return (
            f"container {name} wants {_KINDS[found['kind'].lower()]} {absent}, which is not there; "
            f"{_HOW.get(absent, 'make it')}",
            True,
        )
    if found := _NO_KEY.match(message):
        return (
            f"container {name} wants key {found['key']} of {found['kind']} {found['name']}, which does not have it; "
            "add it",
            True,
        )
    return f"container {name} cannot be made: {shortened(message)}; correct what it names", True


def _crash_cause(pod: Json, container: Json, log: str) -> Cause:
    ended, name = _ended(container) or {}, container["name"]
    times = container.get("restartCount", 0) + (0 if _is_back(container) else 1)
    often = "once" if times == 1 else f"{times} times"
    final = times >= LOOP and not _runs(container)
    if ended.get("reason") == _KILLED:
        return f"container {name} was killed for memory {often}{_had(pod, name)}; {_more_memory(pod, name)}", final
    if ended.get("reason") in ("StartError", "ContainerCannotRun"):
        why = _start_error(ended.get("message", ""))
        return f"container {name} cannot be started: {why}; correct its command or image", True
    lines = [line.strip() for line in log.splitlines() if line.strip()][-LINES:]
    last = f"; its last lines: {' / '.join(shortened(line, 200) for line in lines)}" if lines else ""
    return (
        f"container {name} ended with exit code {ended.get('exitCode')}, {often}{last}; "
        "`cat-cluster k8s logs` has more",
        final,
    )


def _event_cause(event: Json) -> Cause:
    message = event.get("message", "")
    if event.get("reason") in _VOLUME_REASONS:
        found = _NOT_MOUNTED.match(message)
        what = f"volume {found['volume']}" if found else "a volume"
        why = found["why"] if found else message
        absent = _ABSENT.match(why)
        if absent:
            kind, name = _KINDS[absent["kind"].lower()], absent["name"]
            return f"{what} wants {kind} {name}, which is not there; {_HOW.get(name, 'make it')}", True
        return f"{what} cannot be mounted: {shortened(why)}; see that what it names is there", False
    return f"{event.get('reason')}: {shortened(message)}; `kubectl describe pod` says more", False


def _unready_cause(pod: Json, warnings: Sequence[Json], now: datetime) -> Cause | None:
    """A container that runs for long, and does not answer its probe."""
    probes = [event.get("message", "") for event in warnings if event.get("reason") == "Unhealthy"]
    for container in pod.get("status", {}).get("containerStatuses") or ():
        started = container.get("state", {}).get("running", {}).get("startedAt")
        if started is None or container.get("ready") or not probes:
            continue
        seconds = (now - datetime.fromisoformat(started)).total_seconds()
        if seconds > START_SECONDS:
            return (
                f"container {container['name']} runs for {START_SECONDS} s and more and is not ready: "
                f"{shortened(probes[-1])}; `cat-cluster k8s logs` shows what it does",
                False,
            )
    return None


def _statuses(pod: Json) -> list[Json]:
    status = pod.get("status", {})
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _ended(container: Json) -> Json | None:
    """Return how a container ended last; None where it did not, or without an error."""
    for state in (container.get("state", {}), container.get("lastState", {})):
        ended: Json | None = state.get("terminated")
        if ended is not None:
            return ended if ended.get("exitCode") else None
    return None


def _runs(container: Json) -> bool:
    """Whether it runs now, and does what it should."""
    return "running" in container.get("state", {}) and bool(container.get("ready"))


def _is_back(container: Json) -> bool:
    return "terminated" not in container.get("state", {})


def _had(pod: Json, name: str) -> str:
    """Return how much memory a container of a pod may take, as the end of a clause; nothing without a limit."""
    spec = pod.get("spec", {})
    for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
        limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
        if container.get("name") == name and limit:
            return f", of which it had {limit}"
    return ""


def _more_memory(pod: Json, name: str) -> str:
    """Return what gives a container more memory, or lets it need less."""
    if name == "autoscaler":
        return _MORE_MEMORY[name]
    return _MORE_MEMORY[pod["metadata"].get("labels", {}).get("ray.io/node-type", "submitter")]
