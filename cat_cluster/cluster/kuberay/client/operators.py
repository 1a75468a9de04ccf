"""KubeRay's operator in a cluster: its Deployments, and the feature gates that it is started with."""

from __future__ import annotations

import re
from itertools import zip_longest

from cat_cluster.cluster.kuberay.client.api import Api, Json, unless_forbidden

_NAME = "kuberay-operator"
_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/component")  # of the chart, and of KubeRay's kustomization
_IMAGE = re.compile(r"(^|/)kuberay[-/]operator([:@]|$)")
_GATES = ("--feature-gates", "-feature-gates")


def find_operators(api: Api) -> list[Json] | None:
    """Return the Deployments of KubeRay's operator in all namespaces; None where whoever asks may not list them.

    Name, labels and image can each be changed by who installs it: one of them is enough.
    """
    deployments = unless_forbidden(lambda: api.list("apps/v1", "Deployment", namespace=""))
    return None if deployments is None else [one for one in deployments if _is_operator(one)]


def operator_container(operator: Json) -> Json:
    """Return the container of a Deployment of the operator that is the operator, not one that was put beside it."""
    containers = _containers(operator)
    return next((one for one in containers if _IMAGE.search(one.get("image", ""))), containers[0])


def given_gates(operator: Json) -> str:
    """Return the feature gates that a Deployment of the operator gives, `NAME=true,...`; "" for none.

    They are flags of its command alone: neither its configuration file nor its environment has them (main.go, v1.7.0).
    """
    container = operator_container(operator)
    arguments = (*container.get("command", ()), *container.get("args", ()))
    words = [word for argument in arguments for word in _words(argument)]
    given = ""  # as Go reads flags: `--x=y` and `--x y` are one, and the last counts
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        if flag in _GATES:
            given = value if equals else following
    return given


def _words(argument: str) -> list[str]:
    """Return the words of an argument: one, unless it is a line for a shell, such as `exec /manager --qps=1`."""
    is_line = not argument.startswith("-") and any(f" {flag}" in argument for flag in _GATES)
    return [word.strip("\"'") for word in argument.split()] if is_line else [argument]


def _is_operator(deployment: Json) -> bool:
    metadata = deployment["metadata"]
    labels = metadata.get("labels") or {}
    return (
        metadata["name"].endswith(_NAME)
        or any(labels.get(label) == _NAME for label in _LABELS)
        or any(_IMAGE.search(one.get("image", "")) for one in _containers(deployment))
    )


def _containers(deployment: Json) -> list[Json]:
    containers: list[Json] = deployment["spec"]["template"]["spec"]["containers"]
    return containers
