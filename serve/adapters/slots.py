"""The slots of the device: which adapter each row of the pool holds, who uses it, and the one copy that fills it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from cat_cluster.registry import Manifest
from serve.adapters.disk_and_host import Key, key_of


@dataclass(eq=False)
class Slot:
    """A row of the pool. manifest: what it holds, None while it is empty or being filled.

    reads: for each CUDA stream that read the row for a lease, the point up to which it did.
    """

    index: int
    manifest: Manifest | None = None
    leases: int = 0
    pinned: bool = False
    reads: dict[int, torch.cuda.Event] = field(default_factory=dict)


class Lease:
    """The right to read a slot: until `release`, `flat` [F], its row of the pool, holds the adapter of `manifest`.

    On CUDA, release it on the stream that reads it, once the reads are enqueued; they need not be done.
    """

    def __init__(self, manifest: Manifest, flat: Tensor, slot: Slot, give_back: Callable[[Lease], None]) -> None:
        self.manifest = manifest
        self.flat = flat
        self.slot = slot
        self.released = False
        self._give_back = give_back

    def release(self) -> None:
        """Give the slot back; again is no error."""
        self._give_back(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Slots:
    """The slots of a pool [slots, F]. Not thread-safe, except that one thread at a time may `write` without a lock."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]
        self._empty = [Slot(index) for index in reversed(range(len(pool)))]
        self._held: OrderedDict[Key, Slot] = OrderedDict()  # the least recently used first
        self.leased = 0  # slots with a lease
        self.pinned = 0

    def __len__(self) -> int:
        return len(self._pool)

    def held(self) -> list[Slot]:
        """Return the slots that hold an adapter, the least recently used first."""
        return list(self._held.values())

    def find(self, key: Key) -> Slot | None:
        """Return the slot that holds an adapter, None if there is none."""
        return self._held.get(key)

    def of(self, adapter_id: str, revision: str) -> list[Slot]:
        """Return the slots that hold a revision: two, if it was deleted and then published with other weights."""
        return [slot for key, slot in self._held.items() if key[:2] == (adapter_id, revision)]

    def row(self, slot: Slot) -> Tensor:
        """Return the slot's part [F] of the pool; it shares the pool's memory."""
        return self._pool[slot.index]

    def lease(self, slot: Slot) -> None:
        """Count one more user of a slot."""
        assert slot.manifest is not None
        self._held.move_to_end(key_of(slot.manifest))
        slot.leases += 1
        self.leased += slot.leases == 1

    def give_back(self, slot: Slot) -> None:
        """Count one user less; what the calling thread's CUDA stream was told to read is read before a `write`."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._pool.device)
            slot.reads[stream.cuda_stream] = stream.record_event()
        slot.leases -= 1
        self.leased -= slot.leases == 0

    def pin(self, slot: Slot, pinned: bool) -> None:
        """Say whether a slot may never be taken."""
        self.pinned += pinned - slot.pinned
        slot.pinned = pinned

    def take(self) -> tuple[Slot, bool] | None:
        """Return a slot to fill and whether it was taken from another adapter; None when all are leased or pinned."""
        if self._empty:
            return self._empty.pop(), False
        victim = next((slot for slot in self._held.values() if not slot.leases and not slot.pinned), None)
        if victim is None:
            return None
        self._release(victim)
        return victim, True

    def write(self, slot: Slot, vector: Tensor) -> None:
        """Copy a vector [F] from host memory into a slot that was taken, and return when it is there."""
        with torch.inference_mode():
            if self._stream is None:
                self.row(slot).copy_(vector)
                return
            with torch.cuda.stream(self._stream):
                for event in slot.reads.values():
                    self._stream.wait_event(event)
                self.row(slot).copy_(vector, non_blocking=True)
            self._stream.synchronize()
            slot.reads.clear()

    def fill(self, slot: Slot, manifest: Manifest) -> None:
        """Record what was written into a slot that was taken."""
        slot.manifest = manifest
        self._held[key_of(manifest)] = slot

    def empty(self, slot: Slot) -> None:
        """Forget what a slot without leases and pins holds, or give back one that was taken."""
        if slot.manifest is not None:
            self._release(slot)
        self._empty.append(slot)

    def _release(self, slot: Slot) -> None:
        assert slot.manifest is not None
        del self._held[key_of(slot.manifest)]
        slot.manifest = None
