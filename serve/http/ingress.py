"""The HTTP service: keys, routes, errors and logs around an engine's client; it knows no Ray and owns no device."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from cat_cluster.errors import CatClusterError, EngineStoppedError
from cat_cluster.registry import Registry
from cat_cluster.registry.manifest import package_version
from cat_cluster.telemetry import Metrics
from serve.calls import EngineClient
from serve.http import adapter_routes, image_routes, pages
from serve.http.access import Access
from serve.http.answers import HealthResponse
from serve.http.head import HeadAsGet
from serve.http.http_errors import error_responses, http_error_of
from serve.http.registry_listing import RegistryListing
from serve.http.request_log import RequestLog, log_unexpected
from serve.http.routes import IngressDep, RouteParts, request_entry
from serve.http.served_sizes import ServedSizes
from serve.http.sites import SiteGuard
from serve.http.training import routes as training_routes
from serve.http.training.job_bodies import run_schemas
from serve.http.training.parts import TrainingParts
from serve.settings import ServeSettings
from serve.tracing import NO_TRACER, Tracer

PROMPTS_VARIABLE = "CAT_LOG_PROMPTS"
_ENGINE_S = 5.0
_ABOUT = """Generates images with CAT adapters of one Stable Diffusion base: each request names an adapter, and requests
of different adapters are denoised in one batch. Any OpenAI client can use `/v1/images/generations`, `/v1/images/edits`
and `/v1/models`, and teach new adapters by `/v1/files` and `/v1/fine_tuning/jobs`."""

router = APIRouter(tags=["operation"])


def build_app(
    client: EngineClient | Callable[[], EngineClient],
    registry: Registry,
    settings: ServeSettings,
    access: Access,
    metrics: Metrics,
    exposition: Callable[[], bytes],
    *,
    proxy_adds_id: bool = False,
    tracer: Tracer = NO_TRACER,
) -> FastAPI:
    """Return the service as an ASGI app.

    client: the engine, or what returns it once the process runs. metrics: has HTTP's; exposition: returns this process'
    metrics as Prometheus' text, empty where the client's `metrics` has them already. proxy_adds_id: see RequestLog.
    """
    app = FastAPI(
        title="cat-cluster",
        version=package_version(),
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    engine = client if callable(client) else lambda: client
    app.state.ingress = RouteParts(
        engine=engine,
        served_sizes=ServedSizes(engine),
        registry_listing=RegistryListing(registry),
        settings=settings,
        access=access,
        exposition=exposition,
        training=TrainingParts(registry, settings),
    )
    for part in _ROUTERS:
        app.include_router(part)
    pages.mount_files(app)
    for expected in (CatClusterError, HTTPException, RequestValidationError):
        app.add_exception_handler(expected, _error_response)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],  # pages of other sites draw and read: see training.guards
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["x-request-id", "x-cat-model", "x-cat-drift", "x-cat-safety", "retry-after"],
        )
    app.add_middleware(HeadAsGet)
    app.add_middleware(SiteGuard, loopback_only=access.is_open, origins=settings.cors_origins)
    may_quote = os.environ.get(PROMPTS_VARIABLE) == "1"
    app.add_middleware(RequestLog, metrics=metrics, may_quote=may_quote, proxy_adds_id=proxy_adds_id, tracer=tracer)
    app.openapi = _as_it_is(app.openapi)  # type: ignore[method-assign]
    return app


@router.get("/health", responses=error_responses())
async def health() -> HealthResponse:
    """Report that the process is running."""
    return HealthResponse(status="ok")


@router.get("/ready", responses=error_responses(503))
async def ready(ingress: IngressDep) -> HealthResponse:
    """Report whether the engine responds; 503 until it does."""
    try:
        await asyncio.wait_for(ingress.engine().status(), _ENGINE_S)
    except Exception as error:  # whatever keeps the engine from responding, a load balancer must get 503
        raise EngineStoppedError("the engine does not respond yet; try again") from error
    return HealthResponse(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}, **error_responses()},
)
async def metrics(ingress: IngressDep) -> Response:
    """Return the metrics of this process, and of its engine if that responds, in Prometheus' text format."""
    text = ingress.exposition()
    with suppress(Exception):  # an engine that is away is when these numbers matter most
        text += await asyncio.wait_for(ingress.engine().metrics(), _ENGINE_S)
    return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


async def _error_response(request: Request, error: Exception) -> Response:
    """Return the response to an expected error; one that the table does not have is logged as well."""
    http_error, entry = http_error_of(error), request_entry(request)
    if http_error.status_code == 500:
        log_unexpected(entry, error)
    else:
        entry.code = http_error.code
    response = http_error.response()
    if response.status_code == 405 and (methods := _methods_of(request)):
        response.headers["Allow"] = ", ".join(sorted(methods))  # the framework names those of the path's first route
    return response


def _methods_of(request: Request) -> set[str]:
    """Return the methods of all routes of the path that a request's first fitting route has."""
    routes = [route for part in _ROUTERS for route in part.routes if isinstance(route, Route)]
    path = next((route.path for route in routes if route.matches(request.scope)[0] is not Match.NONE), None)
    return {method for route in routes if route.path == path for method in route.methods or ()}


_ROUTERS = (router, image_routes.router, adapter_routes.router, *training_routes.ROUTERS, pages.router)


def _as_it_is(describe: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Return a description without FastAPI's own 422, for what cannot be validated is 400 here, and with job specs."""

    def described() -> dict[str, Any]:
        document = describe()
        for operations in document["paths"].values():
            for operation in operations.values():
                found = operation["responses"].get("422", {})
                if "HTTPValidationError" in str(found):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["schemas"] |= run_schemas()
        return document

    return described
