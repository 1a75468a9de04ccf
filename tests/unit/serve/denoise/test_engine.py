"""The engine: rows of many requests in one call, joining and leaving at any step, and no image harming another."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo

from cat_cluster.errors import (
    CancelledRequestError,
    DeadlineError,
    EngineStoppedError,
    OverloadedError,
    ServingError,
)
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.generate import ImageRow
from serve.denoise.image import EngineImage
from serve.denoise.running_images import RunningImages
from tests.support.denoised_images import Studio, Wanted, assert_same_image, random_adapter
from tests.support.engines import SIZE, Calls, Heard, open_desk, same_latents, wait_until

MIXED = [
    Wanted(ImageRow("a red cup", 1, steps=3, sampler="ddim"), 1),
    Wanted(ImageRow("a photo of a cup", 2, steps=6, sampler="euler", guidance=1.0), 2),
    Wanted(ImageRow("", 3, steps=4, sampler="dpmpp_2m", guidance=7.5, negative_prompt="red"), 3, 0.5),
    Wanted(ImageRow("a red cup", 4, steps=1, sampler="dpmpp_2m")),
    Wanted(ImageRow("a photo", 1, steps=5, sampler="ddim", guidance=0.0)),
    Wanted(ImageRow("cup of red", 5, steps=2, sampler="euler", guidance=2.0), 1, 1.5),
    Wanted(ImageRow("cup", 6, steps=5, sampler="dpmpp_2m", guidance=1.0), 2, -0.5),
    Wanted(ImageRow("a cup in red", 7, steps=7, sampler="ddim"), 4),
    Wanted(ImageRow("a photo of a red cup", 8, steps=2, sampler="dpmpp_2m"), 5),
    Wanted(ImageRow("red", 9, steps=3, sampler="euler"), 6, 0.25),
    Wanted(ImageRow("a cup", 10, steps=4, sampler="ddim", guidance=1.0), 7),
    Wanted(ImageRow("in a cup", 11, steps=1, sampler="euler"), 8),
    Wanted(ImageRow("a photo", 12, steps=6, sampler="dpmpp_2m", negative_prompt="a cup"), 1),
    Wanted(ImageRow("of", 13, steps=2, sampler="ddim"), 2),
]
PLAIN = Wanted(ImageRow("a red cup", 1, steps=4))
PLUG = Wanted(ImageRow("a cup", 1, steps=1))
UNGUIDED = Wanted(ImageRow("a cup", 2, steps=4, guidance=1.0))


@pytest.fixture(scope="module")
def studio(tiny_base_folder: Path) -> Studio:
    base = load_base_model(str(tiny_base_folder))
    studio = Studio(base, {key: random_adapter(base, key, rank=1 + key % 3) for key in range(1, 9)})
    for wanted in [*MIXED, PLAIN, UNGUIDED]:
        studio.alone(wanted)
    return studio


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The U-Net calls, watched and computed."""
    calls = Calls(monkeypatch)
    yield calls
    calls.go()


