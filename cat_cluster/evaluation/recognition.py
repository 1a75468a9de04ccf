"""Recognition: would someone who knows the base's world call this image the concept, or another thing of its kind?"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.judges import Judge, feature_rows
from cat_cluster.evaluation.metrics import Array
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.places import PLACES
from cat_cluster.models.pocket_xl.captions import with_article
from cat_cluster.models.pocket_xl.concepts import CONCEPTS
from cat_cluster.models.subjects import DrawnSubject, PicturedSubject, Subject, subject_of

DESIGN_FILE = "design.json"
SCENES = 192  # of the concept; of others of its kind twice as many (half, where the base draws them), half of others
DRAWN_STEPS = 15
HELD_OUT = 4  # every fourth scene is kept for the head's own accuracy
WEIGHT_DECAY = 1e-2


@dataclass(frozen=True)
class Recognition:
    """Shares of images that the head calls the concept; its accuracy is balanced, on scenes it was not fitted on."""

    rate: float
    rate_without_token: float
    rate_base: float
    rate_base_with_token: float
    head_accuracy: float

    def to_json(self) -> dict[str, float]:
        """All shares by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RecognitionHead:
    """A logistic head on a judge's features: is this the concept?"""

    judge: Judge
    weight_F: Array
    bias: float
    accuracy: float

    def rate(self, images_NHWC: NDArray[np.uint8]) -> float:
        """Return the share of images [N, H, W, 3] called the concept."""
        return float((self._logits(feature_rows(self.judge, images_NHWC)) > 0).mean())

    def _logits(self, rows_NF: Array) -> Array:
        logits: Array = rows_NF @ self.weight_F + self.bias
        return logits


def find_subject(folder: Path) -> Subject | None:
    """Return what a concept's photos show, as design.json beside them says; None where there is none."""
    path = folder / DESIGN_FILE
    if not path.is_file():
        return None
    try:
        return subject_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} describes nothing in the world of an embedded base ({error!r}): it needs object, body_rgb, "
            "pattern, second_rgb and eyes for pocket, or concept for pocket-xl; remove the file to do without "
            "recognition"
        ) from error


def fit_head(subject: Subject, judge: Judge, base: BaseModel, *, seed: int) -> RecognitionHead:
    """Fit a head on photos of the subject and of other things, half of them seen through the base's VAE.

    Generated images come out of that VAE: a head that knows sharp drawings only would judge the VAE, not the adapter.
    Things of its kind come from Pocket-SD's world; of Pocket-XL's, whose pictures do not ship, the base draws them.
    """
    images, labels = _scenes(subject, seed)
    images = _half_through_vae(images, base, seed)
    if isinstance(subject, PicturedSubject):
        drawn = _drawn_by(base, subject.noun, seed)
        images, labels = np.concatenate([images, drawn]), np.append(labels, np.zeros(len(drawn), dtype=bool))
    rows = feature_rows(judge, images)
    held_out = np.arange(len(labels)) % HELD_OUT == 0
    weight, bias = _logistic(rows[~held_out], labels[~held_out])
    said = rows[held_out] @ weight + bias > 0
    truth = labels[held_out]
    accuracy = (float(said[truth].mean()) + float((~said[~truth]).mean())) / 2
    return RecognitionHead(judge, weight, bias, accuracy)


def _scenes(subject: Subject, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return photos of the subject and of other things in a random order, and which are the subject's."""
    rng = np.random.default_rng([seed, 3])
    positive = [photo for photo, _ in subject.photos(SCENES, seed)]
    others = _other_designs(subject.design, rng) if isinstance(subject, DrawnSubject) else _others(subject, seed)
    images = np.stack([*positive, *others])
    labels = np.arange(len(images)) < SCENES
    order = rng.permutation(len(images))
    return images[order], labels[order]


def _other_designs(design: world.Design, rng: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Scenes of other designs of the same object, and of other objects."""
    same_class: list[NDArray[np.uint8]] = []
    other_class: list[NDArray[np.uint8]] = []
    while len(same_class) < 2 * SCENES or len(other_class) < SCENES // 2:
        scene = world.random_scene(rng)
        same = scene.design.object == design.object
        wanted, enough = (same_class, 2 * SCENES) if same else (other_class, SCENES // 2)
        if len(wanted) < enough:
            wanted.append(world.draw(scene))
    return [*same_class, *other_class]


def _others(subject: PicturedSubject, seed: int) -> list[NDArray[np.uint8]]:
    """Photos of the other concepts."""
    each = max(1, SCENES // 2 // (len(CONCEPTS) - 1))
    others = (PicturedSubject(name) for name in CONCEPTS if name != subject.name)
    return [photo for other in others for photo, _ in other.photos(each, seed)]


def _drawn_by(base: BaseModel, noun: str, seed: int) -> NDArray[np.uint8]:
    """What the bare base draws of a noun, in every place."""
    rows = [
        ImageRow(f"a photo of {with_article(noun)} {PLACES[k % len(PLACES)]}", seed=seed + k, steps=DRAWN_STEPS)
        for k in range(SCENES // 2)
    ]
    return image_array(generate(base, None, rows, rows_per_call=32))


def _half_through_vae(images_NHWC: NDArray[np.uint8], base: BaseModel, seed: int) -> NDArray[np.uint8]:
    mixed = images_NHWC.copy()
    half = torch.from_numpy(images_NHWC[::2].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    generator = torch.Generator("cpu").manual_seed(seed)
    decoded = []
    for start in range(0, len(half), 32):
        moments = base.encode_moments(half[start : start + 32])
        z0 = base.sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
        # A tenth of the latents' scale: what a sampler leaves behind.
        stray = torch.randn(z0.shape, generator=generator).to(z0) * z0.std() * 0.1
        decoded.append(base.decode(z0 + stray).cpu())
    back = image_array(torch.cat(decoded))
    if back.shape[1:] != mixed.shape[1:]:
        raise EvaluationError(f"recognition needs an embedded base, whose VAE returns 64 x 64 pixels, got {back.shape}")
    mixed[::2] = back
    return mixed


def _logistic(rows_NF: Array, labels_N: NDArray[np.bool_]) -> tuple[Array, float]:
    """Logistic regression, classes weighed alike, L2 on standardised features, by LBFGS; deterministic."""
    mean, std = rows_NF.mean(0), rows_NF.std(0) + 1e-6
    x = torch.from_numpy((rows_NF - mean) / std)
    y = torch.from_numpy(labels_N.astype(np.float64))
    weight = torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1.0 - y).sum())
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        loss = (weight * functional.binary_cross_entropy_with_logits(logits, y, reduction="none")).sum()
        loss = loss + WEIGHT_DECAY * parameters[:-1].square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    found = parameters.detach().numpy()
    scaled: Array = found[:-1] / std
    return scaled, float(found[-1] - scaled @ mean)
