"""Look-ups of the request path, quarantine, and the revision to fall back to."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cat_cluster.errors import AdapterNotFoundError, RegistryError
from cat_cluster.registry import AdapterDraft, Registry
from cat_cluster.store import LocalStore

MakeDraft = Callable[..., AdapterDraft]


def test_looking_up_says_what_resolving_says_and_never_lists(
    registry: Registry, make_draft: MakeDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = registry.publish(make_draft(seed=0)), registry.publish(make_draft(seed=1))
    registry.set_alias("cup", "prod", old.revision)
    registry.set_alias("cup", "gone", old.revision)
    registry.remove_alias("cup", "gone")
    fresh = Registry(registry.store)
    monkeypatch.setattr(LocalStore, "entries", None)
    assert fresh.look_up("cup") == fresh.look_up("cup@latest") == new
    assert fresh.look_up("cup@prod") == fresh.look_up(old.name) == old
    for unknown in ("cop", "cup@staging", "cup@gone", "cup@r-000000000000"):
        assert fresh.look_up(unknown) is None
    for malformed in ("Cup", "cup@", "../cup"):
        with pytest.raises(RegistryError):
            fresh.look_up(malformed)


def test_a_quarantine_has_a_reason_a_time_and_an_author_and_ends(registry: Registry, make_draft: MakeDraft) -> None:
    revision = registry.publish(make_draft()).revision
    assert registry.quarantined("cup", revision) is None
    record = registry.quarantine("cup", revision, "kps fell", by="probe of gpu-7")
    assert (record.reason, record.by) == ("kps fell", "probe of gpu-7")
    assert record.created.startswith("20")
    assert registry.quarantine("cup", revision, "again") == record == registry.quarantined("cup", revision)
    registry.release("cup", revision)
    registry.release("cup", revision)
    assert registry.quarantined("cup", revision) is None
    assert registry.quarantine("cup", revision, "again").by
    with pytest.raises(AdapterNotFoundError):
        registry.quarantine("cup", "r-000000000000", "a slip of the pen")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null", b"{}", b'{"reason": 7, "more": []}'])
def test_any_object_at_its_place_quarantines(registry: Registry, data: bytes) -> None:
    registry.store.put("quarantine/cup/r-000000000000.json", data)
    found = registry.quarantined("cup", "r-000000000000")
    assert found is not None
    assert found.reason in ("no reason given", "7")


def test_the_record_is_plain_json_under_a_key_of_its_own(registry: Registry, make_draft: MakeDraft) -> None:
    revision = registry.publish(make_draft()).revision
    registry.quarantine("cup", revision, "kps fell", by="me")
    fields = json.loads(registry.store.get(f"quarantine/cup/{revision}.json"))
    assert fields.keys() == {"reason", "created", "by"}


def test_the_revision_to_fall_back_to_is_there_and_in_service(registry: Registry, make_draft: MakeDraft) -> None:
    first, second, third, fourth = (registry.publish(make_draft(seed=seed)).revision for seed in range(4))
    assert registry.previous_revision("cup", "latest", fourth) == third
    registry.quarantine("cup", third, "kps fell")
    assert registry.previous_revision("cup", "latest", fourth) == second
    registry.delete("cup", second)
    assert registry.previous_revision("cup", "latest", fourth) == first
    registry.quarantine("cup", first, "kps fell")
    assert registry.previous_revision("cup", "latest", fourth) is None
    assert registry.previous_revision("cup", "prod", fourth) is None


def test_deleting_a_revision_ends_its_quarantine(registry: Registry, make_draft: MakeDraft) -> None:
    first = registry.publish(make_draft(seed=0)).revision
    registry.publish(make_draft(seed=1))
    registry.quarantine("cup", first, "kps fell")
    registry.delete("cup", first)
    assert registry.quarantined("cup", first) is None
