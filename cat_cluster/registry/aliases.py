"""Movable names for revisions: an append-only history in the store, safe with many writers and no lock."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import dropwhile

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, RegistryError
from cat_cluster.registry.references import alias_prefix, check_adapter_id, check_alias
from cat_cluster.store.protocol import ObjectStore

MAX_ATTEMPTS = 1000  # each lost race is another writer's success, so this many means a store that lies


@dataclass(frozen=True)
class AliasEntry:
    """One move of an alias: its number (from 1), the revision (None: the alias was removed), when, and by whom."""

    number: int
    revision: str | None
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
        unless: Callable[[list[AliasEntry]], bool] | None = None,
    ) -> AliasEntry | None:
        """Append a move and return it; None when `unless`, asked before each attempt, says not to."""
        nonce = uuid.uuid4().hex
        for _ in range(MAX_ATTEMPTS):
            if unless is not None and unless(self.history(adapter_id, alias)):
                return None
            number = self._last_number(adapter_id, alias) + 1
            created = datetime.now(UTC).isoformat(timespec="seconds")
            entry = AliasEntry(number, revision, created, nonce)
            data = json.dumps({k: v for k, v in asdict(entry).items() if k != "number"}).encode()
            with suppress(ObjectExistsError):
                self._store.put(self._key(adapter_id, alias, number), data, if_absent=True)
            # Read back even after a refusal: a store may report a put that its own retry had already made.
            if self._read(adapter_id, alias, number).nonce == nonce:
                return entry
        raise RegistryError(
            f"alias {alias!r} of {adapter_id} could not be moved in {MAX_ATTEMPTS} attempts: stop the other writers, "
            "then try again"
        )

    def names(self, adapter_id: str) -> list[str]:
        """Return, sorted, every alias the adapter ever had, removed ones too."""
        prefix = f"aliases/{check_adapter_id(adapter_id)}/"
        return sorted({key.removeprefix(prefix).split("/")[0] for key in self._store.list(prefix)})

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
            fields = json.loads(self._store.get(key))
            return AliasEntry(number, fields["revision"], fields["created"], fields["nonce"])
        except (ValueError, KeyError, TypeError, ObjectNotFoundError) as error:
            raise RegistryError(
                f"the alias record {key} is missing or damaged: restore it from a backup, or remove it and all "
                f"later records of this alias and set alias {alias!r} of {adapter_id} again"
            ) from error

    def _key(self, adapter_id: str, alias: str, number: int) -> str:
        return f"{alias_prefix(adapter_id, alias)}{number:08d}.json"
