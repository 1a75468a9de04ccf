"""The Ray Serve application: a thin HTTP ingress before engines that own a device each. The only wiring.

`serve deploy serve/config.yaml`, KubeRay and `cat-cluster serve` all come through `build`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from cat_cluster import errors
from cat_cluster.cluster.ray_metrics import RayBackend
from cat_cluster.errors import CatClusterError, EngineStoppedError, SpecError
from cat_cluster.registry import Registry
from cat_cluster.registry.references import parse_reference
from cat_cluster.store import open_store
from cat_cluster.telemetry import SERVING_METRICS, Metrics, MetricSpec, PrometheusBackend, Record
from serve.access import Access
from serve.calls import Accepted, AdminAction, Event, Failed, Finished, ImageCall
from serve.ingress import build_app
from serve.service import Service, failure
from serve.settings import ServeSettings

ENGINE, INGRESS = "Engine", "Ingress"
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
TRIES = 4  # of a call whose engine goes away: its images are a function of the call, so another engine's are the same
RETRY_S = 1.0
_GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)


class Deployment(BaseModel):
    """How many of each there are; everything else about a deployment is ServeSettings'."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: ServeSettings = Field(default=ServeSettings(), description="How each engine serves.")
    min_engines: int = Field(default=1, ge=1, description="Fewest engines.")
    max_engines: int = Field(default=1, ge=1, description="Most engines; more than the fewest means autoscaling.")
    ingresses: int = Field(default=1, ge=1, description="HTTP processes.")
    engine_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray sets aside for an engine.")
    engine_gpus: float = Field(default=0.0, ge=0, description="GPUs of an engine.")


class Engine:
    """One replica: a Service in its own process, on its own device."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        parsed = ServeSettings.model_validate(settings)
        metrics = _BothBackends()
        self._service = await asyncio.to_thread(Service.open, parsed, Metrics(metrics, SERVING_METRICS))
        self._service.exposition = metrics.exposition
        await self._service.__aenter__()

    async def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        """See EngineClient."""
        async for event in self._service.generate(call):
            yield event

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any] | Failed:
        """See EngineClient; an expected error is an answer, so that its class and words survive the way back."""
        try:
            return await self._service.admin(action, reference)
        except CatClusterError as error:
            return failure(error)

    async def status(self) -> dict[str, Any]:
        """See EngineClient."""
        return await self._service.status()

    async def metrics(self) -> bytes:
        """See EngineClient."""
        return await self._service.metrics()

    async def check_health(self) -> None:
        """Raise when the engine is stuck or gone: Ray Serve then replaces the replica."""
        self._service.check_health()

    async def __del__(self) -> None:
        """Called by Ray Serve after the requests in flight are done."""
        await self._service.__aexit__(None, None, None)


@ray_serve.ingress()
class Ingress:
    """HTTP in front of the engines; it owns no device and reads the registry only for listings."""

    def __init__(self, settings: dict[str, Any], engine: DeploymentHandle) -> None:
        self._settings = ServeSettings.model_validate(settings)
        self._engine = engine

    def __serve_build_asgi_app__(self) -> FastAPI:
        metrics = _BothBackends()
        return build_app(
            HandleClient(self._engine),
            Registry(open_store(self._settings.storage)),
            self._settings,
            Access.from_environment(self._settings),
            Metrics(metrics, SERVING_METRICS),
            metrics.exposition,
        )


class HandleClient:
    """EngineClient over a Ray Serve handle: an adapter's calls go to the same engine while it has room."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        """Yield the call's events; when its engine goes away, another one draws what is not finished yet."""
        session = "base" if call.model is None else _adapter_id(call.model)
        handle = self._handle.options(stream=True, session_id=session)
        accepted: Accepted | None = None
        finished: set[int] = set()
        until = None if call.deadline_s is None else time.monotonic() + call.deadline_s
        for attempt in range(TRIES):
            stream = handle.generate.remote(call)
            try:
                async for event in stream:
                    if isinstance(event, Failed) and event.kind == EngineStoppedError.__name__ and attempt < TRIES - 1:
                        break
                    if isinstance(event, Accepted):
                        if accepted is not None:
                            continue
                        accepted = event
                        # Whatever the alias names by then, all images of a call are of one revision.
                        call = call if call.model is None else replace(call, model=event.model)
                    if isinstance(event, Finished):
                        if event.index in finished:
                            continue
                        finished.add(event.index)
                    yield event
                else:
                    return
            except _GONE:
                if attempt == TRIES - 1 or (until is not None and time.monotonic() > until):
                    yield failure(EngineStoppedError("the engine went away while it drew: ask again"))
                    return
            except BackPressureError:
                yield Failed("OverloadedError", "every engine has as many requests as it takes: ask again", RETRY_S)
                return
            finally:
                stream.cancel()
            await asyncio.sleep(RETRY_S * attempt)

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        """Act on an adapter in every engine, and return the first one's answer; raises CatClusterError."""
        answers = await asyncio.to_thread(self._handle.broadcast("admin", action, reference).results)
        for answer in answers:
            if isinstance(answer, Failed):
                raise error_of(answer)
        return dict(answers[0])

    async def status(self) -> dict[str, Any]:
        """Return one engine's status, with the drift that any engine knows of and the number of engines."""
        answers = await asyncio.to_thread(self._handle.broadcast("status").results)
        if not answers:
            raise EngineStoppedError("no engine runs yet: ask again")
        drift: dict[str, Any] = {}
        for answer in answers:
            for name, status in answer["drift"].items():
                if name not in drift or status["probes"]:
                    drift[name] = status
        return {**answers[0], "drift": drift, "engines": len(answers)}

    async def metrics(self) -> bytes:
        """Return one engine's metrics; with several, scrape Ray's metrics port instead."""
        return bytes(await self._handle.metrics.remote())


