"""Adapters of text encoders: what stock diffusers draws with a file is what we draw, in a batch mixed of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.lora.bank import LoraBank, text_layers
from cat_cluster.lora.formats import (
    TEXT_ENCODER,
    UNSUPPORTED,
    AdapterWeights,
    LoraLayer,
    read_adapter,
    read_foreign,
    to_safetensors,
    write_adapter,
)
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.generate import ImageRow, generate
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from tests.support.denoised_images import stock_image
from tests.support.text_adapters import diffusers_file, kohya_file, stock_pipeline, text_paths, whole_adapter
from tests.unit.lora.test_formats import assert_same, scramble

pytestmark = pytest.mark.slow

PROMPT = "a photo of a sks cup"
ROWS = (
    ImageRow(PROMPT, 1, slot=1, steps=3),
    ImageRow(PROMPT, 1, slot=2, steps=3, negative_prompt="red"),
    ImageRow(PROMPT, 1, slot=0, steps=3),
    ImageRow(PROMPT, 2, slot=3, steps=2, sampler="euler"),
    ImageRow("", 3, slot=1, steps=2, guidance=1.0),
)


@pytest.fixture(scope="module", params=["sd", "xl"])
def folder(request: pytest.FixtureRequest, tiny_base_folder: Path, tiny_xl_folder: Path) -> Path:
    return tiny_base_folder if request.param == "sd" else tiny_xl_folder


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base_model(str(folder))


@pytest.fixture(scope="module")
def xl(base: BaseModel) -> bool:
    return len(base.text_encoders.models) > 1


def drawn(base: BaseModel, adapters: list[AdapterWeights], rows: tuple[ImageRow, ...]) -> Tensor:
    names = list(dict.fromkeys(name for one in adapters for name in one.layers))
    bank = LoraBank.attach(base.network, layers=names)
    try:
        for slot, weights in enumerate(adapters, start=1):
            bank.load(slot, weights)
        return generate(base, bank, rows, rows_per_call=4)
    finally:
        bank.detach()


def drawn_by_stock(folder: Path, xl: bool, file: Path | None, row: ImageRow) -> Tensor:
    pipeline = stock_pipeline(folder, xl=xl)
    if file is not None:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return stock_image(pipeline, row)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


def test_a_mixed_batch_draws_what_the_stock_pipeline_draws_with_each_file(
    base: BaseModel, folder: Path, xl: bool, tmp_path: Path
) -> None:
    both, text_alone, unet_alone = (
        whole_adapter(base, 1),
        whole_adapter(base, 2, rank=2, unet=False),
        whole_adapter(base, 3, text=0.0),
    )
    files = [
        kohya_file(both, tmp_path / "both.safetensors", xl=xl, alpha=2.0),
        diffusers_file(text_alone, tmp_path / "text.safetensors"),
        kohya_file(unet_alone, tmp_path / "unet.safetensors", xl=xl),
    ]
    read = [read_adapter(file, unet=base.network) for file in files]
    for found, meant in zip(read, (both, text_alone, unet_alone), strict=True):
        assert_same(found, meant)
    images = drawn(base, read, ROWS)
    for image, row in zip(images, ROWS, strict=True):
        close(image, drawn_by_stock(folder, xl, files[row.slot - 1] if row.slot else None, row))
    without_text = drawn(base, [both.of_unet], ROWS[:1])
    assert (images[0] - without_text[0]).abs().max() > 1 / 255, "the text encoders' part changes nothing"


@pytest.mark.parametrize("fmt", ["diffusers", "kohya"])
def test_what_is_written_is_what_the_stock_pipeline_reads(
    base: BaseModel, folder: Path, xl: bool, fmt: Any, tmp_path: Path
) -> None:
    weights = whole_adapter(base, 4)
    path = write_adapter(weights, tmp_path, fmt, adapter_id="cup", metadata={}, unet=base.unet)
    assert_same(read_adapter(path, unet=base.network), weights)
    close(drawn(base, [weights], ROWS[:1])[0], drawn_by_stock(folder, xl, path, ROWS[0]))
    if fmt == "kohya":
        assert {key.split("_text_model")[0] for key in load_file(path) if "_text_model" in key} == (
            {"lora_te1", "lora_te2"} if xl else {"lora_te"}
        )
    else:  # as a registry without the base reads its own files
        assert_same(read_adapter(path), weights)


def test_training_adapts_the_layers_that_kohya_does(base: BaseModel) -> None:
    assert sorted(text_layers(base.network)) == sorted(text_paths(base))


def test_peft_has_no_file_for_both(base: BaseModel) -> None:
    with pytest.raises(AdapterFormatError, match=r"file for each model.*text_encoder\..*diffusers or kohya"):
        to_safetensors(whole_adapter(base), "peft", {})


def test_names_without_transformers_text_model_are_the_same_layers(base: BaseModel, tmp_path: Path) -> None:
    weights = whole_adapter(base)
    assert_same(read_adapter(diffusers_file(weights, tmp_path / "a", text_model=False), unet=base.network), weights)


def test_diffusers_first_attention_processors_had_the_projections_of_a_unet(base: BaseModel) -> None:
    weights = whole_adapter(base, unet=False)
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tensors = {}
    for name, layer in weights.layers.items():
        parent, _, last = name.rpartition(".")
        raw = f"{parent}.{old[last]}_lora" if last in old else f"{name}.lora_linear_layer"
        tensors |= {f"{raw}.down.weight": layer.down, f"{raw}.up.weight": layer.up}
    assert_same(read_adapter(save(tensors), unet=base.network), weights)


@pytest.mark.parametrize("told", [False, True])
def test_settings_of_each_part_are_its_own(tiny_base_folder: Path, tmp_path: Path, told: bool) -> None:
    """Files as diffusers saves them from PEFT's adapters, whose alphas differ from the ranks."""
    base = load_base_model(str(tiny_base_folder))
    pipeline = stock_pipeline(tiny_base_folder, xl=False)
    unet = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    text = LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    layers = {}
    for name, config in (("unet", unet), ("text_encoder", text)):
        model = getattr(pipeline, name)
        model.add_adapter(config)
        scramble(model)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    settings = {"unet_lora_adapter_metadata": unet.to_dict(), "text_encoder_lora_adapter_metadata": text.to_dict()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **(settings if told else {}))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    close(
        drawn(base, [read_adapter(file, unet=base.network)], ROWS[:1])[0],
        drawn_by_stock(tiny_base_folder, False, file, ROWS[0]),
    )


