"""Damaged, tampered, foreign and half-written adapters: each is one clear error, and is reported by verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from cat_cluster.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    CatClusterError,
    ObjectNotFoundError,
    RegistryError,
)
from cat_cluster.lora.formats import AdapterWeights, LoraLayer, to_safetensors
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.registry.manifest import StoredObject, manifest_bytes, sha256
from cat_cluster.registry.references import manifest_key, object_key

MakeDraft = Callable[..., AdapterDraft]
MakeWeights = Callable[..., AdapterWeights]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def rewritten(registry: Registry, manifest: Manifest, draft: AdapterDraft, weights: bytes) -> Manifest:
    """Put other weights under a revision with every digest right, as a faulty publisher would have."""
    stored = StoredObject(key=object_key(sha256(weights), ".safetensors"), size=len(weights), sha256=sha256(weights))
    registry.store.put(stored.key, weights)
    objects = {**manifest.objects, "weights": stored}
    data = manifest_bytes(draft, revision=manifest.revision, created=manifest.created, objects=objects)
    registry.store.put(manifest_key("cup", manifest.revision), data)
    return registry.resolve("cup")


@pytest.mark.parametrize("name", ["weights", "token.png"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, "not those that were published"),
        (lambda data: data[:-1], "bytes and must have"),
        (lambda data: b"", "has 0 bytes"),
        (lambda data: data + b"x", "bytes and must have"),
    ],
)
def test_a_changed_object_is_refused_and_named(
    registry: Registry, make_draft: MakeDraft, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    manifest = registry.publish(make_draft())
    key = manifest.objects[name].key
    registry.store.put(key, damage(registry.store.get(key)))
    with pytest.raises(AdapterFormatError, match=message) as caught:
        registry.read_object(manifest, name)
    for part in (name, manifest.name, key, "backup"):
        assert part in str(caught.value)
    if name == "weights":
        with pytest.raises(AdapterFormatError, match=message):
            registry.load_weights(manifest)
    report = registry.verify("cup")
    assert not report.ok
    assert report.problems == (str(caught.value),)


def test_verify_reports_every_problem_at_once(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(make_draft())
    registry.store.delete(manifest.objects["base.png"].key)
    for name in ("weights", "token.png"):
        key = manifest.objects[name].key
        registry.store.put(key, flipped(registry.store.get(key)))
    problems = registry.verify("cup").problems
    assert [problem.split()[0] for problem in problems] == ["base.png", "token.png", "weights"]
    with pytest.raises(ObjectNotFoundError, match=r"base\.png of cup@.* is missing"):
        registry.read_object(manifest, "base.png")
    with pytest.raises(RegistryError, match=r"no object 'other\.png': it has base\.png, token\.png, weights"):
        registry.read_object(manifest, "other.png")


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_stored_weights_that_are_not_finite_are_refused(
    registry: Registry, make_draft: MakeDraft, make_weights: MakeWeights, number: float
) -> None:
    draft = make_draft()
    data = to_safetensors(make_weights(broken=number), "diffusers", {})
    manifest = rewritten(registry, registry.publish(draft), draft, data)
    with pytest.raises(AdapterFormatError, match=r"weights of cup@.*finite"):
        registry.load_weights(manifest)
    assert "finite" in registry.verify("cup").problems[0]


def test_stored_weights_of_another_rank_are_refused(
    registry: Registry, make_draft: MakeDraft, make_weights: MakeWeights
) -> None:
    draft = make_draft()
    data = to_safetensors(make_weights(rank=3), "diffusers", {})
    manifest = rewritten(registry, registry.publish(draft), draft, data)
    with pytest.raises(AdapterFormatError, match="rank 3, its manifest says 2"):
        registry.load_weights(manifest)


def test_stored_weights_that_change_text_encoders_behind_the_manifests_back_are_refused(
    registry: Registry, make_draft: MakeDraft, make_weights: MakeWeights
) -> None:
    """The service begins a text before the weights are there, by what the manifest says."""
    draft, weights = make_draft(), make_weights()
    more = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": LoraLayer(torch.ones(2, 16), torch.ones(32, 2))}
    data = to_safetensors(AdapterWeights({**weights.layers, **more}), "diffusers", {})
    manifest = rewritten(registry, registry.publish(draft), draft, data)
    with pytest.raises(AdapterFormatError, match="change 1 layers of text encoders, its manifest says 0"):
        registry.load_weights(manifest)


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(100), b"\xff" * 64])
def test_stored_weights_that_are_no_safetensors_are_refused(
    registry: Registry, make_draft: MakeDraft, data: bytes
) -> None:
    draft = make_draft()
    manifest = rewritten(registry, registry.publish(draft), draft, data)
    with pytest.raises(AdapterFormatError, match=manifest.objects["weights"].key):
        registry.load_weights(manifest)
    assert not registry.verify("cup").ok


def test_another_base_is_refused_by_name(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(draft := make_draft())
    with pytest.raises(AdapterMismatchError, match=r"trained on base 'pocket'.*bbbbbbbbbbbb.*cccccccccccc.*train"):
        registry.load_weights(manifest, base_fingerprints=["c" * 64])
    earlier = ["c" * 64, manifest.base_fingerprint]
    assert registry.load_weights(manifest, base_fingerprints=earlier).digest() == draft.weights.digest()
    assert "trained on base 'pocket'" in registry.verify("cup", base_fingerprints=["c" * 64]).problems[0]


def test_weights_that_do_not_fit_the_unet_are_refused(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(make_draft())
    other = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with pytest.raises(AdapterMismatchError, match="attn"):
        registry.load_weights(manifest, unet=other)
    assert not registry.verify("cup", unet=other).ok


def change(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **fields}).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "not JSON"),
        (lambda data: b"", "not JSON"),
        (lambda data: b"\xff\xfe", "not JSON"),
        (lambda data: b"[]", "not a JSON object"),
        (change(metrics={"kps": 0.99}), "checksum"),
        (change(rank=3), "checksum"),
        (change(checksum=None), "checksum"),
        (change(schema_version=2), "upgrade"),
    ],
)
def test_a_changed_manifest_is_refused_named_and_hides_no_other(
    registry: Registry, make_draft: MakeDraft, damage: Callable[[bytes], bytes], message: str
) -> None:
    good = registry.publish(make_draft(seed=0))
    bad = registry.publish(make_draft(seed=1))
    key = manifest_key("cup", bad.revision)
    registry.store.put(key, damage(registry.store.get(key)))
    with pytest.raises(RegistryError, match=message) as caught:
        registry.resolve("cup")
    assert key in str(caught.value)
    assert registry.verify("cup").problems == (str(caught.value),)
    (summary,) = registry.list()
    assert (summary.revisions, summary.damaged, summary.latest) == ((good.revision,), (bad.revision,), None)
    assert registry.revisions("cup") == [good]


def resealed(data: bytes, **fields: Any) -> bytes:
    """A manifest with other fields and a checksum that matches them."""
    content = {**json.loads(data), **fields}
    content.pop("checksum")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**content, "checksum": sha256(canonical)}).encode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objects": {"weights": {"key": "adapters/mug/x", "size": 1, "sha256": "0" * 64}}}, "objects.weights.key"),
        ({"objects": {"weights": {"key": "../../x", "size": 1, "sha256": "0" * 64}}}, "objects.weights.key"),
        ({"rank": "many"}, "fields rank"),
        ({"adapter_id": "mug"}, "belongs to mug@"),
        ({"revision": "r-000000000000"}, "belongs to cup@r-000000000000"),
    ],
)
def test_a_wrong_manifest_with_a_right_checksum_is_refused(
    registry: Registry, make_draft: MakeDraft, fields: dict[str, Any], message: str
) -> None:
    manifest = registry.publish(make_draft())
    key = manifest_key("cup", manifest.revision)
    registry.store.put(key, resealed(registry.store.get(key)))
    assert registry.resolve("cup") == manifest
    registry.store.put(key, resealed(registry.store.get(key), **fields))
    with pytest.raises(RegistryError, match=message):
        registry.resolve("cup")


def test_a_damaged_revision_can_be_deleted_and_keeps_its_adapters_objects(
    registry: Registry, make_draft: MakeDraft
) -> None:
    bad, third, good = (registry.publish(make_draft(seed=seed)) for seed in range(3))
    objects = registry.store.list("objects/")
    registry.store.put(manifest_key("cup", bad.revision), b"{")
    assert registry.delete("cup", third.revision) == []  # what the damaged manifest names is not known
    assert registry.delete("cup", bad.revision) == []
    assert registry.store.list("objects/") == objects
    assert registry.verify(good.name).ok


def test_a_damaged_revision_keeps_no_object_of_another_adapter(registry: Registry, make_draft: MakeDraft) -> None:
    bad = registry.publish(make_draft())
    other = registry.publish(make_draft(adapter_id="mug"))
    registry.store.put(manifest_key("cup", bad.revision), b"{")
    registry.remove_alias("mug", "latest")
    assert set(registry.delete("mug", other.revision)) == {stored.key for stored in other.objects.values()}
    assert set(registry.store.list("objects/")) == {stored.key for stored in bad.objects.values()}


def test_an_alias_of_a_revision_that_is_gone_is_explained(registry: Registry, make_draft: MakeDraft) -> None:
    manifest = registry.publish(make_draft(seed=0))
    gone = registry.publish(make_draft(seed=1))
    registry.store.delete(manifest_key("cup", gone.revision))
    with pytest.raises(CatClusterError, match=rf"no revision {gone.revision}.*it has {manifest.revision}"):
        registry.resolve("cup")


def test_a_half_written_publish_is_not_seen(registry: Registry, make_draft: MakeDraft, tmp_path: Path) -> None:
    """A publisher that dies before its manifest leaves objects and a hidden file, and readers see neither."""
    manifest = registry.publish(make_draft(seed=0))
    folder = tmp_path / "storage"
    (folder / "objects" / ("0" * 64)).write_bytes(b"orphan")
    half = folder / "adapters" / "mug" / "r-0123456789ab"
    half.mkdir(parents=True)
    (half / ".tmp-0123").write_bytes(b"{")
    assert [summary.adapter_id for summary in registry.list()] == ["cup"]
    with pytest.raises(RegistryError, match="no adapter 'mug'"):
        registry.resolve("mug")
    assert registry.verify(manifest.name).ok
