"""What the serving benchmarks should reach, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

ENGINE = "engine"
Part = Mapping[str, Any]


class Verdict(NamedTuple):
    """A figure to reach: what was asked, what was found, and whether that is enough."""

    what: str
    aim: str
    found: str
    reached: bool


def verdicts(parts: Mapping[str, Part]) -> list[Verdict]:
    """Return how the parts that were measured compare with the figures to reach."""
    makers: dict[str, Callable[[Part], Iterable[Verdict]]] = {
        "adapters": _adapters_verdicts,
        "overhead": _overhead_verdicts,
        "serial": _serial_verdicts,
        "peft": _peft_verdicts,
        "stacks": _stacks_verdicts,
        "poisson": _poisson_verdicts,
        "join": _join_verdicts,
        "probes": _probes_verdicts,
    }
    return [verdict for name, make in makers.items() if name in parts for verdict in make(parts[name])]


def _adapters_verdicts(part: Part) -> Iterable[Verdict]:
    for rate in part["rates"]:
        if rate["adapters"] > 1:
            what = f"throughput of {rate['adapters']} adapters in turn over one, {rate['slots']} slots"
            yield _at_least(what, 0.95, rate["to_one"])


def _overhead_verdicts(part: Part) -> Iterable[Verdict]:
    for threads, calls in part["calls"].items():
        for name in ("8 adapters", "16 adapters"):
            ratio = calls[name]["to_bare"]
            what = f"U-Net call of {part['rows']} rows with {name} over the bare U-Net, {threads_text(threads)}"
            yield Verdict(what, "\N{LESS-THAN OR EQUAL TO} 1.15x", f"{ratio:.3f}x", ratio <= 1.15)


def _serial_verdicts(part: Part) -> Iterable[Verdict]:
    best = min((backend["engine_over"], name) for name, backend in part["backends"].items() if name != ENGINE)
    yield _at_least(f"engine over the best pipeline ({best[1]})", 1.4, best[0])


def _peft_verdicts(part: Part) -> Iterable[Verdict]:
    best = min((one["engine_over"], name) for name, one in part["backends"].items() if name.startswith("PEFT"))
    yield _at_least(f"engine over a PEFT mixed batch ({best[1].removeprefix('PEFT, ')})", 1.1, best[0])


def _stacks_verdicts(part: Part) -> Iterable[Verdict]:
    own = f"{part['adapters']} of rank {part['rank']}"
    one = f"one of rank {part['adapters'] * part['rank']}"
    for rows, calls in part["calls"].items():
        ratio = calls["stack_over_one"]
        what = f"U-Net call of {rows} rows, each a stack of {own}, over {one}"
        yield Verdict(what, "\N{LESS-THAN OR EQUAL TO} 1.05x", f"{ratio:.3f}x", ratio <= 1.05)
    if part["device"] == "cpu":  # what is asked of a CPU
        taken = part["bind_ms"][own]["1"]
        yield Verdict(f"binding a stack of {own} to a row", "< 5 ms", f"{taken:.1f} ms", taken < 5.0)


def _poisson_verdicts(part: Part) -> Iterable[Verdict]:
    share, found = max(part["rates"].items(), key=lambda item: float(item[0]))
    for name, backend in found["backends"].items():
        if name != ENGINE:
            steps = "-".join(str(end) for end in part["steps"])
            yield _at_least(
                f"engine over {name}, {steps} steps, arrivals at {share} of its capacity", 1.5, backend["engine_over"]
            )
    for share, found in part["rates"].items():
        ours = found["backends"][ENGINE]["p95_s"]
        best = min(backend["p95_s"] for name, backend in found["backends"].items() if name != ENGINE)
        what = f"p95 latency at {share} of the engine's capacity, engine and best PEFT batches"
        yield Verdict(what, "not worse", f"{ours:.2f} s, {best:.2f} s", ours <= best)


def _join_verdicts(part: Part) -> Iterable[Verdict]:
    most = part["wait_steps"]["most_calls_ended"]
    yield Verdict(
        "calls that a request waits for while others denoise, at most", "the one in flight", f"{most}", most <= 1
    )


def _probes_verdicts(part: Part) -> Iterable[Verdict]:
    cost = 1.0 - part["throughput"]
    yield Verdict("throughput that probes cost at saturation", "< 2%", f"{cost:.1%}", cost < 0.02)


def _at_least(what: str, aim: float, found: float) -> Verdict:
    return Verdict(what, f"\N{GREATER-THAN OR EQUAL TO} {aim:g}x", f"{found:.2f}x", found >= aim)


def threads_text(count: int | str) -> str:
    """Return a number of threads in words, as "1 thread"."""
    return f"{count} thread{'s' * (int(count) != 1)}"
