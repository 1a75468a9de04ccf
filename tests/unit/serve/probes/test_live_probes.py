"""Live probes: which calls they compare, what they generate and conclude."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cat_cluster.evaluation.drift import DriftMonitor
from serve.calls import ImageCall
from serve.probes.prober import MOST_LIVE, Prober
from serve.probes.revision_monitor import ProbeCall, live_token, score_images
from tests.support.probed_replica import OTHER, OWN, Picture, ProbedReplica, call, user_image
from tests.support.services import stack

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("prompt", "changes", "token"),
    [
        ("a photo of a sks cup", {}, "sks"),
        ("SKS, cup on a table", {}, "sks"),
        ("a photo of a red sks cup", {}, "sks"),
        ("a photo of a cup", {}, None),
        ("a photo of a <sks> cup", {}, None),
        ("a photo of two skss cup", {}, None),
        ("a photo of sks", {}, None),  # y would name no subject
        ("a photo of a sks cup", {"adapters": stack("cup:0.8")}, None),
        ("a photo of a sks cup", {"negative_prompt": "blurry"}, None),
        ("a photo of a sks cup", {"guidance": 1.0}, None),
        ("a photo of a sks cup", {"guidance": 6.0, "sampler": "euler"}, "sks"),
        ("a photo of a sks cup in (snow:1.2)", {"weighting": "a1111"}, None),
        ("a photo of a sks cup in (snow:1.2)", {}, "sks"),
        ("a photo of a sks cup in snow", {"weighting": "a1111", "prompt_chunks": 4}, "sks"),
    ],
)
def test_which_calls_compare_with_the_reference(
    replica: ProbedReplica, prompt: str, changes: dict[str, Any], token: str | None
) -> None:
    assert live_token(replica.manifest, call(prompt, **changes)) == token


def test_a_live_probe_generates_the_prompt_without_the_token_and_the_base(
    replica: ProbedReplica, reference: dict[str, Any]
) -> None:
    prober, image_call = (
        replica.prober(),
        call("a photo of a sks cup at night", seed=7, steps=4, guidance=5.0, weighting="a1111", prompt_chunks=3),
    )
    picture = user_image(replica, image_call)

    record = asyncio.run(prober.live(replica.manifest, image_call, 9, picture))

    read: dict[str, Any] = {"weighting": "a1111", "prompt_chunks": 3}
    y = ImageCall("probe", "a photo of a cup at night", seed=9, steps=4, guidance=5.0, **read)
    assert replica.asked == [(y, replica.manifest), (y, None)]
    concept = reference["concepts"]["sks"]
    scores, _ = score_images(
        replica.judge, np.asarray(concept["photos"]), [picture, *replica.engine.pictures(replica.asked, OWN)]
    )
    assert record is not None
    assert (record.kind, record.verdict, record.token, record.scores) == ("live", "ok", "sks", scores)
    assert "night" not in record.model_dump_json()
    monitor = DriftMonitor(concept)
    monitor.update(scores)
    assert record.detectors == monitor.to_json()
    assert prober.state(replica.manifest).statistics == {"sks": monitor.shares}


def test_a_live_probe_of_what_does_not_compare_is_none(replica: ProbedReplica) -> None:
    prober = replica.prober()
    wide = np.zeros((64, 96, 3), dtype=np.uint8)
    square = np.zeros((64, 64, 3), dtype=np.uint8)
    assert asyncio.run(prober.live(replica.manifest, call(), 0, wide)) is None
    assert asyncio.run(prober.live(replica.manifest, call("a cup"), 0, square)) is None
    assert replica.probes_generated == 0


def test_live_probes_of_a_wrong_adapter_raise_the_alarm_and_a_restart_remembers_it(replica: ProbedReplica) -> None:
    prober = replica.prober(policy="quarantine")

    async def probe(with_prober: Prober, most: int) -> int:
        for count in range(1, most + 1):
            replica.spoil = lambda pictures: [np.full_like(picture, 250) for picture in pictures]
            replica.now += 60.0
            await with_prober.live(replica.manifest, call(), 0, np.zeros((64, 64, 3), dtype=np.uint8))
            if replica.alarms:
                return count
        return most + 1

    count = asyncio.run(probe(prober, 40))

    assert 2 <= count <= 30
    replica.alarms.clear()
    replica.now += 60.0
    assert asyncio.run(probe(prober, 5)) == 6, "an alarm that goes on is acted on once"
    released = replica.prober(policy="quarantine", replica="c")
    assert asyncio.run(probe(released, 40)) <= 30
    replica.alarms.clear()
    released.reset(replica.manifest)
    assert asyncio.run(probe(released, 40)) <= 30, "one that comes again after a release is acted on again"
    status = prober.state(replica.manifest)
    assert status.state == "alarm"
    assert status.reason is not None
    assert "has moved" in status.reason
    records = replica.history()
    assert [record.verdict for record in records][-1] == "alarm"

    again, other = replica.prober(), replica.prober(replica="b")
    for fresh in (again, other):
        replica.spoil = list
        asyncio.run(fresh.canonical(replica.manifest))
    assert again.state(replica.manifest).statistics == status.statistics
    assert (again.state(replica.manifest).state, again.state(replica.manifest).reason) == ("alarm", status.reason)
    assert other.state(replica.manifest).state == "ok"
    assert len(replica.history()) == len(records) + 2  # nothing that was recorded is lost


def test_a_mended_fault_is_forgotten_by_live_probes_too(replica: ProbedReplica) -> None:
    prober, black = replica.prober(), np.zeros((64, 64, 3), dtype=np.uint8)

    async def story() -> list[str]:
        replica.slots = [OTHER] * 22
        for _ in range(20):
            await prober.live(replica.manifest, call(), 0, black)
        states = [prober.state(replica.manifest).state]
        await prober.canonical(replica.manifest)
        await prober.canonical(replica.manifest)
        return [*states, prober.state(replica.manifest).state]

    assert asyncio.run(story()) == ["alarm", "ok"]
    shares = prober.state(replica.manifest).statistics["sks"]
    assert {share for row in shares.values() for share in row.values()} == {0.0}


def test_only_a_share_of_calls_is_probed_and_few_wait_at_once(replica: ProbedReplica) -> None:
    async def story() -> list[bool]:
        prober, never, blocked = replica.prober(), replica.prober(live_share=0.0), asyncio.Event()
        before = prober.wants_live(replica.manifest, call())
        for one in (prober, never):
            await one.canonical(replica.manifest)
        said = [before, prober.wants_live(replica.manifest, call()), prober.wants_live(replica.manifest, call("a cup"))]
        said.append(never.wants_live(replica.manifest, call()))

        async def generate(calls: Sequence[ProbeCall]) -> list[Picture]:
            await blocked.wait()
            return replica.engine.pictures(calls, OWN)

        prober._generate = generate
        square = np.zeros((64, 64, 3), dtype=np.uint8)
        waiting = [asyncio.create_task(prober.live(replica.manifest, call(), 0, square)) for _ in range(MOST_LIVE)]
        await asyncio.sleep(0)
        said.append(prober.wants_live(replica.manifest, call()))
        blocked.set()
        await asyncio.gather(*waiting)
        return [*said, prober.wants_live(replica.manifest, call())]

    assert asyncio.run(story()) == [False, True, False, False, False, True]
