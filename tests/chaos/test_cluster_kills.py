"""Distributed training on a real Ray cluster and a real S3 server, while workers, drivers, nodes and servers die."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.cluster_jobs import (
    PACK_TASK,
    Process,
    Site,
    StepLog,
    Watcher,
    check_published,
    suspended,
    train_whole,
)
from tests.support.s3_server import S3Server
from tests.support.tiny_jobs import adapter, write_photos, write_spec

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

CHECKPOINT_EVERY = 8
ADAPTERS = ("bowl", "cup", "mug")
STEPS = 120
WORKER_KILLS, DRIVER_KILLS, NODE_KILLS, OUTAGES = 7, 4, 3, 6
SURVIVES = 50  # max_failures: no kill here may be the one too many
ORPHAN_SECONDS = 20  # in which a pack's workers end after whatever started them


@pytest.fixture
def make_site(tiny_base_folder: Path, tmp_path: Path, s3_bucket: str) -> Iterator[Any]:
    sites = []

    def make(*, adapters: int, steps: int, stage: int | None, streamed: bool = False) -> Site:
        """streamed: the third comes in where the first, of half the steps, ends; else all train from the start."""
        folder = tmp_path / "site"
        members = [
            adapter(
                one,
                write_photos(folder / one, seed=number),
                training={
                    "rank": 2 + number,
                    "seed": number,
                    "steps": steps // 2 if streamed and one != "cup" else steps,
                },
            )
            for number, one in enumerate(ADAPTERS[:adapters])
        ]
        spec = write_spec(
            folder / "spec.yaml",
            tiny_base_folder,
            members,
            training={"learning_rate": 0.005, "lr_schedule": "cosine", "warmup_steps": 4},
            cluster={
                "workers": 2,
                "zero_stage": stage,
                "max_pack": 2 if streamed else 3,
                "max_failures": SURVIVES,
                "checkpoint_every": CHECKPOINT_EVERY,
            },
        )
        sites.append(Site(folder, spec, f"{s3_bucket}/site"))
        return sites[-1]

    yield make
    for site in sites:
        site.clean()


class WorkerKiller:
    """Ends training workers, each of another group: the others of a group end with the one that was killed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._doomed: set[psutil.Process] = set()
        self.early = 0

    def kill(self, driver: Process, journal: StepLog) -> None:
        """Wait for workers and end one with SIGKILL, whatever it is doing."""
        driver.await_true(lambda: set(driver.workers()) - self._doomed, pause=0.2)
        workers = set(driver.workers())
        victim = self._rng.choice(sorted(workers - self._doomed, key=lambda worker: worker.pid))
        victim.kill()
        self._doomed |= workers
        self.early += victim.pid not in {note.pid for note in journal.notes()}


def fail_for_a_while(server: S3Server, rng: random.Random) -> None:
    """Take one of the server's processes away for some seconds: refused connections, or answers of 503."""
    name = rng.choice(["proxy", "object", "container"])
    server.kill(name)
    time.sleep(rng.uniform(1.0, 4.0))
    server.restart(name)


def await_no_workers(cluster: Process) -> None:
    """Fail unless no training worker is left soon."""
    started = time.monotonic()
    while workers := cluster.workers():
        assert time.monotonic() - started < ORPHAN_SECONDS, workers
        time.sleep(0.1)
    print(f"workers gone after {time.monotonic() - started:.1f} s")


@pytest.mark.timeout(900)
def test_a_job_survives_killed_workers_killed_drivers_and_outages_of_its_storage(
    make_site: Any, s3_server: S3Server
) -> None:
    """Seventeen disturbances of a job of three adapters at random steps, some before the first step after a start."""
    rng = random.Random(20)
    site = make_site(adapters=3, steps=STEPS, stage=2, streamed=True)
    whole = train_whole(site.spec, site.folder / "whole")
    kinds = ["worker"] * WORKER_KILLS + ["driver"] * (DRIVER_KILLS - 1) + ["storage"] * OUTAGES
    rng.shuffle(kinds)
    # The last driver dies between the last step and the last publishing.
    plan = [*zip(sorted(rng.sample(range(2, STEPS), len(kinds))), kinds, strict=True), (STEPS, "driver")]
    workers = WorkerKiller(rng)
    with Watcher(site.store) as watcher:
        driver = site.drive()
        for step, kind in plan:
            if rng.random() < 0.8:  # else at once, which is while the workers start where the last one killed any
                site.await_step(step, driver)
            time.sleep(rng.uniform(0.0, 0.2))
            if kind == "worker":
                workers.kill(driver, site.journal)
            elif kind == "storage":
                fail_for_a_while(s3_server, rng)
            else:
                driver.kill()
                driver = site.drive()
        assert driver.end() == 0, driver.said()
    assert watcher.looks > len(plan)
    assert watcher.problems == []
    redone = site.journal.redone()
    print(f"steps done again after a start: {redone}; workers killed before their first step: {workers.early}")
    assert len(redone) >= (WORKER_KILLS + DRIVER_KILLS) // 2, "the kills met nobody at work"
    assert all(-1 <= steps <= CHECKPOINT_EVERY for steps in redone), redone
    check_published(site.store, whole, ADAPTERS)


