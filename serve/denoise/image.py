"""An image as the engine has it: rows that are ready to join, who hears of it, and the lease of its adapter."""

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
    """An image handed to the engine, which fills the last three fields.

    adapter: name for the count of adapters in a call; deadline: on the engine's clock; probe: see DenoisingEngine;
    aside: a probe that is stepped in calls of its own.
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
    aside: bool = False
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
            return DeadlineError("the deadline passed before the image was done: ask for fewer steps, or ask later")
        return None

    def release(self) -> None:
        """Give the adapter's slot back, if it is held."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()

    def end(self, error: CatClusterError) -> None:
        """Give the slot back and tell the listener that the image ends here."""
        self.release()
        _tell(self.listener.failed, error)

    def stepped(self, denoised: Tensor | None) -> None:
        """Tell the listener of the step that was made."""
        _tell(self.listener.stepped, self.rows.step, len(self.rows.table), denoised)

    def done(self) -> None:
        """Hand the listener the final latents."""
        _tell(self.listener.denoised, self.rows.latents, self.facts)


def _tell(listener: Callable[..., None], *values: Any) -> None:
    try:
        listener(*values)
    except Exception:  # one image's listener must not end the thread of all
        logger.exception("an image's listener failed")
