"""Photos and captions in the shape of the CAT paper's own concepts: they import, or are refused for cause.

The paper's folders hold JPEGs of phones and cameras (mixed sizes, progressive, with EXIF), named .jpg or .jpeg, and a
metadata.jsonl without a last newline. In one of them the captions beside the photos write the token `shs` where the
metadata writes `<shs>`. The folders here are drawn in that shape.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_cluster.data.concepts import check_tokens, has_token, load_concept
from cat_cluster.errors import ConceptError
from cat_cluster.spec.concept import ConceptSpec

ORIENTATION, ROTATED = 0x0112, 6  # the EXIF tag of a phone held upright: rotate by 90 degrees to show
CONCEPTS = {
    "clock": ("sts", "clock", ".jpeg"),
    "colorful_teapot": ("scs", "teapot", ".jpg"),
    "physics_mug": ("cic", "mug", ".jpeg"),
    "round_bird": ("usu", "bird", ".jpg"),
}
SCENES = ("held in one hand", "on a chair, in front of a bag", "on the desk", "on the sofa", "with water on it")
STATUES = (
    "a cat statue lying on the carpet",
    "a cat statue on the carpet",
    "a cat statue at a desk",
    "a cat statue at a desk, looking  ahead",  # two spaces, as people type
    "a cat statue on the couch",
    "a cat statue, looking up",
)


def take_photo(path: Path, number: int, rng: np.random.Generator) -> None:
    """A JPEG of a round object before a coloured background, with a camera's noise, size and EXIF.

    Every second photo is stored rotated, every third is progressive.
    """
    width, height = (int(side) for side in rng.integers(512, 900, size=2))
    down, across = np.mgrid[0:height, 0:width]
    centre, radius = rng.uniform(0.4, 0.6, size=2) * (height, width), rng.uniform(0.2, 0.35) * min(height, width)
    inside = np.hypot(down - centre[0], across - centre[1]) < radius
    pixels = np.where(inside[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3) * (down / height)[..., None])
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED if number % 2 else 1
    Image.fromarray(noisy).save(path, quality=90, exif=exif, progressive=number % 3 == 0)


def write_metadata(folder: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of concepts: four with consistent captions, and cat_statue with two spellings of its token."""
    root, rng = tmp_path_factory.mktemp("concepts"), np.random.default_rng(2404)
    for name, (token, noun, suffix) in CONCEPTS.items():
        (root / name).mkdir()
        captions = {f"{n}{suffix}": f"{token}, a {noun} {scene}" for n, scene in enumerate(SCENES, 1)}
        for n, file_name in enumerate(captions, 1):
            take_photo(root / name / file_name, n, rng)
        write_metadata(root / name, captions)
    statue = root / "cat_statue"
    statue.mkdir()
    for n, caption in enumerate(STATUES, 1):
        take_photo(statue / f"image{n}.jpeg", n, rng)
        (statue / f"image{n}.txt").write_text(f"shs, {caption}")
    write_metadata(statue, {f"image{n}.jpeg": f"<shs>, {caption}" for n, caption in enumerate(STATUES, 1)})
    return root


def concept_spec(folder: Path, token: str, class_noun: str, **options: str) -> ConceptSpec:
    return ConceptSpec.model_validate({"token": token, "class_noun": class_noun, "images": str(folder), **options})


def test_consistent_concepts_import_and_can_share_an_adapter(concepts: Path) -> None:
    loaded = [load_concept(concept_spec(concepts / name, *words[:2])) for name, words in CONCEPTS.items()]
    check_tokens(loaded)
    for concept, (name, (token, noun, suffix)) in zip(loaded, CONCEPTS.items(), strict=True):
        assert len({example.digest for example in concept.examples}) == len(SCENES)
        for n, (example, scene) in enumerate(zip(concept.examples, SCENES, strict=True), 1):
            with Image.open(concepts / name / f"{n}{suffix}") as stored:
                assert example.image.size == (stored.size[::-1] if n % 2 else stored.size)
            assert example.image.mode == "RGB"
            assert example.prompt == f"{token}, a {noun} {scene}"
            assert example.prior_prompt == f"a {noun} {scene}"
            assert not has_token(example.prior_prompt, token)


def test_captions_that_disagree_are_refused_until_a_source_is_chosen(concepts: Path) -> None:
    with pytest.raises(ConceptError) as caught:
        load_concept(concept_spec(concepts / "cat_statue", "shs", "statue"))
    message = str(caught.value)
    for part in ("image1.txt", "metadata.jsonl", "'shs, a cat", "'<shs>, a cat", "captions: txt"):
        assert part in message
    concept = load_concept(concept_spec(concepts / "cat_statue", "shs", "statue", captions="txt"))
    assert [example.prior_prompt for example in concept.examples] == list(STATUES)


def test_the_two_spellings_of_a_token_are_two_tokens(concepts: Path) -> None:
    listed = load_concept(concept_spec(concepts / "cat_statue", "<shs>", "statue", captions="metadata"))
    assert [example.prior_prompt for example in listed.examples] == list(STATUES)
    with pytest.raises(ConceptError, match="6 of 6 captions lack the token 'shs'"):
        load_concept(concept_spec(concepts / "cat_statue", "shs", "statue", captions="metadata"))
