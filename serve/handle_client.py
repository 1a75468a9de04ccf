"""The engines as an ingress reaches them on Ray Serve; a call whose engine is lost is sent to another one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from cat_cluster.errors import CancelledRequestError, EngineStoppedError, OverloadedError
from cat_cluster.spec.choices import DriftState
from serve.calls import Accepted, AdminAction, Event, Failed, Finished, ImageCall, Preview, Progress, Refused

logger = logging.getLogger("cat_cluster.serve")

TRIES = 4  # of a call whose engine is lost: its images are a function of the call, so another engine's are the same
RETRY_S = 1.0
PATIENCE_S = 30.0  # without any engine for so long, calls without a deadline are refused; others wait until theirs
STATUS_S = 5.0
ALL_S = 2.0  # of it, for every engine's status; after that one engine's is enough
_GONE = (RayActorError, ReplicaUnavailableError, ObjectLostError)
_STATES = ("unknown", *get_args(DriftState))  # the worst one last


class HandleClient:
    """EngineClient over a Ray Serve handle: an adapter's calls go to the same engine while it has room,
    those of a stack to that of its first adapter.

    A call that finds no engine, or loses its own, waits for another until its deadline: the last engine of a small
    service may be gone for as long as its replacement takes to start, or there is none until one is asked for.
    is_asleep: whether that there is none is no fault, and nothing but a call for images, or what it needs, is to start
    one; None: engines never sleep. It may take a moment.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        patience_s: float = PATIENCE_S,
        retry_s: float = RETRY_S,
        is_asleep: Callable[[], bool] | None = None,
    ) -> None:
        self._handle, self._patience_s, self._retry_s, self._is_asleep = handle, patience_s, retry_s, is_asleep

    async def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        """Yield the call's events; when its engine is lost, another one generates the images that are not finished."""
        handle = self._handle.options(stream=True, session_id=_session(call))
        until = None if call.deadline_s is None else time.monotonic() + call.deadline_s
        sent = _EventsSent()
        for attempt in range(TRIES):
            stream = handle.generate.remote(call)
            lost = Failed.of(EngineStoppedError("the engine stopped before the images were done: try again"))
            try:
                event = await self._first(stream, until)
                while event is not None:
                    if isinstance(event, Failed) and event.kind == EngineStoppedError.__name__:
                        lost = event
                        break
                    if isinstance(event, Accepted):
                        call = call.pinned(event.model)  # all images of a call are of the same revisions
                    if sent.is_new(event):
                        yield event
                    event = await anext(stream, None)  # raises when the engine that has the call is lost
                else:
                    return
            except _GONE:
                pass
            except DeploymentUnavailableError:
                yield Failed.of(EngineStoppedError("no engine is running: try again"))
                return
            except TaskCancelledError:  # Ray Serve cancels what a request has called when its client goes
                raise CancelledRequestError("the client has disconnected") from None
            except BackPressureError:
                error = OverloadedError("every engine has as many requests as it takes: try again", self._retry_s)
                yield Failed.of(error)
                return
            finally:
                _cancel(stream)
            left = None if until is None else until - time.monotonic()
            if attempt == TRIES - 1 or (left is not None and left <= 0):
                yield lost
                return
            logger.warning("an engine was lost: call %s is sent to another", call.request_id)
            call = replace(call, deadline_s=left)
            await asyncio.sleep(self._retry_s * attempt)

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        """Act on an adapter in every engine; raises CatClusterError.

        Returns the first one's result; of probes the worst record, as each engine has a copy of its own.
        """
        results = await self._all("admin", action, reference)
        for result in results:
            if isinstance(result, Failed):
                raise result.to_error()
        if action == "probe":
            return dict(max(results, key=lambda record: _STATES.index(record["verdict"])))
        return dict(results[0])

    async def status(self) -> dict[str, Any]:
        """Return one engine's status, with the worst drift that any engine has seen, and how many have responded.

        Where engines sleep: that there is none. EngineStoppedError where none responds that should.
        """
        try:
            results = await self._all("status", timeout_s=ALL_S)
        except TimeoutError:  # Ray returns no result where one is late
            results = [await self._one_status()]
        except EngineStoppedError:
            if self._is_asleep is None or not await asyncio.to_thread(self._is_asleep):
                raise
            return {"engines": 0, "drift": {}}
        drift: dict[str, Any] = {}
        for result in results:
            for name, status in result["drift"].items():
                drift[name] = max(drift.get(name, status), status, key=_weight)
        return {**results[0], "drift": drift, "engines": len(results)}

    async def sizes(self, wait_s: float) -> list[str]:
        """See EngineClient; OverloadedError when every engine is full."""
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    status = self._handle.status.remote()  # it waits in the queue, and so starts an engine
                    try:
                        return list((await status)["sizes"])
                    except _GONE:
                        await asyncio.sleep(self._retry_s)
                    except asyncio.CancelledError:
                        _cancel(status)  # nobody waits in the queue any more
                        raise
        except (DeploymentUnavailableError, TimeoutError):
            raise EngineStoppedError("no engine is running: try again") from None
        except TaskCancelledError:
            raise CancelledRequestError("the client has disconnected") from None
        except BackPressureError:
            raise OverloadedError("every engine has as many requests as it takes: try again", self._retry_s) from None

    async def metrics(self) -> bytes:
        """Return one engine's metrics; with several, scrape Ray's metrics port instead."""
        if self._is_asleep is not None:  # a plain call would wait in the queue, and so start an engine
            return bytes((await self._all("metrics", timeout_s=STATUS_S))[0])
        return bytes(await self._handle.metrics.remote())

    async def _first(self, stream: AsyncGenerator[Event, None], until: float | None) -> Event | None:
        """Return the first event of a call, which may wait for an engine; None when there is none.

        DeploymentUnavailableError when no engine is there at `until`, or after the patience if that is None.
        """
        coming = asyncio.ensure_future(anext(stream, None))
        wait_s = self._patience_s if until is None else max(0.0, until - time.monotonic())
        try:
            while not (await asyncio.wait({coming}, timeout=wait_s))[0]:
                wait_s = self._patience_s
                with suppress(TimeoutError):  # busy, but there
                    await self._handle.broadcast("status").results_async(timeout_s=STATUS_S, return_exceptions=True)
            return coming.result()
        finally:
            coming.cancel()

    async def _one_status(self) -> dict[str, Any]:
        """Return the status of an engine that Ray Serve chooses; EngineStoppedError when it does not respond either."""
        try:
            async with asyncio.timeout(STATUS_S - ALL_S):
                return dict(await self._handle.status.remote())
        except (*_GONE, DeploymentUnavailableError, BackPressureError, TimeoutError):
            raise EngineStoppedError("no engine responds: try again") from None

    async def _all(self, method: str, *arguments: str, timeout_s: float | None = None) -> list[Any]:
        """Return the results of the engines that run, one at least; EngineStoppedError when none does.

        TimeoutError when any of them is late.
        """
        try:
            calls = self._handle.broadcast(method, *arguments)
            results = await calls.results_async(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError:
            raise EngineStoppedError("no engine responds: try again") from None
        running = [result for result in results if not isinstance(result, _GONE)]
        for result in running:
            if isinstance(result, BaseException):
                raise result
        if not running:
            raise EngineStoppedError("no engine responds: try again")
        return running


class _EventsSent:
    """The events that a call's client has had, so that from a second engine it gets only new ones."""

    def __init__(self) -> None:
        self._accepted = False
        self._steps: dict[tuple[type, int], float] = {}

    def is_new(self, event: Event) -> bool:
        """Whether the client has not had this event, nor a later one of the same kind and image."""
        if isinstance(event, Accepted):
            first, self._accepted = not self._accepted, True
            return first
        if isinstance(event, Finished | Refused):
            return self._later(Finished, event.index, 1.0)
        if isinstance(event, Progress | Preview) and (Finished, event.index) not in self._steps:
            return self._later(type(event), event.index, event.step)
        return isinstance(event, Failed)

    def _later(self, kind: type, index: int, step: float) -> bool:
        later = step > self._steps.get((kind, index), -1.0)
        if later:
            self._steps[kind, index] = step
        return later


def _cancel(call: DeploymentResponse | DeploymentResponseGenerator) -> None:
    """Cancel what may run still; Ray raises here again what a call failed with that found no engine."""
    try:
        call.cancel()
    except Exception as error:  # what the call itself ended with is what counts
        logger.info("a call could not be cancelled (%s)", type(error).__name__)


def _weight(drift: dict[str, Any]) -> tuple[int, int]:
    """Return what the drift that one engine has seen of a revision weighs beside another's."""
    return _STATES.index(drift["state"]), sum(drift["probes"].values())


def _session(call: ImageCall) -> str:
    """Return what an engine is chosen by: an adapter's calls share its slot, those of the base go anywhere."""
    return call.adapters[0].reference.adapter_id if call.adapters else call.request_id
