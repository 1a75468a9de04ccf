"""The named pictures of Pocket-XL's world, from a folder laid out as npm's emoji-datasource-google."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from cat_cluster.errors import BaseModelError
from cat_cluster.models.pocket import world as drawn_world

# How often a picture of each category stands in a scene, relative to the things that people personalise.
WEIGHTS: Mapping[str, float] = {
    "Animals & Nature": 1.0,
    "Food & Drink": 1.0,
    "Activities": 1.0,
    "Travel & Places": 1.0,
    "Objects": 1.0,
    "Smileys & Emotion": 0.2,
    "People & Body": 0.1,
    "Symbols": 0.1,
    "Flags": 0.05,
}
# How much more often than other things those come up that every picture book has. A model of this size cannot learn
# 857 things equally well in the hours of a CPU; photos of the world are as uneven.
EVERYDAY_WEIGHT = 8.0
_EVERYDAY = """
    accordion, airplane, alarm clock, ambulance, ant, apple, articulated lorry, athletic shoe, badger, bagel, balloon,
    banana, banjo, baseball, basketball, bathtub, beaver, bee, bell pepper, bike, bikini, bird, bison, boat, book,
    bread, broccoli, broom, bucket, burrito, bus, butterfly, cactus, cake, camera, candle, canoe, car, carrot, cat,
    chair, coffee, computer, cow, crocodile, cucumber, cupcake, dark sunglasses, desktop computer, dog, doughnut,
    duck, elephant, email, fire engine, fish, flamingo, fox, frog, gift, goose, gorilla, guitar, hamburger, hammer,
    hamster, handbag, harp, helicopter, hippopotamus, hook, horse, hotdog, hourglass, house, icecream, jeans, key,
    keyboard, kimono, koala, lab coat, ladybug, lemon, leopard, lion, lipstick, llama, lobster, mailbox, microphone,
    mortar board, motor scooter, mushroom, necktie, octopus, orangutan, otter, owl, ox, panda, parachute, peacock,
    pear, penguin, phone, pig, pineapple, pizza, plunger, polar bear, pretzel, printer, rabbit, radio, ram, rocket,
    rooster, rose, sandal, saxophone, school satchel, scorpion, screwdriver, sheep, shield, shirt, skunk, snail,
    soccer, socks, steam locomotive, stethoscope, stopwatch, strawberry, sunflower, syringe, t rex, tangerine, taxi,
    teapot, teddy bear, tent, three button mouse, tiger, toilet, tomato, toolbox, tophat, tractor, traffic light,
    train, trolleybus, truck, tulip, turtle, tv, umbrella, unicorn, violin, volleyball, watch, wolf, zebra
"""
EVERYDAY = frozenset(" ".join(_EVERYDAY.split()).split(", "))
_THINGS = frozenset(category for category, weight in WEIGHTS.items() if weight == 1.0)
_CLASSES: Mapping[str, str] = {  # subcategory -> the word for any of it
    "animal-mammal": "animal",
    "animal-bird": "bird",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "insect",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "meal",
    "food-asian": "meal",
    "food-sweet": "sweet",
    "drink": "drink",
    "place-building": "building",
    "place-religious": "building",
    "transport-ground": "vehicle",
    "transport-water": "ship",
    "transport-air": "aircraft",
    "time": "clock",
    "clothing": "garment",
    "musical-instrument": "musical instrument",
    "tool": "tool",
    "book-paper": "book",
    "sport": "toy",
    "game": "toy",
    "flag": "flag",
    "country-flag": "flag",
    "heart": "heart",
    "face-smiling": "face",
    "person": "person",
    "person-role": "person",
}
# Nicknames that say less than the Unicode name: "dog2", "clock130", "u7a7a", and one that nobody should caption with.
_OBSCURE = re.compile(r"[a-z]\d+$|^u\w{4}$|^flag-|lower_left|^shit$")
_CLOCK_FACE = "clock face"  # 24 pictures that differ in two hands: together as frequent as two or three others
_COLOUR_WORDS = frozenset({*drawn_world.COLOURS, "grey", "rainbow", "golden", "colourful"})


@dataclass(frozen=True)
class Emoji:
    """A named picture: `code` is its Unicode code points, `others` its further names, `kind` the word for its class.

    `weight` says how often it is drawn; a picture that may be `recoloured` has a name without a colour.
    """

    code: str
    name: str
    others: tuple[str, ...]
    kind: str | None
    category: str
    weight: float
    recoloured: bool
    file: Path = field(repr=False, compare=False)

    @property
    def is_thing(self) -> bool:
        """Whether it is an animal, a plant, food, a vehicle, a building or an object, not a face or a sign."""
        return self.category in _THINGS

    @cached_property
    def cutout(self) -> Image.Image:
        """The picture in RGBA without its transparent margin."""
        return cutout(self.file)


def cutout(path: Path) -> Image.Image:
    """A picture file in RGBA without its transparent margin."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    # What is all but transparent is a shadow or the rim of the antialiasing: it is no part of the thing's size.
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 24 else 0).getbbox()
    if box is None:
        raise BaseModelError(f"{path} is all transparent; give the unpacked npm package emoji-datasource-google")
    return image.crop(box)


