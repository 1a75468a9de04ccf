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
from cat_cluster.models.pocket.classifier import Classifier, load_classifier, save_classifier, train_classifier
from cat_cluster.models.pocket.clip import save_judge, text_encoder, train_clip, train_text
from cat_cluster.models.pocket.loop import Pulse, Report, Sitting
from cat_cluster.models.pocket.quality import write_card
from cat_cluster.models.pocket.recipe import Recipe
from cat_cluster.models.pocket.tokenizer import load_tokenizer, train_tokenizer
from cat_cluster.models.pocket.unet import new_scheduler, train_unet
from cat_cluster.models.pocket.vae import train_vae
from cat_cluster.models.pocket.words import train_words

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

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        report = _bar(progress, tuple(shares))

        def sitting(stage: str) -> Sitting:
            seconds = None if minutes is None else 60 * minutes * shares[stage] / sum(shares.values())
            return Sitting(seconds, device, seed, report, compile)

        clip, vae, unet, classifier = _run_stages(plan, work, device, sitting)
    assemble(out, plan, clip, work / "tokenizer", vae, unet, classifier, seed=seed)
    write_card(out, plan, seed=seed)


def _run_stages(
    plan: Recipe, work: Path, device: str, sitting: Callable[[str], Sitting]
) -> tuple[CLIPModel, AutoencoderKL, UNet2DConditionModel, Classifier]:
    """Train every part in the order in which they need each other, or take it from where it was left."""
    tokenizer = make_tokenizer(plan, work / "tokenizer", sitting("text").seed)
    text = _stage(
        work / "text",
        CLIPModel.from_pretrained,
        _save,
        lambda path: train_text(plan, tokenizer, path, sitting("text")),
    )
    words = _stage(
        work / "words",
        CLIPModel.from_pretrained,
        _save,
        lambda path: train_words(plan, text, tokenizer, path, sitting("words")),
    )
    clip = _stage(
        work / "clip",
        CLIPModel.from_pretrained,
        _save,
        lambda path: train_clip(plan, words, tokenizer, path, sitting("clip")),
    )
    vae = _stage(
        work / "vae",
        AutoencoderKL.from_pretrained,
        _save,
        lambda path: train_vae(plan, path, sitting("vae")),
    )
    encoder = text_encoder(clip).to(device)
    unet = _stage(
        work / "unet",
        UNet2DConditionModel.from_pretrained,
        _save,
        lambda path: train_unet(plan, vae.to(device), encoder, tokenizer, path, sitting("unet")),
    )
    classifier = _stage(
        work / "classifier",
        load_classifier,
        save_classifier,
        lambda path: train_classifier(plan, vae.to(device), path, sitting("classifier")),
    )
    return clip, vae, unet, classifier


def make_tokenizer(recipe: Recipe, folder: Path, seed: int) -> CLIPTokenizer:
    """The tokenizer of `folder`, learnt from the world's captions where it is not there yet."""
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(folder)
    rng = np.random.default_rng(seed)
    captions = (world.caption(world.random_scene(rng), rng, rare=0.0) for _ in range(4_000))
    return train_tokenizer(captions, folder, length=recipe.text_length)


def general_prompts(count: int, seed: int) -> list[str]:
    """Different captions of the world that say "a photo of" and a colour or a pattern, and no unknown word."""
    rng = np.random.default_rng([seed, 6])
    telling = re.compile(rf"\b({'|'.join((*world.COLOURS, *world.PATTERNS))})\b")
    found: dict[str, None] = {}
    while len(found) < count:
        text = world.caption(world.random_scene(rng), rng, rare=0.0)
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


def _stage(
    folder: Path,
    load: Callable[[Path], Model],
    save: Callable[[Model, Path], object],
    train: Callable[[Path], tuple[Model, Pulse]],
) -> Model:
    """The stage's finished result, or train it (resuming its checkpoint), save it and note what was done."""
    note = folder.parent / f"{folder.name}.json"
    if note.is_file():
        return load(folder)
    model, pulse = train(folder.parent / f"{folder.name}.pt")
    save(model, folder)
    note.write_text(json.dumps(asdict(pulse), indent=2) + "\n", encoding="utf-8")
    return model


def _save(model: PreTrainedModel | ModelMixin, folder: Path) -> None:
    model.save_pretrained(folder)


def _bar(progress: Progress, stages: tuple[str, ...]) -> Report:
    tasks = {stage: progress.add_task(stage, total=1.0, start=False, detail="") for stage in stages}

    def report(pulse: Pulse) -> None:
        task = tasks[pulse.stage]
        progress.start_task(task)
        detail = f"step {pulse.step}  loss {pulse.loss:.4f}"
        progress.update(task, completed=pulse.progress, detail=detail)

    return report
