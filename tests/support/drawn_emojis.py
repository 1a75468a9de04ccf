"""A small package laid out as npm's emoji-datasource-google, of drawn stand-ins: no test reaches a network."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

# name, nicknames, category, subcategory, shape, colour
STAND_INS = (
    ("DOG FACE", ["dog"], "Animals & Nature", "animal-mammal", "ellipse", (180, 120, 60)),
    ("DOG", ["dog2"], "Animals & Nature", "animal-mammal", "box", (150, 90, 50)),
    ("LION FACE", ["lion_face"], "Animals & Nature", "animal-mammal", "ring", (230, 160, 40)),
    ("RED APPLE", ["apple"], "Food & Drink", "food-fruit", "ellipse", (220, 40, 40)),
    ("TEDDY BEAR", ["teddy_bear"], "Activities", "game", "ring", (140, 80, 30)),
    ("DELIVERY TRUCK", ["truck", "lorry"], "Travel & Places", "transport-ground", "box", (60, 160, 90)),
    ("TOP HAT", ["tophat"], "Objects", "clothing", "box", (40, 40, 50)),
    ("C\u00f4te d\u2019Ivoire Flag", ["flag-ci"], "Flags", "country-flag", "box", (250, 140, 30)),
)


def write_emojis(folder: Path) -> Path:
    """Write emoji.json and 64x64 pictures to `folder`, in the package's layout; returns `folder`."""
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    rows = []
    for number, (name, shorts, category, subcategory, shape, colour) in enumerate(STAND_INS):
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        pen = ImageDraw.Draw(image)
        box = (6, 12 + number, 58, 56)
        if shape == "box":
            pen.rectangle(box, fill=(*colour, 255))
        else:
            pen.ellipse(box, fill=(*colour, 255))
        pen.ellipse((24, 26, 40, 42), fill=(250, 250, 250, 255) if shape == "ring" else (20, 20, 20, 255))
        code = f"1F6{number:02}"
        image.save(pictures / f"{code.lower()}.png")
        rows.append(
            {
                "unified": code,
                "name": name,
                "short_names": shorts,
                "category": category,
                "subcategory": subcategory,
                "image": f"{code.lower()}.png",
                "has_img_google": True,
            }
        )
    rows.append(rows[0] | {"unified": "1F3FB", "category": "Component"})
    rows.append(rows[0] | {"unified": "1F3FC", "has_img_google": False})
    (folder / "emoji.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
