"""A training service whose processes are killed at random while runs come in."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cat_cluster.runs.entering import enter_run
from cat_cluster.runs.listing import list_runs
from cat_cluster.spec.job import JobSpec, load_spec
from tests.support.cluster_jobs import PACK_TASK, WORKER, Process, Site, Watcher, check_published, train_whole
from tests.support.tiny_jobs import adapter, write_photos, write_spec

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]

ADAPTERS, OF_A_RUN, KILLS = 16, 2, 8
PLACES, CHECKPOINT_EVERY = 4, 20
STEPS = (16, 24, 40, 60)
END_SECONDS = 300


@pytest.fixture
def site(tiny_base_folder: Path, tmp_path: Path, s3_bucket: str) -> Iterator[Site]:
    """The spec of all adapters, of several lengths and ranks, and a bucket."""
    folder = tmp_path / "site"
    photos = [write_photos(folder / f"photos-{seed}", seed=seed) for seed in range(4)]
    members = [
        adapter(
            f"a{number:02d}",
            photos[number % len(photos)],
            training={"rank": 2 + number % 3, "seed": number, "steps": STEPS[number % len(STEPS)]},
        )
        for number in range(ADAPTERS)
    ]
    spec = write_spec(folder / "spec.yaml", tiny_base_folder, members, training={"learning_rate": 0.005})
    one = Site(folder, spec, f"{s3_bucket}/site")
    yield one
    one.clean()


def start(site: Site) -> Process:
    """Start the service, which takes a place on one of the two processors; the other publishes."""
    options = ["--max-pack", str(PLACES), "--checkpoint-every", str(CHECKPOINT_EVERY)]
    return site.start(["-m", "cat_cluster.cli", "train-service", "--storage", site.url, *options])


def victims(service: Process, kind: str) -> list[psutil.Process]:
    """The processes of a kind that are alive."""
    return [psutil.Process(service.popen.pid)] if kind == "service" else service.named(kind)


def published(site: Site) -> int:
    return len({key.split("/")[1] for key in site.store.list("aliases/")})


def is_empty(site: Site) -> bool:
    return site.store.list("queue/") == []


def test_each_adapter_of_a_stream_is_published_once_whoever_dies(site: Site) -> None:
    rng = random.Random(7)
    job = load_spec(site.spec)
    whole = train_whole(site.spec, site.folder / "whole")
    runs = [part(job, first) for first in range(0, ADAPTERS, OF_A_RUN)]
    kinds = ["service"] * (KILLS // 4) + [PACK_TASK] * (KILLS // 10)
    kinds += [WORKER] * (KILLS - len(kinds))
    rng.shuffle(kinds)
    killed: list[str] = []
    with Watcher(site.store) as watcher:
        service = start(site)
        while runs or not is_empty(site):
            if service.popen.poll() is not None:  # as whoever runs it in earnest does
                service = start(site)
            if runs:
                enter_run(runs.pop(0), site.store, owner=rng.choice(["ann", "bob"]))
            # One death for each so many that are published: all through the stream.
            if kinds and published(site) >= len(killed) * ADAPTERS // KILLS and victims(service, kinds[0]):
                time.sleep(rng.uniform(0.0, 3.0))
                if service.popen.poll() is None and (alive := victims(service, kinds[0])):
                    rng.choice(alive).kill()
                    killed.append(kinds.pop(0))
            time.sleep(rng.uniform(0.2, 1.0))
        end_of(service)
    print(f"killed: {', '.join(killed)}")
    assert len(killed) >= KILLS * 3 // 4, "the stream ended before it was disturbed enough"
    assert watcher.problems == []
    progress, damaged = list_runs(site.store)
    assert damaged == []
    assert {one.state for one in progress} == {"done"}
    check_published(site.store, whole, tuple(one.id for one in job.adapters))


def part(job: JobSpec, first: int) -> JobSpec:
    """A run of some of the adapters."""
    return job.model_copy(update={"name": f"run {first}", "adapters": job.adapters[first : first + OF_A_RUN]})


def end_of(service: Process) -> None:
    """Stop the service as its operator does, once nothing waits, and see that it says nothing of a fault."""
    if service.popen.poll() is None:
        service.popen.terminate()
        assert service.end(60) == 0, service.said()[-3000:]
    assert "Traceback" not in service.said()
