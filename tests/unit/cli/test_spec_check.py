"""`spec check` says what was read of each concept's photos, and what was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cat_cluster.cli.app import app
from cat_cluster.errors import AdapterNotFoundError, BaseModelError, SpecError
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.registry import AdapterDraft, Registry
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store.local import LocalStore
from tests.support.ldm_files import write_checkpoint

SPEC = """
name: two
adapters:
  - id: pair
    concepts:
      - {token: sks, class_noun: cup, images: cup}
      - {token: ohwx, class_noun: fish, images: fish}
"""


def test_spec_check_counts_photos_and_names_their_captions_and_what_it_passed_over(tmp_path: Path) -> None:
    for name in ("cup/0.jpg", "cup/1.avif", "fish/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    for stem in ("0", "1"):
        (tmp_path / "cup" / f"{stem}.caption").write_text("a sks cup")
    (tmp_path / "fish" / "[old] :x: notes.md").touch()
    (tmp_path / "fish" / "\x1b[31mred\x1b]0;\a.xyz").touch()
    (tmp_path / "spec.yaml").write_text(SPEC)
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml")])
    assert result.exit_code == 0
    assert "   sks: 2 photos, captions from .caption files\n" in result.stderr
    template = "the template 'a photo of a ohwx fish'"
    assert (
        f"   ohwx: 1 photo, captions from {template}; passed over: \\x1b[31mred\\x1b]0;\\x07.xyz, [old] :x: notes.md\n"
        in result.stderr
    )
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml"), "--json"])
    assert json.loads(result.stdout)["read"] == {
        "pair": [
            {"token": "sks", "photos": 2, "masks": 0, "captions_from": ".caption files", "passed_over": []},
            {
                "token": "ohwx",
                "photos": 1,
                "masks": 0,
                "captions_from": template,
                "passed_over": ["\x1b[31mred\x1b]0;\a.xyz", "[old] :x: notes.md"],
            },
        ]
    }


def test_spec_check_says_from_which_revision_an_adapter_is_trained_on(tmp_path: Path) -> None:
    place = tmp_path / "store"
    mug = ResolvedAdapter(
        id="mug",
        base="pocket",
        method="cat",
        concepts=(ConceptSpec(token="sks", class_noun="cup", images="photos"),),
        training=TrainingSpec(rank=2),
        evaluation=EvaluationSpec(),
    )
    weights = AdapterWeights({"mid_block.to_q": LoraLayer(torch.ones(2, 3), torch.ones(4, 2))})
    draft = AdapterDraft("mug", mug, "pocket", "b" * 64, ["1" * 64], weights, {})
    manifest = Registry(LocalStore(place)).publish(draft)
    for name in ("cup/0.png", "fish/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)

    def check(start: str, rank: int) -> Result:
        (tmp_path / "spec.yaml").write_text(f"{SPEC}training: {{init_from: {start}, rank: {rank}}}\n")
        return CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml"), "--storage", str(place)])

    result = check("mug", manifest.rank)
    assert result.exit_code == 0, result.stderr
    assert f"300 steps, from {manifest.name}\n" in result.stderr
    assert isinstance(check("mug", manifest.rank + 1).exception, SpecError)
    assert isinstance(check("mugg", manifest.rank).exception, AdapterNotFoundError)


def test_a_wrong_base_is_told_before_the_registry_and_the_photos_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "base" / "transformer").mkdir(parents=True)
    for name in ("cup", "fish"):
        (tmp_path / name).mkdir()  # without photos
    (tmp_path / "spec.yaml").write_text(f"{SPEC}base: ./base\ntraining: {{init_from: nobody}}\n")
    result = CliRunner().invoke(
        app, ["spec", "check", str(tmp_path / "spec.yaml"), "--storage", str(tmp_path / "nowhere" / "store")]
    )
    assert isinstance(result.exception, BaseModelError)
    assert "base of adapter pair" in str(result.exception)
    assert "Stable Diffusion 3 or Flux is not supported" in str(result.exception)


def test_a_resolution_without_buckets_is_told_without_unpacking_the_base(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the configs of the file's family, which are of full size: sides of Stable Diffusion's are in steps of 64."""
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    write_checkpoint(tiny_base_folder, tmp_path / "anime.safetensors")
    for name in ("cup/0.png", "fish/0.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)

    def check(training: str) -> Result:
        (tmp_path / "spec.yaml").write_text(f"{SPEC}base: anime.safetensors\ntraining: {{{training}}}\n")
        return CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml")])

    refused = check("aspect_buckets: true, resolution: 520").exception
    assert isinstance(refused, SpecError)
    assert str(refused).startswith(
        "training.resolution: 520 is not a multiple of 64, as the sides of the aspect buckets"
    )
    for fits in ("aspect_buckets: true, resolution: 576", "resolution: 520", "aspect_buckets: true"):
        assert check(fits).exit_code == 0
    assert not (tmp_path / "cache" / "bases").exists()


def test_spec_check_counts_masks_and_says_what_square_crops_cut_off(tmp_path: Path) -> None:
    for name, size in (("cup/0.png", (40, 40)), ("cup/1.png", (40, 80)), ("fish/0.png", (40, 40))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / name)
    Image.new("L", (40, 40), 255).save(tmp_path / "cup" / "0-mask.png")
    (tmp_path / "spec.yaml").write_text(SPEC + "training: {masked_loss: true}\n")
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml")])
    assert result.exit_code == 0
    assert "   sks: 2 photos, 1 with a mask, captions from the template" in result.stderr
    assert "warning: adapter pair, token sks: 1.png has no mask, so all of the picture counts" in result.stderr
    assert "warning: adapter pair, token sks: 1.png has more than a third cut off by the square crop" in result.stderr
