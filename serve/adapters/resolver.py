"""What a reference names now: aliases read from the registry by key, cached briefly, looked up once for all callers."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cat_cluster.errors import AdapterNotFoundError, CatClusterError, QuarantinedError, StoreError
from cat_cluster.registry import Manifest, Reference, Registry
from cat_cluster.registry.references import parse_reference
from serve.adapters.failures import MOST_KEPT, Failures
from serve.adapters.shared_tasks import log_nothing, outcome, stopping
from serve.settings import ServeSettings

MOST_STALE_S = 600.0  # how long the store may be unreachable before what it last said no longer counts
PATIENCE_S = 1.0  # a look-up that takes longer, of a reference that is known, is not waited for
_THREADS = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """The revision that serves a reference; `note` says why it is not the one that the alias names now."""

    manifest: Manifest
    note: str | None = None


@dataclass
class _Known:
    """What a reference named when the look-up began at `checked`; `retry_at`: the store has not responded since."""

    resolved: Resolved
    checked: float
    retry_at: float | None = None


@dataclass(frozen=True)
class _LookUp:
    """A look-up under way."""

    started: float
    task: asyncio.Task[Resolved]


class ReferenceResolver:
    """Resolves references without ever listing the store; every method runs on one event loop.

    What a reference names counts for `alias_ttl_s`; unknown names stay unknown for `missing_ttl_s`. While the store
    cannot be reached, or is slow, what it last said is used for at most MOST_STALE_S.
    """

    def __init__(self, registry: Registry, settings: ServeSettings, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._known: OrderedDict[Reference, _Known] = OrderedDict()
        self._refused = Failures[Reference](clock)
        self._running: dict[Reference, _LookUp] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "adapter-lookup")
        self._closed = False

    async def resolve(self, reference: Reference | str) -> Resolved:
        """Return the revision that serves `id`, `id@alias` or `id@r-...` now; see AdapterCache.resolve."""
        wanted = parse_reference(reference)
        if self._closed:
            raise stopping()
        self._refused.check(wanted)
        now, known = self._clock(), self._known.get(wanted)
        if known is not None and self._is_current(known, now):
            self._known.move_to_end(wanted)
            return known.resolved
        running = self._running.get(wanted) or self._start(wanted, now)
        slow = now - running.started > PATIENCE_S
        if known is not None and now - known.checked <= MOST_STALE_S and (slow or known.retry_at is not None):
            return known.resolved
        await asyncio.wait({running.task})  # cancelling one caller does not cancel the look-up
        return outcome(running.task)

    def counts(self) -> dict[str, int]:
        """Return how many references are known, refused, and being looked up."""
        return {"known": len(self._known), "refused": len(self._refused), "running": len(self._running)}

    def close(self) -> None:
        """Cancel the look-ups, whose callers get EngineStoppedError, and stop the threads."""
        self._closed = True
        for running in self._running.values():
            running.task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _is_current(self, known: _Known, now: float) -> bool:
        if now - known.checked < self._settings.alias_ttl_s:
            return True
        return known.retry_at is not None and now < known.retry_at and now - known.checked <= MOST_STALE_S

    def _start(self, wanted: Reference, now: float) -> _LookUp:
        running = self._running[wanted] = _LookUp(now, asyncio.create_task(self._run(wanted, now)))
        running.task.add_done_callback(log_nothing)
        return running

    async def _run(self, wanted: Reference, started: float) -> Resolved:
        """Look a reference up, and keep what is found for as long as its kind counts."""
        try:
            resolved = await asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, wanted)
        except StoreError as error:
            now, known = self._clock(), self._known.get(wanted)
            if known is None or now - known.checked > MOST_STALE_S:
                raise
            _log.warning("%s still serves: the store does not respond (%s)", known.resolved.manifest.name, error)
            known.retry_at = now + self._settings.alias_ttl_s
            return known.resolved
        except CatClusterError as error:
            self._known.pop(wanted, None)
            quarantined = isinstance(error, QuarantinedError)
            self._refused.add(
                wanted, error, self._settings.alias_ttl_s if quarantined else self._settings.missing_ttl_s
            )
            raise
        finally:
            del self._running[wanted]
        self._refused.forget(wanted)
        self._known[wanted] = _Known(resolved, started)
        self._known.move_to_end(wanted)
        while len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)
        return resolved

    def _look_up(self, wanted: Reference) -> Resolved:
        manifest = self._registry.look_up(wanted)
        if manifest is None:
            raise AdapterNotFoundError(
                f"no adapter '{wanted}' in storage {self._registry.store.url}: GET /v1/models lists those there are"
            )
        quarantine = self._registry.quarantined(manifest.adapter_id, manifest.revision)
        if quarantine is None:
            return Resolved(manifest)
        state = f"{manifest.name} is quarantined since {quarantine.created} ({quarantine.reason})"
        if wanted.revision is None and self._settings.probes.policy == "fallback":
            earlier = self._fallback(manifest, wanted.alias)
            if earlier is not None:
                return Resolved(earlier, f"{state}; {earlier.name} serves in its place")
        raise QuarantinedError(f"{state}: name another revision, point the alias at one, or release it")

    def _fallback(self, manifest: Manifest, alias: str) -> Manifest | None:
        revision = self._registry.previous_revision(manifest.adapter_id, alias, manifest.revision)
        return None if revision is None else self._registry.look_up(Reference(manifest.adapter_id, revision))
