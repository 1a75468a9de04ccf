"""Adapter files of an SDXL, whose layers have two names: what stock diffusers and PEFT make of them is what we do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import (
    TEXT_ENCODER,
    AdapterWeights,
    LoraLayer,
    read_adapter,
    read_foreign,
    to_safetensors,
    write_adapter,
)
from cat_cluster.lora.layer_names import original_paths
from tests.unit.lora.conftest import WeightsFactory
from tests.unit.lora.test_formats import ATTENTION, assert_same, close, dotted_keys, old_processor_keys, scramble

# The attention blocks of every SDXL as diffusers and as the original code, in which kohya's trainer runs it, call them.
ORIGINAL = {
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
}


def predict(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    added = {
        "text_embeds": torch.randn(2, 12, generator=generator),
        "time_ids": torch.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 64.0]] * 2),
    }
    with torch.no_grad():
        output: Tensor = unet(latents, torch.tensor([3, 700]), text, added_cond_kwargs=added).sample
    return output


def bank_predicts(unet: UNet2DConditionModel, weights: AdapterWeights) -> Tensor:
    bank = LoraBank.attach(unet, layers=list(weights.layers))
    bank.load(1, weights)
    with bank.rows([1, 1]):
        output = predict(unet)
    bank.detach()
    return output


def stock(unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )


def original_name(path: str) -> str:
    block = next(block for block in ORIGINAL if path.startswith(f"{block}."))
    return ORIGINAL[block] + path.removeprefix(block)


def kohya(weights: AdapterWeights, name: Callable[[str], str], alpha: float = 2.0) -> dict[str, Tensor]:
    """The keys of kohya's trainer, of OneTrainer's kohya and legacy formats, and of ai-toolkit."""
    tensors = {}
    for path, layer in weights.layers.items():
        prefix = f"lora_unet_{name(path).replace('.', '_')}"
        tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    return tensors


def scaled(weights: AdapterWeights, factor: float) -> AdapterWeights:
    return AdapterWeights({name: LoraLayer(one.down, one.up * factor) for name, one in weights.layers.items()})


@pytest.mark.parametrize(
    "keys",
    [
        lambda weights: kohya(weights, original_name),
        lambda weights: kohya(weights, str),
        dotted_keys,
        old_processor_keys,
    ],
    ids=["kohya", "kohya_with_diffusers_names", "diffusers", "old_diffusers"],
)
def test_what_others_write_draws_what_stock_diffusers_draws(
    xl_unet: UNet2DConditionModel,
    make_weights: WeightsFactory,
    keys: Callable[[AdapterWeights], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    weights = make_weights(xl_unet, targets="attention" if keys is old_processor_keys else "attention_ff")
    path = tmp_path / "cup.safetensors"
    save_file(keys(weights), path)
    ours, bare = bank_predicts(xl_unet, read_adapter(path, unet=xl_unet)), predict(xl_unet)
    stock(xl_unet).load_lora_weights(tmp_path, weight_name=path.name)
    close(ours, predict(xl_unet))
    assert not torch.allclose(ours, bare, atol=1e-3)


def test_the_blocks_of_the_oracle_are_those_of_the_tiny_unet(
    xl_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    blocks = {path.split(".transformer_blocks")[0] for path in make_weights(xl_unet).layers}
    assert blocks == set(ORIGINAL)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", ""])
def test_dotted_names_of_the_original_code_are_read(
    xl_unet: UNet2DConditionModel, make_weights: WeightsFactory, prefix: str
) -> None:
    """What OneTrainer writes for ComfyUI and as original format, and ComfyUI's own node for saving."""
    weights = make_weights(xl_unet, targets="attention_ff")
    tensors = {}
    for path, layer in weights.layers.items():
        name = f"{prefix}{original_name(path)}"
        tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    assert_same(read_adapter(save(tensors), unet=xl_unet), scaled(weights, 0.5))


@pytest.mark.parametrize(
    ("original", "path"),
    [
        ("input_blocks_4_0_emb_layers_1", "down_blocks.1.resnets.0.time_emb_proj"),
        ("output_blocks_2_0_emb_layers_1", "up_blocks.0.resnets.2.time_emb_proj"),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks_3_0_skip_connection", "up_blocks.1.resnets.0.conv_shortcut"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        # ai-toolkit adapts every linear and 1x1 convolution of the U-Net, under diffusers' names.
        ("down_blocks_1_resnets_0_time_emb_proj", "down_blocks.1.resnets.0.time_emb_proj"),
        ("up_blocks_1_resnets_0_conv_shortcut", "up_blocks.1.resnets.0.conv_shortcut"),
        ("time_embedding_linear_2", "time_embedding.linear_2"),
    ],
)
def test_layers_outside_of_attentions_are_where_diffusers_finds_them(
    xl_unet: UNet2DConditionModel, tmp_path: Path, original: str, path: str
) -> None:
    outputs, inputs = xl_unet.get_submodule(path).weight.shape[:2]
    ones = (1, 1) if path.endswith("conv_shortcut") else ()
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, inputs, *ones, generator=generator), torch.randn(outputs, 2, *ones, generator=generator)
    name = f"lora_unet_{original}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    weights = read_adapter(tmp_path / "a.safetensors", unet=xl_unet)
    assert list(weights.layers) == [path]
    ours, bare = bank_predicts(xl_unet, weights), predict(xl_unet)
    stock(xl_unet).load_lora_weights(tmp_path, weight_name="a.safetensors")
    close(ours, predict(xl_unet))
    assert not torch.allclose(ours, bare, atol=1e-3)


