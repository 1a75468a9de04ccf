"""Images per second: many adapters against one, and the engine against pipelines and PEFT batches, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from cat_cluster.telemetry import ADAPTER_SWAPS
from jobs.benchmark.serving.backends import Backend
from jobs.benchmark.serving.baselines import PIPELINES, PeftLoop, Pipeline, difference
from jobs.benchmark.serving.workbench import Numbering, Pixels, Request, Response, Workbench, take_turns_for
from jobs.benchmark.timing import Timed

Arrive = Callable[[Sequence[Request], Sequence[float]], list[float]]
ENGINE = "engine"
ADAPTERS = 16  # of the comparisons
RATES = (0.5, 0.8, 1.5)  # arrivals, as shares of what the engine can do
SATURATED = max(RATES)
STATIC = "PEFT, static batches"
SHRINKING = "PEFT, static batches, done rows leave"


def measure_adapters(bench: Workbench) -> dict[str, Any]:
    """Return images per second of each number of adapters in turn, and its ratio to one adapter's."""
    scale, numbers = bench.scale, Numbering()
    with ExitStack() as cleanup:
        services = {slots: cleanup.enter_context(bench.service(ADAPTER_SWAPS, slots=slots)) for slots in scale.slots}
        variants = {}
        for slots, served in services.items():
            for adapters in scale.mixes:
                requests_of_turn = partial(_next_requests, bench, numbers, scale.images, adapters)
                variants[_mix(adapters, slots)] = partial(
                    _seconds_per_image, served, requests_of_turn, scale.concurrency
                )
        times = take_turns_for(variants, bench.seconds)
        one = {slots: times[_mix(min(scale.mixes), slots)] for slots in scale.slots}
        return {
            "images_per_turn": scale.images,
            "concurrency": scale.concurrency,
            "rates": [
                {
                    "adapters": adapters,
                    "slots": slots,
                    "images_per_s": 1.0 / times[_mix(adapters, slots)].median,
                    "to_one": one[slots].ratio(times[_mix(adapters, slots)]),
                }
                for slots in scale.slots
                for adapters in scale.mixes
            ],
            "swaps": {str(slots): len(served.get("events")) for slots, served in services.items()},
        }


def measure_serial(bench: Workbench) -> dict[str, Any]:
    """Return images per second of the engine and of each pipeline that draws one image at a time."""
    return compare_one_by_one(bench, PIPELINES, bench.ids[:ADAPTERS], bench.scale.serial_images)


def compare_one_by_one(
    bench: Workbench, kinds: Mapping[str, type[Pipeline]], models: Sequence[str], few: int, **changes: Any
) -> dict[str, Any]:
    """Return images per second of the engine, and of pipelines that draw `few` a turn, one at a time.

    models: adapters or stacks, which requests name in turn; changes: of the service's settings.
    """
    numbers = Numbering()

    def requests_of(count: int) -> list[Request]:
        new = bench.requests(count, adapters=1, first=numbers.take(count))
        return [replace(request, adapter=models[request.seed % len(models)]) for request in new]

    requests = requests_of(bench.scale.concurrency)
    with ExitStack() as cleanup:
        served = cleanup.enter_context(bench.service(**changes))
        pipelines = {name: cleanup.enter_context(bench.backend(kind, replace(bench))) for name, kind in kinds.items()}
        ours = pixels(served.get("draw", requests, len(requests)))[:few]
        differences = {
            name: difference(ours, backend.get("draw", requests[:few])) for name, backend in pipelines.items()
        }
        for backend in pipelines.values():
            backend.get("changes")
        variants: dict[str, Callable[[], float]] = {
            ENGINE: partial(_seconds_per_image, served, partial(requests_of, len(requests)), len(requests))
        }
        for name, backend in pipelines.items():
            variants[name] = partial(_seconds_per_image, backend, partial(requests_of, few))
        times = take_turns_for(variants, bench.seconds)
        return {
            "images_per_turn": len(requests),
            "serial_images_per_turn": few,
            "rows": bench.scale.rows,
            "backends": _rates(times),
            "differences": differences,
            "change_ms": {name: 1e3 * float(np.median(backend.get("changes"))) for name, backend in pipelines.items()},
        }


def measure_peft(bench: Workbench) -> dict[str, Any]:
    """Return images per second of the engine and of PEFT's mixed batches, all images started together."""
    count = bench.scale.concurrency
    requests, numbers, half = bench.requests(count, adapters=ADAPTERS), Numbering(count), bench.scale.rows // 2
    with ExitStack() as cleanup:
        served = cleanup.enter_context(bench.service())
        wide = cleanup.enter_context(bench.service(max_rows=2 * count))
        loop = cleanup.enter_context(bench.backend(PeftLoop, replace(bench), ADAPTERS))
        ours = pixels(served.get("draw", requests, count))
        requests_of_turn = partial(_next_requests, bench, numbers, count, ADAPTERS)
        times = take_turns_for(
            {
                ENGINE: partial(_seconds_per_image, served, requests_of_turn, count),
                f"engine, {2 * count} rows": partial(_seconds_per_image, wide, requests_of_turn, count),
                f"PEFT, {count} images together": partial(_seconds_per_image, loop, requests_of_turn),
                f"PEFT, {half} images at a time": partial(
                    _seconds_per_image, loop, requests_of_turn, half, method="in_parts"
                ),
            },
            bench.seconds,
        )
        return {
            "images_per_turn": count,
            "rows": bench.scale.rows,
            "backends": _rates(times),
            "differences": {"PEFT": difference(ours, loop.get("draw", requests))},
        }


