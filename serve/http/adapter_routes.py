"""What there is to serve: models as OpenAI lists them, adapters with their scores, samples and drift; and admin."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from statistics import mean, pstdev
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Depends, Header, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from cat_cluster.errors import AdapterNotFoundError, RegistryError
from cat_cluster.evaluation.drift import DriftMonitor
from cat_cluster.registry import LARGEST_PAGE, Manifest, ManifestHead, Registry
from cat_cluster.registry.objects import PHOTO_PREFIX
from cat_cluster.registry.references import LATEST, parse_reference
from cat_cluster.spec.choices import ProbeScore
from serve.calls import AdminAction
from serve.http.answers import (
    ActionResponse,
    AdapterCard,
    AdapterDetail,
    AdapterList,
    ConceptCard,
    DriftResponse,
    ModelCard,
    ModelList,
    ReferenceScore,
    RevisionCard,
    StatusResponse,
)
from serve.http.http_errors import HttpError, error_responses
from serve.http.registry_listing import parse_model
from serve.http.routes import IngressDep, KeyedRoute, RouteParts, bearer, caller_of, ingress_of, request_entry
from serve.http.sites import is_own_page
from serve.http.streams import cancelled_on_disconnect
from serve.probes.records import read_history

FOREVER = "private, max-age=31536000, immutable"  # a revision's pictures never change
A_WHILE = "private, no-cache"  # what an alias names may change: the browser revalidates, and gets 304
_EVER = 24 * 366

router = APIRouter(prefix="/v1", route_class=KeyedRoute, tags=["catalogue"], dependencies=[Depends(bearer)])

ReferencePath = Annotated[
    str, Path(description="`id`, `id@alias` or `id@r-...`.", max_length=1024, examples=["striped-cup@latest"])
]

LimitQuery = Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="Entries of a page, at most.")]
AfterQuery = Annotated[
    str | None,
    Query(max_length=1024, description="`last_id` of the page before: the entries behind it follow.", examples=["cup"]),
]


def admin_only(request: Request) -> None:
    """Refuse callers who may not act on adapters, and pages of other sites, those of `cors_origins` too."""
    if not is_own_page(request):
        raise HttpError(403, "pages of other sites may not act on adapters", "admin_only")
    ingress_of(request).access.check_admin(caller_of(request))


def sees_photos(request: Request) -> bool:
    """Say whether training photos are shown: to admins, or to everybody where the operator says so."""
    settings = ingress_of(request).settings
    return settings.show_photos or (caller_of(request).is_admin and is_own_page(request))


PhotosDep = Annotated[bool, Depends(sees_photos)]


@router.get("/models", responses=error_responses(400, 401, 429, 503))
async def list_models(ingress: IngressDep, limit: LimitQuery = LARGEST_PAGE, after: AfterQuery = None) -> ModelList:
    """List the base model, then every adapter with a `latest` revision, page by page.

    OpenAI's client reads one page of this list: the default is the largest one.
    """
    base = ingress.settings.base
    cards = [] if after else [_base_card(ingress)]
    start = None if after in (None, "", base) else _behind(after)
    page = await ingress.registry_listing.page(limit - len(cards), start, served=True)
    for item in page.adapters:
        if item.latest is not None:
            # One that is named as the base model can be asked for by an alias alone.
            name = f"{item.adapter_id}@{LATEST}" if item.adapter_id == base else item.adapter_id
            cards.append(_model_card(ingress, name, item.latest))
    return ModelList(data=cards, **_place(cards, page.has_more))


@router.get("/models/{model:path}", responses=error_responses(400, 401, 404, 429, 503))
async def get_model(model: str, ingress: IngressDep) -> ModelCard:
    """Describe what a model name refers to: the base model, or an adapter by `id`, `id@alias` or `id@r-...`."""
    if model == ingress.settings.base:
        return _base_card(ingress)
    return _model_card(ingress, model, (await ingress.registry_listing.head(model))[1])


@router.get("/adapters", responses=error_responses(400, 401, 429, 503))
async def list_adapters(
    ingress: IngressDep, photos: PhotosDep, limit: LimitQuery = 100, after: AfterQuery = None
) -> AdapterList:
    """List every adapter with its aliases, revisions and scores, page by page."""
    page = await ingress.registry_listing.page(limit, _behind(after) if after else None)
    cards = [
        AdapterCard(
            id=item.adapter_id,
            aliases=item.aliases,
            revisions=list(item.revisions),
            damaged=list(item.damaged),
            damaged_aliases=list(item.damaged_aliases),
            latest=None if item.latest is None else RevisionCard(**_revision(item.latest, photos)),
        )
        for item in page.adapters
    ]
    return AdapterList(data=cards, **_place(cards, page.has_more))


@router.get("/adapters/{reference}", responses=error_responses(400, 401, 404, 429, 503))
async def get_adapter(reference: ReferencePath, ingress: IngressDep, photos: PhotosDep) -> AdapterDetail:
    """Describe the revision that a reference names, and the names of its adapter."""
    summary, head = await ingress.registry_listing.head(reference)
    names: dict[str, Any] = {"aliases": summary.aliases, "revisions": list(summary.revisions)}
    return AdapterDetail(id=summary.adapter_id, **names, **_revision(head, photos))


@router.get(
    "/adapters/{reference}/samples/{name}",
    response_class=Response,
    responses={
        200: {"description": "The picture.", "content": {"image/png": {}}},
        304: {"description": "The picture is the one that If-None-Match names."},
        **error_responses(400, 401, 403, 404, 422, 429, 503),
    },
)
async def get_sample(
    reference: ReferencePath,
    name: Annotated[str, Path(max_length=100, examples=["sks.png"])],
    ingress: IngressDep,
    photos: PhotosDep,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Return an example picture of a revision; under `id@r-...` it may be kept for ever.

    Training photos (`photo-...`) are for admin keys, unless the service has `show_photos`.
    """
    if name.startswith(PHOTO_PREFIX) and not photos:
        raise HttpError(
            403,
            "training photos are for admin keys: use one of CAT_ADMIN_KEYS, or set show_photos where the service runs",
            "admin_only",
        )
    _, manifest = await ingress.registry_listing.manifest(reference)
    if name not in manifest.samples or name not in manifest.objects:
        raise AdapterNotFoundError(
            f"{manifest.name} has no sample of this name; GET /v1/adapters/{{reference}} lists them"
        )
    tag = f'"{manifest.objects[name].sha256}"'
    headers = {"etag": tag, "cache-control": A_WHILE if parse_model(reference).revision is None else FOREVER}
    if if_none_match is not None and tag in if_none_match:
        return Response(status_code=304, headers=headers)
    picture = await asyncio.to_thread(ingress.registry_listing.registry.read_object, manifest, name)
    return Response(picture, headers=headers, media_type="image/png")


