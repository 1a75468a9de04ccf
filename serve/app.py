"""The Ray Serve application: a thin HTTP ingress before engines that own a device each. The only wiring.

`serve deploy serve/config.yaml`, KubeRay and `cat-cluster serve` all use `build`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from cat_cluster.errors import CatClusterError, EngineStoppedError, SpecError
from cat_cluster.registry import Registry
from cat_cluster.store import open_store
from cat_cluster.telemetry import HTTP_REQUESTS, HTTP_SECONDS, SERVING_METRICS, Metrics
from cat_cluster.telemetry.ray_backend import RayAndPrometheusBackend
from serve.calls import AdminAction, Event, Failed, ImageCall
from serve.handle_client import HandleClient
from serve.http.access import Access, check_bind
from serve.http.ingress import build_app
from serve.http.log_format import write_logs
from serve.settings import SLEEP_AFTER_S, Deployment, ServeSettings, bad_settings
from serve.tracing import Tracer, open_tracer

if TYPE_CHECKING:
    from serve.service import Service

logger = logging.getLogger("cat_cluster.serve")

ENGINE, INGRESS = "Engine", "Ingress"
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
ROUNDS = 4  # an engine's images at once, times this: more calls go to another engine than the adapter's own
# `/metrics` puts those of both processes one after the other: no metric may be in both.
HTTP_METRICS = (HTTP_REQUESTS, HTTP_SECONDS)
ENGINE_METRICS = tuple(metric for metric in SERVING_METRICS if metric not in HTTP_METRICS)


class EngineReplica:
    """One replica: a Service in its own process, on its own device."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        write_logs()
        parsed = ServeSettings.model_validate(settings)
        metrics = RayAndPrometheusBackend()
        self._tracer = await asyncio.to_thread(open_tracer, "engine")
        service = await asyncio.to_thread(_open_service, parsed, Metrics(metrics, ENGINE_METRICS), self._tracer)
        service.exposition = metrics.exposition
        self._service = await service.__aenter__()

    async def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        """See EngineClient."""
        async for event in self._service.generate(call):
            yield event

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any] | Failed:
        """See EngineClient; an expected error is returned, so that its class and message survive the transport."""
        try:
            return await self._service.admin(action, reference)
        except CatClusterError as error:
            return Failed.of(error)

    async def status(self) -> dict[str, Any]:
        """See EngineClient."""
        return await self._service.status()

    async def metrics(self) -> bytes:
        """See EngineClient."""
        return await self._service.metrics()

    async def check_health(self) -> None:
        """End this process when the engine is stuck or has ended.

        Nothing else ends a step that hangs. Its calls go to other engines at once and Ray Serve starts another replica;
        if this raised instead, Ray Serve would check three more times and then wait for the calls that hang.
        """
        try:
            self._service.check_health()
        except EngineStoppedError as error:
            logger.critical("this replica ends, to be replaced: %s", error)
            os._exit(1)

    async def __del__(self) -> None:
        """Called by Ray Serve after the requests in flight are done."""
        if hasattr(self, "_service"):
            await self._service.__aexit__(None, None, None)
            await asyncio.to_thread(self._tracer.close)


@ray_serve.ingress()
class IngressReplica:
    """HTTP in front of the engines; it owns no device and reads the registry only for listings."""

    async def __init__(  # type: ignore[misc]
        self, settings: dict[str, Any], engine: DeploymentHandle, may_sleep: bool
    ) -> None:
        write_logs()
        self._settings = ServeSettings.model_validate(settings)
        self._engine, self._may_sleep = engine, may_sleep
        self._access = Access.from_environment(self._settings)
        self._tracer = await asyncio.to_thread(open_tracer, "ingress")
        check_bind(await asyncio.to_thread(_listens_at), self._access)

    def __serve_build_asgi_app__(self) -> FastAPI:
        metrics = RayAndPrometheusBackend()
        return build_app(
            HandleClient(self._engine, is_asleep=_runs if self._may_sleep else None),
            Registry(open_store(self._settings.storage)),
            self._settings,
            self._access,
            Metrics(metrics, HTTP_METRICS),
            metrics.exposition,
            proxy_adds_id=True,
            tracer=self._tracer,
        )

    async def __del__(self) -> None:
        """Called by Ray Serve after the requests in flight are done; the last spans are sent before it ends."""
        if hasattr(self, "_tracer"):
            await asyncio.to_thread(self._tracer.close)


