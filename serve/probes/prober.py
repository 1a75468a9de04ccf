"""The prober: small measurements of adapters while they serve, the drift they show, and what an alarm does.

Canonical probes generate an evaluated pair again, which must score as it did: a wrong, damaged or mixed-up adapter is
seen at once. Live probes score users' own images against two more of the same seed: a change of traffic, or a fault
between two canonical probes, is seen after a few. Their images take spare rows of the engine.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from cat_cluster.data.concepts import remove_token
from cat_cluster.errors import CatClusterError, EvaluationError
from cat_cluster.evaluation.drift import DETECTORS, SCORES, disagreement
from cat_cluster.evaluation.judges import Judge, load_judge
from cat_cluster.evaluation.metrics import paired_similarity
from cat_cluster.models.base_model import BaseModel
from cat_cluster.registry import Manifest, Registry
from cat_cluster.spec.choices import DriftState
from cat_cluster.telemetry import (
    BASE_MISMATCHES,
    DRIFT_STATE,
    DRIFT_STATISTIC,
    PROBE_REFERENCE,
    PROBE_SCORE,
    PROBE_SCORE_COUNT,
    PROBE_SCORE_SUM,
    PROBE_TIME,
    PROBES,
    QUARANTINED,
    Metrics,
)
from serve.calls import ImageCall
from serve.probes.records import Kind, ProbeLog, ProbeRecord, RunInThread
from serve.probes.revision_monitor import (
    DECOY_DRIFT,
    Array,
    CanonicalPair,
    DriftStatus,
    LoadJudge,
    ProbeCall,
    RevisionMonitor,
    live_token,
    open_monitor,
    score_images,
)
from serve.settings import ProbeSettings

Pixels = NDArray[np.uint8]
Generate = Callable[[Sequence[ProbeCall]], Awaitable[list[Pixels]]]
OnAlarm = Callable[[Manifest, str], Awaitable[None]]

MOST_LIVE = 4  # live probes that wait for spare rows; under load there are none to spare, and more would pile up
MOST_MONITORS = 512
MOST_JUDGES = 4
MOST_BASE_ROWS = 8192
_STATES = get_args(DriftState)
_log = logging.getLogger(__name__)


class Prober:
    """Probes the adapters of one replica. All methods run on one event loop; none blocks it."""

    def __init__(
        self,
        registry: Registry,
        base: BaseModel,
        generate: Generate,
        settings: ProbeSettings,
        metrics: Metrics,
        *,
        replica: str,
        on_alarm: OnAlarm,
        judges: LoadJudge = load_judge,
        run_in_thread: RunInThread = asyncio.to_thread,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        """generate: makes images uint8 [H, W, 3] of the base's size. replica: a name no other running replica has.

        on_alarm(manifest, reason): takes a revision out of service; called once per alarm, unless the policy is to
        annotate. judges: loads a judge by name. clock: Unix seconds.
        """
        self._base = base
        self._generate = generate
        self._settings = settings
        self._metrics = metrics
        self._on_alarm = on_alarm
        self._load_judge = judges
        self._run_in_thread = run_in_thread
        self._clock = clock
        self._rng = random.Random() if rng is None else rng
        self._log = ProbeLog(registry.store, replica, run_in_thread)
        self._monitors: OrderedDict[str, RevisionMonitor] = OrderedDict()  # those not used for longest come first
        self._judges: OrderedDict[str, Judge] = OrderedDict()
        self._shown: dict[str, DriftState] = {}  # revision -> its state, of those that the metrics show
        self._base_rows: dict[tuple[str, ImageCall], Array] = {}
        self._opening = asyncio.Lock()
        self._live = 0

    def state(self, manifest: Manifest) -> DriftStatus:
        """Return a revision's drift on this replica; "unknown" before its first probe."""
        monitor = self._monitors.get(manifest.name)
        return DriftStatus() if monitor is None else monitor.status()

    def states(self, resident: Sequence[Manifest]) -> dict[str, DriftStatus]:
        """Return revision -> its drift: of what is resident, and of what was probed while it was."""
        unknown = {manifest.name: DriftStatus() for manifest in resident}
        return {**unknown, **{name: monitor.status() for name, monitor in self._monitors.items()}}

    def reset(self, manifest: Manifest) -> None:
        """Forget what probes found of a revision, as when it is released from quarantine."""
        monitor = self._monitors.get(manifest.name)
        if monitor is not None:
            monitor.reset()
            self._show(manifest, monitor)

    def wants_live(self, manifest: Manifest, call: ImageCall) -> bool:
        """Whether a finished image of this call is to be probed: a random share of those that compare."""
        monitor = self._monitors.get(manifest.name)
        if monitor is None or self._live >= MOST_LIVE or live_token(manifest, call) not in monitor.drift_monitors:
            return False
        return self._settings.enabled and self._rng.random() < self._settings.live_share

    async def canonical(self, manifest: Manifest, *, raises: bool = False) -> ProbeRecord:
        """Generate the next canonical pair again and compare; an error is a record too, and raised only on demand."""
        return await self._recorded(manifest, "canonical", self._canonical(manifest), raises)

    async def live(self, manifest: Manifest, call: ImageCall, seed: int, pixels: Pixels) -> ProbeRecord | None:
        """Probe with a user's finished image (uint8 [H, W, 3], of `seed`); None where it does not compare."""
        token, side = live_token(manifest, call), self._base.resolution
        if token is None or pixels.shape != (side, side, 3):
            return None
        self._live += 1
        try:
            return await self._recorded(manifest, "live", self._live_probe(manifest, call, seed, pixels, token))
        finally:
            self._live -= 1

    async def run(self, resident: Callable[[], Sequence[Manifest]]) -> None:
        """Probe the resident adapters for ever: each soon after it appears, then every canonical_every_s seconds."""
        every, due = self._settings.canonical_every_s, dict[str, float]()
        while self._settings.enabled:
            here = {manifest.name: manifest for manifest in resident()}
            # One that was away is probed anew: it was loaded again, and that can go wrong.
            due = {name: due.get(name, 0.0) for name in here}
            for gone in self._shown.keys() - here.keys():
                self._show_state(gone, None)
            name = min(due, key=due.__getitem__, default=None)
            if name is None or due[name] > self._clock():
                await asyncio.sleep(min(1.0, every / 4))
                continue
            await self.canonical(here[name])
            due[name] = self._clock() + every

    async def _recorded(
        self, manifest: Manifest, kind: Kind, probe: Awaitable[ProbeRecord], raises: bool = False
    ) -> ProbeRecord:
        try:
            record = await probe
        except Exception as error:
            expected = isinstance(error, CatClusterError)
            reason = str(error) if expected else repr(error)
            _log.warning("%s probe of %s: %s", kind, manifest.name, reason, exc_info=not expected)
            record = ProbeRecord(
                time=self._clock(), replica=self._log.replica, kind=kind, verdict="error", reason=reason
            )
            await self._keep(manifest, record)
            if raises:
                raise
            return record
        await self._keep(manifest, record)
        return record

    async def _keep(self, manifest: Manifest, record: ProbeRecord) -> None:
        self._metrics.inc(PROBES, kind=record.kind, verdict=record.verdict)
        await self._log.append(manifest.adapter_id, manifest.revision, record)

    async def _canonical(self, manifest: Manifest) -> ProbeRecord:
        monitor = await self._monitor_of(manifest)
        pair = monitor.pair
        scores, fault, of_base = await self._compare(manifest, monitor, pair)
        verdict: DriftState = "ok"
        reason = None
        if fault is not None:
            # Generated again at once: what is wrong stays wrong, and a glitch must not take an adapter out of service.
            scores, again, of_base = await self._compare(manifest, monitor, pair)
            verdict, reason = ("alarm", again) if again else ("warning", f"{fault}; generated again it was right")
        if monitor.canonical == "alarm" and verdict == "ok":
            monitor.reset()  # repaired: what live probes saw of the fault is over, too
        monitor.canonical = verdict
        if verdict != "alarm":
            monitor.cursor += 1  # a wrong pair is probed again, until it is right
        if of_base:
            self._metrics.inc(BASE_MISMATCHES)
        record = ProbeRecord(
            time=self._clock(),
            replica=self._log.replica,
            kind="canonical",
            verdict=verdict,
            token=pair.token,
            pair=pair.index,
            scores=scores,
            expected=dict(pair.expected),
            reason=reason,
        )
        # Where the base's own image is wrong the adapter is not to blame.
        await self._conclude(manifest, monitor, record, blamed=not of_base)
        return record

    async def _compare(
        self, manifest: Manifest, monitor: RevisionMonitor, pair: CanonicalPair
    ) -> tuple[dict[str, float], str | None, bool]:
        """Return a canonical pair's scores now, what is wrong if anything, and whether that is the base's own image."""
        images = await self._generate(pair.calls(manifest))
        scores, rows = await self._run_in_thread(score_images, monitor.judge, monitor.photos[pair.token], images)
        tolerance, where = self._settings.tolerance, f"canonical pair {pair.index} of {pair.token!r}"
        known = [
            self._base_rows.setdefault((monitor.judge.digest, call), row)
            for call, row in zip(pair.base_calls, rows, strict=True)
        ]
        while len(self._base_rows) > MOST_BASE_ROWS:
            del self._base_rows[next(iter(self._base_rows))]
        if 1.0 - paired_similarity(np.stack(known), rows).min() > tolerance:
            return scores, f"{where}: the base's own image is not what it was before; is this replica damaged?", True
        if disagreement(scores, pair.expected) <= tolerance:
            return scores, None, False
        name = max(pair.expected, key=lambda score: abs(scores[score] - pair.expected[score]))
        found, was = scores[name], pair.expected[name]
        return scores, f"{where}: {name} is {found:.3f} and was {was:.3f} when the adapter was measured", False

    async def _live_probe(
        self, manifest: Manifest, call: ImageCall, seed: int, pixels: Pixels, token: str
    ) -> ProbeRecord:
        monitor = await self._monitor_of(manifest)
        drift = monitor.drift_monitors.get(token)
        if drift is None:
            raise EvaluationError(f"{manifest.name}: too few evaluated pairs of {token!r} to judge live probes by")
        prompt = remove_token(call.prompt, token)
        without_token = ImageCall(
            "probe",
            prompt,
            seed=seed,
            steps=call.steps,
            guidance=call.guidance,
            sampler=call.sampler,
            weighting=call.weighting,
            prompt_chunks=call.prompt_chunks,
        )
        others = await self._generate([(without_token, manifest), (without_token, None)])
        scores, _ = await self._run_in_thread(score_images, monitor.judge, monitor.photos[token], [pixels, *others])
        verdict = drift.update(scores)
        record = ProbeRecord(
            time=self._clock(),
            replica=self._log.replica,
            kind="live",
            verdict=verdict,
            token=token,
            scores=scores,
            reason=None if verdict == "ok" else _furthest(token, drift.shares),
            detectors=drift.to_json(),
        )
        await self._conclude(manifest, monitor, record, blamed=True)
        return record

    async def _conclude(
        self, manifest: Manifest, monitor: RevisionMonitor, record: ProbeRecord, *, blamed: bool
    ) -> None:
        """Show a probe in the metrics, and take the revision out of service when that is the policy."""
        adapter, kind = manifest.adapter_id, record.kind
        monitor.probes[kind] = monitor.probes.get(kind, 0) + 1
        monitor.last[kind], monitor.scores[kind] = record.time, record.scores or {}
        self._metrics.set(PROBE_TIME, record.time, adapter=adapter, kind=kind)
        for score, value in monitor.scores[kind].items():
            self._metrics.set(PROBE_SCORE, value, adapter=adapter, kind=kind, score=score)
            self._metrics.inc(PROBE_SCORE_SUM, value, adapter=adapter, kind=kind, score=score)
            self._metrics.inc(PROBE_SCORE_COUNT, adapter=adapter, kind=kind, score=score)
        if record.reason is not None:
            monitor.reason = record.reason
        self._show(manifest, monitor)
        if monitor.state != "alarm":
            monitor.alarm_handled = False
        elif record.verdict == "alarm" and blamed and not monitor.alarm_handled and self._settings.policy != "annotate":
            monitor.alarm_handled = True
            try:
                await self._on_alarm(manifest, record.reason or "drift")
                self._metrics.inc(QUARANTINED)
            except Exception:
                monitor.alarm_handled = False  # tried again with the next probe
                _log.exception("%s could not be taken out of service", manifest.name)

    def _show(self, manifest: Manifest, monitor: RevisionMonitor) -> None:
        adapter = manifest.adapter_id
        self._show_state(manifest.name, monitor.state)
        shares = [drift.shares for drift in monitor.drift_monitors.values()]
        for score in SCORES if shares else ():
            for detector in DETECTORS:
                furthest = max(share[score][detector] for share in shares)
                self._metrics.set(DRIFT_STATISTIC, furthest, adapter=adapter, score=score, detector=detector)
        for score in (*SCORES, DECOY_DRIFT) if shares else ():
            means = [own[score] for own in monitor.reference.values() if score in own]
            if means:
                self._metrics.set(PROBE_REFERENCE, float(np.mean(means)), adapter=adapter, score=score)

    def _show_state(self, name: str, state: DriftState | None) -> None:
        """Show the worst state of an adapter's revisions; None: this one is not probed, or not resident, any more."""
        self._shown.pop(name, None)
        if state is not None:
            self._shown[name] = state
        adapter = name.partition("@")[0]
        states = [_STATES.index(own) for other, own in self._shown.items() if other.partition("@")[0] == adapter]
        self._metrics.set(DRIFT_STATE, max(states, default=0), adapter=adapter)

    async def _monitor_of(self, manifest: Manifest) -> RevisionMonitor:
        """Return a revision's monitor, opened once; it continues from what a replica of this name recorded last."""
        async with self._opening:
            monitor = self._monitors.get(manifest.name)
            if monitor is None:
                monitor = await self._run_in_thread(open_monitor, manifest, self._base, self._judge)
                recorded = await self._log.resume(manifest.adapter_id, manifest.revision, self._clock())
                _restore(monitor, recorded)
                self._monitors[manifest.name] = monitor
                if len(self._monitors) > MOST_MONITORS:
                    self._monitors.popitem(last=False)
            self._monitors.move_to_end(manifest.name)
        return monitor

    def _judge(self, name: str, base: BaseModel) -> Judge:
        if name not in self._judges:
            self._judges[name] = self._load_judge(name, base)
            if len(self._judges) > MOST_JUDGES:
                self._judges.popitem(last=False)
        self._judges.move_to_end(name)
        return self._judges[name]


def _furthest(token: str, shares: dict[str, dict[str, float]]) -> str:
    share, score, detector = max((share, s, d) for s, row in shares.items() for d, share in row.items())
    return f"live probes of {token!r}: {score} has moved; {detector} is at {share:.0%} of its limit"


def _restore(monitor: RevisionMonitor, records: Sequence[ProbeRecord]) -> None:
    for record in records:
        drift = monitor.drift_monitors.get(record.token or "")
        if record.detectors is not None and drift is not None:
            try:
                drift.restore(record.detectors)
            except ValueError as error:
                _log.warning("a recorded drift state cannot be restored: %s", error)
                continue
            monitor.reason = record.reason
