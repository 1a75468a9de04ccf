"""The timesteps and noise levels that each sampler visits, chosen as diffusers' schedulers choose them.

A level is sigma = sqrt((1 - a) / a) of alphas_cumprod a: the noise of x = z / sqrt(a). Options come from the base's
scheduler config: timestep_spacing, steps_offset, final_sigmas_type and, for Karras' levels, sigma_min and sigma_max.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cat_cluster.errors import SpecError
from cat_cluster.models.schedule import SCHEDULER_FILE, NoiseSchedule

Array = npt.NDArray[np.float64]


def ddim_timesteps(schedule: NoiseSchedule, steps: int) -> Array:
    """Return DDIM's timesteps [S]."""
    config, total = schedule.scheduler_config, schedule.num_timesteps
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1].copy()
    elif spacing == "leading":
        timesteps = _leading(steps, total // steps, config)
    else:
        timesteps = _trailing(steps, total, total)
    _check_range(timesteps, total, steps)
    return timesteps


def euler_levels(schedule: NoiseSchedule, steps: int, *, karras: bool) -> tuple[Array, Array]:
    """Return the timesteps [S] and sigmas [S] of Euler's method; Karras' lie between the first and last of these."""
    config, total = schedule.scheduler_config, schedule.num_timesteps
    spacing = config.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        # Not rounded: diffusers gives the U-Net fractional timesteps here.
        timesteps = np.linspace(0, total - 1, steps)[::-1].astype(np.float32).astype(np.float64)
    elif spacing == "leading":
        timesteps = _leading(steps, total // steps, config)
    else:
        timesteps = _trailing(steps, total, total)
    _check_range(timesteps, total, steps)
    if karras:
        largest, smallest = _interpolated(timesteps[[0, -1]], _diffusers_sigmas(schedule)).tolist()
        sigmas = _karras(config, largest, smallest, steps)
        return _timesteps_of(schedule, sigmas).astype(np.float32).astype(np.float64), sigmas
    return timesteps, _interpolated(timesteps, _training_sigmas(schedule))


def dpmpp_levels(schedule: NoiseSchedule, steps: int, *, karras: bool) -> tuple[Array, Array]:
    """Return the timesteps [S] and sigmas [S] of DPM-Solver++; Karras' lie between the schedule's own ends."""
    config, total = schedule.scheduler_config, schedule.num_timesteps
    if karras:
        smallest, largest = _diffusers_sigmas(schedule)[[0, -1]].tolist()
        sigmas = _karras(config, largest, smallest, steps)
        timesteps = _timesteps_of(schedule, sigmas)
        # Whole ones: diffusers rounds them, and cuts those of the cosine schedule.
        is_cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
        return np.floor(timesteps) if is_cosine else timesteps.round(), sigmas
    spacing, training = config.get("timestep_spacing", "linspace"), _training_sigmas(schedule)
    lambdas = -np.log(training)
    last = total - int(np.searchsorted(lambdas[::-1], float(config.get("lambda_min_clipped", -np.inf))))
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].copy()
    elif spacing == "leading":
        timesteps = _leading(steps + 1, last // (steps + 1), config)[:-1]
    else:
        timesteps = _trailing(steps, last, total)
    _check_range(timesteps, total, steps)
    return timesteps, _interpolated(timesteps, training)


def lcm_timesteps(schedule: NoiseSchedule, steps: int) -> Array:
    """Return LCM's timesteps [S], of the original_inference_steps that it was distilled with, whatever the spacing."""
    total = schedule.num_timesteps
    distilled = int(schedule.scheduler_config.get("original_inference_steps", 50))
    if not steps <= distilled <= total:
        raise SpecError(
            f"steps: sampler 'lcm' makes at most the {distilled} steps that a base is distilled with "
            f"({SCHEDULER_FILE}: original_inference_steps, at most {total}); use fewer steps."
        )
    timesteps = np.arange(distilled, 0, -1, dtype=np.float64) * (total // distilled) - 1
    return timesteps[np.floor(np.linspace(0, distilled, num=steps, endpoint=False)).astype(np.int64)]


def final_sigma(schedule: NoiseSchedule) -> float:
    """Return the level behind the last step: none, or the schedule's smallest where final_sigmas_type is sigma_min."""
    kind = schedule.scheduler_config.get("final_sigmas_type", "zero")
    return float(_training_sigmas(schedule)[0]) if kind == "sigma_min" else 0.0


def _training_sigmas(schedule: NoiseSchedule) -> Array:
    """Return sigma at every timestep [T], with a zero terminal alpha lifted to 2^-24 as diffusers lifts it."""
    alphas: Array = schedule.alphas_cumprod.numpy().copy()
    if schedule.scheduler_config.get("rescale_betas_zero_snr", False):
        alphas[-1] = 2.0**-24
    sigmas: Array = np.sqrt((1 - alphas) / alphas)
    return sigmas


def _diffusers_sigmas(schedule: NoiseSchedule) -> npt.NDArray[np.float32]:
    """Return sigma at every timestep [T] with diffusers' rounding.

    It rounds or cuts the timesteps of Karras' levels, so that a last bit can make another of one.
    """
    alphas = schedule.alphas_cumprod.numpy().astype(np.float32)
    if schedule.scheduler_config.get("rescale_betas_zero_snr", False):
        alphas[-1] = 2.0**-24
    sigmas: npt.NDArray[np.float32] = np.sqrt((1 - alphas) / alphas)
    return sigmas


def _interpolated(timesteps: Array, sigmas: npt.NDArray[np.floating]) -> Array:
    values: Array = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    return values


def _timesteps_of(schedule: NoiseSchedule, sigmas: Array) -> Array:
    """Return the timesteps, with fractions, at which the schedule has these levels; linear in the level's logarithm."""
    training, wanted = np.log(_diffusers_sigmas(schedule)), np.log(sigmas)
    below = (np.searchsorted(training, wanted, side="right") - 1).clip(0, len(training) - 2)
    share = ((training[below] - wanted) / (training[below] - training[below + 1])).clip(0, 1)
    timesteps: Array = (1 - share) * below + share * (below + 1)
    return timesteps


def _karras(config: Mapping[str, Any], largest: float, smallest: float, steps: int) -> Array:
    """Return Karras' levels [S] (arXiv 2206.00364, equation 5, rho 7), from the largest to the smallest."""
    given_least, given_most = config.get("sigma_min"), config.get("sigma_max")
    least = (smallest if given_least is None else float(given_least)) ** (1 / 7)
    most = (largest if given_most is None else float(given_most)) ** (1 / 7)
    levels: Array = (most + np.linspace(0, 1, steps) * (least - most)) ** 7
    return levels


def _leading(steps: int, ratio: int, config: Mapping[str, Any]) -> Array:
    offset = float(config.get("steps_offset", 0))
    return np.arange(steps, dtype=np.float64)[::-1] * ratio + offset


def _trailing(steps: int, last: int, total: int) -> Array:
    return np.arange(last, 0, -total / steps).round() - 1


def _check_range(timesteps: Array, total: int, steps: int) -> None:
    if timesteps.min() < 0 or timesteps.max() > total - 1:
        raise SpecError(
            f"steps: {steps} steps of this base's schedule ({SCHEDULER_FILE}: timestep_spacing, steps_offset) "
            f"leave its {total} timesteps; use fewer steps."
        )
