"""Images per second: many adapters against one, and the engine against pipelines and PEFT batches, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from cat_cluster.telemetry import ADAPTER_SWAPS
from jobs.benchmark.serving.bench import Answer, Ask, Bench, Counter, Pixels, take_turns_for
from jobs.benchmark.serving.contenders import Contender
from jobs.benchmark.serving.rivals import SERIAL, PeftLoop, difference
from jobs.benchmark.timing import Timed

Arrive = Callable[[Sequence[Ask], Sequence[float]], list[float]]
ENGINE = "engine"
ADAPTERS = 16  # of the comparisons
RATES = (0.5, 0.8, 1.5)  # arrivals, as shares of what the engine can do
SATURATED = max(RATES)
STATIC = "PEFT, static batches"
SHRINKING = "PEFT, static batches, done rows leave"


def measure_adapters(bench: Bench) -> dict[str, Any]:
    """Return images per second of each number of adapters in turn, and its ratio to one adapter's."""
    scale, counter = bench.scale, Counter()
    with ExitStack() as cleanup:
        services = {slots: cleanup.enter_context(bench.service(ADAPTER_SWAPS, slots=slots)) for slots in scale.slots}
        variants = {}
        for slots, served in services.items():
            for adapters in scale.mixes:
                asked = partial(_asked, bench, counter, scale.images, adapters)
                variants[_mix(adapters, slots)] = partial(_seconds_per_image, served, asked, scale.concurrency)
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


def measure_serial(bench: Bench) -> dict[str, Any]:
    """Return images per second of the engine and of each way of drawing one image at a time."""
    asks = bench.asks(bench.scale.concurrency, adapters=ADAPTERS)
    counter = Counter(len(asks))
    with ExitStack() as cleanup:
        served = cleanup.enter_context(bench.service())
        ways = {name: cleanup.enter_context(bench.contender(way, replace(bench))) for name, way in SERIAL.items()}
        few = bench.scale.serial_images
        ours = pixels(served.get("draw", asks, len(asks)))[:few]
        differences = {name: difference(ours, way.get("draw", asks[:few])) for name, way in ways.items()}
        for way in ways.values():
            way.get("changes")
        asked = partial(_asked, bench, counter, len(asks), ADAPTERS)
        fewer = partial(_asked, bench, counter, few, ADAPTERS)
        variants: dict[str, Callable[[], float]] = {ENGINE: partial(_seconds_per_image, served, asked, len(asks))}
        for name, way in ways.items():
            variants[name] = partial(_seconds_per_image, way, fewer)
        times = take_turns_for(variants, bench.seconds)
        return {
            "images_per_turn": len(asks),
            "serial_images_per_turn": few,
            "rows": bench.scale.rows,
            "ways": _rates(times),
            "differences": differences,
            "change_ms": {name: 1e3 * float(np.median(way.get("changes"))) for name, way in ways.items()},
        }


def measure_peft(bench: Bench) -> dict[str, Any]:
    """Return images per second of the engine and of PEFT's mixed batches, all images started together."""
    count = bench.scale.concurrency
    asks, counter, half = bench.asks(count, adapters=ADAPTERS), Counter(count), bench.scale.rows // 2
    with ExitStack() as cleanup:
        served = cleanup.enter_context(bench.service())
        wide = cleanup.enter_context(bench.service(max_rows=2 * count))
        loop = cleanup.enter_context(bench.contender(PeftLoop, replace(bench), ADAPTERS))
        ours = pixels(served.get("draw", asks, count))
        asked = partial(_asked, bench, counter, count, ADAPTERS)
        times = take_turns_for(
            {
                ENGINE: partial(_seconds_per_image, served, asked, count),
                f"engine, {2 * count} rows": partial(_seconds_per_image, wide, asked, count),
                f"PEFT, {count} images together": partial(_seconds_per_image, loop, asked),
                f"PEFT, {half} images at a time": partial(_seconds_per_image, loop, asked, half, method="in_parts"),
            },
            bench.seconds,
        )
        return {
            "images_per_turn": count,
            "rows": bench.scale.rows,
            "ways": _rates(times),
            "differences": {"PEFT": difference(ours, loop.get("draw", asks))},
        }


