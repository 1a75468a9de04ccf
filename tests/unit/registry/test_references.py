"""References, ids, aliases and revisions: what is refused before any storage key is made of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from cat_cluster.errors import RegistryError
from cat_cluster.registry import Registry
from cat_cluster.registry.references import (
    Reference,
    alias_prefix,
    manifest_key,
    object_key,
    parse_reference,
    split_manifest_key,
)
from cat_cluster.spec.fields import AdapterId
from cat_cluster.store.protocol import check_key

IDS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
REVISIONS = st.from_regex(r"r-[0-9a-f]{12}", fullmatch=True)
ALIASES = IDS.filter(lambda name: not name.startswith("r-"))
TRICKS = ["..", "../x", "a/b", "/a", "A", "a.b", "a\n", "", "-a", "a" * 64, "a\0", "\u0430", "a b", "%2e", ".", "a\\b"]


@given(IDS, REVISIONS, ALIASES)
def test_the_three_forms_come_apart_again(adapter_id: str, revision: str, alias: str) -> None:
    assert parse_reference(adapter_id) == Reference(adapter_id, None, "latest") == Reference(adapter_id)
    assert parse_reference(f"{adapter_id}@{alias}") == Reference(adapter_id, None, alias)
    assert parse_reference(f"{adapter_id}@{revision}") == Reference(adapter_id, revision)
    for reference in (adapter_id, f"{adapter_id}@{alias}", f"{adapter_id}@{revision}"):
        parsed = parse_reference(reference)
        assert parse_reference(str(parsed)) == parsed


@given(IDS, REVISIONS, ALIASES)
def test_every_key_is_one_that_stores_accept(adapter_id: str, revision: str, alias: str) -> None:
    key = manifest_key(adapter_id, revision)
    assert split_manifest_key(check_key(key)) == (adapter_id, revision)
    check_key(f"{alias_prefix(adapter_id, alias)}00000001.json")


@given(st.text(max_size=20))
def test_any_text_is_a_sound_reference_or_refused(text: str) -> None:
    try:
        parsed = parse_reference(text)
    except RegistryError:
        return
    check_key(alias_prefix(parsed.adapter_id, parsed.alias).rstrip("/"))
    assert "/" not in parsed.adapter_id + parsed.alias + (parsed.revision or "")


@pytest.mark.parametrize("trick", TRICKS)
def test_path_tricks_never_reach_the_store(registry: Registry, trick: str) -> None:
    revision = "r-0123456789ab"
    calls: list[Callable[[], object]] = [
        lambda: registry.resolve(trick),
        lambda: registry.resolve(f"cup@{trick}"),
        lambda: registry.resolve(f"cup@r-{trick}"),
        lambda: registry.set_alias(trick, "latest", revision),
        lambda: registry.set_alias("cup", trick, revision),
        lambda: registry.remove_alias("cup", trick),
        lambda: registry.revisions(trick),
        lambda: registry.aliases(trick),
        lambda: registry.alias_history(trick, "latest"),
        lambda: registry.alias_history("cup", trick),
        lambda: registry.set_alias("cup", "latest", trick),
        lambda: registry.delete(trick, revision),
        lambda: registry.delete("cup", trick),
        lambda: registry.verify(trick),
        lambda: registry.resolve(Reference(trick)),
        lambda: registry.resolve(Reference("cup", trick)),
        lambda: registry.look_up(Reference("cup", alias=trick)),
    ]
    for call in calls:
        with pytest.raises(RegistryError, match=r"is not an? (adapter id|alias|revision)"):
            call()


@pytest.mark.parametrize("name", ["a+b", "+", "a+", "cup+mug"])
def test_no_name_has_the_sign_between_the_adapters_of_a_stack(registry: Registry, name: str) -> None:
    """So `a+b` is always two adapters: no job, import or alias can make one that is called so."""
    with pytest.raises(ValidationError, match="should match pattern"):
        TypeAdapter(AdapterId).validate_python(name)
    for make in (
        lambda: manifest_key(name, "r-0123456789ab"),
        lambda: registry.set_alias("cup", name, "r-0123456789ab"),
        lambda: Reference(name),
        lambda: Reference("cup", alias=name),
        lambda: parse_reference(f"cup@r-0123456789ab{name}"),
    ):
        with pytest.raises(RegistryError, match="is not a"):
            make()


@pytest.mark.parametrize("revision", ["r-", "r-0123456789a", "r-0123456789abc", "r-0123456789AB", "r-latest"])
def test_what_begins_as_a_revision_must_be_one(revision: str) -> None:
    with pytest.raises(RegistryError, match="12 hex digits"):
        parse_reference(f"cup@{revision}")
    with pytest.raises(RegistryError, match="is not an alias"):
        alias_prefix("cup", revision)


@pytest.mark.parametrize(
    "key",
    ["adapters/cup/manifest.json", "adapters/cup/r-0123456789ab/manifest.json.bak", "adapters/cup/x/manifest.json"],
)
def test_other_files_among_the_manifests_are_no_manifests(key: str) -> None:
    assert split_manifest_key(key) is None


def test_an_object_key_keeps_only_a_plain_suffix() -> None:
    digest = "a" * 64
    assert object_key(digest, ".png") == f"objects/{digest}.png"
    assert object_key(digest, "./x") == f"objects/{digest}"
    with pytest.raises(RegistryError):
        object_key("../x")
