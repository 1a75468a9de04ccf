"""A run's identity, attempts, claims and progress, kept in the object store: it outlives client, driver and cluster.

Under `runs/<run id>/`: `spec.json` is the job to run; `attempts/<8-digit n>.json` is written once by the driver that
claims attempt n; `progress/<8-digit n>.json` is the state of the run in that attempt, and the last one counts;
`stop.json` names an attempt that is asked to stop, `expected.json` a job that will start the run. A driver that finds
attempt n + 1 has been superseded, and its next write is refused; one that is already on its way changes only the record
of its own attempt.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, RunError, SupersededError
from cat_cluster.registry.manifest import package_version
from cat_cluster.runs.progress import RunProgress, is_alive, timestamp
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore, open_store
from cat_cluster.store.protocol import Entry, KeyList

MAX_CLAIMS = 1000  # each lost race is another driver's success, so this many means a store that answers wrongly

RUN_ID = re.compile(r"run-[0-9a-f]{12}")
# Package 0.2 kept one record for all attempts, `progress.json`, which sorts before the others.
_RECORD = re.compile(r"runs/(run-[0-9a-f]{12})/progress(?:/[0-9]{8})?\.json")
_CLAIM = re.compile(r"([0-9]{8})\.json")


def run_id_of(job: JobSpec, image_digests: Sequence[Sequence[str]]) -> str:
    """Return `run-` + 12 hex of the SHA-256 of what the run makes: its resolved adapters and their images' digests.

    image_digests: per adapter, in the order of the spec. The id does not depend on `cluster` and `monitoring`, on where
    photos and adapters are stored, on the job's name, or on the order of its adapters. Raises SpecError as
    ResolvedAdapter.digest.
    """
    parts = sorted([adapter.digest(), *digests] for adapter, digests in zip(job.resolved(), image_digests, strict=True))
    return f"run-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def check_run_id(run_id: str) -> str:
    """Return the run id if it is one, else raise RunError."""
    if not RUN_ID.fullmatch(run_id):
        raise RunError(f"{run_id[:80]!r} is not a run: a run is 'run-' and 12 hex digits, as `jobs list` prints it")
    return run_id


class Claim(BaseModel):
    """Who claimed an attempt: a nonce, the driver's host, process and package version, the time.

    job: its Ray job, if any; service: the name of the training service that it is the process of, if any.
    """

    model_config = ConfigDict(frozen=True)

    nonce: str
    host: str
    pid: int
    time: str
    job: str | None = None
    version: str | None = None
    service: str | None = None


class Expectation(BaseModel):
    """A job that is to start the run, for those who wait for it: its name, and the command that shows how it stands.

    after: the last attempt before it; seconds: after which its own rules give it up, None: it may start at any time.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    look: str
    after: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """One run in a store; raises RunError for a malformed id."""

    store: ObjectStore
    run_id: str

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    def write_spec(self, job: JobSpec) -> None:
        """Store the job to run, in place of an earlier one: specs of one run differ only in how it is carried out."""
        data = job.model_dump_json(indent=1).encode()
        with suppress(ObjectNotFoundError):
            if self.store.get(self.key("spec.json")) == data:
                return
        self.store.put(self.key("spec.json"), data)

    def read_spec(self) -> JobSpec:
        """Return the job to run; RunError when the store has none, or one that this version cannot read."""
        try:
            return JobSpec.model_validate_json(self.store.get(self.key("spec.json")))
        except ObjectNotFoundError:
            raise RunError(
                f"storage {self.store.url} has no run {self.run_id}: give the storage it was submitted with, one that "
                "this machine sees too (a folder of another machine is another folder), or submit the job again"
            ) from None
        except ValidationError as error:
            raise RunError(
                f"the job spec of {self.run_id} in storage {self.store.url} is damaged or of another version "
                f"({error.error_count()} bad fields, first: {error.errors()[0]['msg']}): submit the job again"
            ) from error

    def claim(self, job: str | None = None) -> Attempt:
        """Claim the next attempt, which supersedes all before it. job: the id of the Ray job that runs the driver."""
        claim = _new_claim(job=job)
        first = self.last_attempt() + 1
        for number in range(first, first + MAX_CLAIMS):
            if self._put_claim(number, claim):
                return Attempt(self, number)
        raise RunError(
            f"no attempt of {self.run_id} could be claimed in {MAX_CLAIMS} tries: stop the other drivers, "
            "then try again"
        )

    def claim_after(self, attempt: int, service: str | None = None) -> Attempt | None:
        """Claim the attempt after this one and no later; None when somebody else has. service: whose process claims."""
        number = attempt + 1
        return Attempt(self, number) if self._put_claim(number, _new_claim(service=service)) else None

    def last_attempt(self) -> int:
        """Return the highest claimed attempt, 0 if there is none."""
        names = [_CLAIM.fullmatch(key.rsplit("/", 1)[-1]) for key in self.store.list(self.key("attempts/"))]
        return max((int(name[1]) for name in names if name), default=0)

    def claim_of(self, number: int) -> Claim | None:
        """Return who claimed an attempt; None when nobody did or the record is damaged."""
        try:
            return Claim.model_validate_json(self.store.get(self._attempt_key(number)))
        except (ObjectNotFoundError, ValidationError):
            return None

    def is_claimed(self, number: int) -> bool:
        """Say whether an attempt was claimed, with one request."""
        return self.store.exists(self._attempt_key(number))

    def progress(self) -> RunProgress:
        """Return the state of the run; RunError when the store has no such run, or its record is damaged."""
        record = self.last_record()
        if record is None and (expected := self.expectation()) is not None:
            raise RunError(
                f"{self.run_id} has not started: it waits for {expected.job}; {expected.look} shows how it stands, "
                "and --wait follows it from its start"
            )
        if record is None:
            raise RunError(
                f"no run {self.run_id} in storage {self.store.url}: `cat-cluster jobs list` shows its runs; "
                "give --storage if it is in another"
            )
        try:
            return RunProgress.model_validate_json(self.store.get(record))
        except ValidationError as error:
            raise RunError(
                f"the progress record of {self.run_id} in storage {self.store.url} is damaged: submit the job again "
                "with --force, it goes on from its checkpoints"
            ) from error

    def progress_or_none(self, *, damaged_ok: bool) -> RunProgress | None:
        """Return the state of the run, None without any; a damaged record is a RunError, or None if that is ok."""
        try:
            return self.progress()
        except RunError:
            if damaged_ok or self.last_record() is None:
                return None
            raise

    def refuse_alive(self, progress: RunProgress, otherwise: str = "take it over with --force") -> None:
        """Raise RunError where a driver works on the run; otherwise: what to do in place of following it."""
        if is_alive(progress):
            claim = self.claim_of(progress.attempt)
            where = "" if claim is None else f" on {claim.host}"
            silent = f"{progress.silent_seconds():.0f} s"
            raise RunError(
                f"{self.run_id} is running: attempt {progress.attempt}{where} last wrote {silent} ago; follow it with "
                f"`{self.follow_command()}`, or {otherwise}"
            )

    def follow_command(self) -> str:
        """Return the command that follows the run."""
        return f"cat-cluster jobs status {self.run_id} --wait --storage {self.store.url}"

    def write_progress(self, progress: RunProgress) -> None:
        """Replace the progress record of an attempt, from outside it: a driver uses a ProgressWriter."""
        self.store.put(self.progress_key(progress.attempt), progress.model_dump_json().encode())

    def last_record(self) -> str | None:
        """Return the storage key of the progress record that counts, that of the last attempt; None without any."""
        record = self.listed_record()
        return None if record is None else record.key

    def listed_record(self) -> Entry | None:
        """Return that record as the store lists it: its version is another one whenever it has been written."""
        return last_records(self.store, self.key("progress")).get(self.run_id)

    def expect(self, expectation: Expectation) -> None:
        """Say which job will start the run; replaces what was said before."""
        self.store.put(self.key("expected.json"), expectation.model_dump_json().encode())

    def withdraw_expectation(self) -> None:
        """Say that no job will start the run any more."""
        self.store.delete(self.key("expected.json"))

    def expectation(self) -> Expectation | None:
        """Return the job that is to start the run; None when none is, or what was written cannot be read."""
        try:
            return Expectation.model_validate_json(self.store.get(self.key("expected.json")))
        except (ObjectNotFoundError, ValidationError):
            return None

    def awaited(self) -> Expectation | None:
        """Return the job that is to start the run as long as it has not; RunError when the run's record is damaged.

        An attempt that failed before the job was made is not its own.
        """
        expected = self.expectation()
        if expected is None or self.last_record() is None:
            return expected
        progress = self.progress()
        has_started = progress.state not in ("failed", "stopped") or progress.attempt > expected.after
        return None if has_started else expected

    def progress_key(self, attempt: int) -> str:
        """Return the storage key of the progress record of an attempt."""
        return self.key(f"progress/{attempt:08d}.json")

    def request_stop(self, attempt: int) -> None:
        """Ask an attempt, and any before it, to stop; its driver checks for the request every two seconds."""
        self.store.put(self.key("stop.json"), json.dumps({"attempt": attempt, "time": timestamp()}).encode())

    def ask_to_stop(self) -> int:
        """Ask whoever works on the run, or will, to stop, and return the attempt; RunError when the run has ended."""
        progress = self.progress()
        if progress.ended:
            raise RunError(f"{self.run_id} is already {progress.state}: there is nothing to stop")
        attempt = max(progress.attempt, self.last_attempt())
        self.request_stop(attempt)
        return attempt

    def asked_to_stop(self) -> int:
        """Return the last attempt that somebody asked to stop, 0 for none."""
        try:
            return int(json.loads(self.store.get(self.key("stop.json")))["attempt"])
        except (ObjectNotFoundError, ValueError, KeyError, TypeError):
            return 0  # an unreadable request stops nothing

    def is_stopping(self, progress: RunProgress) -> bool:
        """Say whether somebody asked the run to stop, which has not ended; progress: its record."""
        return not progress.ended and self.asked_to_stop() >= progress.attempt

    def withdraw_stop(self) -> None:
        """Withdraw a request to stop, so that it does not stop the next attempt."""
        self.store.delete(self.key("stop.json"))

    def key(self, name: str) -> str:
        """Return the storage key of one of the run's objects."""
        return f"runs/{self.run_id}/{name}"

    def _put_claim(self, number: int, claim: Claim) -> bool:
        with suppress(ObjectExistsError):
            self.store.put(self._attempt_key(number), claim.model_dump_json().encode(), if_absent=True)
        # Read back even after a refusal: a store may report a put that its own retry had already made.
        found = self.claim_of(number)
        return found is not None and found.nonce == claim.nonce

    def _attempt_key(self, number: int) -> str:
        return self.key(f"attempts/{number:08d}.json")


