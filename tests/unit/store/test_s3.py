"""The laws of the object store over S3: the same dictionary is the oracle, the server is a real one."""

from __future__ import annotations

import os
import pickle
import uuid
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from cat_cluster.store import open_store, s3
from cat_cluster.store.s3 import S3Store, split_url
from tests.support.counted_stores import count_requests
from tests.unit.store.test_local import AFTER, PREFIXES, STEPS


@given(STEPS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_behaves_as_a_dictionary(s3_bucket: str, steps: list[tuple[str, str, bytes]]) -> None:
    store, oracle = open_store(f"{s3_bucket}/{uuid.uuid4().hex}"), dict[str, bytes]()
    for action, key, data in steps:
        if action == "delete":
            store.delete(key)
            oracle.pop(key, None)
        elif action == "once" and key in oracle:
            with pytest.raises(ObjectExistsError, match="write-once"):
                store.put(key, data, if_absent=True)
        else:
            store.put(key, data, if_absent=action == "once")
            oracle[key] = data
    assert {key: store.get(key) for key in store.list("")} == oracle
    for prefix in PREFIXES:
        wanted = sorted(key for key in oracle if key.startswith(prefix))
        assert store.list(prefix) == wanted
        for after in AFTER:
            assert [entry.key for entry in store.entries(prefix, after=after)] == [key for key in wanted if key > after]
    assert all(store.exists(key) and store.size(key) == len(data) for key, data in oracle.items())


def test_entries_are_read_as_far_as_they_are_asked_for(s3_bucket: str) -> None:
    store = S3Store(f"{s3_bucket}/{uuid.uuid4().hex}", page_size=2)
    for number in range(9):
        store.put(f"many/{number}", b"1")
    requests = count_requests(store)
    entries = store.entries("many/", after="many/2")
    assert [entry.key for entry in islice(entries, 3)] == ["many/3", "many/4", "many/5"]
    assert requests == ["ListObjectsV2"] * 2
    first = {entry.key: entry.version for entry in store.entries("many/")}
    store.put("many/4", b"2")
    again = {entry.key: entry.version for entry in store.entries("many/")}
    assert [key for key in again if again[key] != first[key]] == ["many/4"]


@pytest.mark.parametrize("key", ["absent", "folder", "folder/object/below"])
def test_reading_what_is_no_object_names_the_key(s3_bucket: str, key: str) -> None:
    store = open_store(s3_bucket)
    store.put("folder/object", b"1")
    assert not store.exists(key)
    for read in (store.get, store.size):
        with pytest.raises(ObjectNotFoundError, match=f"{key} in storage {s3_bucket}"):
            read(key)


@pytest.mark.parametrize("key", ["../outside", "/outside", "a/../../outside", ".tmp-1"])
def test_no_key_leaves_the_prefix_or_names_a_hidden_file(key: str) -> None:
    store = open_store("s3://bucket/prefix")
    for use in (store.get, store.exists, store.delete, store.size, store.list, lambda k: store.put(k, b"1")):
        with pytest.raises(StoreError, match="storage key"):
            use(key)


def test_stores_with_other_prefixes_do_not_see_each_other(s3_bucket: str) -> None:
    first, second, whole = (open_store(f"{s3_bucket}{prefix}") for prefix in ("/one", "/one-more/", ""))
    first.put("a", b"1")
    second.put("a", b"2")
    assert (first.get("a"), second.get("a")) == (b"1", b"2")
    assert first.list("") == second.list("") == ["a"]
    assert whole.list("") == ["one-more/a", "one/a"]


def test_a_store_is_pickled_by_its_address_and_options(s3_bucket: str) -> None:
    store = S3Store(f"{s3_bucket}/p/", retry_seconds=3, page_size=2)
    for number in range(5):
        store.put(f"k{number}", bytes([number]))
    copy = pickle.loads(pickle.dumps(store))
    assert copy.url == f"{s3_bucket}/p"
    assert copy.list("") == [f"k{number}" for number in range(5)]
    assert copy.get("k3") == b"\3"


def test_a_forked_child_reads_and_writes_beside_its_parent(s3_bucket: str) -> None:
    store = open_store(s3_bucket)
    store.put("from-parent", b"1")
    child = os.fork()
    if child == 0:
        try:
            store.put("from-child", store.get("from-parent"))
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(20):
        assert store.get("from-parent") == b"1"
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("from-child") == b"1"


def test_addresses() -> None:
    assert split_url("s3://bucket") == split_url("s3://bucket/") == ("bucket", "")
    assert split_url("s3://my.bucket-1/a/b c/") == ("my.bucket-1", "a/b c")
    assert open_store("S3://bucket/prefix/").url == "s3://bucket/prefix"


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///prefix", "s3://b", "s3://a_b!/x", "s3://bucket/a b", "s3://bucket/../x"]
)
def test_addresses_that_name_no_storage_are_refused(url: str) -> None:
    with pytest.raises(StoreError):
        open_store(url)


def test_a_server_that_ignores_if_none_match_is_refused(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two writers of one key both would win there; the header is taken away on its way to a real server."""
    make = s3._make_client

    def drop_condition(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)

    def careless() -> Any:
        client = make()
        client.meta.events.register("before-call.s3.PutObject", drop_condition)
        return client

    open_store(s3_bucket).check_access()
    monkeypatch.setattr(s3, "_make_client", careless)
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        open_store(s3_bucket).check_access()
