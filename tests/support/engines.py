"""An engine on a tiny base whose calls are watched and can be held, and those who hand it images."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_cluster.errors import CatClusterError
from cat_cluster.lora.row_bank import RowBank
from cat_cluster.models.generate import ImageRow
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.denoise.engine import DenoisingEngine
from serve.denoise.image import EngineImage, ImageFacts
from serve.denoise.rows import ImageRows, Rows
from tests.support.denoised_images import ImageOracle, OracleImage

SOON = 30.0  # seconds that nothing here takes unless it hangs
SIZE = (8, 8)
MIXED = [
    OracleImage(ImageRow("a red cup", 1, steps=3, sampler="ddim"), 1),
    OracleImage(ImageRow("a photo of a cup", 2, steps=6, sampler="euler_ancestral", guidance=1.0), 2),
    OracleImage(ImageRow("", 3, steps=4, sampler="dpmpp_2m", guidance=7.5, negative_prompt="red"), 3, 0.5),
    OracleImage(ImageRow("a red cup", 4, steps=1, sampler="dpmpp_2m")),
    OracleImage(ImageRow("a photo", 1, steps=5, sampler="ddim", guidance=0.0)),
    OracleImage(ImageRow("cup of red", 5, steps=2, sampler="euler", guidance=2.0), 1, 1.5),
    OracleImage(ImageRow("cup", 6, steps=5, sampler="dpmpp_2m_sde", guidance=1.0), 2, -0.5),
    OracleImage(ImageRow("a cup in red", 7, steps=7, sampler="ddim"), 4),
    OracleImage(ImageRow("a photo of a red cup", 8, steps=2, sampler="dpmpp_2m"), 5),
    OracleImage(ImageRow("red", 9, steps=3, sampler="dpmpp_2m_sde_karras"), 6, 0.25),
    OracleImage(ImageRow("a cup", 10, steps=4, sampler="ddim", guidance=1.0), 7),
    OracleImage(ImageRow("in a cup", 11, steps=1, sampler="euler"), 8),
    OracleImage(ImageRow("a photo", 12, steps=6, sampler="euler_ancestral", negative_prompt="a cup"), 1),
    OracleImage(ImageRow("of", 13, steps=2, sampler="ddim"), 2),
    OracleImage(ImageRow("a red cup", 14, steps=3, sampler="ddim"), 1, 0.75, ((3, 0.5),)),
    OracleImage(ImageRow("a cup", 15, steps=4, sampler="euler", guidance=1.0), 6, 1.0, ((3, -0.5),)),
]
PLAIN = OracleImage(ImageRow("a red cup", 1, steps=4))
PLUG = OracleImage(ImageRow("a cup", 1, steps=1))
UNGUIDED = OracleImage(ImageRow("a cup", 2, steps=4, guidance=1.0))


class Lease:
    """A lease that counts how often it is given back; its slot holds another adapter from then on."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat.clone()
        self.released = 0

    def release(self) -> None:
        self.released += 1
        with torch.inference_mode():
            self.flat.fill_(float("nan"))  # whoever reads it now gets an image that is not finite


@dataclass
class RecordingListener:
    """A listener that remembers; `latents` is settled when the image ends."""

    latents: Future[Tensor] = field(default_factory=Future)
    steps: list[int] = field(default_factory=list)
    previews: list[Tensor] = field(default_factory=list)
    facts: ImageFacts | None = None
    then: Callable[[], None] = lambda: None

    def stepped(self, step: int, steps: int, denoised: Tensor | None) -> None:
        self.steps.append(step)
        if denoised is not None:
            self.previews.append(denoised)

    def denoised(self, latents: Tensor, facts: ImageFacts) -> None:
        self.facts = facts
        self.latents.set_result(latents)
        self.then()

    def failed(self, error: CatClusterError) -> None:
        self.latents.set_exception(error)

    def error(self) -> BaseException | None:
        return self.latents.exception(SOON)


@dataclass(frozen=True)
class Call:
    """A U-Net call: the images in it, its rows, and its size."""

    images: tuple[ImageRows, ...]
    rows: int
    size: tuple[int, ...]


class Calls:
    """The calls of every Rows, in order. With `held`, each waits until it is let through."""

    def __init__(self, patch: pytest.MonkeyPatch, *, compute: bool = True) -> None:
        self.made: list[Call] = []
        self.held = False
        self.fails: Callable[[Call], bool] = lambda call: False
        self._let, self._begun = threading.Semaphore(0), threading.Semaphore(0)
        step = Rows.step

        def watched(rows: Rows) -> None:
            call = Call(tuple(rows.images), rows.count, tuple(rows._latents.shape[-2:]))
            self.made.append(call)
            if self.held:
                self._begun.release()
                assert self._let.acquire(timeout=SOON)
            if self.fails(call):
                raise FloatingPointError("the call failed")
            if compute:
                step(rows)
            else:
                for image in rows.images:
                    image.step += 1

        patch.setattr(Rows, "step", watched)

    def wait(self) -> Call:
        """Wait until the next call has begun, and is held."""
        assert self._begun.acquire(timeout=SOON)
        return self.made[-1]

    def let(self, count: int = 1) -> None:
        self._let.release(count)

    def go(self) -> None:
        """Hold no more."""
        self.held = False
        self._let.release(10_000)


@dataclass
class EngineHarness:
    """Hands images to an engine."""

    oracle: ImageOracle
    engine: DenoisingEngine
    backend: PrometheusBackend
    leases: list[Lease] = field(default_factory=list)

    def image(self, wanted: OracleImage, *, size: tuple[int, int] = SIZE, **options: Any) -> EngineImage:
        """An image that holds a lease, ready to be submitted."""
        leases = tuple(Lease(self.oracle.flats[key]) for key, _ in wanted.stack)
        self.leases += leases
        return EngineImage(
            rows=self.oracle.rows(wanted, size, [lease.flat for lease in leases]),
            size=size,
            listener=options.pop("listener", None) or RecordingListener(),
            leases=leases,
            adapters=tuple(f"adapter-{key}" for key, _ in wanted.stack),
            **options,
        )

    def submit(self, wanted: OracleImage, **options: Any) -> tuple[EngineImage, RecordingListener]:
        image = self.image(wanted, **options)
        self.engine.submit(image)
        assert isinstance(image.listener, RecordingListener)
        return image, image.listener

    def decoded(self, received: RecordingListener) -> Tensor:
        return self.oracle.decode(received.latents.result(SOON))

    def metric(self, name: str, **labels: str) -> float:
        return self.backend.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def open_engine(oracle: ImageOracle, **options: Any) -> Iterator[EngineHarness]:
    """An engine of at most 6 rows, if not said otherwise; at the end nothing may be left in it."""
    backend = PrometheusBackend()
    bank = RowBank(oracle.base.unet, oracle.layout)
    chosen = {"max_rows": 6, "max_waiting": 1000, **options}
    chosen.setdefault("buckets", (*range(2, chosen["max_rows"], 2), chosen["max_rows"]))
    engine = DenoisingEngine(oracle.base, bank, Metrics(backend, SERVING_METRICS), **chosen)
    harness = EngineHarness(oracle, engine, backend)
    try:
        yield harness
    finally:
        engine.close()
        bank.detach()
    assert not engine.alive
    assert all(lease.released for lease in harness.leases), "a lease was not given back"
    assert not any(thread.name == "cat-engine" for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.001)


def same_latents(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
