"""What other programs read in an adapter's file, each as its own code reads it, written here from that code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open

from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.pipeline.published_adapters import export_stack
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.registry.file_header import FileSubject, shown_metadata
from cat_cluster.registry.stacks import parse_member
from cat_cluster.spec.choices import AdapterFormat
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.sections import TrainingSpec
from tests.unit.registry.conftest import DraftFactory

PHOTOS = {f"photo-0-{n:03d}.png": b"a photo" for n in range(5)} | {
    "photo-1-000.png": b"one",
    "photo-0-design.json": b"",
}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def weights(width: int = 768, rank: int = 4) -> AdapterWeights:
    """Of one cross-attention, whose key layer reads text of a width."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    generator = torch.Generator().manual_seed(width)
    down = torch.randn(rank, width, generator=generator)
    query = LoraLayer(torch.randn(rank, 320, generator=generator), torch.randn(320, rank, generator=generator))
    return AdapterWeights(
        {f"{path}.to_k": LoraLayer(down, torch.randn(320, rank, generator=generator)), f"{path}.to_q": query}
    )


def publish(
    registry: Registry,
    make_draft: DraftFactory,
    *,
    width: int = 768,
    settings: TrainingSpec | None = None,
    **changes: Any,
) -> Manifest:
    """An adapter of two concepts, trained at 512 pixels."""
    draft: AdapterDraft = make_draft(**{"weights": weights(width), "samples": PHOTOS, "adapter_id": "tea", **changes})
    concepts = (
        ConceptSpec(token="sks", class_noun="cup", images="photos"),
        ConceptSpec(token="ohwx", class_noun="fish", images="photos"),
    )
    resolved = draft.resolved.model_copy(update={"concepts": concepts})
    if settings is not None:
        resolved = resolved.model_copy(update={"training": settings})
    training = {"prediction_type": "epsilon", "resolution": 512, **draft.training, **changes.get("training", {})}
    return registry.publish(AdapterDraft(**{**vars(draft), "resolved": resolved, "training": training}))


def export(registry: Registry, folder: Path, *names: str, fmt: AdapterFormat = "kohya") -> Path:
    return export_stack(registry, [parse_member(name) for name in names], folder, fmt)


def kohya_hash(path: Path) -> str:
    """addnet_hash_safetensors of sd-scripts' train_util: what is behind the header."""
    with path.open("rb") as file:
        offset = int.from_bytes(file.read(8), "little") + 8
        file.seek(offset)
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1024 * 1024), b""):
            digest.update(block)
    return digest.hexdigest()


def webui_version(metadata: dict[str, str]) -> str:
    """NetworkOnDisk.detect_version of AUTOMATIC1111's extensions-builtin/Lora/network.py."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if metadata.get("ss_v2", "") == "True":
        return "SD2"
    return "SD1" if metadata else "Unknown"


def webui_tags(metadata: dict[str, str]) -> dict[str, int]:
    """build_tags of AUTOMATIC1111's ui_edit_user_metadata.py."""
    tags: dict[str, int] = {}
    for of_folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
        for tag, count in of_folder.items():
            tags[tag.strip()] = tags.get(tag.strip(), 0) + int(count)
    return tags


@pytest.mark.parametrize("fmt", get_args(AdapterFormat))
def test_an_exported_file_says_what_it_is(
    registry: Registry, make_draft: DraftFactory, tmp_path: Path, fmt: AdapterFormat
) -> None:
    manifest = publish(registry, make_draft)
    path = export(registry, tmp_path / "out", "tea", fmt=fmt)
    metadata = metadata_of(path)
    assert metadata["sshs_model_hash"] == kohya_hash(path)
    assert metadata["modelspec.hash_sha256"] == f"0x{kohya_hash(path)}"
    assert webui_version(metadata) == "SD1"
    assert webui_tags(metadata) == {"sks cup": 5, "ohwx fish": 1}
    wanted = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": manifest.name,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.trigger_phrase": "sks, ohwx",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x512",
        "modelspec.date": manifest.created,
        "ss_output_name": "tea",
        "ss_sd_model_name": "pocket",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "ss_num_train_images": "6",
        "ss_steps": "300",
        "ss_resolution": "(512, 512)",
        "ss_optimizer": "adamw",
        "adapter": manifest.name,
    }
    assert {name: metadata.get(name) for name in wanted} == wanted
    absent = {"ss_min_snr_gamma", "ss_noise_offset", "ss_shuffle_caption", "ss_keep_tokens"}
    assert not absent & metadata.keys(), "None is not a value"
    again = export(registry, tmp_path / "again", "tea", fmt=fmt)
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(("own", "told"), [({"learning_rate": 5e-4}, "0.0005"), ({}, "0.002"), (None, None)])
def test_the_rate_of_text_encoders_is_told_where_they_were_trained(
    own: dict[str, float] | None, told: str | None
) -> None:
    settings = TrainingSpec.model_validate({"text_encoder": own}).model_dump(mode="json")
    subject = FileSubject("tea@r-0123456789ab", "pocket", (("sks", "cup", 1),), settings, {})
    assert shown_metadata([subject], AdapterWeights({}), "tea").get("ss_text_encoder_lr") == told


