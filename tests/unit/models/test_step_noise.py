"""The noise of steps: of the image's own seed, in the order and the dtype in which stock pipelines draw it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.edit import edit_table
from cat_cluster.models.image_start import start_from_image, start_from_noise
from cat_cluster.models.samplers import SAMPLERS, sampler_table
from cat_cluster.models.step_noise import StepNoise, gather_noise
from cat_cluster.spec.choices import SamplerName
from tests.support.denoised_images import stock_scheduler

SHAPE = (4, 8, 8)
NOISY = tuple(name for name in get_args(SamplerName) if "ancestral" in name or "sde" in name or name == "lcm")


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


def draws(seed: int, count: int) -> list[torch.Tensor]:
    """What a plain generator of a seed draws, one latent after another."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *SHAPE, generator=generator)[0] for _ in range(count)]


def test_a_step_that_is_made_again_has_the_same_noise() -> None:
    noise = StepNoise(torch.Generator().manual_seed(3), SHAPE, torch.float32)
    asked = [noise.of(step) for step in (0, 0, 1, 2, 2, 2, 3)]
    expected = draws(3, 4)
    for own, step in zip(asked, (0, 0, 1, 2, 2, 2, 3), strict=True):
        assert torch.equal(own, expected[step])
    with pytest.raises(ValueError, match="step 2 comes again after step 3"):
        noise.of(2)


def test_a_call_gets_the_noise_of_those_that_add_some() -> None:
    first, second = (StepNoise(torch.Generator().manual_seed(seed), SHAPE, torch.float32) for seed in (1, 2))
    first.of(0)
    gathered = gather_noise([None, first, None, second], [7, 1, 3, 0], torch.device("cpu"))
    assert gathered is not None
    assert gathered.places.tolist() == [1, 3]
    assert torch.equal(gathered.values, torch.stack([draws(1, 2)[1], draws(2, 1)[0]]))


def test_calls_without_such_images_draw_nothing(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [
        start_from_noise(base, 5, sampler_table(name, base.schedule, 4)) for name in SAMPLERS if name not in NOISY
    ]
    assert len(starts) == len(SAMPLERS) - len(NOISY) > 4
    monkeypatch.setattr(torch, "randn", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(torch, "stack", lambda *_, **__: 1 / 0)
    assert gather_noise([start.noise for start in starts], [0] * len(starts), torch.device("cpu")) is None


@pytest.mark.parametrize("name", NOISY)
def test_steps_follow_what_the_stock_pipelines_draw_first(base: BaseModel, name: SamplerName) -> None:
    """Noise alone is one draw; an edit's are the VAE's and the noise on the image, with a mask the VAE's once more."""
    table = sampler_table(name, base.schedule, 5)
    moments, mask = torch.zeros(8, 8, 8), torch.ones(16, 16, dtype=torch.bool)
    of_edit = (base, moments)
    starts = [
        (1, start_from_noise(base, 7, table)),
        (2, start_from_image(*of_edit, None, 0.8, 7, edit_table(table, 5, 0.8))),
        (3, start_from_image(*of_edit, mask, 0.8, 7, edit_table(table, 5, 0.8))),
        (3, start_from_image(*of_edit, mask, 1.0, 7, table)),
    ]
    for before, start in starts:
        assert start.noise is not None
        assert torch.equal(start.noise.of(0), draws(7, before + 1)[-1])


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_drawn_in_the_schedulers_dtype(
    tiny_base_folder: Path, name: SamplerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator draws other numbers in another dtype: some schedulers draw in the U-Net's, some in float32."""
    base, randn = load_base_model(str(tiny_base_folder), dtype=torch.bfloat16), torch.randn
    start = start_from_noise(base, 7, sampler_table(name, base.schedule, 5))
    assert start.noise is not None
    seen: list[torch.Tensor] = []

    def watching(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(randn(*args, **kwargs))
        return seen[-1]

    generator = torch.Generator().manual_seed(7)
    latents = randn(1, *SHAPE, generator=generator, dtype=torch.bfloat16)
    scheduler = stock_scheduler(name, base.schedule.scheduler_config)
    scheduler.set_timesteps(5)
    monkeypatch.setattr(torch, "randn", watching)
    scheduler.scale_model_input(latents, scheduler.timesteps[0])
    scheduler.step(torch.zeros_like(latents), scheduler.timesteps[0], latents, generator=generator)
    (drawn,) = seen
    assert torch.equal(start.noise.of(0), drawn[0].float())


def test_a_table_that_adds_nothing_at_all_has_no_noise(base: BaseModel) -> None:
    """The only step of one goes to the denoised latents."""
    for name in NOISY:
        assert start_from_noise(base, 7, sampler_table(name, base.schedule, 1)).noise is None
