"""The model card's figures as a file, and pictures with labels."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from cat_cluster.models.generate import image_array


def save_card(weights: Path, recipe: Mapping[str, Any], figures: dict[str, Any], *, seed: int) -> Path:
    """Write `weights`/card.json: recipe, what each stage took, hardware, versions, figures."""
    training = {}
    for note in sorted((weights / "work").glob("*.json")):
        progress = json.loads(note.read_text(encoding="utf-8"))
        training[note.stem] = {"steps": progress["step"], "seconds": progress["seconds"], "loss": progress["loss"]}
    card = {
        "recipe": dict(recipe),
        "seed": seed,
        "training": _rounded(training),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "figures": _rounded(figures),
    }
    path = weights / "card.json"
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return path


def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """s(i, j) = (1 + cos) / 2 of unit features [N, F] and [M, F]: [N, M]."""
    return (1 + a @ b.T) / 2


def paired_similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """s(i, i) of unit features [N, F] and [N, F]: [N]."""
    return (1 + (a * b).sum(-1)) / 2


def labelled_sheet(
    pictures: torch.Tensor | Sequence[torch.Tensor], columns: list[str], rows: list[str], out: Path, zoom: int = 2
) -> Path:
    """Pictures, [3, H, W] in [0, 1] each, row by row with labels, as a PNG."""
    frames = [image_array(picture[None])[0] for picture in pictures]
    tall, wide = (zoom * max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    left, top, gap = 60, 44 if any(columns) else 6, 4
    sheet = Image.new("RGB", (left + len(columns) * (wide + gap), top + len(rows) * (tall + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        pen.text((6, top + row * (tall + gap) + tall // 2), name, fill="black")
        for column, label in enumerate(columns):
            frame = Image.fromarray(frames[row * len(columns) + column])
            frame = frame.resize((frame.width * zoom, frame.height * zoom), Image.Resampling.NEAREST)
            sheet.paste(frame, (left + column * (wide + gap), top + row * (tall + gap)))
            if row == 0:
                words = label.split()
                lines = [" ".join(words[i : i + 3]) for i in range(0, len(words), 3)]
                pen.text((left + column * (wide + gap) + 2, 1), "\n".join(lines), fill="black", spacing=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)
    return out


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value
