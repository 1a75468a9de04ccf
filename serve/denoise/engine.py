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

import torch
import torch._dynamo

from cat_cluster import telemetry
from cat_cluster.errors import EngineStoppedError, OverloadedError
from cat_cluster.lora.row_bank import RowBank
from cat_cluster.models.base_model import MOST_SHAPES, BaseModel
from cat_cluster.telemetry import Metrics
from serve.denoise.codec import own_threads
from serve.denoise.image import EngineImage, Size
from serve.denoise.running_images import RunningImages

logger = logging.getLogger("cat_cluster.serve")
# Row-steps of the guaranteed share that are saved up while no probe waits: more would delay users when one comes.
MOST_SAVED = 100.0


class DenoisingEngine:
    """Continuous batching over the rows of many images.

    Probes cost users nothing but a share: they share calls while no user is there, or in the padding of users' calls,
    and are parked when they would make those larger. Under load they are stepped in small calls of their own, between
    those of users, as often as `probe_share` of the row-steps that users had allows.
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
        sizes: Sequence[Size] = (),
        probe_share: float = 0.01,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`buckets`: rising row counts that calls are padded to, the last one `max_rows`, which is at least 2.

        sizes: latent (H, W) whose rows take their memory now; those of any other do when its first image comes.
        """
        self._running_images = RunningImages(base, bank, metrics, max_rows, buckets, clock, sizes)
        self._metrics, self._clock = metrics, clock
        self._max_rows, self._max_waiting, self._probe_share = max_rows, max_waiting, probe_share
        self._threads = threads or torch.get_num_threads()
        self._users, self._probes = deque[EngineImage](), deque[EngineImage]()
        self._saved = 0.0  # row-steps of probes that users have paid for
        self._wake = threading.Condition()
        self._running, self._idle = True, False
        self._last_turn = clock()
        self._thread = threading.Thread(target=self._run, name="cat-engine", daemon=True)
        self._thread.start()

    # Any thread.

    def submit(self, image: EngineImage) -> None:
        """Queue an image; its leases are the engine's from now on, whatever happens.

        Raises OverloadedError when `max_waiting` images wait, EngineStoppedError after close.
        """
        try:
            with self._wake:
                if not self._running:
                    raise EngineStoppedError("the engine is stopping: try again, another replica will take the request")
                if not image.probe and len(self._users) >= self._max_waiting:
                    raise OverloadedError(
                        f"{len(self._users)} images wait already (max_waiting): try again in a moment",
                        self.expected_wait(),
                    )
                image.submitted = self._clock()
                (self._probes if image.probe else self._users).append(image)
                self._wake.notify()
        except (EngineStoppedError, OverloadedError):
            image.release()
            raise

    def close(self, timeout: float = 30.0) -> None:
        """Stop after the step in flight; images that are not done fail with EngineStoppedError."""
        with self._wake:
            self._running = False
            self._wake.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("the engine's thread has not ended within %g s", timeout)
            self._end_all()

    @property
    def waiting(self) -> int:
        """Images of users in the queue."""
        return len(self._users)

    @property
    def active(self) -> int:
        """Images being denoised, probes among them."""
        return len(self._running_images.active)

    @property
    def rows_in_use(self) -> int:
        """Rows of all sizes in use."""
        return self._running_images.rows_in_use

    def expected_wait(self) -> float:
        """Seconds until an image that came now would start, for Retry-After: at least one."""
        return max(1.0, len(self._users) * self._running_images.image_seconds / max(1, self._max_rows // 2))

    def stuck_for(self) -> float:
        """Seconds since the last turn while there is work; 0 when idle."""
        return 0.0 if self._idle else max(0.0, self._clock() - self._last_turn)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    # The engine's thread.

    def _run(self) -> None:
        own_threads(self._threads)
        # As compiled_blocks does for its own thread: each thread has limits of its own.
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        torch._dynamo.config.accumulated_recompile_limit = MOST_SHAPES
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
        except Exception:
            logger.exception("the engine has failed: its replica must be replaced")
        finally:
            with self._wake:
                self._running = False
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Wait until there is work; False when the engine is to stop."""
        with self._wake:
            while self._running and not (self._users or self._probes or self._running_images.active):
                self._idle = True
                self._wake.wait()
            self._last_turn, self._idle = self._clock(), False
            return self._running

    def _end_all(self) -> None:
        stopped = EngineStoppedError("the engine was stopped before the image was done: try again")
        for image in [*self._running_images.active.values(), *self._users, *self._probes]:
            image.end(stopped)

    def _turn(self) -> None:
        self._drop_leaving()
        self._admit_users()
        self._place_probes()
        size = self._running_images.next_size()
        if size is not None:
            paid = self._running_images.step(size) * self._probe_share
            self._saved = min(self._saved + paid, MOST_SAVED)
        self._step_separate_probe()
        self._metrics.set(telemetry.IMAGES_ACTIVE, self.active)
        self._metrics.set(telemetry.IMAGES_WAITING, self.waiting)
        self._metrics.set(telemetry.ENGINE_STEP_TIME, time.time())

    def _drop_leaving(self) -> None:
        """Let cancelled and late images go, whether they wait or run."""
        now = self._clock()
        for queue in (self._users, self._probes):
            for image in list(queue):
                error = image.leaves(now)
                if error is not None:
                    self._take(queue, image)
                    image.end(error)
        for image in list(self._running_images.active.values()):
            error = image.leaves(now)
            if error is not None:
                self._running_images.remove(image)
                image.end(error)

    def _admit_users(self) -> None:
        full = set[Size]()  # first come, first served within a size, so that no image is overtaken for ever
        for image in list(self._users):
            if image.size in full or not self._make_room(image):
                full.add(image.size)
                continue
            self._take(self._users, image)
            self._running_images.join(image)

    def _make_room(self, image: EngineImage) -> bool:
        """Park as many probes as a user's image needs rows; False when that would not do."""
        probes = self._running_images.probes(image.size)
        if not self._running_images.fits(image, without=probes):
            return False
        while not self._running_images.fits(image):
            self._park(probes.pop())
        return True

    def _place_probes(self) -> None:
        """Park the probes that cost users something by now, and let those join that cost nothing."""
        images = self._running_images
        if self._serves_users:
            for size in images.sizes():
                for probe in reversed(images.probes(size)):
                    if images.enlarged(size):
                        self._park(probe)
        while self._probes:
            probe = self._probes[0]
            free = not self._serves_users or not images.enlarged(probe.size, probe.rows.rows)
            if not (free and images.fits(probe)):
                return
            self._take(self._probes, probe)
            images.join(probe)

    def _step_separate_probe(self) -> None:
        """Step one probe in a call of its own, if the share that users' steps have earned allows it."""
        probe = self._running_images.separate_probe
        if probe is None and not (self._probes and self._serves_users):
            return
        chosen = probe or self._probes[0]
        cost = chosen.rows.rows if self._serves_users else 0
        if cost > self._saved:
            return
        if probe is None:
            self._take(self._probes, chosen)
            chosen.separate = True
            if not self._running_images.join(chosen):
                return
        self._saved -= cost
        self._running_images.step(chosen.size, separate=True)

    @property
    def _serves_users(self) -> bool:
        return bool(self._users) or self._running_images.has_users

    def _park(self, probe: EngineImage) -> None:
        if self._running_images.park(probe):
            with self._wake:
                self._probes.appendleft(probe)

    def _take(self, queue: deque[EngineImage], image: EngineImage) -> None:
        with self._wake:
            queue.remove(image)
