"""Masks: a file beside a photo, or its own transparency, says where the concept is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cat_cluster.data import photos
from cat_cluster.data.concepts import Concept, image_digests, load_concept, load_concepts
from cat_cluster.data.crops import Size, crop_mask, crop_warnings
from cat_cluster.data.latents import LatentCache
from cat_cluster.errors import ConceptError
from cat_cluster.models.base_model import load_base_model
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.sections import TrainingSpec

MASKED = TrainingSpec(masked_loss=True)


def photo(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(box: tuple[int, int, int, int], size: tuple[int, int] = (64, 48)) -> Image.Image:
    """White in a box (left, top, right, bottom) of black."""
    marked = Image.new("L", size)
    marked.paste(255, box)
    return marked


def read(folder: Path, *, masked: bool = True) -> Concept:
    return load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(folder)), masked=masked)


@pytest.mark.parametrize("name", ["a-mask.png", "a-masklabel.png", "A-MASK.PNG", "a-mask.jpg"])
def test_a_file_beside_a_photo_is_its_mask(tmp_path: Path, name: str) -> None:
    photo().save(tmp_path / "a.jpg")
    photo(1).save(tmp_path / "b.jpg")
    mask((8, 8, 40, 40)).save(tmp_path / name)
    concept = read(tmp_path)
    assert [example.path.name for example in concept.examples] == ["a.jpg", "b.jpg"]
    assert concept.passed_over == ()
    first, second = (example.mask for example in concept.examples)
    assert second is None
    assert first is not None
    marked = np.asarray(first.image) > 127
    assert marked.sum() == 32 * 32
    assert marked[8:40, 8:40].all()


def test_a_photo_that_is_transparent_around_its_concept_is_its_own_mask(tmp_path: Path) -> None:
    cut_out = photo().convert("RGBA")
    cut_out.putalpha(mask((8, 8, 40, 40)))
    cut_out.save(tmp_path / "a.png")
    photo(1).convert("RGBA").save(tmp_path / "b.png")
    first, second = read(tmp_path).examples
    assert second.mask is None, "opaque"
    assert first.mask is not None
    assert np.array_equal(np.asarray(first.mask.image) > 127, np.asarray(mask((8, 8, 40, 40))) > 127)
    assert first.image.getpixel((0, 0)) == (255, 255, 255)


def test_a_mask_turns_with_its_photo(tmp_path: Path) -> None:
    """Orientation 6: the camera lay on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    cut_out = photo().convert("RGBA")
    cut_out.putalpha(mask((0, 0, 64, 10)))
    cut_out.save(tmp_path / "a.png", exif=exif)
    (example,) = read(tmp_path).examples
    assert example.mask is not None
    assert example.mask.image.size == example.image.size == (48, 64)
    assert np.array_equal(np.asarray(example.mask.image) > 127, np.asarray(mask((38, 0, 48, 64), (48, 64))) > 127)


def test_a_mask_is_of_the_crop_that_is_trained_on(tmp_path: Path, tiny_base_folder: Path) -> None:
    """Of 64 x 48 pixels the middle square of 48 is 8 latents wide: each stands for 6 x 6 pixels."""
    photo().save(tmp_path / "a.png")
    photo(1).save(tmp_path / "b.png")
    mask((8, 0, 17, 12)).save(tmp_path / "a-mask.png")
    base, concept = load_base_model(str(tiny_base_folder)), read(tmp_path)
    material = LatentCache(base).material(concept, resolution=16, crops_per_image=2, alpha=1.0)
    first, further, *opaque = material.masks
    assert first is not None
    assert further is not None
    assert opaque == [None, None]
    wanted = torch.zeros(1, 8, 8)
    wanted[:, :2, 0], wanted[:, :2, 1] = 1.0, 0.5  # a half of it is in the box
    torch.testing.assert_close(first, wanted, atol=0.01, rtol=0)
    found = crop_mask(concept.examples[0], 1, Size.square(16), base.pixels_per_latent)
    assert found is not None
    assert torch.equal(further, found)
    plain = load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(without_masks(tmp_path))))
    assert LatentCache(base).material(plain, resolution=16, crops_per_image=2, alpha=1.0).masks == ()


