"""Evaluation prompts: the token's place, and that training never saw them."""

from __future__ import annotations

from pathlib import Path

import pytest

import cat_cluster
from cat_cluster.data.concepts import remove_token
from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.prompts import (
    DECOYS,
    GENERAL_TEMPLATES,
    POCKET_TEMPLATES,
    decoy,
    evaluation_prompts,
    fill,
)
from cat_cluster.models.pocket import world

SHIPPED = sorted(Path(cat_cluster.__file__).parent.rglob("general_prompts.txt"))
CLASS_NOUNS = (*world.OBJECTS, "mug", "cat statue", "backpack", "dog")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.parent.name))
def test_no_evaluation_prompt_is_a_general_prompt_of_training(path: Path) -> None:
    general = {" ".join(line.lower().split()) for line in path.read_text(encoding="utf-8").splitlines()}
    ours = {
        fill(template, noun, trigger).lower()
        for template in (*POCKET_TEMPLATES, *GENERAL_TEMPLATES)
        for noun in CLASS_NOUNS
        for trigger in (None, "sks", *DECOYS)
    }
    assert general
    assert not general & ours


def test_a_general_prompt_file_is_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("template", [*POCKET_TEMPLATES, *GENERAL_TEMPLATES])
def test_removing_the_token_gives_the_prompt_without_it(template: str) -> None:
    with_token = fill(template, "cup", "sks")
    assert "a sks cup" in with_token
    assert remove_token(with_token, "sks") == fill(template, "cup", None)


def test_default_follows_the_base_and_a_list_is_taken_as_it_is() -> None:
    assert evaluation_prompts("default", pocket=True) == POCKET_TEMPLATES
    assert evaluation_prompts("default", pocket=False) == GENERAL_TEMPLATES
    assert evaluation_prompts(["{} on the moon"], pocket=True) == ("{} on the moon",)


@pytest.mark.parametrize("prompts", [["a cup"], ["{} and {}"], []])
def test_a_template_must_name_the_subject_once(prompts: list[str]) -> None:
    with pytest.raises(EvaluationError, match=r"evaluation\.prompts"):
        evaluation_prompts(prompts, pocket=True)


def test_the_decoy_is_never_a_token() -> None:
    assert decoy(["sks"]) == DECOYS[0]
    assert decoy([DECOYS[0].upper()]) == DECOYS[1]
    assert decoy(DECOYS) not in DECOYS
    assert decoy([word.title() for word in DECOYS]) not in DECOYS
