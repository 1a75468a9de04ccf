"""LoHa and LoKr come in as the nearest LoRA: against LyCORIS' formulas in plain loops, numpy's decomposition, PEFT."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import save
from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.lora.formats import CONVOLUTION, UNSUPPORTED, LoraLayer, read_adapter, read_foreign
from cat_cluster.lora.reduction import report
from tests.unit.lora.test_formats import ATTENTION, bank_predicts, close, peft_folder

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FEED_FORWARD = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
PROJECTION = "down_blocks.0.attentions.0.proj_in"
Matrix = npt.NDArray[np.float64]


def kohya(layer: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"lora_unet_{layer.replace('.', '_')}.{part}": tensor for part, tensor in tensors.items()}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loha(outputs: int, inputs: int, *, ranks: tuple[int, int] = (3, 3), seed: int = 0) -> dict[str, Tensor]:
    first, second = ranks
    return {
        "hada_w1_a": normal(outputs, first, seed=seed),
        "hada_w1_b": normal(first, inputs, seed=seed + 1),
        "hada_w2_a": normal(outputs, second, seed=seed + 2),
        "hada_w2_b": normal(second, inputs, seed=seed + 3),
    }


def lokr(one: tuple[int, int], other: tuple[int, int], *, ranks: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Factors of w1 [one] and w2 [other]; rank 0: the factor is whole."""
    parts = {}
    for number, ((outputs, inputs), rank) in enumerate(zip((one, other), ranks, strict=True), 1):
        name, own = f"lokr_w{number}", seed + 10 * number
        if rank:
            parts |= {
                f"{name}_a": normal(outputs, rank, seed=own),
                f"{name}_b": normal(rank, inputs, seed=own + 1),
            }
        else:
            parts[name] = normal(outputs, inputs, seed=own)
    return parts


def multiplied(a: Tensor, b: Tensor) -> Matrix:
    found = np.zeros((a.shape[0], b.shape[1]))
    for o, r, i in product(range(a.shape[0]), range(a.shape[1]), range(b.shape[1])):
        found[o, i] += float(a[o, r]) * float(b[r, i])
    return found


def change_of_loha(parts: dict[str, Tensor]) -> Matrix:
    """LyCORIS: (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank, element by element."""
    one, other = (multiplied(parts[f"hada_{w}_a"], parts[f"hada_{w}_b"]) for w in ("w1", "w2"))
    scale = float(parts["alpha"]) / len(parts["hada_w1_b"]) if "alpha" in parts else 1.0
    found = np.zeros_like(one)
    for o, i in product(*map(range, one.shape)):
        found[o, i] = one[o, i] * other[o, i] * scale
    return found


def change_of_lokr(parts: dict[str, Tensor]) -> Matrix:
    """LyCORIS: kron(w1, w2) * alpha / rank; 1 where both factors are whole, whatever alpha the file has."""
    factors, ranks = [], []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            factors.append(parts[name].flatten(1).numpy().astype(np.float64))
        else:
            factors.append(multiplied(parts[f"{name}_a"], parts[f"{name}_b"]))
            ranks.append(len(parts[f"{name}_b"]))
    one, other = factors
    scale = float(parts["alpha"]) / ranks[0] if ranks and "alpha" in parts else 1.0
    found = np.zeros((one.shape[0] * other.shape[0], one.shape[1] * other.shape[1]))
    for a, b, c, d in product(range(one.shape[0]), range(one.shape[1]), range(other.shape[0]), range(other.shape[1])):
        found[a * other.shape[0] + c, b * other.shape[1] + d] = one[a, b] * other[c, d] * scale
    return found


def nearest(change: Matrix, rank: int) -> Matrix:
    left, values, right = np.linalg.svd(change, full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def product_of(layer: LoraLayer) -> Matrix:
    return np.asarray((layer.up.double() @ layer.down.double()).numpy())


def tower(outputs: int, inputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"block": nn.ModuleDict({"to_q": nn.Linear(inputs, outputs)})})


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    alpha=st.sampled_from([None, 1.0, 6.0, -2.0]),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_a_loha_comes_in_as_the_nearest_lora(
    sizes: tuple[int, int], ranks: tuple[int, int], alpha: float | None, rank: int, seed: int
) -> None:
    parts = loha(*sizes, ranks=ranks, seed=seed) | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    check(parts, change_of_loha(parts), rank)


