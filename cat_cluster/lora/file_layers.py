"""The tensors of an adapter file by layer, and by what each of them is to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cat_cluster.errors import AdapterFormatError

# After the layer: PEFT's lora_A, diffusers' lora.down and lora_linear_layer.down, kohya's lora_down, and to_q_lora.down
# of diffusers' first attention processors, each with a twin for the up side; what LyCORIS adds; DoRA's magnitudes as
# kohya, ai-toolkit and PEFT call them.
_KEY = re.compile(
    r"(?P<layer>.+?)"
    r"(?:(?:\.lora_(?:(?P<A>A)|(?P<B>B))(?:\.default)?|[._]lora(?:_linear_layer)?[._](?:(?P<down>down)|(?P<up>up)))"
    r"\.weight"
    r"|\.(?P<mid>lora_mid)\.weight"
    r"|\.(?P<own>alpha|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))"
    r"|\.(?P<magnitude>dora_scale|magnitude|lora_magnitude_vector(?:\.default)?(?:\.weight)?))"
)
_PART_OF = {"A": "down", "B": "up"}


@dataclass(frozen=True, eq=False)
class FileLayer:
    """A layer as a file has it: tensors and their keys by part.

    Parts: down, up, mid, alpha, magnitude, and LyCORIS' own names, such as hada_w1_a.
    """

    raw: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def of(self, prefix: str) -> dict[str, Tensor]:
        """Return the parts that a prefix names, such as hada_."""
        return {part: tensor for part, tensor in self.tensors.items() if part.startswith(prefix)}

    @property
    def kind(self) -> str:
        """LORA, LOHA or LOKR, as PEFT calls them; empty where the file has no weights of the layer, or of several."""
        kinds = {"LORA": bool(self.of("down") or self.of("up"))}
        kinds |= {"LOHA": bool(self.of("hada_")), "LOKR": bool(self.of("lokr_"))}
        found = [kind for kind, has in kinds.items() if has]
        return found[0] if len(found) == 1 else ""

    @property
    def has_kernel(self) -> bool:
        """Whether the tensors have a convolution's axes."""
        return any(tensor.ndim == 4 for tensor in self.tensors.values())

    @property
    def inputs(self) -> int | None:
        """The width that the layer takes, as far as its tensors tell."""
        widths = {part: tensor.shape[1] for part, tensor in self.tensors.items() if tensor.ndim >= 2}
        if self.kind == "LOKR":
            first, second = (widths.get(f"lokr_{w}", widths.get(f"lokr_{w}_b")) for w in ("w1", "w2"))
            return None if first is None or second is None else first * second
        return widths.get({"LORA": "down", "LOHA": "hada_w1_b"}.get(self.kind, ""))


def layer_of(key: str) -> str | None:
    """Return the layer that a tensor of a LoRA, a LoHa or a LoKr belongs to, None for another tensor."""
    match = _KEY.fullmatch(key)
    return None if match is None else match["layer"]


def by_layer(name: str, tensors: Mapping[str, Tensor]) -> dict[str, FileLayer]:
    """Group a file's tensors by layer, in the file's order.

    Raises AdapterFormatError for a tensor that is none of a LoRA, a LoHa or a LoKr, or that is there twice.
    """
    layers: dict[str, FileLayer] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or (match["own"] != "alpha" and not tensor.is_floating_point()):
            raise AdapterFormatError(f"{name}: {key} is not a LoRA weight of a linear layer: use a plain U-Net LoRA")
        layer = layers.setdefault(match["layer"], FileLayer(match["layer"]))
        part = match["own"] or _PART_OF.get(str(match.lastgroup), str(match.lastgroup))
        if part in layer.tensors:
            raise AdapterFormatError(
                f"{name}: {key} and another key are the same weight of {layer.raw}: export it again"
            )
        layer.tensors[part], layer.keys[part] = tensor, key
    return layers
