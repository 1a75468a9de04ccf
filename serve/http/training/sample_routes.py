"""/v1/runs/{run}/samples: what adapters draw while they train, where `monitoring.samples_every` asks for it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from cat_cluster.errors import ObjectNotFoundError
from cat_cluster.store import ObjectStore
from serve.http.http_errors import HttpError, error_responses
from serve.http.routes import KeyedRoute, bearer, ingress_of
from serve.http.training.guards import RunPath, seen_run, training_on

_SAMPLE = re.compile(r"runs/run-[0-9a-f]{12}/samples/([a-z0-9-]+)/([0-9]{8})\.png")
_LAST_STEP = 10**8 - 1


class Sample(BaseModel):
    """A picture of an adapter in training."""

    adapter: str
    step: int = Field(description="Of its training, after which it was drawn.")


class SampleList(BaseModel):
    """The pictures that there are, by adapter and step."""

    object: Literal["list"] = "list"
    data: list[Sample]


router = APIRouter(
    prefix="/v1/runs/{run_id}/samples",
    route_class=KeyedRoute,
    tags=["training"],
    dependencies=[Depends(bearer), Depends(training_on)],
)


@router.get("", summary="List samples", responses=error_responses(400, 401, 403, 404, 429, 503, 504))
async def list_samples(run_id: RunPath, request: Request) -> SampleList:
    """List what the adapters of a run have drawn so far."""
    await seen_run(request, run_id)
    training = ingress_of(request).training
    return SampleList(data=await training.call(_samples, training.store, run_id))


@router.get(
    "/{adapter}/{step}",
    summary="Fetch a sample",
    response_class=Response,
    responses={
        200: {"description": "The picture.", "content": {"image/png": {}}},
        **error_responses(400, 401, 403, 404, 429, 503, 504),
    },
)
async def get_sample(
    run_id: RunPath,
    adapter: Annotated[str, Path(max_length=63, examples=["my-cup"])],
    step: Annotated[int, Path(ge=0, le=_LAST_STEP, examples=[40])],
    request: Request,
) -> Response:
    """Return what an adapter draws after a step: the base, without its token and with it, of the same seeds."""
    await seen_run(request, run_id)
    key = f"runs/{run_id}/samples/{adapter}/{step:08d}.png"
    training = ingress_of(request).training
    try:
        if not _SAMPLE.fullmatch(key):
            raise ObjectNotFoundError(key)
        picture = await training.call(training.store.get, key)
    except ObjectNotFoundError:
        raise HttpError(
            404,
            f"{adapter[:80]!r} has no sample at step {step}: GET /v1/runs/{run_id}/samples lists those there are",
            "sample_not_found",
        ) from None
    return Response(picture, media_type="image/png")


def _samples(store: ObjectStore, run_id: str) -> list[Sample]:
    found = map(_SAMPLE.fullmatch, store.list(f"runs/{run_id}/samples/"))
    return [Sample(adapter=one[1], step=int(one[2])) for one in found if one is not None]
