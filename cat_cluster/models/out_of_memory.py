"""Errors of memory, as torch, Python and Ray have them, in one sentence: what there was, and what to change."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cat_cluster.errors import OutOfMemoryError

_ON_CPU = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory: you tried to allocate (\d+) bytes")
_ON_GPU = re.compile(r"out of memory\. Tried to allocate ([\d.]+ \w+)")
_GPU_SIZE = re.compile(r"has a total capacity of ([\d.]+ \w+)")
_GPU_HELD = re.compile(r"this process has ([\d.]+ \w+) memory in use")


@contextmanager
def memory_explained(adapters: int | None = None) -> Iterator[None]:
    """Turn an error of memory inside the block into OutOfMemoryError. adapters: how many train there, if any."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        asked = asked_for(error)
        if asked is None:
            raise
        raise short_of_memory(asked if "GPU" in asked else f"{asked}, where {_held_here()}", adapters) from error


def asked_for(error: BaseException) -> str | None:
    """Return how much more memory was asked for than there was; None when the error is not one of memory."""
    text = str(error)
    if (cpu := _ON_CPU.search(text)) is not None:
        return f"{_gib(int(cpu[1]))} more were asked for"
    if (gpu := _ON_GPU.search(text)) is not None:
        size, held = _GPU_SIZE.search(text), _GPU_HELD.search(text)
        whole = "" if size is None else f" of {size[1]}"
        in_use = "" if held is None else f", where the process held {held[1]}"
        return f"{gpu[1]} more were asked for on a GPU{whole}{in_use}"
    return "Python could get no more" if isinstance(error, MemoryError) else None


def short_of_memory(what: str, adapters: int | None = None) -> OutOfMemoryError:
    """Return the error whose message says what happened and what to change. adapters: how many trained together."""
    more = "give it more memory (a worker in Kubernetes: `k8s render --worker-memory`)"
    if adapters == 1:
        more = f"lower training.rows_per_concept, set training.gradient_checkpointing, or {more}"
    elif adapters is not None:
        more = f"lower cluster.max_pack (here {adapters} trained together) or training.rows_per_concept, or {more}"
    return OutOfMemoryError(f"out of memory: {what}; {more}")


def _held_here() -> str:
    """Say what this process has held of the memory that its machine, or its container, has."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # a container's own limit, where there is one
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"the process held up to {_gib(held)} and its machine or pod has {_gib(limit)}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
