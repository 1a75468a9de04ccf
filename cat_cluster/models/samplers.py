"""Samplers as tables of coefficients, so that rows at different steps of different samplers share one call.

DDIM (eta 0), Euler, DPM-Solver++ 2M and their kin are linear in the latents x, the U-Net's output, the previous step's
denoised latents, and, where a sampler adds it, fresh noise. One step of any of them, for a row, is

    output   = U-Net(input_scale * x, timestep, text)
    denoised = from_latents * x + from_output * output
    x        = on_latents * x + on_denoised * denoised + on_previous * previous + on_noise * noise

with x = initial_scale * noise before the first step and previous = the last step's denoised (any finite value
before the first). First and last steps, sigma space and multistep order are all in the coefficients. An image z0 is
as noisy as the latents before a step as signal * z0 + noise * e, with e of unit variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from cat_cluster.errors import BaseModelError, SpecError
from cat_cluster.models.noise_levels import (
    Array,
    ddim_timesteps,
    dpmpp_levels,
    euler_levels,
    final_sigma,
    lcm_timesteps,
)
from cat_cluster.models.schedule import SCHEDULER_FILE, NoiseSchedule
from cat_cluster.models.step_noise import CallNoise
from cat_cluster.spec.choices import SamplerName

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)

# Options of a scheduler config that change a sampler's equations, with the only value each table implements.
_EULER_OPTIONS: Mapping[str, Any] = {
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}
_DPMPP_OPTIONS: Mapping[str, Any] = {
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}
# An option that a name says, as that of Karras' levels, is not read from the config where the name sets it.
_FIXED_OPTIONS: Mapping[SamplerName, Mapping[str, Any]] = {
    "ddim": {"thresholding": False},
    "euler": {**_EULER_OPTIONS, "use_karras_sigmas": False},
    "euler_karras": _EULER_OPTIONS,
    "euler_ancestral": {},  # diffusers' scheduler has none of these options
    "dpmpp_2m": {**_DPMPP_OPTIONS, "algorithm_type": "dpmsolver++", "use_karras_sigmas": False},
    "dpmpp_2m_karras": {**_DPMPP_OPTIONS, "algorithm_type": "dpmsolver++"},
    "dpmpp_2m_sde": {**_DPMPP_OPTIONS, "use_karras_sigmas": False},
    "dpmpp_2m_sde_karras": _DPMPP_OPTIONS,
    "lcm": {"thresholding": False},
}


@dataclass(frozen=True)
class RowCoefficients:
    """The coefficients of one step for each row, every field [B] float32; equations in the module's docstring."""

    timesteps: Tensor
    input_scale: Tensor
    from_latents: Tensor
    from_output: Tensor
    on_latents: Tensor
    on_denoised: Tensor
    on_previous: Tensor
    on_noise: Tensor


@dataclass(frozen=True)
class SamplerTable:
    """A sampler of S steps for one schedule: every field from timesteps to noise is [S] float64 on the CPU.

    noise_dtype: in which diffusers draws the noise of a step; None: in the base's own.
    """

    name: SamplerName
    timesteps: Tensor
    input_scale: Tensor
    from_latents: Tensor
    from_output: Tensor
    on_latents: Tensor
    on_denoised: Tensor
    on_previous: Tensor
    on_noise: Tensor
    signal: Tensor
    noise: Tensor
    initial_scale: float
    noise_dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def adds_noise(self) -> bool:
        """Whether any of its steps adds noise."""
        return bool(self.on_noise.any())

    def after(self, skipped: int) -> SamplerTable:
        """Return the steps behind the first `skipped`, for latents that begin as noisy as the latents there are.

        Its first step has no step before it and is of first order, as a scheduler's of diffusers that begins there.
        """
        rest = {name: getattr(self, name)[skipped:].clone() for name in _COLUMNS}
        rest["on_denoised"][:1] += rest["on_previous"][:1]
        rest["on_previous"][:1] = 0.0
        return replace(self, **rest)

    @cached_property
    def packed(self) -> Tensor:
        """The steps' coefficients [S, 8] in float32, in RowCoefficients' field order, for one copy per gather."""
        columns = [getattr(self, field.name) for field in fields(RowCoefficients)]
        return torch.stack(columns, dim=1).to(torch.float32)


