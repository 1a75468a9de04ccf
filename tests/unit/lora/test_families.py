"""Adapter files of another family of models are refused by both names, before anything else is said of them."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save
from torch import Tensor

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.lora.formats import read_adapter
from tests.unit.lora.conftest import WeightsFactory
from tests.unit.lora.test_formats import dotted_keys
from tests.unit.lora.test_sdxl_files import kohya, original_name

REMEDY = (
    r"which \S*attn\S* does not fit: import it with --base naming a base that it was made for, or choose a file made "
    "for this one"
)
MID = "mid_block.attentions.0.transformer_blocks"


def pair(name: str, inputs: int, outputs: int, *, kohyas: bool = False) -> dict[str, Tensor]:
    down, up = ("lora_down", "lora_up") if kohyas else ("lora_A", "lora_B")
    return {f"{name}.{down}.weight": torch.ones(2, inputs), f"{name}.{up}.weight": torch.ones(outputs, 2)}


def wide_unet(width: int) -> UNet2DConditionModel:
    """A tiny U-Net that reads text of a real width."""
    unet: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(4, 4),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=width,
        **(
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 28,
            }
            if width in (1280, 2048)
            else {}
        ),
    )
    return unet


NAMES = {
    768: r"Stable Diffusion 1\.x",
    1024: r"Stable Diffusion 2\.x",
    1280: "Stable Diffusion XL's refiner",
    2048: "Stable Diffusion XL",
}


@pytest.mark.parametrize("base", NAMES)
@pytest.mark.parametrize("file", NAMES)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_width_of_cross_attention_tells_the_families(file: int, base: int, text_encoder: bool) -> None:
    tensors = pair(f"unet.{MID}.0.attn2.to_k", file, 4)
    if text_encoder:  # said after the family: leaving it out would not help
        tensors |= pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 8, 8)
    if file == base:
        if text_encoder:
            with pytest.raises(AdapterFormatError, match="text-encoder part"):
                read_adapter(save(tensors), unet=wide_unet(base))
        else:
            assert list(read_adapter(save(tensors), unet=wide_unet(base)).layers) == [f"{MID}.0.attn2.to_k"]
        return
    says = (
        rf"^the adapter file was made for {NAMES[file]} \(cross-attention of width {file}\), and the base model is "
        rf"{NAMES[base]} \(cross-attention of width {base}\), {REMEDY}$"
    )
    with pytest.raises(AdapterMismatchError, match=says):
        read_adapter(save(tensors), unet=wide_unet(base))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_every_kind_of_layer_tells_its_width(kind: str) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    tensors = {
        "lora": pair(name, 2048, 4, kohyas=True),
        "loha": {
            f"{name}.hada_{part}": torch.ones(*((4, 2) if part.endswith("a") else (2, 2048)))
            for part in ("w1_a", "w1_b", "w2_a", "w2_b")
        },
        "lokr": {f"{name}.lokr_w1": torch.ones(2, 16), f"{name}.lokr_w2_a": torch.ones(2, 1)}
        | {f"{name}.lokr_w2_b": torch.ones(1, 128)},
    }[kind]
    with pytest.raises(AdapterMismatchError, match=r"made for Stable Diffusion XL \(.*the base model is .* 1\.x"):
        read_adapter(save(tensors), unet=wide_unet(768))


def test_an_adapter_of_stable_diffusion_is_refused_for_an_sdxl_and_the_other_way(
    one_unet: UNet2DConditionModel, xl_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    """The tiny bases have no real widths: their names alone say SDXL."""
    of_one, of_xl = make_weights(one_unet), make_weights(xl_unet)
    plain, deep = r"Stable Diffusion 1\.x or 2\.x", "Stable Diffusion XL"
    for keys in (kohya(of_xl, original_name), kohya(of_xl, str), dotted_keys(of_xl)):
        with pytest.raises(AdapterMismatchError, match=rf"made for {deep} \(.*24\), .* is {plain} \(.*16\), {REMEDY}"):
            read_adapter(save(keys), unet=one_unet)
    for keys in (kohya(of_one, str), dotted_keys(of_one)):
        with pytest.raises(AdapterMismatchError, match=rf"made for {plain} \(.*16\), .* is {deep} \(.*24\), {REMEDY}"):
            read_adapter(save(keys), unet=xl_unet)


def test_names_tell_the_family_where_no_layer_reads_text(
    one_unet: UNet2DConditionModel, xl_unet: UNet2DConditionModel
) -> None:
    deep = pair("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q", 8, 8, kohyas=True)
    with pytest.raises(AdapterMismatchError, match=rf"made for Stable Diffusion XL, and .* 1\.x or 2\.x.*, {REMEDY}"):
        read_adapter(save(deep), unet=one_unet)
    for block in ("down_blocks_0_attentions_0", "up_blocks_3_attentions_2", "input_blocks_2_1", "output_blocks_11_1"):
        first = pair(f"lora_unet_{block}_transformer_blocks_0_attn1_to_q", 8, 8, kohyas=True)
        with pytest.raises(AdapterMismatchError, match=rf"made for .* 1\.x or 2\.x, and .* XL .*, {REMEDY}"):
            read_adapter(save(first), unet=xl_unet)
    # Of one family: the layer is named.
    unknown = pair("lora_unet_down_blocks_0_attentions_9_transformer_blocks_0_attn1_to_q", 8, 8, kohyas=True)
    with pytest.raises(
        AdapterMismatchError, match=r"attentions_9.* is no layer of this base model: use the base it was"
    ):
        read_adapter(save(unknown), unet=one_unet)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux"),
        ("lora_unet_single_blocks_0_linear1", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", "Flux"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.add_k_proj", "Stable Diffusion 3"),
        ("lora_transformer_transformer_blocks_0_attn_add_q_proj", "Stable Diffusion 3"),
        ("lora_prior_unet_down_blocks_0_1_attention_attn_to_q", "Stable Cascade"),
        ("lora_transformer_transformer_blocks_0_attn1_to_q", "a diffusion transformer"),
        ("base_model.model.transformer.transformer_blocks.0.attn1.to_q", "a diffusion transformer"),
        ("diffusion_model.blocks.0.self_attn.q", "a diffusion transformer"),
        ("lora_unet_blocks_0_self_attn_q", "a diffusion transformer"),
        ("diffusion_model.layers.0.attention.qkv", "a diffusion transformer"),
    ],
)
def test_files_of_other_models_are_refused_by_name(one_unet: UNet2DConditionModel, key: str, family: str) -> None:
    tensors = pair(key, 8, 8, kohyas=key.startswith("lora_")) | pair("lora_te1_text_model_x", 8, 8, kohyas=True)
    says = rf"the adapter file was made for {family}.*, as {key}.* shows, and the base model is Stable Diffusion 1\.x"
    with pytest.raises(AdapterMismatchError, match=rf"{says}.*choose a file made for the base model"):
        read_adapter(save(tensors), unet=one_unet)
    with pytest.raises(
        AdapterMismatchError, match=rf"{family}.*cat-cluster draws with Stable Diffusion 1\.x, 2\.x and XL"
    ):
        read_adapter(save(tensors))
