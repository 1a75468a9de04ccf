"""Samplers as tables of coefficients, so that rows at different steps of different samplers share one call.

DDIM (eta 0), Euler and DPM-Solver++ 2M are linear in the latents x, the U-Net's output, and the previous step's
denoised latents. One step of any of them, for a row, is

    output   = U-Net(input_scale * x, timestep, text)
    denoised = from_latents * x + from_output * output
    x        = on_latents * x + on_denoised * denoised + on_previous * previous

with x = initial_scale * noise before the first step and previous = the last step's denoised (any finite value
before the first). First and last steps, sigma space and multistep order are all in the coefficients. An image z0 is
as noisy as the latents before a step as signal * z0 + noise * e, with e of unit variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cat_cluster.errors import BaseModelError, SpecError
from cat_cluster.models.schedule import SCHEDULER_FILE, NoiseSchedule
from cat_cluster.spec.choices import SamplerName

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
Array = npt.NDArray[np.float64]

# Options of a scheduler config that change a sampler's equations, with the only value each table implements.
_FIXED_OPTIONS: Mapping[SamplerName, Mapping[str, Any]] = {
    "ddim": {"thresholding": False},
    "euler": {
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
    },
    "dpmpp_2m": {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
    },
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


@dataclass(frozen=True)
class SamplerTable:
    """A sampler of S steps for one schedule: every field but name and initial_scale is [S] float64 on the CPU."""

    name: SamplerName
    timesteps: Tensor
    input_scale: Tensor
    from_latents: Tensor
    from_output: Tensor
    on_latents: Tensor
    on_denoised: Tensor
    on_previous: Tensor
    signal: Tensor
    noise: Tensor
    initial_scale: float

    def __len__(self) -> int:
        return len(self.timesteps)

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
        """The steps' coefficients [S, 7] in float32, in RowCoefficients' field order, for one copy per gather."""
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
    for option, implemented in _FIXED_OPTIONS[name].items():
        value = schedule.scheduler_config.get(option)
        if value is not None and value != implemented:
            raise BaseModelError(
                f"{option} is {value!r} in {SCHEDULER_FILE}, and sampler {name!r} implements {implemented!r} "
                "only: change it there, or choose another sampler."
            )
    table = _BUILDERS[name](schedule, steps)
    if not bool(torch.isfinite(table.packed).all()):
        raise SpecError(
            f"steps: sampler {name!r} has no finite coefficients at {steps} steps of this base's schedule "
            f"({SCHEDULER_FILE}); use fewer steps, another sampler, or another timestep_spacing."
        )
    return table


def gather_coefficients(
    tables: Sequence[SamplerTable], steps: Sequence[int], device: torch.device | str = "cpu"
) -> RowCoefficients:
    """Gather row b's coefficients from tables[b] at steps[b]; B rows, in one copy to `device`."""
    rows = torch.stack([table.packed[step] for table, step in zip(tables, steps, strict=True)])
    return RowCoefficients(*rows.to(device, non_blocking=True).unbind(dim=1))