@pytest.mark.parametrize("family", ["stable_diffusion_1", "sdxl"])
def test_original_names_are_those_that_diffusers_converts(
    one_unet: UNet2DConditionModel, xl_unet: UNet2DConditionModel, family: str
) -> None:
    """Oracle: what diffusers reads a single-file checkpoint with, on every weight of the U-Net."""
    unet = xl_unet if family == "sdxl" else one_unet
    original = original_paths(unet)
    numbered = {name: torch.tensor(number) for number, name in enumerate(unet.state_dict())}
    places = {name: name.rpartition(".") for name in numbered}
    checkpoint = {
        f"model.diffusion_model.{original[path]}.{parameter}": numbered[name]
        for name, (path, _, parameter) in places.items()
    }
    assert convert_ldm_unet_checkpoint(checkpoint, dict(unet.config)) == numbered


@pytest.mark.parametrize("save_as", ["peft", "diffusers"])
def test_what_peft_and_diffusers_train_means_the_same_here(
    xl_unet: UNet2DConditionModel, tmp_path: Path, save_as: str
) -> None:
    twin = UNet2DConditionModel.from_config(xl_unet.config)
    twin.load_state_dict(xl_unet.state_dict())
    config = LoraConfig(r=4, lora_alpha=2, target_modules=[*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj"])
    if save_as == "peft":
        model = get_peft_model(twin, config).eval()
        scramble(model)
        model.save_pretrained(str(tmp_path))
        theirs = predict(model)
    else:
        twin.add_adapter(config)
        scramble(twin)
        theirs = predict(twin)
        StableDiffusionXLPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(twin),
            unet_lora_adapter_metadata=twin.peft_config["default"].to_dict(),
        )
    close(bank_predicts(xl_unet, read_adapter(tmp_path, unet=xl_unet)), theirs)


@pytest.mark.parametrize("fmt", ["diffusers", "kohya"])
def test_a_stock_pipeline_draws_the_same_with_our_export(
    xl_unet: UNet2DConditionModel, make_weights: WeightsFactory, fmt: str, tmp_path: Path
) -> None:
    weights = make_weights(xl_unet, targets="attention_ff")
    path = write_adapter(weights, tmp_path, fmt, adapter_id="cup", metadata={}, unet=xl_unet)  # type: ignore[arg-type]
    assert_same(read_adapter(path, unet=xl_unet), weights)
    ours = bank_predicts(xl_unet, weights)
    stock(xl_unet).load_lora_weights(tmp_path, weight_name=path.name)
    close(ours, predict(xl_unet))


def test_peft_loads_our_export(xl_unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path) -> None:
    weights = make_weights(xl_unet, targets="attention_ff")
    write_adapter(weights, tmp_path, "peft", adapter_id="cup", metadata={}, unet=xl_unet)
    ours = bank_predicts(xl_unet, weights)
    close(ours, predict(PeftModel.from_pretrained(xl_unet, str(tmp_path))))


def test_kohyas_names_of_an_sdxl_are_those_of_its_trainer(
    xl_unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    weights = make_weights(xl_unet, targets="attention_ff")
    path = write_adapter(weights, tmp_path, "kohya", adapter_id="cup", metadata={}, unet=xl_unet)
    assert set(load_file(path)) == set(kohya(weights, original_name))


def test_kohyas_names_of_a_stable_diffusion_1_are_diffusers(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(one_unet, targets="attention_ff")
    assert to_safetensors(weights, "kohya", {}, unet=one_unet) == to_safetensors(weights, "kohya", {})


def test_the_unet_part_of_kohyas_file_comes_in_without_both_text_encoders(
    xl_unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    weights = make_weights(xl_unet)
    text = {
        f"lora_te{n}_text_model_encoder_layers_0_mlp_fc1.{side}.weight": torch.ones(2, 2)
        for n in (1, 2)
        for side in ("lora_down", "lora_up")
    }
    save_file({**kohya(weights, original_name), **text}, tmp_path / "cup.safetensors")
    with pytest.raises(AdapterFormatError, match=r"lora_te1_.* is a text-encoder part"):
        read_adapter(tmp_path, unet=xl_unet)
    found = read_foreign(tmp_path, unet=xl_unet, skip={TEXT_ENCODER})
    assert_same(found.weights, scaled(weights, 0.5))
    assert found.left_out.names == sorted(text)


def test_a_kohya_file_of_an_sdxl_is_read_under_an_attached_bank(
    xl_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(xl_unet)
    bank = LoraBank.attach(xl_unet, layers=list(weights.layers))
    assert_same(read_adapter(save(kohya(weights, original_name, 4.0)), unet=xl_unet), weights)
    bank.detach()
