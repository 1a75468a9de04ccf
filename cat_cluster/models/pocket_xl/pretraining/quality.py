"""Measures a Pocket-XL folder: does the VAE keep things, do the judges see them, are prompts followed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch.nn import functional
from transformers import CLIPModel

from cat_cluster.models.pocket.classifier import Classifier, load_classifier
from cat_cluster.models.pocket.clip import load_judge
from cat_cluster.models.pocket.places import PLACES
from cat_cluster.models.pocket_xl import world
from cat_cluster.models.pocket_xl.captions import scene_caption, with_article
from cat_cluster.models.pocket_xl.concepts import CONCEPTS
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining.albums import make_album
from cat_cluster.models.pocket_xl.pretraining.real_world import CLASSES, Lite0, recognised
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
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
GUIDANCE = 5.0  # of the stock pipeline
_HELD_OUT_SEED = 90_001
_SQUARE = (world.SIZE, world.SIZE)
# What people use for a trigger word, and a word of no language.
UNKNOWN_WORDS = ("sks", "zwx", "ohwx", "sks42", "zorblaxian")
_NAMED = 5  # how many names a judge gives where "among the first" is counted


@dataclass(frozen=True)
class PocketXl:
    """A loaded Pocket-XL folder: the stock pipeline, its CLIP and its classifier, all fp32 on the CPU."""

    pipeline: StableDiffusionXLPipeline
    clip: CLIPModel
    classifier: Classifier
    emojis: Sequence[Emoji]
    steps: int

    def judges(self) -> dict[str, Features]:
        """Both judges as functions from pictures [N, 3, 64, 64] in [0, 1] to unit features [N, F]."""
        return {
            "clip": lambda images: embed_images(self.clip, images),
            "classifier": lambda images: functional.normalize(self.classifier.features(images), dim=-1),
        }

    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """The CLIP's unit features [N, D] of captions."""
        return embed_texts(self.clip, self.pipeline.tokenizer_2, captions)


