"""The engine that DeepSpeed shards: ZeRO stages 0 to 3 over the workers of a pack. The only user of deepspeed.

Stage 0 replicates all; 1 and 2 shard the optimiser's moments (and the summed gradients); 3 shards the frozen base
too, and its step is one forward and one backward, with the teacher's rows in the student's call.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cat_cluster.errors import CatClusterError
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.engine import EngineFactory, Slots, SlotState, autocast
from cat_cluster.training.optimizer import SlotOptimizer, rate_factor, state_names
from cat_cluster.training.update_rules import RULES

TESTED = "0.19"  # parts of DeepSpeed that are not its public interface are used as they are in this version
LARGEST_NORM = 1e18  # of a tensor's gradient; the square of a larger one is no float32


class ZeroEngine:
    """One worker of a pack under DeepSpeed; the process group must be there."""

    def __init__(
        self, base: BaseModel, slots: Slots, saved: Sequence[SlotState | None], bf16: bool, *, stage: int
    ) -> None:
        """slots: parameters by name and settings of each slot, values in place; they are the engine's from now.

        So is the U-Net. saved: what the optimiser kept of each slot that goes on. stage: ZeRO stage, 0 to 3.
        """
        for _, training in slots:
            if stage > 0 and not RULES[training.optimizer].on_shards:
                raise ValueError(f"ZeRO {stage} shards the parameters, and {training.optimizer} needs them whole")
        self.rank = distributed.get_rank()
        self.world_size = distributed.get_world_size()
        self.joined_teacher = stage == 3
        self.optimizer = SlotOptimizer(slots)
        self._stage = stage
        self._slots = [list(parameters.values()) for parameters, _ in slots]
        self._names = [state_names(training) for _, training in slots]
        self._sizes = [[parameter.numel() for parameter in parameters] for parameters in self._slots]
        self._shapes = [[parameter.shape for parameter in parameters] for parameters in self._slots]
        self._not_finite = torch.zeros(len(slots), device=base.device)
        largest = max(size for sizes in self._sizes for size in sizes)
        _do_without_compiler()
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=_Student(base, [p for parameters in self._slots for p in parameters], bf16, sharded=stage == 3),
            optimizer=self.optimizer,
            config=_config(stage, largest),
            dist_init_required=False,
        )
        if stage in (1, 2, 3):
            self.optimizer.sum_over_shards = self.sum
            weighted = [
                slot
                for slot, (parameters, training) in enumerate(slots)
                if any(rate_factor(training, name) != 1.0 for name in parameters)
            ]
            self.optimizer.runs = {slot: self._runs(slot, *slots[slot]) for slot in weighted}
        if stage == 3:
            # DeepSpeed gathers what stays whole after each step; the first forward needs it before.
            whole = self._engine.optimizer.persistent_parameters
            whole[0].all_gather(whole)
            self._guard_norms()
        for slot, states in enumerate(saved):
            if states is not None:
                self._restore(slot, states)

    def predict(self, noisy_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the student's prediction [B, C, H, W]; the rows are bound to their slots by the caller."""
        prediction: Tensor = self._engine(noisy_BCHW, timestep_B, **conditioning.arguments())
        return prediction

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's part of the loss; DeepSpeed takes the mean over workers, we the sum."""
        self._engine.backward(loss * self.world_size)

    def step(self) -> None:
        """Update every active slot once, and forget the gradients, which were summed in the backward."""
        if self._stage == 3:
            # DeepSpeed would skip the whole step for one bad slot: its gradients were set to 0 on the way, and all
            # workers agree here that it is dropped.
            for slot in self.sum(self._not_finite.clone()).nonzero().flatten().tolist():
                self.optimizer.drop(slot)
            self._not_finite.zero_()
        self._engine.step()
        self.optimizer.finish_step()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the workers' tensors."""
        distributed.all_reduce(values)
        return values

    def slot_state(self, slot: int) -> SlotState:
        """Return the value of each parameter of a slot and what the optimiser keeps of it, whole, by name."""
        found = {"value": [parameter.detach() for parameter in self._slots[slot]]}
        found |= {name: self._whole(slot, name) for name in self._names[slot]}
        return [dict(zip(found, tensors, strict=True)) for tensors in zip(*found.values(), strict=True)]

    def close(self) -> None:
        """Take DeepSpeed's hooks out of the U-Net; at stage 3 it stays sharded for the next engine."""
        self._engine.destroy()

    def _whole(self, slot: int, name: str) -> list[Tensor]:
        """Gather what the optimiser keeps under a name of every parameter of a slot from all workers."""
        if self._stage == 0:
            return [self.optimizer.state_of(slot, parameter)[name] for parameter in self._slots[slot]]
        shard = self.optimizer.state_of(slot, self._shard(slot))[name]
        gathered = shard.new_empty(self.world_size * shard.numel())
        distributed.all_gather_into_tensor(gathered, shard.contiguous())
        if self._stage < 3:
            pieces = torch.split(gathered[: sum(self._sizes[slot])], self._sizes[slot])
        else:
            # Each parameter is cut into equal parts of its own, so a worker's shard holds a part of every one.
            by_worker = gathered.view(self.world_size, -1)
            parts = torch.split(by_worker, [-(-size // self.world_size) for size in self._sizes[slot]], dim=1)
            pieces = tuple(whole.reshape(-1)[:size] for whole, size in zip(parts, self._sizes[slot], strict=True))
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes[slot], strict=True)]

    def _restore(self, slot: int, states: SlotState) -> None:
        for name in self._names[slot]:
            tensors = [state[name] for state in states]
            if self._stage == 0:
                for parameter, value in zip(self._slots[slot], tensors, strict=True):
                    self.optimizer.state_of(slot, parameter)[name].copy_(value)
            else:
                self.optimizer.state_of(slot, self._shard(slot))[name].copy_(self._cut(slot, tensors))

    def _cut(self, slot: int, tensors: Sequence[Tensor]) -> Tensor:
        """Return this worker's shard of a slot's tensors, flat, as DeepSpeed cuts the parameters."""
        if self._stage < 3:
            shard = self._shard(slot)
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            padded = nn.functional.pad(flat, (0, shard.numel() * self.world_size - flat.numel()))
            return padded[self.rank * shard.numel() : (self.rank + 1) * shard.numel()]
        parts = []
        for tensor in tensors:
            size = -(-tensor.numel() // self.world_size)
            padded = nn.functional.pad(tensor.reshape(-1), (0, size * self.world_size - tensor.numel()))
            parts.append(padded[self.rank * size : (self.rank + 1) * size])
        return torch.cat(parts)

    def _runs(
        self, slot: int, parameters: Mapping[str, nn.Parameter], training: TrainingSpec
    ) -> list[tuple[int, float]]:
        """Return how many elements of a slot's shard, one after the other, have which factor on the learning rate."""
        factors = [
            torch.full(shape, rate_factor(training, name), dtype=torch.float64)
            for name, shape in zip(parameters, self._shapes[slot], strict=True)
        ]
        found, counts = torch.unique_consecutive(self._cut(slot, factors), return_counts=True)
        return list(zip(counts.tolist(), found.tolist(), strict=True))

    def _shard(self, slot: int) -> Tensor:
        """The flat parameter that stands for a slot's group on this worker."""
        zero = self._engine.optimizer
        flat: Tensor = (zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat)[
            slot
        ]
        return flat

    def _guard_norms(self) -> None:
        def guard(slot: int, gradient: Tensor) -> Tensor:
            if bool(torch.linalg.vector_norm(gradient) < LARGEST_NORM):  # false for a NaN too
                return gradient
            self._not_finite[slot] = 1.0
            return torch.zeros_like(gradient)

        for slot, parameters in enumerate(self._slots):
            for parameter in parameters:
                parameter.register_hook(functools.partial(guard, slot))  # type: ignore[no-untyped-call]


def zero_engine(stage: int) -> EngineFactory:
    """Return the maker of engines of one ZeRO stage."""

    def make(base: BaseModel, slots: Slots, saved: Sequence[SlotState | None], bf16: bool) -> ZeroEngine:
        return ZeroEngine(base, slots, saved, bf16, stage=stage)

    return make


class _Student(nn.Module):
    """The module that DeepSpeed sees: the bank's parameters and, where it is to be sharded, the U-Net."""

    def __init__(self, base: BaseModel, parameters: Sequence[nn.Parameter], bf16: bool, *, sharded: bool) -> None:
        super().__init__()
        if sharded:
            # DeepSpeed cuts flat memory, in which channels-last weights would come back in another order.
            self.unet = base.unet.to(memory_format=torch.contiguous_format)
        self._call = (base.unet,)  # in a tuple it is no submodule, and DeepSpeed leaves the replicated base alone
        self.adapters = nn.ParameterList(parameters)
        self._arithmetic = functools.partial(autocast, base, bf16=bf16)

    def forward(self, noisy: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        """Return the prediction [B, C, H, W]; conditioning: by the names of the U-Net's arguments."""
        with self._arithmetic():
            prediction: Tensor = self._call[0](noisy, timestep, **conditioning, return_dict=False)[0]
        return prediction


def _config(stage: int, largest_parameter: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        # Norms are per slot: DeepSpeed's global one would let a bad slot skip the step of all.
        zero["compute_grad_norm"] = False
    if stage == 3:
        # The adapters' tensors stay whole on every worker; what is larger, nearly all of the base, is sharded.
        zero["stage3_param_persistence_threshold"] = largest_parameter + 1
        zero["log_trace_cache_warnings"] = True  # a step that does not repeat the one before loses its prefetch
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step has as many backwards as the loop makes before `step`
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "wall_clock_breakdown": False,
    }


def _do_without_compiler() -> None:
    """Keep DeepSpeed from building C++ parts at run time: none of them is needed here.

    `__compatible_ops__` is no public interface; another version than the tested one must be looked at first.
    """
    version = importlib.metadata.version("deepspeed")
    if not version.startswith(f"{TESTED}."):
        raise CatClusterError(
            f"cluster.zero_stage needs deepspeed {TESTED}.x and finds {version}: install that one, or leave "
            "zero_stage out for plain torch"
        )
    import deepspeed.ops

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}
