"""Same-seed picture grids: which columns and rows they have, and a PNG of them for a README."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.results import ConceptImages

Picture = NDArray[np.uint8]
THUMBNAIL = 256  # a longer side than this is reduced before it goes into a report

_CELL, _GAP, _BLOCK_GAP, _MARGIN, _LABEL = 184, 8, 30, 36, 190
_INK, _QUIET, _PAPER, _RULE = "#1b2430", "#66707c", "#ffffff", "#d5dae0"
_ACCENTS = {"Without the token": "#2f6fb0", "With the token": "#0f8b7e", "LoRA": "#d97706", "CAT": "#0f8b7e"}


@dataclass(frozen=True)
class Column:
    """One column of a grid: the block it belongs to, its title, the prompt form below, and a picture per row."""

    block: str
    title: str
    subtitle: str
    pictures: tuple[Picture | None, ...]


@dataclass(frozen=True)
class Grid:
    """A prompt and a seed per row, the same for all generated columns."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]

    def head(self, rows: int) -> Grid:
        """The first rows of the grid."""
        columns = tuple(Column(c.block, c.title, c.subtitle, c.pictures[:rows]) for c in self.columns)
        return Grid(self.prompts[:rows], self.seeds[:rows], columns)


def concept_grid(methods: Sequence[tuple[str, ConceptImages]]) -> Grid:
    """Return base | each method without the token | each method with it | photos, from (label, images) pairs.

    Rows are ordered so that the first ones show every prompt once. Refuses methods that saw other prompts or seeds.
    """
    first = methods[0][1]
    for label, images in methods[1:]:
        if (images.token_prompts, images.seeds) != (first.token_prompts, first.seeds):
            raise EvaluationError(
                f"{label} was evaluated on other prompts or seeds than {methods[0][0]}: "
                "a same-seed grid needs one evaluation spec for all"
            )
    order = _each_prompt_first(first.prompts)
    plain, subject = first.class_noun, f"{first.token} {first.class_noun}"

    def column(block: str, title: str, subtitle: str, pictures: Picture) -> Column:
        return Column(block, title, subtitle, tuple(pictures[i] for i in order))

    photos = tuple(first.photos[i] if i < len(first.photos) else None for i in range(len(order)))
    return Grid(
        prompts=tuple(first.prompts[i] for i in order),
        seeds=tuple(first.seeds[i] for i in order),
        columns=(
            column("Without the token", "Base model", plain, first.base_without),
            *(column("Without the token", label, plain, images.without_token) for label, images in methods),
            *(column("With the token", label, subject, images.with_token) for label, images in methods),
            Column("The concept", "Photos", "what was taught", photos),
        ),
    )


def thumbnail_png(picture: Picture) -> bytes:
    """Return a picture [H, W, 3] as PNG, reduced to 256 pixels where it is larger."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return png_of(image)


def png_of(image: Image.Image) -> bytes:
    """Return an image as PNG, as small as it gets."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def draw_grids(grids: Sequence[Grid], title: str, *, rows: int) -> Image.Image:
    """Return the first `rows` rows of each grid as one picture, one above the other."""
    parts = [_draw_grid(grid.head(rows)) for grid in grids]
    heading = 84
    width = max(part.width for part in parts)
    canvas = Image.new("RGB", (width, heading + sum(part.height for part in parts)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN, 30), title, font=_font(30, bold=True), fill=_INK)
    top = heading
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def _draw_grid(grid: Grid) -> Image.Image:
    lefts = _column_lefts(grid.columns)
    header = 118
    width = lefts[-1] + _CELL + _MARGIN
    height = header + len(grid.prompts) * (_CELL + _GAP) + _MARGIN
    canvas = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(canvas)
    _draw_heading(pen, grid, lefts)
    for row, prompt in enumerate(grid.prompts):
        top = header + row * (_CELL + _GAP)
        lines = _wrapped(pen, prompt, _LABEL - 16)
        pen.multiline_text((_MARGIN, top + 10), "\n".join(lines), font=_font(19), fill=_INK, spacing=6)
        pen.text((_MARGIN, top + 18 + 26 * len(lines)), f"seed {grid.seeds[row]}", font=_font(16), fill=_QUIET)
        for left, column in zip(lefts, grid.columns, strict=True):
            picture = column.pictures[row]
            if picture is not None:
                _paste_rounded(canvas, picture, (left, top))
    return canvas


def _draw_heading(pen: ImageDraw.ImageDraw, grid: Grid, lefts: Sequence[int]) -> None:
    for block in dict.fromkeys(column.block for column in grid.columns):
        inside = [left for left, column in zip(lefts, grid.columns, strict=True) if column.block == block]
        accent = _ACCENTS.get(block, _QUIET)
        pen.text((inside[0], 6), block, font=_font(20, bold=True), fill=accent)
        pen.rounded_rectangle((inside[0], 36, inside[-1] + _CELL, 39), radius=2, fill=accent)
    for left, column in zip(lefts, grid.columns, strict=True):
        pen.text((left, 50), column.title, font=_font(20, bold=True), fill=_INK)
        pen.text((left, 78), column.subtitle, font=_font(18), fill=_QUIET)


def _column_lefts(columns: Sequence[Column]) -> list[int]:
    lefts, left = [], _MARGIN + _LABEL
    for i, column in enumerate(columns):
        if i and column.block != columns[i - 1].block:
            left += _BLOCK_GAP - _GAP
        lefts.append(left)
        left += _CELL + _GAP
    return lefts


def _paste_rounded(canvas: Image.Image, picture: Picture, at: tuple[int, int]) -> None:
    image = Image.fromarray(picture).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
    zoom = 4  # the mask is drawn larger and reduced: PIL's own corners are jagged
    mask = Image.new("L", (_CELL * zoom, _CELL * zoom), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, _CELL * zoom - 1, _CELL * zoom - 1), radius=10 * zoom, fill=255)
    canvas.paste(image, at, mask.resize((_CELL, _CELL), Image.Resampling.LANCZOS))


def _wrapped(pen: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font=_font(19)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu: the picture looks the same on a machine without fonts.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _each_prompt_first(prompts: Sequence[str]) -> list[int]:
    seen: dict[str, int] = {}
    turns = []
    for i, prompt in enumerate(prompts):
        turns.append((seen.get(prompt, 0), i))
        seen[prompt] = seen.get(prompt, 0) + 1
    return [i for _, i in sorted(turns)]