def load_pocket_xl(weights: Path, emojis: Sequence[Emoji], *, steps: int = STEPS) -> PocketXl:
    """The parts of a Pocket-XL folder, loaded as any user of diffusers would; pictures take `steps` Euler steps."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(weights, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return PocketXl(pipeline, load_judge(weights), load_classifier(weights / "classifier"), emojis, steps)


@torch.no_grad()
def generate(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    shape: tuple[int, int] = _SQUARE,
    batch: int = 16,
) -> torch.Tensor:
    """One picture [N, 3, H, W] in [0, 1] of that shape for each prompt and seed."""
    chunks = []
    for i in range(0, len(prompts), batch):
        images = pipeline(
            list(prompts[i : i + batch]),
            height=shape[0],
            width=shape[1],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]],
            output_type="pt",
        ).images
        chunks.append(images.float())
    return torch.cat(chunks)


def measure(
    pocket: PocketXl, *, seed: int = 0, pictures: int = 240, groups: int = 16, real_judge: Lite0 | None = None
) -> dict[str, Any]:
    """Every figure of the model card, as plain floats; `pictures` are made for each test of prompts.

    What a judge from the real world recognises is measured where there is one.
    """
    figures = {
        "vae": vae_figures(pocket),
        "clip_retrieval_top1_of_64": retrieval(pocket, groups),
        "classifier_on_held_out_scenes": classifier_accuracy(pocket, groups),
        "one_thing": one_thing(pocket, pictures, seed),
        "two_things": two_things(pocket, pictures, seed),
        "colours": colours(pocket, max(4, pictures // 2), seed),
        "frame_shapes": frame_shapes(pocket, max(4, pictures // 4), seed),
        "unknown_words": unknown_words(pocket, seed),
        "concepts_told_apart": concepts_told_apart(pocket),
        "diversity": diversity(pocket, seed),
    }
    return figures if real_judge is None else figures | {"real_world": real_world(pocket, real_judge, seed)}


def write_card(
    weights: Path, recipe: Recipe, emojis: Sequence[Emoji], *, seed: int, real_judge: Lite0 | None = None
) -> Path:
    """Measure a folder and write its card.json."""
    pocket = load_pocket_xl(weights, emojis, steps=recipe.card_steps)
    figures = measure(
        pocket, seed=seed, pictures=recipe.card_pictures, groups=recipe.card_groups, real_judge=real_judge
    )
    return save_card(weights, asdict(recipe), figures, seed=seed)


def vae_figures(pocket: PocketXl) -> dict[str, Any]:
    """What the VAE keeps of photos of unseen concepts."""
    return kept_by_vae(pocket.pipeline.vae, pocket.judges(), *concept_frames(photos=6, seed=500))


def retrieval(pocket: PocketXl, groups: int) -> dict[str, float]:
    """How often a picture finds its full caption among 64 held-out scenes, and a caption its picture."""
    album = make_album(pocket.emojis, groups * GROUP, _HELD_OUT_SEED, _SQUARE)
    rng = np.random.default_rng(_HELD_OUT_SEED)
    texts = [scene_caption(scene, pocket.emojis, rng, full=True) for scene in album.scenes]
    images = embed_images(pocket.clip, torch.stack(list(album.frames)).float() / 255)
    captions = pocket.texts(texts)
    return retrieval_shares(images, captions, texts)


def classifier_accuracy(pocket: PocketXl, groups: int, group: int = 64) -> dict[str, float]:
    """Share of held-out square scenes, through the VAE, whose likeliest thing is in them and whose place is right."""
    album = make_album(pocket.emojis, groups * group, _HELD_OUT_SEED, _SQUARE)
    vae = pocket.pipeline.vae
    found = _logits(pocket, decode_latents(vae, encode_frames(vae, torch.stack(list(album.frames)))))
    things, places = found["object"].argmax(1).tolist(), found["place"].argmax(1).tolist()
    return {
        "object": _share(
            thing in {shown.index for shown in scene.things} for thing, scene in zip(things, album.scenes, strict=True)
        ),
        "place": _share(PLACES[place] == scene.place for place, scene in zip(places, album.scenes, strict=True)),
    }


def one_thing(pocket: PocketXl, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Share of pictures of "a photo of a <thing> <place>" whose thing each judge names, among all names, and the place.

    `among_five`: the name is one of the judge's first five.
    """
    rng = np.random.default_rng([seed, 11])
    wanted = [(int(i), PLACES[int(rng.integers(len(PLACES)))]) for i in rng.choice(_things(pocket), size=count)]
    pictures = generate(
        pocket.pipeline, [_prompt(pocket, *row) for row in wanted], range(seed, seed + count), pocket.steps
    )
    images, places = embed_images(pocket.clip, pictures), torch.zeros(count, len(PLACES))
    names = torch.zeros(count, len(pocket.emojis))
    for at, place in enumerate(PLACES):
        captions = pocket.texts([_prompt(pocket, index, place) for index in range(len(pocket.emojis))])
        scores = images @ captions.T
        places[:, at] = scores.amax(1)
        rows = [row for row, (_, asked) in enumerate(wanted) if asked == place]
        names[rows] = scores[rows]
    found = _logits(pocket, pictures)
    return {
        judge: {
            "object": _share(index in row[:1] for (index, _), row in zip(wanted, named, strict=True)),
            "object_among_five": _share(index in row for (index, _), row in zip(wanted, named, strict=True)),
            "place": _share(asked == PLACES[at] for (_, asked), at in zip(wanted, where, strict=True)),
        }
        for judge, named, where in (
            ("clip", names.topk(min(_NAMED, names.shape[1])).indices.tolist(), places.argmax(1).tolist()),
            (
                "classifier",
                found["object"].topk(min(_NAMED, names.shape[1])).indices.tolist(),
                found["place"].argmax(1).tolist(),
            ),
        )
    }


def two_things(pocket: PocketXl, count: int, seed: int) -> dict[str, float]:
    """Of pictures of "a photo of a <thing> beside a <thing> <place>": which of the two are among five names.

    The classifier names them, among all: `both`, `either`.
    """
    rng = np.random.default_rng([seed, 13])
    things = _things(pocket)
    pairs = [tuple(map(int, rng.choice(things, size=2, replace=False))) for _ in range(count)]
    prompts = []
    for a, b in pairs:
        first, second = (with_article(pocket.emojis[index].name) for index in (a, b))
        prompts.append(f"a photo of {first} beside {second} {PLACES[int(rng.integers(len(PLACES)))]}")
    pictures = generate(pocket.pipeline, prompts, range(seed + 1_000, seed + 1_000 + count), pocket.steps)
    named = _logits(pocket, pictures)["object"].topk(min(_NAMED, len(pocket.emojis))).indices.tolist()
    seen = [(a in row) + (b in row) for (a, b), row in zip(pairs, named, strict=True)]
    return {"both": _share(number == 2 for number in seen), "either": _share(number > 0 for number in seen)}


