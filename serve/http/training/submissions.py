"""Who has asked for which run over HTTP, kept in the object store beside the runs.

`runs/<run>/requests/<owner>.json` is what a caller asked for, and `requests/<owner>/<13 digits>-<run>.json` the place
of it among all of that caller's, the newest first. `adapter-owners/<id>.json` names whose an adapter's name is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cat_cluster.errors import AdapterNotFoundError, ConflictError, ObjectExistsError, ObjectNotFoundError, RunError
from cat_cluster.registry import Registry
from cat_cluster.runs.entering import enter_run
from cat_cluster.runs.listing import run_ids
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Claim, Run, run_id_of
from cat_cluster.spec.job import JobSpec
from serve.http.access import Caller
from serve.http.training.stored_files import StoredFile, StoredFiles

RUN_ID = r"^run-[0-9a-f]{12}$"
Kind = Literal["fine_tuning", "run"]
_LAST_MS = 10**13 - 1
_INDEX = re.compile(r"requests/[a-z0-9]+/[0-9]{13}-(run-[0-9a-f]{12})\.json")
_MOST_CLAIMS = 20  # attempts of a run that its events tell of, the last ones


class Asked(BaseModel):
    """What a caller asked for. kind: as a fine-tuning job or a whole run; asked: the fields that are told again."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    created_ms: int
    owner: str
    priority: int = 0
    deadline: datetime | None = None
    asked: dict[str, Any] = {}

    @property
    def created_at(self) -> int:
        """Unix time in seconds."""
        return self.created_ms // 1000


@dataclass(frozen=True)
class SeenRun:
    """A run as a caller sees it. asked: None where it was not entered over HTTP; is_stopping: somebody asked for that.

    claims: by attempt, who has begun to work on it, only where that was asked for.
    """

    run_id: str
    asked: Asked | None
    progress: RunProgress
    is_stopping: bool
    claims: dict[int, Claim]

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.progress.is_over(is_stopping=self.is_stopping)


@dataclass(frozen=True)
class RunPage:
    """Some runs, and whether more follow."""

    runs: tuple[SeenRun, ...]
    has_more: bool


