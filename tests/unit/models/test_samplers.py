"""Sampler tables against diffusers' schedulers, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor

from cat_cluster.errors import BaseModelError, SpecError
from cat_cluster.models.samplers import (
    SAMPLERS,
    SamplerTable,
    advance_rows,
    gather_coefficients,
    sampler_table,
)
from cat_cluster.models.schedule import NoiseSchedule
from cat_cluster.models.step_noise import StepNoise, gather_noise
from cat_cluster.spec.choices import SamplerName
from tests.support.denoised_images import stock_scheduler

SEED = 8  # of the noise that samplers add at their steps
STABLE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "stable": {},
    "alpha-to-one": {"set_alpha_to_one": True},
    "no-offset": {"steps_offset": 0},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "sigma-min": {"final_sigmas_type": "sigma_min"},
    "sigma-min-no-lower-order": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "euler-at-final": {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "distilled": {"original_inference_steps": 30, "timestep_scaling": 4.0},
    "given-ends": {"sigma_min": 0.05, "sigma_max": 11.5, "timestep_spacing": "trailing"},
    "short": {"trained_betas": [0.002 + 0.0002 * step for step in range(200)], "num_train_timesteps": 200},
}


def model(latents: Tensor, timestep: Tensor) -> Tensor:
    """A stand-in network [B, C, H, W]: smooth, nonlinear, different at each timestep [B]."""
    return torch.tanh(latents * 0.7 + latents.roll(1, dims=-1) * 0.3) + torch.sin(timestep / 300).view(-1, 1, 1, 1)


def oracle_path(name: SamplerName, config: dict[str, Any], steps: int, noise: Tensor) -> list[Tensor]:
    """The latents [C, H, W] before each step and at the end, by the stock scheduler in a stock loop."""
    generator = torch.Generator().manual_seed(SEED)
    scheduler = stock_scheduler(name, config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # without it a first timestep that stands there twice is passed over
        scheduler.set_begin_index(0)
    latents = noise[None] * scheduler.init_noise_sigma
    path = [latents[0]]
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(latents, timestep), timestep.float()[None])
        latents = scheduler.step(output, timestep, latents, generator=generator).prev_sample
        path.append(latents[0])
    return path


def step_noise(table: SamplerTable) -> StepNoise | None:
    """The noise of the steps that `oracle_path` draws."""
    generator = torch.Generator().manual_seed(SEED)
    return StepNoise(generator, (4, 6, 6), torch.float32) if table.adds_noise else None


def our_path(table: SamplerTable, noise: Tensor) -> list[Tensor]:
    latents, of_steps = noise[None] * table.initial_scale, step_noise(table)
    previous = torch.zeros_like(latents)
    path = [latents[0]]
    for step in range(len(table)):
        latents, previous = one_call([table], [step], latents, previous, [of_steps])
        path.append(latents[0])
    return path


def one_call(
    tables: list[SamplerTable],
    steps: list[int],
    latents: Tensor,
    previous: Tensor,
    noises: Sequence[StepNoise | None] = (),
) -> tuple[Tensor, Tensor]:
    rows = gather_coefficients(tables, steps)
    output = model(rows.input_scale.view(-1, 1, 1, 1) * latents, rows.timesteps)
    return advance_rows(rows, latents, output, previous, gather_noise(noises, steps, latents.device))


def assert_paths_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal to float32 rounding of the largest value met: Euler starts at sigma 4096 and cancels down to 1."""
    assert len(ours) == len(theirs)
    largest = max(1.0, max(float(latents.abs().max()) for latents in theirs))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-4, atol=max(2e-5, 1e-6 * largest))


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("steps", [1, 2, 14, 25])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers(
    name: SamplerName, variant: str, prediction_type: str, steps: int, noise: Tensor
) -> None:
    config = {**STABLE, **VARIANTS[variant], "prediction_type": prediction_type}
    table = sampler_table(name, NoiseSchedule.from_config(config), steps)
    assert_paths_close(our_path(table, noise), oracle_path(name, config, steps, noise))


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_with_trailing_steps(name: SamplerName, steps: int, noise: Tensor) -> None:
    config = {
        **STABLE,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    table = sampler_table(name, NoiseSchedule.from_config(config), steps)
    assert_paths_close(our_path(table, noise), oracle_path(name, config, steps, noise))


def test_a_swapped_scheduler_reads_the_config_the_same_way(noise: Tensor) -> None:
    """From the scheduler object of a stock SD 1.x pipeline, as a user swaps it."""
    stock = PNDMScheduler.from_config(STABLE)
    for name in SAMPLERS:
        table = sampler_table(name, NoiseSchedule.from_config(STABLE), 7)
        assert_paths_close(our_path(table, noise), oracle_path(name, stock.config, 7, noise))


def test_rows_of_different_samplers_at_different_steps_share_calls() -> None:
    """Rows join one call after another; each follows its own scheduler to its own end."""
    config = {**STABLE, "prediction_type": "epsilon"}
    schedule = NoiseSchedule.from_config(config)
    plan: list[tuple[SamplerName, int]] = [
        *[("ddim", 4), ("euler", 7), ("dpmpp_2m", 5), ("dpmpp_2m", 16), ("ddim", 1)],
        *[("euler_ancestral", 6), ("dpmpp_2m_sde", 9), ("dpmpp_2m_sde_karras", 16), ("lcm", 3)],
    ]
    tables = [sampler_table(name, schedule, steps) for name, steps in plan]
    noises = [torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(len(plan))]
    paths = [[noise * table.initial_scale] for noise, table in zip(noises, tables, strict=True)]
    previous = [torch.zeros_like(noise) for noise in noises]
    of_steps = [step_noise(table) for table in tables]
    for call in range(30):
        active = [row for row, table in enumerate(tables) if row <= call and len(paths[row]) - 1 < len(table)]
        if not active:
            break
        latents, denoised = one_call(
            [tables[row] for row in active],
            [len(paths[row]) - 1 for row in active],
            torch.stack([paths[row][-1] for row in active]),
            torch.stack([previous[row] for row in active]),
            [of_steps[row] for row in active],
        )
        for position, row in enumerate(active):
            paths[row].append(latents[position])
            previous[row] = denoised[position]
    for (name, steps), noise, path in zip(plan, noises, paths, strict=True):
        assert_paths_close(path, oracle_path(name, config, steps, noise))


def test_denoised_is_diffusers_predicted_original(noise: Tensor) -> None:
    config = {**STABLE, "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(5)
    table = sampler_table("ddim", NoiseSchedule.from_config(config), 5)
    _, denoised = one_call([table], [2], noise[None], torch.zeros(1, 4, 6, 6))
    timestep = scheduler.timesteps[2]
    expected = scheduler.step(model(noise[None], timestep.float()[None]), timestep, noise[None])
    torch.testing.assert_close(denoised, expected.pred_original_sample)


def test_a_first_step_ignores_what_came_before(noise: Tensor) -> None:
    """A row that joins may carry any finite previous: its first step must not read it."""
    schedule = NoiseSchedule.from_config(STABLE)
    for name in SAMPLERS:
        table = sampler_table(name, schedule, 6)
        calm, _ = one_call([table], [0], noise[None], torch.zeros(1, 4, 6, 6))
        wild, _ = one_call([table], [0], noise[None], torch.full((1, 4, 6, 6), 1e30))
        assert torch.equal(calm, wild)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(SpecError, match=r"steps: .* out of range"):
        sampler_table("ddim", NoiseSchedule.from_config(STABLE), steps)


def test_steps_that_leave_the_schedule_are_refused() -> None:
    with pytest.raises(SpecError, match="steps_offset"):
        sampler_table("ddim", NoiseSchedule.from_config(STABLE), 1000)


def test_steps_without_finite_coefficients_are_refused() -> None:
    config = {**STABLE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(SpecError, match="no finite coefficients"):
        sampler_table("ddim", NoiseSchedule.from_config(config), 4)


def test_lcm_makes_no_more_steps_than_it_was_distilled_with() -> None:
    schedule = NoiseSchedule.from_config({**STABLE, "original_inference_steps": 8})
    assert len(sampler_table("lcm", schedule, 8)) == 8
    with pytest.raises(SpecError, match=r"^steps: sampler 'lcm' makes at most the 8 steps .* use fewer steps"):
        sampler_table("lcm", schedule, 9)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(SpecError, match=f"'heun' is not available; choose one of {', '.join(SAMPLERS)}"):
        sampler_table("heun", NoiseSchedule.from_config(STABLE), 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("ddim", {"thresholding": True}),
        ("euler", {"use_karras_sigmas": True}),
        ("euler_karras", {"use_beta_sigmas": True}),
        ("dpmpp_2m", {"use_karras_sigmas": True}),
        ("dpmpp_2m_karras", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m_sde", {"solver_type": "heun"}),
        ("lcm", {"thresholding": True}),
        ("dpmpp_2m_sde", {"use_karras_sigmas": True}),
    ],
)
def test_options_a_table_does_not_implement_are_refused(name: SamplerName, option: dict[str, Any]) -> None:
    with pytest.raises(BaseModelError, match=next(iter(option))):
        sampler_table(name, NoiseSchedule.from_config({**STABLE, **option}), 4)


def test_a_config_with_karras_sigmas_is_read_by_the_samplers_of_that_name(noise: Tensor) -> None:
    config = {**STABLE, "use_karras_sigmas": True}
    schedule = NoiseSchedule.from_config(config)
    for name in ("euler", "dpmpp_2m"):
        with pytest.raises(BaseModelError, match=r"use_karras_sigmas is True .* or choose ddim or euler_karras or"):
            sampler_table(name, schedule, 4)
        path = our_path(sampler_table(f"{name}_karras", schedule, 9), noise)
        assert_paths_close(path, oracle_path(name, config, 9, noise))


def test_an_unknown_spacing_is_refused() -> None:
    for name in SAMPLERS:
        with pytest.raises(BaseModelError, match="timestep_spacing 'uneven'"):
            sampler_table(name, NoiseSchedule.from_config({**STABLE, "timestep_spacing": "uneven"}), 4)
