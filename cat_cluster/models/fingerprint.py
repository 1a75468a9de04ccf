"""The digest of a base model, by which an adapter knows the base that it was trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
_BETA_DEFAULTS: Mapping[str, Any] = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}


def fingerprint(folder: Path) -> str:
    """Return the base's digest: sha256 over its tensors as fp32, tokenizer files, prediction type and betas.

    Tensors are taken in order of (component, name) and hashed with both and their shape, so a file's dtype and
    sharding do not count but its values do. Cached by path, size and time of every file. Raises BaseModelError
    for a truncated file or weights that are not finite; a cached digest was checked when it was made.
    """
    files = {component: weight_files(folder, component) for component in weight_components(folder)}
    places = [folder / component / name for component in tokenizer_components(folder) for name in _TOKENIZER_FILES]
    tokenizers = [path for path in places if path.is_file()]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    cache = _cache_path([*(path for found in files.values() for path in found.paths), *tokenizers, scheduler])
    cached = _read_digest(cache)
    if cached is not None:
        return cached
    digest = hashlib.sha256()
    for component, found in sorted(files.items()):
        for name, tensor in _tensors(found.paths):
            digest.update(f"{component}\0{name}\0{list(tensor.shape)}\0".encode())
            digest.update(tensor.to(torch.float32).contiguous().numpy().tobytes())
    for path in tokenizers:
        digest.update(f"{path.parent.name}\0{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    config = read_config(folder, "scheduler")
    betas = {key: config.get(key, default) for key, default in _BETA_DEFAULTS.items()}
    digest.update(json.dumps(betas, sort_keys=True).encode())
    _write_digest(cache, digest.hexdigest())
    return digest.hexdigest()


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


def _read_digest(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else None


def _write_digest(path: Path, digest: str) -> None:
    # A cache that cannot be written costs a second hashing, never the load.
    with contextlib.suppress(OutputError):
        write_whole(path, digest.encode("ascii"))
