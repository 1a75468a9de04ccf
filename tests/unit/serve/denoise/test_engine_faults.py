"""Images that leave the engine early, images and devices that fail, and no image harming another."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel

from cat_cluster.errors import CancelledRequestError, DeadlineError, EngineStoppedError, OverloadedError, ServingError
from cat_cluster.lora.row_bank import RowAdapter, RowBlock
from cat_cluster.models.conditioning import Conditioning, Sizes, Text
from serve.denoise import running_images
from serve.denoise.image import EngineImage
from serve.denoise.running_images import RunningImages
from tests.support.denoised_images import ImageOracle, OracleImage, assert_same_image
from tests.support.engines import MIXED, PLAIN, PLUG, SIZE, Call, Calls, RecordingListener, open_engine, wait_until

pytestmark = pytest.mark.slow

# -- leaving -------------------------------------------------------------------------------------------------------


def test_a_cancelled_image_leaves_at_the_next_step(oracle: ImageOracle, calls: Calls) -> None:
    calls.held = True
    with open_engine(oracle) as harness:
        stays, kept = harness.submit(MIXED[7])
        goes, gone = harness.submit(OracleImage(PLAIN.row, 2))
        calls.wait()
        waits, waited = harness.submit(MIXED[0], size=(8, 12))
        waits.cancel()
        calls.let()
        calls.wait()
        goes.cancel()
        calls.let()
        assert calls.wait().images == (stays.rows,)
        assert isinstance(gone.error(), CancelledRequestError)
        assert isinstance(waited.error(), CancelledRequestError)
        calls.go()
        assert_same_image(harness.decoded(kept), oracle.image(MIXED[7]))
    assert all(lease.released for lease in harness.leases)


def test_an_image_past_its_deadline_leaves_whether_it_waits_or_runs(oracle: ImageOracle, calls: Calls) -> None:
    now = [100.0]
    calls.held = True
    with open_engine(oracle, max_rows=4, clock=lambda: now[0]) as harness:
        _, kept = harness.submit(MIXED[7], deadline=200.0)
        _, runs = harness.submit(OracleImage(PLAIN.row, 1), deadline=110.0)
        _, waits = harness.submit(OracleImage(PLAIN.row, 2), deadline=109.0)
        calls.wait()
        now[0] = 111.0
        calls.let()
        calls.wait()
        for received in (runs, waits):
            assert isinstance(received.error(), DeadlineError)
        calls.go()
        assert_same_image(harness.decoded(kept), oracle.image(MIXED[7]))


def test_close_ends_what_runs_and_waits(oracle: ImageOracle, calls: Calls) -> None:
    calls.held = True
    with open_engine(oracle, max_rows=2) as harness:
        received = [harness.submit(wanted)[1] for wanted in (*MIXED[:4], PLAIN)]
        received.append(harness.submit(PLAIN, probe=True)[1])
        calls.wait()
        closing = threading.Thread(target=harness.engine.close)
        closing.start()
        wait_until(lambda: not harness.engine._running)
        with pytest.raises(EngineStoppedError):
            harness.submit(MIXED[0])
        calls.go()
        closing.join(60)
        assert [type(one.error()) for one in received] == [EngineStoppedError] * 6


def test_close_does_not_wait_for_ever_for_a_step_that_hangs(oracle: ImageOracle, calls: Calls) -> None:
    calls.held = True
    with open_engine(oracle) as harness:
        _, received = harness.submit(MIXED[0])
        calls.wait()
        harness.engine.close(timeout=0.05)
        assert isinstance(received.error(), EngineStoppedError)
        calls.go()


def test_the_queue_has_an_end(oracle: ImageOracle, calls: Calls) -> None:
    calls.held = True
    with open_engine(oracle, max_rows=2, max_waiting=2) as harness:
        harness.submit(PLAIN)
        calls.wait()
        harness.submit(MIXED[0])
        harness.submit(MIXED[1])
        with pytest.raises(OverloadedError, match="2 images wait") as refused:
            harness.submit(MIXED[2])
        assert refused.value.retry_after >= 1.0
        assert harness.leases[-1].released, "who is refused does not keep a slot"
        harness.submit(PLAIN, probe=True)
        calls.go()


# -- faults --------------------------------------------------------------------------------------------------------


def test_an_image_that_cannot_join_ends_alone(oracle: ImageOracle, calls: Calls) -> None:
    calls.held = True
    with open_engine(oracle) as harness:
        _, first = harness.submit(MIXED[0])
        calls.wait()
        bad = harness.image(MIXED[2])
        bad.rows.adapters = (RowAdapter(torch.zeros(3), 1),)
        harness.engine.submit(bad)
        torn = harness.image(MIXED[2], size=(7, 7))  # a size that the U-Net cannot halve, with other latents
        torn.rows.latents = torch.zeros(4, 8, 8)
        harness.engine.submit(torn)
        _, second = harness.submit(MIXED[1])
        calls.go()
        for image in (bad, torn):
            assert isinstance(image.listener, RecordingListener)
            error = image.listener.error()
            assert isinstance(error, ServingError)
            assert "could not be started" in str(error)
        for wanted, received in zip(MIXED, (first, second), strict=False):
            assert_same_image(harness.decoded(received), oracle.image(wanted))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_image_whose_calls_fail_ends_alone(oracle: ImageOracle, calls: Calls, place: int) -> None:
    jobs = [MIXED[0], MIXED[1], MIXED[6]]
    calls.held = True
    with open_engine(oracle) as harness:
        harness.submit(PLUG)
        calls.wait()
        submitted = [harness.submit(wanted) for wanted in jobs]
        poisoned = submitted[place][0].rows
        calls.fails = lambda call: poisoned in call.images and poisoned.step == 1
        calls.go()
        error = submitted[place][1].error()
        assert isinstance(error, ServingError)
        assert "FloatingPointError" in str(error)
        for (_, received), wanted in zip(submitted, jobs, strict=True):
            if received is not submitted[place][1]:
                assert_same_image(harness.decoded(received), oracle.image(wanted))
    assert harness.engine.rows_in_use == 0


def test_a_call_that_fails_for_its_size_goes_on_in_parts(oracle: ImageOracle, calls: Calls) -> None:
    """As when memory is short: no image alone is to blame, so none ends."""
    calls.fails = lambda call: len(call.images) > 1
    with open_engine(oracle) as harness:
        received = [harness.submit(wanted)[1] for wanted in MIXED[:6]]
        for one, wanted in zip(received, MIXED, strict=False):
            assert_same_image(harness.decoded(one), oracle.image(wanted))


def test_memory_that_ends_when_an_image_joins_others_harms_none(
    oracle: ImageOracle, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of two guided images, side by side, are more than there is memory for; those of one are not."""

    of = Conditioning.of

    def few(texts: Sequence[Text], sizes: Sequence[Sizes]) -> Conditioning:
        if len({id(text) for text in texts}) > 2:
            raise torch.OutOfMemoryError("no memory is left")
        return of(texts, sizes)

    monkeypatch.setattr(Conditioning, "of", few)
    calls.held = True
    with open_engine(oracle) as harness:
        _, first = harness.submit(MIXED[0])
        calls.wait()
        _, second = harness.submit(MIXED[2])
        calls.go()
        for wanted, received in ((MIXED[0], first), (MIXED[2], second)):
            assert_same_image(harness.decoded(received), oracle.image(wanted))
        assert harness.engine.alive
        assert harness.engine.rows_in_use == 0


