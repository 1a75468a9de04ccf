"""LoHa and LoKr layers as LoRA: the change of a stated rank that is nearest to theirs, and how far it is from it.

LoHa (FedPara, arXiv 2108.06098) is a Hadamard product, scale * (w1_a @ w1_b) * (w2_a @ w2_b); LoKr (LyCORIS, arXiv
2309.14859) a Kronecker product, scale * kron(w1, w2), each factor whole or a product. The nearest matrix of rank R is
the truncated singular value decomposition (Eckart and Young, 1936). It is found without the matrix [out, in]: a
Hadamard product of products is itself a product, of the row-wise Kronecker products of the factors, and the
decomposition of a Kronecker product is that of its factors, multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_cluster.errors import AdapterFormatError
from cat_cluster.lora.file_layers import FileLayer
from cat_cluster.lora.weights import LoraLayer

ScaleOf = Callable[[int | None], float]  # of a layer, by the rank that its file divides alpha by


@dataclass(frozen=True)
class Reduction:
    """How near a layer's LoRA is: the squared Frobenius norms of the change and of what was left out of it."""

    squared_norm: float
    squared_rest: float

    @property
    def relative_error(self) -> float:
        """The norm of what was left out over that of the change; 0 for a layer that changes nothing."""
        return math.sqrt(self.squared_rest / self.squared_norm) if self.squared_norm else 0.0


def total(reductions: Iterable[Reduction]) -> Reduction:
    """Return several layers as one."""
    parts = list(reductions)
    return Reduction(sum(one.squared_norm for one in parts), sum(one.squared_rest for one in parts))


def reduced(name: str, layer: FileLayer, scale_of: ScaleOf, rank: int) -> tuple[LoraLayer, Reduction]:
    """Return the LoRA of at most `rank` that is nearest to a LoHa or LoKr layer, and how near it is.

    scale_of: what the product is multiplied by, from the rank of the file's factors: of a LoHa that of w1, of a LoKr
    that of the factor which is a product, None where both are whole (LyCORIS then takes 1). Raises AdapterFormatError,
    naming the layer, for factors that are missing, do not fit together or are not finite.
    """
    for part, tensor in layer.tensors.items():
        if not bool(tensor.float().isfinite().all()):
            raise AdapterFormatError(f"{name}: {layer.keys[part]} holds values that are not finite: download it again")
    left, values, right = (
        _hadamard(name, layer, scale_of) if layer.kind == "LOHA" else _kronecker(name, layer, scale_of, rank)
    )
    squares = values.double().square()
    root = values[:rank].sqrt()
    return (
        LoraLayer(root.unsqueeze(1) * right[:rank], left[:, :rank] * root),
        Reduction(float(squares.sum()), float(squares[rank:].sum())),
    )


def _hadamard(name: str, layer: FileLayer, scale_of: ScaleOf) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decomposition of a LoHa: left [out, K], K values, largest first, right [K, in]."""
    factors = {part: _matrix(name, layer, f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    w1_a, w1_b, w2_a, w2_b = factors.values()
    _check_product(name, layer, "hada_w1", w1_a, w1_b)
    _check_product(name, layer, "hada_w2", w2_a, w2_b)
    if (len(w1_a), w1_b.shape[1]) != (len(w2_a), w2_b.shape[1]):
        raise _misfit(name, layer, "hada_w1", (len(w1_a), w1_b.shape[1]), "hada_w2", (len(w2_a), w2_b.shape[1]))
    # (w1_a @ w1_b) * (w2_a @ w2_b) = rows @ columns, [out, R1 R2] @ [R1 R2, in].
    rows = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)
    columns = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
    basis_left, core_left = torch.linalg.qr(rows)
    basis_right, core_right = torch.linalg.qr(columns.T)
    left, values, right = _decomposed(name, layer, core_left @ core_right.T)
    scale = scale_of(len(w1_b))
    return math.copysign(1.0, scale) * basis_left @ left, abs(scale) * values, right @ basis_right.T


def _kronecker(name: str, layer: FileLayer, scale_of: ScaleOf, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decomposition of a LoKr as `_hadamard` does: all values, the vectors of the `rank` largest."""
    (w1, rank1), (w2, rank2) = (_factor(name, layer, part) for part in ("lokr_w1", "lokr_w2"))
    (left1, values1, right1), (left2, values2, right2) = (_decomposed(name, layer, w) for w in (w1, w2))
    scale = scale_of(rank1 or rank2)
    values, order = torch.outer(values1, values2).flatten().sort(descending=True)
    first, second = order[:rank] // len(values2), order[:rank] % len(values2)
    left = (left1[:, first].unsqueeze(1) * left2[:, second].unsqueeze(0)).flatten(0, 1)
    right = (right1[first].unsqueeze(2) * right2[second].unsqueeze(1)).flatten(1)
    return math.copysign(1.0, scale) * left, abs(scale) * values, right


def _decomposed(name: str, layer: FileLayer, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not bool(matrix.isfinite().all()):
        raise AdapterFormatError(f"{name}: the change of layer {layer.raw} is not finite: download the file again")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _factor(name: str, layer: FileLayer, part: str) -> tuple[Tensor, int | None]:
    """Return a factor of a LoKr and the rank of the product that it is, None for one that is whole."""
    parts = layer.of(part)
    if part in parts:
        if len(parts) > 1:
            raise AdapterFormatError(f"{name}: layer {layer.raw} has {' and '.join(sorted(parts))}: export it again")
        return _matrix(name, layer, part), None
    a, b = (_matrix(name, layer, f"{part}_{side}") for side in "ab")
    _check_product(name, layer, part, a, b)
    return a @ b, len(b)


def _matrix(name: str, layer: FileLayer, part: str) -> Tensor:
    """Return a part as a matrix, fp32; of a 1x1 convolution it may have two axes of 1 more."""
    if part not in layer.tensors:
        raise AdapterFormatError(f"{name}: layer {layer.raw} lacks its {part}: download the file again")
    tensor = layer.tensors[part]
    if tensor.ndim not in (2, 4) or 0 in tensor.shape:
        raise AdapterFormatError(
            f"{name}: {layer.keys[part]} has the shape {tuple(tensor.shape)}, which is no matrix: export it again"
        )
    return tensor.float().flatten(1)


def _check_product(name: str, layer: FileLayer, part: str, a: Tensor, b: Tensor) -> None:
    if a.shape[1] != len(b):
        raise _misfit(name, layer, f"{part}_a", tuple(a.shape), f"{part}_b", tuple(b.shape))


def _misfit(
    name: str, layer: FileLayer, one: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]
) -> AdapterFormatError:
    return AdapterFormatError(
        f"{name}: layer {layer.raw} has {one} {shape} and {other} {other_shape}, which do not fit together: export it "
        "again"
    )


def report(reductions: Mapping[str, Reduction], rank: int) -> dict[str, object]:
    """Return what is said of reduced layers: the rank, the relative error in all, of the worst layer and of each."""
    worst = max(reductions, key=lambda name: reductions[name].relative_error)
    return {
        "rank": rank,
        "relative_error": total(reductions.values()).relative_error,
        "worst_layer": worst,
        "worst_relative_error": reductions[worst].relative_error,
        "layers": {name: one.relative_error for name, one in sorted(reductions.items())},
    }