def measure_poisson(bench: Workbench) -> dict[str, Any]:
    """Return what engine and static PEFT batches make of the same random arrivals of images of mixed step counts."""
    scale, numbers = bench.scale, Numbering()
    most = scale.rows // 2
    with ExitStack() as cleanup:
        served = cleanup.enter_context(bench.service())
        loop = cleanup.enter_context(bench.backend(PeftLoop, replace(bench), ADAPTERS))
        backends: dict[str, Arrive] = {
            ENGINE: partial(served.get, "arrive"),
            STATIC: lambda requests, times: loop.get("arrive", requests, times, most, False),
            SHRINKING: lambda requests, times: loop.get("arrive", requests, times, most, True),
        }
        capacity = _capacity(bench, served, numbers)
        found = {str(rate): _arrivals(bench, backends, rate * capacity, numbers, rate) for rate in RATES}
        return {
            "images_per_turn": scale.arrivals,
            "steps": list(scale.step_range),
            "most_images": most,
            "capacity_images_per_s": capacity,
            "rates": found,
        }


def busy_rate(done: Sequence[float]) -> float:
    """Return images per second between the first that was done and the last; those of the first moment do not count."""
    first, last = min(done), max(done)
    return sum(at > first for at in done) / (last - first)


def pixels(responses: Sequence[Response]) -> list[Pixels]:
    """Return the images of responses."""
    return [response.pixels() for response in responses]


def _arrivals(
    bench: Workbench,
    backends: dict[str, Arrive],
    rate: float,
    numbers: Numbering,
    share: float,
) -> dict[str, Any]:
    """Latencies and rates of each backend under the same arrivals, as many turns as there is time for."""
    latencies: dict[str, list[float]] = {name: [] for name in backends}
    rates: dict[str, list[float]] = {name: [] for name in backends}
    started, turn = time.monotonic(), 0
    while turn < 2 or time.monotonic() - started < bench.seconds:
        rng = np.random.default_rng([int(100 * share), turn])
        times = np.cumsum(rng.exponential(1.0 / rate, bench.scale.arrivals)).tolist()
        low, high = bench.scale.step_range
        steps = rng.integers(low, high + 1, bench.scale.arrivals).tolist()
        first = numbers.take(len(times))
        requests = bench.requests(len(times), adapters=ADAPTERS, first=first, steps=steps)
        for name in backends if turn % 2 == 0 else reversed(list(backends)):
            done = backends[name](requests, times)
            latencies[name] += [end - begin for end, begin in zip(done, times, strict=True)]
            rates[name].append(busy_rate(done))
        turn += 1
    return {
        "arrivals_per_s": rate,
        "turns": turn,
        "backends": {
            name: {
                "images_per_s": float(np.median(rates[name])),
                "engine_over": float(np.median([a / b for a, b in zip(rates[ENGINE], rates[name], strict=True)])),
                "p50_s": float(np.quantile(latencies[name], 0.5)),
                "p95_s": float(np.quantile(latencies[name], 0.95)),
            }
            for name in backends
        },
    }


def _capacity(bench: Workbench, served: Backend, numbers: Numbering) -> float:
    """Images per second of the engine at saturation with the mixed step counts of the arrivals."""
    rng, scale = np.random.default_rng(0), bench.scale
    seconds = []
    for _ in range(3):
        first = numbers.take(scale.images)
        steps = rng.integers(scale.step_range[0], scale.step_range[1] + 1, scale.images).tolist()
        requests = bench.requests(scale.images, adapters=ADAPTERS, first=first, steps=steps)
        seconds.append(_seconds_per_image(served, lambda requests=requests: requests, scale.concurrency))  # type: ignore[misc]
    return 1.0 / min(seconds[1:])


def _rates(times: dict[str, Timed]) -> dict[str, Any]:
    """Images per second of each backend, and how much more the engine makes in the same turns."""
    return {
        name: {"images_per_s": 1.0 / timed.median, "engine_over": timed.ratio(times[ENGINE]), "turns": len(timed.turns)}
        for name, timed in times.items()
    }


def _next_requests(bench: Workbench, numbers: Numbering, count: int, adapters: int) -> list[Request]:
    return bench.requests(count, adapters=adapters, first=numbers.take(count))


def _seconds_per_image(
    backend: Backend, next_requests: Callable[[], list[Request]], *settings: int, method: str = "draw"
) -> float:
    requests = next_requests()
    return backend.seconds(method, requests, *settings) / len(requests)


def _mix(adapters: int, slots: int) -> str:
    return f"{adapters} of {slots} slots"
