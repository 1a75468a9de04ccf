"""The LoRA bank: every adapted layer of a base holds many adapters, and each row of a batch picks its own.

Slot 0 is the zero adapter: a row bound to it is the base model's. A bank both trains (parameters per slot) and
serves (weights loaded into a slot by a copy, no module surgery). It spans the U-Net and the text encoders, whose rows
are bound apart, since texts are encoded before the U-Net's call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from cat_cluster.errors import AdapterMismatchError
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.lora.layers import change_of_pixels, in_text_encoder, is_convolution, sizes_of
from cat_cluster.spec.choices import Blocks, ServedTargets, Targets

TARGETS: Mapping[Targets, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "cross_attention": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    "attention_ff": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}
BLOCKS: Mapping[Blocks, tuple[str, ...]] = {
    "all": ("down_blocks.", "mid_block.", "up_blocks."),
    "mid_up": ("mid_block.", "up_blocks."),
    "up": ("up_blocks.",),
}


# Of a text encoder, as kohya's trainer and diffusers' examples have it.
TEXT_TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def adapted_layers(unet: nn.Module, targets: Targets, blocks: Blocks = "all") -> tuple[str, ...]:
    """Return the module paths of the linears that `targets` names in `blocks`, in module order (no convolutions).

    The forward runs down, mid, up. What lies before the first adapted layer needs no gradient, so its activations are
    not kept and the backward ends there: `mid_up` and `up` train on the second part of the U-Net alone.
    """
    if targets not in TARGETS:
        raise ValueError(f"targets must be one of {', '.join(TARGETS)}, got {targets!r}")
    if blocks not in BLOCKS:
        raise ValueError(f"blocks must be one of {', '.join(BLOCKS)}, got {blocks!r}")
    return tuple(
        name
        for name, module in unet.named_modules()
        if isinstance(module.base if isinstance(module, _BankLayer) else module, nn.Linear)
        and ".attentions." in name
        and name.startswith(BLOCKS[blocks])
        and name.endswith(TARGETS[targets])
    )


def text_layers(network: nn.Module) -> tuple[str, ...]:
    """Return the linears of a base's text encoders that training adapts: attention and MLP of each of their layers."""
    return tuple(name for name, _ in network.named_modules() if in_text_encoder(name) and name.endswith(TEXT_TARGETS))


def served_text_layers(network: nn.Module) -> tuple[str, ...]:
    """Return what `text_layers` does and the projections of pooled text, which imported adapters may change."""
    ends = (*TEXT_TARGETS, "text_projection")
    return tuple(name for name, _ in network.named_modules() if in_text_encoder(name) and name.endswith(ends))


def served_layers(unet: nn.Module, targets: ServedTargets) -> tuple[str, ...]:
    """Return what `adapted_layers` does and the 1x1 convolutions of that name, which imported adapters may change.

    all: every linear and 1x1 convolution of the U-Net.
    """
    linears = set(adapted_layers(unet, "attention_ff" if targets == "all" else targets))
    return tuple(
        name
        for name, module in unet.named_modules()
        if name in linears
        or (
            sizes_of(module) is not None
            and (
                targets == "all"
                or (".attentions." in name and name.endswith(TARGETS[targets]) and isinstance(module, nn.Conv2d))
            )
        )
    )


class _BankLayer(nn.Module):
    """base(x) + up_slot(row) @ down_slot(row) @ x, row by row; the base is a linear or a 1x1 convolution.

    of_text: of a text encoder, which without bound rows is the base's own.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, *, of_text: bool) -> None:
        super().__init__()
        self.base = base
        self.of_text = of_text
        self.in_features, self.out_features = _sizes(base)
        # Set by the bank for the running forward. Plain attributes and no look-up: torch.compile takes them as inputs.
        self.rows: int | None = None
        self.factors: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for rows x [B, T, in], [B, in] or, of a convolution, [B, in, H, W]."""
        output: Tensor = self.base(x)
        if self.rows is None and self.of_text:
            return output
        if self.rows is None:
            raise RuntimeError("no rows are bound: call the U-Net inside `with bank.rows(slots):`")
        if len(x) != self.rows:
            raise ValueError(f"the call has {len(x)} rows and {self.rows} are bound: bind one slot per row")
        if self.factors is None:
            return output
        down_BRI, up_BOR = self.factors
        if x.ndim == 2:
            return _add_change(output.unsqueeze(1), x.unsqueeze(1), down_BRI, up_BOR).squeeze(1)
        if x.ndim == 4:
            # A sum that begins with the output keeps its memory layout, and so the bits of base rows.
            return output + change_of_pixels(x, down_BRI, up_BOR)
        return _add_change(output, x, down_BRI, up_BOR)


