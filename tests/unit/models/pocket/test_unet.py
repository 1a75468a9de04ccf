from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr

from cat_cluster.models.pocket.pretraining.clip import new_clip, text_encoder
from cat_cluster.models.pocket.pretraining.pretrain import make_tokenizer
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.unet import encode_texts, new_scheduler, new_unet
from cat_cluster.models.pretraining.noise import snr_weighted
from cat_cluster.models.pretraining.vae import new_vae


def test_loss_weights_are_those_of_diffusers_min_snr() -> None:
    scheduler = DDPMScheduler.from_config(new_scheduler().config)
    steps = torch.tensor([0, 10, 300, 700, 999])
    predicted, noise = torch.randn(2, 5, 8, 4, 4)
    snr = compute_snr(scheduler, steps)
    weights = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr
    expected = torch.stack(
        [weight * (a - b).square().mean() for weight, a, b in zip(weights, predicted, noise, strict=True)]
    ).mean()
    alpha = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    torch.testing.assert_close(snr_weighted(predicted, noise, alpha), expected)


def test_text_is_encoded_as_the_stock_pipeline_does(tmp_path: Path) -> None:
    recipe = Recipe.tiny()
    tokenizer = make_tokenizer(recipe, tmp_path, 0)
    encoder = text_encoder(new_clip(recipe, tokenizer))
    pipeline = StableDiffusionPipeline(
        vae=new_vae((8, 8, 8), 8, 64),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=new_unet(recipe),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts = ["", "a photo of a sks cup on grass"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(encode_texts(encoder, tokenizer, prompts), expected)


def test_the_schedule_is_that_of_stable_diffusion_1() -> None:
    alphas = new_scheduler().alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(alphas.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=1e-7)
    assert alphas[-1].item() == pytest.approx(0.00466, abs=2e-4)
