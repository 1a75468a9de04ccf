"""/v1/train-services: which training services there are, who trains with whom, and what waits for them."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.requests import Request

from cat_cluster.runs.services import GroupRecord, PlacedAdapter, ServiceRecord, read_services
from cat_cluster.store import ObjectStore
from serve.http.access import Caller
from serve.http.http_errors import error_responses
from serve.http.routes import KeyedRoute, bearer, caller_of, ingress_of
from serve.http.training.guards import training_on
from serve.http.training.submissions import Submissions


class Placed(BaseModel):
    """An adapter at work; its run and its name are null where it is not the caller's."""

    run: str | None
    adapter: str | None


class GroupCard(BaseModel):
    """Workers that train their adapters in the same calls of the U-Net."""

    number: int
    slots: int = Field(description="Adapters that it trains at once; 0 as long as it has had none.")
    base: str | None = Field(description="Of its adapters; null where none of them is the caller's.")
    resolution: int | None = Field(description="Of its adapters, in pixels; null as long as it has none.")
    adapters: list[Placed]


class ServiceCard(BaseModel):
    """A training service of this storage."""

    name: str
    object: Literal["train_service"] = "train_service"
    status: Literal["at work", "silent"] = Field(description="silent: not heard of for a minute or more.")
    updated: str = Field(description="When it was last heard of; ISO 8601 in UTC.")
    workers: int = Field(description="Of each group.")
    groups: list[GroupCard]
    measuring: list[Placed] = Field(description="Adapters that are trained and not yet published.")
    waiting: int = Field(description="Adapters of all runs that wait for a slot.")


class ServiceList(BaseModel):
    """The training services, by name."""

    object: Literal["list"] = "list"
    data: list[ServiceCard]


router = APIRouter(
    prefix="/v1/train-services",
    route_class=KeyedRoute,
    tags=["training"],
    dependencies=[Depends(bearer), Depends(training_on)],
)


@router.get("", summary="List training services", responses=error_responses(400, 401, 403, 429, 503, 504))
async def list_services(request: Request) -> ServiceList:
    """List the training services of the storage, with each group's slots. Of adapters of other keys only their number.

    A service that was killed stays in the list as `silent` until one of its name starts again.
    """
    training, caller = ingress_of(request).training, caller_of(request)
    return ServiceList(data=await training.call(_cards, training.store, training.submissions, caller))


def _cards(store: ObjectStore, submissions: Submissions, caller: Caller) -> list[ServiceCard]:
    services = read_services(store)
    runs = {one.run_id for service in services for one in _at_work(service)}
    seen = {run_id for run_id in runs if submissions.sees(caller, run_id)}
    return [_card(service, seen) for service in services]


def _at_work(service: ServiceRecord) -> list[PlacedAdapter]:
    return [*(one for group in service.groups for one in group.adapters), *service.measuring]


def _card(service: ServiceRecord, seen: set[str]) -> ServiceCard:
    return ServiceCard(
        name=service.name,
        status="at work" if service.is_alive() else "silent",
        updated=service.updated,
        workers=service.workers,
        groups=[_group(group, seen) for group in service.groups],
        measuring=[_placed(one, seen) for one in service.measuring],
        waiting=service.waiting,
    )


def _group(group: GroupRecord, seen: set[str]) -> GroupCard:
    return GroupCard(
        number=group.number,
        slots=group.slots,
        base=group.base if any(one.run_id in seen for one in group.adapters) else None,
        resolution=group.resolution,
        adapters=[_placed(one, seen) for one in group.adapters],
    )


def _placed(one: PlacedAdapter, seen: set[str]) -> Placed:
    is_seen = one.run_id in seen
    return Placed(run=one.run_id if is_seen else None, adapter=one.adapter if is_seen else None)
