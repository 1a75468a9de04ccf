"""The engine: rows of many requests in one call, and each image as `generate` makes it alone."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from cat_cluster.models.generate import ImageRow
from tests.support.denoised_images import ImageOracle, OracleImage, assert_same_image
from tests.support.engines import (
    MIXED,
    PLAIN,
    PLUG,
    SIZE,
    UNGUIDED,
    Calls,
    RecordingListener,
    open_engine,
    same_latents,
)

# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("max_rows", "buckets"), [(2, (1, 2)), (7, (3, 7)), (16, (2, 4, 8, 16))])
def test_a_mixed_batch_gives_each_image_as_if_it_were_alone(
    oracle: ImageOracle, max_rows: int, buckets: tuple[int, ...]
) -> None:
    with open_engine(oracle, max_rows=max_rows, buckets=buckets) as harness:
        received = [harness.submit(wanted)[1] for wanted in MIXED]
        for wanted, one in zip(MIXED, received, strict=True):
            assert_same_image(harness.decoded(one), oracle.image(wanted), wanted)
        assert harness.engine.active == harness.engine.waiting == harness.engine.rows_in_use == 0
    steps = sum(wanted.row.steps * (2 if wanted.row.guided else 1) for wanted in MIXED)
    assert harness.metric("cat_serve_row_steps_total") == steps
    assert harness.metric("cat_serve_wait_seconds_count") == len(MIXED)


@pytest.mark.slow
def test_images_of_several_sizes_at_once_are_those_of_each_alone(oracle: ImageOracle) -> None:
    sizes = [(8, 8), (12, 8), (8, 12)]
    jobs = [(wanted, sizes[n % 3]) for n, wanted in enumerate(MIXED)]
    with open_engine(oracle) as harness:
        alone = [harness.submit(wanted, size=size)[1].latents.result(60) for wanted, size in jobs]
        received = [harness.submit(wanted, size=size)[1] for wanted, size in jobs]
        for one, latents, (wanted, size) in zip(received, alone, jobs, strict=True):
            same_latents(one.latents.result(60), latents)
            if size == SIZE:
                assert_same_image(harness.decoded(one), oracle.image(wanted), wanted)


def test_listeners_hear_of_the_steps_they_asked_for(oracle: ImageOracle) -> None:
    with open_engine(oracle) as harness:
        _, silent = harness.submit(PLAIN)
        _, every = harness.submit(PLAIN, notify_all=True)
        _, some = harness.submit(PLAIN, notify_steps=frozenset({1, 3}))
        for received in (silent, every, some):
            received.latents.result(60)
        assert (silent.steps, every.steps, some.steps) == ([], [1, 2, 3, 4], [1, 3])
        assert (len(every.previews), len(some.previews)) == (0, 2)
        assert not torch.equal(some.previews[0], some.previews[1])


# -- one call for all ----------------------------------------------------------------------------------------------


def test_eight_requests_of_eight_adapters_make_one_call_a_step(oracle: ImageOracle, calls: Calls) -> None:
    calls.held = True
    with open_engine(oracle, max_rows=16) as harness:
        harness.submit(PLUG)
        calls.wait()
        jobs = [OracleImage(ImageRow("a red cup", key, steps=3), key) for key in range(1, 9)]
        received = [harness.submit(wanted)[1] for wanted in jobs]
        calls.go()
        facts = []
        for one in received:
            one.latents.result(60)
            facts.append(one.facts)
    assert [call.rows for call in calls.made] == [2, 16, 16, 16]
    assert {(one.most_rows, one.most_adapters) for one in facts if one} == {(16, 8)}


def test_a_request_that_arrives_while_others_denoise_is_in_the_next_call(oracle: ImageOracle, calls: Calls) -> None:
    calls.held = True
    with open_engine(oracle) as harness:
        first, _ = harness.submit(PLAIN)
        assert calls.wait().images == (first.rows,)
        second, _ = harness.submit(PLAIN)
        third, _ = harness.submit(UNGUIDED)
        calls.let()
        assert set(calls.wait().images) == {first.rows, second.rows, third.rows}
        fourth, _ = harness.submit(PLAIN)  # two rows, and one is left
        calls.let()
        assert fourth.rows not in calls.wait().images
        assert harness.engine.waiting == 1
        calls.let(2)
        calls.wait()
        assert set(calls.wait().images) == {second.rows, third.rows, fourth.rows}, "the first is done after four steps"
        calls.go()


def test_first_come_first_served_within_a_size(oracle: ImageOracle, empty_calls: Calls) -> None:
    """A guided image that waits for two rows is not overtaken by later ones that would fit in one."""
    order: list[int] = []
    empty_calls.held = True
    with open_engine(oracle, max_rows=3) as harness:
        harness.submit(PLAIN)
        empty_calls.wait()
        received = []
        for number in range(12):
            wanted = OracleImage(ImageRow("a cup", number, steps=2, guidance=4.0 if number % 3 else 1.0))
            listener = RecordingListener(then=lambda number=number: order.append(number))  # type: ignore[misc]
            received.append(harness.submit(wanted, listener=listener)[1])
        empty_calls.go()
        for one in received:
            one.latents.result(60)
    starts = list(dict.fromkeys(image for call in empty_calls.made for image in call.images))
    assert len(starts) == 13
    assert order == sorted(order)


def test_sizes_take_turns(oracle: ImageOracle, empty_calls: Calls) -> None:
    empty_calls.held = True
    with open_engine(oracle) as harness:
        harness.submit(PLUG)
        empty_calls.wait()
        jobs = [((8, 8), 10), ((12, 8), 4), ((8, 12), 4)]
        received = [
            harness.submit(OracleImage(ImageRow("a cup", 1, steps=steps)), size=size)[1]
            for size, steps in jobs
            for _ in "ab"
        ]
        empty_calls.go()
        for one in received:
            one.latents.result(60)
    sizes = [call.size for call in empty_calls.made[1:]]
    assert len(sizes) == 18, "two images of a size share their calls"
    assert all(len(set(sizes[at : at + 3])) == 3 for at in range(0, 12, 3))
