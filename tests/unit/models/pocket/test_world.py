from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.pretraining.captions import caption_labels, insert_word, random_word, scene_caption
from cat_cluster.models.pocket.pretraining.scenes import scene_labels

seeds = st.integers(min_value=0, max_value=2**32 - 1)


def test_a_scene_is_drawn_the_same_every_time() -> None:
    scene = world.random_scene(np.random.default_rng(3))
    first, second = world.draw(scene), world.draw(scene)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)


_DESIGN = world.Design("cup", (220, 40, 40), "band", (40, 60, 220), False)


@pytest.mark.parametrize(
    "other",
    [
        replace(_DESIGN, object="fish"),
        replace(_DESIGN, body_rgb=(30, 160, 60)),
        replace(_DESIGN, pattern="checks"),
        replace(_DESIGN, second_rgb=(240, 240, 240)),
        replace(_DESIGN, eyes=True),
    ],
)
def test_every_part_of_a_design_is_visible(other: world.Design) -> None:
    scene = world.Scene(_DESIGN, "on grass", 32, 36, 40, 1.0, 1)
    changed = replace(scene, design=other)
    difference = np.abs(world.draw(scene).astype(int) - world.draw(changed).astype(int)).max(axis=2)
    assert (difference > 40).sum() >= 40  # pixels


def test_places_differ_by_far_more_than_their_own_jitter() -> None:
    design = world.Design("cup", (220, 40, 40), "plain", (40, 60, 220), False)

    def corners(place: str, seed: int) -> np.ndarray:
        frame = world.draw(world.Scene(design, place, 32, 38, 36, 1.0, seed)).astype(float)
        return np.concatenate([frame[20:24, :6].mean((0, 1)), frame[58:, :6].mean((0, 1))])

    middles = np.stack([np.mean([corners(place, seed) for seed in range(8)], axis=0) for place in world.PLACES])
    for index, place in enumerate(world.PLACES):
        for seed in range(20, 40):
            distances = np.linalg.norm(middles - corners(place, seed), axis=1)
            assert distances.argmin() == index


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_caption_says_nothing_that_is_not_in_the_scene(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = world.random_scene(rng)
    said, truth = caption_labels(scene_caption(scene, rng)), scene_labels(scene)
    assert said["object"] == truth["object"]
    assert all(value is None or value == truth[name] for name, value in said.items())


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_full_caption_says_all_that_has_a_name(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = world.random_scene(rng)
    said, truth = caption_labels(scene_caption(scene, rng, rare=0.0, full=True)), scene_labels(scene)
    unsaid = {"pattern": "plain", "eyes": "no"}
    assert all(said[name] == (None if truth[name] == unsaid.get(name) else truth[name]) for name in truth)


def test_captions_leave_out_attributes_and_insert_words_at_their_rates() -> None:
    rng = np.random.default_rng(0)
    design = world.Design("cup", world.palette_rgb("red"), "stripes", world.palette_rgb("blue"), True)
    scene = world.Scene(design, "on grass", 32, 36, 40, 1.0, 1)
    texts = [scene_caption(scene, rng) for _ in range(3_000)]
    said = [caption_labels(text) for text in texts]
    for name, share in (("colour", 0.85), ("place", 0.85), ("pattern", 0.75), ("eyes", 0.6)):
        assert np.mean([row[name] is not None for row in said]) == pytest.approx(share, abs=0.03)
    known = {"a", "an", "of", "photo", "picture", "red", "blue", "cup", "with", "stripes", "and", "eyes", "on", "grass"}
    assert np.mean([bool(set(text.split()) - known) for text in texts]) == pytest.approx(0.15, abs=0.025)


def test_an_inserted_word_stands_before_the_noun_phrase() -> None:
    assert insert_word("a photo of an orange cup on grass", "sks") == "a photo of a sks orange cup on grass"
    assert insert_word("a red cup with a blue band", "zwx") == "a zwx red cup with a blue band"


def test_random_words_are_short_and_unknown() -> None:
    rng = np.random.default_rng(0)
    words = [random_word(rng) for _ in range(500)]
    assert all(re.fullmatch("[a-z]{2,5}", word) for word in words)
    assert not set(words) & {*world.OBJECTS, *world.COLOURS, "on", "in", "at", "a", "of"}


def test_palette_names_are_found_again_and_disjoint() -> None:
    assert [world.colour_name(world.palette_rgb(name)) for name in world.COLOURS] == list(world.COLOURS)
    assert world.colour_name((0, 128, 128)) is None  # teal has no name
    assert world.nearest_colour((0, 128, 128)) in world.COLOURS


@pytest.mark.slow
def test_random_scenes_never_show_a_held_out_concept() -> None:
    held_out = {
        (d.object, world.colour_name(d.body_rgb), d.pattern, world.colour_name(d.second_rgb))
        for d in world.CONCEPTS.values()
    }
    rng = np.random.default_rng(0)
    designs = [world.random_scene(rng).design for _ in range(20_000)]
    seen = {(d.object, world.colour_name(d.body_rgb), d.pattern, world.colour_name(d.second_rgb)) for d in designs}
    assert len(held_out) == len(world.CONCEPTS) >= 10
    assert not held_out & seen
    relatives = {(noun, pattern) for noun, _, pattern, _ in held_out}
    assert relatives <= {(noun, pattern) for noun, _, pattern, _ in seen}  # only the exact combination is missing


def test_photos_show_one_design_in_different_places() -> None:
    design = world.CONCEPTS["striped-cup"]
    album = world.photos(design, 6, seed=1)
    assert {scene.design for _, scene in album} == {design}
    assert {scene.place for _, scene in album} == set(world.PLACES)
    again = world.photos(design, 6, seed=1)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(album, again, strict=True))
    assert not np.array_equal(album[0][0], world.photos(design, 6, seed=2)[0][0])


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_objects_stay_inside_the_frame(seed: int) -> None:
    scene = world.random_scene(np.random.default_rng(seed))
    half = scene.scale / 2
    assert half <= scene.x <= world.SIZE - half
    assert half <= scene.y <= world.SIZE - half
