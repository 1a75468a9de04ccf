"""An image in the engine: rows that are ready to join, its listener, and the leases of its adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from cat_cluster.errors import CancelledRequestError, CatClusterError, DeadlineError, ServingError
from serve.denoise.rows import ImageRows

logger = logging.getLogger("cat_cluster.serve")
Size = tuple[int, int]  # latent height and width


class AdapterLease(Protocol):
    """An adapter held in a slot, which the image's rows read until it is released."""

    def release(self) -> None:
        """Give the slot back; a second time does nothing."""


class Listener(Protocol):
    """Receives the events of an image on the engine's thread, so it must return at once."""

    def stepped(self, step: int, steps: int, denoised: Tensor | None) -> None:
        """`step` of `steps` are done; denoised [C, H, W] is given at the requested steps."""

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
    """An image handed to the engine, which fills the last three fields.

    adapters: names for the count of adapters in a call; deadline: on the engine's clock; probe: see DenoisingEngine;
    separate: a probe that is stepped in calls of its own.
    """

    rows: ImageRows
    size: Size
    listener: Listener
    leases: tuple[AdapterLease, ...] = ()
    adapters: tuple[str, ...] = ()
    deadline: float | None = None
    probe: bool = False
    notify_steps: frozenset[int] = frozenset()
    notify_all: bool = False
    cancelled: bool = False
    facts: ImageFacts = field(default_factory=ImageFacts)
    separate: bool = False
    submitted: float = 0.0
    joined: float | None = None

    def cancel(self) -> None:
        """Let it leave at the next turn; from any thread."""
        self.cancelled = True

    def leaves(self, now: float) -> ServingError | None:
        """Return why it is to leave before it is done, None if it is not."""
        if self.cancelled:
            return CancelledRequestError("the request was cancelled")
        if self.deadline is not None and now > self.deadline:
            return DeadlineError(
                "the deadline passed before the image was done: ask for fewer steps, or try again later"
            )
        return None

    def release(self) -> None:
        """Give the adapters' slots back, if they are held."""
        leases, self.leases = self.leases, ()
        for lease in leases:
            lease.release()

    def end(self, error: CatClusterError) -> None:
        """Give the slots back and pass the error to the listener."""
        self.release()
        _notify(self.listener.failed, error)

    def stepped(self, denoised: Tensor | None) -> None:
        """Pass the step that was made to the listener."""
        _notify(self.listener.stepped, self.rows.step, len(self.rows.table), denoised)

    def done(self) -> None:
        """Pass the final latents to the listener."""
        _notify(self.listener.denoised, self.rows.latents, self.facts)


def _notify(listener: Callable[..., None], *values: Any) -> None:
    try:
        listener(*values)
    except Exception:  # a listener must not end the engine's thread
        logger.exception("an image's listener failed")
