"""The engine: one thread owns the device and denoises rows of many requests together, step by step.

Each turn admits what fits, makes one U-Net call over all rows of one size, and hands finished latents on. Requests
join at any turn, and leave at the next one when they are done, cancelled or late. No Ray here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cat_cluster import telemetry
from cat_cluster.base_model import BaseModel
from cat_cluster.errors import (
    CancelledRequestError,
    CatClusterError,
    DeadlineError,
    EngineStoppedError,
    OverloadedError,
    ServingError,
)
from cat_cluster.lora.row_bank import RowBank
from cat_cluster.telemetry import Metrics
from serve.rows import ImageRows, Rows

logger = logging.getLogger("cat_cluster.serve")
Size = tuple[int, int]


class AdapterLease(Protocol):
    """An adapter held in a slot until it is released."""

    @property
    def flat(self) -> Tensor:
        """Its vector [F] on the engine's device."""

    def release(self) -> None:
        """Give the slot back; a second time does nothing."""


class Listener(Protocol):
    """Who is told of an image; called on the engine's thread, so it must return at once."""

    def stepped(self, step: int, steps: int, denoised: Tensor | None) -> None:
        """`step` of `steps` are done; denoised [C, H, W] comes at the steps that were asked for."""

    def denoised(self, latents: Tensor, facts: ImageFacts) -> None:
        """All steps are done: the final latents [C, H, W]."""

    def failed(self, error: CatClusterError) -> None:
        """The image ends here."""


@dataclass
class ImageFacts:
    """How an image went: seconds it waited and was denoised, and what shared its calls."""

    wait_s: float = 0.0
    denoise_s: float = 0.0
    bind_s: float = 0.0
    most_rows: int = 0
    most_adapters: int = 0


@dataclass(eq=False)
class EngineImage:
    """An image handed to the engine: rows ready to join, who hears of it, and the lease of its adapter.

    adapter: name for the count of adapters in a call; deadline: on the engine's clock; probe: see Engine.
    """

    rows: ImageRows
    size: Size
    listener: Listener
    lease: AdapterLease | None = None
    adapter: str | None = None
    deadline: float | None = None
    probe: bool = False
    notify_steps: frozenset[int] = frozenset()
    notify_all: bool = False
    cancelled: bool = False
    facts: ImageFacts = field(default_factory=ImageFacts)
    _submitted: float = 0.0
    _joined: float = 0.0

    @property
    def cost(self) -> int:
        """Row-steps that are left of it."""
        return self.rows.rows * (len(self.rows.table) - self.rows.step)

    def cancel(self) -> None:
        """Let it leave at the next turn; from any thread."""
        self.cancelled = True