def build(args: Mapping[str, Any]) -> ray_serve.Application:
    """Return the application for the `args` of a Serve config file; see Deployment. Raises SpecError."""
    try:
        deployment = Deployment.model_validate(dict(args))
    except ValidationError as error:
        lines = bad_settings(error, "args")
        raise SpecError("the service's args are not right:\n" + "\n".join(lines)) from None
    settings = deployment.settings
    document = settings.model_dump(mode="json")
    most, images = deployment.most_engines, settings.max_rows // 2
    room = settings.max_waiting + images
    # A single engine queues and refuses by itself, fairly. Of several, another takes what one has too many of.
    ongoing, queued = room + images, room
    if most > 1:
        ongoing = min(room, ROUNDS * images)
        queued = max(images, room - ongoing) * most
    engine = ray_serve.deployment(
        EngineReplica,
        name=ENGINE,
        ray_actor_options={"num_cpus": deployment.engine_cpus, "num_gpus": deployment.engine_gpus},
        max_ongoing_requests=ongoing,
        max_queued_requests=queued,
        request_router_config={"request_router_class": ROUTER},
        health_check_period_s=5.0,
        health_check_timeout_s=20.0,
        # The longest request may end before its engine goes.
        graceful_shutdown_timeout_s=settings.deadline_s + 10.0,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,
        **_scaling(deployment, images),
    )
    ingress = ray_serve.deployment(
        IngressReplica,
        name=INGRESS,
        num_replicas=deployment.ingresses,
        ray_actor_options={"num_cpus": 0, "resources": deployment.ingress_resources},
        max_ongoing_requests=4 * room * most,
        # The deadline of an edit begins once it has been sent.
        graceful_shutdown_timeout_s=settings.upload_timeout_s + settings.deadline_s + 20.0,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,
    )
    application: ray_serve.Application = ingress.bind(document, engine.bind(document), deployment.may_sleep)
    return application


def _scaling(deployment: Deployment, images: int) -> dict[str, Any]:
    """Return how many engines Ray Serve may run, as options of a deployment; images: that one draws at once."""
    least, most = deployment.min_engines, deployment.most_engines
    if most == least:
        return {"num_replicas": least}
    scaling: dict[str, Any] = {
        "min_replicas": least,
        "max_replicas": most,
        # An engine's images at once, and half as many again waiting, before one more engine starts.
        "target_ongoing_requests": images * 1.5,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 300.0,
    }
    if deployment.may_sleep:
        # One at first: a deployment whose engine cannot start is told at once, and its doors see one respond.
        scaling["initial_replicas"] = 1
        scaling["downscale_to_zero_delay_s"] = deployment.sleep_after_s or SLEEP_AFTER_S
    return {"autoscaling_config": scaling}


def _open_service(settings: ServeSettings, metrics: Metrics, tracer: Tracer) -> Service:
    """Open the engine; all that draws images is loaded here, since the other processes of the service do without."""
    from serve.service import Service

    return Service.open(settings, metrics, tracer)


def _runs() -> bool:
    """Return whether this replica's application runs: one without an engine sleeps then, and else is still starting."""
    found = ray_serve.status().applications.get(ray_serve.get_replica_context().app_name)
    return found is not None and found.status == "RUNNING"


def _listens_at() -> str:
    """Return the address of Ray Serve's proxies, which check no key themselves."""
    return str(_get_global_client().http_config.host or "")
