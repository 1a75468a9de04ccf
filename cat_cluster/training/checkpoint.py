"""Training checkpoints in the object store, one series per adapter: free of world size and of the pack.

A checkpoint is two objects, `<prefix>/<step>.safetensors` and, written last, `<prefix>/<step>.json`, which names
the digest of the first: a reader that finds the marker finds a whole checkpoint, or says that it is damaged. Tensors
are named `<module path>.lora_A.value` and `.lora_A.<name>` for what the optimiser keeps: no position means anything.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cat_cluster.errors import CheckpointError, ObjectNotFoundError, ObjectUnreadableError, SupersededError
from cat_cluster.store.protocol import ObjectStore

KEEP_CHECKPOINTS = 2
WRITERS = 4  # threads; a write waits for the store, not for the processor


@dataclass(frozen=True, eq=False)
class AdapterState:
    """An adapter after `step` steps.

    parameters: name -> "value" and what the optimiser keeps, by name. dropped: why training was given up, if it was.
    loss_curves, drift_budget: what LossCurves and DriftBudget keep of it, as JSON. numbers: what the optimiser keeps of
    it as a whole.
    """

    step: int
    parameters: Mapping[str, Mapping[str, Tensor]]
    dropped: str | None = None
    loss_curves: dict[str, Any] = field(default_factory=dict)
    drift_budget: list[list[float | None]] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    def ended(self, last: int) -> bool:
        """Say whether it trains no more: it was dropped, or has done its last step."""
        return self.dropped is not None or self.step >= last


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one adapter revision under `prefix` of a store; `run` names what is being trained.

    on_saved is called after each stored checkpoint with the seconds it took and its bytes.
    """

    store: ObjectStore
    prefix: str
    run: str
    on_saved: Callable[[float, int], None] | None = None

    def save(self, state: AdapterState) -> None:
        """Write a checkpoint, marker last, then remove all but the newest two."""
        started = time.perf_counter()
        tensors = {
            f"{name}.{part}": tensor.detach().cpu().contiguous()
            for name, parts in state.parameters.items()
            for part, tensor in parts.items()
        }
        data = save(tensors)
        marker = {
            "run": self.run,
            "step": state.step,
            "sha256": hashlib.sha256(data).hexdigest(),
            "dropped": state.dropped,
            "loss_curves": state.loss_curves,
            "drift_budget": state.drift_budget,
            "numbers": state.numbers,
        }
        self.store.put(self._key(state.step, "safetensors"), data)
        self.store.put(self._key(state.step, "json"), json.dumps(marker).encode())
        for step in self.steps()[:-KEEP_CHECKPOINTS]:
            self._remove(step)
        if self.on_saved is not None:
            self.on_saved(time.perf_counter() - started, len(data))

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first; reading one may still find it damaged."""
        names = [key.rsplit("/", 1)[-1] for key in self.store.list(f"{self.prefix}/")]
        return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))

    def load(self, step: int, names: Collection[str]) -> AdapterState:
        """Return a checkpoint with the tensors `names`, as tensor_names gives them.

        Raises CheckpointError when it is damaged, belongs to another run, or has not exactly these tensors; StoreError
        when the store cannot be asked.
        """
        remedy = f"remove {self.prefix} in {self.store.url} to train from the start"
        try:
            marker = json.loads(self.store.get(self._key(step, "json")))
            data = self.store.get(self._key(step, "safetensors"))
            if hashlib.sha256(data).hexdigest() != marker["sha256"]:
                raise CheckpointError(f"checkpoint {step} is damaged: its tensors do not match their digest; {remedy}")
            if marker["run"] != self.run:
                raise CheckpointError(f"checkpoint {step} belongs to another run, {marker['run']}; {remedy}")
            tensors = load(data)
            if differing := sorted(set(names) ^ tensors.keys()):
                what = "lacks" if differing[0] in names else "has the unknown tensor"
                raise CheckpointError(f"checkpoint {step} {what} {differing[0]}; {remedy}")
            return AdapterState(
                step=int(marker["step"]),
                parameters=_by_parameter({name: tensors[name] for name in names}),
                dropped=marker["dropped"],
                loss_curves=dict(marker["loss_curves"]),
                drift_budget=list(marker["drift_budget"]),
                numbers=dict(marker.get("numbers", {})),  # of the time of AdamW alone there are none
            )
        except (ObjectNotFoundError, ObjectUnreadableError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {step} is damaged ({error}); {remedy}") from error

    def clear(self) -> None:
        """Remove every checkpoint, markers first, and what a crash left of one."""
        keys = self.store.list(f"{self.prefix}/")
        for key in sorted(keys, key=lambda key: not key.endswith(".json")):
            self.store.delete(key)

    def _remove(self, step: int) -> None:
        for suffix in ("json", "safetensors"):
            self.store.delete(self._key(step, suffix))

    def _key(self, step: int, suffix: str) -> str:
        return f"{self.prefix}/{step:08d}.{suffix}"


class CheckpointWriter:
    """Writes the checkpoints of a pack while training goes on; a context manager that ends with all of them stored.

    They are taken twice as often as `checkpoint_every` asks, and a new one waits until the one before is stored: at
    any moment the newest stored one is at most `checkpoint_every` steps old.
    """

    def __init__(self, checkpoint_every: int) -> None:
        """checkpoint_every: in steps."""
        self._interval = max(1, checkpoint_every // 2)
        self._wait_at_once = checkpoint_every == 1
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="checkpoint")  # none starts before it is used
        self._writing: list[tuple[CheckpointStore, Future[None]]] = []
        self.refused: set[CheckpointStore] = set()

    def due(self, step: int) -> bool:
        """Say whether a checkpoint is to be taken after `step` steps."""
        return step % self._interval == 0

    def save(self, states: Sequence[tuple[CheckpointStore, AdapterState]]) -> None:
        """Copy the states of some adapters and write each to its series in the background.

        Raises StoreError when the checkpoint before could not be stored.
        """
        self.wait()
        copies = [(series, _copied(state)) for series, state in states]
        self._writing = [(series, self._threads.submit(series.save, state)) for series, state in copies]
        if self._wait_at_once:
            self.wait()

    def wait(self) -> None:
        """Wait until all that was handed over is stored; raises the first error.

        A series whose run another driver has taken over is none: it is noted in `refused`, and the others go on.
        """
        writing, self._writing = self._writing, []
        errors = []
        for series, future in writing:
            error = future.exception()
            if isinstance(error, SupersededError):
                self.refused.add(series)
            elif error is not None:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._threads.shutdown(wait=True)


def _copied(state: AdapterState) -> AdapterState:
    return replace(
        state,
        parameters={
            name: {part: tensor.detach().to("cpu", copy=True) for part, tensor in parts.items()}
            for name, parts in state.parameters.items()
        },
    )


def tensor_names(parameters: Iterable[str], state: Iterable[str]) -> list[str]:
    """Return the names of a checkpoint's tensors: of each parameter its value and what the optimiser keeps of it."""
    parts = ("value", *state)
    return [f"{name}.{part}" for name in parameters for part in parts]


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, part = full_name.rpartition(".")
        found.setdefault(name, {})[part] = tensor
    return found


