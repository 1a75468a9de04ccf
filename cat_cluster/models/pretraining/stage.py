"""The resumable training loop that every stage of the pretraining shares."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Stateful(Protocol):
    """What a checkpoint can hold: modules and optimisers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class StageProgress:
    """Where a stage is: `progress` in [0, 1] drives the schedules, `seconds` were trained so far, in all runs."""

    stage: str
    step: int
    progress: float
    seconds: float
    loss: float


Report = Callable[[StageProgress], None]


@dataclass(frozen=True)
class Stage:
    """One stage of the pretraining, and how it is trained here.

    It is checkpointed to `checkpoint` and ends after `seconds` of training in all runs; None: after the recipe's steps.
    """

    name: str
    checkpoint: Path
    device: str
    seed: int
    report: Report
    seconds: float | None = None
    compiled: bool = False


def run_stage(
    stage: Stage,
    steps: int,
    state: Mapping[str, Stateful],
    step: Callable[[int, float], torch.Tensor],
    *,
    every_seconds: float = 120.0,
) -> StageProgress:
    """Call `step(index, progress)` until the stage ends, resuming from its checkpoint and saving to it.

    `step` returns its loss (a scalar); all its randomness must come from its index, so that a resumed run
    continues the same run.
    """
    checkpoint = stage.checkpoint
    done, spent, loss = 0, 0.0, math.nan
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved["state"][name])
        done, spent, loss = saved["step"], saved["seconds"], saved["loss"]

    def progress() -> float:
        return min(1.0, done / steps if stage.seconds is None else spent / stage.seconds)

    def save() -> None:
        parts = {name: part.state_dict() for name, part in state.items()}
        partial = checkpoint.with_suffix(".partial")
        torch.save({"state": parts, "step": done, "seconds": spent, "loss": loss}, partial)
        os.replace(partial, checkpoint)  # a kill leaves the old checkpoint or the new one

    saved_at = spent
    while progress() < 1.0:
        begun = time.monotonic()
        latest = float(step(done, progress()).detach())
        loss = latest if math.isnan(loss) else 0.98 * loss + 0.02 * latest
        done, spent = done + 1, spent + time.monotonic() - begun
        stage.report(StageProgress(stage.name, done, progress(), spent, loss))
        if spent - saved_at >= every_seconds:
            save()
            saved_at = spent
    save()
    return StageProgress(stage.name, done, 1.0, spent, loss)


def half_precision(device: str, *, enabled: bool = True) -> torch.autocast:
    """Forwards in bf16 where the device computes in it: a processor without such instructions is slower for it."""
    fast = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=enabled and fast)


def learning_rate_at(progress: float, peak: float, warm_up: float = 0.02) -> float:
    """Learning rate: linear warm-up, then a cosine to 0."""
    if progress < warm_up:
        return peak * max(progress, 1e-4) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def optimise(
    loss: torch.Tensor, model: nn.Module, optimiser: torch.optim.Optimizer, learning_rate: float, clip: float = 1.0
) -> None:
    """One optimiser step at `learning_rate`, gradients clipped to a global norm of `clip`."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of parameters, faster in the first steps; buffers are copied."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)
