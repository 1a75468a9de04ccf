"""The prober on the real pocket base: what it draws, what it believes, what it records and whom it blames."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_cluster.errors import StoreError
from cat_cluster.evaluation.drift import SCORES, DriftMonitor
from cat_cluster.evaluation.judges import Judge, load_judge
from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import Manifest
from serve.probes.prober import MOST_LIVE, Prober
from serve.probes.records import ProbeRecord
from serve.probes.revision_monitor import ProbeImage, live_token, score_images
from tests.support.probe_bench import (
    OTHER,
    OWN,
    TEMPLATES,
    Bench,
    FailingStore,
    Picture,
    ProbedEngine,
    call,
    measured_reference,
    publish,
    user_image,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[ProbedEngine]:
    found = ProbedEngine(load_base_model("pocket"))
    yield found
    found.bank.detach()


@pytest.fixture(scope="module")
def judge(engine: ProbedEngine) -> Judge:
    return load_judge("pocket", engine.base)


@pytest.fixture(scope="module")
def reference(engine: ProbedEngine, judge: Judge) -> dict[str, Any]:
    return measured_reference(engine, judge)


@pytest.fixture
def bench(engine: ProbedEngine, judge: Judge, reference: dict[str, Any], tmp_path: Path) -> Bench:
    store = FailingStore(tmp_path / "storage")
    return Bench(engine, judge, store, publish(store, engine, reference))


def test_a_healthy_adapter_passes_every_canonical_pair(bench: Bench) -> None:
    prober = bench.prober()
    assert prober.state(bench.manifest).state == "unknown"

    async def probe() -> list[ProbeRecord]:
        return [await prober.canonical(bench.manifest) for _ in TEMPLATES]

    records = asyncio.run(probe())

    assert [record.verdict for record in records] == ["ok"] * len(TEMPLATES)
    assert [record.pair for record in records] == list(range(len(TEMPLATES)))
    assert bench.draws == len(TEMPLATES)
    status = prober.state(bench.manifest)
    assert (status.state, status.probes, status.reason) == ("ok", {"canonical": 8}, None)
    assert bench.value("cat_probes_total", kind="canonical", verdict="ok") == 8.0
    assert bench.value("cat_drift_state", adapter="cup") == 0.0
    labels = {"adapter": "cup", "kind": "canonical", "score": "kps"}
    total = sum(record.scores["kps"] for record in records if record.scores)
    assert bench.value("cat_probe_score_sum_total", **labels) == pytest.approx(total)
    assert bench.value("cat_probe_score_count_total", **labels) == 8.0
    assert bench.value("cat_probe_reference_mean", adapter="cup", score="kps") == pytest.approx(total / 8)
    assert bench.value("cat_base_row_mismatches_total") == 0.0


@pytest.mark.parametrize("slot", [OTHER, 0], ids=["another adapter", "no adapter"])
@pytest.mark.parametrize("turn", range(0, len(TEMPLATES), 3))
def test_one_canonical_probe_sees_a_wrong_adapter(bench: Bench, slot: int, turn: int) -> None:
    prober = bench.prober(policy="quarantine")

    async def probe() -> ProbeRecord:
        for _ in range(turn):
            await prober.canonical(bench.manifest)
        bench.slots += [slot, slot]
        return await prober.canonical(bench.manifest)

    record = asyncio.run(probe())

    assert record.verdict == "alarm"
    assert record.reason is not None
    assert "when the adapter was measured" in record.reason
    assert bench.draws == turn + 2
    assert len(bench.alarms) == 1
    assert prober.state(bench.manifest).state == "alarm"


def test_a_glitch_is_a_warning_and_an_alarm_is_told_once_until_it_is_over(bench: Bench) -> None:
    prober = bench.prober(policy="fallback")

    async def probe(*slots: int) -> ProbeRecord:
        bench.slots += slots
        return await prober.canonical(bench.manifest)

    async def story() -> list[tuple[str, int | None, int]]:
        told = []
        for slots in ([OTHER, OWN], [OTHER, OTHER], [OTHER, OTHER], [OWN], [OWN], [OTHER, OTHER]):
            record = await probe(*slots)
            told.append((record.verdict, record.pair, len(bench.alarms)))
        return told

    # The pair that was wrong is asked again until it is right; then the next one's turn comes.
    assert asyncio.run(story()) == [
        ("warning", 0, 0),
        ("alarm", 1, 1),
        ("alarm", 1, 1),
        ("ok", 1, 1),
        ("ok", 2, 1),
        ("alarm", 3, 2),
    ]
    assert bench.value("cat_adapters_quarantined_total") == 2.0
    assert bench.value("cat_drift_state", adapter="cup") == 2.0

    prober.reset(bench.manifest)
    assert prober.state(bench.manifest).state == "unknown"


def test_an_annotating_policy_tells_nobody_and_a_refused_quarantine_is_tried_again(bench: Bench) -> None:
    attempts = []

    async def refuses(manifest: Manifest, reason: str) -> None:
        attempts.append(reason)
        raise StoreError("the store is away")

    async def probes(prober: Prober) -> list[str]:
        bench.slots = [OTHER] * 4
        return [(await prober.canonical(bench.manifest)).verdict for _ in range(2)]

    assert asyncio.run(probes(bench.prober(policy="annotate", on_alarm=refuses))) == ["alarm", "alarm"]
    assert attempts == []
    assert asyncio.run(probes(bench.prober(policy="quarantine", on_alarm=refuses, replica="b"))) == ["alarm", "alarm"]
    assert len(attempts) == 2
    assert bench.value("cat_adapters_quarantined_total") == 0.0


def test_a_changed_base_image_is_counted_and_no_adapter_is_blamed(bench: Bench) -> None:
    prober = bench.prober(policy="quarantine")

    async def probes() -> list[ProbeRecord]:
        first = [await prober.canonical(bench.manifest) for _ in TEMPLATES]
        bench.spoil = lambda pictures: [*pictures[:2], np.full_like(pictures[2], 90)]
        return [*first, await prober.canonical(bench.manifest)]

    last = asyncio.run(probes())[-1]

    assert last.verdict == "alarm"
    assert last.reason is not None
    assert "the base's own image" in last.reason
    assert bench.value("cat_base_row_mismatches_total") == 1.0
    assert bench.alarms == []


def test_what_cannot_be_probed_says_why(bench: Bench, reference: dict[str, Any]) -> None:
    other_judge = {**reference, "judge": {"name": "pocket", "digest": "0" * 64}}
    shorter = {name: reference["concepts"]["sks"][name][:5] for name in SCORES}
    other_prompts = {**reference, "concepts": {"sks": {**reference["concepts"]["sks"], **shorter}}}
    cases = {
        "unmeasured": (None, "published unmeasured"),
        "judged": (other_judge, "scores of two judges do not compare"),
        "prompted": (other_prompts, "not those of its reference scores"),
        "damaged": ({"kps": 0.2}, "no usable reference scores"),
    }
    prober = bench.prober()
    for adapter_id, (stored, reason) in cases.items():
        manifest = publish(bench.store, bench.engine, stored, adapter_id)
        record = asyncio.run(prober.canonical(manifest))
        assert record.verdict == "error"
        assert record.reason is not None
        assert reason in record.reason
        assert prober.state(manifest).state == "unknown"
        assert not prober.wants_live(manifest, call())
    assert bench.draws == 0
    assert bench.value("cat_probes_total", kind="canonical", verdict="error") == len(cases)


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
        ("a photo of a sks cup", {"strength": 0.8}, None),
        ("a photo of a sks cup", {"negative_prompt": "blurry"}, None),
        ("a photo of a sks cup", {"guidance": 1.0}, None),
        ("a photo of a sks cup", {"guidance": 6.0, "sampler": "euler"}, "sks"),
    ],
)
def test_which_calls_compare_with_the_reference(
    bench: Bench, prompt: str, changes: dict[str, Any], token: str | None
) -> None:
    assert live_token(bench.manifest, call(prompt, **changes)) == token


def test_a_live_probe_draws_the_prompt_without_the_token_and_the_base(bench: Bench, reference: dict[str, Any]) -> None:
    prober, image_call = bench.prober(), call("a photo of a sks cup at night", seed=7, steps=4, guidance=5.0)
    picture = user_image(bench, image_call)

    record = asyncio.run(prober.live(bench.manifest, image_call, 9, picture))

    y = ProbeImage("a photo of a cup at night", bench.manifest, 9, 4, 5.0, "ddim")
    assert bench.asked == [y, replace(y, adapter=None)]
    concept = reference["concepts"]["sks"]
    scores, _ = score_images(
        bench.judge, np.asarray(concept["photos"]), [picture, *bench.engine.pictures(bench.asked, OWN)]
    )
    assert record is not None
    assert (record.kind, record.verdict, record.token, record.scores) == ("live", "ok", "sks", scores)
    assert "night" not in record.model_dump_json()
    monitor = DriftMonitor(concept)
    monitor.update(scores)
    assert record.detectors == monitor.to_json()
    assert prober.state(bench.manifest).statistics == {"sks": monitor.shares}


def test_a_live_probe_of_what_does_not_compare_is_none(bench: Bench) -> None:
    prober = bench.prober()
    wide = np.zeros((64, 96, 3), dtype=np.uint8)
    square = np.zeros((64, 64, 3), dtype=np.uint8)
    assert asyncio.run(prober.live(bench.manifest, call(), 0, wide)) is None
    assert asyncio.run(prober.live(bench.manifest, call("a cup"), 0, square)) is None
    assert bench.draws == 0


def test_live_probes_of_a_wrong_adapter_raise_the_alarm_and_a_restart_remembers_it(bench: Bench) -> None:
    prober = bench.prober(policy="quarantine")

    async def probe(with_prober: Prober, most: int) -> int:
        for count in range(1, most + 1):
            bench.spoil = lambda pictures: [np.full_like(picture, 250) for picture in pictures]
            bench.now += 60.0
            await with_prober.live(bench.manifest, call(), 0, np.zeros((64, 64, 3), dtype=np.uint8))
            if bench.alarms:
                return count
        return most + 1

    count = asyncio.run(probe(prober, 40))

    assert 2 <= count <= 30
    status = prober.state(bench.manifest)
    assert status.state == "alarm"
    assert status.reason is not None
    assert "has moved" in status.reason
    records = bench.history()
    assert [record.verdict for record in records][-1] == "alarm"

    again, other = bench.prober(), bench.prober(replica="b")
    for fresh in (again, other):
        bench.spoil = list
        asyncio.run(fresh.canonical(bench.manifest))
    assert again.state(bench.manifest).statistics == status.statistics
    assert (again.state(bench.manifest).state, again.state(bench.manifest).reason) == ("alarm", status.reason)
    assert other.state(bench.manifest).state == "ok"
    assert len(bench.history()) == len(records) + 2  # nothing that was recorded is lost


def test_a_mended_fault_is_forgotten_by_live_probes_too(bench: Bench) -> None:
    prober, black = bench.prober(), np.zeros((64, 64, 3), dtype=np.uint8)

    async def story() -> list[str]:
        bench.slots = [OTHER] * 22
        for _ in range(20):
            await prober.live(bench.manifest, call(), 0, black)
        states = [prober.state(bench.manifest).state]
        await prober.canonical(bench.manifest)
        await prober.canonical(bench.manifest)
        return [*states, prober.state(bench.manifest).state]

    assert asyncio.run(story()) == ["alarm", "ok"]
    shares = prober.state(bench.manifest).statistics["sks"]
    assert {share for row in shares.values() for share in row.values()} == {0.0}


def test_only_a_share_of_calls_is_probed_and_few_wait_at_once(bench: Bench) -> None:
    async def story() -> list[bool]:
        prober, never, blocked = bench.prober(), bench.prober(live_share=0.0), asyncio.Event()
        before = prober.wants_live(bench.manifest, call())
        for one in (prober, never):
            await one.canonical(bench.manifest)
        said = [before, prober.wants_live(bench.manifest, call()), prober.wants_live(bench.manifest, call("a cup"))]
        said.append(never.wants_live(bench.manifest, call()))

        async def draw(images: Sequence[ProbeImage]) -> list[Picture]:
            await blocked.wait()
            return bench.engine.pictures(images, OWN)

        prober._draw = draw
        square = np.zeros((64, 64, 3), dtype=np.uint8)
        waiting = [asyncio.create_task(prober.live(bench.manifest, call(), 0, square)) for _ in range(MOST_LIVE)]
        await asyncio.sleep(0)
        said.append(prober.wants_live(bench.manifest, call()))
        blocked.set()
        await asyncio.gather(*waiting)
        return [*said, prober.wants_live(bench.manifest, call())]

    assert asyncio.run(story()) == [False, True, False, False, False, True]


def test_a_store_that_is_away_fails_no_probe_and_loses_no_record(bench: Bench) -> None:
    prober = bench.prober()

    async def probes() -> list[str]:
        verdicts = []
        for away in (False, True, True, False):
            bench.store.away = away
            bench.now += 1800.0  # the outage goes over an hour's end
            verdicts.append((await prober.canonical(bench.manifest)).verdict)
        return verdicts

    assert asyncio.run(probes()) == ["ok"] * 4
    assert [record.pair for record in bench.history(hours=3)] == [0, 1, 2, 3]
    bench.store.away = True
    with pytest.raises(StoreError):
        bench.history()


def test_the_history_is_that_of_all_replicas_within_its_hours(bench: Bench) -> None:
    replicas = [bench.prober(replica="a"), bench.prober(replica="ray#b/..")]

    async def probes() -> None:
        for _ in range(6):
            for prober in replicas:
                await prober.canonical(bench.manifest)
                bench.now += 900.0

    asyncio.run(probes())
    bench.now -= 900.0
    keys = sorted(bench.store.list(f"probes/cup/{bench.manifest.revision}/"))
    assert keys[:2] == [f"probes/cup/{bench.manifest.revision}/20270115T12/{name}.json" for name in ("a", "ray-b---")]
    assert len(keys) == 6

    bench.store.listed.clear()
    assert [record.replica for record in bench.history(hours=3)] == ["a", "ray-b---"] * 6
    assert all(prefix.startswith(f"probes/cup/{bench.manifest.revision}/") for prefix in bench.store.listed)
    last = bench.history(hours=0.5)
    assert [record.time for record in last] == [bench.now - 1800.0, bench.now - 900.0, bench.now]
    bench.store.put(keys[0], b"not JSON")
    assert len(bench.history(hours=3)) == 10
    assert bench.history(hours=3) == sorted(bench.history(hours=3), key=lambda record: record.time)


def test_a_history_goes_over_midnight(bench: Bench) -> None:
    bench.now += 12 * 3600.0 - 1.0
    prober = bench.prober()
    asyncio.run(prober.canonical(bench.manifest))
    bench.now += 2.0
    asyncio.run(prober.canonical(bench.manifest))
    assert [record.pair for record in bench.history(hours=1)] == [0, 1]


def test_the_loop_probes_a_new_adapter_first_and_survives_errors(bench: Bench) -> None:
    broken = publish(bench.store, bench.engine, None, "broken")
    prober, resident, probed = bench.prober(canonical_every_s=0.02), [broken], []

    def here() -> list[Manifest]:
        return resident

    async def story() -> None:
        task = asyncio.create_task(prober.run(here))
        for step in range(200):
            await asyncio.sleep(0.005)
            bench.now += 0.005
            if step == 20:
                resident.append(bench.manifest)
            probed.append(prober.state(bench.manifest).probes.get("canonical", 0))
            if probed[-1] >= 3:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())

    assert probed[-1] >= 3
    errors = bench.value("cat_probes_total", kind="canonical", verdict="error")
    assert errors is not None
    assert errors >= 2.0
    assert prober.state(bench.manifest).state == "ok"