def measure_poisson(bench: Bench) -> dict[str, Any]:
    """Return what engine and static PEFT batches make of the same random arrivals of images of mixed step counts."""
    scale, counter = bench.scale, Counter()
    most = scale.rows // 2
    with ExitStack() as cleanup:
        served = cleanup.enter_context(bench.service())
        loop = cleanup.enter_context(bench.contender(PeftLoop, replace(bench), ADAPTERS))
        ways: dict[str, Arrive] = {
            ENGINE: partial(served.get, "arrive"),
            STATIC: lambda asks, times: loop.get("arrive", asks, times, most, False),
            SHRINKING: lambda asks, times: loop.get("arrive", asks, times, most, True),
        }
        capacity = _capacity(bench, served, counter)
        found = {str(rate): _arrivals(bench, ways, rate * capacity, counter, rate) for rate in RATES}
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


def pixels(answers: Sequence[Answer]) -> list[Pixels]:
    """Return the images of answers."""
    return [answer.pixels() for answer in answers]


def _arrivals(
    bench: Bench,
    ways: dict[str, Arrive],
    rate: float,
    counter: Counter,
    share: float,
) -> dict[str, Any]:
    """Latencies and rates of each way under the same arrivals, as many turns as there is time for."""
    latencies: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    started, turn = time.monotonic(), 0
    while turn < 2 or time.monotonic() - started < bench.seconds:
        rng = np.random.default_rng([int(100 * share), turn])
        times = np.cumsum(rng.exponential(1.0 / rate, bench.scale.arrivals)).tolist()
        low, high = bench.scale.step_range
        steps = rng.integers(low, high + 1, bench.scale.arrivals).tolist()
        first = counter.take(len(times))
        asks = bench.asks(len(times), adapters=ADAPTERS, first=first, steps=steps)
        for name in ways if turn % 2 == 0 else reversed(list(ways)):
            done = ways[name](asks, times)
            latencies[name] += [end - begin for end, begin in zip(done, times, strict=True)]
            rates[name].append(busy_rate(done))
        turn += 1
    return {
        "arrivals_per_s": rate,
        "turns": turn,
        "ways": {
            name: {
                "images_per_s": float(np.median(rates[name])),
                "engine_over": float(np.median([a / b for a, b in zip(rates[ENGINE], rates[name], strict=True)])),
                "p50_s": float(np.quantile(latencies[name], 0.5)),
                "p95_s": float(np.quantile(latencies[name], 0.95)),
            }
            for name in ways
        },
    }


def _capacity(bench: Bench, served: Contender, counter: Counter) -> float:
    """Images per second of the engine at saturation with the mixed step counts of the arrivals."""
    rng, scale = np.random.default_rng(0), bench.scale
    seconds = []
    for _ in range(3):
        first = counter.take(scale.images)
        steps = rng.integers(scale.step_range[0], scale.step_range[1] + 1, scale.images).tolist()
        asks = bench.asks(scale.images, adapters=ADAPTERS, first=first, steps=steps)
        seconds.append(_seconds_per_image(served, lambda asks=asks: asks, scale.concurrency))  # type: ignore[misc]
    return 1.0 / min(seconds[1:])


def _rates(times: dict[str, Timed]) -> dict[str, Any]:
    """Images per second of each way, and how much more the engine makes in the same turns."""
    return {
        name: {"images_per_s": 1.0 / timed.median, "engine_over": timed.ratio(times[ENGINE]), "turns": len(timed.turns)}
        for name, timed in times.items()
    }


def _asked(bench: Bench, counter: Counter, count: int, adapters: int) -> list[Ask]:
    return bench.asks(count, adapters=adapters, first=counter.take(count))


def _seconds_per_image(
    contender: Contender, asked: Callable[[], list[Ask]], *settings: int, method: str = "draw"
) -> float:
    asks = asked()
    return contender.seconds(method, asks, *settings) / len(asks)


def _mix(adapters: int, slots: int) -> str:
    return f"{adapters} of {slots} slots"
