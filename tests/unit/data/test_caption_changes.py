"""Captions that change from row to row: the trigger stays, the prior prompt is the row's own, all else is as it was."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_cluster.data.caption_changes import changed_caption, tag_warnings
from cat_cluster.data.concepts import Concept, load_concept
from cat_cluster.data.draws import (
    AdapterTask,
    Batch,
    ConceptMaterial,
    Decoys,
    draw_batch,
    keyed_generator,
    pool_entries,
)
from cat_cluster.data.text_length import check_caption_lengths
from cat_cluster.errors import ConceptError
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.text_limit import TextLimit, local_text_limit
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.sections import TrainingSpec
from tests.support.texts import plain_replacement, square_sizes

CAPTION = "on grass, sks, a red cup, snow,  at night , blue sky"
MOVABLE = ["on grass", "snow", "at night", "blue sky"]
POOLS = ({}, {"teacher": "pool", "pool_size": 24})


def material(token: str = "sks", caption: str = CAPTION, views: int = 2) -> ConceptMaterial:
    moments = torch.from_numpy(keyed_generator("moments", token).standard_normal((views, 8, 4, 4))).float()
    prompts = tuple(f"{caption}, number {i}" for i in range(views))
    removed = tuple(plain_without(prompt, token) for prompt in prompts)
    decoys = (Decoys(("bzg", "qhp"), (f"{token}-else",)),) * views
    return ConceptMaterial(token, "cup", 1.0, 1.0, moments, prompts, removed, square_sizes(views), decoys)


def plain_without(prompt: str, token: str) -> str:
    """The prompt without a token that is a tag of its own, or a word with a space behind it."""
    return ", ".join(tag.replace(f"{token} ", "") for tag in prompt.split(", ") if tag.strip() != token)


def task(adapter_id: str = "mug", concepts: tuple[ConceptMaterial, ...] = (), **changes: object) -> AdapterTask:
    training = TrainingSpec.model_validate({"cat_fraction": 1.0, "prior_prompt": "token_removed", **changes})
    return AdapterTask(adapter_id, concepts or (material(),), training, ("a photo of a red car",))


def drawn(one: AdapterTask, steps: int = 20) -> list[Batch]:
    return [draw_batch([one], [step], 1000) for step in range(steps)]


def changed(seed: int, caption: str = CAPTION, noun: str = "cup", **changes: object) -> str:
    return changed_caption(caption, "sks", noun, TrainingSpec.model_validate(changes), keyed_generator("c", seed))


def tags(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",")]


def same(one: object, two: object) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "changes",
    [
        {"caption_dropout": 0.4},
        {"tag_dropout": 0.4},
        {"shuffle_tags": True},
        {"tag_dropout": 0.3, "shuffle_tags": True},
    ],
)
def test_all_else_of_a_row_is_as_it_is_without(changes: dict[str, object], pool: dict[str, object]) -> None:
    common = {"decoy_fraction": 0.4, "prior_prompt": "mixture", "noise_offset": 0.1, "rows_per_concept": 8, **pool}
    differing = 0
    for plain, other in zip(drawn(task(**common)), drawn(task(**common, **changes)), strict=True):
        for field in dataclasses.fields(Batch):
            if field.name not in ("prompts", "prior_prompts", "pool_keys"):
                assert same(getattr(plain, field.name), getattr(other, field.name)), field.name
        differing += plain.prompts != other.prompts
        for prior, before in zip(other.prior_prompts, plain.prior_prompts, strict=True):
            assert (prior in ("", "a photo of a red car")) == (before in ("", "a photo of a red car"))
            assert [word in prior for word in ("bzg", "qhp", "else")] == [w in before for w in ("bzg", "qhp", "else")]
    assert differing > 15


@pytest.mark.parametrize("pool", POOLS)
def test_the_prior_prompt_is_the_rows_own_without_the_token_and_its_decoy_the_row_with_a_word(
    pool: dict[str, object],
) -> None:
    changes = {"caption_dropout": 0.3, "tag_dropout": 0.3, "shuffle_tags": True, "rows_per_concept": 8, **pool}
    kinds: Counter[tuple[bool, bool]] = Counter()
    for batch in drawn(task(decoy_fraction=0.5, **changes)):
        for prompt, prior in zip(batch.prompts, batch.prior_prompts, strict=True):
            word = next((word for word in ("bzg", "qhp", "sks-else") if word in prior), "")
            kinds[prompt == "sks cup", bool(word)] += 1
            assert prior == (plain_replacement(prompt, "sks", word) if word else plain_without(prompt, "sks"))
            assert prompt != prior
    assert len(kinds) == 4


def test_a_caption_is_cut_down_to_token_and_class_noun_in_its_share_of_the_rows() -> None:
    prompts = [
        prompt for batch in drawn(task(caption_dropout=0.25, rows_per_concept=8), 100) for prompt in batch.prompts
    ]
    minimal = [prompt for prompt in prompts if prompt == "sks cup"]
    assert len(minimal) / len(prompts) == pytest.approx(0.25, abs=0.05)
    assert {*prompts} == {"sks cup", *material().prompts}, "the others are captions to the byte"


@given(seed=st.integers(0, 10**6), dropout=st.sampled_from([0.0, 0.3, 0.9]), keep=st.integers(0, 8))
@settings(max_examples=200, deadline=None)
def test_what_holds_the_token_or_the_class_noun_is_there_and_tags_are_the_captions(
    seed: int, dropout: float, keep: int
) -> None:
    shuffled = changed(seed, tag_dropout=dropout, shuffle_tags=True, keep_tags=keep)
    before, after = tags(CAPTION), tags(shuffled)
    assert Counter(after) <= Counter(before)
    kept = [tag for place, tag in enumerate(before) if place < keep or tag in ("sks", "a red cup")]
    assert [tag for tag in after if tag in kept] == kept
    if dropout == 0.0:
        assert len(after) == len(before)
        assert all(after[place] == tag for place, tag in enumerate(before) if tag in kept)


def test_every_order_is_as_frequent_and_every_tag_is_left_out_in_its_share() -> None:
    orders = Counter(
        tuple(tag for tag in tags(changed(seed, shuffle_tags=True)) if tag in MOVABLE) for seed in range(4800)
    )
    assert len(orders) == 24
    assert max(orders.values()) < 2 * min(orders.values())
    left = Counter(tag for seed in range(2000) for tag in MOVABLE if tag not in changed(seed, tag_dropout=0.3))
    assert {tag: count / 2000 for tag, count in left.items()} == pytest.approx(dict.fromkeys(MOVABLE, 0.3), abs=0.05)


def test_a_smaller_share_is_a_part_of_a_larger_one_in_the_same_order() -> None:
    for seed in range(100):
        some, more = (tags(changed(seed, tag_dropout=share, shuffle_tags=True)) for share in (0.3, 0.7))
        assert [tag for tag in some if tag in more] == more


def test_a_caption_without_movable_tags_stays_to_the_byte() -> None:
    for caption in ("a photo of a sks cup", "sks,a  cup", "  sks ,", "snow,sks"):
        for seed in range(20):
            assert changed(seed, caption, shuffle_tags=True) == caption


def test_tags_with_any_word_of_the_class_noun_stay() -> None:
    seen = {changed(seed, "a cat, sks, statue, snow, dusk", "cat statue", tag_dropout=0.9) for seed in range(300)}
    assert all({"a cat", "sks", "statue"} <= set(tags(caption)) for caption in seen)
    assert "a cat, sks, statue" in seen


@pytest.mark.parametrize("pool", POOLS)
def test_changes_do_not_depend_on_the_pack_or_on_what_was_drawn_before(pool: dict[str, object]) -> None:
    mug = task(caption_dropout=0.3, tag_dropout=0.3, shuffle_tags=True, **pool)
    tea = task("tea", (material("zwx"), material("ohwx")), shuffle_tags=True)
    for step in (9, 0, 4):
        alone = draw_batch([mug], [step], 1000)
        packed = draw_batch([tea, mug], [step, step], 1000)
        rows = (packed.adapter_B == 1).nonzero().flatten().tolist()
        assert alone.prompts == tuple(packed.prompts[row] for row in rows)
        assert alone.prior_prompts == packed.prior_prompts[-len(alone.prior_prompts) :]
    other = task("other", caption_dropout=0.3, tag_dropout=0.3, shuffle_tags=True, **pool)
    assert drawn(mug, 3)[2].prompts != drawn(other, 3)[2].prompts
    paired = (
        dataclasses.replace(one, training=one.training.model_copy(update={"draw_key": "k"})) for one in (mug, other)
    )
    assert len({tuple(batch.prompts for batch in drawn(one)) for one in paired}) == 1


def test_a_pools_entries_have_their_caption_and_keys_that_tell_prior_prompts_apart() -> None:
    plain, shuffled = (task(shuffle_tags=on, teacher="pool", pool_size=20) for on in (False, True))
    pairs = list(zip(pool_entries(plain, 1000), pool_entries(shuffled, 1000), strict=True))
    assert all((a.key == b.key) == (a.prior_prompt == b.prior_prompt) for a, b in pairs)
    assert sum(a.key != b.key for a, b in pairs) > 30
    of_entry = {entry.key: entry.prompt for _, entry in pairs}
    for batch in drawn(shuffled):
        assert all(of_entry[key] == prompt for key, prompt in zip(batch.pool_keys, batch.prompts, strict=True))


def concept(folder: Path, *captions: str) -> Concept:
    for number, caption in enumerate(captions):
        Image.new("RGB", (40, 40), (50 * number, 9, 9)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(folder)))


def test_settings_that_find_no_tags_are_told_to_change_nothing(tmp_path: Path) -> None:
    def told(*captions: str, **changes: object) -> bool:
        found = tag_warnings("one", [concept(tmp_path, *captions)], TrainingSpec.model_validate(changes))
        assert all(text.startswith("adapter one, token sks: training.") for text in found)
        return bool(found)

    assert told("a photo of a sks cup", "sks, a cup", shuffle_tags=True, tag_dropout=0.5)
    assert told("sks, a cup, snow", "sks, a cup, dusk", shuffle_tags=True)
    assert not told("sks, a cup, snow", "sks, a cup, dusk", tag_dropout=0.1)
    assert not told("sks, a cup", "sks, a cup, dusk, snow", shuffle_tags=True)
    assert told("sks, a cup", "sks, a cup, dusk, snow", shuffle_tags=True, keep_tags=3)
    assert not told("a photo of a sks cup", "sks cup", caption_dropout=0.5)


def test_a_token_that_shuffling_may_move_behind_the_limit_is_refused(tmp_path: Path) -> None:
    limit = local_text_limit("pocket")
    assert isinstance(limit, TextLimit)
    long = "a red tree and a blue house in snow by a window on a table at night by a door"
    taught = [concept(tmp_path, f"snow, dusk, sks, a cup, {long}, {long}")]
    shown = (changed(seed, taught[0].examples[0].prompt, shuffle_tags=True) for seed in range(100))
    assert any("sks" not in limit.split(Prompt(caption))[0] for caption in shown)
    check_caption_lengths("one", taught, limit, TrainingSpec())
    with pytest.raises(ConceptError, match=r"comes later in 1 of 1 captions when their tags are shuffled"):
        check_caption_lengths("one", taught, limit, TrainingSpec(shuffle_tags=True))
    check_caption_lengths("one", taught, limit, TrainingSpec(shuffle_tags=True, keep_tags=3))
