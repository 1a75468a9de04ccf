"""Judges: frozen models that turn images (and, some of them, prompts) into unit feature rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.metrics import Array
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.pocket import weights_path
from cat_cluster.models.pocket.classifier import Classifier, load_classifier
from cat_cluster.models.pocket.clip import load_judge as load_pocket_clip

POCKET = "pocket"
POCKET_CLASSIFIER = "pocket-classifier"
PUBLISHED_JUDGE = "openai/clip-vit-base-patch32"
IMAGES_PER_CALL = 64


class Judge(Protocol):
    """What compares images; scores of two judges never compare, so each carries a digest of its weights."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def digest(self) -> str:
        """sha256 of weights and preprocessing, hex."""

    def image_features(self, images_NCHW: Tensor) -> Tensor:
        """Return unit rows [N, F] of images [N, 3, H, W] in [0, 1]."""

    def text_features(self, prompts: Sequence[str]) -> Tensor | None:
        """Return unit rows [N, F] of prompts in the same space, or None for a judge without a text tower."""


@dataclass(frozen=True)
class Preprocessing:
    """How a CLIP wants its pixels: shorter side to `resize`, centre square of `crop`, then (x - mean) / std."""

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """Read preprocessor_config.json, in the old form (plain numbers) or the new one (named edges)."""
        path = folder / "preprocessor_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            size, crop = _edge(config["size"]), _edge(config.get("crop_size", config["size"]))
            return cls(size, crop, tuple(config["image_mean"]), tuple(config["image_std"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path} does not say how the judge takes its images ({error!r}): "
                "give a complete CLIPModel folder, with its preprocessor_config.json"
            ) from error

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Return [N, 3, crop, crop] for images [N, 3, H, W] in [0, 1]."""
        height, width = images_NCHW.shape[-2:]
        if min(height, width) != self.resize:
            scale = self.resize / min(height, width)
            images_NCHW = functional.interpolate(
                images_NCHW,
                size=(max(self.resize, round(height * scale)), max(self.resize, round(width * scale))),
                mode="bicubic",
                antialias=True,
            ).clamp(0.0, 1.0)
        height, width = images_NCHW.shape[-2:]
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        square = images_NCHW[..., top : top + self.crop, left : left + self.crop]
        return (square - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class ClipJudge:
    """A CLIPModel as judge, in fp32 on the CPU or wherever `device` says."""

    name: str
    digest: str
    model: Any
    tokenizer: Any
    preprocessing: Preprocessing
    device: torch.device

    @torch.no_grad()
    def image_features(self, images_NCHW: Tensor) -> Tensor:
        """Return unit rows [N, F] of images [N, 3, H, W] in [0, 1]."""
        return torch.cat([self._image_rows(chunk.float()) for chunk in _chunks(images_NCHW)])

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return unit rows [N, F] of prompts; each different prompt is encoded once."""
        different = sorted(set(prompts))
        tokens = self.tokenizer(
            different,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        pooled = self.model.text_model(input_ids=tokens["input_ids"].to(self.device)).pooler_output
        rows = functional.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()
        return rows[[different.index(prompt) for prompt in prompts]]

    def _image_rows(self, images_NCHW: Tensor) -> Tensor:
        pixels = self.preprocessing(images_NCHW.cpu()).to(self.device)
        # Not get_image_features: what it returns differs between transformers 4 and 5.
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu()


@dataclass(frozen=True)
class ClassifierJudge:
    """The pocket world's independent classifier: its penultimate features, and no text."""

    name: str
    digest: str
    classifier: Classifier

    @torch.no_grad()
    def image_features(self, images_NCHW: Tensor) -> Tensor:
        """Return unit rows [N, F] of images [N, 3, H, W] in [0, 1]."""
        images = images_NCHW.float().cpu()
        if images.shape[-2:] != (64, 64):
            images = functional.interpolate(images, size=(64, 64), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        rows = [self.classifier.features(chunk) for chunk in _chunks(images)]
        return functional.normalize(torch.cat(rows).float(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> None:
        """Return None: this judge has no text tower."""
        return


def load_judges(name: str, base: BaseModel) -> tuple[Judge, ...]:
    """Return the judge that `evaluation.judge` names, and on a pocket base the independent classifier after it."""
    first = load_judge(name, base)
    if not is_pocket(base) or first.name == POCKET_CLASSIFIER:
        return (first,)
    return first, load_judge(POCKET_CLASSIFIER, base)


def load_judge(name: str, base: BaseModel) -> Judge:
    """Return a judge by name: auto, pocket, pocket-classifier, a CLIPModel folder, or a hub id.

    `auto` is the pocket CLIP on a pocket base and openai/clip-vit-base-patch32 (the published one) elsewhere.
    """
    if name == "auto":
        name = POCKET if is_pocket(base) else PUBLISHED_JUDGE
    own = base.folder if is_pocket(base) else weights_path()
    if name == POCKET:
        # Its text half is the base's own text encoder, stored once.
        return _clip_judge(POCKET, load_pocket_clip(own), _pocket_tokenizer(own), own / "judge", base)
    if name == POCKET_CLASSIFIER:
        classifier = load_classifier(own / "classifier")
        return ClassifierJudge(POCKET_CLASSIFIER, _digest(classifier.state_dict(), POCKET_CLASSIFIER), classifier)
    folder = Path(name).expanduser()
    return load_clip(folder if folder.is_dir() else _from_hub(name), name, base)


def _pocket_tokenizer(weights: Path) -> Any:
    return CLIPTokenizer.from_pretrained(weights / "tokenizer", local_files_only=True)


def is_pocket(base: BaseModel) -> bool:
    """Whether the base is Pocket-SD, shipped or pretrained anew: its folder has the judges of its own world."""
    return (base.folder / "judge").is_dir() and (base.folder / "classifier").is_dir()


def load_clip(folder: Path, name: str, base: BaseModel) -> ClipJudge:
    """Return the CLIPModel in `folder` as a judge on the base's device; refuses a folder that is none."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        if not (folder / "config.json").is_file():
            raise ValueError("config.json is not there")
        if not any(folder.glob("*.safetensors")):
            raise ValueError("no .safetensors file is there; pickled weights such as pytorch_model.bin are not read")
        model, info = CLIPModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        lost = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
        if lost:
            # transformers fills what is missing with random numbers and goes on.
            raise ValueError(f"weights {', '.join(lost[:3])} are missing")
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise ValueError("neither tokenizer.json nor vocab.json is there")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise EvaluationError(
            f"evaluation.judge: {folder} does not hold a CLIPModel that loads ({_first_line(error)}): "
            "give a folder with config.json, model.safetensors, preprocessor_config.json and the tokenizer files"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return _clip_judge(name, model, tokenizer, folder, base)


def _clip_judge(name: str, model: Any, tokenizer: Any, folder: Path, base: BaseModel) -> ClipJudge:
    preprocessing = Preprocessing.read(folder)
    model = model.float().eval().requires_grad_(False)
    digest = _digest(model.state_dict(), repr(preprocessing))
    return ClipJudge(name, digest, model.to(base.device), tokenizer, preprocessing, base.device)


def feature_rows(judge: Judge, images_NHWC: np.ndarray[Any, Any]) -> Array:
    """Return unit rows [N, F] in float64 of images uint8 [N, H, W, 3]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).float() / 255.0
    return _unit(judge.image_features(pixels))


def text_rows(judge: Judge, prompts: Sequence[str]) -> Array | None:
    """Return unit rows [N, F] in float64 of prompts, or None for a judge without a text tower."""
    rows = judge.text_features(prompts)
    return None if rows is None else _unit(rows)


def _unit(rows_NF: Tensor) -> Array:
    rows = rows_NF.double().numpy()
    if not np.isfinite(rows).all():
        raise EvaluationError("the judge gave features that are not finite: are the images or its weights damaged?")
    # Normalised again in float64: two equal images then have cos = 1 to 1e-15, not to 1e-7.
    unit: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _from_hub(name: str) -> Path:
    patterns = ["*.json", "*.txt", "*.safetensors"]
    errors = []
    for local_only in (True, False):
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_only))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            errors.append(_first_line(error))
    raise EvaluationError(
        f"evaluation.judge: {name!r} is neither a folder nor in the local hub cache, and cannot be fetched "
        f"({errors[-1]}). Where there is a network, run: hf download {name} ; otherwise copy that model's files "
        "to a folder here and set evaluation.judge to the folder"
    )


def _chunks(images_NCHW: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(images_NCHW), IMAGES_PER_CALL):
        yield images_NCHW[start : start + IMAGES_PER_CALL]


def _edge(size: Any) -> int:
    if isinstance(size, dict):
        return int(size.get("shortest_edge") or size["height"])
    return int(size)


def _digest(state: dict[str, Tensor], extra: str) -> str:
    # Over values, not files: the same judge has one digest whether it was stored in fp16, fp32 or in shards.
    digest = hashlib.sha256(extra.encode())
    for key in sorted(state):
        tensor = state[key].detach().float().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
