"""Captions and prompts that are longer than the text encoder reads: a lost token is refused, other text is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cat_cluster.cli.app import app
from cat_cluster.data.concepts import Concept, load_concept
from cat_cluster.data.text_length import check_caption_lengths, cut_notes
from cat_cluster.errors import ConceptError, EvaluationError
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.text_limit import TextLimit, local_text_limit
from cat_cluster.pipeline.prepare import prepare
from cat_cluster.registry import Registry
from cat_cluster.settings import load_settings
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import JobSpec
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.store.local import LocalStore

LONG = "a photo taken on a table by a window in snow at night on grass and sand, " * 3


@pytest.fixture(scope="module")
def limit() -> TextLimit:
    found = local_text_limit("pocket")
    assert found is not None
    return found


def concept(folder: Path, *captions: str) -> Concept:
    for number, caption in enumerate(captions):
        Image.new("RGB", (40, 40), (50 * number, 9, 9)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(folder)))


def test_a_caption_whose_token_is_cut_off_is_refused_by_name(tmp_path: Path, limit: TextLimit) -> None:
    taught = concept(tmp_path, "a sks cup", f"{LONG}sks cup", f"sks cup, {LONG}sks")
    message = "adapter one: captions: .* first 32 tokens, and the token 'sks' comes later in 1 of 3 captions"
    with pytest.raises(ConceptError, match=message) as caught:
        check_caption_lengths("one", [taught], limit, TrainingSpec())
    assert "\n  1.png: 'a photo taken" in str(caught.value)
    assert "2.png" not in str(caught.value)


def test_other_text_that_is_cut_off_is_a_warning_that_quotes_it(tmp_path: Path, limit: TextLimit) -> None:
    assert check_caption_lengths("one", [concept(tmp_path, "a sks cup", "sks")], limit, TrainingSpec()) == ()
    taught = concept(tmp_path, "a sks cup", f"sks cup, {LONG} the end")
    [warning] = check_caption_lengths("one", [taught], limit, TrainingSpec())
    assert warning.startswith("adapter one, token sks: the text encoder reads the first 32 tokens of a caption")
    assert "1.png: '" in warning
    assert warning.endswith("the end'")


def test_with_chunks_a_caption_is_read_further_and_what_is_cut_is_told_as_before(
    tmp_path: Path, limit: TextLimit
) -> None:
    late = concept(tmp_path, "a sks cup", f"{LONG}sks cup")
    with pytest.raises(ConceptError, match=r"or raise training\.prompt_chunks"):
        check_caption_lengths("one", [late], limit, TrainingSpec())
    with pytest.raises(ConceptError, match="first 2 chunks of 32 tokens, and the token"):
        check_caption_lengths("one", [late], limit, TrainingSpec(prompt_chunks=2))
    assert check_caption_lengths("one", [late], limit, TrainingSpec(prompt_chunks=4)) == ()
    (tmp_path / "early").mkdir()
    early = concept(tmp_path / "early", f"sks cup, {LONG * 9} the end")
    for chunks, said in (
        (1, "32 tokens of a caption (training.prompt"),
        (16, "16 chunks of 32 tokens of a caption, and"),
    ):
        [warning] = check_caption_lengths("one", [early], limit, TrainingSpec(prompt_chunks=chunks))
        assert f"reads the first {said}" in warning
        assert warning.endswith("the end'")


def test_a_token_that_the_end_of_a_chunk_cuts_is_told(tmp_path: Path, limit: TextLimit) -> None:
    assert limit.count("sks") > 1, "else it cannot be cut"
    room = limit.tokens - 2
    told = []
    for words in range(room - 4, room + 3):
        folder = tmp_path / str(words)
        folder.mkdir()
        taught = concept(folder, f"{'red ' * words}sks cup", "a sks cup")
        found = check_caption_lengths("one", [taught], limit, TrainingSpec(prompt_chunks=2))
        cut = words < room < words + limit.count("sks")
        assert bool(found) == cut
        told += found
    assert all("lies across two chunks of the text encoder" in text and "captions of 0.png;" in text for text in told)
    assert told


def test_a_prompt_whose_token_is_cut_off_is_told_so(limit: TextLimit) -> None:
    assert list(cut_notes(limit, ["sks"], prompt=Prompt("a sks cup"), negative_prompt=Prompt("red"))) == []
    text, token = cut_notes(limit, ["sks", "ohwx"], prompt=Prompt(f"ohwx, {LONG} a sks cup"))
    assert "first 32 tokens of the prompt, and not '" in text
    assert token == "the token 'sks' is not read, so its concept is not drawn: write it further to the front"
    [negative] = cut_notes(limit, ["sks"], prompt=Prompt("a sks cup"), negative_prompt=Prompt(LONG))
    assert "of the negative prompt" in negative


def test_a_note_quotes_the_ends_of_what_is_long(limit: TextLimit) -> None:
    [note] = cut_notes(limit, [], prompt=Prompt(f"a cup {'on a table, ' * 3000}the end"))
    assert "and not '" in note
    assert "' ... '" in note
    assert note.endswith("the end'")
    assert len(note) < 500


def job(folder: Path, **evaluation: object) -> JobSpec:
    concepts = [{"token": "sks", "class_noun": "cup", "images": str(folder)}]
    return JobSpec.model_validate(
        {"name": "one", "adapters": [{"id": "one", "concepts": concepts}], "evaluation": evaluation}
    )


@pytest.mark.slow
def test_training_refuses_and_warns_before_it_starts(tmp_path: Path) -> None:
    registry = Registry(LocalStore(tmp_path / "store"))
    concept(tmp_path, "a sks cup", f"sks cup, {LONG}")
    [prepared] = prepare(job(tmp_path), load_settings(), registry)
    assert len(prepared.warnings) == 1
    with pytest.raises(EvaluationError, match=r"evaluation\.prompts: .* the subject comes later .* \(adapter one\)"):
        prepare(job(tmp_path, prompts=[f"{LONG}{{}}"]), load_settings(), registry)
    concept(tmp_path, f"{LONG}sks cup")
    with pytest.raises(ConceptError, match="comes later in 1 of 2 captions"):
        prepare(job(tmp_path), load_settings(), registry)


def test_spec_check_says_so_without_loading_the_base(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    concept(tmp_path / "photos", f"sks cup, {LONG}")
    spec = "name: one\nbase: {}\nadapters: [{{id: one, concepts: [{{token: sks, class_noun: cup, images: photos}}]}}]\n"
    (tmp_path / "spec.yaml").write_text(spec.format("pocket"))
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml")])
    assert "warning: adapter one, token sks: the text encoder reads the first 32 tokens" in result.stderr
    (tmp_path / "spec.yaml").write_text(spec.format("nobody/never-downloaded"))
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml")])
    assert (result.exit_code, result.stderr.count("never-downloaded")) == (0, 1)
    assert "training checks its files, and whether its text encoder reads whole captions" in result.stderr
    concept(tmp_path / "photos", f"{LONG}sks cup")
    (tmp_path / "spec.yaml").write_text(spec.format("pocket"))
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml")])
    assert isinstance(result.exception, ConceptError)
