"""Pretraining of Pocket-XL from nothing: tokenizers, VAE, two text encoders, classifier, U-Net; then one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

from cat_cluster.models.pocket.classifier import Classifier, load_classifier
from cat_cluster.models.pocket_xl import world
from cat_cluster.models.pocket_xl.captions import scene_caption
from cat_cluster.models.pocket_xl.emojis import Emoji, load_emojis
from cat_cluster.models.pocket_xl.pretraining.classifier import train_classifier
from cat_cluster.models.pocket_xl.pretraining.package import fetch_emojis
from cat_cluster.models.pocket_xl.pretraining.quality import write_card
from cat_cluster.models.pocket_xl.pretraining.real_world import load_lite0
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
from cat_cluster.models.pocket_xl.pretraining.text import (
    TextTowers,
    load_towers,
    save_towers,
    text_encoders,
    train_towers,
)
from cat_cluster.models.pocket_xl.pretraining.unet import new_scheduler, train_unet
from cat_cluster.models.pocket_xl.pretraining.vae import train_vae
from cat_cluster.models.pretraining.classifier import save_classifier
from cat_cluster.models.pretraining.clip import save_judge
from cat_cluster.models.pretraining.results import forget_paths, result, save_model, stages
from cat_cluster.models.pretraining.stage import Stage
from cat_cluster.models.pretraining.tokenizer import END, learn_merges, load_tokenizer, write_tokenizer

_TOKENIZERS = {"tokenizer": END, "tokenizer_2": "!"}  # what each pads with, as SDXL's do
_CAPTIONS = 40_000  # captions that the merges are learnt from


def pretrain_xl(
    out: Path,
    *,
    emojis: Path | None,
    real_judge: Path | None,
    minutes: float | None,
    device: str,
    compile: bool,
    seed: int,
    recipe: Recipe | None = None,
) -> None:
    """Train every part, write the diffusers folder `out` and measure it; call again to resume.

    `emojis` is an unpacked npm package emoji-datasource-google; None: it is fetched to `out`/work/emojis. `real_judge`
    is EfficientNet-Lite0 as safetensors; None: the card does without its figures. Each stage
    checkpoints to `out`/work/<stage>.pt and leaves its result in `out`/work/<stage>/. With `minutes` the stages share
    that wall-clock time as `Recipe` says; without, they do the recipe's steps. card.json is written last: a folder
    that has one is finished and left as it is.
    """
    if (out / "card.json").is_file():
        return
    plan = recipe if recipe is not None else Recipe()
    eyes = None if real_judge is None else load_lite0(real_judge)
    given = None if emojis is None else load_emojis(emojis)  # refused before anything is written
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    pictures = load_emojis(fetch_emojis(work / "emojis")) if given is None else given
    shares = {
        "vae": plan.vae_minutes,
        "clip": plan.clip_minutes,
        "classifier": plan.classifier_minutes,
        "unet": plan.unet_minutes,
    }
    with stages(work, shares, minutes=minutes, device=device, seed=seed, compile=compile) as stage:
        towers, vae, unet, classifier = _run_stages(plan, pictures, work, stage)
    assemble(out, plan, pictures, towers, work, vae, unet, classifier, seed=seed)
    write_card(out, plan, pictures, seed=seed, real_judge=eyes)


def _run_stages(
    plan: Recipe, emojis: Sequence[Emoji], work: Path, stage: Callable[[str], Stage]
) -> tuple[TextTowers, AutoencoderKL, UNet2DConditionModel, Classifier]:
    """Train every part in the order in which they need each other, or load it where it is finished."""
    first = stage("vae")
    vae = result(first, AutoencoderKL.from_pretrained, save_model, lambda one: train_vae(plan, emojis, one))
    vae = vae.to(device=first.device, memory_format=torch.channels_last)  # encoding takes a fifth less time
    tokenizers = make_tokenizers(plan, emojis, work, first.seed)
    towers = result(stage("clip"), load_towers, save_towers, lambda one: train_towers(plan, emojis, tokenizers[0], one))
    encoders = [encoder.to(first.device) for encoder in text_encoders(towers)]
    classifier = result(
        stage("classifier"), load_classifier, save_classifier, lambda one: train_classifier(plan, emojis, vae, one)
    )
    unet = result(
        stage("unet"),
        UNet2DConditionModel.from_pretrained,
        save_model,
        lambda one: train_unet(plan, emojis, vae, encoders, tokenizers, one),
    )
    return towers, vae, unet, classifier


def make_tokenizers(recipe: Recipe, emojis: Sequence[Emoji], folder: Path, seed: int) -> list[CLIPTokenizer]:
    """Both tokenizers of `folder`, of one vocabulary, learnt from the world's captions where they are not there yet."""
    if not all((folder / name / "tokenizer_config.json").is_file() for name in _TOKENIZERS):
        rng = np.random.default_rng([seed, 9])
        captions = (
            scene_caption(world.random_scene(emojis, rng), emojis, rng)
            for _ in range(min(_CAPTIONS, recipe.clip_scenes))
        )
        vocabulary, merges = learn_merges(captions, recipe.merges)
        for name, pad in _TOKENIZERS.items():
            write_tokenizer(folder / name, vocabulary, merges, length=recipe.text_length, pad=pad)
    return [load_tokenizer(folder / name) for name in _TOKENIZERS]


def general_prompts(emojis: Sequence[Emoji], count: int, seed: int) -> list[str]:
    """Different full captions of the world, in square frames: "a photo of a red car beside an owl on sand"."""
    rng = np.random.default_rng([seed, 6])
    things = [emoji for emoji in emojis if emoji.is_thing]
    found: dict[str, None] = {}
    while len(found) < count:
        scene = world.random_scene(things, rng, (world.SIZE, world.SIZE))
        found[scene_caption(scene, things, rng, full=True)] = None
    return list(found)


def assemble(
    out: Path,
    recipe: Recipe,
    emojis: Sequence[Emoji],
    towers: TextTowers,
    tokenizers: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    classifier: Classifier,
    *,
    seed: int,
) -> None:
    """Write the diffusers folder and the judges, all of them fp16; `tokenizers` is the folder that has both."""
    first, second = text_encoders(towers.cpu())
    pipeline = StableDiffusionXLPipeline(
        vae=vae.cpu().half(),
        text_encoder=first.half(),
        text_encoder_2=second.half(),
        tokenizer=load_tokenizer(tokenizers / "tokenizer"),
        tokenizer_2=load_tokenizer(tokenizers / "tokenizer_2"),
        unet=unet.cpu().half(),
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    for name in _TOKENIZERS:
        shutil.rmtree(out / name)  # newer versions save another format; vocab.json and merges.txt suit all
        shutil.copytree(tokenizers / name, out / name)
    for name in ("text_encoder", "text_encoder_2"):
        _load_as_fp32(out / name / "config.json")
    save_judge(towers.judge, out / "judge")
    save_classifier(classifier, out / "classifier")
    forget_paths(out)
    (out / "general_prompts.txt").write_text(
        "\n".join(general_prompts(emojis, recipe.general_prompts, seed)) + "\n", encoding="utf-8"
    )


def _load_as_fp32(config: Path) -> None:
    """Let transformers load fp16 weights as fp32, as diffusers loads those of U-Net and VAE, unless it is told a type.

    Without it transformers takes the type of the file, and a CPU pipeline would mix both.
    """
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
