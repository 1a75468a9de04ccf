"""What happens between the engine's steps: requests that join, adapters that are swapped in, probes that ride along."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from cat_cluster.errors import SpecError
from cat_cluster.evaluation.drift import SCORES
from cat_cluster.evaluation.evaluate import image_templates
from cat_cluster.evaluation.judges import feature_rows, is_pocket, load_judge
from cat_cluster.evaluation.prompts import fill
from cat_cluster.lora.bank import LoraBank, adapted_layers, served_layers
from cat_cluster.lora.row_bank import AdapterLayout
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.models.pocket import world
from cat_cluster.spec.sections import EvaluationSpec
from cat_cluster.telemetry import ADAPTER_SWAPS, PROBE_ROW_STEPS, ROW_STEPS, UNET_SECONDS, WAIT_SECONDS
from jobs.benchmark.serving.backends import Backend
from jobs.benchmark.serving.random_models import NOUN, TARGETS, TOKEN, publish, random_adapter
from jobs.benchmark.serving.workbench import Event, LocalService, Numbering, Request, Workbench, take_turns_for
from serve.probes.revision_monitor import score_images
from serve.settings import ProbeSettings, ServeSettings

BUSY_STEPS = 100  # of the images that others join
PROBED = 2  # adapters with a reference


def measure_join(bench: Workbench) -> dict[str, Any]:
    """Return how long requests wait for rows that are free while others denoise, and what swaps and binds take."""
    scale, most = bench.scale, bench.scale.rows // 2
    slots = max(2, most)
    with bench.service(WAIT_SECONDS, UNET_SECONDS, ADAPTER_SWAPS, slots=slots) as served:
        served.get("draw", bench.requests(slots, adapters=slots), scale.concurrency)
        for name in bench.ids:
            served.get("admin", "prefetch", name)
        served.get("events")
        facts = []
        began, turn = time.monotonic(), 0
        while turn < 3 or time.monotonic() - began < bench.seconds:
            facts += _join_busy_rows(bench, served, Numbering(1000 * (turn + 1)), turn)
            turn += 1
        events = served.get("events")
    waits = waits_in_steps(events)
    swaps = [value for _, name, value in events if name == ADAPTER_SWAPS.name]
    layout = _layout(bench, bench.settings().max_rank)
    return {
        "joined": len(waits),
        "step_ms": 1e3 * float(np.median([value for _, name, value in events if name == UNET_SECONDS.name])),
        "wait_steps": {
            "median": float(np.median([share for share, _ in waits])),
            "p95": float(np.quantile([share for share, _ in waits], 0.95)),
            "most": max(share for share, _ in waits),
            "most_calls_ended": max(calls for _, calls in waits),
        },
        "swap": {
            "count": len(swaps),
            "bytes": layout.size * bench.dtype.itemsize,
            "median_ms": 1e3 * float(np.median(swaps)),
            "p95_ms": 1e3 * float(np.quantile(swaps, 0.95)),
        },
        "swap_idle": _swap_idle(bench),
        "bind_ms": 1e3 * float(np.median([fact["bind_s"] for fact in facts])),
    }


def _join_busy_rows(bench: Workbench, served: Backend, numbers: Numbering, turn: int) -> list[Any]:
    """Let images of all adapters come at random to an engine that has most of its rows busy; their facts."""
    rng, most = np.random.default_rng(turn), bench.scale.rows // 2
    busy = bench.requests(most - 2, adapters=bench.scale.adapters, first=numbers.take(most), steps=[BUSY_STEPS] * most)
    # Two images at a time, and short ones: rows are always free when they come.
    late = bench.requests(12, adapters=bench.scale.adapters, first=numbers.take(12), steps=[3] * 12)
    pauses = rng.uniform(0.0, 0.3, len(late)).tolist()
    return [response.facts for response in served.get("join", busy, late, pauses)]


def waits_in_steps(events: Sequence[Event]) -> list[tuple[float, int]]:
    """Return of each image that joined running ones: its wait over the call it waited for, and calls that ended.

    events: (time, metric, value) in the order the engine's thread made them; one that came while a call ran waits for
    its end, so a wait of at most one call is as short as can be.
    """
    found, calls = [], list[tuple[float, float]]()
    for at, name, value in events:
        if name == UNET_SECONDS.name:
            calls.append((at, value))
        elif name == WAIT_SECONDS.name and calls and at - calls[-1][0] < calls[-1][1]:
            ended = sum(end > at - value for end, _ in calls[-8:])
            found.append((value / calls[-1][1], ended))
    return found


def _swap_idle(bench: Workbench) -> dict[str, float]:
    """Milliseconds of a swap while the engine is idle: every adapter loaded in turn into too few slots."""
    with bench.service(ADAPTER_SWAPS, slots=2) as served:
        for name in bench.ids * 2:
            served.get("admin", "load", name)
        # The first time round they come from the store: the copy is the same.
        swaps = [value for _, _, value in served.get("events")]
    return {"median_ms": 1e3 * float(np.median(swaps)), "p95_ms": 1e3 * float(np.quantile(swaps, 0.95))}


def _layout(bench: Workbench, rank: int) -> AdapterLayout:
    unet = bench.load().unet
    return AdapterLayout(unet, served_layers(unet, "all"), rank)


def measure_probes(bench: Workbench) -> dict[str, Any]:
    """Return what probes cost at saturation: throughput with and without them in turns, row-steps, and time."""
    base = bench.load()
    if not is_pocket(base):
        raise SpecError("the part probes needs a judge of the base's images: measure it with the size pocket")
    names = _publish_probed(bench, base)
    numbers, spent = Numbering(), list[Event]()
    # Canonical probes follow each other at once: there is always one waiting, as among very many adapters.
    eager = ProbeSettings(canonical_every_s=0.5, live_share=1.0)
    with ExitStack() as cleanup:
        plain = cleanup.enter_context(bench.backend(ServicePerTurn, bench.settings()))
        probing = cleanup.enter_context(bench.backend(ServicePerTurn, bench.settings(probes=eager)))
        times = take_turns_for(
            {
                "without": partial(_turn, bench, plain, names, numbers, []),
                "with": partial(_turn, bench, probing, names, numbers, spent),
            },
            bench.seconds,
        )
    users, probes, own = spent_on_probes(spent)
    return {
        "share": eager.share,
        "turns": len(times["with"].turns),
        "images_per_turn": 4 * bench.scale.images,
        "images_per_s": {name: 1.0 / timed.median for name, timed in times.items()},
        "throughput": times["without"].ratio(times["with"]),
        "row_steps": {"users": users, "probes": probes, "share": probes / users},
        "time_share_of_own_calls": own,
    }


def spent_on_probes(events: Sequence[Event]) -> tuple[float, float, float]:
    """Return row-steps of users and of probes, and the share of U-Net time in calls of probes alone.

    events: in the engine's order, which tells the seconds of a call, then its users' row-steps, then its probes'.
    """
    totals = {ROW_STEPS.name: 0.0, PROBE_ROW_STEPS.name: 0.0}
    seconds, alone, last = 0.0, 0.0, 0.0
    for _, name, value in events:
        if name == UNET_SECONDS.name:
            last = value
            seconds += value
            continue
        totals[name] += value
        if name == ROW_STEPS.name and value == 0:
            alone += last
    return totals[ROW_STEPS.name], totals[PROBE_ROW_STEPS.name], alone / seconds if seconds else 0.0


class ServicePerTurn:
    """A service that is there in its turns only: one that probes would do so through the turns of the other, too."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings

    def __enter__(self) -> ServicePerTurn:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def turn(
        self, before: Sequence[Request], requests: Sequence[Request], concurrency: int
    ) -> tuple[float, list[Event]]:
        """Return the seconds that `requests` take, and what happened; images `before` bring adapters and probes in."""
        with LocalService(self._settings, UNET_SECONDS, ROW_STEPS, PROBE_ROW_STEPS) as served:
            served.draw(before, concurrency)
            served.events()
            started = time.perf_counter()
            served.draw(requests, concurrency)
            return time.perf_counter() - started, served.events()


