"""Pretraining of Pocket-SD from nothing: tokenizer, text encoder, CLIP, VAE, U-Net, classifier; then one folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import Classifier, load_classifier
from cat_cluster.models.pocket.pretraining.captions import scene_caption
from cat_cluster.models.pocket.pretraining.classifier import train_classifier
from cat_cluster.models.pocket.pretraining.clip import text_encoder, train_clip
from cat_cluster.models.pocket.pretraining.quality import write_card
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.text_encoder import train_text
from cat_cluster.models.pocket.pretraining.unet import new_scheduler, train_unet
from cat_cluster.models.pocket.pretraining.unknown_words import train_words
from cat_cluster.models.pocket.pretraining.vae import train_vae
from cat_cluster.models.pretraining.classifier import save_classifier
from cat_cluster.models.pretraining.clip import save_judge
from cat_cluster.models.pretraining.results import forget_paths, result, save_model, stages
from cat_cluster.models.pretraining.stage import Stage
from cat_cluster.models.pretraining.tokenizer import load_tokenizer, train_tokenizer


def pretrain(
    out: Path,
    *,
    minutes: float | None,
    device: str,
    compile: bool,
    seed: int,
    recipe: Recipe | None = None,
) -> None:
    """Train every part, write the diffusers folder `out` and measure it; call again to resume.

    Each stage checkpoints to `out`/work/<stage>.pt and leaves its result in `out`/work/<stage>/. With `minutes`
    the stages share that wall-clock time as `Recipe` says, and their schedules end with it; without, they do
    the recipe's steps. card.json is written last: a folder that has one is finished and left as it is.
    """
    if (out / "card.json").is_file():
        return
    plan = recipe if recipe is not None else Recipe()
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    shares = {
        "text": plan.text_minutes,
        "words": plan.words_minutes,
        "clip": plan.clip_minutes,
        "vae": plan.vae_minutes,
        "unet": plan.unet_minutes,
        "classifier": plan.classifier_minutes,
    }

    with stages(work, shares, minutes=minutes, device=device, seed=seed, compile=compile) as stage:
        clip, vae, unet, classifier = _run_stages(plan, work, stage)
    assemble(out, plan, clip, work / "tokenizer", vae, unet, classifier, seed=seed)
    write_card(out, plan, seed=seed)


def _run_stages(
    plan: Recipe, work: Path, stage: Callable[[str], Stage]
) -> tuple[CLIPModel, AutoencoderKL, UNet2DConditionModel, Classifier]:
    """Train every part in the order in which they need each other, or load it where it is finished."""
    first = stage("text")
    tokenizer = make_tokenizer(plan, work / "tokenizer", first.seed)
    text = result(first, CLIPModel.from_pretrained, save_model, lambda one: train_text(plan, tokenizer, one))
    words = result(
        stage("words"), CLIPModel.from_pretrained, save_model, lambda one: train_words(plan, text, tokenizer, one)
    )
    clip = result(
        stage("clip"), CLIPModel.from_pretrained, save_model, lambda one: train_clip(plan, words, tokenizer, one)
    )
    vae = result(stage("vae"), AutoencoderKL.from_pretrained, save_model, lambda one: train_vae(plan, one))
    vae, encoder = vae.to(first.device), text_encoder(clip).to(first.device)
    unet = result(
        stage("unet"),
        UNet2DConditionModel.from_pretrained,
        save_model,
        lambda one: train_unet(plan, vae, encoder, tokenizer, one),
    )
    classifier = result(
        stage("classifier"), load_classifier, save_classifier, lambda one: train_classifier(plan, vae, one)
    )
    return clip, vae, unet, classifier


def make_tokenizer(recipe: Recipe, folder: Path, seed: int) -> CLIPTokenizer:
    """The tokenizer of `folder`, learnt from the world's captions where it is not there yet."""
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(folder)
    rng = np.random.default_rng(seed)
    captions = (scene_caption(world.random_scene(rng), rng, rare=0.0) for _ in range(4_000))
    return train_tokenizer(captions, folder, length=recipe.text_length)


def general_prompts(count: int, seed: int) -> list[str]:
    """Different captions of the world that say "a photo of" and a colour or a pattern, and no unknown word."""
    rng = np.random.default_rng([seed, 6])
    telling = re.compile(rf"\b({'|'.join((*world.COLOURS, *world.PATTERNS))})\b")
    found: dict[str, None] = {}
    while len(found) < count:
        text = scene_caption(world.random_scene(rng), rng, rare=0.0)
        if text.startswith("a photo of ") and telling.search(text):
            found[text] = None
    return list(found)


def assemble(
    out: Path,
    recipe: Recipe,
    clip: CLIPModel,
    tokenizer_folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    classifier: Classifier,
    *,
    seed: int,
) -> None:
    """Write the diffusers folder and the judges: U-Net, VAE and judges fp16, the text encoder fp32.

    The text encoder stays fp32 because transformers loads it in the type of its file, diffusers' parts in fp32.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu().half(),
        text_encoder=text_encoder(clip.cpu()),
        tokenizer=load_tokenizer(tokenizer_folder),
        unet=unet.cpu().half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    shutil.rmtree(out / "tokenizer")  # newer versions save another format; vocab.json and merges.txt suit all
    shutil.copytree(tokenizer_folder, out / "tokenizer")
    save_judge(clip, out / "judge")
    save_classifier(classifier, out / "classifier")
    forget_paths(out)
    (out / "general_prompts.txt").write_text(
        "\n".join(general_prompts(recipe.general_prompts, seed)) + "\n", encoding="utf-8"
    )
