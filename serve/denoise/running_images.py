"""The images that are being denoised, in the rows of their sizes; used by one thread, which owns the device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cat_cluster import telemetry
from cat_cluster.errors import ServingError
from cat_cluster.lora.row_bank import RowBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.telemetry import Metrics
from serve.denoise.image import EngineImage, Size
from serve.denoise.rows import ImageRows, Rows

logger = logging.getLogger("cat_cluster.serve")
Lane = tuple[Size, bool]  # images of one size that share calls; True: a probe in calls of its own


class RunningImages:
    """Rows per size: images join and leave, and one call advances all images of a size by a step."""

    def __init__(
        self,
        base: BaseModel,
        bank: RowBank,
        metrics: Metrics,
        max_rows: int,
        buckets: Sequence[int],
        clock: Callable[[], float],
        sizes: Sequence[Size] = (),
    ) -> None:
        """`sizes`: those whose rows take their memory now, not when their first image comes."""
        self._base, self._bank, self._metrics, self._clock = base, bank, metrics, clock
        self._max_rows, self._buckets = max_rows, tuple(buckets)
        self._rows: dict[Lane, Rows] = {}
        self._turns = deque[Size]()  # sizes in use, the next one first
        self.active: dict[ImageRows, EngineImage] = {}
        self.image_seconds = 1.0  # a moving mean of the time a user's image is denoised
        with torch.inference_mode():  # as the thread makes the others: blocks are compiled for that kind of tensor
            for size in sizes:
                self._lane(size)

    @property
    def rows_in_use(self) -> int:
        """Rows of all sizes in use; from any thread."""
        return sum(rows.count for rows in list(self._rows.values()))

    @property
    def has_users(self) -> bool:
        """Whether an image of a user is being denoised."""
        return any(not image.probe for image in self.active.values())

    @property
    def separate_probe(self) -> EngineImage | None:
        """The probe that is stepped in calls of its own."""
        return next((image for image in self.active.values() if image.separate), None)

    def probes(self, size: Size) -> list[EngineImage]:
        """The probes that share calls of a size."""
        rows = self._rows.get((size, False))
        return [] if rows is None else [image for one in rows.images if (image := self.active[one]).probe]

    def sizes(self) -> list[Size]:
        """The sizes in use."""
        return list(self._turns)

    def fits(self, image: EngineImage, without: Sequence[EngineImage] = ()) -> bool:
        """Whether there is room for an image, were those of `without` gone."""
        rows = self._rows.get((image.size, False))
        taken = 0 if rows is None else rows.count - sum(one.rows.rows for one in without)
        return taken + image.rows.rows <= self._max_rows

    def enlarged(self, size: Size, more: int = 0) -> bool:
        """Whether probes, with `more` rows to come, make the calls of users' images of a size larger."""
        rows = self._rows.get((size, False))
        if rows is None:
            return more > 0
        users = rows.count - sum(probe.rows.rows for probe in self.probes(size))
        return rows.count + more > (rows.bucket(users) if users else 0)

    def join(self, image: EngineImage) -> bool:
        """Let an image join; False when it cannot, and then it ends here and harms no other."""
        started = self._clock()
        try:
            rows = self._lane(image.size, image.separate)
            rows.join(image.rows)
        except Exception as error:
            logger.exception("an image could not join")
            self.active.pop(image.rows, None)
            image.end(ServingError(f"the image could not be started ({type(error).__name__}): {error}"))
            return False
        image.release()
        if image.joined is None:
            image.joined = started
            image.facts.wait_s = started - image.submitted
            image.facts.bind_s = self._clock() - started
            if not image.probe:
                self._metrics.observe(telemetry.WAIT_SECONDS, image.facts.wait_s)
        self.active[image.rows] = image
        if not image.separate and image.size not in self._turns:
            self._turns.append(image.size)
        return True

    def park(self, image: EngineImage) -> bool:
        """Free an image's rows; it can join again where it was. False when it cannot, and then it ends here."""
        parked = self._leave(image, park=True)
        self.active.pop(image.rows, None)
        return parked

    def remove(self, image: EngineImage) -> None:
        """Free the rows of an image that is given up."""
        self._lane(image.size, image.separate).drop(image.rows)
        del self.active[image.rows]

    def next_size(self) -> Size | None:
        """Return the size whose turn it is, dropping those without rows."""
        for _ in range(len(self._turns)):
            size = self._turns.popleft()
            if self._rows[size, False].images:
                self._turns.append(size)
                return size
        return None

    def step(self, size: Size, *, separate: bool = False) -> int:
        """Advance the images of a size by one step and return the rows of users among them.

        Images that are done leave. A call that fails is made again for each image alone: only those that fail alone
        end. Raises what a device raises that has failed.
        """
        rows, started = self._rows[size, separate], self._clock()
        images = [self.active[one] for one in rows.images]
        users = sum(image.rows.rows for image in images if not image.probe)
        failed = False
        try:
            rows.step()
        except Exception:
            logger.exception("a U-Net call failed: its images are tried one by one")
            failed = True
        self._fence()
        if failed:  # behind the handler, whose exception holds what the call had computed: memory that they may need
            self._one_by_one(rows, images)
            return users
        self._measure(rows, images, users, self._clock() - started)
        self._after_step(rows, images)
        return users

    def _one_by_one(self, rows: Rows, images: Sequence[EngineImage]) -> None:
        parked = [image for image in images if self._leave(image, park=True)]
        for image in parked:
            if not self.join(image):
                continue
            try:
                rows.step()
            except Exception as error:
                self._fence()
                self.remove(image)
                image.end(ServingError(f"the image cannot be computed ({type(error).__name__}): {error}"))
                continue
            self._after_step(rows, [image])
            if image.rows in self.active:
                self._leave(image, park=True)
        for image in parked:
            if image.rows in self.active:
                self.join(image)

    def _leave(self, image: EngineImage, *, park: bool) -> bool:
        """Free an image's rows for now; False when what it takes along finds no memory, and then it ends here."""
        try:
            self._lane(image.size, image.separate).leave(image.rows, park=park)
        except Exception as error:
            logger.exception("an image could not leave its rows")
            self.remove(image)
            image.end(ServingError(f"the image could not leave its rows ({type(error).__name__}): {error}"))
            return False
        return True

    def _after_step(self, rows: Rows, images: Sequence[EngineImage]) -> None:
        previews = {i: self._preview(rows, i) for i in images if i.rows.step in i.notify_steps}
        there = [image for image in images if not image.rows.done or self._leave(image, park=False)]
        self._fence()  # other threads read the copies that are handed on, on streams of their own
        for image in there:
            if image.notify_all or previews.get(image) is not None:
                image.stepped(previews.get(image))
            if image.rows.done:
                del self.active[image.rows]
                image.facts.denoise_s = self._clock() - (image.joined or 0.0)
                if not image.probe:
                    self.image_seconds += 0.1 * (image.facts.denoise_s - self.image_seconds)
                image.done()

    def _preview(self, rows: Rows, image: EngineImage) -> Tensor | None:
        try:
            return rows.denoised(image.rows)
        except Exception:  # the image itself may yet be done
            logger.exception("a preview could not be copied")
            return None

    def _measure(self, rows: Rows, images: Sequence[EngineImage], users: int, seconds: float) -> None:
        adapters = len({name for image in images for name in image.adapters})
        for image in images:
            image.facts.most_rows = max(image.facts.most_rows, rows.count)
            image.facts.most_adapters = max(image.facts.most_adapters, adapters)
        metrics = self._metrics
        metrics.observe(telemetry.UNET_SECONDS, seconds)
        metrics.observe(telemetry.CALL_ROWS, rows.count)
        if adapters:
            metrics.observe(telemetry.CALL_ADAPTERS, adapters)
        metrics.inc(telemetry.ROW_STEPS, users)
        metrics.inc(telemetry.PROBE_ROW_STEPS, rows.count - users)
        metrics.inc(telemetry.PADDED_ROW_STEPS, rows.bucket(rows.count) - rows.count)

    def _fence(self) -> None:
        # Without it the thread would run many steps ahead of a GPU, and a request would join that much later.
        if self._base.device.type == "cuda":
            torch.cuda.current_stream(self._base.device).synchronize()

    def _lane(self, size: Size, separate: bool = False) -> Rows:
        lane = (size, separate)
        if lane not in self._rows:
            most = next(bucket for bucket in self._buckets if bucket >= 2) if separate else self._max_rows
            buckets = [bucket for bucket in self._buckets if bucket <= most]
            self._rows[lane] = Rows(self._base, self._bank, most, buckets, size)
        return self._rows[lane]
