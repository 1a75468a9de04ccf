"""Concepts: token rules, and captions from every source, good and bad."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cat_cluster.data.concepts import check_tokens, has_token, load_concept, remove_token
from cat_cluster.errors import ConceptError
from cat_cluster.spec.concept import ConceptSpec


def photo(seed: int = 0) -> Image.Image:
    return Image.new("RGB", (48, 40), (20 * seed, 90, 200))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        photo(number).save(tmp_path / f"{number}.png")
    return tmp_path


def spec(folder: Path, **options: Any) -> ConceptSpec:
    return ConceptSpec.model_validate({"token": "sks", "class_noun": "cup", "images": str(folder), **options})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ConceptError) as caught:
        load_concept(spec(folder, **options))
    return str(caught.value)


def write_metadata(folder: Path, *entries: object) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prompts(folder: Path, **options: Any) -> list[str]:
    return [example.prompt for example in load_concept(spec(folder, **options)).examples]


# Token rules.


@pytest.mark.parametrize(
    ("prompt", "token", "expected"),
    [
        ("shs, a cat statue", "shs", "a cat statue"),
        ("a sks cup", "sks", "a cup"),
        ("a SKS cup", "sks", "a cup"),
        ("a sks cup", "SKS", "a cup"),
        ("<shs>, a cat statue", "shs", "<shs>, a cat statue"),
        ("<shs>, a cat statue", "<shs>", "a cat statue"),
        ("a cup, sks, in snow", "sks", "a cup, in snow"),
        ("a cup,sks,in snow", "sks", "a cup,in snow"),
        ("sks sks cup", "sks", "cup"),
        ("sks,sks,cup", "sks", "cup"),
        ("sks,, cup", "sks", ", cup"),
        ("sks , cup", "sks", "cup"),
        ("a  cup\tof sks\n tea", "sks", "a  cup\tof tea"),
        ("a sksy cup, sks-like", "sks", "a sksy cup, sks-like"),
        ("sks", "sks", ""),
        ("a cup sks", "sks", "a cup "),
        ("", "sks", ""),
        ("une tasse \u00e9t\u00e9 bleue", "\u00c9T\u00c9", "une tasse bleue"),
    ],
)
def test_removal_takes_the_word_one_comma_and_spaces(prompt: str, token: str, expected: str) -> None:
    assert remove_token(prompt, token) == expected
    assert has_token(prompt, token) == (prompt != expected)


CAPTIONS = st.lists(
    st.sampled_from(["sks", "SKS", "<sks>", "sksa", "cup", "a", ",", ", ", " ", "  ", "\n", "\u00e9"]), max_size=14
).map("".join)


def plain_removal(prompt: str, token: str) -> str:
    """The rule again, one letter at a time."""
    kept, i = "", 0
    while i < len(prompt):
        end = i
        while end < len(prompt) and not prompt[end].isspace() and prompt[end] != ",":
            end += 1
        if end == i:
            kept, i = kept + prompt[i], i + 1
        elif prompt[i:end].lower() != token:
            kept, i = kept + prompt[i:end], end
        else:
            i, commas = end, 0
            while i < len(prompt) and (prompt[i].isspace() or (prompt[i] == "," and commas == 0)):
                commas += prompt[i] == ","
                i += 1
    return kept


@given(prompt=CAPTIONS)
def test_removal_agrees_with_a_plain_loop_and_leaves_no_token(prompt: str) -> None:
    result = remove_token(prompt, "sks")
    assert result == plain_removal(prompt, "sks")
    assert not has_token(result, "sks")
    assert remove_token(result, "sks") == result
    assert has_token(prompt, "sks") == ("sks" in re.split(r"[\s,]+", prompt.lower()))
    others = [word for word in re.split(r"[\s,]+", prompt) if word and word.lower() != "sks"]
    assert [word for word in re.split(r"[\s,]+", result) if word] == others


@given(before=st.text(max_size=12), after=st.text(max_size=12))
def test_around_the_token_all_stays_byte_for_byte(before: str, after: str) -> None:
    before, after = before.replace("q", ""), after.replace("q", "").lstrip().lstrip(",").lstrip()
    assert remove_token(f"{before} qqq, {after}", "qqq") == f"{before} {after}"
    assert remove_token(f"{before},qqq {after}", "qqq") == f"{before},{after}"


@given(
    left=st.sampled_from(["", "a ", "a cup, ", "a,"]), right=st.sampled_from(["", " cup", ", cup", "  cup", " , cup"])
)
def test_no_double_space_is_introduced(left: str, right: str) -> None:
    assert "  " not in remove_token(f"{left}sks{right}", "sks")


def test_captions_without_the_token_are_named(folder: Path) -> None:
    (folder / "1.txt").write_text("a sks cup")
    (folder / "2.txt").write_text("a <sks> cup")
    message = refusal(folder)
    assert "1 of 2 captions lack the token 'sks'" in message
    assert "2.png: 'a <sks> cup'" in message
    assert "1.png" not in message


def test_tokens_of_one_adapter_are_kept_apart(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    photo(3).save(other / "3.png")
    first, second = load_concept(spec(folder)), load_concept(spec(other, token="ohwx"))
    check_tokens([first, second])
    with pytest.raises(ConceptError, match="'SKS' is used by two concepts"):
        check_tokens([first, load_concept(spec(other, token="SKS"))])
    (other / "3.txt").write_text("ohwx fish in a sks cup")
    with pytest.raises(ConceptError, match=r"3\.png: .* holds the token 'sks' of another concept"):
        check_tokens([first, load_concept(spec(other, token="ohwx"))])


# Captions.


def test_template_stands_in_where_no_image_has_a_caption(folder: Path) -> None:
    for name, content in (("README.txt", "not a caption"), ("design.json", "{}"), ("notes.md", "a sks cup")):
        (folder / name).write_text(content)
    concept = load_concept(spec(folder, alpha=2.0, weight=3.0))
    assert (concept.token, concept.class_noun, concept.alpha, concept.weight) == ("sks", "cup", 2.0, 3.0)
    assert [example.path.name for example in concept.examples] == ["1.png", "2.png"]
    assert [example.prompt for example in concept.examples] == ["a photo of a sks cup"] * 2
    assert [example.prior_prompt for example in concept.examples] == ["a photo of a cup"] * 2
    assert prompts(folder, template="{token}, one {class_noun}") == ["sks, one cup"] * 2


def test_each_source_of_captions(folder: Path) -> None:
    (folder / "1.txt").write_text("\ufeff sks, a cup \n", encoding="utf-8")
    (folder / "2.txt").write_text("sks, two cups")
    assert prompts(folder) == prompts(folder, captions="txt") == ["sks, a cup", "sks, two cups"]
    entries = [{"file_name": "2.png", "text": "sks B"}, "", {"file_name": "1.png", "text": "sks A", "more": 1}]
    write_metadata(folder, *entries)
    assert prompts(folder, captions="metadata") == ["sks A", "sks B"]
    assert prompts(folder, captions="txt") == ["sks, a cup", "sks, two cups"]
    assert prompts(folder, captions="template") == ["a photo of a sks cup"] * 2
    for sidecar in folder.glob("*.txt"):
        sidecar.unlink()
    assert prompts(folder) == ["sks A", "sks B"]


def test_sources_may_complete_each_other_but_not_disagree(folder: Path) -> None:
    write_metadata(folder, {"file_name": "1.png", "text": "sks A"})
    (folder / "2.txt").write_text("sks B")
    assert prompts(folder) == ["sks A", "sks B"]
    (folder / "1.txt").write_text("sks A")
    assert prompts(folder) == ["sks A", "sks B"]
    (folder / "1.txt").write_text("<sks> A")
    message = refusal(folder)
    for part in (
        "1.txt: '<sks> A'",
        "metadata.jsonl, 1.png: 'sks A'",
        "captions: txt, captions: metadata or captions: t",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ("auto", "no caption for 2.png; write one in 2.txt"),
        ("txt", "no caption for 2.png"),
        ("metadata", "is not there"),
    ],
)
def test_missing_captions_are_named(folder: Path, captions: str, expected: str) -> None:
    (folder / "1.txt").write_text("a sks cup")
    assert expected in refusal(folder, captions=captions)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file_name": "9.png", "text": "sks"}', "line 2: no image '9.png'"),
        ('{"file_name": "../1.png", "text": "sks"}', "line 2: no image"),
        ('{"file_name": "1.png", "text": "sks"}', "lines 1 and 2 both caption '1.png'"),
        ('{"file_name": "2.png", "text": ', "line 2: is not JSON"),
        ("[" * 100_000, "line 2: is not JSON"),
        ('["2.png", "sks"]', "line 2: lacks file_name or text"),
        ('{"file_name": "2.png", "caption": "sks"}', "line 2: lacks file_name or text"),
        ('{"file_name": "2.png", "text": 7}', "line 2: lacks file_name or text"),
        ('{"file_name": "2.png", "text": " "}', "line 2: the caption is empty"),
    ],
)
def test_bad_metadata_is_refused_by_line(folder: Path, line: str, expected: str) -> None:
    write_metadata(folder, {"file_name": "1.png", "text": "a sks cup"}, line)
    message = refusal(folder)
    assert expected in message
    assert "metadata.jsonl" in message


@pytest.mark.parametrize(("content", "expected"), [(b"", "is empty"), (b"sks caf\xe9", "not UTF-8")])
def test_bad_sidecars_are_refused_by_name(folder: Path, content: bytes, expected: str) -> None:
    (folder / "1.txt").write_bytes(content)
    message = refusal(folder)
    assert expected in message
    assert "1.txt" in message


def test_names_in_decomposed_unicode_meet_their_captions(tmp_path: Path) -> None:
    photo().save(tmp_path / "cafe\u0301 \U0001f375.png")
    write_metadata(tmp_path, {"file_name": "caf\u00e9 \U0001f375.png", "text": "a sks cup"})
    assert prompts(tmp_path) == ["a sks cup"]


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (("1.caption", "2.caption"), ".caption files"),
        (("1.TXT", "2.Txt"), ".txt files"),
        (("1.png.txt", "2.png.caption"), ".txt files and .caption files"),
    ],
)
def test_text_files_of_every_program_are_captions(folder: Path, names: tuple[str, str], source: str) -> None:
    for name in names:
        (folder / name).write_text(f"sks, from {name}")
    concept = load_concept(spec(folder))
    assert [example.prompt for example in concept.examples] == [f"sks, from {name}" for name in names]
    assert (concept.captions_from, concept.passed_over) == (source, ())


@pytest.mark.parametrize("control", ["\0", "\x01", "\x1b", "\x7f", "\x9b"])
def test_a_control_character_in_a_caption_is_refused_by_its_file(folder: Path, control: str) -> None:
    caption = f"a sks cup{control}[31m on grass"
    told = f"the caption holds the control character {control!r}; remove it, or type the caption anew"
    (folder / "1.txt").write_text(caption, encoding="utf-8")
    (folder / "2.txt").write_text("a sks cup")
    assert refusal(folder) == f"captions: {folder / '1.txt'}: {told}"
    (folder / "1.txt").write_text("a sks\tcup\non grass")
    assert prompts(folder)[0] == "a sks\tcup\non grass"
    write_metadata(folder, {"file_name": "1.png", "text": caption}, {"file_name": "2.png", "text": "a sks cup"})
    assert refusal(folder, captions="metadata") == f"captions: {folder / 'metadata.jsonl'}, line 1: {told}"


def test_names_of_files_are_shown_without_what_a_terminal_obeys(tmp_path: Path) -> None:
    name, shown = "\x1b[31m\n1 \u732b\u202f", "\\x1b[31m\\n1 \u732b\u202f"
    photo().save(tmp_path / f"{name}.png")
    assert f"no caption for {shown}.png; write one in {shown}.txt" in refusal(tmp_path, captions="txt")
    (tmp_path / f"{name}.txt").write_text("a cup")
    assert f"\n  {shown}.png: 'a cup'" in refusal(tmp_path)
    (tmp_path / f"{name}.txt").write_text("")
    assert f"{shown}.txt: the caption is empty" in refusal(tmp_path)


def test_two_text_files_of_one_photo_may_not_disagree(folder: Path) -> None:
    (folder / "2.txt").write_text("sks B")
    (folder / "1.txt").write_text("sks A")
    (folder / "1.caption").write_text("sks A")
    assert prompts(folder) == ["sks A", "sks B"]
    (folder / "1.caption").write_text("sks C")
    message = refusal(folder)
    assert "1.txt: 'sks A'" in message
    assert "1.caption: 'sks C'" in message


@pytest.mark.parametrize(
    "text",
    [
        'file_name,text\n1.png,"sks, a cup"\n2.png,a sks cup\n',
        '\ufefftext;file_name;mood\r\nsks, a cup;1.png;"good\r\nand long"\r\n\r\na sks cup;2.png;bad\r\n',
        '"file_name"\t"text"\n1.png\tsks, a cup\n2.png\ta sks cup',
    ],
)
def test_metadata_csv_is_read_as_metadata_jsonl_is(folder: Path, text: str) -> None:
    (folder / "metadata.csv").write_bytes(text.encode())
    assert prompts(folder) == prompts(folder, captions="metadata") == ["sks, a cup", "a sks cup"]
    assert load_concept(spec(folder)).captions_from == "metadata.csv"
    write_metadata(folder, {"file_name": "1.png", "text": "sks, another"})
    assert "metadata.jsonl and metadata.csv disagree on 1 of the images" in refusal(folder).replace(
        "metadata.csv and metadata.jsonl", "metadata.jsonl and metadata.csv"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("9.png,sks", "line 3: no image '9.png'"),
        ("1.png,sks", "lines 2 and 3 both caption '1.png'"),
        ("2.png,sks, a cup", "line 3: has 3 fields, the first line 2; put a caption with ','"),
        ('2.png,"sks', "is not CSV"),
        ("2.png, ", "line 3: the caption is empty"),
    ],
)
def test_bad_metadata_csv_is_refused_by_line(folder: Path, line: str, expected: str) -> None:
    (folder / "metadata.csv").write_text(f"file_name,text\n1.png,a sks cup\n{line}\n")
    message = refusal(folder)
    assert expected in message
    assert "metadata.csv" in message
    (folder / "metadata.csv").write_text("image,caption\n1.png,a sks cup\n")
    assert "lacks a column file_name or text" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "1.json",
        "1.tags",
        "1.png.json",
        "metadata.parquet",
        "captions.csv",
        "1_caption.caption",
        "1_b.txt",
        "prompts.json",
    ],
)
def test_captions_that_are_not_read_are_refused_and_not_replaced_by_the_template(folder: Path, name: str) -> None:
    (folder / name).write_text("a sks cup on a table")
    message = refusal(folder)
    assert "no caption for 1.png, 2.png" in message
    assert f"({name} may hold captions, but not where they are read)" in message
    concept = load_concept(spec(folder, captions="template"))
    assert [example.prompt for example in concept.examples] == ["a photo of a sks cup"] * 2
    assert (concept.captions_from, concept.passed_over) == ("the template 'a photo of a sks cup'", (name,))