def advance_rows(
    coefficients: RowCoefficients, latents: Tensor, output: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (next latents, denoised), both [B, C, H, W] in float32; previous: the last step's denoised."""

    def per_row(values: Tensor) -> Tensor:
        return values.to(latents.device).view(-1, 1, 1, 1)

    latents, output, previous = latents.float(), output.float(), previous.float()
    denoised = per_row(coefficients.from_latents) * latents + per_row(coefficients.from_output) * output
    following = (
        per_row(coefficients.on_latents) * latents
        + per_row(coefficients.on_denoised) * denoised
        + per_row(coefficients.on_previous) * previous
    )
    return following, denoised


def _ddim(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """DDIM with eta 0 (arXiv 2010.02502, equation 12)."""
    config, total = schedule.scheduler_config, schedule.num_timesteps
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1].copy()
    elif spacing == "leading":
        timesteps = _leading(steps, total // steps, config)
    else:
        timesteps = _trailing(spacing, steps, total, total)
    _check_range(timesteps, total, steps)
    alphas = schedule.alphas_cumprod.numpy()
    final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas[0])
    index = timesteps.astype(np.int64)
    before = index - total // steps
    alpha, alpha_next = alphas[index], np.where(before >= 0, alphas[before.clip(min=0)], final)
    on_latents = np.sqrt((1 - alpha_next) / (1 - alpha))
    from_latents, from_output = _denoise(schedule, np.sqrt(alpha), np.sqrt(1 - alpha))
    return _table(
        "ddim",
        1.0,
        timesteps=timesteps,
        input_scale=np.ones_like(alpha),
        from_latents=from_latents,
        from_output=from_output,
        on_latents=on_latents,
        on_denoised=np.sqrt(alpha_next) - on_latents * np.sqrt(alpha),
        on_previous=np.zeros_like(alpha),
        signal=np.sqrt(alpha),
        noise=np.sqrt(1 - alpha),
    )


def _euler(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Euler's method in sigma space, x = z / sqrt(a) (arXiv 2206.00364, algorithm 2 without churn)."""
    config, total = schedule.scheduler_config, schedule.num_timesteps
    spacing = config.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        # Not rounded: diffusers gives the U-Net fractional timesteps here.
        timesteps = np.linspace(0, total - 1, steps)[::-1].astype(np.float32).astype(np.float64)
    elif spacing == "leading":
        timesteps = _leading(steps, total // steps, config)
    else:
        timesteps = _trailing(spacing, steps, total, total)
    _check_range(timesteps, total, steps)
    sigmas = _sigmas(schedule, timesteps)
    sigma, ratio = sigmas[:-1], sigmas[1:] / sigmas[:-1]
    scale = 1 / np.sqrt(sigma**2 + 1)
    if schedule.prediction_type == "epsilon":
        from_latents, from_output = np.ones_like(sigma), -sigma
    else:
        from_latents, from_output = scale**2, -sigma * scale
    largest = float(sigma.max())
    return _table(
        "euler",
        largest if spacing != "leading" else (largest**2 + 1) ** 0.5,
        timesteps=timesteps,
        input_scale=scale,
        from_latents=from_latents,
        from_output=from_output,
        on_latents=ratio,
        on_denoised=1 - ratio,
        on_previous=np.zeros_like(sigma),
        signal=np.ones_like(sigma),
        noise=sigma,
    )


def _dpmpp_2m(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """DPM-Solver++ 2M, midpoint (arXiv 2211.01095, algorithm 2), of first order at the first and a final step."""
    config, total = schedule.scheduler_config, schedule.num_timesteps
    spacing = config.get("timestep_spacing", "linspace")
    alphas = _finite_alphas(schedule)
    lambdas = 0.5 * np.log(alphas / (1 - alphas))
    last = total - int(np.searchsorted(lambdas[::-1], float(config.get("lambda_min_clipped", -np.inf))))
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].copy()
    elif spacing == "leading":
        timesteps = _leading(steps + 1, last // (steps + 1), config)[:-1]
    else:
        timesteps = _trailing(spacing, steps, last, total)
    _check_range(timesteps, total, steps)
    sigmas = _sigmas(schedule, timesteps)
    signal = 1 / np.sqrt(sigmas**2 + 1)
    noise = sigmas * signal
    # exp(-h) of a step is the quotient of its sigmas, since lambda = -log(sigma) in this space.
    gain = signal[1:] * (1 - sigmas[1:] / sigmas[:-1])
    half = _second_order_share(config, sigmas)
    from_latents, from_output = _denoise(schedule, signal[:-1], noise[:-1])
    return _table(
        "dpmpp_2m",
        1.0,
        timesteps=timesteps,
        input_scale=np.ones_like(gain),
        from_latents=from_latents,
        from_output=from_output,
        on_latents=noise[1:] / noise[:-1],
        on_denoised=gain * (1 + half),
        on_previous=-gain * half,
        signal=signal[:-1],
        noise=noise[:-1],
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


_BUILDERS: Mapping[SamplerName, Callable[[NoiseSchedule, int], SamplerTable]] = {
    "ddim": _ddim,
    "euler": _euler,
    "dpmpp_2m": _dpmpp_2m,
}


def _table(name: SamplerName, initial_scale: float, **columns: Array) -> SamplerTable:
    tensors = {key: torch.from_numpy(np.ascontiguousarray(column)) for key, column in columns.items()}
    return SamplerTable(name=name, initial_scale=initial_scale, **tensors)


def _denoise(schedule: NoiseSchedule, signal: Array, noise: Array) -> tuple[Array, Array]:
    """Return (from_latents, from_output) of z0 in variance-preserving space, with signal^2 + noise^2 = 1."""
    if schedule.prediction_type == "epsilon":
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1 / signal, -noise / signal
    return signal, -noise


def _finite_alphas(schedule: NoiseSchedule) -> Array:
    """Return alphas_cumprod [T] with a zero terminal value lifted to 2^-24, as diffusers does in sigma space."""
    alphas: Array = schedule.alphas_cumprod.numpy().copy()
    if schedule.scheduler_config.get("rescale_betas_zero_snr", False):
        alphas[-1] = 2.0**-24
    return alphas


def _sigmas(schedule: NoiseSchedule, timesteps: Array) -> Array:
    """Return sqrt((1 - a) / a) at the timesteps, and the final sigma [S + 1]."""
    alphas = _finite_alphas(schedule)
    sigmas = np.sqrt((1 - alphas) / alphas)
    kind = schedule.scheduler_config.get("final_sigmas_type", "zero")
    final = float(sigmas[0]) if kind == "sigma_min" else 0.0
    return np.append(np.interp(timesteps, np.arange(len(sigmas)), sigmas), final)


def _leading(steps: int, ratio: int, config: Mapping[str, Any]) -> Array:
    offset = float(config.get("steps_offset", 0))
    return np.arange(steps, dtype=np.float64)[::-1] * ratio + offset


def _trailing(spacing: str, steps: int, last: int, total: int) -> Array:
    if spacing != "trailing":
        raise BaseModelError(
            f"timestep_spacing {spacing!r} in {SCHEDULER_FILE} is not supported: "
            "use 'leading', 'trailing' or 'linspace'."
        )
    return np.arange(last, 0, -total / steps).round() - 1


def _check_range(timesteps: Array, total: int, steps: int) -> None:
    if timesteps.min() < 0 or timesteps.max() > total - 1:
        raise SpecError(
            f"steps: {steps} steps of this base's schedule ({SCHEDULER_FILE}: timestep_spacing, steps_offset) "
            f"leave its {total} timesteps; use fewer steps."
        )
