"""Entry point of the Ray job that drives a run: `python -m jobs.train --storage URL --run RUN_ID`, or with a SPEC.

It writes plain lines about the training, for `cat-cluster jobs logs`; the exit code is 0 only if no adapter failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING

from cat_cluster.cluster.ray_jobs import current_job
from cat_cluster.cluster.stored_spec import load_job
from cat_cluster.errors import CatClusterError, SupersededError
from cat_cluster.models.base_names import check_bases
from cat_cluster.runs.progress import RunProgress, RunState
from cat_cluster.runs.run import Run, run_id_of
from cat_cluster.runs.tries import end_untried
from cat_cluster.settings import load_settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore, open_store

if TYPE_CHECKING:
    from cat_cluster.pipeline.job import AdapterResult
    from cat_cluster.training.step_report import StepReport

LINE_SECONDS = 10.0  # between two lines about the steps of a pack


class LogListener:
    """A JobListener that writes one line with the time for each event, and one in ten seconds for steps."""

    def __init__(self) -> None:
        self._last = 0.0

    def message(self, text: str) -> None:
        """Write a line."""
        say(text)

    def started(self, steps: Mapping[str, int], together: int) -> None:
        """Say which adapters begin to train, and how many train together from now on."""
        begin = ", ".join(f"{adapter_id} ({own} steps)" for adapter_id, own in steps.items())
        say(f"training {begin}" + (f"; {together} together" if together > len(steps) else ""))

    def step(self, report: StepReport) -> None:
        """Write the step and the losses of each token, not at every step."""
        if time.monotonic() - self._last < LINE_SECONDS and not report.notable:
            return
        self._last = time.monotonic()
        losses = "; ".join(
            f"{adapter_id} {report.done[adapter_id]}/{report.steps[adapter_id]} {token} identity {loss.identity:.4f}"
            + ("" if loss.cat is None else f" cat {loss.cat:.5f}")
            for adapter_id, tokens in report.losses.items()
            for token, loss in tokens.items()
        )
        dropped = "".join(f"; dropped {adapter_id}: {reason}" for adapter_id, reason in report.dropped.items())
        say(f"{losses}{dropped}")

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """Say when the evaluation of an adapter is done."""
        if done == total:
            say(f"measured {adapter_id}")

    def finished(self, result: AdapterResult) -> None:
        """Write the result of an adapter."""
        say(f"{result.outcome} {result.adapter_id}: {result.reason or result.revision}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    run = job = None
    try:
        settings = load_settings()
        if options.run is not None:
            run = Run(open_store(options.storage or settings.storage), options.run)
            job, storage = run.read_spec(), run.store.url
        else:
            job = load_job(options.spec)
            store = open_store(options.storage or job.storage or settings.storage)
            storage = store.url
            run = None if options.expected is None else Run(store, options.expected)
            if options.retries and _is_in_vain(run or _run_of(job, store), options.retries):
                return 1
        return _train(job, storage)
    except CatClusterError as error:
        say(f"error: {error}")
        if not isinstance(error, SupersededError):
            _record_end(run, job, "failed", str(error))
        return 1
    except (KeyboardInterrupt, SystemExit):  # a driver that has joined Ray gets SystemExit on SIGTERM
        say("stopped; submit the job again to go on from the last checkpoint")
        _record_end(run, job, "stopped")
        return 130
    except Exception as error:
        _record_end(run, job, "failed", f"{type(error).__name__}: {error}")
        raise


def say(text: str) -> None:
    """Write one line with the time, at once: the log is read while it grows."""
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n")
    sys.stdout.flush()


def _train(job: JobSpec, storage: str) -> int:
    say(f"{job.name}: adapters {', '.join(adapter.id for adapter in job.adapters)}; storage {storage}")
    check_bases(job.resolved())  # before training's modules are loaded
    from transformers.utils import logging

    from cat_cluster.cluster.driver import run_on_ray

    logging.disable_progress_bar()  # a log is no place for bars
    results = run_on_ray(job, storage, load_settings(), LogListener())
    failed = [result.adapter_id for result in results if result.outcome == "failed"]
    say(f"{len(results) - len(failed)} of {len(results)} adapters are done")
    return 1 if failed else 0


def _run_of(job: JobSpec, store: ObjectStore) -> Run:
    from cat_cluster.runs.entering import image_digests_of

    return Run(store, run_id_of(job, image_digests_of(job)))


def _is_in_vain(run: Run, retries: int) -> bool:
    """Say, also in the log, whether an earlier try of this job has failed for good."""
    ended = end_untried(run, retries, current_job())
    if ended is None:
        return False
    failed = "; ".join(f"{one.id}: {one.reason}" for one in ended.adapters if one.state == "failed")
    say(f"not tried again, since attempt {ended.attempt - ended.untried} failed for good: {ended.reason or failed}")
    return True


def _record_end(run: Run | None, job: JobSpec | None, state: RunState, reason: str | None = None) -> None:
    """Record an end that came before the driver began its own record, for those who follow the run."""
    if run is None:
        return
    with suppress(CatClusterError):
        if job is not None and run.awaited() is not None:
            progress = RunProgress.begin(run.run_id, job, state="waiting", attempt=run.claim().number)
        else:
            progress = run.progress()
        if progress.state == "waiting":
            run.write_progress(progress.changed(state=state, reason=reason))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does, and ignore further signals while the driver cleans up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description="Drive a training run on this cluster.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="run whose job spec is in the storage")
    what.add_argument("spec", nargs="?", help="job spec (YAML): a file, or its address s3://.../specs/<sha256>.yaml")
    parser.add_argument("--expected", metavar="RUN", help="run that the spec makes, for those who wait for its start")
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        metavar="N",
        help="how often what starts this job does so again if it fails: what failed for good is not tried again",
    )
    parser.add_argument(
        "--storage", help="folder or s3:// address; default: the spec's, else $CAT_STORAGE, else ./cat-storage"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
