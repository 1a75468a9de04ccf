"""The report: it renders whole and offline, its JSON round-trips, and its grid pairs the same seeds."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_cluster.errors import EvaluationError, OutputError
from cat_cluster.evaluation.grid import Column, Grid, concept_grid, draw_grids, thumbnail_png
from cat_cluster.evaluation.intervals import METRICS
from cat_cluster.evaluation.report import (
    MethodResult,
    ReportFiles,
    ReportInput,
    Served,
    ServedPicture,
    Stacks,
    report_json,
    write_report,
)
from cat_cluster.evaluation.results import Evaluation

pytestmark = pytest.mark.slow

MakeEvaluation = Callable[..., Evaluation]
HISTORY = {
    "steps": list(range(1, 401, 4)),
    "sks": {"identity": list(0.3 / (1 + np.arange(100) / 20)), "cat": list(0.02 / (1 + np.arange(100) / 30))},
}


class Page(HTMLParser):
    """Images, text, and whether every element that must be closed was."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.links += [values[name] or "" for name in ("href", "srcset") if name in values]
        if tag not in ("img", "meta", "br", "link", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def two_methods(make_evaluation: MakeEvaluation, tokens: tuple[str, ...] = ("sks",)) -> ReportInput:
    lora = MethodResult("lora", make_evaluation(broken=0.8, tokens=tokens), {**HISTORY, "sks": {"identity": [0.1]}})
    cat = MethodResult("cat", make_evaluation(broken=0.1, tokens=tokens), HISTORY, {"training time": "52 s"})
    return ReportInput("CAT against LoRA <on> a cup", "pocket", (lora, cat), {"machine": "2 cores"})


@pytest.fixture(scope="module")
def files(make_evaluation: MakeEvaluation, tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    return write_report(tmp_path_factory.mktemp("report"), two_methods(make_evaluation))


def test_the_page_is_whole_and_needs_no_network(files: ReportFiles) -> None:
    html = files.html.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert not page.links
    assert not re.findall(r"url\(|<script|@import", html)
    assert "CAT against LoRA <on> a cup" in page.text
    for png in page.images:
        prefix = "data:image/png;base64,"
        assert png.startswith(prefix)
        Image.open(io.BytesIO(base64.b64decode(png.removeprefix(prefix)))).verify()
    assert 'loading="lazy"' not in html  # a picture of the whole page would be grey
    assert "Each row is one prompt and one seed" in page.text
    # 12 seeds x (base + 2 methods without and with), 5 photos, 1 picture of the curves
    assert len(page.images) == 12 * 5 + 5 + 1


def test_a_report_with_stacks_shows_every_picture_of_them(make_evaluation: MakeEvaluation, tmp_path: Path) -> None:
    grey = [tuple(np.full((8, 8, 3), 40 * column + row, dtype=np.uint8) for row in range(2)) for column in range(4)]
    titles = (("Untouched", "Base model"), ("LoRA", "One adapter"), ("LoRA", "Stack of 2"), ("The concept", "Photos"))
    columns = tuple(Column(*title, "", own) for title, own in zip(titles, grey, strict=True))
    stacks = Stacks(Grid(("a sks cup", "a zwx fish"), (7, 7), columns), {"LoRA": ["cup", "fish"]})
    files = write_report(tmp_path, replace(two_methods(make_evaluation), stacks=stacks))
    page = Page(files.html.read_text(encoding="utf-8"))
    assert not page.open
    assert "LoRA: cup+fish" in page.text
    for block, title in titles:
        assert block in page.text
        assert title in page.text
    shown = set(page.images)
    for column in grey:
        for picture in column:
            assert f"data:image/png;base64,{base64.b64encode(thumbnail_png(picture)).decode()}" in shown
    assert json.loads(files.json.read_text(encoding="utf-8"))["stacks"] == stacks.to_json()
    assert files.stacks is not None
    drawn = np.asarray(Image.open(files.stacks).convert("RGB"))
    for column in grey:
        for picture in column:
            assert (drawn == picture[0, 0]).all(axis=-1).sum() > 100 * 100


def test_the_page_shows_every_metric_of_both_judges(files: ReportFiles, make_evaluation: MakeEvaluation) -> None:
    text = Page(files.html.read_text(encoding="utf-8")).text
    kps = two_methods(make_evaluation).methods[1].evaluation.metrics["kps"]
    assert f"{kps:.3f}" in text
    for title in ("Knowledge preservation", "Base drift", "Fisher drift", "Diversity ratio", "Identity gain"):
        assert text.count(title) >= 2
    for word in ("tiny-clip", "tiny-second", "decoy wjq", "CAT / LoRA", "52 s", "96%"):
        assert word in text


def test_the_json_round_trips_and_has_the_contract_keys(files: ReportFiles, make_evaluation: MakeEvaluation) -> None:
    data = json.loads(files.json.read_text(encoding="utf-8"))
    assert data == report_json(two_methods(make_evaluation))
    for name in ("lora", "cat"):
        found = data["methods"][name]
        assert all(type(found[metric]) is float for metric in METRICS)
        assert set(found["intervals"]) == set(METRICS)
        assert set(found["judges"]) == {"tiny-second"}
        assert {"leak_matrix", "judge", "recognition"} <= set(found)
    drift = {name: data["methods"][name]["base_drift"] for name in ("lora", "cat")}
    ratio = data["comparison"]["judges"]["tiny-clip"]["base_drift"]["ratio"]
    assert ratio["estimate"] == pytest.approx(drift["cat"] / drift["lora"])
    assert ratio["interval"][0] <= ratio["estimate"] <= ratio["interval"][1]


def test_the_grid_pairs_the_same_seed_in_every_column(make_evaluation: MakeEvaluation) -> None:
    report = two_methods(make_evaluation)
    labelled = [(result.label, result.evaluation.images[0]) for result in report.methods]
    grid = concept_grid(labelled)
    titles = [(column.title, column.subtitle) for column in grid.columns]
    assert titles == [
        ("Base model", "cup"),
        ("LoRA", "cup"),
        ("CAT", "cup"),
        ("LoRA", "sks cup"),
        ("CAT", "sks cup"),
        ("Photos", "what was taught"),
    ]
    assert len(set(grid.prompts[:6])) == 6
    lora, cat = labelled[0][1], labelled[1][1]
    for row, seed in enumerate(grid.seeds):
        index = lora.seeds.index(seed)
        sources = (lora.base_without, lora.without_token, cat.without_token, lora.with_token, cat.with_token)
        for column, source in zip(grid.columns, sources, strict=False):
            assert np.array_equal(column.pictures[row], source[index])
        assert grid.prompts[row] == lora.prompts[index]


def test_the_png_holds_the_pictures_at_their_places(files: ReportFiles, make_evaluation: MakeEvaluation) -> None:
    picture = Image.open(files.png)
    assert picture.width >= 1000
    report = two_methods(make_evaluation, tokens=("sks", "zwx"))
    grids = [concept_grid([(result.label, result.evaluation.images[k]) for result in report.methods]) for k in range(2)]
    one, both = draw_grids(grids[:1], "One", rows=2), draw_grids(grids, "Both", rows=2)
    assert both.height > one.height
    base = Image.fromarray(grids[0].columns[0].pictures[0]).resize((184, 184), Image.Resampling.LANCZOS)
    cell = np.asarray(one).astype(int)
    wanted = np.asarray(base)[60:120, 60:120].astype(int)
    found = [
        (top, left)
        for top in range(150, 300)
        for left in range(200, 300)
        if np.array_equal(cell[top : top + 60, left : left + 60], wanted)
    ]
    assert len(found) == 1


def test_one_method_alone_has_no_comparison(make_evaluation: MakeEvaluation, tmp_path: Path) -> None:
    only = ReportInput("One adapter", "pocket", (MethodResult("cat", make_evaluation(judges=1)),))
    written = write_report(tmp_path, only)
    assert json.loads(written.json.read_text())["comparison"] is None
    text = Page(written.html.read_text(encoding="utf-8")).text
    assert "CAT / " not in text
    assert "Training" not in text


def test_methods_on_different_seeds_are_refused(make_evaluation: MakeEvaluation, tmp_path: Path) -> None:
    methods = (MethodResult("lora", make_evaluation(seed=1)), MethodResult("cat", make_evaluation(seed=2)))
    with pytest.raises(EvaluationError, match="one evaluation spec"):
        write_report(tmp_path, ReportInput("Two", "pocket", methods))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("adapters", "told"), [(1, "1 different adapter,"), (3, "3 different adapters,")])
def test_what_was_served_is_said_in_words(
    make_evaluation: MakeEvaluation, tmp_path: Path, adapters: int, told: str
) -> None:
    png = thumbnail_png(np.zeros((8, 8, 3), dtype=np.uint8))
    served = Served((ServedPicture("CAT", "a sks cup", png, "cup@r-0123456789ab", "ok"),), adapters, 6, 2.5)
    files = write_report(tmp_path, replace(two_methods(make_evaluation), served=served))
    text = " ".join(Page(files.html.read_text(encoding="utf-8")).text.split())
    assert "a request for each of these pictures at the same time. It drew them together" in text
    assert f"one U-Net call held up to 6 rows and up to {told} and all pictures were done after 2.5 s." in text


def test_a_folder_that_cannot_be_written_leaves_nothing_half_written(
    make_evaluation: MakeEvaluation, tmp_path: Path
) -> None:
    (tmp_path / "report.png").mkdir()
    with pytest.raises(OutputError, match=r"report\.png"):
        write_report(tmp_path, two_methods(make_evaluation))
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_large_pictures_are_reduced_before_they_are_embedded() -> None:
    large = np.zeros((512, 512, 3), dtype=np.uint8)
    assert Image.open(io.BytesIO(thumbnail_png(large))).size == (256, 256)
    assert Image.open(io.BytesIO(thumbnail_png(large[:64, :64]))).size == (64, 64)