@router.get("/adapters/{reference}/drift", responses=error_responses(400, 401, 404, 429, 503))
async def get_drift(
    reference: ReferencePath,
    ingress: IngressDep,
    hours: Annotated[int, Query(ge=1, le=_EVER, description="Hours of history.")] = 24,
) -> DriftResponse:
    """Return how a revision's scores have moved since it was measured: state, reference, detectors, probe records."""
    summary, manifest = await ingress.registry_listing.manifest(reference)
    live: Mapping[str, Any] = (await ingress.engine().status()).get("drift", {})
    own = {name.partition("@")[2]: found for name, found in live.items() if name.startswith(f"{summary.adapter_id}@")}
    now = own.get(manifest.revision, {})
    registry = ingress.registry_listing.registry
    history = await asyncio.to_thread(_history, registry, manifest, hours)
    quarantine = await asyncio.to_thread(registry.quarantined, manifest.adapter_id, manifest.revision)
    return DriftResponse(
        name=manifest.name,
        state=now.get("state", "unknown"),
        reason=now.get("reason"),
        quarantined=None if quarantine is None else asdict(quarantine),
        states={revision: found.get("state", "unknown") for revision, found in own.items()},
        policy=ingress.settings.probes.policy,
        canonical_every_s=ingress.settings.probes.canonical_every_s,
        reference=_reference(manifest),
        detectors=now.get("statistics"),
        history=history,
    )


@router.post(
    "/adapters/{reference}/{action}",
    responses=error_responses(400, 401, 403, 404, 409, 422, 429, 499, 503, 504),
    dependencies=[Depends(admin_only)],
)
async def act(reference: ReferencePath, action: AdminAction, request: Request, ingress: IngressDep) -> ActionResponse:
    """Act on an adapter in every engine; needs an admin key.

    load, unload: into a slot, out of it. pin, unpin: never evict, evict again. prefetch: into host memory.
    probe: measure its drift now. release: end its quarantine.
    """
    parse_model(reference)
    request_entry(request).facts.update(model=reference, action=action)
    async with cancelled_on_disconnect(request.receive, ingress.settings.deadline_s):
        result = await ingress.engine().admin(action, reference)
    return ActionResponse(action=action, reference=reference, result=result)


