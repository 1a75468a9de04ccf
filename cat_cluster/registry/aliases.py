"""Movable names for revisions: an append-only history in the store, safe with many writers and no lock."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import dropwhile

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, ObjectUnreadableError, RegistryError
from cat_cluster.registry.kept import KeptRecords
from cat_cluster.registry.references import REVISION_PATTERN, alias_prefix, check_adapter_id, check_alias, is_alias
from cat_cluster.store.protocol import Entry, ObjectStore

_RECORD_BYTES = 1000  # of a move that is kept, with its key
MAX_ATTEMPTS = 1000  # each lost race is another writer's success, so this many means a store that lies


_NUMBER = re.compile(r"[0-9]{8}\.json")


@dataclass(frozen=True)
class AliasEntry:
    """One move of an alias: its number (from 1), the revision (None: the alias was removed), when, and by whom."""

    number: int
    revision: str | None
    created: str
    nonce: str


class _Record(BaseModel):
    """A move as it is stored."""

    model_config = ConfigDict(strict=True)

    revision: str | None = Field(pattern=REVISION_PATTERN)
    created: str
    nonce: str


class AliasBook:
    """The aliases of a registry: move n is `aliases/<id>/<alias>/<n, 8 digits>.json`, written once.

    A writer puts its nonce in the entry and reads the entry back; a foreign nonce is a lost race, and it tries
    n + 1. Numbers have no holes, so readers probe for entries after the last one they know and never list.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._known: dict[tuple[str, str], int] = {}
        self._kept = KeptRecords[AliasEntry]()

    def current(self, adapter_id: str, alias: str) -> AliasEntry | None:
        """Return the alias's last move, None if it was never set."""
        number = self._last_number(adapter_id, alias)
        return self._read(adapter_id, alias, number) if number else None

    def history(self, adapter_id: str, alias: str) -> list[AliasEntry]:
        """Return every move of the alias, oldest first; empty if it was never set."""
        return [*self.newest_first(adapter_id, alias)][::-1]

    def newest_first(self, adapter_id: str, alias: str) -> Iterator[AliasEntry]:
        """Yield every move of the alias, the last one first; each is read when it is asked for."""
        for number in range(self._last_number(adapter_id, alias), 0, -1):
            yield self._read(adapter_id, alias, number)

    def revisions_before(self, adapter_id: str, alias: str, revision: str) -> Iterator[str]:
        """Yield the other revisions that the alias named before it last named this one, each once, the latest first."""
        seen = {revision}
        for entry in dropwhile(lambda entry: entry.revision != revision, self.newest_first(adapter_id, alias)):
            if entry.revision is not None and entry.revision not in seen:
                seen.add(entry.revision)
                yield entry.revision

    def move(
        self,
        adapter_id: str,
        alias: str,
        revision: str | None,
        *,
        unless: Callable[[Iterator[AliasEntry]], bool] | None = None,
    ) -> AliasEntry | None:
        """Append a move and return it; None when `unless`, asked before each attempt, says not to.

        unless: receives the moves so far, the last one first, and reads no more of them than it takes.
        """
        nonce = uuid.uuid4().hex
        for _ in range(MAX_ATTEMPTS):
            if unless is not None and unless(self.newest_first(adapter_id, alias)):
                return None
            number = self._last_number(adapter_id, alias) + 1
            created = datetime.now(UTC).isoformat(timespec="seconds")
            data = json.dumps({"revision": revision, "created": created, "nonce": nonce}).encode()
            with suppress(ObjectExistsError):
                self._store.put(self._key(adapter_id, alias, number), data, if_absent=True)
            # Read back even after a refusal: a store may report a put that its own retry had already made.
            if self._read(adapter_id, alias, number).nonce == nonce:
                return AliasEntry(number, revision, created, nonce)
        raise RegistryError(
            f"alias {alias!r} of {adapter_id} could not be moved in {MAX_ATTEMPTS} attempts: stop the other writers, "
            "then try again"
        )

    def names(self, adapter_id: str) -> list[str]:
        """Return, sorted, every alias the adapter ever had, removed ones too."""
        prefix = f"aliases/{check_adapter_id(adapter_id)}/"
        found = (key.removeprefix(prefix).partition("/") for key in self._store.list(prefix))
        return sorted({name for name, _, number in found if is_alias(name) and _NUMBER.fullmatch(number)})

    def readable(self, adapter_id: str, entries: Iterable[Entry]) -> tuple[dict[str, str], list[str]]:
        """Return alias -> revision, removed aliases left out, and the aliases whose last record cannot be read.

        entries: those of the store below `aliases/<id>/`; of these, each last record is read once.
        """
        moves: dict[str, list[Entry]] = {}
        for entry in entries:
            name, _, number = entry.key.removeprefix(f"aliases/{adapter_id}/").partition("/")
            if is_alias(name) and _NUMBER.fullmatch(number):
                moves.setdefault(name, []).append(entry)
        revisions, damaged = dict[str, str](), []
        for alias in sorted(moves):
            try:
                last = self._last(adapter_id, alias, moves[alias])
            except (RegistryError, ObjectUnreadableError):
                last = None
            if last is None:  # or there are records, and not the first one
                damaged.append(alias)
            elif last.revision is not None:
                revisions[alias] = last.revision
        return revisions, damaged

    def _last(self, adapter_id: str, alias: str, listed: list[Entry]) -> AliasEntry | None:
        """Return the last move of those listed, which are in order and not none."""
        number, last = len(listed), listed[-1]
        if last.key != self._key(adapter_id, alias, number):  # some are missing
            return self.current(adapter_id, alias)
        found = self._kept.get(last)
        if found is None:
            found = self._read(adapter_id, alias, number)
            self._kept.keep(last, found, _RECORD_BYTES)
        return found

    def _last_number(self, adapter_id: str, alias: str) -> int:
        """Find the last move by galloping from the last one known, then halving: n new moves cost 2 log n probes."""
        place = (adapter_id, check_alias(alias))
        last, step = self._known.get(place, 0), 1
        while self._store.exists(self._key(adapter_id, alias, last + step)):
            last, step = last + step, 2 * step
        while step > 1:
            step //= 2
            if self._store.exists(self._key(adapter_id, alias, last + step)):
                last += step
        if last:  # nothing is kept of names that do not exist: anybody can make up any number of them
            self._known[place] = last
        return last

    def _read(self, adapter_id: str, alias: str, number: int) -> AliasEntry:
        key = self._key(adapter_id, alias, number)
        try:
            record = _Record.model_validate_json(self._store.get(key))
        except ObjectNotFoundError as error:
            raise RegistryError(
                f"the alias record {key} is missing from {self._store.url}, and later ones may be: see that the whole "
                "storage is there (mounted, and copied or restored to its end), or restore the record from a backup"
            ) from error
        except ValidationError as error:
            raise RegistryError(
                f"the alias record {key} is damaged ({_first(error)}): restore it from a backup, or set alias "
                f"{alias!r} of {adapter_id} again, which adds a record after it"
            ) from error
        return AliasEntry(number, record.revision, record.created, record.nonce)

    def _key(self, adapter_id: str, alias: str, number: int) -> str:
        return f"{alias_prefix(adapter_id, alias)}{number:08d}.json"


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return ": ".join([*(str(part) for part in found["loc"]), found["msg"]])