def load_newest(
    stores: Sequence[CheckpointStore], names: Sequence[Collection[str]], ends: Sequence[int]
) -> list[AdapterState | None]:
    """Return where each adapter of a pack goes on; None is its start.

    names: of each adapter's tensors. ends: each adapter's last step.
    Adapters that trained side by side go on at one step, the newest that all have whole, so that a resumed run ends
    as the whole one to the bit; those that were at their end by then stay there. Where they have no step in common,
    each goes on at its own newest.
    A damaged checkpoint is skipped for the one before. Raises CheckpointError where an adapter has damaged ones only.
    """
    kept = [_Kept(store, own) for store, own in zip(stores, names, strict=True)]
    newest = [one.newest() for one in kept]
    for step in sorted({0, *(step for one in kept for step in one.steps)}, reverse=True):
        with suppress(CheckpointError):
            return [
                own if own is not None and own.step <= step and own.ended(end) else one.at(step)
                for one, own, end in zip(kept, newest, ends, strict=True)
            ]
    return newest


class _Kept:
    """The checkpoints of one adapter, each read once."""

    def __init__(self, store: CheckpointStore, names: Collection[str]) -> None:
        self._store, self._names = store, names
        self.steps = store.steps()
        self._complete = len(self.steps) < KEEP_CHECKPOINTS  # none was removed: its start is one of them
        self._read: dict[int, AdapterState] = {}

    def newest(self) -> AdapterState | None:
        """Return the newest whole one, None where there is none; raises CheckpointError where all are damaged."""
        for step in reversed(self.steps):
            try:
                return self.at(step)
            except CheckpointError as error:
                damage = error
        if self.steps:
            raise damage
        return None

    def at(self, step: int) -> AdapterState | None:
        """Return the one of a step, None for the start; raises CheckpointError where there is none, or no whole one."""
        if step == 0 and self._complete:
            return None
        if step not in self.steps:
            raise CheckpointError(f"there is no checkpoint {step} under {self._store.prefix}")
        if step not in self._read:
            self._read[step] = self._store.load(step, self._names)
        return self._read[step]
