"""Training checkpoints in the object store: LoRA weights, moments, step, drops and history; free of world size.

A checkpoint is two objects, `<prefix>/<step>.safetensors` and, written last, `<prefix>/<step>.json`, which names
the digest of the first: a reader that finds the marker finds a whole checkpoint, or says that it is damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cat_cluster.errors import CheckpointError, StoreError
from cat_cluster.store.protocol import ObjectStore

KEEP_CHECKPOINTS = 2


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where a pack stands after `step` steps.

    slots: per adapter, per parameter in bank order: (value, first moment, second moment).
    dropped: adapter id -> reason. history: what the loop has recorded so far (JSON).
    """

    step: int
    adapter_ids: tuple[str, ...]
    slots: tuple[tuple[tuple[Tensor, Tensor, Tensor], ...], ...]
    dropped: dict[str, str] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one pack, under `prefix` of a store; `run_digest` names what is being trained."""

    store: ObjectStore
    prefix: str
    run_digest: str

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, marker last, then remove all but the newest two."""
        tensors = {
            f"{a}.{p}.{part}": tensor.detach().cpu().contiguous()
            for a, slot in enumerate(state.slots)
            for p, parts in enumerate(slot)
            for part, tensor in zip(("value", "mean", "square"), parts, strict=True)
        }
        data = save(tensors)
        marker = {
            "run_digest": self.run_digest,
            "step": state.step,
            "adapter_ids": list(state.adapter_ids),
            "sha256": hashlib.sha256(data).hexdigest(),
            "dropped": state.dropped,
            "history": state.history,
        }
        self.store.put(self._key(state.step, "safetensors"), data)
        self.store.put(self._key(state.step, "json"), json.dumps(marker).encode())
        for step in self._steps()[:-KEEP_CHECKPOINTS]:
            self._remove(step)

    def latest(self) -> TrainingState | None:
        """Return the newest whole checkpoint, or None. A damaged one is passed over for the one before it.

        Raises CheckpointError when checkpoints exist but none of them can be read.
        """
        problems = []
        for step in reversed(self._steps()):
            try:
                return self._load(step)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"no readable checkpoint under {self.store.url}/{self.prefix}: {'; '.join(problems)}. "
                "Remove that prefix to train from the start."
            )
        return None

    def clear(self) -> None:
        """Remove every checkpoint of this pack, markers first."""
        for step in self._steps():
            self._remove(step)

    def _load(self, step: int) -> TrainingState:
        try:
            marker = json.loads(self.store.get(self._key(step, "json")))
            data = self.store.get(self._key(step, "safetensors"))
            if hashlib.sha256(data).hexdigest() != marker["sha256"]:
                raise CheckpointError(f"checkpoint {step}: the tensors do not match their digest")
            if marker["run_digest"] != self.run_digest:
                raise CheckpointError(f"checkpoint {step} belongs to another run")
            tensors = load(data)
            return TrainingState(
                step=int(marker["step"]),
                adapter_ids=tuple(marker["adapter_ids"]),
                slots=_unflatten(tensors, len(marker["adapter_ids"])),
                dropped=dict(marker["dropped"]),
                history=dict(marker["history"]),
            )
        except (StoreError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {step}: {error}") from error

    def _steps(self) -> list[int]:
        names = [key.rsplit("/", 1)[-1] for key in self.store.list(f"{self.prefix}/")]
        return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))

    def _remove(self, step: int) -> None:
        for suffix in ("json", "safetensors"):
            self.store.delete(self._key(step, suffix))

    def _key(self, step: int, suffix: str) -> str:
        return f"{self.prefix}/{step:08d}.{suffix}"


def _unflatten(tensors: dict[str, Tensor], adapters: int) -> tuple[tuple[tuple[Tensor, Tensor, Tensor], ...], ...]:
    counts = [sum(name.startswith(f"{a}.") and name.endswith(".value") for name in tensors) for a in range(adapters)]
    return tuple(
        tuple((tensors[f"{a}.{p}.value"], tensors[f"{a}.{p}.mean"], tensors[f"{a}.{p}.square"]) for p in range(n))
        for a, n in enumerate(counts)
    )


def run_digest(revisions: Sequence[str]) -> str:
    """Return the identity of a pack: the digest of what each of its adapters will become, in pack order."""
    return hashlib.sha256("\n".join(revisions).encode()).hexdigest()[:24]
