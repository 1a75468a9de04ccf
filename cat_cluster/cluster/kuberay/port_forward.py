"""A port of a pod on loopback, as `kubectl port-forward` makes it, which goes to another pod when that one is gone."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import kubernetes.client
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import portforward

from cat_cluster.cluster.kuberay.api import Api
from cat_cluster.errors import KubernetesError

_PIECE = 1 << 16  # bytes
_log = logging.getLogger(__name__)


@contextmanager
def forwarded(api: Api, find_pod: Callable[[], str], port: int) -> Iterator[int]:
    """Give a port of this machine's loopback whose connections go to `port` of the pod that `find_pod` names.

    It is asked for each connection. A connection that cannot be made is closed, as one to a dead server would be.
    """
    with ExitStack() as open_sockets, socket.create_server(("127.0.0.1", 0)) as server:
        open_sockets.callback(server.close)
        threading.Thread(target=_accept, args=(server, api, find_pod, port), daemon=True).start()
        yield server.getsockname()[1]


def _accept(server: socket.socket, api: Api, find_pod: Callable[[], str], port: int) -> None:
    while True:
        try:
            caller, _ = server.accept()
        except OSError:  # closed: nobody needs the port any more
            return
        threading.Thread(target=_carry, args=(caller, api, find_pod, port), daemon=True).start()


def _carry(caller: socket.socket, api: Api, find_pod: Callable[[], str], port: int) -> None:
    """Carry bytes both ways until either side ends."""
    with caller:
        try:
            pod = find_pod()
            core = kubernetes.client.CoreV1Api(api.client)
            stream = portforward(core.connect_get_namespaced_pod_portforward, pod, api.namespace, ports=str(port))
        except (KubernetesError, ApiException, OSError) as error:
            _log.warning("port %d of a pod cannot be reached: %s", port, error)
            return
        remote = stream.socket(port)
        threading.Thread(target=_pump, args=(remote, caller), daemon=True).start()
        _pump(caller, remote)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
    for end in (source, target):  # wakes the other direction, which may wait for bytes
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    target.close()