@pytest.fixture
def empty_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Calls that count steps and compute nothing."""
    calls = Calls(monkeypatch, compute=False)
    yield calls
    calls.go()


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_rows", "buckets"), [(2, (1, 2)), (7, (3, 7)), (16, (2, 4, 8, 16))])
def test_a_mixed_batch_gives_each_image_as_if_it_were_alone(
    studio: Studio, max_rows: int, buckets: tuple[int, ...]
) -> None:
    with open_desk(studio, max_rows=max_rows, buckets=buckets) as desk:
        heard = [desk.submit(wanted)[1] for wanted in MIXED]
        for wanted, one in zip(MIXED, heard, strict=True):
            assert_same_image(desk.drawn(one), studio.alone(wanted), wanted)
        assert desk.engine.active == desk.engine.waiting == desk.engine.rows_in_use == 0
    steps = sum(wanted.row.steps * (2 if wanted.row.guided else 1) for wanted in MIXED)
    assert desk.metric("cat_serve_row_steps_total") == steps
    assert desk.metric("cat_serve_wait_seconds_count") == len(MIXED)


def test_images_of_several_sizes_at_once_are_those_of_each_alone(studio: Studio) -> None:
    sizes = [(8, 8), (12, 8), (8, 12)]
    jobs = [(wanted, sizes[n % 3]) for n, wanted in enumerate(MIXED)]
    with open_desk(studio) as desk:
        alone = [desk.submit(wanted, size=size)[1].latents.result(60) for wanted, size in jobs]
        heard = [desk.submit(wanted, size=size)[1] for wanted, size in jobs]
        for one, latents, (wanted, size) in zip(heard, alone, jobs, strict=True):
            same_latents(one.latents.result(60), latents)
            if size == SIZE:
                assert_same_image(desk.drawn(one), studio.alone(wanted), wanted)


def test_listeners_hear_of_the_steps_they_asked_for(studio: Studio) -> None:
    with open_desk(studio) as desk:
        _, silent = desk.submit(PLAIN)
        _, every = desk.submit(PLAIN, notify_all=True)
        _, some = desk.submit(PLAIN, notify_steps=frozenset({1, 3}))
        for heard in (silent, every, some):
            heard.latents.result(60)
        assert (silent.steps, every.steps, some.steps) == ([], [1, 2, 3, 4], [1, 3])
        assert (len(every.previews), len(some.previews)) == (0, 2)
        assert not torch.equal(some.previews[0], some.previews[1])


# -- one call for all ----------------------------------------------------------------------------------------------


def test_eight_requests_of_eight_adapters_make_one_call_a_step(studio: Studio, calls: Calls) -> None:
    calls.held = True
    with open_desk(studio, max_rows=16) as desk:
        desk.submit(PLUG)
        calls.wait()
        jobs = [Wanted(ImageRow("a red cup", key, steps=3), key) for key in range(1, 9)]
        heard = [desk.submit(wanted)[1] for wanted in jobs]
        calls.go()
        facts = []
        for one in heard:
            one.latents.result(60)
            facts.append(one.facts)
    assert [call.rows for call in calls.made] == [2, 16, 16, 16]
    assert {(one.most_rows, one.most_adapters) for one in facts if one} == {(16, 8)}


def test_a_request_that_arrives_while_others_denoise_is_in_the_next_call(studio: Studio, calls: Calls) -> None:
    calls.held = True
    with open_desk(studio) as desk:
        first, _ = desk.submit(PLAIN)
        assert calls.wait().images == (first.rows,)
        second, _ = desk.submit(PLAIN)
        third, _ = desk.submit(UNGUIDED)
        calls.let()
        assert set(calls.wait().images) == {first.rows, second.rows, third.rows}
        fourth, _ = desk.submit(PLAIN)  # two rows, and one is left
        calls.let()
        assert fourth.rows not in calls.wait().images
        assert desk.engine.waiting == 1
        calls.let(2)
        calls.wait()
        assert set(calls.wait().images) == {second.rows, third.rows, fourth.rows}, "the first is done after four steps"
        calls.go()


def test_first_come_first_served_within_a_size(studio: Studio, empty_calls: Calls) -> None:
    """A guided image that waits for two rows is not overtaken by later ones that would fit in one."""
    order: list[int] = []
    empty_calls.held = True
    with open_desk(studio, max_rows=3) as desk:
        desk.submit(PLAIN)
        empty_calls.wait()
        heard = []
        for number in range(12):
            wanted = Wanted(ImageRow("a cup", number, steps=2, guidance=4.0 if number % 3 else 1.0))
            listener = Heard(then=lambda number=number: order.append(number))  # type: ignore[misc]
            heard.append(desk.submit(wanted, listener=listener)[1])
        empty_calls.go()
        for one in heard:
            one.latents.result(60)
    starts = list(dict.fromkeys(image for call in empty_calls.made for image in call.images))
    assert len(starts) == 13
    assert order == sorted(order)


def test_sizes_take_turns(studio: Studio, empty_calls: Calls) -> None:
    empty_calls.held = True
    with open_desk(studio) as desk:
        desk.submit(PLUG)
        empty_calls.wait()
        jobs = [((8, 8), 10), ((12, 8), 4), ((8, 12), 4)]
        heard = [
            desk.submit(Wanted(ImageRow("a cup", 1, steps=steps)), size=size)[1] for size, steps in jobs for _ in "ab"
        ]
        empty_calls.go()
        for one in heard:
            one.latents.result(60)
    sizes = [call.size for call in empty_calls.made[1:]]
    assert len(sizes) == 18, "two images of a size share their calls"
    assert all(len(set(sizes[at : at + 3])) == 3 for at in range(0, 12, 3))


# -- leaving -------------------------------------------------------------------------------------------------------


def test_a_cancelled_image_leaves_at_the_next_step(studio: Studio, calls: Calls) -> None:
    calls.held = True
    with open_desk(studio) as desk:
        stays, kept = desk.submit(MIXED[7])
        goes, gone = desk.submit(Wanted(PLAIN.row, 2))
        calls.wait()
        waits, waited = desk.submit(MIXED[0], size=(8, 12))
        waits.cancel()
        calls.let()
        calls.wait()
        goes.cancel()
        calls.let()
        assert calls.wait().images == (stays.rows,)
        assert isinstance(gone.error(), CancelledRequestError)
        assert isinstance(waited.error(), CancelledRequestError)
        calls.go()
        assert_same_image(desk.drawn(kept), studio.alone(MIXED[7]))
    assert all(lease.released for lease in desk.leases)


def test_an_image_past_its_deadline_leaves_whether_it_waits_or_runs(studio: Studio, calls: Calls) -> None:
    now = [100.0]
    calls.held = True
    with open_desk(studio, max_rows=4, clock=lambda: now[0]) as desk:
        _, kept = desk.submit(MIXED[7], deadline=200.0)
        _, runs = desk.submit(Wanted(PLAIN.row, 1), deadline=110.0)
        _, waits = desk.submit(Wanted(PLAIN.row, 2), deadline=109.0)
        calls.wait()
        now[0] = 111.0
        calls.let()
        calls.wait()
        for heard in (runs, waits):
            assert isinstance(heard.error(), DeadlineError)
        calls.go()
        assert_same_image(desk.drawn(kept), studio.alone(MIXED[7]))


def test_close_ends_what_runs_and_waits(studio: Studio, calls: Calls) -> None:
    calls.held = True
    with open_desk(studio, max_rows=2) as desk:
        heard = [desk.submit(wanted)[1] for wanted in (*MIXED[:4], PLAIN)]
        heard.append(desk.submit(PLAIN, probe=True)[1])
        calls.wait()
        closing = threading.Thread(target=desk.engine.close)
        closing.start()
        wait_until(lambda: not desk.engine._running)
        with pytest.raises(EngineStoppedError):
            desk.submit(MIXED[0])
        calls.go()
        closing.join(60)
        assert [type(one.error()) for one in heard] == [EngineStoppedError] * 6


def test_close_does_not_wait_for_ever_for_a_step_that_hangs(studio: Studio, calls: Calls) -> None:
    calls.held = True
    with open_desk(studio) as desk:
        _, heard = desk.submit(MIXED[0])
        calls.wait()
        desk.engine.close(timeout=0.05)
        assert isinstance(heard.error(), EngineStoppedError)
        calls.go()


def test_the_queue_has_an_end(studio: Studio, calls: Calls) -> None:
    calls.held = True
    with open_desk(studio, max_rows=2, max_waiting=2) as desk:
        desk.submit(PLAIN)
        calls.wait()
        desk.submit(MIXED[0])
        desk.submit(MIXED[1])
        with pytest.raises(OverloadedError, match="2 images wait") as refused:
            desk.submit(MIXED[2])
        assert refused.value.retry_after >= 1.0
        assert desk.leases[-1].released, "who is refused does not keep a slot"
        desk.submit(PLAIN, probe=True)
        calls.go()


# -- faults --------------------------------------------------------------------------------------------------------


def test_an_image_that_cannot_join_ends_alone(studio: Studio, calls: Calls) -> None:
    calls.held = True
    with open_desk(studio) as desk:
        _, first = desk.submit(MIXED[0])
        calls.wait()
        bad = desk.image(MIXED[2])
        desk.leases[-1]._flat = torch.zeros(3)
        desk.engine.submit(bad)
        torn = desk.image(MIXED[2], size=(7, 7))  # a size that the U-Net cannot halve, with other latents
        torn.rows.latents = torch.zeros(4, 8, 8)
        desk.engine.submit(torn)
        _, second = desk.submit(MIXED[1])
        calls.go()
        for image in (bad, torn):
            assert isinstance(image.listener, Heard)
            error = image.listener.error()
            assert isinstance(error, ServingError)
            assert "could not be started" in str(error)
        for wanted, heard in zip(MIXED, (first, second), strict=False):
            assert_same_image(desk.drawn(heard), studio.alone(wanted))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_image_whose_calls_fail_ends_alone(studio: Studio, calls: Calls, place: int) -> None:
    jobs = [MIXED[0], MIXED[1], MIXED[6]]
    calls.held = True
    with open_desk(studio) as desk:
        desk.submit(PLUG)
        calls.wait()
        submitted = [desk.submit(wanted) for wanted in jobs]
        poisoned = submitted[place][0].rows
        calls.fails = lambda call: poisoned in call.images and poisoned.step == 1
        calls.go()
        error = submitted[place][1].error()
        assert isinstance(error, ServingError)
        assert "FloatingPointError" in str(error)
        for (_, heard), wanted in zip(submitted, jobs, strict=True):
            if heard is not submitted[place][1]:
                assert_same_image(desk.drawn(heard), studio.alone(wanted))
    assert desk.engine.rows_in_use == 0


def test_a_call_that_fails_for_its_size_goes_on_in_parts(studio: Studio, calls: Calls) -> None:
    """As when memory is short: no image alone is to blame, so none ends."""
    calls.fails = lambda call: len(call.images) > 1
    with open_desk(studio) as desk:
        heard = [desk.submit(wanted)[1] for wanted in MIXED[:6]]
        for one, wanted in zip(heard, MIXED, strict=False):
            assert_same_image(desk.drawn(one), studio.alone(wanted))


def test_a_listener_that_fails_harms_nobody(studio: Studio) -> None:
    class Rude(Heard):
        def stepped(self, step: int, steps: int, denoised: torch.Tensor | None) -> None:
            raise RuntimeError("Event loop is closed")

        denoised = failed = stepped  # type: ignore[assignment]

    with open_desk(studio) as desk:
        desk.submit(MIXED[0], listener=Rude(), notify_all=True)
        cancelled, _ = desk.submit(MIXED[7], listener=Rude(), notify_all=True)
        cancelled.cancel()
        _, heard = desk.submit(MIXED[1])
        assert_same_image(desk.drawn(heard), studio.alone(MIXED[1]))
        assert desk.engine.alive


def test_an_engine_whose_device_fails_ends_with_all_its_images(
    studio: Studio, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fence(batches: RunningImages) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    calls.held = True
    with open_desk(studio, max_rows=2) as desk:
        heard = [desk.submit(wanted)[1] for wanted in MIXED[:3]]
        calls.wait()
        monkeypatch.setattr(RunningImages, "_fence", fence)
        calls.go()
        assert [type(one.error()) for one in heard] == [EngineStoppedError] * 3
        wait_until(lambda: not desk.engine.alive)
        with pytest.raises(EngineStoppedError):
            desk.submit(MIXED[3])


def test_an_engine_that_makes_no_step_is_stuck(studio: Studio, calls: Calls) -> None:
    now = [100.0]
    with open_desk(studio, clock=lambda: now[0]) as desk:
        assert desk.engine.stuck_for() == 0.0
        now[0] = 5000.0  # idle for long
        assert desk.engine.stuck_for() == 0.0
        calls.held = True
        _, heard = desk.submit(MIXED[0])
        assert desk.engine.stuck_for() == 0.0, "it has not been stuck since it went idle"
        calls.wait()
        assert desk.engine.stuck_for() == 0.0
        now[0] = 5070.0
        assert desk.engine.stuck_for() == 70.0
        calls.let()
        calls.wait()
        assert desk.engine.stuck_for() == 0.0
        calls.go()
        heard.latents.result(60)
        wait_until(lambda: desk.engine._idle)
        now[0] = 9000.0
        assert desk.engine.stuck_for() == 0.0
        assert desk.metric("cat_serve_images_active") == 0.0


@pytest.mark.parametrize("threads", [None, 2])
def test_the_threads_of_the_engine_are_its_own(
    studio: Studio, threads: int | None, monkeypatch: pytest.MonkeyPatch
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
        with open_desk(studio, threads=threads) as desk:
            aside = threading.Thread(target=torch.set_num_threads, args=(1,))
            aside.start()
            aside.join()
            desk.submit(PLUG)[1].latents.result(60)
    finally:
        torch.set_num_threads(1)
    assert seen == [2]


# -- soak ----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_after_many_images_that_come_and_go(studio: Studio, empty_calls: Calls) -> None:
    """500 images of mixed sizes, probes among them; a third is cancelled, some are late, some cannot join or step."""
    rng = random.Random(0)
    poisoned = set[EngineImage]()
    empty_calls.fails = lambda call: any(image.rows in call.images for image in poisoned)
    threads = threading.active_count()
    with open_desk(studio, max_rows=8, max_waiting=60) as desk:
        heard, refused = [], 0
        for number in range(500):
            wanted = rng.choice(MIXED)
            options = {"probe": rng.random() < 0.2, "size": rng.choice([SIZE, SIZE, (12, 8)])}
            if rng.random() < 0.05:
                options["deadline"] = 0.0
            image = desk.image(wanted, **options)
            if rng.random() < 0.03:
                image.rows.latents = torch.zeros(1)
            if rng.random() < 0.02:
                poisoned.add(image)
            try:
                desk.engine.submit(image)
            except OverloadedError:
                refused += 1
                wait_until(lambda: desk.engine.waiting < 40)
                continue
            heard.append(image.listener)
            if rng.random() < 0.3:
                threading.Timer(rng.random() * 0.02, image.cancel).start()
            if number % 100 == 99:
                wait_until(lambda: desk.engine.waiting < 5)
        for one in heard:
            assert isinstance(one, Heard)
            error = one.error()
            assert error is None or isinstance(error, ServingError)
        wait_until(lambda: desk.engine._idle)
        assert desk.engine.active == desk.engine.rows_in_use == desk.engine.waiting == 0
        assert not desk.engine._probes
        done = sum(one.facts is not None for one in heard if isinstance(one, Heard))
        assert 100 < done < len(heard)
    wait_until(lambda: threading.active_count() <= threads)
