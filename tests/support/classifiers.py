"""A tiny real image classifier in a folder, and transformers' own pipeline over it as the oracle of its scores."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

LABELS = ("calm", "odd", "loud")


def write_classifier(folder: Path, certain: str | None = None, **config: Any) -> Path:
    """Save a random ViT, whose labels depend on the image, or one that is certain of one label."""
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 16,
        "patch_size": 4,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = ViTForImageClassification(ViTConfig(**settings)).eval()
        with torch.no_grad():
            torch.nn.init.normal_(model.classifier.weight)
            for parameter in model.vit.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.5)
            if certain is not None:
                model.classifier.weight.zero_()
                model.classifier.bias.copy_(torch.tensor([9.0 if label == certain else -9.0 for label in LABELS]))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def pipeline_scores(folder: Path, *images: bytes) -> list[dict[str, float]]:
    """Label -> score of each image file, by transformers' pipeline."""
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
    return [{found["label"]: found["score"] for found in classify(picture, top_k=99)} for picture in pictures]
