"""The routes of training, in the order in which they are described."""

from __future__ import annotations

from serve.http.training import file_routes, job_routes, run_routes, sample_routes, service_routes

ROUTERS = (
    file_routes.router,
    job_routes.router,
    run_routes.router,
    sample_routes.router,
    service_routes.router,
)
