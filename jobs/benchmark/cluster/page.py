"""docs/benchmarks/cluster.md, from the result files of `python -m jobs.benchmark cluster`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.benchmark.record import measured_on


def cluster_page(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page as Markdown: a section for every part that was measured."""
    sections = {
        "steps": _steps,
        "checkpoints": _checkpoints,
        "sharding": _sharding,
        "batch": _batch,
    }
    lines = ["# What the cluster costs and gains", ""]
    for name, section in sections.items():
        if name in parts:
            lines += [*section(parts[name]), "", measured_on(parts[name]), ""]
    return "\n".join(lines)


def _steps(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "## A step with each engine",
        "",
        f"{result['adapters']} adapters, {result['rows_per_concept']} rows per concept, Pocket-SD, two workers of one",
        "thread each; the engines take turns. Through Ray is the same pack as a job of its own on a Ray that starts",
        "for it: a step as the workers report it, and the seconds around the steps (imports, Ray, the worker group,",
        f"photos, publishing). One process with two threads needs {result['one_process_two_threads_ms']:.0f} ms.",
        "",
        "| engine | step, ms | to plain torch | step through Ray, ms | to bare | around the steps, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, engine in result["engines"].items():
        ray = result["ray"].get(name)
        through = "- | - | -" if ray is None else f"{ray['step_ms']:.0f} | {ray['to_bare']:.2f}x | {ray['around']:.0f}"
        lines.append(f"| {name} | {engine['step_ms']:.0f} | {engine['to_torch']:.2f}x | {through} |")
    return lines


def _checkpoints(result: Mapping[str, Any]) -> list[str]:
    cost = 100.0 * (result["ratio"] - 1.0)
    verdict = "reached" if cost < 3.0 else "not reached"
    return [
        "## Checkpoints in the background",
        "",
        f"{result['steps']} steps of {result['adapters']} adapters with their {result['checkpoints']} checkpoints (the",
        f"default interval; {result['checkpoint_mib']:.0f} MiB each in all, {result['store']} store) against as many",
        f"without, in turns: {cost:+.1f}% (aim: under 3%, {verdict}).",
    ]


def _sharding(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "## What a worker holds",
        "",
        f"Two workers, {result['adapters']} adapters, one row per concept, two CAT steps at 16 x 16 latents;",
        "`sd15` is a random U-Net as large as that of Stable Diffusion 1.5.",
        "Resident is what the worker holds of the base's weights between steps, peak the most memory its process ever",
        "held, the loading of the whole base included.",
        "",
        "| base | stage | resident base, MiB per worker | peak, MiB per worker | second step, s |",
        "|---|---|---|---|---|",
    ]
    for size, found in result["sizes"].items():
        for stage in ("zero 2", "zero 3"):
            cells = [
                " / ".join(f"{one[name]:.0f}" for one in found[stage]) for name in ("resident_base_mib", "peak_mib")
            ]
            seconds = max(one["step_seconds"][-1] for one in found[stage])
            lines.append(f"| {size} | {stage} | {cells[0]} | {cells[1]} | {seconds:.1f} |")
    ratios = ", ".join(f"{found['ratio']:.3f}x for {size}" for size, found in result["sizes"].items())
    return [*lines, "", f"Stage 3 holds of the base, to stage 2: {ratios} (aim: at most 0.55x)."]


def _batch(result: Mapping[str, Any]) -> list[str]:
    count = result["concepts"]
    lines = [
        "## Twenty concepts in one job",
        "",
        f"{count} concepts in one job on two workers against {count} jobs of one, each trained, measured (one image",
        "per prompt) and published, start-up included. The time of a single job is a mean of a few. Aim: at least 3x.",
        "",
        f"| rows per concept | steps | one job, s | a single, s | {count} singles, s | faster |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["settings"]:
        times = f"{one['batch']:.0f} | {one['each']:.0f} | {count * one['each']:.0f}"
        lines.append(f"| {one['rows']} | {one['steps']} | {times} | {one['speed_up']:.1f}x |")
    return lines
