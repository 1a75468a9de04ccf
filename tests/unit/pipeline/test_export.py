"""Published adapters leave under the names that the readers of each format know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from cat_cluster.errors import AdapterMismatchError, BaseModelError
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.fingerprint import fingerprints
from cat_cluster.models.unet_layout import unet_layout
from cat_cluster.pipeline.published_adapters import export_stack
from cat_cluster.registry import AdapterDraft, Registry
from cat_cluster.registry.stacks import parse_member
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import LocalStore

LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks_3_1_transformer_blocks_1_attn1_to_q",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": "output_blocks_1_1_transformer_blocks_0_attn1_to_q",
}


def xl_folder(folder: Path) -> Path:
    """A base folder with the U-Net of a miniature SDXL, of one layer per block."""
    UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=28,
        use_linear_projection=True,
    ).save_pretrained(folder / "unet")
    return folder


def publish(
    registry: Registry, base: str, layers: dict[str, LoraLayer], name: str = "cup", digest: str = "b" * 64
) -> None:
    resolved = ResolvedAdapter(
        id=name,
        base=base,
        method="cat",
        concepts=(ConceptSpec(token="sks", class_noun="cup", images="photos"),),
        training=TrainingSpec(rank=2),
        evaluation=EvaluationSpec(),
    )
    registry.publish(
        AdapterDraft(
            adapter_id=name,
            resolved=resolved,
            base_name=base,
            base_fingerprint=digest,
            image_digests=["1" * 64],
            weights=AdapterWeights(layers),
            training={},
        )
    )


def exported(registry: Registry, folder: Path) -> set[str]:
    return {key.split(".")[0] for key in load_file(export_stack(registry, [parse_member("cup")], folder, "kohya"))}


def test_kohyas_names_of_an_sdxl_follow_the_blocks_of_its_own_unet(tmp_path: Path) -> None:
    registry = Registry(LocalStore(tmp_path / "storage"))
    publish(
        registry,
        str(xl_folder(tmp_path / "base")),
        {name: LoraLayer(torch.ones(2, 8), torch.ones(8, 2)) for name in LAYERS},
    )
    assert exported(registry, tmp_path / "out") == {f"lora_unet_{name}" for name in LAYERS.values()}


def test_kohyas_names_of_a_stable_diffusion_1_need_no_base(tmp_path: Path) -> None:
    registry = Registry(LocalStore(tmp_path / "storage"))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    gone = str(tmp_path / "gone")
    publish(registry, gone, {name: LoraLayer(torch.ones(2, 8), torch.ones(8, 2))})
    assert exported(registry, tmp_path / "out") == {f"lora_unet_{name.replace('.', '_')}"}


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    registry = Registry(LocalStore(tmp_path / "storage"))
    gone = str(tmp_path / "gone")
    publish(registry, gone, {next(iter(LAYERS)): LoraLayer(torch.ones(2, 8), torch.ones(8, 2))})
    with pytest.raises(BaseModelError, match=f"base '{gone}' is neither a folder nor a file"):
        exported(registry, tmp_path / "out")


def test_adapters_that_know_one_base_by_its_digests_of_two_versions_go_out_together(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    registry = Registry(LocalStore(tmp_path / "storage"))
    layers = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": LoraLayer(torch.ones(2, 8), torch.ones(8, 2))}
    for name, digest in zip(("new", "old"), fingerprints(tiny_base_folder), strict=True):
        publish(registry, str(tiny_base_folder), layers, name, digest)
    publish(registry, str(tiny_base_folder), layers, "other")
    both = [parse_member("old"), parse_member("new")]
    assert export_stack(registry, both, tmp_path / "out", "peft").exists()
    with pytest.raises(AdapterMismatchError, match="export adapters of one base"):
        export_stack(registry, [*both, parse_member("other")], tmp_path / "out", "peft")


def test_a_layout_has_every_module_and_no_weights(tiny_base_folder: Path) -> None:
    layout, whole = unet_layout(str(tiny_base_folder)), UNet2DConditionModel.from_pretrained(tiny_base_folder / "unet")
    assert [name for name, _ in layout.named_modules()] == [name for name, _ in whole.named_modules()]
    assert all(parameter.is_meta for parameter in layout.parameters())
