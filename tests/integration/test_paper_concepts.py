"""The real photos and captions of the CAT paper, found beside the project: they import, or are refused for cause."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cat_cluster.data.concepts import check_tokens, has_token, load_concept
from cat_cluster.errors import ConceptError
from cat_cluster.spec.job import ConceptSpec

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "paper-concepts"
CLEAN = {
    "clock": ("sts", "clock", 5),
    "colorful_teapot": ("scs", "teapot", 5),
    "physics_mug": ("cic", "mug", 5),
    "round_bird": ("usu", "bird", 5),
}


@pytest.fixture(scope="module", autouse=True)
def _photos_are_there() -> None:
    if PHOTOS.is_dir():
        return
    reason = "the paper's photos are not at ../shared/data/paper-concepts, counted from the project's root"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def concept_spec(name: str, token: str, class_noun: str, **options: str) -> ConceptSpec:
    return ConceptSpec.model_validate(
        {"token": token, "class_noun": class_noun, "images": str(PHOTOS / name), **options}
    )


def test_the_clean_concepts_import_and_can_share_an_adapter() -> None:
    concepts = [load_concept(concept_spec(name, token, noun)) for name, (token, noun, _) in CLEAN.items()]
    check_tokens(concepts)
    for concept, (token, _, count) in zip(concepts, CLEAN.values(), strict=True):
        assert len(concept.examples) == count
        assert len({example.digest for example in concept.examples}) == count
        for example in concept.examples:
            assert example.image.mode == "RGB"
            assert min(example.image.size) >= 512
            # In these captions the token always comes first, with one comma and one space.
            assert example.prompt == f"{token}, {example.prior_prompt}"
            assert not has_token(example.prior_prompt, token)


def test_cat_statue_is_refused_until_its_captions_are_chosen() -> None:
    with pytest.raises(ConceptError) as caught:
        load_concept(concept_spec("cat_statue", "shs", "statue"))
    message = str(caught.value)
    for part in ("image1.txt", "metadata.jsonl", "'shs, a cat", "'<shs>, a cat", "captions: txt"):
        assert part in message

    concept = load_concept(concept_spec("cat_statue", "shs", "statue", captions="txt"))
    assert len(concept.examples) == 6
    assert concept.examples[0].prior_prompt == "a cat statue lying on the carpet"


def test_the_two_spellings_of_the_statue_token_are_two_tokens() -> None:
    listed = load_concept(concept_spec("cat_statue", "<shs>", "statue", captions="metadata"))
    assert listed.examples[3].prior_prompt == "a cat statue standing at a desk, looking  ahead"
    with pytest.raises(ConceptError, match="6 of 6 captions lack the token 'shs'"):
        load_concept(concept_spec("cat_statue", "shs", "statue", captions="metadata"))
