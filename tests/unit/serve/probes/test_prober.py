"""Canonical probes on the real pocket base: what they generate and conclude, and what an alarm does."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from cat_cluster.errors import EvaluationError, StoreError
from cat_cluster.evaluation.drift import SCORES
from cat_cluster.evaluation.judges import feature_rows
from cat_cluster.registry import Manifest
from serve.calls import ImageCall
from serve.probes.prober import Prober
from serve.probes.records import ProbeRecord
from tests.support.probed_replica import (
    DECOY,
    DECOY_PAIRS,
    EVALUATION,
    OTHER,
    OWN,
    TEMPLATES,
    ProbedReplica,
    call,
    publish,
)

pytestmark = pytest.mark.slow

OTHER_REVISION = {"revision": "r-0123456789ab"}


def test_a_healthy_adapter_passes_every_canonical_pair(replica: ProbedReplica) -> None:
    prober = replica.prober()
    assert prober.state(replica.manifest).state == "unknown"

    async def probe() -> list[ProbeRecord]:
        return [await prober.canonical(replica.manifest) for _ in TEMPLATES]

    records = asyncio.run(probe())

    assert [record.verdict for record in records] == ["ok"] * len(TEMPLATES)
    assert [record.pair for record in records] == list(range(len(TEMPLATES)))
    assert replica.probes_generated == len(TEMPLATES)
    status = prober.state(replica.manifest)
    assert (status.state, status.probes, status.reason) == ("ok", {"canonical": 8}, None)
    assert replica.value("cat_probes_total", kind="canonical", verdict="ok") == 8.0
    assert replica.value("cat_drift_state", adapter="cup") == 0.0
    labels = {"adapter": "cup", "kind": "canonical", "score": "kps"}
    total = sum(record.scores["kps"] for record in records if record.scores)
    assert replica.value("cat_probe_score_sum_total", **labels) == pytest.approx(total)
    assert replica.value("cat_probe_score_count_total", **labels) == 8.0
    assert replica.value("cat_probe_reference_mean", adapter="cup", score="kps") == pytest.approx(total / 8)
    assert replica.value("cat_base_row_mismatches_total") == 0.0


@pytest.mark.parametrize("slot", [OTHER, 0], ids=["another adapter", "no adapter"])
@pytest.mark.parametrize("turn", range(0, len(TEMPLATES), 3))
def test_one_canonical_probe_sees_a_wrong_adapter(replica: ProbedReplica, slot: int, turn: int) -> None:
    prober = replica.prober(policy="quarantine")

    async def probe() -> ProbeRecord:
        for _ in range(turn):
            await prober.canonical(replica.manifest)
        replica.slots += [slot, slot]
        return await prober.canonical(replica.manifest)

    record = asyncio.run(probe())

    assert record.verdict == "alarm"
    assert record.reason is not None
    assert "when the adapter was measured" in record.reason
    assert replica.probes_generated == turn + 2
    assert len(replica.alarms) == 1
    assert prober.state(replica.manifest).state == "alarm"


def test_a_glitch_is_a_warning_and_an_alarm_is_acted_on_once_until_it_is_over(replica: ProbedReplica) -> None:
    prober = replica.prober(policy="fallback")

    async def probe(*slots: int) -> ProbeRecord:
        replica.slots += slots
        return await prober.canonical(replica.manifest)

    async def story() -> list[tuple[str, int | None, int]]:
        seen = []
        again = ([OTHER, OWN], [OTHER, OTHER])
        for slots in ([OTHER, OWN], [OTHER, OTHER], [OTHER, OTHER], [OWN], [OWN], [OTHER, OTHER], *again):
            record = await probe(*slots)
            seen.append((record.verdict, record.pair, len(replica.alarms)))
        return seen

    # The pair that was wrong is asked again until it is right; then the next one's turn comes.
    assert asyncio.run(story()) == [
        ("warning", 0, 0),
        ("alarm", 1, 1),
        ("alarm", 1, 1),
        ("ok", 1, 1),
        ("ok", 2, 1),
        ("alarm", 3, 2),
        ("warning", 3, 2),
        ("alarm", 4, 3),
    ]
    assert replica.value("cat_adapters_quarantined_total") == 3.0
    assert replica.value("cat_drift_state", adapter="cup") == 2.0

    prober.reset(replica.manifest)
    assert prober.state(replica.manifest).state == "unknown"
    assert replica.value("cat_drift_state", adapter="cup") == 0.0
    asyncio.run(probe(OTHER, OTHER))  # released, and as wrong as before
    assert len(replica.alarms) == 4


def test_an_adapters_gauge_is_the_worst_of_its_resident_revisions(replica: ProbedReplica) -> None:
    prober, wrong, right = replica.prober(), replica.manifest, replica.manifest.model_copy(update=OTHER_REVISION)

    async def story() -> list[float | None]:
        replica.slots += [OTHER, OTHER]
        await prober.canonical(wrong)
        await prober.canonical(right)
        seen = [replica.value("cat_drift_state", adapter="cup")]
        task = asyncio.create_task(prober.run(lambda: [right]))
        while prober.state(right).probes["canonical"] < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        return [*seen, replica.value("cat_drift_state", adapter="cup")]

    assert asyncio.run(story()) == [2.0, 0.0]
    states = {name: status.state for name, status in prober.states([]).items()}
    assert states == {wrong.name: "alarm", right.name: "ok"}, "what has left its slot is told of still"


def test_the_monitors_and_judges_that_are_used_stay(replica: ProbedReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.probes.prober.MOST_MONITORS", 2)
    monkeypatch.setattr("serve.probes.prober.MOST_JUDGES", 2)
    prober = replica.prober()
    revisions = [replica.manifest.model_copy(update={"revision": f"r-{number:012x}"}) for number in range(3)]

    async def probe(*order: int) -> list[str]:
        for number in order:
            await prober.canonical(revisions[number])
        return [prober.state(revision).state for revision in revisions]

    assert asyncio.run(probe(0, 1, 0, 2)) == ["ok", "unknown", "ok"]
    for name in ("a", "b", "a", "c"):
        prober._judge(name, replica.engine.base)
    assert list(prober._judges) == ["a", "c"]


def test_an_annotating_policy_acts_on_nothing_and_a_refused_quarantine_is_tried_again(replica: ProbedReplica) -> None:
    attempts = []

    async def refuses(manifest: Manifest, reason: str) -> None:
        attempts.append(reason)
        raise StoreError("the store is away")

    async def probes(prober: Prober) -> list[str]:
        replica.slots = [OTHER] * 4
        return [(await prober.canonical(replica.manifest)).verdict for _ in range(2)]

    assert asyncio.run(probes(replica.prober(policy="annotate", on_alarm=refuses))) == ["alarm", "alarm"]
    assert attempts == []
    assert asyncio.run(probes(replica.prober(policy="quarantine", on_alarm=refuses, replica="b"))) == ["alarm", "alarm"]
    assert len(attempts) == 2
    assert replica.value("cat_adapters_quarantined_total") == 0.0


def test_a_changed_base_image_is_counted_and_no_adapter_is_blamed(replica: ProbedReplica) -> None:
    prober = replica.prober(policy="quarantine")

    async def probes() -> list[ProbeRecord]:
        first = [await prober.canonical(replica.manifest) for _ in TEMPLATES]
        replica.spoil = lambda pictures: [*pictures[:2], np.full_like(pictures[2], 90), *pictures[3:]]
        return [*first, await prober.canonical(replica.manifest)]

    last = asyncio.run(probes())[-1]

    assert last.verdict == "alarm"
    assert last.reason is not None
    assert "the base's own image" in last.reason
    assert replica.value("cat_base_row_mismatches_total") == 1.0
    assert replica.alarms == []


def test_a_canonical_probe_asks_what_a_decoy_brings_where_that_was_measured(
    replica: ProbedReplica, reference: dict[str, Any]
) -> None:
    prober, asked = replica.prober(), []

    async def probes() -> list[ProbeRecord]:
        records = []
        for _ in TEMPLATES:
            replica.asked.clear()
            records.append(await prober.canonical(replica.manifest))
            asked.append([(image.prompt, manifest is None) for image, manifest in replica.asked])
        return records

    records = asyncio.run(probes())

    stored = reference["concepts"]["sks"]["decoy"]
    for i, (record, prompts) in enumerate(zip(records, asked, strict=True)):
        assert (record.scores or {}).keys() == (record.expected or {}).keys()
        decoys = [(TEMPLATES[i].format(f"{DECOY} cup"), False), (TEMPLATES[i].format(f"{DECOY} cup"), True)]
        if i not in DECOY_PAIRS:
            assert len(prompts) == 3
            assert "decoy_drift" not in (record.scores or {})
            continue
        assert prompts[3:] == decoys
        y = ImageCall("", decoys[0][0], seed=EVALUATION.seed + i, steps=EVALUATION.steps, guidance=4.0)
        shown = [feature_rows(replica.judge, replica.engine.picture(y, slot)[None])[0] for slot in (OWN, 0)]
        drift = (1 - float(shown[0] @ shown[1])) / 2
        assert drift > 0.01
        assert record.scores is not None
        assert record.scores["decoy_drift"] == pytest.approx(drift)
        assert stored["drift"][DECOY_PAIRS.index(i)] == pytest.approx(drift, abs=1e-6)
    assert prober.state(replica.manifest).reference["sks"]["decoy_drift"] == pytest.approx(np.mean(stored["drift"]))
    found = replica.value("cat_probe_reference_mean", adapter="cup", score="decoy_drift")
    assert found == pytest.approx(np.mean(stored["drift"]))


def test_an_adapter_that_answers_to_an_odd_word_as_it_did_not_is_seen(replica: ProbedReplica) -> None:
    prober = replica.prober(policy="quarantine")
    replica.spoil = lambda pictures: [*pictures[:3], np.full_like(pictures[3], 90), *pictures[4:]]
    record = asyncio.run(prober.canonical(replica.manifest))
    assert record.verdict == "alarm"
    assert "decoy_drift is" in (record.reason or "")
    assert len(replica.alarms) == 1


def test_the_bases_image_of_a_decoy_is_the_bases_own_too(replica: ProbedReplica) -> None:
    prober = replica.prober(policy="quarantine")

    async def probes() -> list[ProbeRecord]:
        first = [await prober.canonical(replica.manifest) for _ in TEMPLATES]
        replica.spoil = lambda pictures: [*pictures[:4], np.full_like(pictures[4], 90)]
        return [*first, await prober.canonical(replica.manifest)]

    last = asyncio.run(probes())[-1]
    assert last.verdict == "alarm"
    assert "the base's own image" in (last.reason or "")
    assert replica.alarms == []


def test_a_manifest_from_before_there_were_decoys_is_probed_as_then(
    replica: ProbedReplica, reference: dict[str, Any]
) -> None:
    concept = {name: value for name, value in reference["concepts"]["sks"].items() if name != "decoy"}
    manifest = publish(replica.store, replica.engine, {**reference, "concepts": {"sks": concept}}, "earlier")
    prober = replica.prober()
    record = asyncio.run(prober.canonical(manifest))
    assert record.verdict == "ok"
    assert set(record.scores or ()) == set(SCORES)
    assert set(prober.state(manifest).reference["sks"]) == set(SCORES)


def test_what_cannot_be_probed_says_why(replica: ProbedReplica, reference: dict[str, Any]) -> None:
    other_judge = {**reference, "judge": {"name": "pocket", "digest": "0" * 64}}
    shorter = {name: reference["concepts"]["sks"][name][:5] for name in SCORES}
    other_prompts = {**reference, "concepts": {"sks": {**reference["concepts"]["sks"], **shorter}}}
    few = {**reference["concepts"]["sks"], "decoy": {**reference["concepts"]["sks"]["decoy"], "pairs": [0]}}
    uneven = {**reference, "concepts": {"sks": few}}
    cases = {
        "unmeasured": (None, "published unmeasured"),
        "judged": (other_judge, "scores of two judges do not compare"),
        "prompted": (other_prompts, "not those of its reference scores"),
        "damaged": ({"kps": 0.2}, "no usable reference scores"),
        "uneven": (uneven, "no usable reference scores"),
    }
    prober = replica.prober()
    for adapter_id, (stored, reason) in cases.items():
        manifest = publish(replica.store, replica.engine, stored, adapter_id)
        with pytest.raises(EvaluationError, match=reason):
            asyncio.run(prober.canonical(manifest, raises=True))
        record = asyncio.run(prober.canonical(manifest))
        assert record.verdict == "error"
        assert record.reason is not None
        assert reason in record.reason
        assert prober.state(manifest).state == "unknown"
        assert not prober.wants_live(manifest, call())
    assert replica.probes_generated == 0
    assert replica.value("cat_probes_total", kind="canonical", verdict="error") == 2 * len(cases)


def test_the_loop_probes_a_new_adapter_first_and_survives_errors(replica: ProbedReplica) -> None:
    broken = publish(replica.store, replica.engine, None, "broken")
    prober, resident, probed = replica.prober(canonical_every_s=0.02), [broken], []

    def here() -> list[Manifest]:
        return resident

    async def story() -> None:
        task = asyncio.create_task(prober.run(here))
        for step in range(200):
            await asyncio.sleep(0.005)
            replica.now += 0.005
            if step == 20:
                resident.append(replica.manifest)
            probed.append(prober.state(replica.manifest).probes.get("canonical", 0))
            if probed[-1] >= 3:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())

    assert probed[-1] >= 3
    errors = replica.value("cat_probes_total", kind="canonical", verdict="error")
    assert errors is not None
    assert errors >= 2.0
    assert prober.state(replica.manifest).state == "ok"