def test_a_projection_of_pooled_text_is_applied(tiny_xl_folder: Path, tmp_path: Path) -> None:
    """As OneTrainer adapts it; diffusers itself is the oracle of the sum."""
    base = load_base_model(str(tiny_xl_folder))
    projection = base.text_encoders.models[1].text_projection
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(
        torch.randn(2, projection.in_features, generator=generator), torch.randn(projection.out_features, 2)
    )
    name = "lora_te2_text_projection"
    tensors = {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
    found = read_adapter(save(tensors), unet=base.network)
    bank = LoraBank.attach(base.network, layers=list(found.layers))
    bank.load(1, found)
    with bank.text_rows([0, 1]):
        ours = base.text_encoders.encode([PROMPT] * 2)
    bank.detach()
    with torch.no_grad():
        (plain,) = base.text_encoders.encode([PROMPT])
        projection.weight += layer.up @ layer.down
        (expected,) = base.text_encoders.encode([PROMPT])
    assert ours[0].pooled is not None
    assert ours[1].pooled is not None
    torch.testing.assert_close(ours[0].pooled, plain.pooled)
    torch.testing.assert_close(ours[1].pooled, expected.pooled)
    assert not torch.allclose(ours[0].pooled, ours[1].pooled)


def test_the_unet_alone_is_taken_where_no_text_encoder_is_given(base: BaseModel, xl: bool, tmp_path: Path) -> None:
    weights = whole_adapter(base)
    file = kohya_file(weights, tmp_path / "cup.safetensors", xl=xl)
    with pytest.raises(AdapterFormatError, match=r"lora_te.*text-encoder part.*--unet-only"):
        read_adapter(file, unet=base.unet)
    found = read_foreign(file, unet=base.unet, skip={TEXT_ENCODER})
    assert_same(found.weights, weights.of_unet)
    assert found.left_out.names == sorted(key for key in load_file(file) if key.startswith("lora_te"))


def test_what_is_no_layer_of_the_encoders_is_refused_or_left_out_by_name(base: BaseModel) -> None:
    name = text_paths(base)[0]
    weights = whole_adapter(base, unet=False).layers[name]
    pair = {f"{name}.lora_A.weight": weights.down, f"{name}.lora_B.weight": weights.up}
    for odd in ("lora_te3_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.9.mlp.fc1"):
        tensors = {**pair, f"{odd}.lora_down.weight": torch.ones(2, 2), f"{odd}.lora_up.weight": torch.ones(2, 2)}
        with pytest.raises(AdapterFormatError, match=rf"{odd}.*text-encoder part"):
            read_adapter(save(tensors), unet=base.network)
        found = read_foreign(save(tensors), unet=base.network, skip=UNSUPPORTED)
        assert list(found.weights.layers) == [name]
        assert found.left_out.names == [f"{odd}.lora_down.weight", f"{odd}.lora_up.weight"]
    embedding = "text_encoder.text_model.embeddings.token_embedding"
    rows = {f"{embedding}.lora_A.weight": torch.ones(2, 2), f"{embedding}.lora_B.weight": torch.ones(2, 2)}
    with pytest.raises(AdapterMismatchError, match="token_embedding is not a linear layer"):
        read_adapter(save({**pair, **rows}), unet=base.network)


def test_a_row_reads_its_own_adapters_text_whatever_its_neighbours(base: BaseModel) -> None:
    adapters = [whole_adapter(base, seed) for seed in (5, 6)]
    bank = LoraBank.attach(base.network, layers=list(adapters[0].layers))
    for slot, weights in enumerate(adapters, start=1):
        bank.load(slot, weights)
    prompts = [Prompt(PROMPT), Prompt("a (red:1.5) cup, " * 30, "a1111", 3), Prompt("", negative=True)]

    def texts(slots: list[int], chosen: list[Prompt]) -> list[Tensor]:
        def bind(owners: Any) -> Any:
            return bank.text_rows([slots[owner] for owner in owners])

        return [text.states for text in encode_prompts(base, base.text_limit, chosen, bind)]

    mixed = texts([1, 2, 1, 0], [prompts[0], prompts[1], prompts[2], prompts[0]])
    alone: list[Callable[[], list[Tensor]]] = [
        lambda: texts([1], prompts[:1]),
        lambda: texts([2], prompts[1:2]),
        lambda: texts([1], prompts[2:]),
        lambda: [one.states for one in encode_prompts(base, base.text_limit, prompts[:1])],
    ]
    for found, make in zip(mixed, alone, strict=True):
        torch.testing.assert_close(found, make()[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixed[0], mixed[3])
    bank.detach()
    assert not any("base" in name.split(".") for name, _ in base.network.named_modules())


def test_a_file_of_two_encoders_does_not_fit_a_base_of_one(
    tiny_base_folder: Path, tiny_xl_folder: Path, tmp_path: Path
) -> None:
    xl_base, sd_base = (load_base_model(str(one)) for one in (tiny_xl_folder, tiny_base_folder))
    file = kohya_file(whole_adapter(xl_base, unet=False), tmp_path / "xl.safetensors", xl=True)
    with pytest.raises(AdapterFormatError, match=r"lora_te1_text_model_encoder_layers_1_.*text-encoder part"):
        read_adapter(file, unet=sd_base.network)
    save_file({key: value for key, value in load_file(file).items() if "te2" in key}, file)
    with pytest.raises(AdapterFormatError, match=r"lora_te2_.*text-encoder part"):
        read_adapter(file, unet=sd_base.network)
