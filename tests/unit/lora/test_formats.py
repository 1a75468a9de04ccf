"""Adapter files: what the bank makes of a file is what peft and diffusers make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import (
    AdapterFormat,
    AdapterWeights,
    LoraLayer,
    read_adapter,
    to_safetensors,
    write_adapter,
)

WeightsFactory = Callable[..., AdapterWeights]
FORMATS: tuple[AdapterFormat, ...] = ("diffusers", "peft", "kohya")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 7, 16, generator=generator),
    )


@torch.no_grad()
def predict(unet: nn.Module) -> Tensor:
    output: Tensor = unet(*inputs()).sample
    return output


def bank_predicts(unet: UNet2DConditionModel, weights: AdapterWeights) -> Tensor:
    bank = LoraBank.attach(unet, layers=list(weights.layers))
    bank.load(1, weights)
    with bank.rows([1, 1]):
        output = predict(unet)
    bank.detach()
    return output


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def assert_same(found: AdapterWeights, expected: AdapterWeights) -> None:
    assert set(found.layers) == set(expected.layers)
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].down, layer.down)
        assert torch.equal(found.layers[name].up, layer.up)


def scramble(model: nn.Module) -> None:
    """Give every adapter parameter a value, as training would."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def peft_folder(unet: UNet2DConditionModel, folder: Path, config: Any) -> Tensor:
    """Save an adapter with peft itself and return what its model predicts."""
    model = get_peft_model(unet, config).eval()
    scramble(model)
    model.save_pretrained(folder)
    return predict(model)


# -- what we write, others read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ranks", [(4,), (1, 3)])
def test_a_round_trip_gives_the_same_weights_at_their_true_rank(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, fmt: AdapterFormat, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    weights = make_weights(unet, ranks=ranks, targets="attention_ff")
    path = write_adapter(weights, tmp_path / "deep" / fmt, fmt, adapter_id="red-cup", metadata={"token": "sks"})
    for source in (path, path.parent, path.read_bytes()):
        found = read_adapter(source, unet=unet)
        assert_same(found, weights)
        assert found.digest() == weights.digest()
    names = {"diffusers": "pytorch_lora_weights.safetensors", "peft": "adapter_model.safetensors"}
    assert path.name == names.get(fmt, "red-cup.safetensors")
    assert {p.name for p in path.parent.iterdir()} == {path.name, *(["adapter_config.json"] if fmt == "peft" else [])}


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
    notes=st.dictionaries(st.sampled_from(["token", "note"]), st.text(max_size=20)),
)
def test_any_weights_survive_any_format(
    fmt: AdapterFormat, shapes: list[tuple[int, int, int]], seed: int, notes: dict[str, str]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tower = nn.ModuleDict()
    layers = {}
    for index, (rank, inside, outside) in enumerate(shapes):
        tower[f"block_{index}"] = nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(inside, outside)])})
        layers[f"block_{index}.to_out.0"] = LoraLayer(
            torch.randn(rank, inside, generator=generator), torch.randn(outside, rank, generator=generator)
        )
    data = to_safetensors(AdapterWeights(layers), fmt, notes)
    assert_same(read_adapter(data, unet=tower), AdapterWeights(layers))  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", ["diffusers", "kohya"])
def test_a_stock_pipeline_draws_the_same_with_our_file(
    tiny_base_folder: Path, make_weights: WeightsFactory, fmt: AdapterFormat, tmp_path: Path
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_folder)
    weights = make_weights(pipeline.unet, ranks=(2,), targets="attention_ff" if fmt == "diffusers" else "attention")
    ours, bare = bank_predicts(pipeline.unet, weights), predict(pipeline.unet)
    path = write_adapter(weights, tmp_path, fmt, adapter_id="red-cup", metadata={})
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    close(ours, predict(pipeline.unet))
    assert not torch.allclose(ours, bare, atol=1e-3)


def test_the_unet_alone_loads_our_diffusers_file(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    weights = make_weights(unet, ranks=(2, 4), targets="attention")
    ours = bank_predicts(unet, weights)
    path = write_adapter(weights, tmp_path, "diffusers", adapter_id="a", metadata={})
    unet.load_lora_adapter(load_file(path), prefix="unet")
    close(ours, predict(unet))


@pytest.mark.parametrize("ranks", [(3,), (2, 4)])
def test_peft_loads_our_folder(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    weights = make_weights(unet, ranks=ranks, targets="attention_ff")
    ours = bank_predicts(unet, weights)
    write_adapter(weights, tmp_path, "peft", adapter_id="a", metadata={})
    close(ours, predict(PeftModel.from_pretrained(unet, tmp_path)))


# -- what others write, we read ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_alpha": 1.5},
        {"lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {"attn1.to_q": 2, "attn2.to_v": 5}, "lora_alpha": 6},
        {"alpha_pattern": {"attn2.*to_k": 9, "to_out.0": 1}, "rank_pattern": {"to_out.0": 3}},
        {"alpha_pattern": {"attn1.to_q": 3}, "lora_alpha": 2, "use_rslora": True},
    ],
)
def test_a_folder_of_peft_means_the_same_here(
    unet: UNet2DConditionModel, changes: dict[str, Any], tmp_path: Path
) -> None:
    twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict())
    theirs = peft_folder(twin, tmp_path, LoraConfig(**{"r": 4, "target_modules": ATTENTION, **changes}))
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        close(bank_predicts(unet, read_adapter(source, unet=unet)), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"lora_alpha": 1}, {"lora_alpha": 3, "use_rslora": True}, {"lora_alpha": 4}])
@pytest.mark.parametrize("writer", ["unet", "pipeline", "pipeline_without_metadata"])
def test_a_file_of_diffusers_means_what_diffusers_makes_of_it(
    tiny_base_folder: Path, changes: dict[str, Any], writer: str, tmp_path: Path
) -> None:
    maker = StableDiffusionPipeline.from_pretrained(tiny_base_folder).unet
    bare = StableDiffusionPipeline.from_pretrained(tiny_base_folder)
    maker.add_adapter(LoraConfig(r=4, target_modules=ATTENTION, **changes))
    scramble(maker)
    if writer == "unet":
        maker.save_lora_adapter(tmp_path)
    else:
        metadata = maker.peft_config["default"].to_dict() if writer == "pipeline" else None
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=get_peft_model_state_dict(maker), unet_lora_adapter_metadata=metadata
        )
    ours = bank_predicts(bare.unet, read_adapter(tmp_path, unet=bare.unet))
    if writer == "unet":
        close(ours, predict(maker))
    else:
        bare.load_lora_weights(tmp_path)
        close(ours, predict(bare.unet))


