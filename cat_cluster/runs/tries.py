"""Tries of one job by what started it, as KubeRay does on a new cluster each: what failed for good is not worked on."""

from __future__ import annotations

from contextlib import suppress

from cat_cluster.errors import RunError
from cat_cluster.registry.manifest import package_version
from cat_cluster.runs.progress import RunProgress, timestamp
from cat_cluster.runs.run import Claim, Run


def end_untried(run: Run, retries: int, job: str | None) -> RunProgress | None:
    """End an attempt that the same job's last one has shown to be in vain, and return its record; None: it may work.

    retries: how often the job is tried again by itself; job: the id of this try's Ray job, if any. KubeRay gives no way
    to tell it that a job has failed for good, so it makes that many more clusters. After as many attempts that tried
    nothing the next one is somebody's own, and works; so does one with another version of the package, or after
    `k8s render` has been called again.
    """
    last = _last_progress(run)
    if last is None or last.state != "failed" or not last.permanent or last.untried >= retries:
        return None
    expected = run.expectation()
    if expected is not None and expected.after >= last.attempt:
        return None
    if not _is_same_job(run.claim_of(last.attempt), job):
        return None
    now = timestamp()
    attempt = run.claim(job=job)
    ended = last.changed(attempt=attempt.number, started=now, updated=now, untried=last.untried + 1)
    run.write_progress(ended)
    return ended


def _last_progress(run: Run) -> RunProgress | None:
    with suppress(RunError):  # there is none, or it is damaged
        return run.progress()
    return None


def _is_same_job(claim: Claim | None, job: str | None) -> bool:
    """Say whether a job of this version made the claim in an earlier try: their ids are `<name>-<random>`."""
    if claim is None or claim.job is None or job is None:
        return False
    return claim.version == package_version() and claim.job.rpartition("-")[0] == job.rpartition("-")[0]
