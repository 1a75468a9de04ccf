"""What adapters can change of a base model: its U-Net and its text encoders, by the paths that adapters know."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

TEXT_ENCODER_NAMES = ("text_encoder", "text_encoder_2")


class Network(nn.Module):
    """A view of a U-Net and its text encoders as one module; it holds no weights of its own and is never called.

    The U-Net's modules go by their own paths, those of text encoders by `text_encoder.` or `text_encoder_2.` and the
    path that diffusers' files have, in which transformers' layers lie in `text_model`, also where a version of it has
    no such module.
    """

    def __init__(self, unet: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, module in unet.named_children():
            self.add_module(name, module)
        for name, model in zip(TEXT_ENCODER_NAMES, text_encoders, strict=False):
            self.add_module(
                name, model if "text_model" in dict(model.named_children()) else nn.ModuleDict({"text_model": model})
            )
