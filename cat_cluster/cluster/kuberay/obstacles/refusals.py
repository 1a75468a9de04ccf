"""Why Kubernetes makes no pod, or finds no machine for one, in words: of the messages of its API server and scheduler.

Each function returns a sentence with its remedy, and whether waiting cannot help.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from cat_cluster.cluster.kuberay.rendering.sizes import quantity

Json = dict[str, Any]
Cause = tuple[str, bool]

_QUOTA = re.compile(r"exceeded quota: (?P<name>[^,]+), requested: (.*), used: (.*), limited: (.*)", re.DOTALL)
_SECURITY = re.compile(r'violates PodSecurity "(?P<level>[^":]+)[^"]*": (?P<what>.*)', re.DOTALL)
_ACCOUNT = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found')
_PRIORITY = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
_WHICH = re.compile(r'^.*?(pods "[^"]*" is forbidden|Pod "[^"]*" is invalid): ', re.DOTALL)
_OVERLAY = "apply the overlay of k8s/ to the namespace"

_NODES = re.compile(r"0/(?P<all>\d+) nodes are available: (?P<why>.*)", re.DOTALL)
_NO_MATTER = re.compile(r"\.? *(no new claims to deallocate|preemption:|not found$).*", re.DOTALL)
_GPU = "nvidia.com/gpu"
_OPTIONS = {"cpu": "--worker-cpu", "memory": "--worker-memory, --head-memory"}
_INSUFFICIENT = re.compile(r"(?P<machines>\d+) Insufficient (?P<resource>[\w./-]*\w)")
# What else the scheduler says of machines, in our words, with the remedy.
_MACHINES: tuple[tuple[str, str, str], ...] = (
    (
        r"(\d+) node\(s\) had untolerated taint\(?s?\)? ?\{?([^}:]*)(?::[^}]*)?\}?",
        r"\1 tainted \2",
        "take the taint away or add a toleration",
    ),
    (
        r"(\d+) node\(s\) didn't match Pod's node affinity/selector",
        r"\1 without the labels that the pod selects",
        "label machines as its nodeSelector and affinity say",
    ),
    (r"(\d+) Too many pods", r"\1 with as many pods as they may have", "add machines"),
    (r"(\d+) node\(s\) were unschedulable", r"\1 cordoned", "uncordon them"),
    (r"(\d+) node\(s\) had volume node affinity conflict", r"\1 away from its volume", "add a machine in its zone"),
    (
        r"pod has unbound immediate PersistentVolumeClaims",
        "its volume claim is not bound",
        "see `kubectl get pvc`: the storage class must be there and provision",
    ),
    (r'persistentvolumeclaim "([^"]+)" not found', r"there is no volume claim \1", "make it, or leave the volume out"),
)


def shortened(text: str, most: int = 300) -> str:
    """Return a text on one line, its end cut off where it is long."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= most else f"{line[: most - 3]}..."


def refusal(message: str) -> Cause:
    """Return why the API server refuses pods."""
    if found := _QUOTA.search(message):
        return _over_quota(found)
    if found := _SECURITY.search(message):
        what = shortened(found["what"], 400)
        return (
            f"Pod Security ({found['level']}) refuses its pods: {what}; set what it names, and make the job anew",
            True,
        )
    if found := _ACCOUNT.search(message):
        return f"its pods want service account {found['name']}, which is not there; {_OVERLAY}", True
    if found := _PRIORITY.search(message):
        return f"its pods want priority class {found['name']}, which is not there; {_OVERLAY}", True
    return f"the API server refuses its pods: {shortened(_WHICH.sub('', message))}; change what it names", False


def unschedulable(message: str, pod: Json) -> Cause:
    """Return why the scheduler finds no machine for a pod."""
    found = _NODES.search(message)
    if found is None:
        return f"has no machine yet: {shortened(message)}; `kubectl describe pod` says more", False
    text = _NO_MATTER.sub("", found["why"])
    asked, said, remedies, scarce = requests_of(pod), [], [], []
    for match in _INSUFFICIENT.finditer(text):
        resource = match["resource"]
        scarce.append(resource)
        said.append(f"{match['machines']} with too little {resource} free (it asks for {asked.get(resource, 'some')})")
    for pattern, words, remedy in _MACHINES:
        for match in re.finditer(pattern, text):
            said.append(match.expand(words).strip())
            remedies.append(remedy)
    machines = "machine" if found["all"] == "1" else "machines"
    remedies = [*_room(scarce), *dict.fromkeys(remedies)]
    return (
        f"no machine takes it, of {found['all']} {machines}: {', '.join(said) or shortened(text)}; "
        f"{'; '.join(remedies) or 'add machines that fit'}",
        False,
    )


def _room(scarce: Sequence[str]) -> Iterator[str]:
    """Yield how room is made for what there is too little of."""
    if _GPU in scarce:
        yield "wait for a GPU, add machines with some and NVIDIA's device plugin, or leave --gpu out"
    if others := [name for name in scarce if name != _GPU]:
        options = ", ".join(_OPTIONS[name] for name in others if name in _OPTIONS)
        yield f"ask for less{f' ({options})' if options else ''}, wait for other pods to end, or add machines"


def requests_of(pod: Json) -> dict[str, str]:
    """Return what the containers of a pod ask for together, as people write it."""
    sums: dict[str, Any] = {}
    for container in pod.get("spec", {}).get("containers") or ():
        resources = container.get("resources") or {}
        for name, amount in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
            sums.setdefault(name, []).append(str(amount))
    return {name: " + ".join(amounts) for name, amounts in sums.items()}


def _over_quota(found: re.Match[str]) -> Cause:
    requested, used, limited = (_amounts(text) for text in found.groups()[1:])
    over = [f"{name} {amount} ({used.get(name)} of {limited.get(name)} in use)" for name, amount in requested.items()]
    never = any(_more(amount, limited.get(name)) for name, amount in requested.items())
    remedy = "ask for less, or have the quota raised" if never else "wait for other jobs to end, or have it raised"
    return (
        f"quota {found['name']} has no room for its pods, the next of which asks for {', '.join(over)}; {remedy}",
        never,
    )


def _amounts(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.strip().split(","))
    return {name.strip(): amount.strip() for name, _, amount in pairs}


def _more(amount: str, limit: str | None) -> bool:
    wanted, most = quantity(amount), quantity(limit or "")
    return wanted is not None and most is not None and wanted > most
