"""What the routes of training share: the store's side of them, the process that reads photos, and their threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from cat_cluster.data.photo_upload import UploadLimits
from cat_cluster.errors import DeadlineError
from cat_cluster.registry import Registry
from serve.http.training.photo_process import PhotoProcess
from serve.http.training.stored_files import StoredFiles
from serve.http.training.submissions import Submissions
from serve.settings import ServeSettings

T = TypeVar("T")

_THREADS = 8  # store calls at once; more wait
_MOST_DECODED = 2 * 2**30  # bytes of all photos of an upload in memory, as training will have them


class TrainingParts:
    """Files, submissions and photos of one ingress."""

    def __init__(self, registry: Registry, settings: ServeSettings) -> None:
        self.store = registry.store
        self.files = StoredFiles(registry.store, settings.max_files_per_key)
        self.submissions = Submissions(registry, self.files)
        self.photos = PhotoProcess(settings.photos_timeout_s)
        self.limits = UploadLimits(
            members=settings.max_photos,
            unpacked=2 * settings.max_photos_bytes,
            pixels=settings.max_photo_pixels,
            decoded=_MOST_DECODED,
        )
        self._limit_s = settings.deadline_s
        self._threads = ThreadPoolExecutor(_THREADS, "training-store")

    async def call(self, act: Callable[..., T], *given: Any, **named: Any) -> T:
        """Return what a call of the store returns, made in one of a few threads; DeadlineError past the deadline."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._limit_s):
                return await loop.run_in_executor(self._threads, partial(act, *given, **named))
        except TimeoutError:
            raise DeadlineError(f"the storage did not answer within {self._limit_s:g} s; try again later") from None