def _add_change(output_BTO: Tensor, x_BTI: Tensor, down_BRI: Tensor, up_BOR: Tensor) -> Tensor:
    # One product per row, never one per group of rows: a row's arithmetic must not depend on its neighbours.
    hidden_BTR = torch.bmm(x_BTI, down_BRI.to(x_BTI.dtype).mT)
    return torch.baddbmm(output_BTO, hidden_BTR, up_BOR.to(hidden_BTR.dtype).mT)


class LoraBank:
    """Adapter slots 1, 2, ... in every adapted layer of one base; see the module docstring.

    A forward holds the slots up to the highest in use, each padded to the largest rank in use.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.network = network
        self.layers = tuple(layers)
        self._slots: dict[int, dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
        self._tables: dict[str, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        self._bound: set[bool] = set()  # of text encoders and of the U-Net, those whose rows are bound
        self._originals: dict[str, nn.Linear | nn.Conv2d] = {}
        self._modules: dict[str, _BankLayer] = {}

    @classmethod
    def attach(cls, network: nn.Module, *, layers: Sequence[str]) -> LoraBank:
        """Put a bank into the named layers of a base's `network`, in place.

        A U-Net alone is one without text encoders. Raises AdapterMismatchError for a name that is no linear and no 1x1
        convolution of it.
        """
        bank = cls(network, layers)
        modules = dict(network.named_modules())
        if any(isinstance(module, _BankLayer) for module in modules.values()):
            raise RuntimeError("this base holds a bank already: detach that one first")
        for name in bank.layers:
            if sizes_of(modules.get(name)) is None:
                raise AdapterMismatchError(
                    f"{name} is not a linear layer or 1x1 convolution of this base: use the one it was trained on"
                )
        for name in bank.layers:
            bank._originals[name] = modules[name]
            bank._modules[name] = _BankLayer(modules[name], of_text=in_text_encoder(name))
            replace_module(network, name, bank._modules[name])
        return bank

    def detach(self) -> None:
        """Put the original layers back; the base is then as before `attach`."""
        for name, original in self._originals.items():
            replace_module(self.network, name, original)
        self._originals.clear()
        self._modules.clear()

    @contextmanager
    def rows(self, slot_B: Tensor | Sequence[int]) -> Iterator[None]:
        """Bind row i of every forward of the U-Net inside to slot slot_B[i]; the backward belongs inside too.

        Gradient checkpointing recomputes forwards during the backward, under the binding of that moment.
        """
        with self._binding(slot_B, of_text=False):
            yield

    @contextmanager
    def text_rows(self, slot_B: Tensor | Sequence[int]) -> Iterator[None]:
        """Bind row i of every forward of a text encoder inside to slot slot_B[i]; outside they are the base's own.

        Where any row has an adapter, every slot's parameters get a gradient of what is encoded inside, if of zeros.
        """
        with self._binding(slot_B, of_text=True):
            yield

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots in use."""
        return tuple(sorted(self._slots))

    def adapts_text(self, slot: int) -> bool:
        """Say whether the adapter in a slot changes text encoders."""
        return any(in_text_encoder(name) for name in self._slots.get(slot, ()))

    @contextmanager
    def _binding(self, slot_B: Tensor | Sequence[int], *, of_text: bool) -> Iterator[None]:
        if of_text in self._bound:
            raise RuntimeError("rows are already bound: leave the first `with bank.rows(...)` before the next")
        modules = {name: module for name, module in self._modules.items() if module.of_text == of_text}
        slots = torch.as_tensor(slot_B, dtype=torch.long)
        used = set(slots.tolist()) - {0}
        unknown = used - self._slots.keys()
        if unknown:
            raise ValueError(f"no adapter in slot {min(unknown)}: load it first (in use: {self.slots})")
        self._bound.add(of_text)
        try:
            self._bind(modules, slots, any_adapter=bool(used))
            yield
        finally:
            for module in modules.values():
                module.rows, module.factors = None, None
            self._bound.discard(of_text)

    def _bind(self, modules: Mapping[str, _BankLayer], slots: Tensor, *, any_adapter: bool) -> None:
        """Give layers this forward's down [B, R, in] and up [B, out, R]; none when all rows are base rows."""
        slot_B = slots.to(self._originals[self.layers[0]].weight.device)
        for name, module in modules.items():
            module.rows = len(slots)
            if any_adapter:
                down, up = self._table(name)
                module.factors = (down.index_select(0, slot_B), up.index_select(0, slot_B))

    def new_trainable(self, slot: int, weights: AdapterWeights) -> None:
        """Start training in a slot from `weights`; its parameters have the adapter's own rank."""
        self._set(slot, weights, strength=1.0, trainable=True)

    def load(self, slot: int, weights: AdapterWeights, *, strength: float = 1.0) -> None:
        """Put an adapter into a slot for inference; `strength` scales what it adds."""
        self._set(slot, weights, strength=strength, trainable=False)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self._slots.pop(slot, None)
        self._tables.clear()

    def parameters(self, slot: int) -> list[nn.Parameter]:
        """Return a slot's parameters in layer order, down before up."""
        return [parameter for pair in self._slots[slot].values() for parameter in pair]

    def named_parameters(self, slot: int) -> dict[str, nn.Parameter]:
        """Return a slot's parameters by name, in the same order."""
        return dict(zip(parameter_names(self._slots[slot]), self.parameters(slot), strict=True))

    def export(self, slot: int) -> AdapterWeights:
        """Return a copy of a slot's weights at their true rank, fp32 on the CPU."""
        return AdapterWeights(
            {
                name: LoraLayer(
                    down.detach().float().cpu().clone(),
                    up.detach().float().cpu().clone(),
                    convolution=is_convolution(self._originals[name]),
                )
                for name, (down, up) in self._slots[slot].items()
            }
        )

    def _set(self, slot: int, weights: AdapterWeights, *, strength: float, trainable: bool) -> None:
        if slot < 1:
            raise ValueError(f"slot {slot} holds no adapter: slots begin at 1, and 0 is the base")
        foreign = sorted(set(weights.layers) - set(self.layers))
        if foreign:
            raise AdapterMismatchError(f"{foreign[0]} is not adapted by this bank: attach it with the adapter's layers")
        parameters = {}
        for name in self.layers:
            if name not in weights.layers:
                continue
            layer, original = weights.layers[name], self._originals[name]
            wanted, found = _sizes(original), (layer.down.shape[1], layer.up.shape[0])
            if wanted != found:
                raise AdapterMismatchError(
                    f"{name} takes (in, out) {wanted} and the adapter has {found}: other base model"
                )
            down, up = (side.to(original.weight.device, torch.float32) for side in (layer.down, layer.up))
            parameters[name] = (
                nn.Parameter(down.clone(), requires_grad=trainable),
                nn.Parameter(strength * up, requires_grad=trainable),
            )
        self._slots[slot] = parameters
        self._tables.clear()

    def _table(self, name: str) -> tuple[Tensor, Tensor]:
        """Return all slots of a layer, down [S+1, R, in] and up [S+1, out, R], row 0 zero."""
        pairs = [self._slots.get(slot, {}).get(name) for slot in range(max(self._slots) + 1)]
        if torch.is_grad_enabled() and any(pair is not None and pair[0].requires_grad for pair in pairs):
            return self._stack(name, pairs)
        # Steps of inference share one stack; the version counters notice an optimiser step in between.
        versions = tuple(-1 if pair is None else pair[0]._version + pair[1]._version for pair in pairs)
        kept = self._tables.get(name)
        if kept is None or kept[0] != versions:
            with torch.no_grad():
                kept = (versions, *self._stack(name, pairs))
            self._tables[name] = kept
        return kept[1], kept[2]

    def _stack(self, name: str, pairs: Sequence[tuple[nn.Parameter, nn.Parameter] | None]) -> tuple[Tensor, Tensor]:
        weight, (inputs, outputs) = self._originals[name].weight, _sizes(self._originals[name])
        rank = max((len(pair[0]) for pair in pairs if pair is not None), default=1)
        zero_down = weight.new_zeros((rank, inputs), dtype=torch.float32)
        zero_up = weight.new_zeros((outputs, rank), dtype=torch.float32)
        downs, ups = [zero_down], [zero_up]
        for pair in pairs[1:]:
            if pair is None:
                downs.append(zero_down)
                ups.append(zero_up)
                continue
            down, up = pair
            missing = rank - len(down)
            downs.append(functional.pad(down, (0, 0, 0, missing)) if missing else down)
            ups.append(functional.pad(up, (0, missing)) if missing else up)
        return torch.stack(downs), torch.stack(ups)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    sizes = sizes_of(layer)
    assert sizes is not None  # attach took it
    return sizes


def parameter_names(layers: Iterable[str]) -> list[str]:
    """Return the names of the parameters of layers, `<module path>.lora_A` and `.lora_B`, in order."""
    return [f"{layer}.{side}" for layer in layers for side in ("lora_A", "lora_B")]


def weights_of(values: Mapping[str, Tensor]) -> AdapterWeights:
    """Return the adapter whose parameters, named as by parameter_names, have these values; fp32 copies on the CPU.

    Its layers are linear, as those that are trained.
    """
    copies = {name: value.detach().float().cpu().clone() for name, value in values.items()}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in copies)
    return AdapterWeights({layer: LoraLayer(copies[f"{layer}.lora_A"], copies[f"{layer}.lora_B"]) for layer in layers})


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule at a path."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
