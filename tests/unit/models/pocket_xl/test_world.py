from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_cluster.errors import BaseModelError
from cat_cluster.models.pocket.places import PLACES
from cat_cluster.models.pocket.world import colour_name
from cat_cluster.models.pocket_xl import world
from cat_cluster.models.pocket_xl.captions import scene_caption, with_article
from cat_cluster.models.pocket_xl.concepts import CONCEPTS
from cat_cluster.models.pocket_xl.emojis import EVERYDAY, EVERYDAY_WEIGHT, Emoji, load_emojis

seeds = st.integers(min_value=0, max_value=2**32 - 1)


def test_names_are_what_people_say_and_each_belongs_to_one_picture(emojis: tuple[Emoji, ...]) -> None:
    names = {emoji.code: (emoji.name, emoji.others) for emoji in emojis}
    assert names == {
        "1f600": ("dog face", ()),  # "dog" is the whole animal's
        "1f601": ("dog", ()),
        "1f602": ("lion", ("lion face",)),
        "1f603": ("apple", ("red apple",)),
        "1f604": ("teddy bear", ()),
        "1f605": ("truck", ("lorry", "delivery truck")),
        "1f606": ("tophat", ("top hat",)),
        "1f607": ("cote divoire flag", ()),
    }


def test_only_things_without_a_colour_in_their_names_are_recoloured(emojis: tuple[Emoji, ...]) -> None:
    assert {emoji.name for emoji in emojis if not emoji.recoloured} == {"apple", "cote divoire flag"}
    assert {emoji.name for emoji in emojis if not emoji.is_thing} == {"cote divoire flag"}


def test_everyday_things_come_up_more_often_than_others(emojis: tuple[Emoji, ...]) -> None:
    weights = {emoji.name: emoji.weight for emoji in emojis}
    assert weights == dict.fromkeys(weights, EVERYDAY_WEIGHT) | {"dog face": 1.0, "cote divoire flag": 0.05}
    taught = {concept.noun for concept in CONCEPTS.values()}
    assert taught - EVERYDAY == {"robot face"}, "a concept is taught among others of its kind that the base knows"
    rng = np.random.default_rng(0)
    first = Counter(world.random_scene(emojis, rng).things[0].index for _ in range(4_000))
    common, rare = (next(i for i, one in enumerate(emojis) if one.name == name) for name in ("lion", "dog face"))
    assert first[common] / first[rare] == pytest.approx(EVERYDAY_WEIGHT, rel=0.35)


def test_a_cutout_has_no_margin(emojis: tuple[Emoji, ...]) -> None:
    for number, emoji in enumerate(emojis):
        assert emoji.cutout.size == (53, 45 - number)


def test_a_folder_that_is_no_package_and_a_lost_picture_are_each_one_clear_error(package: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"emoji\.json.*emoji-datasource-google 16\.0\.0"):
        load_emojis(tmp_path)
    shutil.copytree(package, tmp_path / "copy")
    (tmp_path / "copy" / "img" / "google" / "64" / "1f603.png").unlink()
    with pytest.raises(BaseModelError, match=r"lacks 1 of its 8 pictures \(1f603\.png\)"):
        load_emojis(tmp_path / "copy")
    (tmp_path / "copy" / "emoji.json").write_text(json.dumps([{"has_img_google": True}]))
    with pytest.raises(BaseModelError, match="category"):
        load_emojis(tmp_path / "copy")


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_every_frame_has_the_scenes_shape_and_the_sum_of_its_parts(emojis: tuple[Emoji, ...], seed: int) -> None:
    scene = world.random_scene(emojis, np.random.default_rng(seed))
    frame = world.draw(scene, emojis)
    assert frame.shape == (scene.height, scene.width, 3)
    assert frame.dtype == np.uint8
    assert np.array_equal(frame, world.draw(scene, emojis))
    assert (scene.height, scene.width) in world.FRAMES
    assert scene.time_ids == (*scene.original, *scene.crop, scene.height, scene.width)
    top, left = scene.crop
    assert top + scene.height <= scene.canvas[0]
    assert left + scene.width <= scene.canvas[1]
    if len(scene.things) == 1:  # a caption's thing is not cut away
        assert abs(scene.things[0].y - top - scene.height / 2) <= scene.height / 2 + 1
        assert abs(scene.things[0].x - left - scene.width / 2) <= scene.width / 2 + 1
    for thing in scene.things:
        assert thing.size / 2 <= thing.x <= scene.canvas[1] - thing.size / 2
        assert thing.size / 2 <= thing.y <= scene.canvas[0] - thing.size / 2
        assert (thing.colour == "") or colour_name(thing.rgb) == thing.colour


def _scene(**changes: object) -> world.Scene:
    whole = (64, 64)
    thing = world.Thing(4, 30.0, 40.0, 36.0)
    return replace(world.Scene((thing,), "on grass", 1.0, 3, 64, 64, whole, whole, (0, 0)), **changes)


