"""Following a run through the store, which outlives the connection to the cluster and the cluster itself."""

from __future__ import annotations

import time
from typing import Protocol

from cat_cluster.cluster.ray_jobs import LIVE, RayCluster, last_job_status
from cat_cluster.cluster.run_progress import RunProgress, is_alive
from cat_cluster.cluster.runs import Run
from cat_cluster.errors import ClusterError, RunError, StoreError

POLL_SECONDS = 1.0
ASK_SECONDS = 5.0  # between requests to Ray about a run whose driver is silent
REMIND_SECONDS = 600.0  # between two lines that a run has not started yet


class Watcher(Protocol):
    """Receives the state of a run that is followed."""

    def show(self, progress: RunProgress) -> None:
        """The newest state of the run."""

    def message(self, text: str) -> None:
        """A line for people."""


def follow_run(run: Run, watcher: Watcher, cluster: RayCluster | None = None) -> RunProgress:
    """Show the run until it ends, and return its last state; one that a job is to start is waited for.

    A store or a cluster that cannot be reached is reported and tried again. Raises RunError when the run's record is
    missing or damaged, when its job can start no more and, if a cluster is given, when the driver has died without
    recording it.
    """
    wait_for_start(run, watcher)
    reported = ""
    checked = time.monotonic()
    while True:
        try:
            progress = run.progress()
            watcher.show(progress)
            if progress.ended:
                return progress
            if is_alive(progress):
                reported = ""
            elif cluster is not None and time.monotonic() - checked >= ASK_SECONDS:
                checked = time.monotonic()
                _refuse_dead(run, cluster)
        except (StoreError, ClusterError) as error:
            if str(error) != reported:
                reported = str(error)
                watcher.message(f"{reported}; trying again")
        time.sleep(POLL_SECONDS)


def wait_for_start(run: Run, watcher: Watcher) -> None:
    """Return once the run has started, is done, or nothing is known of a job that would start it.

    Says what is waited for. Raises RunError when the job can start no more, or the run's record is damaged.
    """
    began, said, reported = time.monotonic(), -REMIND_SECONDS, ""
    while True:
        waited = time.monotonic() - began
        try:
            expected = run.awaited()
            if expected is None:
                return
            if expected.seconds is not None and waited > expected.seconds:
                raise RunError(
                    f"{run.run_id} has not started in {expected.seconds / 60:.0f} min, and {expected.job} can start no "
                    f"more: {expected.look} shows why; apply it again"
                )
            if waited - said >= REMIND_SECONDS:
                said = waited
                since = f" ({waited / 60:.0f} min so far)" if waited >= REMIND_SECONDS else ""
                watcher.message(f"waiting for {expected.job} to start{since}; {expected.look} shows how it stands")
            reported = ""
        except StoreError as error:
            if str(error) != reported:
                reported = str(error)
                watcher.message(f"{reported}; trying again")
        time.sleep(POLL_SECONDS)


def _refuse_dead(run: Run, cluster: RayCluster) -> None:
    status = last_job_status(cluster, run.run_id)
    if status in LIVE or run.progress().ended:
        return
    if status is None:  # the cluster was started anew, or the run is on another one, where it may go on
        raise ClusterError(
            f"nothing is heard of {run.run_id}, and the Ray cluster at {cluster.address} has no job of it: submit it "
            "again, or press Ctrl+C to wait no longer"
        )
    raise RunError(
        f"the Ray job of {run.run_id} has ended ({status}) without a word from its driver: "
        f"`cat-cluster jobs logs {run.run_id} --address {cluster.address}` shows why; submit the job again to go on"
    )
