"""What naming, listing and deleting adapters costs, whatever the registry's size; and the laws of pages."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cat_cluster.errors import AdapterNotFoundError
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.registry.kept import KeptRecords
from cat_cluster.registry.manifest import manifest_bytes
from cat_cluster.registry.objects import draft_objects
from cat_cluster.registry.references import manifest_key, object_key
from cat_cluster.store import LocalStore
from cat_cluster.store.protocol import Entry
from tests.support.counted_stores import CountingStore, fill, sealed

MakeDraft = Callable[..., AdapterDraft]


@pytest.fixture(scope="module")
def template(make_draft: MakeDraft, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Registry(LocalStore(tmp_path_factory.mktemp("one"))).publish(make_draft())


def crowded(folder: Path, template: Manifest, count: int) -> CountingStore:
    fill(folder, template, (f"other-{number:05d}" for number in range(count)))
    return CountingStore(folder)


@pytest.fixture(scope="module")
def sizes(template: Manifest, make_draft: MakeDraft, tmp_path_factory: pytest.TempPathFactory) -> list[CountingStore]:
    """A small registry and one of more adapters than an error looks at; `cup` is in both."""
    stores = [crowded(tmp_path_factory.mktemp("registry"), template, count) for count in (0, 1200)]
    for store in stores:
        Registry(store).publish(make_draft())
    return stores


def cost(store: CountingStore, call: Callable[[], object]) -> int:
    """The calls of the store that something makes, which reads no other adapter than `cup`."""
    store.forget()
    with suppress(AdapterNotFoundError):
        call()
    assert not any("/other-" in key for key in store.read)
    return store.calls.total()


@pytest.mark.parametrize(
    ("named", "most"),
    [
        ("cup", 5),
        ("cup@latest", 5),
        ("cup@prod", 9),
        ("cup@r-000000000000", 2),
        ("nobody", 5),
        ("nobody@r-000000000000", 4),
        ("cup-00001", 5),
    ],
)
def test_one_name_costs_the_same_in_a_registry_of_any_size(sizes: list[CountingStore], named: str, most: int) -> None:
    few, many = (
        {
            "resolve": cost(store, lambda store=store: Registry(store).resolve(named)),
            "look_up": cost(store, lambda store=store: Registry(store).look_up(named)),
            "summary": cost(store, lambda store=store: Registry(store).summary(named.partition("@")[0])),
        }
        for store in sizes
    )
    assert many["look_up"] == few["look_up"] <= 5  # one move is found by three probes
    assert many["summary"] == few["summary"] <= 4
    assert few["resolve"] <= many["resolve"] <= most


def test_an_unknown_name_has_near_ones_in_a_large_registry_too(sizes: list[CountingStore], template: Manifest) -> None:
    store = sizes[1]
    fill(store.folder, template, ["striped-cup"])
    with pytest.raises(AdapterNotFoundError, match=r"did you mean striped-cup\?"):
        Registry(store).resolve("striped-cap")
    assert Registry(store).similar("other-00010x")[0] == "other-00010"
    with pytest.raises(AdapterNotFoundError, match=r"it holds cup, other-00000, .* and more, as `adapters list` says"):
        Registry(store).resolve("zzz")


def test_a_page_reads_its_own_adapters_and_again_only_what_can_change(
    tmp_path: Path, template: Manifest, make_draft: MakeDraft
) -> None:
    store = crowded(tmp_path, template, 300)
    registry = Registry(store)
    page = registry.page(10, after="other-00099")
    assert [one.adapter_id for one in page.adapters] == [f"other-{number:05d}" for number in range(100, 110)]
    assert page.has_more
    assert store.calls == {"entries": 2, "get": 20}  # a manifest and an alias of each
    store.forget()
    assert registry.page(10, after="other-00099") == page
    assert store.calls == {"entries": 2}
    registry.publish(make_draft(adapter_id="other-00104"))
    store.forget()
    changed = registry.page(10, after="other-00099")
    assert len(changed.adapters[4].revisions) == 2
    assert store.calls == {"entries": 2, "get": 2}
    assert registry.page(300).adapters[100:110] == changed.adapters
    store.forget()
    assert len(registry.list()) == 300
    assert store.calls == {"entries": 2}


def test_a_revision_that_was_published_again_is_read_again(registry: Registry, make_draft: MakeDraft) -> None:
    first = registry.publish(make_draft())
    assert registry.list()[0].latest == first.head
    registry.remove_alias("cup", "latest")
    registry.delete("cup", first.revision)
    again = Registry(registry.store).publish(make_draft(metrics={"kps": 0.7}))
    assert again.revision == first.revision
    (found,) = registry.list()
    assert found.latest == again.head != first.head
    assert found.aliases == {"latest": again.revision}


def test_a_record_that_is_mended_is_seen(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(make_draft())
    key = manifest_key("cup", manifest.revision)
    data = registry.store.get(key)
    for damaged, wanted in ((b"{", ()), (data, (manifest.revision,)), (b"", ())):
        registry.store.put(key, damaged)
        (found,) = registry.list()
        assert found.revisions == wanted
        assert found.damaged == (() if wanted else (manifest.revision,))


IDS = ["a", "a-", "a-b", "a-b-c", "a0", "ab", "b", "b-1", "z"]


@given(
    st.sets(st.sampled_from(IDS)),
    st.lists(st.tuples(st.sampled_from(["publish", "delete", "damage"]), st.sampled_from(IDS)), max_size=6),
    st.integers(1, 4),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_hold_each_adapter_once_in_order_whatever_happens_in_between(
    template: Manifest, there: set[str], events: list[tuple[str, str]], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, changed = Path(name), set()
        fill(folder, template, there)
        registry, seen, after = Registry(LocalStore(folder)), list[str](), None
        for event in itertools.chain(events, itertools.repeat(None)):
            page = registry.page(limit, after=after)
            seen += [one.adapter_id for one in page.adapters]
            assert len(page.adapters) == limit or not page.has_more
            if not page.has_more:
                break
            after = page.adapters[-1].adapter_id
            if event is not None:
                action, adapter_id = event
                path = folder / manifest_key(adapter_id, template.revision)
                if action == "publish" and adapter_id not in there and adapter_id not in changed:
                    fill(folder, template, [adapter_id])
                    changed.add(adapter_id)
                elif action == "delete" and path.exists():
                    path.unlink()
                    changed.add(adapter_id)
                elif action == "damage" and path.exists():
                    path.write_bytes(b"{")
        assert seen == sorted(set(seen), key=lambda one: f"{one}/")
        assert there - changed <= set(seen) <= there | changed


def test_damaged_records_are_part_of_their_page(tmp_path: Path, template: Manifest) -> None:
    fill(tmp_path, template, IDS)
    registry = Registry(LocalStore(tmp_path))
    for adapter_id in IDS[::2]:
        registry.store.put(manifest_key(adapter_id, template.revision), b"{")
        registry.store.put(f"aliases/{adapter_id}/latest/00000001.json", b"")
    registry.store.put("adapters/notes.txt", b"")
    registry.store.put("adapters/b/notes.txt", b"")
    registry.store.put("aliases/a-b/notes.txt", b"")
    found = [one for page in registry.pages() for one in page.adapters]
    followed, after = [], None
    while page := registry.page(2, after=after):
        followed += page.adapters
        if not page.has_more:
            break
        after = followed[-1].adapter_id
    assert followed == found
    assert {one.adapter_id: bool(one.damaged and one.damaged_aliases) for one in found} == {
        adapter_id: adapter_id in IDS[::2] for adapter_id in IDS
    }
    assert [len(page.adapters) for page in registry.pages(5)] == [5]
    assert [one.adapter_id for page in registry.pages(3, after="a/"[:1]) for one in page.adapters] == [
        "a0",
        "ab",
        "b-1",
    ]


def test_a_revision_published_while_a_page_is_read_is_the_latest(
    registry: Registry, make_draft: MakeDraft, tmp_path: Path
) -> None:
    registry.publish(make_draft(seed=0))
    published: list[Manifest] = []

    class Meanwhile(LocalStore):
        def entries(self, prefix: str, *, after: str = "") -> Any:
            if prefix.startswith("aliases/"):
                published.append(registry.publish(make_draft(seed=len(published) + 1)))
            return super().entries(prefix, after=after)

    reader = Registry(Meanwhile(tmp_path / "storage"))
    for read in (lambda: reader.page(5).adapters[0], lambda: reader.summary("cup")):
        found = read()
        assert found is not None
        assert found.latest == published[-1].head
        assert published[-1].revision in found.revisions


@pytest.mark.parametrize("count", [0, 300])
def test_deleting_reads_only_what_refers_to_the_adapter(
    tmp_path: Path, template: Manifest, make_draft: MakeDraft, count: int
) -> None:
    store = crowded(tmp_path, template, count)
    old, new = (Registry(store).publish(make_draft(seed=seed)) for seed in range(2))
    removed = cost(store, lambda: Registry(store).delete("cup", old.revision))
    assert removed <= 30
    assert all("/cup/" in key or key.startswith("objects/") for key in store.read)
    assert Registry(store).verify(new.name).ok
    assert set(store.list("objects/")) == {stored.key for stored in new.objects.values()}


def as_before(registry: Registry, draft: AdapterDraft) -> Manifest:
    """Publish a draft as a cat-cluster did that named samples by their content alone."""
    stored = {}
    for name, (one, data) in draft_objects(draft, draft.revision).items():
        suffix = Path(one.key).suffix
        stored[name] = one.model_copy(update={"key": object_key(one.sha256, suffix)})
        registry.store.put(stored[name].key, data)
    data = manifest_bytes(draft, revision=draft.revision, created="2026-01-01T00:00:00+00:00", objects=stored)
    registry.store.put(manifest_key(draft.adapter_id, draft.revision), data)
    return registry.resolve(f"{draft.adapter_id}@{draft.revision}")


def test_samples_that_adapters_shared_before_are_kept_for_the_other(registry: Registry, make_draft: MakeDraft) -> None:
    cup, mug = (as_before(registry, make_draft(adapter_id=name)) for name in ("cup", "mug"))
    assert cup.objects["base.png"].key == mug.objects["base.png"].key
    assert cup.objects["base.png"].key not in registry.delete("cup", cup.revision)
    assert registry.verify(mug.name).ok
    assert set(registry.delete("mug", mug.revision)) == {stored.key for stored in mug.objects.values()}
    assert registry.store.list("objects/") == []


def test_adapters_with_the_same_photos_have_objects_of_their_own(registry: Registry, make_draft: MakeDraft) -> None:
    cup, mug = (registry.publish(make_draft(adapter_id=name)) for name in ("cup", "mug"))
    assert not {one.key for one in cup.objects.values()} & {one.key for one in mug.objects.values()}
    assert cup.objects["base.png"].sha256 == mug.objects["base.png"].sha256


def test_what_is_kept_has_a_bound_and_goes_by_version() -> None:
    kept = KeptRecords[str](most=10)
    one, two, three = (Entry(key, "1") for key in "abc")
    kept.keep(one, "one", 4)
    kept.keep(two, "two", 4)
    assert kept.get(one) == "one"
    kept.keep(three, "three", 4)  # beyond the bound: two was used longest ago
    assert [kept.get(entry) for entry in (one, two, three)] == ["one", None, "three"]
    assert kept.get(Entry("a", "2")) is None
    kept.keep(Entry("a", "2"), "other", 6)
    assert [kept.get(entry) for entry in (one, Entry("a", "2"), three)] == [None, "other", "three"]
    kept.keep(two, "large", 11)
    assert [kept.get(entry) for entry in (Entry("a", "2"), two, three)] == [None, None, None]


def test_a_manifest_of_many_numbers_is_kept_by_its_head(template: Manifest, tmp_path: Path) -> None:
    fill(tmp_path, template, ["cup"])
    path = tmp_path / manifest_key("cup", template.revision)
    path.write_bytes(sealed(template, adapter_id="cup", reference={"embeddings": [[0.1] * 1000] * 100}))
    (found,) = Registry(LocalStore(tmp_path)).list()
    assert found.latest is not None
    assert len(found.latest.model_dump_json()) < 2000
    assert found.latest.metrics == template.metrics
