"""Generation against a stock StableDiffusionPipeline, one image at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from cat_cluster.errors import SpecError
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer, write_adapter
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.generate import ImageRow, generate, save_png
from cat_cluster.models.samplers import SAMPLERS
from cat_cluster.spec.choices import SamplerName
from tests.support.denoised_images import stock_image
from tests.support.provenance import DRAWN, said_in_xmp

pytestmark = pytest.mark.slow

MIXED = [
    ImageRow("a red cup", 1, steps=3, sampler="ddim"),
    ImageRow("a photo of a cup", 2, steps=6, sampler="euler", guidance=1.0),
    ImageRow("", 3, steps=4, sampler="dpmpp_2m", guidance=7.5, negative_prompt="red"),
    ImageRow("a red cup", 4, steps=1, sampler="dpmpp_2m"),
    ImageRow("a photo", 1, steps=5, sampler="ddim", guidance=0.0),
    ImageRow("cup of red", 5, steps=2, sampler="euler", guidance=2.0),
    ImageRow("a cup", 6, steps=5, sampler="euler_ancestral", guidance=1.0),
    ImageRow("a photo of a cup", 7, steps=4, sampler="dpmpp_2m_sde"),
    ImageRow("red", 6, steps=3, sampler="dpmpp_2m_sde_karras"),
    ImageRow("red cup", 8, steps=4, sampler="lcm", guidance=1.5),
]


@pytest.fixture(scope="module")
def stock(tiny_base_folder: Path) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline.from_pretrained(tiny_base_folder))


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


def quiet(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_image(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_image_is_the_stock_pipelines(
    base: BaseModel, stock: StableDiffusionPipeline, sampler: SamplerName, guidance: float, steps: int
) -> None:
    row = ImageRow("a photo of a red cup", 11, steps=steps, guidance=guidance, sampler=sampler)
    image = generate(base, None, [row])
    assert image.shape == (1, 3, 16, 16)
    assert_same_image(image[0], stock_image(stock, row))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_v_prediction_bases(tiny_base_v_folder: Path, sampler: SamplerName) -> None:
    row = ImageRow("a red cup", 5, steps=8, sampler=sampler)
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(tiny_base_v_folder))
    image = generate(load_base_model(str(tiny_base_v_folder)), None, [row])[0]
    assert_same_image(image, stock_image(pipeline, row))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_outdated_steps_offset_is_read_as_by_the_stock_pipeline(
    tiny_base_factory: object, sampler: SamplerName
) -> None:
    folder = tiny_base_factory(scheduler_config={"steps_offset": 0, "timestep_spacing": "leading"})  # type: ignore[operator]
    row = ImageRow("a red cup", 5, steps=5, sampler=sampler)
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipeline = quiet(StableDiffusionPipeline.from_pretrained(folder))
    image = generate(load_base_model(str(folder)), None, [row])[0]
    assert_same_image(image, stock_image(pipeline, row))


@pytest.mark.parametrize("rows_per_call", [1, 3, 5, 16])
def test_a_mixed_batch_equals_the_stock_pipeline_row_by_row(
    base: BaseModel, stock: StableDiffusionPipeline, rows_per_call: int
) -> None:
    images = generate(base, None, MIXED, rows_per_call=rows_per_call)
    for image, row in zip(images, MIXED, strict=True):
        assert_same_image(image, stock_image(stock, row))


def test_rows_join_and_leave_at_any_step_and_fill_the_call(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images of 1 to 5 steps, at most two at a time: the sizes of the calls are the greedy schedule's."""
    sizes: list[int] = []
    forward = UNet2DConditionModel.forward

    def counting(self: UNet2DConditionModel, sample: Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    rows = [ImageRow("a cup", seed, steps=steps) for seed, steps in enumerate([3, 1, 5, 2, 4])]
    generate(base, None, rows, rows_per_call=4)
    # 3+1 steps fill two lanes, then 5 joins after 1, 2 after 3, and 4 after 5: lanes end at 3+2+4 and 1+5.
    assert sum(sizes) == 2 * (3 + 1 + 5 + 2 + 4)
    assert sizes == [4] * 6 + [2] * 3
    assert generate(base, None, [], rows_per_call=4).shape == (0, 3, 16, 16)


def test_progress_counts_steps_of_all_images(base: BaseModel) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        base,
        None,
        [ImageRow("a", 0, steps=2), ImageRow("b", 0, steps=3)],
        on_progress=lambda *now: seen.append(now),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def random_adapter(base: BaseModel, rank: int, seed: int) -> AdapterWeights:
    """An adapter strong enough to be seen in the image."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in adapted_layers(base.unet, "attention"):
        linear = base.unet.get_submodule(name)
        layers[name] = LoraLayer(
            down=torch.randn(rank, linear.in_features, generator=generator),
            up=torch.randn(linear.out_features, rank, generator=generator) * 0.2,
        )
    return AdapterWeights(layers)


def test_rows_of_several_adapters_equal_the_stock_pipeline_with_each_loaded(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    """Slots 0, 1 and 2 share calls, guided and not; the oracle loads one adapter's file at a time, through PEFT."""
    base = load_base_model(str(tiny_base_folder))
    pipeline = quiet(StableDiffusionPipeline.from_pretrained(tiny_base_folder))
    adapters = {1: random_adapter(base, 3, seed=1), 2: random_adapter(base, 2, seed=2)}
    rows = [replace(row, slot=(1, 2, 0)[position % 3]) for position, row in enumerate(MIXED)]
    bare = generate(base, None, rows=[replace(row, slot=0) for row in rows])
    bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, "attention"))
    for slot, weights in adapters.items():
        bank.load(slot, weights)
    images = generate(base, bank, rows)
    for slot, weights in adapters.items():
        write_adapter(weights, tmp_path / str(slot), "diffusers", adapter_id="test", metadata={})
    for position, row in enumerate(rows):
        if row.slot:
            pipeline.load_lora_weights(tmp_path / str(row.slot), weight_name="pytorch_lora_weights.safetensors")
        assert_same_image(images[position], stock_image(pipeline, row))
        pipeline.unload_lora_weights()
        moved = float((images[position] - bare[position]).abs().max())
        assert (moved > 1e-3) == (row.slot != 0)


def test_a_slot_without_a_bank_is_a_mistake(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="no bank"):
        generate(base, None, [ImageRow("a", 0, slot=1)])


def test_no_rows_per_call_is_a_mistake(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        generate(base, None, [ImageRow("a", 0)], rows_per_call=0)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 2000}, {"sampler": "heun"}])
def test_impossible_rows_are_refused(base: BaseModel, bad: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        generate(base, None, [ImageRow("a", 0, **bad)])  # type: ignore[arg-type]


def test_a_png_carries_its_metadata(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "new" / "image.png"
    save_png(image, path, {"prompt": "a caf\u00e9 cup", "seed": "3"})
    with Image.open(path) as read:
        assert read.size == (7, 5)
        text = dict(read.text)  # type: ignore[attr-defined]
        assert said_in_xmp(text.pop("XML:com.adobe.xmp").encode()) == DRAWN
        assert text == {"prompt": "a caf\u00e9 cup", "seed": "3"}
        pixels = torch.from_numpy(np.array(read)).permute(2, 0, 1).long()
    assert torch.equal(pixels, (image * 255).round().long())


def test_a_png_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        save_png(torch.zeros(3, 2, 2), tmp_path / "image.png", {"seed": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        save_png(torch.zeros(5, 2, 2), tmp_path / "image.png", {})
    assert list(tmp_path.iterdir()) == []