@settings(max_examples=60, deadline=None)
@given(
    one=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    other=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ranks=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    alpha=st.sampled_from([None, 1.0, 6.0, -2.0]),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_a_lokr_comes_in_as_the_nearest_lora(
    one: tuple[int, int],
    other: tuple[int, int],
    ranks: tuple[int, int],
    alpha: float | None,
    rank: int,
    seed: int,
) -> None:
    parts = lokr(one, other, ranks=ranks, seed=seed) | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    check(parts, change_of_lokr(parts), rank)


def check(parts: dict[str, Tensor], change: Matrix, rank: int) -> None:
    """Compare the LoRA by its distance from the change: the nearest one is not unique where singular values meet."""
    found = read_foreign(save(kohya("block.to_q", parts)), unet=tower(*change.shape), rank=rank)
    layer, said = found.weights.layers["block.to_q"], found.reductions["block.to_q"].relative_error
    assert len(layer.down) == layer.up.shape[1] <= min(rank, *change.shape)
    norm = float(np.linalg.norm(change))
    least = float(np.linalg.norm(change - nearest(change, rank)))
    assert float(np.linalg.norm(change - product_of(layer))) == pytest.approx(least, rel=1e-4, abs=1e-5 * norm)
    assert said == pytest.approx(least / norm, rel=1e-4, abs=1e-5)


def test_the_nearest_lora_is_numpys_and_the_report_is_of_all_layers(one_unet: UNet2DConditionModel) -> None:
    sizes = {QUERY: (8, 8), FEED_FORWARD: (64, 8)}
    parts = {name: loha(*size, seed=len(name)) | {"alpha": torch.tensor(2.0)} for name, size in sizes.items()}
    tensors = {key: tensor for name in sizes for key, tensor in kohya(name, parts[name]).items()}
    found = read_foreign(save(tensors), unet=one_unet, rank=4)
    changes = {name: change_of_loha(parts[name]) for name in sizes}
    errors = {}
    for name, change in changes.items():
        np.testing.assert_allclose(product_of(found.weights.layers[name]), nearest(change, 4), rtol=1e-4, atol=1e-4)
        errors[name] = float(np.linalg.norm(change - nearest(change, 4)))
    told = report(found.reductions, 4)
    norms = {name: float(np.linalg.norm(change)) for name, change in changes.items()}
    whole = math.hypot(*errors.values()) / math.hypot(*norms.values())
    each = {name: errors[name] / norms[name] for name in sizes}
    worst = max(each, key=each.__getitem__)
    assert (told["rank"], told["worst_layer"]) == (4, worst)
    assert told["relative_error"] == pytest.approx(whole, rel=1e-4)
    assert told["worst_relative_error"] == pytest.approx(each[worst], rel=1e-4)
    assert told["layers"] == pytest.approx(each, rel=1e-4)
    assert 0.05 < whole < 0.9, "nothing was left out, so nothing was measured"


def test_a_large_enough_rank_leaves_nothing_out_and_is_what_it_must_be(one_unet: UNet2DConditionModel) -> None:
    parts = lokr((2, 2), (4, 4), ranks=(0, 1), seed=3)
    found = read_foreign(save(kohya(QUERY, parts)), unet=one_unet, rank=32)
    np.testing.assert_allclose(product_of(found.weights.layers[QUERY]), change_of_lokr(parts), rtol=1e-4, atol=1e-5)
    assert found.reductions[QUERY].relative_error < 1e-5
    assert found.weights.rank == 8  # what the layer's sizes allow, not what was asked for


def test_an_untrained_layer_changes_nothing(one_unet: UNet2DConditionModel) -> None:
    parts = loha(8, 8) | {"hada_w2_a": torch.zeros(8, 3)}
    found = read_foreign(save(kohya(QUERY, parts)), unet=one_unet, rank=2)
    assert not product_of(found.weights.layers[QUERY]).any()
    assert found.reductions[QUERY].relative_error == 0.0


def test_a_1x1_convolution_is_a_linear_layer(one_unet: UNet2DConditionModel) -> None:
    parts = lokr((2, 2), (4, 4), ranks=(0, 0), seed=5)
    parts["lokr_w2"] = parts["lokr_w2"].reshape(4, 4, 1, 1)
    layer = read_foreign(save(kohya(PROJECTION, parts)), unet=one_unet, rank=8).weights.layers[PROJECTION]
    assert layer.convolution
    np.testing.assert_allclose(product_of(layer), change_of_lokr(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=3, target_modules=ATTENTION),
        LoHaConfig(r=2, alpha=3, target_modules=ATTENTION, alpha_pattern={"to_q": 1}, rank_pattern={"to_q": 1}),
        LoKrConfig(r=1, alpha=3, target_modules=ATTENTION),
        LoKrConfig(r=8, alpha=4, target_modules=ATTENTION),
        LoKrConfig(r=1, alpha=3, target_modules=ATTENTION, decompose_both=True, rank_pattern={"attn2.to_k": 2}),
    ],
    ids=["loha", "loha_patterns", "lokr", "whole_lokr", "lokr_both"],
)
def test_what_peft_trains_draws_the_same_here(unet: UNet2DConditionModel, config: Any, tmp_path: Path) -> None:
    twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict())
    theirs = peft_folder(twin, tmp_path, config)
    close(bank_predicts(unet, read_foreign(tmp_path, unet=unet, rank=64).weights), theirs)