class Submissions:
    """The runs that were asked for over HTTP. Every method raises StoreError."""

    def __init__(self, registry: Registry, files: StoredFiles) -> None:
        self._registry, self._store = registry, registry.store
        self._files = files

    def enter(
        self, caller: Caller, job: JobSpec, digests: Sequence[Sequence[str]], asked: Asked, files: Sequence[StoredFile]
    ) -> SeenRun:
        """Enter a job into the queue, for its caller; it is the run that `cat-cluster submit --queue` would enter.

        One that waits or is worked on already stays as it is. Raises ConflictError for the name of an adapter that is
        another's, and when a driver outside of the queue is at work.
        """
        for adapter in job.adapters:
            self._own_name(caller, adapter.id)
        run_id = run_id_of(job, digests)
        for file in files:
            self._files.use(file, run_id)  # first, so that none is deleted meanwhile
        try:
            run, is_new = enter_run(
                job, self._store, owner=caller.name, priority=asked.priority, deadline=asked.deadline, digests=digests
            )
        except RunError as error:
            raise ConflictError(str(error)) from error
        before = self._asked(run.run_id, caller.name)
        if before is None:
            self._store.put(_place(caller.name, asked.created_ms, run.run_id), b"{}")
        elif is_new:
            asked = asked.model_copy(update={"created_ms": before.created_ms})  # its place among all stays
        else:
            asked = before
        self._store.put(_asked_key(run.run_id, caller.name), asked.model_dump_json().encode())
        return self._seen(run, asked)

    def find(self, caller: Caller, run_id: str, *, claims: bool = False) -> SeenRun | None:
        """Return a run that the caller may see, None where there is none: their own, of an admin any."""
        if not re.fullmatch(RUN_ID, run_id):
            return None
        asked = self._asked(run_id, caller.name)
        if asked is None and not caller.is_admin:
            return None
        if asked is None:
            owners = self._store.list(f"runs/{run_id}/requests/")
            asked = self._asked(run_id, owners[0].rpartition("/")[2].removesuffix(".json")) if owners else None
        try:
            return self._seen(Run(self._store, run_id), asked, claims=claims)
        except RunError:
            return None

    def sees(self, caller: Caller, run_id: str) -> bool:
        """Say whether the caller may see a run that there is."""
        return caller.is_admin or self._asked(run_id, caller.name) is not None

    def page(self, caller: Caller, limit: int, after: str | None, *, kind: Kind | None = None) -> RunPage | None:
        """Return a page of what a caller has asked for, the newest first; None where `after` is none of it.

        Costs a listing from the page's start on, and a few requests for each run of the page.
        """
        start = ""
        if after is not None:
            asked = self._asked(after, caller.name) if re.fullmatch(RUN_ID, after) else None
            if asked is None:
                return None
            start = _place(caller.name, asked.created_ms, after)
        prefix = f"requests/{caller.name}/"
        matches = (_INDEX.fullmatch(entry.key) for entry in self._store.entries(prefix, after=start))
        return self._page(caller, (match[1] for match in matches if match), limit, kind)

    def page_of_all(self, caller: Caller, limit: int, after: str | None) -> RunPage:
        """Return a page of all runs of the storage, whoever entered them, by their ids."""
        return self._page(caller, run_ids(self._store, after or ""), limit, None)

    def stop(self, seen: SeenRun) -> None:
        """Ask whoever works on a run, or will, to stop; ConflictError where it has ended."""
        try:
            Run(self._store, seen.run_id).ask_to_stop()
        except RunError as error:
            raise ConflictError(str(error)) from error

    def checkpoints(self, seen: SeenRun) -> dict[str, list[int]]:
        """Return by adapter the steps of the checkpoints that the store has, the newest first."""
        found: dict[str, list[int]] = {}
        for adapter in seen.progress.adapters:
            if adapter.revision is not None:
                keys = self._store.list(f"checkpoints/{adapter.id}/{adapter.revision}/")
                steps = [int(name) for key in keys if (name := key.rpartition("/")[2].removesuffix(".json")).isdigit()]
                found[adapter.id] = sorted(steps, reverse=True)
        return found

    def _page(self, caller: Caller, ids: Iterator[str], limit: int, kind: Kind | None) -> RunPage:
        found: list[SeenRun] = []
        for run_id in ids:
            if len(found) == limit:
                return RunPage(tuple(found), True)
            seen = self.find(caller, run_id)
            if seen is not None and (kind is None or (seen.asked is not None and seen.asked.kind == kind)):
                found.append(seen)
        return RunPage(tuple(found), False)

    def _seen(self, run: Run, asked: Asked | None, *, claims: bool = False) -> SeenRun:
        progress = run.progress()
        last = run.last_attempt() if claims else 0
        numbers = range(max(1, last - _MOST_CLAIMS + 1), last + 1)
        found = {number: claim for number in numbers if (claim := run.claim_of(number)) is not None}
        return SeenRun(run.run_id, asked, progress, run.is_stopping(progress), found)

    def _asked(self, run_id: str, owner: str) -> Asked | None:
        with suppress(ObjectNotFoundError, ValidationError):  # a damaged one is asked for anew
            return Asked.model_validate_json(self._store.get(_asked_key(run_id, owner)))
        return None

    def _own_name(self, caller: Caller, adapter_id: str) -> None:
        """See that an adapter's name is the caller's, or nobody's yet; an admin may train each."""
        if caller.is_admin:
            return
        key = f"adapter-owners/{adapter_id}.json"
        mine = Owner(owner=caller.name)
        with suppress(ObjectNotFoundError):
            self._check_owner(key, mine, adapter_id)
            return
        with suppress(AdapterNotFoundError):
            if self._registry.summary(adapter_id) is not None:
                raise _not_yours(adapter_id)
        with suppress(ObjectExistsError):
            self._store.put(key, mine.model_dump_json().encode(), if_absent=True)
        self._check_owner(key, mine, adapter_id)

    def _check_owner(self, key: str, mine: Owner, adapter_id: str) -> None:
        if self._store.get(key) != mine.model_dump_json().encode():
            raise _not_yours(adapter_id)


class Owner(BaseModel):
    """Whose an adapter's name is: of the caller who was the first to train it over HTTP."""

    owner: str


def _place(owner: str, created_ms: int, run_id: str) -> str:
    return f"requests/{owner}/{_LAST_MS - created_ms:013d}-{run_id}.json"


def _asked_key(run_id: str, owner: str) -> str:
    return f"runs/{run_id}/requests/{owner}.json"


def _not_yours(adapter_id: str) -> ConflictError:
    return ConflictError(
        f"{adapter_id} is an adapter of somebody else: choose another name, or have it trained with a key of "
        "CAT_ADMIN_KEYS"
    )
