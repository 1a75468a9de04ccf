"""The digest of a base model, by which an adapter knows the base that it was trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTokenizer

from cat_cluster.errors import BaseModelError, OutputError
from cat_cluster.files import write_whole
from cat_cluster.models.base_files import read_config, tokenizer_components, weight_components, weight_files
from cat_cluster.settings import load_settings

_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_POSITIONS = "position_ids"  # a buffer in older files, no weight
_OLDER_ATTENTION: Mapping[str, str] = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BETA_DEFAULTS: Mapping[str, Any] = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}


class Fingerprints(NamedTuple):
    """The digest of a base, and the one that versions before 0.2 had for its files."""

    content: str
    earlier: str


def fingerprints(folder: Path) -> Fingerprints:
    """Return the base's digests: of its tensors as fp32, how it spells, prediction type and betas.

    The content's is a sha256 over the tensors, each by component, name, shape and values, and what the tokenizers do:
    a file's dtype and sharding do not count, nor do the older names that files have for some tensors, nor how a
    tokenizer is written down, so that a folder and a checkpoint in one file with the same weights are one base. Earlier
    versions took the files' own names and the bytes of the tokenizers' files. Cached by path, size and time of every
    file. Raises BaseModelError for a truncated file or weights that are not finite; cached digests were checked when
    they were made.
    """
    files = {component: weight_files(folder, component) for component in weight_components(folder)}
    places = [folder / component / name for component in tokenizer_components(folder) for name in _TOKENIZER_FILES]
    tokenizers = [path for path in places if path.is_file()]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    cache = _cache_path([*(path for found in files.values() for path in found.paths), *tokenizers, scheduler])
    cached = _read_digests(cache)
    if cached is not None:
        return cached
    config = read_config(folder, "scheduler")
    betas = json.dumps({key: config.get(key, default) for key, default in _BETA_DEFAULTS.items()}, sort_keys=True)
    earlier, lines = hashlib.sha256(), []
    for component, found in sorted(files.items()):
        for name, tensor in _tensors(found.paths):
            values = tensor.to(torch.float32).contiguous().numpy().tobytes()
            earlier.update(f"{component}\0{name}\0{list(tensor.shape)}\0".encode())
            earlier.update(values)
            if _POSITIONS not in name:
                lines.append(f"{component} {_canonical(component, name, tensor)} {hashlib.sha256(values).hexdigest()}")
    for path in tokenizers:
        earlier.update(f"{path.parent.name}\0{path.name}\0{path.stat().st_size}\0".encode())
        earlier.update(path.read_bytes())
    earlier.update(betas.encode())
    lines = [*sorted(lines), *(_spelling(folder / component) for component in tokenizer_components(folder)), betas]
    digests = Fingerprints(hashlib.sha256("\n".join(lines).encode()).hexdigest(), earlier.hexdigest())
    _write_digests(cache, digests)
    return digests


def _canonical(component: str, name: str, tensor: Tensor) -> str:
    """Return the name and shape of a tensor as the libraries have it now."""
    shape = list(tensor.shape)
    if component.startswith("text_encoder"):
        name = name.removeprefix("text_model.")
    elif component == "vae" and ".attentions." in name:
        for older, now in _OLDER_ATTENTION.items():
            name = name.replace(f".{older}.", f".{now}.")
        shape = shape[:2] if shape[2:] == [1, 1] else shape
    return f"{name} {shape}"


def _spelling(folder: Path) -> str:
    """Return what a tokenizer does: its pieces, which of them it joins first, its marks and its limit."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    except Exception as error:  # the tokenizers library raises nothing more particular
        raise BaseModelError(f"{folder} cannot be loaded ({error}); download the base again.") from error
    marks = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    facts = [sorted(tokenizer.get_vocab().items()), merges, marks, tokenizer.model_max_length]
    return f"{folder.name} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


def _tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one component in order of name, one in memory at a time, each checked to be finite."""
    with contextlib.ExitStack() as stack:
        owners: dict[str, tuple[Path, Callable[[str], Tensor]]] = {}
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise BaseModelError(f"{path} is damaged ({error}); download the base again.") from error
            owners.update(dict.fromkeys(file.keys(), (path, file.get_tensor)))
        for name, (path, read) in sorted(owners.items(), key=lambda item: item[0]):
            tensor = read(name)
            if not bool(torch.isfinite(tensor).all()):
                raise BaseModelError(f"{path}: tensor {name} has values that are not finite; download the base again.")
            yield name, tensor


def _cache_path(paths: Sequence[Path]) -> Path:
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return load_settings().cache_dir / "fingerprints" / f"{key}.sha256"


def _read_digests(path: Path) -> Fingerprints | None:
    try:
        lines = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    if len(lines) != 2 or any(len(line) != 64 or not set(line) <= set("0123456789abcdef") for line in lines):
        return None
    return Fingerprints(*lines)


def _write_digests(path: Path, digests: Fingerprints) -> None:
    # A cache that cannot be written costs a second hashing, never the load.
    with contextlib.suppress(OutputError):
        write_whole(path, " ".join(digests).encode("ascii"))
