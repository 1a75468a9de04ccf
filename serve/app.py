"""The Ray Serve application: a thin HTTP ingress before engines that own a device each. The only wiring.

`serve deploy serve/config.yaml`, KubeRay and `cat-cluster serve` all come through `build`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve as ray_serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from cat_cluster.errors import CatClusterError, EngineStoppedError, OverloadedError, SpecError
from cat_cluster.registry import Registry
from cat_cluster.registry.references import parse_reference
from cat_cluster.store import open_store
from cat_cluster.telemetry import (
    HTTP_REQUESTS,
    HTTP_SECONDS,
    SERVING_METRICS,
    Metrics,
    MetricSpec,
    PrometheusBackend,
    Record,
)
from cat_cluster.telemetry.ray_backend import RayBackend
from serve.calls import Accepted, AdminAction, Event, Failed, Finished, ImageCall, Preview, Progress
from serve.http.access import Access, check_bind
from serve.http.http_errors import error_named
from serve.http.ingress import build_app
from serve.http.log_format import write_logs
from serve.service import Service, failure
from serve.settings import ServeSettings

logger = logging.getLogger("cat_cluster.serve")

ENGINE, INGRESS = "Engine", "Ingress"
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
TRIES = 4  # of a call whose engine goes away: its images are a function of the call, so another engine's are the same
RETRY_S = 1.0
PATIENCE_S = 30.0  # an engine that died is replaced within it; without any for so long, calls are refused
STATUS_S = 5.0
ROUNDS = 4  # an engine's images at once, times this: more calls go to another engine than the adapter's own
# `/metrics` puts those of both processes one after the other: no metric may be in both.
HTTP_METRICS = (HTTP_REQUESTS, HTTP_SECONDS)
ENGINE_METRICS = tuple(metric for metric in SERVING_METRICS if metric not in HTTP_METRICS)
_GONE = (RayActorError, ReplicaUnavailableError, ObjectLostError)


class Deployment(BaseModel):
    """How many of each there are; everything else about a deployment is ServeSettings'."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: ServeSettings = Field(default=ServeSettings(), description="How each engine serves.")
    min_engines: int = Field(default=1, ge=1, description="Fewest engines.")
    max_engines: int | None = Field(
        default=None, ge=1, description="Most engines; more than the fewest means autoscaling. None: the fewest."
    )
    ingresses: int = Field(default=1, ge=1, description="HTTP processes.")
    engine_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray sets aside for an engine.")
    engine_gpus: float = Field(default=0.0, ge=0, description="GPUs of an engine.")

    @model_validator(mode="after")
    def _rises(self) -> Deployment:
        if self.most_engines < self.min_engines:
            raise ValueError(f"max_engines must be at least min_engines ({self.min_engines})")
        return self

    @property
    def most_engines(self) -> int:
        """The most engines there may be."""
        return self.min_engines if self.max_engines is None else self.max_engines


class Engine:
    """One replica: a Service in its own process, on its own device."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        write_logs()
        parsed = ServeSettings.model_validate(settings)
        metrics = _BothBackends()
        service = await asyncio.to_thread(Service.open, parsed, Metrics(metrics, ENGINE_METRICS))
        service.exposition = metrics.exposition
        self._service = await service.__aenter__()

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
        """End this process when the engine is stuck or gone.

        Nothing else ends a step that hangs. Its calls are drawn elsewhere at once and Ray Serve starts another replica;
        if this raised instead, it would ask thrice more and then wait for the calls that hang.
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


@ray_serve.ingress()
class Ingress:
    """HTTP in front of the engines; it owns no device and reads the registry only for listings."""

    async def __init__(self, settings: dict[str, Any], engine: DeploymentHandle) -> None:  # type: ignore[misc]
        write_logs()
        self._settings = ServeSettings.model_validate(settings)
        self._engine = engine
        self._access = Access.from_environment(self._settings)
        check_bind(await asyncio.to_thread(_listens_at), self._access)

    def __serve_build_asgi_app__(self) -> FastAPI:
        metrics = _BothBackends()
        return build_app(
            HandleClient(self._engine),
            Registry(open_store(self._settings.storage)),
            self._settings,
            self._access,
            Metrics(metrics, HTTP_METRICS),
            metrics.exposition,
        )