def _turn(bench: Workbench, backend: Backend, names: Sequence[str], numbers: Numbering, spent: list[Event]) -> float:
    """Seconds per image; `spent` gets the events."""
    concurrency, count = bench.scale.concurrency, 4 * bench.scale.images
    given = bench.requests(concurrency + count, adapters=1, first=numbers.take(concurrency + count))
    requests = [
        Request(names[n % len(names)], request.prompt, request.seed, request.steps) for n, request in enumerate(given)
    ]
    seconds, events = backend.get("turn", requests[:concurrency], requests[concurrency:], concurrency)
    spent += events
    return float(seconds) / count


def _publish_probed(bench: Workbench, base: BaseModel) -> list[str]:
    """Publish adapters with the reference that an evaluation would have given them; their ids."""
    evaluation = EvaluationSpec(images_per_prompt=2, steps=bench.scale.steps)
    names = []
    for n in range(PROBED):
        weights = random_adapter(base.unet, 1000 + n)
        reference = _reference(base, weights, evaluation)
        names.append(publish(bench.storage, base, f"probed-{n}", weights, evaluation, reference).adapter_id)
    return names


def _reference(base: BaseModel, weights: Any, evaluation: EvaluationSpec) -> dict[str, Any]:
    judge = load_judge("pocket", base)
    design = world.CONCEPTS["striped-cup"]
    photos = feature_rows(judge, np.stack([photo for photo, _ in world.photos(design, 3, seed=0)]))
    rows = []
    for i, template in enumerate(image_templates(evaluation, base)):
        for prompt, slot in ((fill(template, NOUN, TOKEN), 1), (fill(template, NOUN, None), 1)):
            rows.append(ImageRow(prompt, evaluation.seed + i, slot, evaluation.steps, evaluation.guidance))
        rows.append(ImageRow(fill(template, NOUN, None), evaluation.seed + i, 0, evaluation.steps, evaluation.guidance))
    bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, TARGETS))
    try:
        bank.load(1, weights)
        made = image_array(generate(base, bank, rows))
    finally:
        bank.detach()
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    for at in range(0, len(made), 3):
        for name, value in score_images(judge, photos, list(made[at : at + 3]))[0].items():
            scores[name].append(value)
    return {
        "judge": {"name": judge.name, "digest": judge.digest},
        "concepts": {TOKEN: {"photos": photos.tolist(), **scores}},
    }
