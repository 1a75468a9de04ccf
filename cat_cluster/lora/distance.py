"""How far an adapter has gone from another one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cat_cluster.lora.formats import AdapterWeights


def relative_distance(weights: AdapterWeights, start: AdapterWeights) -> float:
    """Return ||W - W_0|| / ||W_0|| (Frobenius, over all layers), W = up @ down; infinite where W_0 is 0.

    No [out, in] matrix is made: with U = [up, -up_0] and D = [down; down_0], ||U D||^2 = sum (U^T U) * (D D^T).
    """
    apart = of_start = 0.0
    for name in weights.layers.keys() | start.layers.keys():
        mine, first = weights.layers.get(name), start.layers.get(name)
        ups = [sign * layer.up.double() for sign, layer in ((1.0, mine), (-1.0, first)) if layer is not None]
        downs = [layer.down.double() for layer in (mine, first) if layer is not None]
        apart += _square_norm(torch.cat(ups, dim=1), torch.cat(downs))
        of_start += 0.0 if first is None else _square_norm(first.up.double(), first.down.double())
    return math.sqrt(max(apart, 0.0) / of_start) if of_start > 0.0 else math.inf


def _square_norm(up: Tensor, down: Tensor) -> float:
    return float(((up.mT @ up) * (down @ down.mT)).sum())
