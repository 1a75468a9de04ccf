"""What computes a pack's steps: the student's forward and backward, the sum over workers, the optimiser's step.

The loop knows engines by this protocol alone; `cluster/zero.py` holds the one that DeepSpeed shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, distributed, nn

from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.optimizer import SlotOptimizer

Slots: TypeAlias = Sequence[tuple[Mapping[str, nn.Parameter], TrainingSpec]]
# By name, of each parameter of a slot in parameter order: what the optimiser keeps, and the "value".
SlotState: TypeAlias = Sequence[Mapping[str, Tensor]]


class TrainingEngine(Protocol):
    """Computes the steps of one pack on `world_size` workers; every method is called by all of them together.

    joined_teacher: the teacher's rows ride in the student's call, so that a step is one forward and one backward.
    """

    rank: int
    world_size: int
    joined_teacher: bool
    optimizer: SlotOptimizer

    def predict(self, noisy_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the student's prediction [B, C, H, W]; the rows are bound to their slots by the caller."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's part of the loss."""

    def step(self) -> None:
        """Sum the gradients over the workers, update every active slot once, and forget the gradients."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the workers' tensors."""

    def slot_state(self, slot: int) -> SlotState:
        """Return the value of each parameter of a slot and what the optimiser keeps of it, whole, by name."""

    def close(self) -> None:
        """Let go of the U-Net and the parameters, so that another engine may have them."""


EngineFactory: TypeAlias = Callable[[BaseModel, Slots, Sequence[SlotState | None], bool], TrainingEngine]


class TorchEngine:
    """Plain torch: one worker, or data-parallel workers that hold everything and sum their gradients."""

    joined_teacher = False

    def __init__(self, base: BaseModel, slots: Slots, saved: Sequence[SlotState | None], bf16: bool) -> None:
        """slots: parameters by name and settings of each. saved: what the optimiser kept of those that go on."""
        self._base = base
        self._bf16 = bf16
        self.optimizer = SlotOptimizer(slots)
        self._slots = [list(parameters.values()) for parameters, _ in slots]
        parallel = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if parallel else 0
        self.world_size = distributed.get_world_size() if parallel else 1
        for slot, states in enumerate(saved):
            for parameter, state in zip(self._slots[slot], states, strict=True) if states is not None else ():
                for name, kept in self.optimizer.state_of(slot, parameter).items():
                    kept.copy_(state[name])

    def predict(self, noisy_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the student's prediction [B, C, H, W]."""
        with autocast(self._base, bf16=self._bf16):
            arguments = conditioning.arguments()
            prediction: Tensor = self._base.unet(noisy_BCHW, timestep_B, **arguments, return_dict=False)[0]
        return prediction

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's part of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Sum the gradients over the workers, update every active slot once, and forget the gradients."""
        if self.world_size > 1:
            # A dropped slot gets a gradient of zeros like any other, so all workers sum the same tensors.
            gradients = [p.grad for parameters in self._slots for p in parameters if p.grad is not None]
            flat = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        self.optimizer.step()
        self.optimizer.finish_step()
        self.optimizer.zero_grad(set_to_none=True)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the workers' tensors."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def slot_state(self, slot: int) -> SlotState:
        """Return the value of each parameter of a slot and what the optimiser keeps of it, by name."""
        return [{"value": p.detach(), **self.optimizer.state_of(slot, p)} for p in self._slots[slot]]

    def close(self) -> None:
        """It has put nothing into the U-Net."""


def autocast(base: BaseModel, *, bf16: bool) -> AbstractContextManager[object]:
    """The arithmetic of the U-Net calls: bfloat16 where that is asked for, else as the tensors are."""
    return torch.autocast(base.device.type, torch.bfloat16) if bf16 else nullcontext()
