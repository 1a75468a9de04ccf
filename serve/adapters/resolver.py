"""What a reference names now: aliases read from the registry by key, kept for a moment, shared by all who ask."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from cat_cluster.errors import (
    AdapterNotFoundError,
    CatClusterError,
    EngineStoppedError,
    QuarantinedError,
    RegistryError,
    StoreError,
)
from cat_cluster.registry import Manifest, Registry
from cat_cluster.registry.references import LATEST, Reference, parse_reference
from serve.adapters.futures import bare, claim, fail, failed, finished
from serve.settings import ServeSettings

MOST_KEPT = 1024  # references of each table: a flood of names must not fill the memory
MOST_STALE_S = 600.0  # how long the store may be unreachable before what it last said no longer counts
PATIENCE_S = 1.0  # a look-up that takes longer, of a reference that is known, is not waited for
_WORKERS = 4

_log = logging.getLogger(__name__)
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True)
class Resolved:
    """The revision that serves a reference; `note` says why it is not the one that the alias names now."""

    manifest: Manifest
    note: str | None = None


@dataclass
class _Known:
    """What a reference named when the look-up began at `checked`; `retry_at`: the store has not answered since."""

    resolved: Resolved
    checked: float
    retry_at: float | None = None


@dataclass(frozen=True)
class _Refused:
    """Why a reference cannot be served, and until when nobody looks again."""

    error: CatClusterError
    until: float


@dataclass(frozen=True)
class _Running:
    """A look-up under way and those who wait for it."""

    started: float
    waiters: list[Future[Resolved]] = field(default_factory=list)


class ReferenceResolver:
    """Resolves references without ever listing the store; safe to call from any thread, and it never blocks.

    An answer counts for `alias_ttl_s`; unknown names stay unknown for `missing_ttl_s`. While the store cannot be
    reached, or is slow, the last answer stands for at most MOST_STALE_S.
    """

    def __init__(self, registry: Registry, settings: ServeSettings, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._known: OrderedDict[Reference, _Known] = OrderedDict()
        self._refused: OrderedDict[Reference, _Refused] = OrderedDict()
        self._running: dict[Reference, _Running] = {}
        self._lock = threading.Lock()
        self._workers = ThreadPoolExecutor(_WORKERS, "adapter-lookup")
        self._closed = False

    def resolve(self, reference: str) -> Future[Resolved]:
        """Return a future of the revision that serves `id`, `id@alias` or `id@r-...` now.

        It fails with RegistryError (malformed, damaged), AdapterNotFoundError, QuarantinedError, or StoreError.
        """
        try:
            wanted = parse_reference(reference)
        except RegistryError as error:
            return failed(error)
        with self._lock:
            if self._closed:
                return failed(EngineStoppedError("the engine is stopping: ask another replica"))
            now = self._clock()
            refused = self._refused.get(wanted)
            if refused is not None and now < refused.until:
                return failed(refused.error)
            known = self._known.get(wanted)
            if known is not None and self._stands(known, now):
                self._known.move_to_end(wanted)
                return finished(known.resolved)
            running = self._running.get(wanted) or self._start(wanted, now)
            slow = now - running.started > PATIENCE_S
            if known is not None and now - known.checked <= MOST_STALE_S and (slow or known.retry_at is not None):
                return finished(known.resolved)
            future: Future[Resolved] = Future()
            running.waiters.append(future)
            return future

    def counts(self) -> dict[str, int]:
        """Return how many references are known, refused, and being looked up."""
        with self._lock:
            return {"known": len(self._known), "refused": len(self._refused), "running": len(self._running)}

    def close(self) -> None:
        """Fail what waits with EngineStoppedError and look nothing up any more."""
        with self._lock:
            self._closed = True
            running, self._running = self._running, {}
        self._workers.shutdown(wait=False, cancel_futures=True)
        for lookup in running.values():
            _settle(lookup.waiters, EngineStoppedError("the engine is stopping: ask another replica"))

    def _stands(self, known: _Known, now: float) -> bool:
        if now - known.checked < self._settings.alias_ttl_s:
            return True
        return known.retry_at is not None and now < known.retry_at and now - known.checked <= MOST_STALE_S

    def _start(self, wanted: Reference, now: float) -> _Running:
        running = self._running[wanted] = _Running(now)
        self._workers.submit(self._run, wanted, running)
        return running

    def _run(self, wanted: Reference, running: _Running) -> None:
        outcome: Resolved | Exception
        try:
            outcome = self._look_up(wanted)
        except Exception as error:
            outcome = error
        with self._lock:
            if self._running.get(wanted) is not running:
                return  # closed meanwhile
            del self._running[wanted]
            outcome = self._remembered(wanted, outcome, running.started)
        _settle(running.waiters, outcome)

    def _look_up(self, wanted: Reference) -> Resolved:
        name = f"{wanted.adapter_id}@{wanted.revision or wanted.alias}"
        manifest = self._registry.look_up(name)
        if manifest is None:
            raise AdapterNotFoundError(
                f"no adapter {name!r} in storage {self._registry.store.url}: GET /v1/models lists those there are"
            )
        quarantine = self._registry.quarantined(manifest.adapter_id, manifest.revision)
        if quarantine is None:
            return Resolved(manifest)
        state = f"{manifest.name} is quarantined since {quarantine.created} ({quarantine.reason})"
        if wanted.revision is None and self._settings.probes.policy == "fallback":
            earlier = self._fallback(manifest, wanted.alias or LATEST)
            if earlier is not None:
                return Resolved(earlier, f"{state}; {earlier.name} serves in its place")
        raise QuarantinedError(f"{state}: name another revision, point the alias at one, or release it")

    def _fallback(self, manifest: Manifest, alias: str) -> Manifest | None:
        revision = self._registry.previous_revision(manifest.adapter_id, alias, manifest.revision)
        return None if revision is None else self._registry.look_up(f"{manifest.adapter_id}@{revision}")

    def _remembered(self, wanted: Reference, outcome: Resolved | Exception, started: float) -> Resolved | Exception:
        """Keep an outcome for as long as its kind counts, and return the one to answer with."""
        now, known = self._clock(), self._known.get(wanted)
        if isinstance(outcome, Resolved):
            self._refused.pop(wanted, None)
            _keep(self._known, wanted, _Known(outcome, started))
        elif isinstance(outcome, StoreError):
            if known is not None and now - known.checked <= MOST_STALE_S:
                _log.warning("%s still serves: the store does not answer (%s)", known.resolved.manifest.name, outcome)
                known.retry_at = now + self._settings.alias_ttl_s
                return known.resolved
        elif isinstance(outcome, CatClusterError):
            self._known.pop(wanted, None)
            quarantined = isinstance(outcome, QuarantinedError)
            ttl = self._settings.alias_ttl_s if quarantined else self._settings.missing_ttl_s
            _keep(self._refused, wanted, _Refused(bare(outcome), now + ttl))
        return outcome


def _keep(table: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    """Put an entry last in a table, and drop the first ones of a table that is full."""
    table[key] = value
    table.move_to_end(key)
    while len(table) > MOST_KEPT:
        table.popitem(last=False)


def _settle(waiters: list[Future[Resolved]], outcome: Resolved | Exception) -> None:
    for future in waiters:
        if claim(future):
            if isinstance(outcome, Resolved):
                future.set_result(outcome)
            else:
                fail(future, outcome)
