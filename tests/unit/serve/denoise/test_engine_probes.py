"""Probes in the engine: they ride where users pay nothing, step aside for them, and have a share that is guaranteed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from cat_cluster.errors import CancelledRequestError
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.generate import ImageRow
from serve.denoise.image import EngineImage
from tests.support.denoised_images import ImageOracle, OracleImage, assert_same_image, random_adapter
from tests.support.engines import Calls, EngineHarness, RecordingListener, open_engine, wait_until

pytestmark = pytest.mark.slow

PROBE = OracleImage(ImageRow("a red cup", 1, steps=4), 1)
OTHER_PROBE = OracleImage(ImageRow("a photo of a cup", 2, steps=5, sampler="dpmpp_2m"), 2, 0.5)
SMALL_PROBE = OracleImage(ImageRow("a cup", 3, steps=4, guidance=1.0), 1)
USER = OracleImage(ImageRow("a red cup", 4, steps=6), 2)
SMALL_USER = OracleImage(ImageRow("a red cup", 4, steps=3, guidance=1.0), 2)


@pytest.fixture(scope="module")
def oracle(tiny_base_folder: Path) -> ImageOracle:
    base = load_base_model(str(tiny_base_folder))
    oracle = ImageOracle(base, {1: random_adapter(base, 1), 2: random_adapter(base, 2, rank=2)})
    for wanted in (PROBE, OTHER_PROBE, SMALL_PROBE, USER, SMALL_USER):
        oracle.image(wanted)
    return oracle


@pytest.fixture(params=[True])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls(monkeypatch, compute=request.param)
    calls.held = True
    yield calls
    calls.go()


only_counted = pytest.mark.parametrize("calls", [False], indirect=True)


def test_idle_rows_are_the_probes(oracle: ImageOracle, calls: Calls) -> None:
    with open_engine(oracle) as harness:
        submitted = [harness.submit(wanted, probe=True) for wanted in (PROBE, OTHER_PROBE, SMALL_PROBE)]
        calls.wait()
        calls.let()
        assert {image.rows for image, _ in submitted} == set(calls.wait().images)
        calls.go()
        for (_, received), wanted in zip(submitted, (PROBE, OTHER_PROBE, SMALL_PROBE), strict=True):
            assert_same_image(harness.decoded(received), oracle.image(wanted))
    assert harness.metric("cat_serve_row_steps_total") == 0
    assert harness.metric("cat_serve_probe_row_steps_total") == 2 * 4 + 2 * 5 + 4
    assert harness.metric("cat_serve_wait_seconds_count") == 0, "probes do not count among the waits of users"


def test_a_user_waits_at_most_the_step_in_flight_and_parked_probes_are_the_same_images(
    oracle: ImageOracle, calls: Calls
) -> None:
    with open_engine(oracle, buckets=(6,)) as harness:
        probes = [harness.submit(wanted, probe=True) for wanted in (PROBE, OTHER_PROBE, PROBE)]
        calls.wait()
        calls.let()
        assert calls.wait().rows == 6
        user, kept = harness.submit(USER)
        calls.let()
        assert user.rows in calls.wait().images
        users = [harness.submit(USER) for _ in "ab"]
        calls.let()
        assert {user.rows, *(image.rows for image, _ in users)} == set(calls.wait().images), "all rows are the users'"
        calls.go()
        for received in (kept, *(received for _, received in users)):
            assert_same_image(harness.decoded(received), oracle.image(USER))
        for (_, received), wanted in zip(probes, (PROBE, OTHER_PROBE, PROBE), strict=True):
            assert_same_image(harness.decoded(received), oracle.image(wanted))


@pytest.mark.parametrize("other_size", [False, True])
def test_a_probe_never_enlarges_a_call_of_users(oracle: ImageOracle, calls: Calls, other_size: bool) -> None:
    """Admitted to idle rows, it leaves for a user whose call it would make larger, or alternate with."""
    with open_engine(oracle, max_rows=8, probe_share=1e-9) as harness:
        probe, received = harness.submit(PROBE, probe=True)
        calls.wait()
        user, _ = harness.submit(USER, size=(12, 8) if other_size else (8, 8))
        calls.let()
        for _ in range(USER.row.steps):
            assert calls.wait().images == (user.rows,)
            calls.let()
        assert calls.wait().images == (probe.rows,)
        assert probe.rows.step == 1
        calls.go()
        assert_same_image(harness.decoded(received), oracle.image(PROBE))


def test_padding_is_the_probes(oracle: ImageOracle, calls: Calls) -> None:
    with open_engine(oracle, buckets=(2, 6), probe_share=1e-9) as harness:
        user, _ = harness.submit(SMALL_USER)
        calls.wait()
        small, seen = harness.submit(SMALL_PROBE, probe=True)
        harness.submit(PROBE, probe=True)
        calls.let()
        assert set(calls.wait().images) == {user.rows, small.rows}, "one row was padding, and two would be too many"
        second, _ = harness.submit(USER)  # three rows now, in a call of six
        calls.let()
        call = calls.wait()
        assert {user.rows, small.rows, second.rows} < set(call.images)
        assert call.rows == 6
        calls.go()
        assert_same_image(harness.decoded(seen), oracle.image(SMALL_PROBE))


def saturate(harness: EngineHarness, wanted: OracleImage, lanes: int, **options: object) -> list[EngineImage]:
    """Keep more images of users than there are rows for in the queue: each that is done is followed by another."""
    submitted: list[EngineImage] = []

    def one_more() -> None:
        if harness.engine._running:
            submitted.append(harness.submit(wanted, listener=RecordingListener(then=one_more), **options)[0])

    for _ in range(lanes):
        one_more()
    return submitted


@only_counted
@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_probes_have_their_share_under_constant_saturation(
    oracle: ImageOracle, calls: Calls, size: tuple[int, int]
) -> None:
    with open_engine(oracle, max_rows=8) as harness:
        calls.go()
        saturate(harness, USER, 8, size=size)
        wait_until(lambda: len(calls.made) > 20)
        probes = [harness.submit(PROBE, probe=True) for _ in range(40)]
        at = len(calls.made)
        wait_until(lambda: len(calls.made) > at + 1500)
        window = calls.made[at : at + 1500]
        rows = {image.rows for image, _ in probes}
        taken = sum(image.rows for call in window for image in call.images if image in rows)
        total = sum(call.rows for call in window)
        assert 0.005 <= taken / total <= 0.02
        assert any(received.facts is not None for _, received in probes)
        mixed = [call for call in window if rows & set(call.images) and not rows >= set(call.images)]
        assert not mixed, "a probe rode in a call of users that it made larger"
        assert sum(call.rows == 8 for call in window) >= 0.95 * 1500, "users lost rows to probes"
        # No user waits for more than the probe's own small call beside the step in flight.
        assert all(rows.isdisjoint(a.images) or rows.isdisjoint(b.images) for a, b in pairwise(window))
        for image, _ in probes:
            image.cancel()


@only_counted
def test_the_share_that_is_saved_while_no_probe_waits_is_bounded(oracle: ImageOracle, calls: Calls) -> None:
    with open_engine(oracle, max_rows=8, probe_share=0.1) as harness:
        calls.go()
        saturate(harness, USER, 8)
        wait_until(lambda: len(calls.made) > 2000)
        assert harness.engine._saved == 100.0
        probes = [harness.submit(PROBE, probe=True) for _ in range(200)]
        rows = {image.rows for image, _ in probes}
        at = len(calls.made)
        wait_until(lambda: len(calls.made) > at + 600)
        window = calls.made[at : at + 600]
        taken = sum(image.rows for call in window for image in call.images if image in rows)
        users = sum(call.rows for call in window) - taken
        assert 0.05 * users < taken <= 0.1 * users + 100.0 + 4
        for image, _ in probes:
            image.cancel()


def test_a_separate_probe_is_the_same_image_and_can_be_cancelled(oracle: ImageOracle, calls: Calls) -> None:
    with open_engine(oracle, max_rows=4, buckets=(1, 4), probe_share=0.5) as harness:
        calls.go()
        saturate(harness, USER, 4)
        for wanted in (PROBE, SMALL_PROBE, OTHER_PROBE):
            received = harness.submit(wanted, probe=True)[1]
            assert_same_image(harness.decoded(received), oracle.image(wanted))
        wait_until(lambda: harness.engine._saved > 10)
        image, received = harness.submit(OracleImage(ImageRow("a cup", 1, steps=500), 1), probe=True)
        wait_until(lambda: image.separate)
        image.cancel()
        assert isinstance(received.error(), CancelledRequestError)
        again = harness.submit(PROBE, probe=True)[1]
        assert_same_image(harness.decoded(again), oracle.image(PROBE))


def test_a_separate_probe_goes_on_when_the_users_are_gone(oracle: ImageOracle, calls: Calls) -> None:
    with open_engine(oracle, max_rows=2, probe_share=0.5) as harness:
        calls.go()
        user, _ = harness.submit(OracleImage(ImageRow("a cup", 1, steps=500)))
        probe, received = harness.submit(PROBE, probe=True)
        wait_until(lambda: probe.separate)
        user.cancel()
        assert_same_image(harness.decoded(received), oracle.image(PROBE))


def test_a_separate_probe_that_fails_harms_nobody(oracle: ImageOracle, calls: Calls) -> None:
    with open_engine(oracle, max_rows=2, probe_share=0.5) as harness:
        _, kept = harness.submit(USER)
        calls.wait()
        probe, received = harness.submit(PROBE, probe=True)
        torn = harness.image(PROBE, probe=True)
        torn.rows.latents = torn.rows.latents[:, :3]
        harness.engine.submit(torn)
        calls.fails = lambda call: probe.rows in call.images
        calls.go()
        assert "FloatingPointError" in str(received.error())
        assert_same_image(harness.decoded(kept), oracle.image(USER))
        assert isinstance(torn.listener, RecordingListener)
        assert "could not be started" in str(torn.listener.error())