@pytest.mark.parametrize("after", range(0, 24, 3))
def test_memory_that_ends_again_while_images_are_tried_one_by_one_costs_one_of_them(
    oracle: ImageOracle, calls: Calls, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Copies are what an image leaves its rows with, for now or for good, and previews; one of them fails."""
    jobs, previews = [MIXED[0], MIXED[1], MIXED[6], MIXED[3]], frozenset({1, 2})
    clone, left = torch.Tensor.clone, -1

    def counting(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal left
        if threading.current_thread().name == "cat-engine" and left >= 0:
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("no memory is left")
        return clone(self, *args, **kwargs)

    def fails(call: Call) -> bool:
        nonlocal left
        if len(call.images) < len(jobs):
            return False
        calls.fails = lambda _: False
        left = after
        return True

    calls.held = True
    with open_engine(oracle, max_rows=8) as harness:
        harness.submit(PLUG)
        calls.wait()
        received = [harness.submit(wanted, notify_steps=previews)[1] for wanted in jobs]
        calls.fails = fails
        monkeypatch.setattr(torch.Tensor, "clone", counting)
        calls.go()
        errors = [error for one in received if (error := one.error()) is not None]
        assert left < 0
        assert len(errors) <= 1
        assert all(isinstance(error, ServingError) and "could not leave" in str(error) for error in errors)
        for one, wanted in zip(received, jobs, strict=True):
            if one.error() is None:
                assert_same_image(harness.decoded(one), oracle.image(wanted))
        assert harness.engine.alive
        assert harness.engine.active == harness.engine.rows_in_use == 0


def test_a_probe_that_cannot_be_parked_ends_alone(
    oracle: ImageOracle, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    calls.held = True
    with open_engine(oracle, max_rows=2) as harness:
        _, probe = harness.submit(MIXED[0], probe=True)
        calls.wait()
        monkeypatch.setattr(RowBlock, "adapters", no_memory)
        _, user = harness.submit(MIXED[2])
        calls.go()
        assert_same_image(harness.decoded(user), oracle.image(MIXED[2]))
        assert "could not leave its rows" in str(probe.error())
        assert harness.engine.alive


def test_what_a_failed_call_had_computed_is_freed_before_its_images_are_tried_alone(
    oracle: ImageOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, held, still_there = UNet2DConditionModel.forward, list[weakref.ref[torch.Tensor]](), list[bool]()

    def failing_at_first(self: UNet2DConditionModel, *args: Any, **kwargs: Any) -> Any:
        if not held:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no memory is left")
        still_there.append(held[0]() is not None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(running_images.logger, "disabled", True)  # pytest would keep the record, and so the frames
    monkeypatch.setattr(UNet2DConditionModel, "forward", failing_at_first)
    with open_engine(oracle) as harness:
        _, received = harness.submit(MIXED[0])
        assert_same_image(harness.decoded(received), oracle.image(MIXED[0]))
    assert still_there == [False] * 3


def test_a_listener_that_fails_harms_nobody(oracle: ImageOracle) -> None:
    class Rude(RecordingListener):
        def stepped(self, step: int, steps: int, denoised: torch.Tensor | None) -> None:
            raise RuntimeError("Event loop is closed")

        denoised = failed = stepped  # type: ignore[assignment]

    with open_engine(oracle) as harness:
        harness.submit(MIXED[0], listener=Rude(), notify_all=True)
        cancelled, _ = harness.submit(MIXED[7], listener=Rude(), notify_all=True)
        cancelled.cancel()
        _, received = harness.submit(MIXED[1])
        assert_same_image(harness.decoded(received), oracle.image(MIXED[1]))
        assert harness.engine.alive


def test_an_engine_whose_device_fails_ends_with_all_its_images(
    oracle: ImageOracle, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fence(batches: RunningImages) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    calls.held = True
    with open_engine(oracle, max_rows=2) as harness:
        received = [harness.submit(wanted)[1] for wanted in MIXED[:3]]
        calls.wait()
        monkeypatch.setattr(RunningImages, "_fence", fence)
        calls.go()
        assert [type(one.error()) for one in received] == [EngineStoppedError] * 3
        wait_until(lambda: not harness.engine.alive)
        with pytest.raises(EngineStoppedError):
            harness.submit(MIXED[3])


def test_an_engine_that_makes_no_step_is_stuck(oracle: ImageOracle, calls: Calls) -> None:
    now = [100.0]
    with open_engine(oracle, clock=lambda: now[0]) as harness:
        assert harness.engine.stuck_for() == 0.0
        now[0] = 5000.0  # idle for long
        assert harness.engine.stuck_for() == 0.0
        calls.held = True
        _, received = harness.submit(MIXED[0])
        assert harness.engine.stuck_for() == 0.0, "it has not been stuck since it went idle"
        calls.wait()
        assert harness.engine.stuck_for() == 0.0
        now[0] = 5070.0
        assert harness.engine.stuck_for() == 70.0
        calls.let()
        calls.wait()
        assert harness.engine.stuck_for() == 0.0
        calls.go()
        received.latents.result(60)
        wait_until(lambda: harness.engine._idle)
        now[0] = 9000.0
        assert harness.engine.stuck_for() == 0.0
        assert harness.metric("cat_serve_images_active") == 0.0


@pytest.mark.parametrize("threads", [None, 2])
def test_the_threads_of_the_engine_are_its_own(
    oracle: ImageOracle, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch gives a new thread what another thread has set last, as the one beside the engine sets 1."""
    seen: list[int] = []
    join = RunningImages.join

    def watched(batches: RunningImages, image: EngineImage) -> bool:
        seen.append(torch.get_num_threads())
        # Torch's limit of shapes, which each thread has of its own: beyond it compiled blocks run uncompiled.
        assert torch._dynamo.config.recompile_limit >= 1000
        return join(batches, image)

    monkeypatch.setattr(RunningImages, "join", watched)
    torch.set_num_threads(2)
    try:
        with open_engine(oracle, threads=threads) as harness:
            aside = threading.Thread(target=torch.set_num_threads, args=(1,))
            aside.start()
            aside.join()
            harness.submit(PLUG)[1].latents.result(60)
    finally:
        torch.set_num_threads(1)
    assert seen == [2]


# -- soak ----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_after_many_images_that_come_and_go(oracle: ImageOracle, empty_calls: Calls) -> None:
    """500 images of mixed sizes, probes among them; a third is cancelled, some are late, some cannot join or step."""
    rng = random.Random(0)
    poisoned = set[EngineImage]()
    empty_calls.fails = lambda call: any(image.rows in call.images for image in poisoned)
    threads = threading.active_count()
    with open_engine(oracle, max_rows=8, max_waiting=60) as harness:
        received, refused = [], 0
        for number in range(500):
            wanted = rng.choice(MIXED)
            options = {"probe": rng.random() < 0.2, "size": rng.choice([SIZE, SIZE, (12, 8)])}
            if rng.random() < 0.05:
                options["deadline"] = 0.0
            image = harness.image(wanted, **options)
            if rng.random() < 0.03:
                image.rows.latents = torch.zeros(1)
            if rng.random() < 0.02:
                poisoned.add(image)
            try:
                harness.engine.submit(image)
            except OverloadedError:
                refused += 1
                wait_until(lambda: harness.engine.waiting < 40)
                continue
            received.append(image.listener)
            if rng.random() < 0.3:
                threading.Timer(rng.random() * 0.02, image.cancel).start()
            if number % 100 == 99:
                wait_until(lambda: harness.engine.waiting < 5)
        for one in received:
            assert isinstance(one, RecordingListener)
            error = one.error()
            assert error is None or isinstance(error, ServingError)
        wait_until(lambda: harness.engine._idle)
        assert harness.engine.active == harness.engine.rows_in_use == harness.engine.waiting == 0
        assert not harness.engine._probes
        done = sum(one.facts is not None for one in received if isinstance(one, RecordingListener))
        assert 100 < done < len(received)
    wait_until(lambda: threading.active_count() <= threads)