@pytest.mark.parametrize(
    ("width", "prediction", "family", "version", "shown"),
    [
        (768, "epsilon", "stable-diffusion-v1", "sd_v1", "SD1"),
        (1024, "epsilon", "stable-diffusion-v2-512", "sd_v2", "SD2"),
        (1024, "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v", "SD2"),
        (2048, "epsilon", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "SDXL"),
        (32, "epsilon", "pocket", None, "SD1"),
    ],
)
def test_the_family_of_the_base_is_told(
    registry: Registry,
    make_draft: DraftFactory,
    tmp_path: Path,
    width: int,
    prediction: str,
    family: str,
    version: str | None,
    shown: str,
) -> None:
    publish(registry, make_draft, width=width, training={"prediction_type": prediction})
    metadata = metadata_of(export(registry, tmp_path, "tea"))
    assert metadata["modelspec.architecture"] == f"{family}/lora"
    assert metadata.get("ss_base_model_version") == version
    assert ("ss_v2" in metadata) == (version is not None)
    assert webui_version(metadata) == shown
    assert metadata["modelspec.prediction_type"] == {"epsilon": "epsilon", "v_prediction": "v"}[prediction]


def test_a_file_of_several_adapters_says_so(registry: Registry, make_draft: DraftFactory, tmp_path: Path) -> None:
    first = publish(registry, make_draft)
    second = registry.publish(make_draft(adapter_id="cup", weights=weights(rank=2), samples={}))
    path = export(registry, tmp_path, "tea", "cup:0.5")
    metadata = metadata_of(path)
    assert metadata["modelspec.merged_from"] == f"{first.name}, {second.name}"
    assert metadata["modelspec.trigger_phrase"] == "sks, ohwx"
    assert metadata["ss_network_dim"] == "6", "the ranks add up"
    assert metadata["ss_output_name"] == "tea+cup"
    assert metadata["sshs_model_hash"] == kohya_hash(path)
    assert not {"ss_steps", "modelspec.date"} & metadata.keys(), "each was trained in its own way"


def test_what_was_published_before_these_keys_were_kept_says_what_is_known(
    registry: Registry, make_draft: DraftFactory, tmp_path: Path
) -> None:
    """No prediction type and no resolution in its manifest, and no photos."""
    registry.publish(make_draft(adapter_id="old", weights=weights(), samples={}, training={"steps": 400}))
    metadata = metadata_of(export(registry, tmp_path, "old"))
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert webui_tags(metadata) == {"sks cup": 1}
    absent = {"modelspec.prediction_type", "modelspec.resolution", "ss_resolution", "ss_num_train_images"}
    assert not absent & metadata.keys()


def test_stored_weights_say_the_same(registry: Registry, make_draft: DraftFactory, tmp_path: Path) -> None:
    manifest = publish(registry, make_draft)
    path = tmp_path / "stored.safetensors"
    path.write_bytes(registry.read_object(manifest, "weights"))
    stored, exported = metadata_of(path), metadata_of(export(registry, tmp_path, "tea", fmt="diffusers"))
    shown = {name for name in exported if name.startswith(("ss", "modelspec.")) and name != "modelspec.date"}
    assert {name: stored.get(name) for name in shown} == {name: exported[name] for name in shown}


def test_how_captions_changed_stands_under_kohyas_names(
    registry: Registry, make_draft: DraftFactory, tmp_path: Path
) -> None:
    """Its arguments of the same meaning; caption_dropout has none, for there captions are dropped whole."""
    publish(
        registry,
        make_draft,
        settings=TrainingSpec(tag_dropout=0.1, shuffle_tags=True, keep_tags=2, caption_dropout=0.3),
    )
    metadata = metadata_of(export(registry, tmp_path, "tea"))
    wanted = {"ss_caption_tag_dropout_rate": "0.1", "ss_shuffle_caption": "True", "ss_keep_tokens": "2"}
    assert {name: metadata.get(name) for name in wanted} == wanted
    assert "ss_caption_dropout_rate" not in metadata
