"""Adapters with values in every layer, on the two tiny U-Nets: Stable Diffusion 1.x's and 2.x's kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from cat_cluster.lora.bank import adapted_layers, served_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer

WeightsFactory = Callable[..., AdapterWeights]


@pytest.fixture(params=["projections_by_convolution", "projections_by_linear"])
def unet(request: pytest.FixtureRequest, tiny_base_folder: Path, tiny_base_v_folder: Path) -> UNet2DConditionModel:
    """A frozen tiny U-Net of each kind; a test may change it, the next one reads it anew."""
    folder = tiny_base_folder if request.param == "projections_by_convolution" else tiny_base_v_folder
    return read_unet(folder)


@pytest.fixture
def one_unet(tiny_base_folder: Path) -> UNet2DConditionModel:
    """The Stable Diffusion 1.x kind alone."""
    return read_unet(tiny_base_folder)


def read_unet(folder: Path) -> UNet2DConditionModel:
    unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(folder / "unet")
    return unet.eval().requires_grad_(False)


@pytest.fixture
def make_weights() -> WeightsFactory:
    """Makes random weights for a U-Net; `ranks` are dealt out to the layers in turn.

    convolutions: change 1x1 convolutions of the targets too, as imported adapters do.
    """

    def make(
        unet: UNet2DConditionModel,
        *,
        ranks: tuple[int, ...] = (4,),
        targets: str = "attention",
        seed: int = 0,
        convolutions: bool = False,
    ) -> AdapterWeights:
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for index, name in enumerate((served_layers if convolutions else adapted_layers)(unet, targets)):
            module, rank = unet.get_submodule(name), ranks[index % len(ranks)]
            assert isinstance(module, nn.Linear | nn.Conv2d)
            outputs, inputs = module.weight.shape[:2]
            layers[name] = LoraLayer(
                torch.randn(rank, inputs, generator=generator) * inputs**-0.5,
                0.3 * torch.randn(outputs, rank, generator=generator),
                convolution=isinstance(module, nn.Conv2d),
            )
        return AdapterWeights(layers)

    return make


@pytest.fixture
def xl_unet() -> UNet2DConditionModel:
    """A tiny U-Net of SDXL's kind: no attention in its first block, several transformer blocks, pooled text."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
        use_linear_projection=True,
    )
    return unet.eval().requires_grad_(False)
