"""Caches: a hit equals a recomputation, and nothing stale or damaged is ever served."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from cat_cluster.data.concepts import Concept, load_concept
from cat_cluster.data.crops import Size, bucket_of, crop_pixels
from cat_cluster.data.latents import LatentCache, TextCache
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.spec.concept import ConceptSpec
from tests.support.texts import states_of


@pytest.fixture
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture
def concept(tmp_path: Path) -> Concept:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n, size in enumerate([(40, 48), (64, 36)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(folder)))


def test_a_hit_equals_a_recomputation(base: BaseModel, concept: Concept, tmp_path: Path) -> None:
    cache = LatentCache(base, tmp_path / "cache")
    first = cache.material(concept, resolution=16, crops_per_image=3, alpha=2.0)
    files = sorted((tmp_path / "cache" / "latents").iterdir())
    assert len(files) == 6 == len(first.prompts)
    again = cache.material(concept, resolution=16, crops_per_image=3, alpha=0.0)
    never_kept = LatentCache(base).material(concept, resolution=16, crops_per_image=3, alpha=2.0)
    assert torch.equal(torch.stack(first.moments), torch.stack(again.moments))
    assert torch.equal(torch.stack(first.moments), torch.stack(never_kept.moments))
    assert torch.stack(first.moments).shape == (6, 2 * base.latent_channels, 8, 8)
    assert first.prompts[0] == "a photo of a sks cup"
    assert first.removed_prompts[0] == "a photo of a cup"


def test_a_photo_is_encoded_once(base: BaseModel, concept: Concept, tmp_path: Path) -> None:
    asked: list[int] = []

    class Counting(BaseModel):
        def encode_moments(self, pixels: torch.Tensor) -> torch.Tensor:
            asked.append(len(pixels))
            return super().encode_moments(pixels)

    counting = Counting(**{field.name: getattr(base, field.name) for field in fields(base)})
    for crops in (1, 1, 2):
        LatentCache(counting, tmp_path / "cache").material(concept, resolution=16, crops_per_image=crops, alpha=1.0)
    assert asked == [2, 2]


def test_a_damaged_entry_is_computed_again(base: BaseModel, concept: Concept, tmp_path: Path) -> None:
    cache = LatentCache(base, tmp_path / "cache")
    first = cache.material(concept, resolution=16, crops_per_image=1, alpha=1.0)
    for path in (tmp_path / "cache" / "latents").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    again = cache.material(concept, resolution=16, crops_per_image=1, alpha=1.0)
    assert torch.equal(torch.stack(first.moments), torch.stack(again.moments))


def test_another_size_is_another_entry(base: BaseModel, concept: Concept, tmp_path: Path) -> None:
    cache = LatentCache(base, tmp_path / "cache")
    small = cache.material(concept, resolution=16, crops_per_image=1, alpha=1.0)
    large = cache.material(concept, resolution=32, crops_per_image=1, alpha=1.0)
    assert small.moments[0].shape[-1] * 2 == large.moments[0].shape[-1]


def test_another_base_or_precision_is_another_entry(base: BaseModel, concept: Concept, tmp_path: Path) -> None:
    other = replace(base, fingerprint="0" * 64)
    low = load_base_model(str(base.folder), dtype=torch.bfloat16)
    for number, one in enumerate((base, other, low), start=1):
        LatentCache(one, tmp_path / "cache").material(concept, resolution=16, crops_per_image=1, alpha=1.0)
        assert len(list((tmp_path / "cache" / "latents").iterdir())) == number * len(concept.examples)


@pytest.mark.parametrize("crops", [1, 3])
def test_with_buckets_each_photo_has_its_own_size_and_is_encoded_as_it_would_be_alone(
    base: BaseModel, concept: Concept, tmp_path: Path, crops: int
) -> None:
    """The photos are 48 x 40 and 36 x 64 pixels: of 1024 pixels in steps of 4, 32 x 28 and 24 x 40 cut off least."""
    found = LatentCache(base, tmp_path).material(
        concept, resolution=32, crops_per_image=crops, alpha=1.0, bucket_step=4
    )
    sizes = [bucket_of(Size(*example.image.size), 32, 4) for example in concept.examples for _ in range(crops)]
    assert set(sizes) == {Size(32, 28), Size(24, 40)}
    for view, (size, told) in enumerate(zip(sizes, found.sizes, strict=True)):
        pixels = crop_pixels(concept.examples[view // crops], view % crops, size)
        alone = base.encode_moments(pixels.unsqueeze(0))[0]
        torch.testing.assert_close(found.moments[view], alone, rtol=1e-4, atol=1e-4)
        assert (told.target_width, told.target_height) == size


def test_text_is_encoded_once_per_prompt_and_as_the_base_does(base: BaseModel) -> None:
    cache = TextCache(base)
    prompts = ["a photo of a cup", "", "a photo of a cup"]
    found = cache(prompts)
    for prompt, row in zip(prompts, found, strict=True):
        torch.testing.assert_close(row.states, states_of(base, [prompt])[0], rtol=1e-5, atol=1e-6)
    assert set(cache.texts) == {"", "a photo of a cup"}


def test_text_of_one_chunk_is_the_encoders_own_to_the_bit_and_a_longer_one_is_read_whole(base: BaseModel) -> None:
    """Oracle: what the encoders make of each chunk's words alone."""
    words = "a photo of a red cup in snow on grass " * 20
    tokens = base.tokenizer(words, add_special_tokens=False).input_ids
    room = base.tokenizer.model_max_length - 2
    pieces = [base.tokenizer.decode(tokens[start : start + room]) for start in range(0, len(tokens), room)]
    assert [base.spell(piece) for piece in pieces[:2]] == [tokens[:room], tokens[room : 2 * room]]
    one, many = TextCache(base), TextCache(base, chunks=2)
    for prompt in ("", "a sks cup", words):
        assert torch.equal(one([prompt])[0].states, states_of(base, [prompt])[0])
    for prompt in ("", "a sks cup"):
        assert torch.equal(many([prompt])[0].states, states_of(base, [prompt])[0])
    torch.testing.assert_close(many([words])[0].states, states_of(base, pieces[:2]).flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_texts_that_were_asked_for_last_are_kept_and_all_are_the_same(base: BaseModel) -> None:
    few, all_of_them = TextCache(base, most=2), TextCache(base)
    for prompts in (["a", "b", "c"], ["b"], ["d"], ["a", "b", "a"]):
        for one, other in zip(few(prompts), all_of_them(prompts), strict=True):
            assert torch.equal(one.states, other.states)
        assert len(few.texts) <= 2
    assert list(few.texts) == ["b", "a"]


def test_the_empty_prompt_is_what_guidance_starts_from(tiny_xl_folder: Path) -> None:
    """In training it stands for what a classifier-free guided image runs beside its prompt: zeros, in most of SDXL."""
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_xl_folder)
    _, negative, _, pooled = stock.encode_prompt("a cup", None, "cpu", 1, True)
    empty, cup = TextCache(load_base_model(str(tiny_xl_folder)))(["", "a cup"])
    assert empty.pooled is not None
    assert torch.equal(empty.states, negative[0])
    assert torch.equal(empty.pooled, pooled[0])
    assert cup.states.any()
