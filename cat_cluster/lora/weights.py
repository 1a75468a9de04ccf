"""What an adapter is: the change of each layer, W + up @ down."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.lora.layers import in_text_encoder, sizes_of


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one layer: W + up @ down, down [R, in] and up [out, R], fp32; every scale is folded into up.

    convolution: the layer is a 1x1 convolution, so that files hold [R, in, 1, 1] and [out, R, 1, 1].
    """

    down: Tensor
    up: Tensor
    convolution: bool = False


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter: its layers by path, such as mid_block.attentions.0.transformer_blocks.0.attn1.to_q.

    Paths of text encoders' layers begin with text_encoder. or text_encoder_2., as those of diffusers' files.
    """

    layers: Mapping[str, LoraLayer]

    @property
    def rank(self) -> int:
        """The largest rank of any layer; 0 without layers."""
        return max((len(layer.down) for layer in self.layers.values()), default=0)

    @property
    def of_text(self) -> AdapterWeights:
        """The layers of text encoders."""
        return AdapterWeights({name: layer for name, layer in self.layers.items() if in_text_encoder(name)})

    @property
    def of_unet(self) -> AdapterWeights:
        """The layers of the U-Net."""
        return AdapterWeights({name: layer for name, layer in self.layers.items() if not in_text_encoder(name)})

    def check_finite(self) -> None:
        """Raise AdapterFormatError, naming the layer, when a weight is NaN or infinite."""
        for name, layer in self.layers.items():
            if not (bool(layer.down.isfinite().all()) and bool(layer.up.isfinite().all())):
                raise AdapterFormatError(f"layer {name} holds values that are not finite: train or download it again")

    def digest(self) -> str:
        """Return the sha256 over names, shapes and fp32 bytes."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            for tensor in (self.layers[name].down, self.layers[name].up):
                digest.update(f"{name} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def check_fits(weights: AdapterWeights, unet: nn.Module) -> None:
    """Raise AdapterMismatchError, naming layer and shapes, when an adapter does not fit a base.

    unet: the U-Net alone, or a base's `network`, in which an adapter of its text encoders fits too.
    """
    modules = dict(unet.named_modules())
    for name, layer in weights.layers.items():
        wanted, found = sizes_of(modules.get(name)), (layer.down.shape[1], layer.up.shape[0])
        if wanted is None:
            raise AdapterMismatchError(
                f"layer {name} is not a linear layer or 1x1 convolution of this base model: use the base it was made "
                "for, and a LoRA of such layers alone"
            )
        if wanted != found:
            raise AdapterMismatchError(
                f"layer {name} takes (in, out) = {wanted} in this base model and {found} in the adapter: "
                "use the base it was made for"
            )
