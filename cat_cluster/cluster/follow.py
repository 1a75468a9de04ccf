"""Following a run through the store, which outlives the connection to the cluster and the cluster itself."""

from __future__ import annotations

import time
from typing import Protocol

from cat_cluster.cluster.ray_jobs import LIVE, RayCluster, last_job_status
from cat_cluster.errors import ClusterError, RunError, StoreError
from cat_cluster.runs.progress import RunProgress, is_alive
from cat_cluster.runs.run import Run

POLL_SECONDS = 1.0
ASK_SECONDS = 5.0  # between requests to Ray about a run whose driver is silent
REMIND_SECONDS = 600.0  # between two lines that a run has not started yet
QUEUE_SECONDS = 30.0  # that a run waits in the queue until it is said what it waits for


class Watcher(Protocol):
    """Receives the state of a run that is followed."""

    def show(self, progress: RunProgress) -> None:
        """The newest state of the run."""

    def message(self, text: str) -> None:
        """A line for people."""


class Carrier(Protocol):
    """What carries a run out and can be asked about it: a Ray cluster, or a job in Kubernetes.

    Both methods raise ClusterError when it cannot be asked.
    """

    def check(self, progress: RunProgress | None) -> None:
        """Raise RunError when it carries the run no more and no driver has said so. None: nothing has started yet.

        Called every few seconds while nothing moves.
        """

    def tries_again(self, progress: RunProgress) -> bool:
        """Say whether it will try a run that has ended once more by itself."""


class RayCarrier:
    """A Carrier: the cluster that a run was submitted to."""

    def __init__(self, run: Run, cluster: RayCluster) -> None:
        self._run, self._cluster = run, cluster

    def check(self, progress: RunProgress | None) -> None:
        """Ask the cluster about the run's job where its driver is silent."""
        if progress is None or is_alive(progress):
            return
        status = last_job_status(self._cluster, self._run.run_id)
        if status in LIVE or self._run.progress().ended:
            return
        address = self._cluster.address
        if status is None:  # the cluster was started anew, or the run is on another one, where it may go on
            raise ClusterError(
                f"nothing is heard of {self._run.run_id}, and the Ray cluster at {address} has no job of it: submit it "
                "again, or press Ctrl+C to wait no longer"
            )
        raise RunError(
            f"the Ray job of {self._run.run_id} has ended ({status}) without a word from its driver: "
            f"`cat-cluster jobs logs {self._run.run_id} --address {address}` shows why; submit the job again to go on"
        )

    def tries_again(self, progress: RunProgress) -> bool:
        """Say no: what Ray was given once it runs once."""
        return False


def follow_run(run: Run, watcher: Watcher, carrier: Carrier | None = None) -> RunProgress:
    """Show the run until it ends, and return its last state; one that a job is to start is waited for.

    A store or a carrier that cannot be reached is reported and tried again. Raises RunError when the run's record is
    missing or damaged, when its job can start no more and, if a carrier is given, when that has ended without a record.
    """
    wait_for_start(run, watcher, carrier)
    reported = ""
    seen: object = None
    moved = time.monotonic()  # or asked, if that was later
    patience = QUEUE_SECONDS
    while True:
        try:
            progress = run.progress()
            watcher.show(progress)
            if progress.ended and not (carrier is not None and carrier.tries_again(progress)):
                return progress
            state = (progress.state, progress.attempt, progress.adapters)
            if state != seen:
                seen, reported, moved = state, "", time.monotonic()
            elif carrier is not None and time.monotonic() - moved >= ASK_SECONDS:
                moved = time.monotonic()
                carrier.check(progress)
            elif carrier is None and progress.state == "waiting" and time.monotonic() - moved >= patience:
                moved, patience = time.monotonic(), REMIND_SECONDS
                if run.store.exists(run.key("queued.json")):
                    watcher.message(
                        f"{run.run_id} waits for its turn in the queue, which `cat-cluster train-service --storage "
                        f"{run.store.url}` works on: if none is running, start one"
                    )
        except (StoreError, ClusterError) as error:
            if str(error) != reported:
                reported = str(error)
                watcher.message(f"{reported}; trying again")
        time.sleep(POLL_SECONDS)


def wait_for_start(run: Run, watcher: Watcher, carrier: Carrier | None = None) -> None:
    """Return once the run has started, is done, or nothing is known of a job that would start it.

    Says what is waited for. Raises RunError when the job can start no more, the carrier says so, or the run's record is
    damaged.
    """
    began, said, reported, asked = time.monotonic(), -REMIND_SECONDS, "", -ASK_SECONDS
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
            if carrier is not None and waited - asked >= ASK_SECONDS:
                asked = waited
                carrier.check(None)
            reported = ""
        except (StoreError, ClusterError) as error:
            if str(error) != reported:
                reported = str(error)
                watcher.message(f"{reported}; trying again")
        time.sleep(POLL_SECONDS)