@dataclass(frozen=True)
class Attempt:
    """One driver's claim on a run, superseded as soon as a higher attempt is claimed."""

    run: Run
    number: int

    def is_current(self) -> bool:
        """Say whether no other driver has taken over."""
        return not self.run.is_claimed(self.number + 1)

    def check(self) -> None:
        """Raise SupersededError if another driver has taken over."""
        if not self.is_current():
            raise SupersededError(
                f"another driver has taken over run {self.run.run_id}: this one, attempt {self.number}, stops without "
                "writing any more; follow the run with `cat-cluster jobs status`"
            )

    def check_not_ended(self) -> None:
        """Raise SupersededError as check does, and once the attempt's own record says that it has ended."""
        self.check()
        with suppress(ObjectNotFoundError, ValidationError):
            record = RunProgress.model_validate_json(self.run.store.get(self.run.progress_key(self.number)))
            if record.ended:
                raise SupersededError(
                    f"attempt {self.number} of {self.run.run_id} is {record.state} and writes no more"
                )

    def stop_requested(self) -> bool:
        """Say whether somebody asked this attempt to stop."""
        return self.run.asked_to_stop() >= self.number


class FencedStore:
    """A store whose writes are refused, with SupersededError, once another driver has taken over the run.

    Reads pass through. The check and the write are two requests: a write already on its way when the other driver
    takes over still arrives, so what two attempts may write under one key has the same content.
    """

    def __init__(self, attempt: Attempt, *, until_ended: bool = False) -> None:
        """until_ended: writes are refused too once the attempt's own record says that it has ended."""
        self.attempt = attempt
        self._check = attempt.check_not_ended if until_ended else attempt.check
        self._store = attempt.run.store

    @property
    def url(self) -> str:
        """The address of the wrapped store."""
        return self._store.url

    def get(self, key: str) -> bytes:
        """Return the object's bytes; ObjectNotFoundError if there is none."""
        return self._store.get(key)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Store an object as the wrapped store does; SupersededError if the attempt is not the last."""
        self._check()
        self._store.put(key, data, if_absent=if_absent)

    def exists(self, key: str) -> bool:
        """Say whether an object is stored under the key."""
        return self._store.exists(key)

    def list(self, prefix: str) -> KeyList:
        """Return, sorted, every key that begins with the prefix ("" for all)."""
        return self._store.list(prefix)

    def entries(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """Yield, in the order of their keys, the objects whose key begins with the prefix and sorts behind `after`."""
        return self._store.entries(prefix, after=after)

    def delete(self, key: str) -> None:
        """Remove an object; SupersededError if the attempt is not the last."""
        self._check()
        self._store.delete(key)

    def size(self, key: str) -> int:
        """Return the object's size in bytes; ObjectNotFoundError if there is none."""
        return self._store.size(key)

    def check_access(self) -> None:
        """Write and remove a probe, so that a store that cannot be used is a StoreError before any work begins."""
        self._check()
        self._store.check_access()


def open_fenced_store(
    url: str,
    run_id: str,
    attempt: int,
    *,
    until_ended: bool = False,
    on_retry: Callable[[str], None] | None = None,
) -> FencedStore:
    """Return the store at the address, fenced for an attempt that the driver has claimed: what a Ray worker opens."""
    return FencedStore(Attempt(Run(open_store(url, on_retry=on_retry), run_id), attempt), until_ended=until_ended)


def _new_claim(*, job: str | None = None, service: str | None = None) -> Claim:
    return Claim(
        nonce=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        time=timestamp(),
        job=job,
        version=package_version(),
        service=service,
    )


def last_records(store: ObjectStore, prefix: str) -> dict[str, Entry]:
    """Return, by run, the progress record of its last attempt."""
    return {match[1]: entry for entry in store.entries(prefix) if (match := _RECORD.fullmatch(entry.key))}
