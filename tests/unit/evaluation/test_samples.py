"""Sample grids: an adapter's pictures beside the base's, the same prompts and seeds every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from cat_cluster.evaluation import samples
from cat_cluster.evaluation.grid import Grid
from cat_cluster.evaluation.prompts import GENERAL_TEMPLATES
from cat_cluster.evaluation.samples import SampleGrids
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.generate import ImageRow, generate
from cat_cluster.training.methods import initial_weights

FEW = {"steps": 2, "count": 2}
CUP = [("sks", "cup")]


def strong_weights(base: BaseModel, scale: float = 2.0) -> AdapterWeights:
    """Weights that change the tiny base's images plainly."""
    layers = adapted_layers(base.unet, "attention")
    initial = initial_weights(base.unet, layers, rank=2, seed=0, draw_key="mug")
    generator = torch.Generator().manual_seed(1)
    return AdapterWeights(
        {
            n: LoraLayer(one.down, scale * torch.randn(one.up.shape, generator=generator))
            for n, one in initial.layers.items()
        }
    )


@pytest.fixture
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture
def bank(base: BaseModel) -> Iterator[LoraBank]:
    """Slot 1 holds an adapter, slot 2 one that changes nothing yet."""
    bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, "attention"))
    bank.load(1, strong_weights(base))
    bank.new_trainable(2, initial_weights(base.unet, bank.layers, rank=2, seed=0, draw_key="new"))
    yield bank
    bank.detach()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Grid]:
    """The grids that were put into pictures."""
    seen: list[Grid] = []
    draw = samples.draw_grids

    def record(grids: Sequence[Grid], title: str, *, rows: int) -> Image.Image:
        seen.extend(grids)
        return draw(grids, title, rows=rows)

    monkeypatch.setattr(samples, "draw_grids", record)
    return seen


def differ(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is not None


def test_an_adapter_draws_other_pictures_than_the_base(base: BaseModel, bank: LoraBank, drawn: list[Grid]) -> None:
    adapted = SampleGrids(base, bank, **FEW).draw(1, CUP, "mug")
    fresh = SampleGrids(base, bank, **FEW).draw(2, CUP, "mug")
    assert differ(adapted, fresh)
    of_base, without, _ = (np.stack(column.pictures) for column in drawn[0].columns)
    assert np.abs(without.astype(int) - of_base).mean() > 2
    untrained = drawn[1].columns
    assert np.array_equal(untrained[0].pictures, untrained[1].pictures)
    assert np.array_equal(untrained[0].pictures, drawn[0].columns[0].pictures)


def test_pictures_are_those_of_the_shown_prompts_and_seeds(base: BaseModel, bank: LoraBank, drawn: list[Grid]) -> None:
    concepts = [*CUP, ("zwx", "fish")]
    SampleGrids(base, bank, seed=7, guidance=3.0, **FEW).draw(1, concepts, "tea")
    for grid, (token, noun) in zip(drawn, concepts, strict=True):
        assert grid.seeds == (7, 8)
        assert grid.prompts == tuple(template.replace("{}", noun) for template in GENERAL_TEMPLATES[:2])
        assert [column.subtitle for column in grid.columns] == [noun, noun, f"{token} {noun}"]
        rows = [
            ImageRow(prompt.replace(noun, column.subtitle), seed, slot, steps=2, guidance=3.0)
            for column, slot in zip(grid.columns, (0, 1, 1), strict=True)
            for prompt, seed in zip(grid.prompts, grid.seeds, strict=True)
        ]
        wanted = generate(base, bank, rows).mul(255.0).permute(0, 2, 3, 1).numpy()
        shown = np.concatenate([np.stack(column.pictures) for column in grid.columns])  # type: ignore[arg-type]
        assert np.abs(shown - wanted).max() <= 1.0


def test_the_base_is_drawn_once_and_the_grid_stays_the_same(
    base: BaseModel, bank: LoraBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counting(of: BaseModel, own: LoraBank, rows: Sequence[ImageRow]) -> torch.Tensor:
        asked.append(len(rows))
        return generate(of, own, rows)

    monkeypatch.setattr(samples, "generate", counting)
    grids = SampleGrids(base, bank, **FEW)
    state = torch.random.get_rng_state()
    first, second = (grids.draw(1, CUP, "mug, step 3 of 9") for _ in range(2))
    assert asked == [6, 4]
    assert not differ(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (first.mode, first.height) == ("RGB", second.height)


def test_more_pictures_than_prompts_get_seeds_of_their_own(base: BaseModel, bank: LoraBank, drawn: list[Grid]) -> None:
    count = len(GENERAL_TEMPLATES) + 1
    SampleGrids(base, bank, steps=1, count=count, guidance=0.0).draw(1, CUP, "mug")
    assert drawn[0].prompts[-1] == drawn[0].prompts[0]
    assert len(set(drawn[0].seeds)) == count
    with pytest.raises(ValueError, match="at least 1 image"):
        SampleGrids(base, bank, count=0)


def test_a_diverged_adapter_is_drawn_black(base: BaseModel, bank: LoraBank, drawn: list[Grid]) -> None:
    bank.load(1, strong_weights(base, scale=1e30))
    SampleGrids(base, bank, **FEW).draw(1, CUP, "mug")
    of_base, without, _ = (np.stack(column.pictures) for column in drawn[0].columns)
    assert of_base.any()
    assert not without.any()