class Engine:
    """Continuous batching over the rows of many images.

    Probes fill padding and idle turns: they never enlarge a call that has rows of users, and are parked when a user
    needs their rows. Under constant load a probe is admitted like a user's image once its cost is within `probe_share`
    of the row-steps that users had.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: RowBank,
        metrics: Metrics,
        *,
        max_rows: int,
        buckets: Sequence[int],
        max_waiting: int,
        probe_share: float = 0.01,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base, self._bank, self._metrics = base, bank, metrics
        self._max_rows, self._buckets, self._max_waiting = max_rows, tuple(buckets), max_waiting
        self._probe_share, self._threads, self._clock = probe_share, threads, clock
        self._rows: dict[Size, Rows] = {}
        self._active: dict[ImageRows, EngineImage] = {}
        self._users, self._probes = deque[EngineImage](), deque[EngineImage]()
        self._turns = deque[Size]()  # sizes in use, the next one first
        self._probe_budget = 0.0
        self._image_seconds = 1.0  # a moving mean of the time an image is denoised
        self._wake = threading.Condition()
        self._running = True
        self.last_turn = clock()
        self._thread = threading.Thread(target=self._run, name="cat-engine", daemon=True)
        self._thread.start()

    # Any thread.

    def submit(self, image: EngineImage) -> None:
        """Queue an image. Raises OverloadedError when `max_waiting` images wait, EngineStoppedError after close."""
        with self._wake:
            if not self._running:
                raise EngineStoppedError("the engine is stopping: ask again, another replica will answer")
            if not image.probe and len(self._users) >= self._max_waiting:
                raise OverloadedError(
                    f"{len(self._users)} images wait already (max_waiting): ask again in a moment", self.expected_wait()
                )
            image._submitted = self._clock()
            (self._probes if image.probe else self._users).append(image)
            self._wake.notify()

    def wake(self) -> None:
        """Let the engine look at its queues, for a cancelled image while nothing runs."""
        with self._wake:
            self._wake.notify()

    def close(self, timeout: float = 30.0) -> None:
        """Stop after the step in flight; images that are not done fail with EngineStoppedError."""
        with self._wake:
            self._running = False
            self._wake.notify()
        self._thread.join(timeout)

    @property
    def waiting(self) -> int:
        """Images of users in the queue."""
        return len(self._users)

    @property
    def active(self) -> int:
        """Images being denoised, probes among them."""
        return len(self._active)

    @property
    def rows_in_use(self) -> int:
        """Rows of all sizes in use."""
        return sum(rows.count for rows in list(self._rows.values()))

    def expected_wait(self) -> float:
        """Seconds until an image that came now would start, for Retry-After: at least one."""
        return max(1.0, len(self._users) * self._image_seconds / max(1, self._max_rows // 2))

    def stuck_for(self) -> float:
        """Seconds since the last turn while there was work; 0 when idle."""
        idle = not self._active and not self._users
        return 0.0 if idle else self._clock() - self.last_turn

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    # The engine's thread.

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while True:
                with self._wake:
                    while self._running and not (self._users or self._probes or self._active):
                        self._wake.wait()
                        self.last_turn = self._clock()
                    if not self._running:
                        break
                self._turn()
        stopped = EngineStoppedError("the engine was stopped before the image was done: ask again")
        for image in [*self._active.values(), *self._users, *self._probes]:
            self._end(image, stopped)

    def _turn(self) -> None:
        self._drop_left()
        self._admit_users()
        self._admit_probes()
        size = self._next_size()
        if size is not None:
            self._step(size)
        elif self._probes or self._users:
            time.sleep(0.001)  # nothing may join yet: probes wait for budget or padding
        self.last_turn = self._clock()

    def _drop_left(self) -> None:
        """Let cancelled and late images go, whether they wait or run."""
        now = self._clock()
        for queue in (self._users, self._probes):
            for image in [one for one in list(queue) if self._leaving(one, now)]:
                with self._wake:
                    queue.remove(image)
                self._end(image, self._leaving(image, now))
        for image in list(self._active.values()):
            error = self._leaving(image, now)
            if error is not None:
                self._remove(image)
                self._end(image, error)

    def _leaving(self, image: EngineImage, now: float) -> ServingError | None:
        if image.cancelled:
            return CancelledRequestError("the request was cancelled")
        if image.deadline is not None and now > image.deadline:
            return DeadlineError("the deadline passed before the image was done: ask for fewer steps, or ask later")
        return None

    def _admit_users(self) -> None:
        full = set[Size]()  # first come, first served within a size, so that no image is overtaken for ever
        for image in list(self._users):
            rows = self._rows_of(image.size)
            if image.size in full or not (rows.fits(image.rows) or self._park_probes(image)):
                full.add(image.size)
                continue
            with self._wake:
                self._users.remove(image)
            self._join(image)

    def _park_probes(self, user: EngineImage) -> bool:
        """Make room for a user by putting probes back into their queue; False when that would not do."""
        rows = self._rows_of(user.size)
        probes = [self._active[image] for image in rows.images if self._active[image].probe]
        if rows.count - sum(probe.rows.rows for probe in probes) + user.rows.rows > self._max_rows:
            return False
        for probe in probes:
            if rows.fits(user.rows):
                break
            rows.leave(probe.rows, park=True)
            del self._active[probe.rows]
            with self._wake:
                self._probes.appendleft(probe)
        return True

    def _admit_probes(self) -> None:
        while self._probes:
            probe = self._probes[0]
            rows = self._rows_of(probe.size)
            if not rows.fits(probe.rows) or not self._may_join(probe, rows):
                return
            with self._wake:
                self._probes.popleft()
            self._join(probe)

    def _may_join(self, probe: EngineImage, rows: Rows) -> bool:
        users = [image for image in self._active.values() if not image.probe]
        if not users and not self._users:
            return True
        if any(image.size == probe.size for image in users) and rows.bucket(rows.count) >= rows.count + probe.rows.rows:
            return True
        if self._probe_budget >= probe.cost:
            self._probe_budget -= probe.cost
            return True
        return False

    def _join(self, image: EngineImage) -> None:
        started = self._clock()
        try:
            if image.lease is not None:
                image.rows.adapter = image.lease.flat
            self._rows_of(image.size).join(image.rows)
        except Exception as error:  # one image that cannot join must not take the others along
            logger.exception("an image could not join")
            self._end(image, ServingError(f"the image could not be started: {error}"))
            return
        finally:
            if image.lease is not None:
                image.lease.release()
                image.lease = None
        if not image._joined:
            image._joined = started
            image.facts.wait_s = started - image._submitted
            image.facts.bind_s = self._clock() - started
            if not image.probe:
                self._metrics.observe(telemetry.WAIT_SECONDS, image.facts.wait_s)
        self._active[image.rows] = image
        if image.size not in self._turns:
            self._turns.append(image.size)

    def _next_size(self) -> Size | None:
        """Return the size whose turn it is, dropping those without rows."""
        for _ in range(len(self._turns)):
            size = self._turns.popleft()
            if self._rows[size].images:
                self._turns.append(size)
                return size
        return None

    def _step(self, size: Size) -> None:
        rows, started = self._rows[size], self._clock()
        try:
            rows.step()
        except Exception:
            logger.exception("a U-Net call failed: its images are tried one by one")
            self._step_one_by_one(rows)
            return
        self._fence()
        self._measure(rows, self._clock() - started)
        for image in [self._active[one] for one in rows.images]:
            self._after_step(image, rows)

    def _step_one_by_one(self, rows: Rows) -> None:
        """Find the image whose rows cannot be computed: each takes the step alone, and only those that fail go."""
        images = [self._active[one] for one in rows.images]
        for image in images:
            rows.leave(image.rows, park=True)
        for image in images:
            try:
                rows.join(image.rows)
                rows.step()
            except Exception as error:
                self._remove(image)
                self._end(image, ServingError(f"the image cannot be computed ({type(error).__name__}): {error}"))
                continue
            self._after_step(image, rows)
            if not image.rows.done:
                rows.leave(image.rows, park=True)
        for image in images:
            if image.rows in self._active:
                rows.join(image.rows)

    def _after_step(self, image: EngineImage, rows: Rows) -> None:
        step, steps = image.rows.step, len(image.rows.table)
        if image.notify_all or step in image.notify_steps:
            image.listener.stepped(step, steps, rows.denoised(image.rows) if step in image.notify_steps else None)
        if image.rows.done:
            self._remove(image)
            image.facts.denoise_s = self._clock() - image._joined
            self._image_seconds += 0.1 * (image.facts.denoise_s - self._image_seconds)
            image.listener.denoised(image.rows.latents, image.facts)

    def _remove(self, image: EngineImage) -> None:
        rows = self._rows[image.size]
        if image.rows in rows.images:
            rows.leave(image.rows)
        self._active.pop(image.rows, None)

    def _end(self, image: EngineImage, error: CatClusterError | None) -> None:
        if image.lease is not None:
            image.lease.release()
            image.lease = None
        if error is not None:
            image.listener.failed(error)

    def _measure(self, rows: Rows, seconds: float) -> None:
        images = [self._active[one] for one in rows.images]
        adapters = len({image.adapter for image in images if image.adapter is not None})
        users = sum(image.rows.rows for image in images if not image.probe)
        for image in images:
            image.facts.most_rows = max(image.facts.most_rows, rows.count)
            image.facts.most_adapters = max(image.facts.most_adapters, adapters)
        self._probe_budget = min(self._probe_budget + users * self._probe_share, 4.0 * self._max_rows * 100)
        metrics = self._metrics
        metrics.observe(telemetry.UNET_SECONDS, seconds)
        metrics.observe(telemetry.CALL_ROWS, rows.count)
        if adapters:
            metrics.observe(telemetry.CALL_ADAPTERS, adapters)
        metrics.inc(telemetry.ROW_STEPS, users)
        metrics.inc(telemetry.PROBE_ROW_STEPS, rows.count - users)
        metrics.inc(telemetry.PADDED_ROW_STEPS, rows.bucket(rows.count) - rows.count)
        metrics.set(telemetry.IMAGES_ACTIVE, len(self._active))
        metrics.set(telemetry.IMAGES_WAITING, len(self._users))
        metrics.set(telemetry.ENGINE_STEP_TIME, time.time())

    def _fence(self) -> None:
        # Without it the thread would run many steps ahead of a GPU, and a request would join that much later.
        if self._base.device.type == "cuda":
            torch.cuda.current_stream(self._base.device).synchronize()

    def _rows_of(self, size: Size) -> Rows:
        if size not in self._rows:
            self._rows[size] = Rows(self._base, self._bank, self._max_rows, self._buckets, size)
        return self._rows[size]
