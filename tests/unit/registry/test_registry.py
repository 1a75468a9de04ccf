"""Publishing, finding, aliasing and deleting adapters in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from diffusers import UNet2DConditionModel

from cat_cluster.errors import AdapterFormatError, AdapterNotFoundError, ObjectNotFoundError, RegistryError, StoreError
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.registry import AdapterDraft, Manifest, Registry, revision_of
from cat_cluster.registry.manifest import StoredObject
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.store import LocalStore

MakeDraft = Callable[..., AdapterDraft]


def stored_keys(registry: Registry, prefix: str = "") -> set[str]:
    return set(registry.store.list(prefix))


def assert_same(one: AdapterWeights, other: AdapterWeights) -> None:
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        assert torch.equal(layer.down, other.layers[name].down)
        assert torch.equal(layer.up, other.layers[name].up)


def test_what_is_published_comes_back(registry: Registry, make_draft: MakeDraft, unet: UNet2DConditionModel) -> None:
    draft = make_draft()
    manifest = registry.publish(draft)
    assert registry.resolve("cup") == manifest == registry.resolve("cup@latest") == registry.resolve(manifest.name)
    assert_same(registry.load_weights(manifest, base_fingerprints=[draft.base_fingerprint], unet=unet), draft.weights)
    assert {name: registry.read_object(manifest, name) for name in manifest.samples} == draft.samples
    assert manifest.metrics == draft.metrics
    assert manifest.training == draft.training
    assert (manifest.rank, manifest.method, manifest.targets, manifest.concepts[0].token) == (
        2,
        "cat",
        "attention_ff",
        "sks",
    )
    assert manifest.concepts[0].alpha == 2.0
    assert ResolvedAdapter.model_validate(manifest.spec) == draft.resolved
    report = registry.verify("cup", base_fingerprints=[draft.base_fingerprint], unet=unet)
    assert (report.ok, report.objects) == (True, 3)


def test_objects_are_named_by_their_content_and_samples_by_their_adapter_too(
    registry: Registry, make_draft: MakeDraft
) -> None:
    manifest = registry.publish(make_draft())
    assert stored_keys(registry, "objects/") == {stored.key for stored in manifest.objects.values()}
    for name, stored in manifest.objects.items():
        digest = hashlib.sha256(registry.store.get(stored.key)).hexdigest()
        named = digest if name == "weights" else hashlib.sha256(f"cup\n{digest}".encode()).hexdigest()
        assert (stored.sha256, Path(stored.key).stem) == (digest, named)


def test_the_weights_are_a_diffusers_file_that_says_what_it_is(
    registry: Registry, make_draft: MakeDraft, tmp_path: Path
) -> None:
    manifest = registry.publish(make_draft())
    file = tmp_path / "weights.safetensors"
    file.write_bytes(registry.read_object(manifest, "weights"))
    with safetensors.safe_open(file, "pt") as opened:
        metadata, keys = opened.metadata(), list(opened.keys())
    assert metadata["cat_cluster.adapter_id"] == "cup"
    assert metadata["cat_cluster.revision"] == manifest.revision
    assert metadata["cat_cluster.base_fingerprint"] == manifest.base_fingerprint
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert keys
    assert all(key.startswith("unet.") for key in keys)


def test_a_revision_depends_on_everything_that_decides_an_adapter(make_draft: MakeDraft) -> None:
    draft = make_draft()

    def name(**changes: Any) -> str:
        arguments = {
            "adapter_id": "cup",
            "resolved": draft.resolved,
            "image_digests": draft.image_digests,
            "base_fingerprint": draft.base_fingerprint,
        }
        return revision_of(**{**arguments, **changes})

    changed = [
        name(),
        name(adapter_id="mug"),
        name(resolved=make_draft(seed=1).resolved),
        name(image_digests=["1" * 64]),
        name(image_digests=["2" * 64, "1" * 64]),
        name(base_fingerprint="c" * 64),
        name(training_version=1),
    ]
    assert len(set(changed)) == len(changed)
    assert name() == name()


def test_revisions_of_training_version_two_are_those_of_package_0_2(make_draft: MakeDraft) -> None:
    """The formula of that time, written out: what was published then is found now."""
    draft = make_draft()
    identity = {
        "adapter_id": "cup",
        "base_fingerprint": draft.base_fingerprint,
        "image_digests": list(draft.image_digests),
        "minor_version": ["0", "2"],
        "spec": draft.resolved.digest(),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    expected = f"r-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"
    assert revision_of("cup", draft.resolved, draft.image_digests, draft.base_fingerprint, 2) == expected


def test_a_draft_is_published_under_the_training_version_it_names(registry: Registry, make_draft: MakeDraft) -> None:
    revisions = {registry.publish(make_draft(training_version=version)).revision for version in (0, 1, 2, 2)}
    assert len(revisions) == 3


def test_publishing_again_returns_the_first_manifest(registry: Registry, make_draft: MakeDraft) -> None:
    first = registry.publish(make_draft())
    before = stored_keys(registry)
    again = registry.publish(make_draft(metrics={"kps": 0.9}, samples={"other.png": b"other"}))
    assert again == first
    assert stored_keys(registry) == before
    assert len(registry.alias_history("cup", "latest")) == 1


def test_publishing_an_older_revision_again_does_not_take_latest_back(
    registry: Registry, make_draft: MakeDraft
) -> None:
    registry.publish(make_draft(seed=0))
    newer = registry.publish(make_draft(seed=1))
    registry.publish(make_draft(seed=0))
    assert registry.resolve("cup") == newer


def test_publishing_again_finishes_a_move_of_latest_that_was_cut_off(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(make_draft())
    registry.store.delete("aliases/cup/latest/00000001.json")
    with pytest.raises(AdapterNotFoundError, match="no alias 'latest'"):
        Registry(registry.store).resolve("cup")
    Registry(registry.store).publish(make_draft())
    assert Registry(registry.store).resolve("cup") == manifest


def test_a_rejected_revision_is_stored_without_latest(registry: Registry, make_draft: MakeDraft) -> None:
    good = registry.publish(make_draft(seed=0))
    rejected = registry.publish(make_draft(seed=1, status="rejected"))
    assert registry.resolve("cup") == good
    assert registry.resolve(rejected.name).status == "rejected"
    alone = registry.publish(make_draft(adapter_id="mug", status="rejected"))
    with pytest.raises(AdapterNotFoundError, match=rf"aliases are none, its revisions {alone.revision}"):
        registry.resolve("mug")


def test_numbers_that_are_not_finite_become_null(registry: Registry, make_draft: MakeDraft) -> None:
    history = {"sks": [0.5, float("nan"), float("inf")]}
    manifest = registry.publish(make_draft(training={"history": history}, metrics={"kps": float("-inf")}))
    assert manifest.training == {"history": {"sks": [0.5, None, None]}}
    assert registry.resolve("cup").metrics == {"kps": None}


def test_what_is_no_json_is_refused_and_leaves_nothing(registry: Registry, make_draft: MakeDraft) -> None:
    with pytest.raises(RegistryError, match="Tensor"):
        registry.publish(make_draft(metrics={"kps": torch.zeros(1)}))
    assert stored_keys(registry) == set()


@pytest.mark.parametrize("name", ["weights", "../x.png", "a/b.png", ".hidden", "", "a\n"])
def test_a_sample_with_a_bad_name_is_refused_and_leaves_nothing(
    registry: Registry, make_draft: MakeDraft, name: str
) -> None:
    with pytest.raises(RegistryError, match="another name"):
        registry.publish(make_draft(samples={name: b"x"}))
    assert stored_keys(registry) == set()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(
    registry: Registry, make_draft: MakeDraft, make_weights: Callable[..., AdapterWeights], number: float
) -> None:
    with pytest.raises(AdapterFormatError, match="finite"):
        registry.publish(make_draft(weights=make_weights(broken=number)))
    assert stored_keys(registry) == set()


def test_a_draft_with_the_spec_of_another_adapter_is_refused(registry: Registry, make_draft: MakeDraft) -> None:
    with pytest.raises(RegistryError, match="'mug'"):
        registry.publish(make_draft(resolved=make_draft(adapter_id="mug").resolved))


def test_listing_tells_every_adapter(registry: Registry, make_draft: MakeDraft) -> None:
    assert registry.list() == []
    old = registry.publish(make_draft(seed=0))
    new = registry.publish(make_draft(seed=1))
    mug = registry.publish(make_draft(adapter_id="mug", status="rejected"))
    registry.set_alias("cup", "prod", old.revision)
    cup, other = registry.list()
    assert (cup.adapter_id, other.adapter_id) == ("cup", "mug")
    assert cup.revisions == (new.revision, old.revision)
    assert cup.latest == new.head
    assert cup.aliases == registry.aliases("cup") == {"latest": new.revision, "prod": old.revision}
    assert json.loads(cup.model_dump_json())["latest"]["metrics"] == new.metrics
    assert (other.latest, other.revisions, other.aliases) == (None, (mug.revision,), {})
    assert [manifest.revision for manifest in registry.revisions("cup")] == [new.revision, old.revision]


def test_the_history_rolls_an_alias_back(registry: Registry, make_draft: MakeDraft) -> None:
    old = registry.publish(make_draft(seed=0))
    new = registry.publish(make_draft(seed=1))
    earlier = registry.alias_history("cup", "latest")[-2]
    assert earlier.revision == old.revision
    registry.set_alias("cup", "latest", earlier.revision)
    assert registry.resolve("cup") == old
    revisions = [entry.revision for entry in registry.alias_history("cup", "latest")]
    assert revisions == [old.revision, new.revision, old.revision]


def test_unknown_names_list_what_is_near(registry: Registry, make_draft: MakeDraft) -> None:
    with pytest.raises(AdapterNotFoundError, match="holds none yet"):
        registry.resolve("cup")
    manifest = registry.publish(make_draft(adapter_id="striped-cup"))
    registry.publish(make_draft(adapter_id="tea-party"))
    with pytest.raises(AdapterNotFoundError, match=r"did you mean striped-cup\?"):
        registry.resolve("stripped-cup")
    with pytest.raises(AdapterNotFoundError, match="it holds striped-cup, tea-party"):
        registry.resolve("zzz")
    with pytest.raises(AdapterNotFoundError, match=rf"no revision r-000000000000.*it has {manifest.revision}"):
        registry.resolve("striped-cup@r-000000000000")
    with pytest.raises(AdapterNotFoundError, match=r"no alias 'prod'.*its aliases are latest"):
        registry.resolve("striped-cup@prod")
    for call in (registry.revisions, lambda name: registry.delete(name, manifest.revision)):
        with pytest.raises(AdapterNotFoundError, match="did you mean striped-cup"):
            call("striped-cap")
    with pytest.raises(AdapterNotFoundError, match="no revision"):
        registry.set_alias("striped-cup", "prod", "r-000000000000")
    assert registry.alias_history("striped-cup", "prod") == []


def test_delete_is_refused_while_an_alias_points_there(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(make_draft())
    registry.set_alias("cup", "prod", manifest.revision)
    before = stored_keys(registry)
    with pytest.raises(RegistryError, match=r"alias 'latest', 'prod' points at it.*remove the alias"):
        registry.delete("cup", manifest.revision)
    assert stored_keys(registry) == before


def test_delete_takes_the_objects_that_nothing_else_names(registry: Registry, make_draft: MakeDraft) -> None:
    old = registry.publish(make_draft(seed=0))
    new = registry.publish(make_draft(seed=1))
    shared = old.objects["base.png"].key
    assert shared == new.objects["base.png"].key
    removed = registry.delete("cup", old.revision)
    assert set(removed) == {stored.key for stored in old.objects.values()} - {shared}
    assert stored_keys(registry, "objects/") == {stored.key for stored in new.objects.values()}
    assert registry.verify("cup").ok
    with pytest.raises(AdapterNotFoundError):
        registry.resolve(old.name)


def test_the_last_revision_goes_once_its_aliases_are_removed(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(make_draft())
    registry.remove_alias("cup", "latest")
    assert registry.aliases("cup") == {}
    with pytest.raises(AdapterNotFoundError, match="no alias 'latest'"):
        registry.remove_alias("cup", "latest")
    registry.delete("cup", manifest.revision)
    assert registry.list() == []
    assert stored_keys(registry, "objects/") == set()
    again = registry.publish(make_draft())
    assert registry.resolve("cup") == again


class Meanwhile(LocalStore):
    """A folder store in which somebody else acts right after each deletion by this one."""

    def __init__(self, folder: Path, act: Callable[[str], None]) -> None:
        super().__init__(folder)
        self.act = act

    def delete(self, key: str) -> None:
        super().delete(key)
        self.act(key)


def test_an_alias_moved_during_a_delete_wins(registry: Registry, make_draft: MakeDraft, tmp_path: Path) -> None:
    old = registry.publish(make_draft(seed=0))
    registry.publish(make_draft(seed=1))

    def move(key: str) -> None:
        # The other process checked the manifest before it was removed, and writes its move now.
        entry = {"revision": old.revision, "created": "now", "nonce": "theirs"}
        registry.store.put("aliases/cup/prod/00000001.json", json.dumps(entry).encode())

    with pytest.raises(RegistryError, match="alias 'prod' points at it"):
        Registry(Meanwhile(tmp_path / "storage", move)).delete("cup", old.revision)
    assert registry.resolve("cup@prod") == old
    assert registry.verify("cup@prod").ok


def test_a_delete_during_a_move_takes_the_move_back(registry: Registry, make_draft: MakeDraft, tmp_path: Path) -> None:
    old = registry.publish(make_draft(seed=0))
    new = registry.publish(make_draft(seed=1))

    class Deleting(LocalStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            if old.revision.encode() in data:
                registry.delete("cup", old.revision)
            super().put(key, data, if_absent=if_absent)

    with pytest.raises(AdapterNotFoundError, match="no revision"):
        Registry(Deleting(tmp_path / "storage")).set_alias("cup", "latest", old.revision)
    assert registry.resolve("cup") == new


def test_a_publish_during_a_delete_keeps_the_objects_it_shares(
    registry: Registry, make_draft: MakeDraft, tmp_path: Path
) -> None:
    old = registry.publish(make_draft(seed=0))
    registry.publish(make_draft(seed=1, samples={}))
    published: list[Manifest] = []

    def publish(key: str) -> None:
        # The other publisher had put its objects, this one among them, and writes its manifest just now.
        if key == old.objects["base.png"].key and not published:
            published.append(registry.publish(make_draft(seed=2)))
            registry.store.delete(key)

    removed = Registry(Meanwhile(tmp_path / "storage", publish)).delete("cup", old.revision)
    assert old.objects["base.png"].key not in removed
    assert registry.verify(published[0].name).problems == ()


def test_a_delete_during_a_publish_is_made_good(registry: Registry, make_draft: MakeDraft, tmp_path: Path) -> None:
    old = registry.publish(make_draft(seed=0))
    registry.remove_alias("cup", "latest")
    shared: StoredObject = old.objects["base.png"]

    class Deleting(LocalStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            if key.endswith("manifest.json"):
                assert shared.key in registry.delete("cup", old.revision)
                with pytest.raises(ObjectNotFoundError):
                    registry.store.get(shared.key)
            super().put(key, data, if_absent=if_absent)

    new = Registry(Deleting(tmp_path / "storage")).publish(make_draft(seed=1))
    assert registry.verify(new.name).problems == ()


def test_a_lost_race_is_no_error_where_nothing_may_be_deleted(
    registry: Registry, make_draft: MakeDraft, tmp_path: Path
) -> None:
    class Late(LocalStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            if key.endswith("manifest.json"):
                registry.publish(make_draft(seed=0))
            super().put(key, data, if_absent=if_absent)

        def delete(self, key: str) -> None:
            raise StoreError("no right to delete")

    own = make_draft(seed=0, weights=make_draft(seed=9).weights)  # one revision, with other bits
    manifest = Registry(Late(tmp_path / "storage")).publish(own)
    assert [manifest] == registry.revisions("cup")
    assert registry.verify(manifest.name).ok
