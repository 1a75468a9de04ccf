"""Revisions out of service: one object in the store for each, so that every replica and every operator agree."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, ObjectUnreadableError
from cat_cluster.registry.references import quarantine_key
from cat_cluster.store.protocol import ObjectStore


@dataclass(frozen=True)
class Quarantine:
    """Why a revision is out of service, since when (ISO 8601, UTC), and who took it out."""

    reason: str
    created: str
    by: str


class QuarantineBook:
    """The quarantined revisions of a registry, `quarantine/<id>/<revision>.json`: that it is there is what counts."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def add(self, adapter_id: str, revision: str, reason: str, by: str) -> Quarantine:
        """Quarantine a revision and return its record; the first record of several stays."""
        record = Quarantine(reason, datetime.now(UTC).isoformat(timespec="seconds"), by)
        with suppress(ObjectExistsError):
            self._store.put(quarantine_key(adapter_id, revision), json.dumps(asdict(record)).encode(), if_absent=True)
        return self.find(adapter_id, revision) or record

    def remove(self, adapter_id: str, revision: str) -> None:
        """Put a revision back into service; one that is not quarantined is no error."""
        self._store.delete(quarantine_key(adapter_id, revision))

    def find(self, adapter_id: str, revision: str) -> Quarantine | None:
        """Return a revision's record, None if it is in service; an object that cannot be read quarantines too."""
        try:
            data = self._store.get(quarantine_key(adapter_id, revision))
        except ObjectNotFoundError:
            return None
        except ObjectUnreadableError:
            data = b""
        fields = {"reason": "no reason given", "created": "unknown", "by": "unknown"}
        with suppress(ValueError, RecursionError):  # an operator may have written it by hand
            found = json.loads(data)
            fields |= {k: str(v) for k, v in found.items() if k in fields} if isinstance(found, dict) else {}
        return Quarantine(**fields)
