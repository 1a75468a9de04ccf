"""Checking drawn images: an image classifier that the operator names, and the labels that flag an image.

Labels are the model's and a threshold is the operator's judgement; nothing here knows what an image should not show.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from cat_cluster.errors import FlaggedImageError, ServingError, SpecError, UncheckedImageError
from cat_cluster.models.generate import image_array
from serve.calls import Verdict
from serve.settings import SafetySettings

logger = logging.getLogger("cat_cluster.serve")

_MODEL, _LABELS = "safety.model", "safety.labels"
_FILES = "give a local folder with config.json, model.safetensors and preprocessor_config.json"
# What transformers raises over folders that it cannot use.
_WRONG = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
_SHOWN = 20  # labels of a model in a message


class SafetyChecker:
    """An image classifier in fp32 with the labels that flag; open one with `open_checker`. For one thread at a time."""

    def __init__(self, settings: SafetySettings, model: Any, processor: Any, device: str) -> None:
        self._settings, self._model, self._processor, self._device = settings, model, processor, device
        names = model.config.id2label
        self._flagging = [index for index in sorted(names) if names[index] in settings.labels]
        self._independent = model.config.problem_type == "multi_label_classification" or len(names) == 1

    @property
    def refuses(self) -> bool:
        """Whether a flagged image, or one that could not be checked, is kept back."""
        return self._settings.action == "refuse"

    @torch.inference_mode()
    def scores(self, images: Sequence[Tensor]) -> Tensor:
        """Return the scores [N, labels] of images [3, H, W] in [0, 1], as transformers' own pipeline has them.

        The softmax of the logits, or, for a model of independent labels or of a single one, their sigmoid.
        """
        pictures = [Image.fromarray(image_array(image)) for image in images]
        inputs = self._processor(images=pictures, return_tensors="pt")
        logits: Tensor = self._model(**inputs.to(self._device)).logits.float().cpu()
        return logits.sigmoid() if self._independent else logits.softmax(dim=-1)

    def verdict(self, scores: Tensor) -> Verdict:
        """Return what the scores [labels] of one image say: flagged where a flagging label reaches the threshold."""
        highest = max(self._flagging, key=lambda index: float(scores[index]))
        score = float(scores[highest])
        flagged = score >= self._settings.threshold
        return Verdict(flagged, str(self._model.config.id2label[highest]), round(score, 4))

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to see: the model's folder, the labels, the threshold, and what happens."""
        return self._settings.model_dump(mode="json")


def refusal(verdict: Verdict) -> ServingError | None:
    """Return why an image with this verdict is kept back where flagged ones are; None if it is not."""
    if verdict.flagged is None:
        return UncheckedImageError(
            "the image was drawn and is kept back, since the safety checker of this service failed: try again; if it "
            "persists, the service's operator finds the reason in its log"
        )
    if verdict.flagged:
        return FlaggedImageError(
            f"the image was drawn and is kept back: the safety checker of this service takes it for {verdict.label!r}; "
            "change the prompt or the seed"
        )
    return None


def safety_metadata(verdict: Verdict | None) -> dict[str, str]:
    """Return what the file of an image says of its check: nothing, unless it was flagged or could not be checked."""
    if verdict is None or verdict.flagged is False:
        return {}
    return {"safety": "not checked" if verdict.flagged is None else "flagged"}


def open_checker(settings: SafetySettings | None, device: str) -> SafetyChecker | None:
    """Load the classifier and try it on a blank image; None without settings.

    Only safetensors are read, and no code of the folder is executed. Raises SpecError, which names the field, the
    folder and the remedy.
    """
    if settings is None:
        return None
    folder = settings.model
    try:
        model, processor = _load(folder)
        _check_labels(settings, model.config.id2label.values())
        checker = SafetyChecker(settings, model.float().eval().requires_grad_(False).to(device), processor, device)
        if not bool(checker.scores([torch.zeros(3, 64, 64)]).isfinite().all()):
            raise ValueError("its scores of a blank image are not finite")
    except (*_WRONG, SafetensorError) as error:
        raise SpecError(
            f"{_MODEL}: {folder} is no image classifier that loads ({_first_line(error)}): {_FILES} of a transformers "
            "image classification model"
        ) from error
    flagging = ", ".join(settings.labels)
    logger.info("%s checks images on %s: %s, to %s", folder, device, flagging, settings.action)
    return checker


def _check_labels(settings: SafetySettings, names: Iterable[str]) -> None:
    known = sorted({*names})
    unknown = [label for label in settings.labels if label not in known]
    if unknown:
        shown = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
        raise SpecError(
            f"{_LABELS}: {unknown[0]!r} is no label of the model in {settings.model}; its labels are {shown}"
        )


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging as transformers_logging

    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is not there")
    if not any(folder.glob("*.safetensors")):
        raise ValueError("no .safetensors file is there; pickled weights such as pytorch_model.bin are not read")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    lost = sorted(info["missing_keys"])
    if lost:
        # transformers fills what is missing with random numbers and goes on.
        raise ValueError(f"weights {', '.join(lost[:3])} are missing")
    if model.config.problem_type == "regression":
        raise ValueError("its problem_type is regression, which has no labels")
    return model, AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return json.dumps(text.splitlines()[0])[1:-1] if text else type(error).__name__