_COLUMNS = (*(field.name for field in fields(RowCoefficients)), "signal", "noise")


def sampler_table(name: SamplerName, schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Build the table of a sampler with the options of the base's scheduler config, as diffusers reads them.

    clip_sample is not applied: latents are not bounded by 1, and the stock pipeline switches it off as well.
    The table has `steps` steps (with trailing spacing and an uneven ratio, diffusers' count). Raises SpecError
    for an unknown name or a number of steps the schedule cannot hold, BaseModelError for an unsupported option.
    """
    if name not in _BUILDERS:
        raise SpecError(f"sampler: {name!r} is not available; choose one of {', '.join(SAMPLERS)}.")
    if not 1 <= steps <= schedule.num_timesteps:
        raise SpecError(f"steps: {steps} is out of range; choose 1 to {schedule.num_timesteps}.")
    _check_options(name, schedule.scheduler_config)
    table = _BUILDERS[name](name, schedule, steps)
    if not bool(torch.isfinite(table.packed).all()):
        raise SpecError(
            f"steps: sampler {name!r} has no finite coefficients at {steps} steps of this base's schedule "
            f"({SCHEDULER_FILE}); use fewer steps, another sampler, or another timestep_spacing."
        )
    return table


def _check_options(name: SamplerName, config: Mapping[str, Any]) -> None:
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in ("leading", "trailing", "linspace"):
        raise BaseModelError(
            f"timestep_spacing {spacing!r} in {SCHEDULER_FILE} is not supported: "
            "use 'leading', 'trailing' or 'linspace'."
        )
    refused = _refused_options(name, config)
    if refused:
        option, implemented = refused[0]
        others = [other for other in SAMPLERS if not _refused_options(other, config)]
        remedy = f", or choose {' or '.join(others)}" if others else ""
        raise BaseModelError(
            f"{option} is {config[option]!r} in {SCHEDULER_FILE}, and sampler {name!r} implements {implemented!r} "
            f"only: change it there{remedy}."
        )


def _refused_options(name: SamplerName, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return each option that a config sets to what a sampler does not implement, with what it does."""
    fixed = _FIXED_OPTIONS[name].items()
    return [(option, value) for option, value in fixed if config.get(option) not in (None, value)]


def gather_coefficients(
    tables: Sequence[SamplerTable], steps: Sequence[int], device: torch.device | str = "cpu"
) -> RowCoefficients:
    """Gather row b's coefficients from tables[b] at steps[b]; B rows, in one copy to `device`."""
    rows = torch.stack([table.packed[step] for table, step in zip(tables, steps, strict=True)])
    return RowCoefficients(*rows.to(device, non_blocking=True).unbind(dim=1))


def advance_rows(
    coefficients: RowCoefficients, latents: Tensor, output: Tensor, previous: Tensor, noise: CallNoise | None = None
) -> tuple[Tensor, Tensor]:
    """Return (next latents, denoised), both [B, C, H, W] in float32; previous: the last step's denoised.

    noise: of the rows whose samplers add some; the others are computed without.
    """

    def per_row(values: Tensor) -> Tensor:
        return values.to(latents.device).view(-1, 1, 1, 1)

    latents, output, previous = latents.float(), output.float(), previous.float()
    denoised = per_row(coefficients.from_latents) * latents + per_row(coefficients.from_output) * output
    following = (
        per_row(coefficients.on_latents) * latents
        + per_row(coefficients.on_denoised) * denoised
        + per_row(coefficients.on_previous) * previous
    )
    if noise is not None:
        following[noise.places] += per_row(coefficients.on_noise)[noise.places] * noise.values
    return following, denoised


def _ddim(name: SamplerName, schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """DDIM with eta 0 (arXiv 2010.02502, equation 12)."""
    config, total = schedule.scheduler_config, schedule.num_timesteps
    timesteps = ddim_timesteps(schedule, steps)
    alphas = schedule.alphas_cumprod.numpy()
    final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas[0])
    index = timesteps.astype(np.int64)
    before = index - total // steps
    alpha, alpha_next = alphas[index], np.where(before >= 0, alphas[before.clip(min=0)], final)
    on_latents = np.sqrt((1 - alpha_next) / (1 - alpha))
    from_latents, from_output = _denoise(schedule, np.sqrt(alpha), np.sqrt(1 - alpha))
    return _table(
        name,
        1.0,
        timesteps=timesteps,
        input_scale=np.ones_like(alpha),
        from_latents=from_latents,
        from_output=from_output,
        on_latents=on_latents,
        on_denoised=np.sqrt(alpha_next) - on_latents * np.sqrt(alpha),
        on_previous=np.zeros_like(alpha),
        on_noise=np.zeros_like(alpha),
        signal=np.sqrt(alpha),
        noise=np.sqrt(1 - alpha),
    )


def _euler(
    name: SamplerName, schedule: NoiseSchedule, steps: int, *, karras: bool = False, ancestral: bool = False
) -> SamplerTable:
    """Euler's method in sigma space, x = z / sqrt(a) (arXiv 2206.00364, algorithm 2 without churn).

    ancestral: each step goes below the next level, to sigma_next^2 / sigma, and noise brings the latents up to it, as
    in ancestral sampling of DDPM (k-diffusion's sample_euler_ancestral).
    """
    timesteps, sigmas = euler_levels(schedule, steps, karras=karras)
    # diffusers' ancestral scheduler has no final_sigmas_type.
    sigmas = np.append(sigmas, 0.0 if ancestral else final_sigma(schedule))
    sigma, ratio = sigmas[:-1], sigmas[1:] / sigmas[:-1]
    on_latents, on_noise = ratio, np.zeros_like(ratio)
    if ancestral:
        on_latents, on_noise = ratio**2, sigmas[1:] * np.sqrt(1 - ratio**2)
    scale = 1 / np.sqrt(sigma**2 + 1)
    if schedule.prediction_type == "epsilon":
        from_latents, from_output = np.ones_like(sigma), -sigma
    else:
        from_latents, from_output = scale**2, -sigma * scale
    largest = float(sigma.max())
    return _table(
        name,
        (largest**2 + 1) ** 0.5 if schedule.scheduler_config.get("timestep_spacing") == "leading" else largest,
        timesteps=timesteps,
        input_scale=scale,
        from_latents=from_latents,
        from_output=from_output,
        on_latents=on_latents,
        on_denoised=1 - on_latents,
        on_previous=np.zeros_like(sigma),
        on_noise=on_noise,
        signal=np.ones_like(sigma),
        noise=sigma,
    )


def _dpmpp_2m(
    name: SamplerName, schedule: NoiseSchedule, steps: int, *, karras: bool = False, sde: bool = False
) -> SamplerTable:
    """DPM-Solver++ 2M, midpoint (arXiv 2211.01095, algorithm 2), of first order at the first and a final step.

    sde: of the stochastic equation, as SDE-DPM-Solver++ 2M there (appendix D.4).
    """
    timesteps, sigmas = dpmpp_levels(schedule, steps, karras=karras)
    sigmas = np.append(sigmas, final_sigma(schedule))
    signal = 1 / np.sqrt(sigmas**2 + 1)
    noise = sigmas * signal
    # exp(-h) of a step is the quotient of its sigmas, since lambda = -log(sigma) in this space.
    shrink = sigmas[1:] / sigmas[:-1]
    on_latents, on_noise = noise[1:] / noise[:-1], np.zeros_like(shrink)
    gain = signal[1:] * (1 - shrink)
    if sde:
        # Karras' last level can be the final one, but for rounding.
        on_latents, on_noise = on_latents * shrink, noise[1:] * np.sqrt((1 - shrink**2).clip(min=0))
        gain = signal[1:] * (1 - shrink**2)
    half = _second_order_share(schedule.scheduler_config, sigmas)
    from_latents, from_output = _denoise(schedule, signal[:-1], noise[:-1])
    return _table(
        name,
        1.0,
        timesteps=timesteps,
        input_scale=np.ones_like(gain),
        from_latents=from_latents,
        from_output=from_output,
        on_latents=on_latents,
        on_denoised=gain * (1 + half),
        on_previous=-gain * half,
        on_noise=on_noise,
        signal=signal[:-1],
        noise=noise[:-1],
        noise_dtype=torch.float32 if sde else None,
    )


def _second_order_share(config: Mapping[str, Any], sigmas: Array) -> Array:
    """Return 1 / (2 r) [S] with r = h_before / h, and 0 at steps of first order."""
    steps = len(sigmas) - 1
    half = np.zeros(steps)
    with np.errstate(divide="ignore"):
        h = np.log(sigmas[:-1]) - np.log(sigmas[1:])
    first_order_final = (
        bool(config.get("euler_at_final", False))
        or (bool(config.get("lower_order_final", True)) and steps < 15)
        or config.get("final_sigmas_type", "zero") == "zero"
    )
    end = steps - 1 if first_order_final else steps
    with np.errstate(divide="ignore", invalid="ignore"):
        half[1:end] = 0.5 * h[1:end] / h[: max(end - 1, 0)]
    return half


def _lcm(name: SamplerName, schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): denoise, then noise again to the next level."""
    timesteps = lcm_timesteps(schedule, steps)
    alpha = schedule.alphas_cumprod.numpy()[timesteps.astype(np.int64)]
    alpha_next = np.append(alpha[1:], 1.0)
    from_latents, from_output = _denoise(schedule, np.sqrt(alpha), np.sqrt(1 - alpha))
    # The boundary conditions of consistency models, with 0.5 as the data's deviation: at timestep 0, x itself.
    scaled = timesteps * float(schedule.scheduler_config.get("timestep_scaling", 10.0))
    of_latents, of_denoised = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    return _table(
        name,
        1.0,
        timesteps=timesteps,
        input_scale=np.ones_like(alpha),
        from_latents=of_latents + of_denoised * from_latents,
        from_output=of_denoised * from_output,
        on_latents=np.zeros_like(alpha),
        on_denoised=np.sqrt(alpha_next),
        on_previous=np.zeros_like(alpha),
        on_noise=np.sqrt(1 - alpha_next),
        signal=np.sqrt(alpha),
        noise=np.sqrt(1 - alpha),
    )


_Builder = Callable[[SamplerName, NoiseSchedule, int], SamplerTable]
_BUILDERS: Mapping[SamplerName, _Builder] = {
    "ddim": _ddim,
    "euler": _euler,
    "euler_karras": partial(_euler, karras=True),
    "euler_ancestral": partial(_euler, ancestral=True),
    "dpmpp_2m": _dpmpp_2m,
    "dpmpp_2m_karras": partial(_dpmpp_2m, karras=True),
    "dpmpp_2m_sde": partial(_dpmpp_2m, sde=True),
    "dpmpp_2m_sde_karras": partial(_dpmpp_2m, karras=True, sde=True),
    "lcm": _lcm,
}


def _table(
    name: SamplerName, initial_scale: float, *, noise_dtype: torch.dtype | None = None, **columns: Array
) -> SamplerTable:
    tensors = {key: torch.from_numpy(np.ascontiguousarray(column)) for key, column in columns.items()}
    return SamplerTable(name=name, initial_scale=initial_scale, noise_dtype=noise_dtype, **tensors)


def _denoise(schedule: NoiseSchedule, signal: Array, noise: Array) -> tuple[Array, Array]:
    """Return (from_latents, from_output) of z0 in variance-preserving space, with signal^2 + noise^2 = 1."""
    if schedule.prediction_type == "epsilon":
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1 / signal, -noise / signal
    return signal, -noise