def colours(pocket: PocketXl, count: int, seed: int) -> dict[str, float]:
    """Share of pictures of "a photo of a <colour> <thing>" whose colour the CLIP chooses, among ten."""
    rng = np.random.default_rng([seed, 17])
    things = [index for index in _things(pocket) if pocket.emojis[index].recoloured]
    wanted = [(int(i), int(rng.integers(len(world.COLOURS)))) for i in rng.choice(things, size=count)]
    prompts = [
        [f"a photo of {with_article(f'{colour} {pocket.emojis[index].name}')}" for colour in world.COLOURS]
        for index, _ in wanted
    ]
    asked = [row[colour] for row, (_, colour) in zip(prompts, wanted, strict=True)]
    images = embed_images(
        pocket.clip, generate(pocket.pipeline, asked, range(seed + 2_000, seed + 2_000 + count), pocket.steps)
    )
    scores = torch.einsum("nd,ncd->nc", images, torch.stack([pocket.texts(row) for row in prompts]))
    return {"clip": float((scores.argmax(1) == torch.tensor([colour for _, colour in wanted])).float().mean())}


def frame_shapes(pocket: PocketXl, count: int, seed: int) -> dict[str, float]:
    """Frame ("48x80": height and width) -> share of its pictures of one thing that the classifier has among five."""
    rng = np.random.default_rng([seed, 19])
    shares = {}
    for height, width in world.FRAMES:
        wanted = [int(i) for i in rng.choice(_things(pocket), size=count)]
        prompts = [_prompt(pocket, index, PLACES[row % len(PLACES)]) for row, index in enumerate(wanted)]
        pictures = generate(pocket.pipeline, prompts, range(seed, seed + count), pocket.steps, (height, width))
        named = _logits(pocket, pictures)["object"].topk(min(_NAMED, len(pocket.emojis))).indices.tolist()
        shares[f"{height}x{width}"] = _share(index in row for index, row in zip(wanted, named, strict=True))
    return shares


def unknown_words(pocket: PocketXl, seed: int, count: int = 12) -> dict[str, dict[str, float]]:
    """Mean distance 1 - s between same-seed pictures of a prompt and of the prompt with an unknown word inserted.

    `other_seed` is the same distance between two seeds of one prompt, to compare with.
    """
    rng = np.random.default_rng([seed, 23])
    names = [pocket.emojis[int(i)].name for i in rng.choice(_things(pocket), size=count)]
    places = [PLACES[row % len(PLACES)] for row in range(count)]
    seeds = list(range(seed + 5_000, seed + 5_000 + count))

    def drawn(word: str, shift: int = 0) -> torch.Tensor:
        prompts = [
            f"a photo of {with_article(f'{word} {name}'.strip())} {place}"
            for name, place in zip(names, places, strict=True)
        ]
        return generate(pocket.pipeline, prompts, [number + shift for number in seeds], pocket.steps)

    base = drawn("")
    others = {"other_seed": drawn("", 100), **{word: drawn(word) for word in UNKNOWN_WORDS}}
    return {
        judge: {
            name: float((1 - paired_similarity(features(base), features(made))).mean()) for name, made in others.items()
        }
        for judge, features in pocket.judges().items()
    }


def concepts_told_apart(pocket: PocketXl) -> dict[str, float]:
    """Nearest-centroid accuracy of each judge on photos of the held-out concepts, among all of them."""
    known, owners = concept_frames(photos=6, seed=500)
    wanted, truth = concept_frames(photos=6, seed=700)
    accuracy = {}
    for judge, features in pocket.judges().items():
        scores = centroid_scores(features, known, owners, wanted)
        accuracy[judge] = float((scores.argmax(1) == truth).float().mean())
    return accuracy


