"""A whole job on a Ray cluster: a driver that holds one attempt of its run and ends with it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence

import ray

from cat_cluster.cluster.connection import ClusterSize, await_workers, check_size, cluster_address, ray_connection
from cat_cluster.cluster.engine_room import EngineRoom
from cat_cluster.cluster.failures import unwrapped
from cat_cluster.cluster.ray_jobs import current_job
from cat_cluster.cluster.trainer import most_workers
from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.pipeline.job import AdapterResult, JobListener, tell_warnings
from cat_cluster.pipeline.prepare import PreparedAdapter, prepare
from cat_cluster.registry import Registry
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.run import Run, run_id_of
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import open_store

CHECK_SECONDS = 2.0  # between two checks whether the attempt is superseded or asked to stop


def run_on_ray(
    job: JobSpec, store_url: str, settings: Settings, listener: JobListener, *, address: str | None = None
) -> list[AdapterResult]:
    """Train, evaluate and publish every adapter of a job on a Ray cluster, with the promises of pipeline.job.run_job.

    settings: the driver's own; a worker reads its own from its environment, which a Ray started here has from this
    process. address: the cluster; None means RAY_ADDRESS, else a Ray started on this machine. Everything is validated
    before training starts: spec, photos, bases, judges, storage, cluster. Raises SupersededError when another driver
    takes the run over, KeyboardInterrupt when somebody asks it to stop.
    """
    address = None if ray.is_initialized() else cluster_address(address)
    store = open_store(store_url)
    store.check_access()
    prepared = prepare(job, settings, Registry(store))
    run = Run(store, run_id_of(job, [adapter.image_digests for adapter in prepared]))
    with (
        unwrapped("the run"),
        ray_connection(address) as size,
        tempfile.TemporaryDirectory(prefix="cat-cluster-", ignore_cleanup_errors=True) as folder,
    ):
        size = await_workers(job.cluster, size, listener.message)
        check_size(job.cluster, store.url, size)
        run.write_spec(job)
        attempt = run.claim(job=current_job())
        progress = RunProgress.begin(run.run_id, job, state="running", attempt=attempt.number)
        with ProgressWriter(attempt, progress) as writer, unwrapped("the run"):
            held = HeldRun(job, attempt, writer, listener)
            return _drive(held, prepared, size, folder)


def _drive(run: HeldRun, prepared: Sequence[PreparedAdapter], size: ClusterSize, folder: str) -> list[AdapterResult]:
    """Bring every adapter of a run to its end and return the results in the order given."""
    tell_warnings(prepared, run.listener)
    results: dict[str, AdapterResult] = {}
    checked = time.monotonic()
    with EngineRoom(
        run.job.cluster,
        size,
        run.attempt.run.store.url,
        folder,
        groups=max(1, size.workers // most_workers(run.job.cluster.workers)),
        on_result=lambda work, result: results.update({work.adapter_id: result}),
        say=run.listener.message,
    ) as room:
        room.take([Work(run, adapter) for adapter in prepared])
        while not room.is_idle:
            room.turn()
            if time.monotonic() - checked >= CHECK_SECONDS:
                checked = time.monotonic()
                run.attempt.check()
                if run.attempt.stop_requested():
                    raise KeyboardInterrupt
        run.attempt.check()  # what was not done because another driver does it is no result
    return [results[adapter.resolved.id] for adapter in prepared]
