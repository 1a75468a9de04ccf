"""Fisher drift against a merged copy of the U-Net and diffusers' own noising, one row at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from cat_cluster.evaluation.fisher import TIMESTEPS, fisher_drift, stratified_timesteps
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel
from cat_cluster.training.methods import initial_weights
from tests.support.texts import states_of

PROMPTS, SEEDS = ("a photo of a cup", "a red cup"), (3, 4)


@torch.no_grad()
def test_fisher_drift_equals_the_difference_of_two_whole_models(tiny_base: BaseModel) -> None:
    merged = copy.deepcopy(tiny_base.unet)
    layers = adapted_layers(tiny_base.unet, "attention")
    generator = torch.Generator().manual_seed(0)
    start = initial_weights(tiny_base.unet, layers, rank=2, seed=0, draw_key="a")
    weights = AdapterWeights(
        {
            name: LoraLayer(layer.down, torch.randn(layer.up.shape, generator=generator))
            for name, layer in start.layers.items()
        }
    )
    for name, layer in weights.layers.items():
        merged.get_submodule(name).weight += layer.up @ layer.down
    images = torch.rand(2, 3, 16, 16, generator=generator)
    scheduler = DDIMScheduler.from_config(dict(tiny_base.schedule.scheduler_config))

    bank = LoraBank.attach(tiny_base.unet, layers=layers)
    try:
        bank.load(1, weights)
        found = fisher_drift(tiny_base, bank, 1, images, PROMPTS, SEEDS)
    finally:
        bank.detach()

    for n, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        z0 = tiny_base.vae.encode(images[n : n + 1] * 2 - 1).latent_dist.mode() * tiny_base.vae.config.scaling_factor
        noise = torch.randn(z0.shape[1:], generator=torch.Generator().manual_seed(seed ^ 0x5EED))[None]
        text = states_of(tiny_base, [prompt])
        terms = []
        for timestep in stratified_timesteps(1000, [seed])[0]:
            noisy = scheduler.add_noise(z0, noise, torch.tensor([timestep]))
            adapted, plain = (unet(noisy, timestep, text).sample for unet in (merged, tiny_base.unet))
            terms.append(float((adapted - plain).square().mean()))
        assert found[n] == pytest.approx(np.mean(terms), rel=1e-3)
        assert found[n] > 0


def test_each_stratum_gives_one_timestep() -> None:
    for steps in stratified_timesteps(1000, [0, 1, 2**31]):
        assert [step // (1000 // TIMESTEPS) for step in steps] == list(range(TIMESTEPS))
    assert stratified_timesteps(1000, [7]) == stratified_timesteps(1000, [7])
    assert stratified_timesteps(1000, [7]) != stratified_timesteps(1000, [8])
