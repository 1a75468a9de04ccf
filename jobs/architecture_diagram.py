"""The drawings of docs/architecture.md, as SVG; `make generate` writes them.

The layers are read from the import contract in pyproject.toml; the way of the data is written down here.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from xml.sax.saxutils import escape

from jobs.benchmark.record import ROOT

STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2933}.name{font-weight:600}.small{font-size:11px;fill:#52606d}"
    ".box{stroke:#7b8794;rx:6}.way{stroke:#52606d;stroke-width:1.5;fill:none;marker-end:url(#tip)}"
)
TIP = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
COLOURS = {"you": "#fff4d6", "train": "#dcebff", "store": "#e3f5e1", "serve": "#ffe3e0", "library": "#f0f1f4"}


@dataclass(frozen=True)
class Box:
    """A box: its place and size in pixels, its colour, its name and the lines below the name."""

    x: int
    y: int
    width: int
    height: int
    kind: str
    name: str
    lines: tuple[str, ...] = ()

    def svg(self) -> str:
        """The box with its text, centred."""
        middle = self.x + self.width / 2
        top = self.y + self.height / 2 - 8 * len(self.lines) + 4
        texts = [f'<text class="name" text-anchor="middle" x="{middle:g}" y="{top:g}">{escape(self.name)}</text>']
        texts += [
            f'<text class="small" text-anchor="middle" x="{middle:g}" y="{top + 16 * n:g}">{escape(line)}</text>'
            for n, line in enumerate(self.lines, 1)
        ]
        area = f'x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}"'
        return "\n".join([f'<rect class="box" {area} fill="{COLOURS[self.kind]}"/>', *texts])


WAY = (
    Box(20, 20, 170, 70, "you", "job spec and photos", ("spec/  data/",)),
    Box(240, 20, 170, 70, "train", "prepare", ("pipeline/  models/", "checks all, then plans packs")),
    Box(460, 20, 170, 70, "train", "train a pack", ("training/  lora/", "cluster/ spreads it with Ray")),
    Box(680, 20, 170, 70, "train", "measure and publish", ("evaluation/  registry/",)),
    Box(
        240,
        160,
        610,
        60,
        "store",
        "object store: a folder or S3",
        ("store/  checkpoints, manifests, weights, aliases",),
    ),
    Box(20, 290, 170, 70, "you", "request", ("OpenAI's images API",)),
    Box(240, 290, 170, 70, "serve", "ingress", ("serve/http/", "keys, limits, streams")),
    Box(460, 290, 170, 70, "serve", "engine", ("serve/denoise/", "rows of any adapter together")),
    Box(680, 290, 170, 70, "serve", "adapter cache", ("serve/adapters/", "store, disk, memory, slot")),
    Box(460, 410, 170, 60, "serve", "probes", ("serve/probes/  measure again",)),
)
ARROWS = (
    "M190 55H236",
    "M410 55H456",
    "M630 55H676",
    "M515 90V156",
    "M575 160V94",
    "M765 90V156",
    "M765 220V286",
    "M190 325H236",
    "M410 325H456",
    "M680 325H634",
    "M525 410V364",
    "M565 360V406",
    "M460 440H435V224",
)
LABELS = (
    (507, 130, "end", "checkpoints"),
    (583, 130, "start", "resume"),
    (773, 130, "start", "a revision"),
    (773, 258, "start", "aliases, weights"),
    (427, 258, "end", "probe records"),
)


def drawing(width: int, height: int, parts: list[str]) -> str:
    """An SVG of this size on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    tip = f'<defs>{TIP}<path d="M0 0L8 4L0 8z" fill="#52606d"/></marker></defs>'
    return "\n".join(
        [head, f"<style>{STYLE}</style>{tip}", '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"]
    )


def way_of_the_data() -> str:
    """Training above, the store between, serving below."""
    arrows = [f'<path class="way" d="{path}"/>' for path in ARROWS]
    labels = [f'<text class="small" text-anchor="{at}" x="{x}" y="{y}">{text}</text>' for x, y, at, text in LABELS]
    return drawing(870, 490, [box.svg() for box in WAY] + arrows + labels)


def layers() -> str:
    """The layers of cat_cluster as the contract has them, highest first, with serve and jobs beside cluster."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    rows = [row.split(" | ") for row in next(one for one in contracts if one["type"] == "layers")["layers"]]
    parts = []
    for number, row in enumerate(rows):
        width = (600 - 10 * (len(row) - 1)) // len(row)
        parts += [
            Box(20 + n * (width + 10), 20 + 46 * number, width, 36, "library", room) for n, room in enumerate(row)
        ]
    beside = 20 + 46 * next(number for number, row in enumerate(rows) if "cluster" in row)
    parts += [
        Box(640, beside, 200, 36, "train", "jobs", ("uses cluster/",)),
        Box(640, beside + 46, 200, 82, "serve", "serve", ("uses registry/ and below,", "never training/")),
    ]
    return drawing(860, 30 + 46 * len(rows), [box.svg() for box in parts])
