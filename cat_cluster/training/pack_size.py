"""How many adapters fit into one forward: measured on a step of one and of two of them."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from cat_cluster.data.draws import ConceptMaterial
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.training.loop import PackMember, train_pack

LARGEST_PACK = 32  # beyond it rows hardly get cheaper, and an interruption costs more adapters their steps
SHARE = 0.7  # of the free memory; allocators fragment and other processes live too


def measured_pack_size(base: BaseModel, bank: LoraBank, members: Sequence[PackMember], *, shared_by: int = 1) -> int:
    """Return the largest pack of adapters like `members` (two) whose step fits the memory that is free now.

    A step's peak is taken as a + b K for K adapters: measured at K = 1 and 2, solved for the free memory, 1 to 32.
    shared_by: packs that train at once in that memory.
    """
    members = _of_one_size(members)
    _peak_bytes(base, bank, members[:1])  # the first step warms caches and allocators; it is not counted
    one, two = (_peak_bytes(base, bank, members[:count]) for count in (1, 2))
    each = max(two - one, 1)
    return max(1, min(LARGEST_PACK, 1 + int((SHARE * free_bytes(base.device) / shared_by - one) / each)))


def _of_one_size(members: Sequence[PackMember]) -> list[PackMember]:
    """Return the members with photos of one size, the largest: one call for all rows is what a step takes at most."""
    views = [view for member in members for concept in member.task.concepts for view in concept.moments]
    largest = max(views, key=torch.numel)
    return [
        replace(
            member, task=replace(member.task, concepts=tuple(_all_like(one, largest) for one in member.task.concepts))
        )
        for member in members
    ]


def _all_like(concept: ConceptMaterial, view: Tensor) -> ConceptMaterial:
    masks = tuple(None if mask is None else torch.ones(1, *view.shape[1:]) for mask in concept.masks)
    return replace(concept, moments=(view,) * len(concept.moments), masks=masks)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that nobody uses; for the CPU what the machine and its container leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # a container's own limit, where there is one
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _peak_bytes(base: BaseModel, bank: LoraBank, members: Sequence[PackMember]) -> int:
    """Return what one step needs beyond what is held before it."""
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
        before = torch.cuda.memory_allocated(base.device)
        train_pack(base, bank, members, steps=1)
        return torch.cuda.max_memory_allocated(base.device) - before
    before = _reset_peak()
    train_pack(base, bank, members, steps=1)
    return max(0, peak_resident() - before)


def _reset_peak() -> int:
    """Start a new peak of this process's resident memory, and return what it holds now."""
    with suppress(
        OSError
    ):  # only Linux can; elsewhere the peak since the process began counts, and packs come out smaller
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Return the most bytes of memory that this process has held at once, since its last reset."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