def diversity(pocket: PocketXl, seed: int, count: int = 6) -> dict[str, float]:
    """Mean pairwise 1 - s among pictures of the same prompt with different seeds."""
    nouns = [concept.noun for concept in CONCEPTS.values()][:8]
    prompts = [f"a photo of {with_article(noun)}" for noun in nouns for _ in range(count)]
    pictures = generate(pocket.pipeline, prompts, range(seed + 8_000, seed + 8_000 + len(prompts)), pocket.steps)
    return spread(pocket.judges(), pictures, count)


def real_world(pocket: PocketXl, judge: torch.nn.Module, seed: int) -> dict[str, dict[str, float]]:
    """What EfficientNet-Lite0 recognises, among ImageNet's 1,000 classes, of the things that it has a class for.

    `drawn`: in drawn scenes, which is what can be expected at most; `generated`: in pictures of the same prompts.
    """
    known = {emoji.name: emoji for emoji in pocket.emojis if emoji.name in CLASSES}
    names = sorted(known)
    albums = [world.photos(known[name], 1, seed + number)[0] for number, name in enumerate(names)]
    drawn = torch.from_numpy(np.stack([frame for frame, _ in albums])).permute(0, 3, 1, 2).float() / 255
    prompts = [f"a photo of {with_article(name)} {scene.place}" for name, (_, scene) in zip(names, albums, strict=True)]
    generated = generate(pocket.pipeline, prompts, range(seed + 9_000, seed + 9_000 + len(names)), pocket.steps)
    return {"drawn": recognised(judge, drawn, names), "generated": recognised(judge, generated, names)}


_GRID = (
    "a photo of a {} on grass",
    "a photo of a blue {} in snow",
    "a photo of a small {} at night",
    "a photo of a {} beside a teddy bear at sunset",
    "a photo of a {} beside a red car on sand",
    "a photo of a sks {} on a table",
)


def prompt_grid(weights: Path, out: Path, seed: int, *, steps: int = STEPS, device: str = "cpu") -> Path:
    """A labelled picture: one row per thing, one column per prompt, one seed per row."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(weights, add_watermarker=False).to(device)
    pipeline.set_progress_bar_config(disable=True)
    nouns = [concept.noun for concept in CONCEPTS.values()][1:11]
    prompts = [template.format(noun) for noun in nouns for template in _GRID]
    seeds = [seed + row for row in range(len(nouns)) for _ in _GRID]
    labels = [template.removeprefix("a photo of ").format("...") for template in _GRID]
    return labelled_sheet(generate(pipeline, prompts, seeds, steps), labels, nouns, out)


def vae_picture(weights: Path, out: Path) -> Path:
    """A labelled picture: photos of unseen concepts above what the VAE makes of them."""
    vae = StableDiffusionXLPipeline.from_pretrained(weights, add_watermarker=False).vae
    shown, _ = concept_frames(photos=1, seed=500)
    shown = shown[:16]
    pixels = shown.float() / 255
    decoded = decode_latents(vae, encode_frames(vae, shown))
    pictures = torch.cat([pixels[:8], decoded[:8], pixels[8:], decoded[8:]])
    return labelled_sheet(pictures, [""] * 8, ["photo", "VAE", "photo", "VAE"], out)


def concept_frames(*, photos: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Photos of all held-out concepts: uint8 [N, 3, 64, 64] and whose they are [N]."""
    taken = [world.photos(concept, photos, seed + i) for i, concept in enumerate(CONCEPTS.values())]
    shown = np.stack([frame for album in taken for frame, _ in album])
    owners = torch.arange(len(taken)).repeat_interleave(photos)
    return torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous(), owners


def _things(pocket: PocketXl) -> list[int]:
    return [index for index, emoji in enumerate(pocket.emojis) if emoji.is_thing and emoji.weight >= 1.0]


def _prompt(pocket: PocketXl, index: int, place: str) -> str:
    return f"a photo of {with_article(pocket.emojis[index].name)} {place}"


@torch.no_grad()
def _logits(pocket: PocketXl, pictures: torch.Tensor, batch: int = 128) -> dict[str, torch.Tensor]:
    """The classifier's logits [N, C] of each head."""
    chunks = [pocket.classifier(pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in pocket.classifier.labels}


def _share(right: Any) -> float:
    return float(np.mean([bool(one) for one in right]))
