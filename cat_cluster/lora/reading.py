"""Adapter files of other tools, and our own: which layers they change and by how much, and what of them is left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from cat_cluster.errors import AdapterFormatError
from cat_cluster.lora.families import family_of_file, refuse_other_models, refuse_other_width, refuse_unknown_layer
from cat_cluster.lora.file_layers import FileLayer, by_layer, layer_of
from cat_cluster.lora.foreign_parts import TEXT_ENCODER, Kind, LeftOut, foreign_parts, kind_by_name, left_out
from cat_cluster.lora.layer_names import LayerNames, bare_name, is_flat
from cat_cluster.lora.layers import in_text_encoder, is_convolution
from cat_cluster.lora.peft_config import FileSettings, scale_of
from cat_cluster.lora.reduction import Reduction, ScaleOf, reduced
from cat_cluster.lora.sources import open_source, settings_of
from cat_cluster.lora.weights import AdapterWeights, LoraLayer, check_fits


@dataclass(frozen=True, eq=False)
class ForeignAdapter:
    """An adapter that another tool wrote: what is applied, what was left out, and how near LoHa and LoKr layers came.

    reductions: by module path, of the layers that a LoRA stands for.
    """

    weights: AdapterWeights
    left_out: LeftOut = field(default_factory=lambda: LeftOut({}))
    reductions: Mapping[str, Reduction] = field(default_factory=dict)


def read_adapter(source: Path | bytes, *, unet: nn.Module | None = None) -> AdapterWeights:
    """Read an adapter whose file is a LoRA and nothing else; see `read_foreign`."""
    return read_foreign(source, unet=unet).weights


def read_foreign(
    source: Path | bytes, *, unet: nn.Module | None = None, skip: Collection[Kind] = (), rank: int | None = None
) -> ForeignAdapter:
    """Read an adapter of any of the three formats; a folder is searched for the file names that write_adapter uses.

    unet: a base's `network`, or its U-Net alone, beside which a text encoder's part is not applied. kohya files need
    it: their names write dots as underscores. With it names and shapes are checked too. skip: the kinds of parts to
    leave out, of `UNSUPPORTED`; others that this project does not apply are refused. rank: of the LoRA that stands for
    each LoHa or LoKr layer, without which these are refused.

    Raises AdapterFormatError for a damaged file, one that is not safetensors, values that are not finite, and, by name,
    for what is refused; AdapterMismatchError, naming the families, for a file of another family of models.
    """
    name, data, beside = open_source(source)
    try:
        tensors = dict(sorted(load(data).items()))  # safetensors gives them in another order each time
    except (SafetensorError, ValueError) as error:
        raise AdapterFormatError(
            f"{name} is not a whole safetensors file ({error}): copy or export it again; pickle files are never read"
        ) from error
    refuse_other_models(name, tensors, unet)
    foreign = _foreign_by_name(tensors, unet)
    layers = by_layer(name, {key: tensor for key, tensor in tensors.items() if key not in foreign})
    places = _Places(name, tensors, layers, unet)
    for layer in layers.values():
        for part, kind in foreign_parts(layer, places.module(layer.raw)).items():
            foreign[layer.keys[part]] = kind
            del layer.tensors[part]
    omitted = left_out(foreign, skip, name)
    applied = [layer for layer in layers.values() if layer.tensors]
    if not applied:
        raise AdapterFormatError(_nothing_left(name, omitted))
    _check_kinds(name, applied, rank)
    settings = settings_of(name, data, tensors, beside)
    applied_names = [bare_name(layer.raw) for layer in applied]
    settings.check(name, applied_names, {layer.kind for layer in applied}, omitted.keys)
    weights, reductions = _collect(name, applied, places, settings, rank)
    try:
        weights.check_finite()
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{name}: {error}") from None
    if unet is not None:
        check_fits(weights, unet)
    return ForeignAdapter(weights, omitted, reductions)


def _foreign_by_name(keys: Collection[str], unet: nn.Module | None) -> dict[str, Kind]:
    """Return the kind of each tensor whose name says that it is not applied; of text encoders those not at hand."""
    names = None if unet is None else LayerNames(unet)
    found = {}
    for key in keys:
        kind, raw = kind_by_name(key), layer_of(key)
        if kind == TEXT_ENCODER and raw is not None:
            path = bare_name(raw) if names is None else names.path(raw)
            kind = None if path is not None and in_text_encoder(path) else kind
        if kind is not None:
            found[key] = kind
    return found


class _Places:
    """Where a file's layers are in the base; without it, what their names say."""

    def __init__(
        self, name: str, keys: Collection[str], layers: Mapping[str, FileLayer], unet: nn.Module | None
    ) -> None:
        widths = {raw: layer.inputs for raw, layer in layers.items()}
        self._name = name
        self._family = family_of_file(keys, ((raw, width) for raw, width in widths.items() if width is not None))
        self._unet = unet
        self._names = None if unet is None else LayerNames(unet)
        self._modules = {} if unet is None else dict(unet.named_modules())
        if unet is not None:
            refuse_other_width(name, self._family, unet)

    def module(self, raw: str) -> nn.Module | None:
        """Return the base's layer, None where it has none or is not at hand."""
        return None if self._names is None else self._modules.get(self._names.path(raw) or "")

    def path(self, raw: str) -> str:
        """Return the layer's module path; AdapterMismatchError where the base has no such layer."""
        if self._names is None or self._unet is None:
            if is_flat(raw):
                raise AdapterFormatError(
                    f"{self._name} is a kohya file: reading it needs the base model, to tell its layers' names"
                )
            return bare_name(raw)
        path = self._names.path(raw)
        if path is None:
            refuse_unknown_layer(self._name, raw, self._family, self._unet)
        return path


