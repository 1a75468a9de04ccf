"""The benchmark of training services: its arrivals, its figures, its specs, and the page of its results."""

from __future__ import annotations

from pathlib import Path

import pytest

from cat_cluster.spec.job import load_spec
from jobs.benchmark.cluster.measure import write_spec
from jobs.benchmark.pages import page_texts
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.service.stream import LOAD, SLOTS, Arrival, Served, merged, poisson, summary

START = Start("2026-11-30T20:00:00+00:00", "3e808594ebfb", dirty=False)


def test_arrivals_come_at_the_load_that_is_asked_for() -> None:
    arrivals = poisson(2000, (100, 600), 0.5)
    assert arrivals[0].at == 0.0
    assert {100 <= one.steps <= 600 for one in arrivals} == {True}
    work = sum(one.steps for one in arrivals) * 0.5 / SLOTS
    assert work / arrivals[-1].at == pytest.approx(LOAD, rel=0.1)
    assert poisson(2000, (100, 600), 0.5) == arrivals, "the same whenever it is drawn"


def test_figures_of_a_stream() -> None:
    """Two in slots from 1 to 5 and from 2 to 10, the second of which came at 0 and waited meanwhile."""
    found = summary([Served(0.0, 1.0, 5.0, 0), Served(0.0, 2.0, 10.0, 1)])
    assert (found["seconds"], found["per_hour"], found["p95_s"], found["jobs"]) == (10.0, 720.0, 10.0, 2)
    assert found["occupied"] == pytest.approx((4 + 8) / (10 * SLOTS))
    assert found["waiting_s"] == 2.0
    assert found["while_waiting"] == pytest.approx(1 / (2 * SLOTS))
    assert summary([Served(0.0, 0.0, 4.0, 0)])["while_waiting"] is None


def test_a_batch_has_the_concepts_of_all_with_their_own_steps(tmp_path: Path) -> None:
    arrivals = [Arrival(3, 0.0, 40), Arrival(5, 1.0, 90)]
    specs = [write_spec(tmp_path / str(one.number), 1, first=one.number, **one.sections()) for one in arrivals]
    job = load_spec(merged(specs, tmp_path / "batch.yaml"))
    assert [(one.id, one.training.steps) for one in job.resolved()] == [("concept-3", 40), ("concept-5", 90)]
    assert {(one.training.rows_per_concept, one.evaluation.enabled) for one in job.resolved()} == {(1, False)}
    assert job.cluster.max_pack == SLOTS


def test_the_page_has_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    turn = dict.fromkeys(
        ("submit_s", "first_step_s", "published_s", "steps_s", "evaluation_s", "to_bare", "beyond_s"), 2.5
    )
    latency = {"steps": 30, "evaluation": {"prompts": ["a", "b"]}, **turn, "submissions": [turn] * 5}
    write_result("service-latency", latency, START, tmp_path)
    page = page_texts(tmp_path)["service.md"]
    assert "| 30 steps, 2 evaluation prompts | 5 | 2.50 |" in page
    assert "stream" not in page
    stream = summary([Served(0.0, 1.0, 5.0, 0), Served(0.0, 2.0, 10.0, 1)])
    both = {"service": stream, "batches": stream, "throughput_ratio": 1.0, "p95_ratio": 1.0, "full_step_s": 0.2}
    fixed = {"concepts": 2, "steps": [60, 240], "slots": SLOTS, "rows_per_concept": 1, "load": LOAD}
    write_result("service-stream", {**fixed, **both}, START, tmp_path)
    page = page_texts(tmp_path)["service.md"]
    assert "| concepts per hour | 720 | 720 | 1.00x | at least 1.5x |" in page
    assert "| occupied share of the slots | 30% | 30% | | at least 85% |" in page
