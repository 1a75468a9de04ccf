"""An application that runs only when its users reach it: engines wait for the doors, the nodes of the ingresses.

KubeRay sends users to a new cluster as soon as its application runs, and looks at nothing else; whatever is not ready
by then answers nobody. An application runs when all its replicas do, so its engines start last.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from ray import serve as ray_serve

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus

logger = logging.getLogger("cat_cluster.serve")

# From a door that answers to a Service that leads there: a probe each second, and what carries its result on.
PROPAGATION_S = 5.0
PATIENCE_S = 60.0  # the longest wait: a door that never comes must not keep the others from serving
_POLL_S = 0.5


async def doors_open(application: str, ingress: str) -> None:
    """Return once an ingress of the application runs, no proxy of Ray Serve is still starting, and Services know of it.

    Returns at once where the application runs already, as when an engine is replaced; after PATIENCE_S in any case.
    """
    began = time.monotonic()
    while True:
        status = await asyncio.to_thread(ray_serve.status)
        if _is_running(status, application):
            return
        if _is_reachable(status, application, ingress):
            await asyncio.sleep(PROPAGATION_S)
            return
        if time.monotonic() - began >= PATIENCE_S:
            proxies = ", ".join(sorted(status.proxies.values())) or "none"
            logger.warning("no door is open after %.0f s (proxies: %s); the engine goes on", PATIENCE_S, proxies)
            return
        await asyncio.sleep(_POLL_S)


def _is_running(status: ServeStatus, application: str) -> bool:
    found = status.applications.get(application)
    return found is not None and found.status == "RUNNING"


def _is_reachable(status: ServeStatus, application: str, ingress: str) -> bool:
    found = status.applications.get(application)
    deployment = found and found.deployments.get(ingress)
    proxies = set(status.proxies.values())
    runs = bool(deployment and deployment.replica_states.get("RUNNING"))
    return runs and "HEALTHY" in proxies and "STARTING" not in proxies