def _nothing_left(name: str, omitted: LeftOut) -> str:
    if not omitted.keys:
        return f"{name} holds no LoRA layers: choose another file"
    if set(omitted.keys) == {TEXT_ENCODER}:
        return f"{name} holds a text-encoder part alone: choose a file with a U-Net part"
    return f"{name} holds nothing that cat-cluster applies, only {' and '.join(omitted.counts)}: choose another file"


def _check_kinds(name: str, layers: Collection[FileLayer], rank: int | None) -> None:
    """Refuse layers of no one kind, LoHa and LoKr layers without a rank, and a rank without such layers."""
    for layer in layers:
        if not layer.kind:
            what = "has no LoRA weights beside it" if set(layer.tensors) == {"alpha"} else "is of two kinds of layer"
            key = layer.keys[next(iter(layer.tensors))]
            raise AdapterFormatError(f"{name}: {key} {what}: export it again")
    for kind, called in (("LOHA", "LoHa"), ("LOKR", "LoKr")):
        of_kind = [layer for layer in layers if layer.kind == kind]
        if of_kind and rank is None:
            raise AdapterFormatError(
                f"{name} holds {len(of_kind)} {called} layers, the first {of_kind[0].raw}, which come in as the LoRA "
                "nearest to them: import the file with --rank and the rank of that LoRA"
            )
    if rank is not None and not any(layer.kind in ("LOHA", "LOKR") for layer in layers):
        raise AdapterFormatError(
            f"{name} holds no LoHa or LoKr layers, which --rank is for: leave it out; LoRA layers keep their own rank"
        )


def _collect(
    name: str, layers: Collection[FileLayer], places: _Places, settings: FileSettings, rank: int | None
) -> tuple[AdapterWeights, dict[str, Reduction]]:
    found: dict[str, LoraLayer] = {}
    reductions: dict[str, Reduction] = {}
    for layer in layers:
        path = places.path(layer.raw)
        if path in found:
            raise AdapterFormatError(f"{name}: {layer.raw} and another are the same weight of {path}: export it again")
        scale = partial(_scale, name, layer, path, settings.of_layer(path))
        module = places.module(layer.raw)
        convolution = layer.has_kernel if module is None else is_convolution(module)
        if layer.kind == "LORA":
            found[path] = _lora(name, layer, path, scale, convolution=convolution)
        else:
            assert rank is not None  # else _check_kinds has refused the layer
            nearest, reductions[path] = reduced(name, layer, scale, rank)
            found[path] = LoraLayer(nearest.down, nearest.up, convolution)
    return AdapterWeights(dict(sorted(found.items()))), reductions


def _lora(name: str, layer: FileLayer, path: str, scale: ScaleOf, *, convolution: bool) -> LoraLayer:
    for part, key in layer.keys.items():
        if part in ("down", "up") and layer.tensors[part].ndim not in (2, 4):
            raise AdapterFormatError(f"{name}: {key} is not a LoRA weight of a linear layer: use a plain U-Net LoRA")
    sides = {part: layer.tensors[part] for part in ("down", "up") if part in layer.tensors}
    if len(sides) < 2:
        raise AdapterFormatError(f"{name}: layer {path} lacks its {'up' if 'down' in sides else 'down'} weight")
    # Of a 1x1 convolution [R, in, 1, 1], which is a linear at each pixel.
    down, up = (side.float().flatten(1) for side in sides.values())
    rank, other = len(down), up.shape[1]
    if rank != other or rank == 0:
        raise AdapterFormatError(f"{name}: layer {path} has rank {rank} in its down weight and {other} in its up")
    return LoraLayer(down, up * scale(rank), convolution)


def _scale(name: str, layer: FileLayer, path: str, config: Mapping[str, Any] | None, rank: int | None) -> float:
    """Return what a layer's product is multiplied by: alpha / rank, or 1 where the file says nothing.

    rank: None for a LoKr of two whole factors, for which LyCORIS writes an alpha that means 1.
    """
    if (tensor := layer.tensors.get("alpha")) is None:
        return 1.0 if config is None else scale_of(name, config, path, rank)
    if tensor.numel() != 1:
        raise AdapterFormatError(f"{name}: {layer.keys['alpha']} is not one number: export it again")
    if (alpha := float(tensor)) == 0.0:
        raise AdapterFormatError(
            f"{name}: {layer.keys['alpha']} is 0, which some programs take for the rank and others for no change: "
            "export it again with an alpha"
        )
    return 1.0 if rank is None else alpha / rank