@pytest.mark.timeout(900)
def test_a_job_survives_lost_nodes(make_site: Any) -> None:
    """Each node holds a worker; the one beside the head loses its power three times and is replaced."""
    rng = random.Random(3)
    site = make_site(adapters=2, steps=STEPS // 2, stage=None)
    whole = train_whole(site.spec, site.folder / "whole")
    cluster, address = site.cluster(1, 1)
    with Watcher(site.store) as watcher:
        driver = site.drive(address)
        for step in sorted(rng.sample(range(2, STEPS // 2), NODE_KILLS)):
            site.await_step(step, driver)
            assert cluster.send("kill") == "done"
            time.sleep(rng.uniform(0.0, 1.0))
            assert cluster.send("add 1") == "done"
        assert driver.end() == 0, driver.said()
    assert watcher.problems == []
    redone = site.journal.redone()
    assert len(redone) >= 1
    assert all(-1 <= steps <= CHECKPOINT_EVERY for steps in redone), redone
    check_published(site.store, whole, ADAPTERS[:2])


@pytest.mark.timeout(600)
def test_of_two_drivers_of_one_run_one_wins(make_site: Any) -> None:
    """Started at the same moment, each with a Ray of its own: the later claim holds, the other says so and ends."""
    site = make_site(adapters=2, steps=24, stage=None)
    whole = train_whole(site.spec, site.folder / "whole")
    with Watcher(site.store) as watcher:
        drivers = [site.drive(), site.drive()]
        codes = [driver.end() for driver in drivers]
    assert sorted(codes) == [0, 1], [driver.said() for driver in drivers]
    loser = drivers[codes.index(1)]
    assert "another driver has taken over" in loser.said()
    assert "Traceback" not in loser.said()
    assert watcher.problems == []
    assert site.run().last_attempt() == 2
    assert site.run().progress().state == "done"
    check_published(site.store, whole, ADAPTERS[:2])


@pytest.mark.timeout(600)
def test_a_driver_that_was_held_up_writes_nothing_after_another_took_over(make_site: Any) -> None:
    """On one cluster: the first driver stands still, its workers go on; the second finishes the job."""
    site = make_site(adapters=2, steps=60, stage=None)
    whole = train_whole(site.spec, site.folder / "whole")
    cluster, address = site.cluster(2)
    first = site.drive(address)
    site.await_step(10, first)
    with suspended(first.family()):
        with suspended(cluster.workers()):  # or they would be through before the second driver has read its spec
            second = site.drive(address)
            second.await_true(lambda: site.run().last_attempt() == 2, pause=0.2)
        assert second.end() == 0, second.said()
        before = site.objects()
    # The first driver's workers were refused their next checkpoint and went no further.
    (redone,) = site.journal.redone()
    assert -1 <= redone <= CHECKPOINT_EVERY
    assert first.end() == 1, first.said()
    assert "another driver has taken over" in first.said()
    time.sleep(5)
    own = site.run().progress_key(1)  # a write that was on its way when the first driver stood still may arrive
    assert {**site.objects(), own: b""} == {**before, own: b""}
    assert site.run().progress().attempt == 2
    check_published(site.store, whole, ADAPTERS[:2])


@pytest.mark.timeout(600)
def test_a_run_that_is_asked_to_stop_does_and_can_go_on(make_site: Any) -> None:
    # The driver looks every CHECK_SECONDS whether it is asked: far fewer steps than are left then.
    site = make_site(adapters=2, steps=200, stage=None)
    whole = train_whole(site.spec, site.folder / "whole")
    cluster, address = site.cluster(2)
    driver = site.drive(address)
    site.await_step(20, driver)
    site.run().request_stop(1)
    assert driver.end(20) == 130, driver.said()
    assert "Traceback" not in driver.said()
    await_no_workers(cluster)
    assert site.run().progress().state == "stopped"
    stopped_at = site.journal.reached()
    assert 20 <= stopped_at < 200
    again = site.drive(address)
    assert again.end() == 0, again.said()
    (redone,) = site.journal.redone()
    assert -1 <= redone <= CHECKPOINT_EVERY
    assert site.run().progress().state == "done"
    check_published(site.store, whole, ADAPTERS[:2])


@pytest.mark.timeout(600)
def test_workers_end_with_the_task_of_their_pack_and_with_their_driver(make_site: Any) -> None:
    """On a cluster that outlives them, where the next driver needs their processors."""
    site = make_site(adapters=2, steps=60, stage=None)
    whole = train_whole(site.spec, site.folder / "whole")
    cluster, address = site.cluster(2)
    driver = site.drive(address)
    site.await_step(10, driver)
    (task,) = cluster.named(PACK_TASK)
    task.kill()
    assert driver.end() == 1, driver.said()
    assert "controls the training of bowl, cup was killed" in driver.said()
    await_no_workers(cluster)
    again = site.drive(address)
    site.await_step(30, again)
    again.kill()
    await_no_workers(cluster)
    last = site.drive(address)
    assert last.end() == 0, last.said()
    assert len(site.journal.redone()) == 2
    check_published(site.store, whole, ADAPTERS[:2])
