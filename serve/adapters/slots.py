"""The slots of the device: which adapter each row of the pool holds, who uses it, and the one copy that fills it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from cat_cluster.registry import Manifest
from serve.adapters.loader import Key, Tier, key_of


@dataclass(eq=False)
class Slot:
    """A row of the pool, `flat` [F]. manifest: what it holds, None while it is empty or being filled.

    text: of an adapter that changes text encoders its vector for them [T], which is never written again. reads: for
    each CUDA stream that read the row for a lease, the point up to which it did.
    """

    index: int
    flat: Tensor
    text: Tensor | None = None
    manifest: Manifest | None = None
    leases: int = 0
    pinned: bool = False
    reads: dict[int, torch.cuda.Event] = field(default_factory=dict)


class Lease:
    """The right to read a slot: until `release`, `flat` [F], its row of the pool, holds the adapter of `manifest`.

    text [T] is the adapter's for text encoders, None where it changes none; whoever has it may read it for ever.
    On CUDA, release it on the stream that reads it, once the reads are enqueued; they need not be done.
    """

    def __init__(self, slot: Slot, manifest: Manifest, give_back: Callable[[Lease], None]) -> None:
        """`give_back` is called on the event loop that runs now, once per release."""
        self.slot, self.manifest, self.flat, self.text = slot, manifest, slot.flat, slot.text
        self.tier: Tier = "slot"  # where the adapter was found
        self.released = False
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()

    def release(self) -> None:
        """Give the slot back, from any thread; again is no error. The slot is free at the loop's next turn."""
        if self.flat.is_cuda:
            stream = torch.cuda.current_stream(self.flat.device)
            self.slot.reads[stream.cuda_stream] = stream.record_event()
        with suppress(RuntimeError):  # the loop is closed, and nobody wants the slot any more
            self._loop.call_soon_threadsafe(self._give_back, self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Slots:
    """The slots of a pool [slots, F]. Used on one event loop, except that one thread at a time may `write`."""

    def __init__(self, pool: Tensor) -> None:
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]
        self._count = len(pool)
        self._empty = [Slot(index, pool[index]) for index in reversed(range(len(pool)))]
        self._held: OrderedDict[Key, Slot] = OrderedDict()  # the least recently used first
        self.leased = 0  # slots with a lease
        self.pinned = 0

    def __len__(self) -> int:
        return self._count

    def held(self) -> list[tuple[Slot, Manifest]]:
        """Return the slots that hold an adapter, and what they hold, in the order of the pool."""
        slots = sorted(self._held.values(), key=lambda slot: slot.index)
        return [(slot, slot.manifest) for slot in slots if slot.manifest is not None]

    def find(self, key: Key) -> Slot | None:
        """Return the slot that holds an adapter, None if there is none."""
        return self._held.get(key)

    def of(self, adapter_id: str, revision: str) -> list[Slot]:
        """Return the slots that hold a revision: two, if it was deleted and then published with other weights."""
        return [slot for key, slot in self._held.items() if key[:2] == (adapter_id, revision)]

    def lease(self, slot: Slot, give_back: Callable[[Lease], None]) -> Lease:
        """Count one more user of a slot."""
        assert slot.manifest is not None
        self._held.move_to_end(key_of(slot.manifest))
        slot.leases += 1
        self.leased += slot.leases == 1
        return Lease(slot, slot.manifest, give_back)

    def give_back(self, lease: Lease) -> None:
        """Count one user less, the first time that a lease is given back."""
        if not lease.released:
            lease.released = True
            lease.slot.leases -= 1
            self.leased -= lease.slot.leases == 0

    def pin(self, slot: Slot, pinned: bool) -> None:
        """Say whether a slot may never be taken."""
        self.pinned += pinned - slot.pinned
        slot.pinned = pinned

    def take(self, wanted: Container[Key]) -> tuple[Slot, bool] | None:
        """Return a slot to fill and whether it was taken from another adapter.

        None when every slot is leased, pinned, or holds an adapter of `wanted`.
        """
        if self._empty:
            return self._empty.pop(), False
        for key, slot in self._held.items():
            if not slot.leases and not slot.pinned and key not in wanted:
                self._release(slot)
                return slot, True
        return None

    def write(self, slot: Slot, vector: Tensor) -> None:
        """Copy a vector [F] or [F + T] from host memory into a slot that was taken, and return when it is there."""
        of_rows, of_text = vector[: len(slot.flat)], vector[len(slot.flat) :]
        with torch.inference_mode():
            if self._stream is None:
                slot.flat.copy_(of_rows)
                slot.text = of_text.clone() if len(of_text) else None
                return
            with torch.cuda.stream(self._stream):
                for event in slot.reads.values():
                    self._stream.wait_event(event)
                slot.flat.copy_(of_rows, non_blocking=True)
                slot.text = of_text.to(slot.flat.device, non_blocking=True) if len(of_text) else None
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
        slot.manifest, slot.text = None, None
