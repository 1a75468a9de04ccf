"""Measures a Pocket-SD folder: does the VAE keep things, do the judges see them, are prompts followed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional
from transformers import CLIPModel

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import LABELS, Classifier, load_classifier
from cat_cluster.models.pocket.clip import load_judge
from cat_cluster.models.pocket.pretraining.captions import insert_word, scene_caption
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import random_scenes, render, scene_labels
from cat_cluster.models.pretraining.card import labelled_sheet, paired_similarity, save_card
from cat_cluster.models.pretraining.clip import embed_images, embed_texts
from cat_cluster.models.pretraining.figures import (
    GROUP,
    Features,
    centroid_scores,
    kept_by_vae,
    retrieval_shares,
    spread,
)
from cat_cluster.models.pretraining.vae import decode_latents, encode_frames

STEPS = 25
GUIDANCE = 4.0
_HELD_OUT_SEED = 90_001
# Words in the style of training (2-5 letters), and in styles that no caption had.
TRAINED_STYLE = ("sks", "zwx", "ohwx", "qv", "brlap")
UNSEEN_STYLE = ("sks42", "<shs>", "zorblaxian", "\u017c\u00f3\u0142w", "v-001")


@dataclass(frozen=True)
class PocketModels:
    """A loaded Pocket-SD folder: the stock pipeline, its CLIP and its classifier, all fp32 on the CPU."""

    pipeline: StableDiffusionPipeline
    clip: CLIPModel
    classifier: Classifier
    steps: int

    def judges(self) -> dict[str, Features]:
        """Both judges as functions from pictures [N, 3, 64, 64] in [0, 1] to unit features [N, F]."""
        return {
            "clip": lambda images: embed_images(self.clip, images),
            "classifier": lambda images: functional.normalize(self.classifier.features(images), dim=-1),
        }


def load_pocket(weights: Path, *, steps: int = STEPS) -> PocketModels:
    """The parts of a Pocket-SD folder, loaded as any user of diffusers would; pictures take `steps` DDIM steps."""
    pipeline = StableDiffusionPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)
    return PocketModels(pipeline, load_judge(weights), load_classifier(weights / "classifier"), steps)


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, batch: int = 16
) -> torch.Tensor:
    """One picture [N, 3, 64, 64] in [0, 1] for each prompt and seed."""
    chunks = []
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        images = pipeline(
            list(prompts[i : i + batch]),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        chunks.append(images.float())
    return torch.cat(chunks)


def measure(
    weights: Path, *, seed: int = 0, pictures: int = 240, steps: int = STEPS, groups: int = 16
) -> dict[str, Any]:
    """Every figure of the model card, as plain floats; `pictures` are made for the fidelity test."""
    pocket = load_pocket(weights, steps=steps)
    return {
        "vae": vae_figures(pocket),
        "clip_retrieval_top1_of_64": retrieval(pocket, groups),
        "classifier_on_held_out_scenes": classifier_accuracy(pocket, groups),
        "prompt_fidelity": fidelity(pocket, pictures, seed),
        "unknown_words": word_invariance(pocket, seed),
        "concepts_told_apart": concept_accuracy(pocket),
        "diversity": diversity(pocket, seed),
    }


def write_card(weights: Path, recipe: Recipe, *, seed: int) -> Path:
    """Measure a folder and write its card.json."""
    figures = measure(
        weights, seed=seed, pictures=recipe.card_pictures, steps=recipe.card_steps, groups=recipe.card_groups
    )
    return save_card(weights, asdict(recipe), figures, seed=seed)


def vae_figures(pocket: PocketModels) -> dict[str, Any]:
    """What the VAE keeps of photos of unseen concepts."""
    return kept_by_vae(pocket.pipeline.vae, pocket.judges(), *_concept_frames(photos=6, seed=500))


def retrieval(pocket: PocketModels, groups: int) -> dict[str, float]:
    """How often a picture finds its full caption among 64 held-out scenes, and a caption its picture."""
    scenes = random_scenes(groups * GROUP, _HELD_OUT_SEED)
    frames = render(scenes)
    rng = np.random.default_rng(_HELD_OUT_SEED)
    texts = [scene_caption(scene, rng, rare=0.0, full=True) for scene in scenes]
    images = embed_images(pocket.clip, frames.float() / 255)
    captions = embed_texts(pocket.clip, pocket.pipeline.tokenizer, texts)
    return retrieval_shares(images, captions, texts)


def classifier_accuracy(pocket: PocketModels, groups: int, group: int = 64) -> dict[str, float]:
    """Share of held-out scenes, through the VAE, whose named attributes the classifier recognises."""
    scenes = random_scenes(groups * group, _HELD_OUT_SEED)
    found = pocket.classifier.predict(
        decode_latents(pocket.pipeline.vae, encode_frames(pocket.pipeline.vae, render(scenes)))
    )
    truth = [scene_labels(scene) for scene in scenes]
    return {
        name: float(np.mean([a[name] == b[name] for a, b in zip(found, truth, strict=True) if b[name] is not None]))
        for name in LABELS
    }


def fidelity(pocket: PocketModels, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Share of generated pictures whose object, colour and place are each recognised, by CLIP and by the classifier."""
    rng = np.random.default_rng([seed, 11])
    kinds = (world.OBJECTS, world.COLOURS, world.PLACES)
    wanted = [tuple(names[int(rng.integers(len(names)))] for names in kinds) for _ in range(count)]
    pictures = generate(pocket.pipeline, [_prompt(*parts) for parts in wanted], range(seed, seed + count), pocket.steps)
    everything = [(noun, colour, place) for noun in kinds[0] for colour in kinds[1] for place in kinds[2]]
    captions = embed_texts(pocket.clip, pocket.pipeline.tokenizer, [_prompt(*parts) for parts in everything])
    by_clip = [everything[i] for i in (embed_images(pocket.clip, pictures) @ captions.T).argmax(1).tolist()]
    by_classifier = [
        (labels["object"], labels["colour"], labels["place"]) for labels in pocket.classifier.predict(pictures)
    ]
    return {
        judge: {
            name: float(np.mean([row[i] == parts[i] for row, parts in zip(seen, wanted, strict=True)]))
            for i, name in enumerate(("object", "colour", "place"))
        }
        for judge, seen in (("clip", by_clip), ("classifier", by_classifier))
    }