def load_emojis(package: Path) -> tuple[Emoji, ...]:
    """The pictures of an unpacked emoji-datasource-google, by code, each with a name that no other has.

    Raises BaseModelError for a folder that is no such package.
    """
    index = package / "emoji.json"
    try:
        rows = json.loads(index.read_text(encoding="utf-8"))
        listed = [row for row in rows if row["has_img_google"] and row["category"] in WEIGHTS]
        names = _names(listed)
        found = [_emoji(row, *names[row["unified"]], package) for row in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(
            f"{index} does not list emojis ({error!r}); give the unpacked npm package emoji-datasource-google 16.0.0"
        ) from error
    missing = [emoji.file.name for emoji in found if not emoji.file.is_file()]
    if missing or not found:
        raise BaseModelError(
            f"{package} lacks {len(missing) or 'all'} of its {len(listed)} pictures ({', '.join(missing[:3])}); "
            "unpack emoji-datasource-google 16.0.0 again"
        )
    return tuple(sorted(found, key=lambda emoji: emoji.code))


def _emoji(row: Mapping[str, Any], name: str, others: tuple[str, ...], package: Path) -> Emoji:
    words = {word for text in (name, *others) for word in text.split()}
    return Emoji(
        code=row["unified"].lower(),
        name=name,
        others=others,
        kind=_CLASSES.get(row["subcategory"]),
        category=row["category"],
        weight=_weight(name, row["category"]),
        recoloured=row["category"] in _THINGS and not words & _COLOUR_WORDS,
        file=package / "img" / "google" / "64" / row["image"],
    )


def _weight(name: str, category: str) -> float:
    if name.startswith(_CLOCK_FACE):
        return 0.1
    return WEIGHTS[category] * (EVERYDAY_WEIGHT if name in EVERYDAY else 1.0)


def _names(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Code -> (its name, its further names): the first of its names that no other picture has a better claim to.

    A picture whose Unicode name is exactly a word ("DOG") goes before one of which it is a nickname ("DOG FACE").
    """
    claims = {row["unified"]: _candidates(row) for row in rows}
    full = {row["unified"]: _plain(row["name"]) for row in rows}
    taken: dict[str, str] = {}
    chosen: dict[str, str] = {}
    order = sorted(claims, key=lambda code: (full[code] != claims[code][0], code))
    for code in order:
        name = next((claim for claim in (*claims[code], f"{full[code]} {code.lower()}") if claim not in taken), "")
        taken[name] = chosen[code] = name
    return {
        code: (name, tuple(dict.fromkeys(claim for claim in claims[code] if claim not in taken)))
        for code, name in chosen.items()
    }


def _candidates(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in order of preference: short ones first, as people say them, then Unicode's."""
    full = _plain(row["name"])
    shorts = [_plain(name) for name in row["short_names"] if not _OBSCURE.search(name) and row["category"] != "Flags"]
    faceless = [name.removesuffix(" face") for name in (*shorts, full) if row["category"] == "Animals & Nature"]
    return tuple(dict.fromkeys(name for name in (*faceless, *shorts, full) if name))


def _plain(text: str) -> str:
    """Lower-case ASCII words with single spaces: the tokenizer learns nothing else."""
    ascii_text = unicodedata.normalize("NFKD", text.replace("\u2019", "")).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9]+", ascii_text.replace("'", "")))