def old_processor_keys(weights: AdapterWeights) -> dict[str, Tensor]:
    """The keys of diffusers' first attention processors: attn1.processor.to_q_lora.down.weight."""
    tensors = {}
    for name, layer in weights.layers.items():
        parent, leaf = name.removesuffix(".0").rsplit(".", 1)
        tensors[f"unet.{parent}.processor.{leaf}_lora.down.weight"] = layer.down
        tensors[f"unet.{parent}.processor.{leaf}_lora.up.weight"] = layer.up
    return tensors


def dotted_keys(weights: AdapterWeights) -> dict[str, Tensor]:
    """The keys of diffusers between the two: to_out.0.lora.down.weight."""
    sides = {"down": "down", "up": "up"}
    return {
        f"unet.{name}.lora.{side}.weight": getattr(layer, attribute)
        for name, layer in weights.layers.items()
        for side, attribute in sides.items()
    }


@pytest.mark.parametrize("keys", [old_processor_keys, dotted_keys])
def test_old_names_of_diffusers_are_read(
    tiny_base_folder: Path,
    make_weights: WeightsFactory,
    keys: Callable[[AdapterWeights], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_folder)
    weights = make_weights(pipeline.unet, ranks=(2,))
    save_file(keys(weights), tmp_path / "pytorch_lora_weights.safetensors")
    found = read_adapter(tmp_path, unet=pipeline.unet)
    assert_same(found, weights)
    ours = bank_predicts(pipeline.unet, found)
    pipeline.load_lora_weights(tmp_path)
    close(ours, predict(pipeline.unet))


def kohya_tensors(weights: AdapterWeights, alphas: Sequence[float], dtype: torch.dtype) -> dict[str, Tensor]:
    """The keys of kohya's trainer; `alphas` are dealt out to the layers in turn."""
    tensors = {}
    for index, (name, layer) in enumerate(weights.layers.items()):
        prefix = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{prefix}.lora_down.weight"] = layer.down.to(dtype)
        tensors[f"{prefix}.lora_up.weight"] = layer.up.to(dtype)
        tensors[f"{prefix}.alpha"] = torch.tensor(alphas[index % len(alphas)], dtype=dtype)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_kohya_alpha_is_folded_as_diffusers_folds_it(
    tiny_base_folder: Path, make_weights: WeightsFactory, alpha: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_folder)
    path = tmp_path / "cup.safetensors"
    save_file(kohya_tensors(make_weights(pipeline.unet), [alpha], dtype), path)
    ours = bank_predicts(pipeline.unet, read_adapter(path, unet=pipeline.unet))
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    close(ours, predict(pipeline.unet))


def test_kohya_alpha_is_each_layers_own(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    """A plain loop is the oracle: diffusers 0.42 does not apply alphas that differ from the commonest."""
    weights = make_weights(one_unet, ranks=(4, 2))
    found = read_adapter(save(kohya_tensors(weights, [1.0, 8.0, 3.0], torch.float32)), unet=one_unet)
    for index, (name, layer) in enumerate(weights.layers.items()):
        factor = [1.0, 8.0, 3.0][index % 3] / [4, 2][index % 2]
        assert torch.equal(found.layers[name].down, layer.down)
        torch.testing.assert_close(found.layers[name].up, layer.up * factor, rtol=1e-6, atol=0.0)


def test_check_fits_looks_through_an_attached_bank(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(one_unet)
    bank = LoraBank.attach(one_unet, layers=list(weights.layers))
    for fmt in FORMATS:
        assert_same(read_adapter(to_safetensors(weights, fmt, {}), unet=one_unet), weights)
    bank.detach()


def test_the_digest_follows_names_shapes_and_values(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(one_unet)
    again = AdapterWeights(dict(reversed(list(weights.layers.items()))))
    assert again.digest() == weights.digest()
    changed = {name: LoraLayer(layer.down.clone(), layer.up.clone()) for name, layer in weights.layers.items()}
    changed[QUERY].up[0, 0] += 1e-6
    assert AdapterWeights(changed).digest() != weights.digest()
    # The same bytes in the same order, under another name and in another shape.
    layer = LoraLayer(torch.arange(4.0).reshape(1, 4), torch.arange(4.0).reshape(4, 1))
    reshaped = LoraLayer(layer.down.reshape(2, 2), layer.up.reshape(2, 2))
    digests = {AdapterWeights({name: one}).digest() for name in ("a", "b") for one in (layer, reshaped)}
    assert len(digests) == 4
