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


class Watcher(Protocol):
    """Receives the state of a run that is followed."""

    def show(self, progress: RunProgress) -> None:
        """The newest state of the run."""

    def message(self, text: str) -> None:
        """A line for people."""


def follow_run(run: Run, watcher: Watcher, cluster: RayCluster | None = None) -> RunProgress:
    """Show the run until it ends, and return its last state.

    A store or a cluster that cannot be reached is reported and tried again. Raises RunError when the run's record is
    missing or damaged and, if a cluster is given, when the driver has died without recording it.
    """
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


def _refuse_dead(run: Run, cluster: RayCluster) -> None:
    status = last_job_status(cluster, run.run_id)
    if status is None or status in LIVE or run.progress().ended:
        return
    raise RunError(
        f"the Ray job of {run.run_id} has ended ({status}) without a word from its driver: "
        f"`cat-cluster jobs logs {run.run_id} --address {cluster.address}` shows why; submit the job again to go on"
    )
