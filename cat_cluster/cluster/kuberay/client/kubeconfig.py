"""Which API server is meant: that of a context of kubeconfig, or that of the cluster whose pod this process is in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kubernetes.client
import kubernetes.config
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.kube_config import KubeConfigMerger

from cat_cluster.errors import SpecError

KUBECONFIG = "~/.kube/config"
IN_CLUSTER = "in-cluster"  # the name of no context


def find_server(context: str | None) -> tuple[Any, str]:
    """Return the official client's configuration for a context, by default the current one, and the context's name.

    Without a kubeconfig, in a pod, that of its cluster. Raises SpecError for what is not there or cannot be used.
    """
    file = os.environ.get("KUBECONFIG") or KUBECONFIG  # the client reads the variable but once, when it is imported
    try:
        merged = KubeConfigMerger(file).config
        content = {} if merged is None else merged.value
        known = [str(entry["name"]) for entry in content.get("contexts", ())]
        current = content.get("current-context")
    except Exception as error:  # the library checks little of what it reads
        raise SpecError(
            f"kubeconfig {file} cannot be read: {error}; correct it, or set KUBECONFIG to another"
        ) from error
    configuration = kubernetes.client.Configuration()
    if merged is None and context is None and _is_in_cluster(configuration):
        return configuration, IN_CLUSTER
    if merged is None:
        raise SpecError(
            f"no cluster is configured: {file} is not there; set KUBECONFIG to the file that says where it is"
        )
    name = context or current
    if name not in known:
        which = f"--context {context}" if context else f"current-context {current!r}"
        raise SpecError(
            f"{which}: kubeconfig {file} has none of this name; it has {', '.join(sorted(known)) or 'none'}"
        )
    with _heard_errors() as errors:
        try:
            kubernetes.config.load_kube_config(file, context=name, client_configuration=configuration)
        except Exception as error:  # as above, and of the libraries of clouds
            raise SpecError(f"context {name} of kubeconfig cannot be used: {error}; log in to it again") from error
    # The library goes on without credentials where the plugin that should give some fails.
    if errors and not (configuration.api_key or configuration.cert_file):
        raise SpecError(f"context {name} of kubeconfig gives no credentials: {'; '.join(errors)}; log in to it again")
    return configuration, name


def _is_in_cluster(configuration: Any) -> bool:
    try:
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    except ConfigException:
        return False
    return True


@contextmanager
def _heard_errors() -> Iterator[list[str]]:
    """Keep what the library would only log."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear(logging.ERROR)
    logging.getLogger().addHandler(ear)
    try:
        yield heard
    finally:
        logging.getLogger().removeHandler(ear)
