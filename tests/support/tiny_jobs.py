"""Small real jobs for the tests: photos, judges and specs on disk, and the command line in this process or its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from cat_cluster.cli.app import main
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore

SUBPROCESS_SECONDS = 120


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one JSON document on stdout; anything beside it fails."""
        return json.loads(self.out)


@dataclass(frozen=True)
class CommandLine:
    """`cat-cluster` in this process, through the real entry point: fast, with all errors and exit codes."""

    patch: pytest.MonkeyPatch
    captured: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path) -> Finished:
        self.captured.readouterr()
        self.patch.setattr(sys, "argv", ["cat-cluster", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.captured.readouterr()
        return Finished(int(ended.value.code or 0), out, err)


def start_process(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start `cat-cluster` as a user's shell would; one thread, as in the tests' own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "cat_cluster.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment},
    )


def run_process(*arguments: str | Path, **environment: str) -> Finished:
    """Run `cat-cluster` in a process of its own to its end."""
    process = start_process(*arguments, **environment)
    out, err = process.communicate(timeout=SUBPROCESS_SECONDS)
    return Finished(process.returncode, out, err)


def assert_refused(finished: Finished, *parts: str) -> None:
    """One clear error for people on stderr, naming each of `parts`; for programs the same or nothing on stdout."""
    assert finished.code == 1, finished
    assert finished.out == "" or set(finished.json()["error"]) == {"type", "message"}
    assert finished.err.count("error ") == 1, finished.err
    assert "Traceback" not in finished.err
    for part in parts:
        assert part in finished.err, finished.err


def write_photos(folder: Path, count: int = 2, *, seed: int = 0, side: int = 40) -> Path:
    """Photos of noise on a colour of the seed's own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    colour = rng.integers(40, 215, size=3)
    for index in range(count):
        pixels = np.clip(colour + rng.integers(-40, 40, size=(side, side, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def write_judge(folder: Path, tokenizer: Path) -> Path:
    """A CLIPModel folder with random weights for 16-pixel squares, as a release lays it out."""
    shutil.copytree(tokenizer, folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = {"vocab_size": len(vocabulary), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = CLIPConfig(
            text_config={**shared, **text, "max_position_embeddings": 77},
            vision_config={**shared, "image_size": 16, "patch_size": 8},
            projection_dim=12,
        )
        CLIPModel(config).save_pretrained(folder)
    preprocessing = {
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def adapter(adapter_id: str, images: Path, token: str = "sks", **changes: Any) -> dict[str, Any]:
    """An adapter of one cup, as a spec writes it."""
    return {"id": adapter_id, "concepts": [{"token": token, "class_noun": "cup", "images": str(images)}], **changes}


def write_spec(
    path: Path,
    base: Path | str,
    adapters: Sequence[Mapping[str, Any]],
    *,
    training: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A job spec: few steps, a high rate so that they show, no evaluation unless `changes` has one."""
    spec = {
        "name": "tiny",
        "base": str(base),
        "adapters": list(adapters),
        "training": {"steps": 3, "rank": 2, "rows_per_concept": 2, "learning_rate": 0.02, **(training or {})},
        "evaluation": {"enabled": False},
        **changes,
    }
    path.write_text(yaml.safe_dump(spec))
    return path


def open_registry(storage: Path) -> Registry:
    """The registry of a storage folder, with nothing remembered of earlier reads."""
    return Registry(LocalStore(storage))


def published_weights(storage: Path, reference: str) -> AdapterWeights:
    """The weights of a published adapter, with every check of the registry."""
    registry = open_registry(storage)
    return registry.load_weights(registry.resolve(reference))


def relative_change(ours: AdapterWeights, theirs: AdapterWeights) -> float:
    """The largest ||W - W_ref|| / ||W_ref|| over the layers, W = up @ down."""
    assert ours.layers.keys() == theirs.layers.keys()
    changes = []
    for name, layer in ours.layers.items():
        reference = theirs.layers[name].up @ theirs.layers[name].down
        changes.append(float(torch.linalg.norm(layer.up @ layer.down - reference) / torch.linalg.norm(reference)))
    return max(changes)


def stored_files(storage: Path) -> dict[str, bytes]:
    """Every object of a store by key, and every other file in its folder, with its bytes."""
    return {
        path.relative_to(storage).as_posix(): path.read_bytes() for path in sorted(storage.rglob("*")) if path.is_file()
    }


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: to a writer it is as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