@router.get("/status", responses=error_responses(401, 429, 503))
async def get_status(ingress: IngressDep) -> StatusResponse:
    """Return the engine's state: what is loaded, waiting and running, and the drift of what is probed."""
    return StatusResponse.model_validate(await ingress.engine().status())


def _base_card(ingress: RouteParts) -> ModelCard:
    base = ingress.settings.base
    return ModelCard(id=base, created=0, root=base, parent=None)


def _model_card(ingress: RouteParts, name: str, head: ManifestHead) -> ModelCard:
    created = int(datetime.fromisoformat(head.created).timestamp())
    return ModelCard(id=name, created=created, root=head.name, parent=ingress.settings.base)


def _behind(after: str) -> str:
    """Return the id behind which a page begins."""
    try:
        return parse_reference(after).adapter_id
    except RegistryError as error:
        raise HttpError(
            400, f"after: {error}; send the last_id of the page before", "invalid_value", param="after"
        ) from None


def _place(cards: Sequence[ModelCard | AdapterCard], has_more: bool) -> dict[str, Any]:
    """Return the fields by which a page is followed by the next."""
    first, last = (cards[0].id, cards[-1].id) if cards else (None, None)
    return {"first_id": first, "last_id": last, "has_more": has_more}


def _revision(manifest: ManifestHead, photos: bool) -> dict[str, Any]:
    """Return the fields of a RevisionCard: what to know of a revision without its spec and its history.

    photos: whether its samples may name its training photos.
    """
    found = manifest.metrics or {}
    return {
        "name": manifest.name,
        "revision": manifest.revision,
        "status": manifest.status,
        "created": manifest.created,
        "base": manifest.base_name,
        "base_fingerprint": manifest.base_fingerprint,
        "method": manifest.method,
        "rank": manifest.rank,
        "targets": manifest.targets,
        "concepts": [
            ConceptCard(token=item.token, class_noun=item.class_noun, alpha=item.alpha) for item in manifest.concepts
        ],
        "metrics": {name: value for name, value in found.items() if value is None or isinstance(value, int | float)},
        "intervals": found.get("intervals") or {},
        "leak_matrix": found.get("leak_matrix"),
        "judge": manifest.judge,
        "samples": [name for name in manifest.samples if photos or not name.startswith(PHOTO_PREFIX)],
    }


def _measured(manifest: Manifest) -> Mapping[str, Mapping[str, Any]]:
    """Return token -> what was measured of it, with its scores for each pair."""
    return (manifest.reference or {}).get("concepts") or {}


def _reference(manifest: Manifest) -> dict[str, ReferenceScore]:
    """Return each score's spread over the pairs that were measured; the photos stay in the store."""
    found = {}
    for score in get_args(ProbeScore):
        scores = [value for concept in _measured(manifest).values() for value in _pair_scores(concept, score)]
        values = [value for value in scores if value is not None]
        if values:
            found[score] = ReferenceScore(mean=mean(values), std=pstdev(values), count=len(values))
    return found


def _pair_scores(concept: Mapping[str, Any], score: ProbeScore) -> Sequence[float | None]:
    """Return a score of the pairs that have it."""
    found = (concept.get("decoy") or {}).get("drift") if score == "decoy_drift" else concept.get(score)
    return found or ()


def _history(registry: Registry, manifest: Manifest, hours: int) -> list[dict[str, Any]]:
    """Read probe records; a record of detectors gets their statistics as shares of their limits."""
    monitors: dict[str, DriftMonitor] = {}
    for token, concept in _measured(manifest).items():
        with suppress(ValueError, KeyError, TypeError):  # measured on too few pairs: it has no live probes
            monitors[token] = DriftMonitor(concept)
    history = []
    for record in read_history(registry.store, manifest.adapter_id, manifest.revision, hours):
        fields = record.model_dump(exclude={"detectors"})
        monitor = monitors.get(record.token or "")
        if record.detectors is not None and monitor is not None:
            with suppress(ValueError):
                monitor.restore(record.detectors)
                shares = monitor.shares
                fields["detectors"] = {"share": max(max(row.values()) for row in shares.values()), "shares": shares}
        history.append(fields)
    return history