class HandleClient:
    """EngineClient over a Ray Serve handle: an adapter's calls go to the same engine while it has room."""

    def __init__(self, handle: DeploymentHandle, *, patience_s: float = PATIENCE_S, retry_s: float = RETRY_S) -> None:
        self._handle, self._patience_s, self._retry_s = handle, patience_s, retry_s

    async def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        """Yield the call's events; when its engine goes away, another one draws what is not finished yet."""
        handle = self._handle.options(stream=True, session_id=_session(call))
        until = None if call.deadline_s is None else time.monotonic() + call.deadline_s
        told = _Told()
        for attempt in range(TRIES):
            stream = handle.generate.remote(call)
            gone = failure(EngineStoppedError("the engine went away while it drew: ask again"))
            try:
                while (event := await self._next(stream)) is not None:
                    if isinstance(event, Failed) and event.kind == EngineStoppedError.__name__:
                        gone = event
                        break
                    if isinstance(event, Accepted) and call.model is not None:
                        # Whatever the alias names by then, all images of a call are of one revision.
                        call = replace(call, model=event.model)
                    if told.is_news(event):
                        yield event
                else:
                    return
            except _GONE:
                pass
            except DeploymentUnavailableError:
                yield failure(EngineStoppedError("no engine runs now: ask again"))
                return
            except BackPressureError:
                error = OverloadedError("every engine has as many requests as it takes: ask again", self._retry_s)
                yield failure(error)
                return
            finally:
                stream.cancel()
            left = None if until is None else until - time.monotonic()
            if attempt == TRIES - 1 or (left is not None and left <= 0):
                yield gone
                return
            logger.warning("an engine went away: call %s is sent to another", call.request_id)
            call = replace(call, deadline_s=left)
            await asyncio.sleep(self._retry_s * attempt)

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        """Act on an adapter in every engine, and return the first one's answer; raises CatClusterError."""
        answers = await self._all("admin", action, reference)
        for answer in answers:
            if isinstance(answer, Failed):
                raise error_named(answer.kind, answer.message, answer.retry_after)
        return dict(answers[0])

    async def status(self) -> dict[str, Any]:
        """Return one engine's status, with the drift that any engine knows of and the number of engines."""
        answers = await self._all("status", timeout_s=STATUS_S)
        drift: dict[str, Any] = {}
        for answer in answers:
            for name, status in answer["drift"].items():
                if name not in drift or status["probes"]:
                    drift[name] = status
        return {**answers[0], "drift": drift, "engines": len(answers)}

    async def metrics(self) -> bytes:
        """Return one engine's metrics; with several, scrape Ray's metrics port instead."""
        return bytes(await self._handle.metrics.remote())

    async def _next(self, stream: AsyncGenerator[Event, None]) -> Event | None:
        """Return the next event, None after the last; DeploymentUnavailableError when no engine is there."""
        coming = asyncio.ensure_future(anext(stream, None))
        try:
            while not (await asyncio.wait({coming}, timeout=self._patience_s))[0]:
                with suppress(TimeoutError):  # busy, but there
                    await self._handle.broadcast("status").results_async(timeout_s=STATUS_S, return_exceptions=True)
            return coming.result()
        finally:
            coming.cancel()

    async def _all(self, method: str, *arguments: str, timeout_s: float | None = None) -> list[Any]:
        """Return the answers of the engines that live, one at least; EngineStoppedError when none does."""
        try:
            calls = self._handle.broadcast(method, *arguments)
            answers = await calls.results_async(timeout_s=timeout_s, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            raise EngineStoppedError("no engine answers: ask again") from None
        here = [answer for answer in answers if not isinstance(answer, _GONE)]
        for answer in here:
            if isinstance(answer, BaseException):
                raise answer
        if not here:
            raise EngineStoppedError("no engine answers: ask again")
        return here


class _Told:
    """What a call's client has heard, so that a second engine says only what is new."""

    def __init__(self) -> None:
        self._accepted = False
        self._steps: dict[tuple[type, int], float] = {}

    def is_news(self, event: Event) -> bool:
        """Whether an event goes on to the client."""
        if isinstance(event, Accepted):
            first, self._accepted = not self._accepted, True
            return first
        if isinstance(event, Finished):
            return self._later(Finished, event.index, 1.0)
        if isinstance(event, Progress | Preview) and (Finished, event.index) not in self._steps:
            return self._later(type(event), event.index, event.step)
        return isinstance(event, Failed)

    def _later(self, kind: type, index: int, step: float) -> bool:
        later = step > self._steps.get((kind, index), -1.0)
        if later:
            self._steps[kind, index] = step
        return later


def build(args: Mapping[str, Any]) -> ray_serve.Application:
    """Return the application for the `args` of a Serve config file; see Deployment. Raises SpecError."""
    try:
        deployment = Deployment.model_validate(dict(args))
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in bad['loc'])}: {bad['msg']}" for bad in error.errors()]
        raise SpecError("the service's args are not right:\n" + "\n".join(lines)) from None
    settings = deployment.settings
    document = settings.model_dump(mode="json")
    most, images = deployment.most_engines, settings.max_rows // 2
    room = settings.max_waiting + images
    # A single engine queues and refuses by itself, fairly. Of several, another draws what one has too many of.
    ongoing, queued = room + images, room
    if most > 1:
        ongoing = min(room, ROUNDS * images)
        queued = max(images, room - ongoing) * most
    scaling: dict[str, Any] = {"num_replicas": deployment.min_engines}
    if most > deployment.min_engines:
        scaling = {
            "autoscaling_config": {
                "min_replicas": deployment.min_engines,
                "max_replicas": most,
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
        max_ongoing_requests=ongoing,
        max_queued_requests=queued,
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
        max_ongoing_requests=4 * room * most,
        graceful_shutdown_timeout_s=settings.deadline_s + 20.0,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,
    )
    application: ray_serve.Application = ingress.bind(document, engine.bind(document))
    return application


def _listens_at() -> str:
    """Return the address of Ray Serve's proxies, which ask for no key themselves."""
    return str(_get_global_client().http_config.host or "")


def _session(call: ImageCall) -> str:
    """Return what an engine is chosen by: an adapter's calls share its slot, those of the base go anywhere."""
    if call.model is None:
        return call.request_id
    try:
        return parse_reference(call.model).adapter_id
    except CatClusterError:
        return call.model  # the engine will say what is wrong with it


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
