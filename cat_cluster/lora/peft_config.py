"""PEFT's LoRA settings beside or inside an adapter file: which scale they mean, and which parts are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cat_cluster.errors import AdapterFormatError
from cat_cluster.lora.foreign_parts import BIAS, DORA, Kind
from cat_cluster.lora.layers import part_of

HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps a LoraConfig in a safetensors header
_PARTS = ("unet", "text_encoder", "text_encoder_2")
_PEFT_DEFAULT = 8.0  # of alpha and of r, in every config of PEFT, for settings that leave it out
_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # where each kind of adapter keeps it

# Settings under which an adapter is more than W + scale * up @ down, by what to call them.
_REFUSED_FLAGS = {
    "use_dora": "DoRA weights",
    "use_qalora": "QALoRA weights",
    "use_bdlora": "block-diagonal LoRA weights",
    "lora_bias": "a trained bias",
    "fan_in_fan_out": "transposed weights",
    "modules_to_save": "whole trained modules",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "adapted bare parameters",
    "arrow_config": "an Arrow router",
}
# The settings that say no more than that a file has parts which can be left out.
_FLAG_OF_PART = {"use_dora": DORA, "lora_bias": BIAS, "bias": BIAS}
# These subtract the adapter's first value from the base weights: the file is right only beside that changed base.
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class FileSettings:
    """The LoraConfigs that go with a file: by part of the base, "unet" or "text_encoder", or "" for one of all."""

    of_part: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of_layer(self, layer: str) -> Mapping[str, Any] | None:
        """Return the settings of a layer, by its path; None where nothing is said of it."""
        return self.of_part.get("", self.of_part.get(part_of(layer)))

    def check(self, where: str, layers: Iterable[str], kinds: Collection[str], omitted: Collection[Kind]) -> None:
        """Raise AdapterFormatError, naming the setting, for an adapter that is more than a scaled product.

        layers: those that are applied. kinds: LORA, LOHA, LOKR, as far as the file holds layers of them; omitted: the
        kinds of parts that were left out.
        """
        for part in dict.fromkeys(part_of(layer) for layer in layers):
            config = self.of_layer(part)
            if config is not None:
                _check_config(where, config, kinds, omitted)


def parse_config(where: str, text: str | bytes) -> FileSettings:
    """Return the settings in `text`: JSON of a LoraConfig, or of several, whose keys begin with their part's name."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise AdapterFormatError(f"{where} is not JSON ({error}): copy or export the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{where} is not a JSON object: copy or export the adapter again")
    of_part = {part: _of(part, config) for part in _PARTS}
    return FileSettings({part: own for part, own in of_part.items() if own} or {"": config})


def _of(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings whose keys begin with a part's name, without it."""
    prefix = f"{part}." if part else ""
    return {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}


def header_config(name: str, data: bytes) -> FileSettings:
    """Return the LoraConfigs in a safetensors header, of no part where it has none.

    Newer diffusers keep it as JSON under one key; others write a header entry per setting, as `unet.lora_alpha`.
    """
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if HEADER_KEY in metadata:
        return parse_config(f"{name}: {HEADER_KEY}", metadata[HEADER_KEY])
    found = {part: own for part in (*_PARTS, "") if "lora_alpha" in (own := _of(part, metadata))}
    known = ("r", "alpha_pattern", "rank_pattern", "bias", "init_lora_weights", "peft_type", "use_rslora", "lora_alpha")
    return FileSettings(
        {
            part: {key: _flat_value(own[key]) for key in own if key in (*known, *_REFUSED_FLAGS)}
            for part, own in found.items()
        }
    )


def _flat_value(text: str) -> Any:
    """Return a setting that was written as text, in JSON or as Python prints it."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _check_config(where: str, config: Mapping[str, Any], kinds: Collection[str], omitted: Collection[Kind]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind not in kinds:
        raise AdapterFormatError(
            f"{where}: peft_type is {kind}, which cat-cluster does not apply to these weights: use a plain U-Net LoRA"
        )
    ignored = {flag for flag, part in _FLAG_OF_PART.items() if part in omitted}
    found = next((flag for flag in _REFUSED_FLAGS if config.get(flag) and flag not in ignored), None)
    if found is not None:
        what = _REFUSED_FLAGS[found]
        raise AdapterFormatError(
            f"{where}: {found} means {what}, which cat-cluster does not apply: use a plain U-Net LoRA"
        )
    if config.get("bias", "none") != "none" and "bias" not in ignored:
        raise AdapterFormatError(
            f"{where}: bias is {config['bias']!r}, trained biases are not applied: train with bias 'none'"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REFUSED_STARTS):
        raise AdapterFormatError(
            f"{where}: init_lora_weights {start!r} changes the base weights: convert the adapter to plain LoRA first"
        )


def scale_of(where: str, config: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """Return what PEFT multiplies a layer's product by: alpha / R, or alpha / sqrt(R) (rsLoRA, arXiv 2312.03732).

    R is `rank`, that of the layer's factors; of a LoKr, whose factors may be whole, the one in its settings.
    """
    kind = config.get("peft_type", "LORA")
    try:
        alpha = float(_own(config, "alpha_pattern", layer, config.get(_ALPHA[kind], _PEFT_DEFAULT)))
        if kind == "LOKR" or rank is None:
            rank = int(_own(config, "rank_pattern", layer, config.get("r", _PEFT_DEFAULT)))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        raise AdapterFormatError(
            f"{where}: {_ALPHA[kind]}, alpha_pattern, r or rank_pattern cannot be read ({error}): export the adapter "
            "again"
        ) from error


def _own(config: Mapping[str, Any], pattern: str, layer: str, otherwise: Any) -> Any:
    """Return the value of the first entry of a pattern that is the layer's, as PEFT matches them."""
    patterns = config.get(pattern) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), otherwise)


def config_for(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the LoraConfig of an adapter whose scales are folded (alpha = rank), from the rank of each layer."""
    rank = max(ranks.values())
    others = {re.escape(name): own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