def test_they_are_refused_without_a_rank_and_a_rank_without_them(one_unet: UNet2DConditionModel) -> None:
    for called, parts in (("LoHa", loha(8, 8)), ("LoKr", lokr((2, 2), (4, 4), ranks=(0, 1)))):
        data = save(kohya(QUERY, parts))
        for skip in (frozenset(), UNSUPPORTED):
            with pytest.raises(AdapterFormatError, match=rf"holds 1 {called} layers, the first .*to_q, .* --rank"):
                read_foreign(data, unet=one_unet, skip=skip)
        with pytest.raises(AdapterFormatError, match="--rank"):
            read_adapter(data, unet=one_unet)
    plain = kohya(QUERY, {"lora_down.weight": normal(2, 8), "lora_up.weight": normal(8, 2)})
    with pytest.raises(AdapterFormatError, match="no LoHa or LoKr layers, which --rank is for: leave it out"):
        read_foreign(save(plain), unet=one_unet, rank=4)


def test_lora_layers_beside_them_keep_their_own_rank(one_unet: UNet2DConditionModel) -> None:
    plain = {"lora_down.weight": normal(6, 8), "lora_up.weight": normal(64, 6)}
    found = read_foreign(save(kohya(QUERY, loha(8, 8)) | kohya(FEED_FORWARD, plain)), unet=one_unet, rank=2)
    assert {name: len(layer.down) for name, layer in found.weights.layers.items()} == {QUERY: 2, FEED_FORWARD: 6}
    assert set(found.reductions) == {QUERY}


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_larger_convolutions_are_left_out_when_asked(one_unet: UNet2DConditionModel, algorithm: str) -> None:
    """Their factors may have the shapes of a linear layer's, so the base's own layer tells."""
    conv = "down_blocks.0.resnets.0.conv1"
    outputs, inputs = one_unet.get_submodule(conv).weight.shape[:2]
    if algorithm == "loha":
        parts, linear = loha(outputs, inputs * 9), loha(8, 8)
    else:
        parts = lokr((2, 2), (outputs // 2, inputs * 9 // 2), ranks=(0, 2))
        linear = lokr((2, 2), (4, 4), ranks=(0, 1))
    data = save(kohya(conv, parts | {"alpha": torch.tensor(1.0)}) | kohya(QUERY, linear))
    with pytest.raises(AdapterFormatError, match=r"conv1.* is a convolution layer larger than 1x1.*--skip-unsupported"):
        read_foreign(data, unet=one_unet, rank=4)
    found = read_foreign(data, unet=one_unet, skip=UNSUPPORTED, rank=4)
    assert list(found.weights.layers) == [QUERY]
    assert found.left_out.counts == {CONVOLUTION.all: len(parts) + 1}


@pytest.mark.parametrize(
    "core",
    [
        {"hada_t1": normal(3, 3, 3, 3), "hada_t2": normal(3, 3, 3, 3)},
        {"hada_t1": normal(3, 3), "hada_t2": normal(3, 3)},
    ],
)
def test_a_tucker_decomposition_is_refused(one_unet: UNet2DConditionModel, core: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterFormatError, match="is a Tucker decomposition"):
        read_foreign(save(kohya(QUERY, loha(8, 8) | core)), unet=one_unet, rank=2)
    with pytest.raises(AdapterFormatError, match="holds nothing that cat-cluster applies, only layers in Tucker"):
        read_foreign(save(kohya(QUERY, loha(8, 8) | core)), unet=one_unet, rank=2, skip=UNSUPPORTED)


WHOLE = lokr((2, 2), (4, 4), ranks=(0, 0))
SPLIT = lokr((2, 2), (4, 4), ranks=(0, 2))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (loha(8, 8) | {"hada_w1_b": normal(2, 8)}, r"to_q has hada_w1_a \(8, 3\) and hada_w1_b \(2, 8\).*do not fit"),
        (loha(8, 8) | {"hada_w2_b": normal(3, 9)}, r"to_q has hada_w1 \(8, 8\) and hada_w2 \(8, 9\).*do not fit"),
        ({name: tensor for name, tensor in loha(8, 8).items() if name != "hada_w2_a"}, "lacks its hada_w2_a"),
        (loha(8, 8) | {"hada_w1_a": normal(8)}, r"hada_w1_a has the shape \(8,\), which is no matrix"),
        (loha(8, 8, ranks=(0, 3)), r"hada_w1_a has the shape \(8, 0\), which is no matrix"),
        (loha(8, 8) | {"hada_w1_a": torch.full((8, 3), math.nan)}, "hada_w1_a holds values that are not finite"),
        (loha(8, 8) | {"alpha": torch.tensor(math.nan)}, "alpha holds values that are not finite"),
        (loha(8, 8) | {"alpha": torch.tensor(0.0)}, r"alpha is 0, which some programs take for the rank"),
        (loha(8, 8) | {"alpha": torch.ones(2)}, "alpha is not one number"),
        ({name: tensor * 1e30 for name, tensor in loha(8, 8).items()}, "the change of layer .*to_q is not finite"),
        (SPLIT | {"lokr_w2_b": normal(3, 4)}, r"to_q has lokr_w2_a \(4, 2\) and lokr_w2_b \(3, 4\).*do not fit"),
        ({"lokr_w1": WHOLE["lokr_w1"]}, "lacks its lokr_w2_a"),
        ({"lokr_w2": WHOLE["lokr_w2"]}, "lacks its lokr_w1_a"),
        (WHOLE | {"lokr_w2_a": SPLIT["lokr_w2_a"]}, "has lokr_w2 and lokr_w2_a"),
        (WHOLE | {"lokr_w1": torch.full((2, 2), math.inf)}, "lokr_w1 holds values that are not finite"),
        (WHOLE | loha(8, 8), "is of two kinds of layer"),
    ],
)
def test_damaged_factors_are_refused_naming_the_layer(
    one_unet: UNet2DConditionModel, parts: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(AdapterFormatError, match=says):
        read_foreign(save(kohya(QUERY, parts)), unet=one_unet, rank=4)


def test_factors_of_another_base_are_refused_naming_the_layer(one_unet: UNet2DConditionModel) -> None:
    parts = lokr((2, 2), (4, 5), ranks=(0, 0))
    with pytest.raises(AdapterMismatchError, match=rf"{QUERY} takes \(in, out\) = \(8, 8\).*\(10, 8\)"):
        read_foreign(save(kohya(QUERY, parts)), unet=one_unet, rank=4)
