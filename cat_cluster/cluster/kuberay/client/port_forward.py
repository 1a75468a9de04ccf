"""A port of a pod on loopback, as `kubectl port-forward` makes it, which goes to another pod when that one is gone."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import kubernetes.client
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import portforward

from cat_cluster.cluster.kuberay.client.api import ROLE, Api
from cat_cluster.errors import KubernetesError

_PIECE = 1 << 16  # bytes
_log = logging.getLogger(__name__)


@contextmanager
def forwarded(api: Api, find_pod: Callable[[], str], port: int) -> Iterator[int]:
    """Give a port of this machine's loopback whose connections go to `port` of the pod that `find_pod` names.

    It is asked for each connection. A connection that cannot be made is closed, as one to a dead server would be, and
    the log says why, once for each reason in a row.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        forward = _Forward(api, find_pod, port)
        threading.Thread(target=forward.accept, args=(server,), daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread that accepts


class _Forward:
    def __init__(self, api: Api, find_pod: Callable[[], str], port: int) -> None:
        self._api, self._find_pod, self._port = api, find_pod, port
        self._said = ""

    def accept(self, server: socket.socket) -> None:
        """Serve connections until the server is closed."""
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(caller,), daemon=True).start()

    def _carry(self, caller: socket.socket) -> None:
        """Carry bytes both ways until either side ends."""
        with caller:
            try:
                remote = self._connect()
            except (KubernetesError, ApiException, OSError) as error:
                reason = _reason(error)
                if reason != self._said:
                    _log.warning("port %d of a pod cannot be reached: %s", self._port, reason)
                self._said = reason
                return
            self._said = ""
            threading.Thread(target=_pump, args=(remote, caller), daemon=True).start()
            _pump(caller, remote)

    def _connect(self) -> socket.socket:
        # A client of its own: the library turns a client into one of websockets while it connects.
        core = kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(self._api.client.configuration))
        stream = portforward(
            core.connect_get_namespaced_pod_portforward, self._find_pod(), self._api.namespace, ports=str(self._port)
        )
        remote: socket.socket = stream.socket(self._port)
        return remote


def _reason(error: Exception) -> str:
    if not isinstance(error, ApiException):
        return str(error)
    text = str(error.reason).partition(" -+-+- ")[0]  # what follows are the headers of the response
    if " 403 " in text:
        return f"the right to pods/portforward is missing; Role {ROLE} of overlays/local gives it"
    return text


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
    for end in (source, target):  # wakes the other direction, which may wait for bytes
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    target.close()