def word_invariance(pocket: PocketModels, seed: int) -> dict[str, dict[str, float]]:
    """Mean distance 1 - s between same-seed pictures of a prompt and of the prompt with an unknown word inserted.

    `other_seed` is the same distance between two seeds of one prompt, to compare with.
    """
    plain = [f"a photo of a {noun} {place}" for noun, place in zip(world.OBJECTS, _cycle(world.PLACES), strict=False)]
    seeds = list(range(seed + 5_000, seed + 5_000 + len(plain)))
    base = generate(pocket.pipeline, plain, seeds, pocket.steps)
    others = {"other_seed": [generate(pocket.pipeline, plain, [number + 100 for number in seeds], pocket.steps)]}
    for style, words in (("trained_style", TRAINED_STYLE), ("unseen_style", UNSEEN_STYLE)):
        others[style] = [
            generate(pocket.pipeline, [insert_word(text, word) for text in plain], seeds, pocket.steps)
            for word in words
        ]
    return {
        judge: {
            style: float(np.mean([(1 - paired_similarity(features(base), features(made))).mean() for made in pictures]))
            for style, pictures in others.items()
        }
        for judge, features in pocket.judges().items()
    }


def concept_accuracy(pocket: PocketModels) -> dict[str, dict[str, float]]:
    """Nearest-centroid accuracy on photos of the held-out concepts: among all, and among those of the same class."""
    known, owners = _concept_frames(photos=6, seed=500)
    wanted, truth = _concept_frames(photos=6, seed=700)
    classes = [design.object for design in world.CONCEPTS.values()]
    same = torch.tensor([[a == b for b in classes] for a in classes])
    accuracy = {}
    for judge, features in pocket.judges().items():
        scores = centroid_scores(features, known, owners, wanted)
        rivals = scores.masked_fill(~same[truth], -2.0)
        several = same[truth].sum(1) > 1
        accuracy[judge] = {
            "all": float((scores.argmax(1) == truth).float().mean()),
            "same_class": float((rivals.argmax(1) == truth)[several].float().mean()),
        }
    return accuracy


def diversity(pocket: PocketModels, seed: int, count: int = 6) -> dict[str, float]:
    """Mean pairwise 1 - s among pictures of the same prompt with different seeds."""
    prompts = [f"a photo of a {noun}" for noun in world.OBJECTS for _ in range(count)]
    pictures = generate(pocket.pipeline, prompts, range(seed + 8_000, seed + 8_000 + len(prompts)), pocket.steps)
    return spread(pocket.judges(), pictures, count)


_GRID = (
    "a photo of a red {} on grass",
    "a photo of a blue {} in snow",
    "a photo of a yellow {} at night",
    "a photo of a white {} with red spots on sand",
    "a photo of a green {} with a yellow band and eyes at sunset",
    "a photo of a {} on a table",
    "a photo of a sks {} on a table",
)


def prompt_grid(weights: Path, out: Path, seed: int, *, steps: int = STEPS, device: str = "cpu") -> Path:
    """A labelled picture: one row per object, one column per prompt, one seed per row."""
    pipeline = StableDiffusionPipeline.from_pretrained(weights).to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [template.format(noun) for noun in world.OBJECTS for template in _GRID]
    seeds = [seed + row for row in range(len(world.OBJECTS)) for _ in _GRID]
    pictures = generate(pipeline, prompts, seeds, steps)
    labels = [template.removeprefix("a photo of ").format("...") for template in _GRID]
    return labelled_sheet(pictures, labels, list(world.OBJECTS), out)


def vae_picture(weights: Path, out: Path) -> Path:
    """A labelled picture: photos of unseen concepts above what the VAE makes of them."""
    vae = StableDiffusionPipeline.from_pretrained(weights).vae
    frames, _ = _concept_frames(photos=2, seed=500)
    frames = frames[::2][:14]
    pixels = frames.float() / 255
    decoded = decode_latents(vae, encode_frames(vae, frames))
    pictures = torch.cat([pixels[:7], decoded[:7], pixels[7:], decoded[7:]])
    return labelled_sheet(pictures, [""] * 7, ["photo", "VAE", "photo", "VAE"], out)


def _prompt(noun: str, colour: str, place: str) -> str:
    return f"a photo of {'an' if colour == 'orange' else 'a'} {colour} {noun} {place}"


def _cycle(names: Sequence[str]) -> list[str]:
    return [names[i % len(names)] for i in range(len(world.OBJECTS))]


def _concept_frames(*, photos: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos of all held-out concepts: uint8 [N, 3, 64, 64] and whose they are [N]."""
    taken = [world.photos(design, photos, seed + i) for i, design in enumerate(world.CONCEPTS.values())]
    frames = np.stack([frame for album in taken for frame, _ in album])
    owners = torch.arange(len(taken)).repeat_interleave(photos)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), owners