def error_of(failed: Failed) -> CatClusterError:
    """Return the error that a Failed event stands for."""
    kind = getattr(errors, failed.kind, EngineStoppedError)
    if failed.retry_after is not None:
        return errors.OverloadedError(failed.message, failed.retry_after)
    error: CatClusterError = kind(failed.message)
    return error


def build(args: Mapping[str, Any]) -> ray_serve.Application:
    """Return the application for the `args` of a Serve config file; see Deployment. Raises SpecError."""
    try:
        deployment = Deployment.model_validate(dict(args))
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in bad['loc'])}: {bad['msg']}" for bad in error.errors()]
        raise SpecError("the service's args are not right:\n" + "\n".join(lines)) from None
    settings = deployment.settings
    document = settings.model_dump(mode="json")
    at_once = settings.max_waiting + settings.max_rows
    images = max(1, settings.max_rows // 2)
    scaling: dict[str, Any] = {"num_replicas": deployment.min_engines}
    if deployment.max_engines > deployment.min_engines:
        scaling = {
            "autoscaling_config": {
                "min_replicas": deployment.min_engines,
                "max_replicas": deployment.max_engines,
                # As many requests as an engine draws at once, and half as many again waiting, before one more starts.
                "target_ongoing_requests": images * 1.5,
                "upscale_delay_s": 10.0,
                "downscale_delay_s": 300.0,
            }
        }
    engine = ray_serve.deployment(
        Engine,
        name=ENGINE,
        ray_actor_options={"num_cpus": deployment.engine_cpus, "num_gpus": deployment.engine_gpus},
        max_ongoing_requests=at_once,
        max_queued_requests=at_once * deployment.max_engines,
        request_router_config={"request_router_class": ROUTER},
        health_check_period_s=5.0,
        health_check_timeout_s=20.0,
        # The longest request may end before its engine goes.
        graceful_shutdown_timeout_s=settings.deadline_s + 10.0,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,
        **scaling,
    )
    ingress = ray_serve.deployment(
        Ingress,
        name=INGRESS,
        num_replicas=deployment.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4 * at_once * deployment.max_engines,
        graceful_shutdown_timeout_s=settings.deadline_s + 20.0,
        max_surge_percent=100,
    )
    application: ray_serve.Application = ingress.bind(document, engine.bind(document))
    return application


def _adapter_id(model: str) -> str:
    try:
        return parse_reference(model).adapter_id
    except CatClusterError:
        return model  # the engine will say what is wrong with it


class _BothBackends:
    """Metrics for Ray's ports, where clusters scrape, and for `/metrics` of the ingress, where people look."""

    def __init__(self) -> None:
        self._ray, self._own = RayBackend(), PrometheusBackend(CollectorRegistry())
        self.exposition = self._own.exposition

    def open(self, spec: MetricSpec) -> Record:
        """Record a value in both."""
        ray_record, own_record = self._ray.open(spec), self._own.open(spec)

        def record(value: float, labels: Mapping[str, str]) -> None:
            ray_record(value, labels)
            own_record(value, labels)

        return record