def without_masks(folder: Path) -> Path:
    for path in folder.glob("*-mask.png"):
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("a-mask.png", mask((0, 0, 9, 9), (32, 48)), "is a mask of 32x48 pixels, and its photo has 64x48"),
        ("a-mask.png", photo(3), "is a mask, and not black and white"),
        ("a-mask.png", mask((0, 0, 0, 0)), "its mask marks nothing"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_by_name(tmp_path: Path, name: str, image: Image.Image, message: str) -> None:
    photo().save(tmp_path / "a.png")
    image.save(tmp_path / name)
    with pytest.raises(ConceptError, match=rf"a-mask\.png: .*{message}"):
        read(tmp_path)


def test_masks_that_are_not_asked_for_are_not_learned_as_photos(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    mask((0, 0, 9, 9)).save(tmp_path / "a-mask.png")
    with pytest.raises(ConceptError, match=r"a-mask\.png is named as the mask of a\.png: set training\.masked_loss"):
        read(tmp_path, masked=False)
    (tmp_path / "a.png").rename(tmp_path / "carnival.png")
    assert [one.path.name for one in read(tmp_path, masked=False).examples] == ["a-mask.png", "carnival.png"]


def test_without_any_mask_there_is_nothing_to_learn_from(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    spec = ConceptSpec(token="sks", class_noun="cup", images=str(tmp_path))
    with pytest.raises(ConceptError, match=r"^adapter mug: training\.masked_loss: no photo has a mask; put 1-mask"):
        load_concepts("mug", [spec], masked=True)


def test_another_mask_makes_another_adapter(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    digests = set()
    for right in (20, 30):
        mask((0, 0, right, 20)).save(tmp_path / "a-mask.png")
        digests.add(tuple(image_digests([read(tmp_path)])))
    (tmp_path / "a-mask.png").unlink()
    assert len(digests | {tuple(image_digests([read(tmp_path)]))}) == 3


def test_people_are_told_what_masks_and_crops_leave_out(tmp_path: Path) -> None:
    photo(size=(90, 48)).save(tmp_path / "wide.png")
    photo(1).save(tmp_path / "plain.png")
    mask((0, 0, 9, 48), (90, 48)).save(tmp_path / "wide-mask.png")
    concepts = load_concepts("mug", [ConceptSpec(token="sks", class_noun="cup", images=str(tmp_path))], masked=True)
    bare, cut, empty = crop_warnings("mug", concepts, MASKED)
    assert bare == "adapter mug, token sks: plain.png has no mask, so all of the picture counts as the concept"
    assert "wide.png has more than a third cut off by the square crop, 47% at most: training.aspect_buckets" in cut
    assert "wide.png has nothing of the mask in the square crop" in empty
    assert crop_warnings("mug", concepts, TrainingSpec(aspect_buckets=True)) == ()


@pytest.mark.parametrize("buckets", [False, True])
def test_people_are_told_of_a_mask_that_a_further_crop_misses(tmp_path: Path, buckets: bool) -> None:
    """Oracle: the masks that are trained on, at the photo's own shape, which is that of a bucket here."""
    photo(size=(60, 60)).save(tmp_path / "a.png")
    mask((0, 0, 3, 3), (60, 60)).save(tmp_path / "a-mask.png")
    concepts = load_concepts("mug", [ConceptSpec(token="sks", class_noun="cup", images=str(tmp_path))], masked=True)
    [example] = concepts[0].examples
    held = [crop_mask(example, crop, Size.square(60), 1) for crop in (0, 1)]
    assert [bool(one.any()) for one in held if one is not None] == [True, False], "draw another mask"
    for crops, told in ((1, False), (2, True)):
        warnings = crop_warnings(
            "mug", concepts, MASKED.model_copy(update={"crops_per_image": crops, "aspect_buckets": buckets})
        )
        assert [("a.png has nothing of the mask in one of its crops" in one) for one in warnings] == [True] * told


def test_a_mask_may_be_white_on_transparent(tmp_path: Path) -> None:
    """As programs that cut things out save it."""
    photo().save(tmp_path / "a.png")
    cut_out = Image.new("LA", (64, 48), (255, 0))
    cut_out.paste((255, 255), (8, 8, 40, 40))
    cut_out.save(tmp_path / "a-mask.png")
    (example,) = read(tmp_path).examples
    assert example.mask is not None
    assert np.array_equal(np.asarray(example.mask.image) > 127, np.asarray(mask((8, 8, 40, 40))) > 127)


def test_a_mask_of_a_large_photo_has_the_size_that_the_photo_is_reduced_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG is reduced by powers of two while it is decoded, a PNG by any whole number."""
    monkeypatch.setattr(photos, "LARGEST_SHORT_SIDE", 32)
    photo(size=(144, 96)).save(tmp_path / "a.jpg")
    mask((0, 0, 72, 96), (144, 96)).save(tmp_path / "a-mask.png")
    (example,) = read(tmp_path).examples
    assert example.mask is not None
    assert example.mask.image.size == example.image.size == (72, 48)
    assert (np.asarray(example.mask.image)[:, :36] == 255).all()
    assert (np.asarray(example.mask.image)[:, 36:] == 0).all()


@pytest.mark.parametrize("names", [("a.jpg", "a-mask.png", "a-masklabel.png"), ("a.jpg", "a.png", "a-mask.png")])
def test_a_photo_has_one_mask_and_a_mask_one_photo(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (mask((0, 0, 9, 9)) if "mask" in name else photo()).save(tmp_path / name)
    with pytest.raises(ConceptError, match="keep one file of each"):
        read(tmp_path)


def test_masks_count_in_memory_and_their_headers_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo().save(tmp_path / "a.png")
    mask((0, 0, 9, 9)).save(tmp_path / "a-mask.png")
    for most, fits in ((2 * 4 * 64 * 48, True), (2 * 4 * 64 * 48 - 1, False)):
        monkeypatch.setattr("cat_cluster.data.concepts.MOST_DECODED_BYTES", most)
        if fits:
            read(tmp_path)
            continue
        with pytest.raises(ConceptError, match="GiB of memory"):
            read(tmp_path)
    (tmp_path / "a-mask.png").write_bytes(b"no image")
    with pytest.raises(ConceptError, match=r"a-mask\.png: is not a readable image"):
        read(tmp_path)