def test_a_thing_stands_where_the_scene_says_in_its_own_colours(emojis: tuple[Emoji, ...]) -> None:
    frame = world.draw(_scene(), emojis).astype(int)
    empty = world.draw(_scene(things=()), emojis).astype(int)
    shadow_free = np.abs(frame - empty).max(axis=2) > 60
    rows, columns = np.nonzero(shadow_free)
    assert columns.min() == pytest.approx(30 - 18, abs=1)
    assert columns.max() == pytest.approx(30 + 17, abs=1)
    assert rows.max() == pytest.approx(40 + 17, abs=1)
    assert frame[40, 14].tolist() == pytest.approx([140, 80, 30], abs=3)


def test_a_painted_thing_has_the_colour_that_its_caption_says(emojis: tuple[Emoji, ...]) -> None:
    blue = (40, 80, 220)
    thing = world.Thing(4, 30.0, 40.0, 36.0, colour="blue", rgb=blue)
    frame = world.draw(_scene(things=(thing,)), emojis)
    assert frame[40, 14].tolist() == pytest.approx(blue, abs=8)
    rng = np.random.default_rng(0)
    assert scene_caption(_scene(things=(thing,)), emojis, rng, full=True) == "a photo of a blue teddy bear on grass"


def test_a_crop_is_a_window_of_the_whole_picture(emojis: tuple[Emoji, ...]) -> None:
    whole = _scene(height=64, width=88, canvas=(64, 88), original=(64, 88))
    cut = replace(whole, width=64, crop=(0, 20))
    assert np.array_equal(world.draw(cut, emojis), world.draw(whole, emojis)[:, 20:84])


def test_a_small_original_is_blurred_and_a_large_one_is_not(emojis: tuple[Emoji, ...]) -> None:
    sharp, large, small = (world.draw(_scene(original=(side, side)), emojis) for side in (64, 640, 32))
    assert np.array_equal(sharp, large)

    def detail(frame: np.ndarray) -> float:
        return float(np.abs(np.diff(frame.astype(float), axis=1)).max())

    assert detail(small) < 0.8 * detail(sharp)


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_a_full_caption_names_all_that_is_in_the_scene(emojis: tuple[Emoji, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = world.random_scene(emojis, rng)
    phrases = [
        with_article(" ".join(word for word in (thing.bulk, thing.colour, emojis[thing.index].name) if word))
        for thing in scene.things
    ]
    assert scene_caption(scene, emojis, rng, full=True) == f"a photo of {' beside '.join(phrases)} {scene.place}"


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_a_caption_says_nothing_that_is_not_in_the_scene(emojis: tuple[Emoji, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = world.random_scene(emojis, rng)
    text = scene_caption(scene, emojis, rng)
    said = {place for place in PLACES if place in text}
    assert said <= {scene.place}
    names = [{emojis[t.index].name, *emojis[t.index].others, emojis[t.index].kind} for t in scene.things]
    assert all(any(name is not None and name in text for name in own) for own in names)
    true = {thing.colour for thing in scene.things} | {thing.bulk for thing in scene.things} | {"red"}  # "red apple"
    assert {word for word in text.split() if word in (*world.COLOURS, "small", "big")} <= true


def test_scenes_come_in_their_shares(emojis: tuple[Emoji, ...]) -> None:
    rng = np.random.default_rng(1)
    scenes = [world.random_scene(emojis, rng) for _ in range(3_000)]
    shapes = Counter((scene.height, scene.width) for scene in scenes)
    for shape, share in world.FRAMES.items():
        assert shapes[shape] / len(scenes) == pytest.approx(share, abs=0.03)
    assert sum(len(scene.things) == 2 for scene in scenes) / len(scenes) == pytest.approx(0.4, abs=0.03)
    flags = sum(thing.index == 7 for scene in scenes for thing in scene.things)
    assert flags / sum(len(scene.things) for scene in scenes) < 0.03  # its weight is 0.05 of 7.05


def test_concepts_are_whole_pictures_that_stand_in_other_places_each_time() -> None:
    assert len(CONCEPTS) >= 24
    for concept in CONCEPTS.values():
        assert max(concept.cutout.size) >= 128
    album = world.photos(CONCEPTS["fluent-teddy-bear"], 6, 0)
    assert {scene.place for _, scene in album} == set(PLACES)
    assert all(frame.shape == (64, 64, 3) for frame, _ in album)


def test_concept_pictures_come_with_their_licence_and_are_small() -> None:
    folder = Path(world.__file__).parent / "concepts"
    files = sorted(folder.iterdir())
    assert {path.stem for path in files if path.suffix == ".webp"} == {concept.code for concept in CONCEPTS.values()}
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in files) < 250_000
    assert all(Image.open(path).size == (256, 256) for path in files if path.suffix == ".webp")
