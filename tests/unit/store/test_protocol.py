"""Keys: what a store may be asked for, by hand and by property."""

from __future__ import annotations

import posixpath
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_cluster.errors import StoreError
from cat_cluster.store.protocol import check_key, check_prefix

SEGMENT = st.text(string.ascii_letters + string.digits + "._=@+-", min_size=1, max_size=30).filter(
    lambda name: not name.startswith(".")
)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "a//b",
        "a/",
        "..",
        "a/../b",
        "./a",
        "a/.hidden",
        "a\\b",
        "a b",
        "a\n",
        "a\0b",
        "C:/x",
        "\u00e9",
        "%2e%2e/a",
        "x" * 181,
        "/".join(["x" * 100] * 10),
    ],
)
def test_keys_that_could_leave_or_confuse_a_store_are_refused(key: str) -> None:
    with pytest.raises(StoreError, match="storage key"):
        check_key(key)


@given(st.lists(SEGMENT, min_size=1, max_size=6))
def test_a_path_of_plain_names_is_a_key_and_its_own_normal_form(segments: list[str]) -> None:
    key = "/".join(segments)
    assert check_key(key) == key
    assert posixpath.normpath(key) == key


@given(st.text(max_size=40))
def test_any_accepted_text_stays_below_the_root(text: str) -> None:
    try:
        key = check_key(text)
    except StoreError:
        return
    joined = posixpath.normpath(posixpath.join("/root/store", key))
    assert joined == f"/root/store/{key}"
    assert not any(part.startswith(".") for part in key.split("/"))


@pytest.mark.parametrize("prefix", ["", "adapters", "adapters/", "aliases/cup/latest/"])
def test_a_prefix_may_be_empty_or_end_in_a_slash(prefix: str) -> None:
    assert check_prefix(prefix) == prefix


@pytest.mark.parametrize("prefix", ["/", "a//", "../", "."])
def test_a_prefix_that_begins_no_key_is_refused(prefix: str) -> None:
    with pytest.raises(StoreError):
        check_prefix(prefix)
