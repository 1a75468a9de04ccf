"""The pages of the serving benchmarks, docs/benchmarks/serving.md and serving-gpu.md, and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jobs.benchmark.figures import _CAT, _INK, _LORA, _PAPER, _QUIET, _SERIES, _style
from jobs.benchmark.record import measured_on

PAGES = {"serving": "serving.md", "serving-gpu": "serving-gpu.md"}
ENGINE, BARE = "engine", "bare U-Net"
Part = Mapping[str, Any]


class Verdict(NamedTuple):
    """A figure to reach: what was asked, what was found, and whether that is enough."""

    what: str
    aim: str
    found: str
    reached: bool


def serving_page(result: Part, picture: str) -> str:
    """Return the page of a result file: the figures to reach, then a section for each part that was measured."""
    parts = result["parts"]
    on = "a GPU, a random base of Stable Diffusion 1.5's size" if result["size"] == "sd15" else "the pocket base"
    lines = [
        f"# Serving: images of many adapters in one batch ({on})",
        "",
        "The service (`serve/service.py`: registry, cache, engine, decoding, PNGs) on made-up adapters of rank 8 in",
        "the attention and feed-forward layers, each changing every weight by 7% of its norm. The contenders of a part",
        "are processes of their own that take short turns, so that a busy minute hits all alike; ratios are medians",
        "over turns. Images are guided (two rows each), prompts and seeds always new.",
        "",
        "![Throughput of each way, and latency under random arrivals](" + picture + ")",
        "",
        "| | aim | measured |",
        "|---|---|---|",
    ]
    for verdict in verdicts(parts):
        found = verdict.found if verdict.reached else f"**missed** {verdict.found}"
        lines.append(f"| {verdict.what} | {verdict.aim} | {found} |")
    for name, part in parts.items():
        lines += ["", *_SECTIONS[name](part), "", _measured(part)]
    return "\n".join([*lines, "", measured_on(result), ""])


def verdicts(parts: Mapping[str, Part]) -> list[Verdict]:
    """Return how the parts that were measured compare with the figures to reach."""
    makers: dict[str, Callable[[Part], Iterable[Verdict]]] = {
        "adapters": _adapters_verdicts,
        "overhead": _overhead_verdicts,
        "serial": _serial_verdicts,
        "peft": _peft_verdicts,
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
            what = f"U-Net call of {part['rows']} rows with {name} over the bare U-Net, {_threads(threads)}"
            yield Verdict(what, "\N{LESS-THAN OR EQUAL TO} 1.15x", f"{ratio:.3f}x", ratio <= 1.15)


def _serial_verdicts(part: Part) -> Iterable[Verdict]:
    best = min((way["engine_over"], name) for name, way in part["ways"].items() if name != ENGINE)
    yield _at_least(f"engine over the best serial way ({best[1]})", 1.4, best[0])


def _peft_verdicts(part: Part) -> Iterable[Verdict]:
    best = min((way["engine_over"], name) for name, way in part["ways"].items() if name.startswith("PEFT"))
    yield _at_least(f"engine over a PEFT mixed batch ({best[1].removeprefix('PEFT, ')})", 1.1, best[0])


def _poisson_verdicts(part: Part) -> Iterable[Verdict]:
    share, found = max(part["rates"].items(), key=lambda item: float(item[0]))
    for name, way in found["ways"].items():
        if name != ENGINE:
            steps = "-".join(str(end) for end in part["steps"])
            yield _at_least(f"engine over {name}, {steps} steps, arrivals at {share} of its capacity", 1.5, _over(way))
    for share, found in part["rates"].items():
        ours = found["ways"][ENGINE]["p95_s"]
        best = min(way["p95_s"] for name, way in found["ways"].items() if name != ENGINE)
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


def _over(way: Part) -> float:
    return float(way["engine_over"])


def _overhead(part: Part) -> list[str]:
    threads = part["calls"]
    lines = [
        "## What adapters cost in a call",
        "",
        f"One call of {part['rows']} rows, call by call in turn. The keys and values of the prompts are kept from when",
        "a row joined, which the bare U-Net computes in every call. `whole step` has gather, guidance and sampler too.",
        "",
        "| | " + " | ".join(f"{_threads(count)}, ms | to bare" for count in threads) + " |",
        "|---" * (1 + 2 * len(threads)) + "|",
    ]
    for name in next(iter(threads.values())):
        cells = [f"{calls[name]['ms']:.1f} | {calls[name]['to_bare']:.3f}x" for calls in threads.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    curve = part["curve"]
    names = list(next(iter(curve.values())))
    lines += ["", "Milliseconds per row over the rows of a call:", ""]
    lines += ["| rows | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    lines += [
        f"| {rows} | " + " | ".join(f"{calls[name]['ms_per_row']:.2f}" for name in names) + " |"
        for rows, calls in curve.items()
    ]
    gap, limit = part["difference"], part["limit"]
    return [
        *lines,
        "",
        f"With the bare U-Net at its best, {limit['rows']} rows a call, {limit['images_per_s']:.2f} images/s can be "
        "denoised and no more.",
        "",
        f"Largest difference of a call's output to PEFT's: {gap['to_peft']:.1e}; adapters change it by up to "
        f"{gap['to_bare']:.2f}.",
    ]


def _adapters(part: Part) -> list[str]:
    lines = [
        "## Many adapters against one",
        "",
        f"{part['concurrency']} requests at any time, {part['images_per_turn']} images a turn, adapters in turn.",
        "",
        "| adapters | slots | images/s | to one adapter |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {rate['adapters']} | {rate['slots']} | {rate['images_per_s']:.2f} | {rate['to_one']:.2f}x |"
        for rate in part["rates"]
    ]
    swaps = ", ".join(f"{count} with {slots} slots" for slots, count in part["swaps"].items())
    return [*lines, "", f"Adapters copied into slots, all turns: {swaps}."]


def _serial(part: Part) -> list[str]:
    return [
        "## Against pipelines, one image at a time",
        "",
        f"{part['images_per_turn']} requests for 16 adapters at once, a turn of the engine. A stock",
        f"StableDiffusionPipeline draws {part['serial_images_per_turn']} of them a turn, one by one;",
        "adapters lie in memory, the U-Net is channels-last, no PNGs are made. The difference of pixels is to the",
        "engine's images, in levels of 255.",
        "",
        *_ways_table(part, ("change of adapter, ms",), lambda name: [_number(part["change_ms"].get(name))]),
    ]


def _peft(part: Part) -> list[str]:
    gap = part["differences"]["PEFT"]
    return [
        "## Against PEFT's mixed batches",
        "",
        "`adapter_names`, a name for each row, in a loop of our own with vectorised samplers; all images are started",
        "together and have equal step counts.",
        "",
        *_ways_table(part, (), lambda name: []),
        "",
        f"Pixels differ by at most {gap['max']:.0f} of 255, {gap['mean']:.4f} in the mean.",
    ]


def _ways_table(part: Part, more: Sequence[str], cells: Callable[[str], list[str]]) -> list[str]:
    differences = part["differences"] if more else {}
    heads = ["", "images/s", "engine over it", *more, *(["pixels differ by at most", "mean"] if differences else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, way in part["ways"].items():
        label = f"engine, {part['rows']} rows" if name == ENGINE else name
        row = [label, f"{way['images_per_s']:.2f}", f"{way['engine_over']:.2f}x", *cells(name)]
        if differences:
            gap = differences.get(name)
            row += ["", ""] if gap is None else [f"{gap['max']:.0f}", f"{gap['mean']:.4f}"]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _poisson(part: Part) -> list[str]:
    low, high = part["steps"]
    lines = [
        "## Random arrivals, mixed step counts",
        "",
        f"Poisson arrivals of images of {low} to {high} steps, {part['images_per_turn']} a turn, equal for each way.",
        f"PEFT takes what has arrived, up to {part['most_images']} images, until the longest is done; or, less usual,",
        "images that are done leave its calls, though none can join. Rates are shares of the engine's capacity,",
        f"{part['capacity_images_per_s']:.2f} images/s; images/s is from the first image done to the last.",
        "",
        "| rate | | images/s | engine over it | p50, s | p95, s |",
        "|---|---|---|---|---|---|",
    ]
    for share, found in part["rates"].items():
        lines += [
            f"| {share} | {name} | {way['images_per_s']:.2f} | {way['engine_over']:.2f}x | {way['p50_s']:.2f} | "
            f"{way['p95_s']:.2f} |"
            for name, way in found["ways"].items()
        ]
    return lines


def _join(part: Part) -> list[str]:
    wait, swap, idle = part["wait_steps"], part["swap"], part["swap_idle"]
    return [
        "## Joining, swapping, binding",
        "",
        f"{part['joined']} requests came at random while others denoised in steps of {part['step_ms']:.0f} ms, for",
        "adapters in host memory, with rows free.",
        "",
        f"- From the engine's queue to its rows they waited {wait['median']:.2f} of a step in the median, "
        f"{wait['p95']:.2f} at p95, {wait['most']:.2f} at most: the rest of the step in flight.",
        f"- A swap of an adapter into a slot is one copy of {swap['bytes']:,} bytes: {swap['median_ms']:.2f} ms "
        f"(p95 {swap['p95_ms']:.2f}) beside running steps, {idle['median_ms']:.2f} ms "
        f"(p95 {idle['p95_ms']:.2f}) while the engine is idle.",
        f"- A bind of an image's two rows, prompts' keys and values included: {part['bind_ms']:.1f} ms.",
    ]


def _probes(part: Part) -> list[str]:
    steps, rates = part["row_steps"], part["images_per_s"]
    return [
        "## Probes at saturation",
        "",
        f"A probe always waits (two adapters probed without pause, every finished image a candidate), share "
        f"{part['share']:.0%}; {part['images_per_turn']} images a turn, services with and without probes in turn.",
        "",
        f"- {rates['with']:.2f} images/s with probes, {rates['without']:.2f} without: "
        f"{part['throughput']:.3f}x, the median of {part['turns']} turns.",
        f"- Row-steps: {steps['probes']:.0f} for probes, {steps['users']:.0f} for users, {steps['share']:.2%}.",
        f"- U-Net time in calls of probes alone: {part['time_share_of_own_calls']:.2%}; small calls cost more per row.",
    ]


_SECTIONS: dict[str, Callable[[Part], list[str]]] = {
    "overhead": _overhead,
    "adapters": _adapters,
    "serial": _serial,
    "peft": _peft,
    "poisson": _poisson,
    "join": _join,
    "probes": _probes,
}


def _measured(part: Part) -> str:
    dirty = " with uncommitted changes" if part["dirty"] else ""
    return (
        f"Measured {part['measured'][:16].replace('T', ' ')} at {part['commit'][:12]}{dirty}"
        f"{', blocks compiled' if part['compiled'] else ''}, {_threads(str(part['machine']['threads']))}; "
        f"load average {part['load_before']:.1f} before, "
        f"{part['load_after']:.1f} after."
    )


def _threads(count: str) -> str:
    return f"{count} thread{'s' * (count != '1')}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def draw_serving(result: Part, path: Path) -> None:
    """Throughput of each way, the engine's being 1; p95 latency over the arrival rate, both in shares of capacity."""
    parts = result["parts"]
    figure = Figure(figsize=(12.4, 4.4), dpi=130, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    bars = [(ENGINE, 1.0, _CAT)]
    for name, colour in (("serial", _QUIET), ("peft", _LORA)):
        ways = parts.get(name, {"ways": {}})["ways"]
        bars += [(way, 1.0 / _over(found), colour) for way, found in ways.items() if not way.startswith(ENGINE)]
    for place, (name, value, colour) in enumerate(reversed(bars)):
        left.barh(place, value, color=colour, height=0.7)
        left.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8, color=_INK)
        left.text(0.02, place, name, va="center", fontsize=8, color=_PAPER)
    left.set_yticks([])
    _style(left, "Throughput, 16 adapters", "images per second, the engine's = 1", "")
    poisson = parts.get("poisson")
    if poisson is not None:
        for colour, name in zip((_CAT, _LORA, _SERIES[1]), next(iter(poisson["rates"].values()))["ways"], strict=True):
            values = [found["ways"][name]["p95_s"] for found in poisson["rates"].values()]
            right.plot([float(share) for share in poisson["rates"]], values, "o-", color=colour, label=name)
        right.set_yscale("log")
        right.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _style(right, "Random arrivals, 10 to 30 steps", "arrivals, as a share of the engine's capacity", "p95 latency, s")
    figure.savefig(path)
