"""Pretraining of Pocket-SD from nothing: tokenizer, text encoder, CLIP, VAE, U-Net, classifier; then one folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import CLIPModel, CLIPTokenizer, PreTrainedModel

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import Classifier, load_classifier
from cat_cluster.models.pocket.pretraining.captions import scene_caption
from cat_cluster.models.pocket.pretraining.classifier import save_classifier, train_classifier
from cat_cluster.models.pocket.pretraining.clip import save_judge, text_encoder, train_clip
from cat_cluster.models.pocket.pretraining.quality import write_card
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.stage import Report, Stage, StageProgress
from cat_cluster.models.pocket.pretraining.text_encoder import train_text
from cat_cluster.models.pocket.pretraining.tokenizer import load_tokenizer, train_tokenizer
from cat_cluster.models.pocket.pretraining.unet import new_scheduler, train_unet
from cat_cluster.models.pocket.pretraining.unknown_words import train_words
from cat_cluster.models.pocket.pretraining.vae import train_vae

Model = TypeVar("Model")


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

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, emoji=False),
    ) as bars:
        report = _bar_report(bars, tuple(shares))

        def stage(name: str) -> Stage:
            seconds = None if minutes is None else 60 * minutes * shares[name] / sum(shares.values())
            return Stage(name, work / f"{name}.pt", device, seed, report, seconds, compile)

        clip, vae, unet, classifier = _run_stages(plan, work, stage)
    assemble(out, plan, clip, work / "tokenizer", vae, unet, classifier, seed=seed)
    write_card(out, plan, seed=seed)


def _run_stages(
    plan: Recipe, work: Path, stage: Callable[[str], Stage]
) -> tuple[CLIPModel, AutoencoderKL, UNet2DConditionModel, Classifier]:
    """Train every part in the order in which they need each other, or load it where it is finished."""
    first = stage("text")
    tokenizer = make_tokenizer(plan, work / "tokenizer", first.seed)
    text = _result(first, CLIPModel.from_pretrained, _save, lambda one: train_text(plan, tokenizer, one))
    words = _result(
        stage("words"), CLIPModel.from_pretrained, _save, lambda one: train_words(plan, text, tokenizer, one)
    )
    clip = _result(stage("clip"), CLIPModel.from_pretrained, _save, lambda one: train_clip(plan, words, tokenizer, one))
    vae = _result(stage("vae"), AutoencoderKL.from_pretrained, _save, lambda one: train_vae(plan, one))
    vae, encoder = vae.to(first.device), text_encoder(clip).to(first.device)
    unet = _result(
        stage("unet"),
        UNet2DConditionModel.from_pretrained,
        _save,
        lambda one: train_unet(plan, vae, encoder, tokenizer, one),
    )
    classifier = _result(
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
    _forget_paths(out)
    (out / "general_prompts.txt").write_text(
        "\n".join(general_prompts(recipe.general_prompts, seed)) + "\n", encoding="utf-8"
    )


def _forget_paths(folder: Path) -> None:
    """Take out of every config where its part was loaded from: that is this machine's business."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _result(
    stage: Stage,
    load: Callable[[Path], Model],
    save: Callable[[Model, Path], object],
    train: Callable[[Stage], tuple[Model, StageProgress]],
) -> Model:
    """The stage's finished model, or train it (resuming its checkpoint), save it and write how it ended beside it."""
    folder, ending = stage.checkpoint.with_suffix(""), stage.checkpoint.with_suffix(".json")
    if ending.is_file():
        return load(folder)
    model, ended = train(stage)
    save(model, folder)
    ending.write_text(json.dumps(asdict(ended), indent=2) + "\n", encoding="utf-8")
    return model


def _save(model: PreTrainedModel | ModelMixin, folder: Path) -> None:
    model.save_pretrained(folder)


def _bar_report(bars: Progress, stages: tuple[str, ...]) -> Report:
    """A report that moves one bar per stage."""
    tasks = {stage: bars.add_task(stage, total=1.0, start=False, detail="") for stage in stages}

    def report(reached: StageProgress) -> None:
        task = tasks[reached.stage]
        bars.start_task(task)
        bars.update(task, completed=reached.progress, detail=f"step {reached.step}  loss {reached.loss:.4f}")

    return report
