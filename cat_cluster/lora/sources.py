"""Where an adapter is: its file of weights, alone or in a folder, and the settings beside it or in its header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cat_cluster.errors import AdapterFormatError
from cat_cluster.lora.layer_names import PEFT_PREFIX
from cat_cluster.lora.peft_config import FileSettings, header_config, parse_config

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".ckpt", ".pth", ".pkl")


def open_source(source: Path | bytes) -> tuple[str, bytes, Path | None]:
    """Return what to call the source in messages, its bytes, and the adapter_config.json that lies beside it.

    Raises AdapterFormatError for a path that cannot be read or names no one adapter, and for pickle files.
    """
    if isinstance(source, bytes):
        return "the adapter file", source, None
    path = find_weights(source)
    config_path = path.parent / PEFT_CONFIG
    try:
        return str(path), path.read_bytes(), config_path if config_path.is_file() else None
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read: {error}; check the path") from error


def settings_of(name: str, data: bytes, tensors: Mapping[str, Tensor], beside: Path | None) -> FileSettings:
    """Return PEFT's settings of a file: those beside a file of PEFT, whatever its name, else those of its header.

    Raises AdapterFormatError where a file of PEFT has none, or they cannot be read.
    """
    of_peft = any(PEFT_PREFIX in key for key in tensors)
    if beside is not None and (of_peft or Path(name).name == PEFT_WEIGHTS):
        _check_owner(name, beside)
        try:
            return parse_config(str(beside), beside.read_bytes())
        except OSError as error:
            raise AdapterFormatError(f"{beside} cannot be read: {error}; check the path") from error
    settings = header_config(name, data)
    if not settings.of_part and of_peft:
        raise AdapterFormatError(f"{name} is a PEFT file, whose scale is in {PEFT_CONFIG}: put that file beside it")
    return settings


def _check_owner(name: str, config: Path) -> None:
    """Refuse a config beside a renamed file where the file that PEFT writes it for lies there too."""
    other = config.parent / PEFT_WEIGHTS
    if Path(name).name != PEFT_WEIGHTS and other.is_file():
        raise AdapterFormatError(
            f"{name} lies beside {PEFT_CONFIG}, which belongs to {PEFT_WEIGHTS}: put the file into a folder of its own "
            f"with its own {PEFT_CONFIG}"
        )


def find_weights(source: Path) -> Path:
    """Return the file of weights that a path means: itself, or the one in a folder. Raises AdapterFormatError."""
    path = _weights_file(source) if source.is_dir() else source
    if path.suffix in _PICKLE_SUFFIXES:
        raise AdapterFormatError(f"{path} is a pickle file, which can run code: convert it to safetensors first")
    return path


def _weights_file(folder: Path) -> Path:
    found = [folder / name for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS) if (folder / name).is_file()]
    found = found or sorted(folder.glob("*.safetensors"))
    if not found:
        raise AdapterFormatError(f"{folder} holds no .safetensors file; pickle files (.bin, .pt) are never read")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise AdapterFormatError(f"{folder} holds several adapters ({names}): name one of the files")
    return found[0]
