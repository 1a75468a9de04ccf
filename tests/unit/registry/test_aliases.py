"""Aliases: a Python list is the oracle of their history."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cat_cluster.errors import RegistryError
from cat_cluster.registry.aliases import AliasBook
from cat_cluster.store import LocalStore

REVISIONS = [f"r-{number:012x}" for number in range(12)]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_the_history_is_every_move_in_order(store: LocalStore) -> None:
    book, wanted = AliasBook(store), [*REVISIONS, None, REVISIONS[0]]
    assert book.current("cup", "prod") is None
    assert book.history("cup", "prod") == []
    for revision in wanted:
        moved = book.move("cup", "prod", revision)
        assert moved == book.current("cup", "prod")
    assert [entry.revision for entry in book.history("cup", "prod")] == wanted
    assert [entry.number for entry in AliasBook(store).history("cup", "prod")] == list(range(1, len(wanted) + 1))
    assert book.names("cup") == ["prod"]
    assert book.names("cu") == []


def test_a_reader_sees_the_moves_of_others_and_never_lists(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = AliasBook(store), AliasBook(store)
    writer.move("cup", "prod", REVISIONS[0])
    assert reader.current("cup", "prod") == writer.current("cup", "prod")
    monkeypatch.setattr(LocalStore, "entries", None)
    for revision in REVISIONS:
        writer.move("cup", "prod", revision)
        current = reader.current("cup", "prod")
        assert current is not None
        assert current.revision == revision


def test_lost_races_take_the_next_number(store: LocalStore) -> None:
    class Overtaken(LocalStore):
        """The other writer takes the number that this one is about to write, twice."""

        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            if len(AliasBook(store).history("cup", "prod")) < 2:
                AliasBook(store).move("cup", "prod", REVISIONS[1])
            super().put(key, data, if_absent=if_absent)

    moved = AliasBook(Overtaken(store.folder)).move("cup", "prod", REVISIONS[0])
    history = AliasBook(store).history("cup", "prod")
    assert [entry.revision for entry in history] == [REVISIONS[1], REVISIONS[1], REVISIONS[0]]
    assert history[-1] == moved


def test_a_put_that_a_store_reports_as_lost_but_was_ours_counts(store: LocalStore) -> None:
    """S3 answers 412 to its client's own retry of a put that went through; the nonce tells."""

    class Retrying(LocalStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            super().put(key, data, if_absent=if_absent)
            super().put(key, data, if_absent=if_absent)

    book = AliasBook(Retrying(store.folder))
    moved = book.move("cup", "prod", REVISIONS[0])
    assert book.history("cup", "prod") == [moved]


def test_a_move_can_be_called_off_by_what_the_history_says(store: LocalStore) -> None:
    book = AliasBook(store)
    book.move("cup", "prod", REVISIONS[0])
    assert book.move("cup", "prod", REVISIONS[1], unless=lambda moves: next(moves).number == 1) is None
    assert len(book.history("cup", "prod")) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b"null",
        b'{"revision": 5, "created": "", "nonce": ""}',
        b'{"revision": "../x", "created": "", "nonce": ""}',
        b'{"revision": null, "created": null, "nonce": ""}',
        b'{"revision": null, "created": "", "nonce": ["x"]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_record_is_named(store: LocalStore, data: bytes) -> None:
    book = AliasBook(store)
    book.move("cup", "prod", REVISIONS[0])
    store.put("aliases/cup/prod/00000001.json", data)
    with pytest.raises(RegistryError, match=r"aliases/cup/prod/00000001.json is damaged .*backup, or set alias"):
        book.current("cup", "prod")


def test_a_damaged_record_is_mended_by_setting_the_alias_again(store: LocalStore) -> None:
    book = AliasBook(store)
    book.move("cup", "prod", REVISIONS[0])
    store.put("aliases/cup/prod/00000001.json", b"")
    book.move("cup", "prod", REVISIONS[1])
    current = AliasBook(store).current("cup", "prod")
    assert current is not None
    assert (current.number, current.revision) == (2, REVISIONS[1])
    assert book.move("cup", "prod", REVISIONS[2], unless=lambda moves: next(moves).revision == REVISIONS[2])


def test_what_can_be_read_is_read_and_the_rest_named(store: LocalStore) -> None:
    book = AliasBook(store)
    for alias in ("empty", "gone", "good", "removed"):
        book.move("cup", alias, REVISIONS[0])
        book.move("cup", alias, None if alias == "removed" else REVISIONS[1])
    store.put("aliases/cup/empty/00000002.json", b"")
    store.delete("aliases/cup/gone/00000001.json")
    for stray in ("notes.txt", "LATEST/00000001.json", "notes/read.me", "r-1/00000001.json"):
        store.put(f"aliases/cup/{stray}", b"")
    assert AliasBook(store).readable("cup", store.entries("aliases/cup/")) == (
        {"good": REVISIONS[1]},
        ["empty", "gone"],
    )


def test_a_gap_in_the_records_is_named(store: LocalStore) -> None:
    for revision in REVISIONS[:3]:
        AliasBook(store).move("cup", "prod", revision)
    store.delete("aliases/cup/prod/00000002.json")
    with pytest.raises(RegistryError, match=r"00000002.json is missing .*mounted.*backup") as caught:
        AliasBook(store).history("cup", "prod")
    assert "remove" not in str(caught.value)  # the storage may not be whole


def test_stray_files_are_not_records(store: LocalStore) -> None:
    store.put("aliases/cup/prod/notes.txt", b"x")
    store.put("aliases/cup/prod/9.json", b"x")
    moved = AliasBook(store).move("cup", "prod", REVISIONS[0])
    assert moved is not None
    assert moved.number == 1
    assert set(json.loads(store.get("aliases/cup/prod/00000001.json"))) == {"revision", "created", "nonce"}


@pytest.mark.parametrize("moves", [*range(1, 20), 33, 64, 100])
def test_the_last_move_is_found_with_few_probes_and_no_listing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    for number in range(1, moves + 1):
        record = json.dumps({"revision": REVISIONS[number % 12], "created": "", "nonce": str(number)})
        store.put(f"aliases/cup/prod/{number:08d}.json", record.encode())
    probes = []
    exists = LocalStore.exists
    monkeypatch.setattr(LocalStore, "entries", None)
    monkeypatch.setattr(LocalStore, "exists", lambda self, key: probes.append(key) or exists(self, key))
    book = AliasBook(store)
    for wanted in (2 * moves.bit_length() + 1, 1):  # and one probe once it is known
        probes.clear()
        current = book.current("cup", "prod")
        assert current is not None
        assert current.number == moves
        assert len(probes) <= wanted


def test_names_that_do_not_exist_leave_nothing_behind(store: LocalStore) -> None:
    book = AliasBook(store)
    for number in range(50):
        assert book.current(f"no-{number}", "latest") is None
    assert book._known == {}


def test_the_revisions_before_one_are_the_latest_first_and_each_once(store: LocalStore) -> None:
    book = AliasBook(store)
    one, two, three = REVISIONS[:3]
    for revision in (one, two, one, None, three, two):
        book.move("cup", "prod", revision)
    assert list(book.revisions_before("cup", "prod", two)) == [three, one]
    assert list(book.revisions_before("cup", "prod", three)) == [one, two]
    assert list(book.revisions_before("cup", "prod", REVISIONS[9])) == []
    assert list(book.revisions_before("mug", "prod", two)) == []
