"""Several processes on one storage, and a disk that fills up while publishing: real processes, real limits."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_cluster.errors import StoreError
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.registry import AdapterDraft, Registry
from cat_cluster.store import LocalStore

pytestmark = pytest.mark.slow

MakeDraft = Callable[..., AdapterDraft]
Work = Callable[..., Any]


def _run(work: Work, folder: Path, argument: object, barrier: Barrier, results: Queue[Any]) -> None:
    torch.set_num_threads(1)
    registry = Registry(LocalStore(folder))
    barrier.wait(timeout=120)
    results.put(work(registry, argument))


def in_processes(work: Work, folder: Path, arguments: Sequence[object]) -> list[Any]:
    """Run the work once for each argument, all at the same moment, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(arguments)), context.Queue()
    workers = [context.Process(target=_run, args=(work, folder, one, barrier, results)) for one in arguments]
    for worker in workers:
        worker.start()
    collected = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    return collected


def publish_and_move(registry: Registry, draft: AdapterDraft) -> tuple[str, list[int]]:
    """Publish, then move alias `prod` 20 times; the manifest as JSON and the numbers of the moves."""
    manifest = registry.publish(draft)
    moves = [registry.set_alias("cup", "prod", manifest.revision).number for _ in range(20)]
    return manifest.model_dump_json(), moves


def test_two_processes_publish_one_revision_and_lose_no_move(
    registry: Registry, make_draft: MakeDraft, tmp_path: Path
) -> None:
    # Same spec and photos, but weights that differ in their bits, as two machines would train them.
    drafts = [make_draft(), make_draft(weights=make_draft(seed=9).weights)]
    (one, one_moves), (other, other_moves) = in_processes(publish_and_move, tmp_path / "storage", drafts)
    assert one == other
    (manifest,) = registry.revisions("cup")
    assert manifest.model_dump_json() == one
    assert registry.verify("cup").problems == ()
    assert set(registry.store.list("objects/")) == {stored.key for stored in manifest.objects.values()}
    assert len(registry.alias_history("cup", "latest")) == 1
    assert sorted(one_moves + other_moves) == list(range(1, 41))
    history = registry.alias_history("cup", "prod")
    assert [entry.number for entry in history] == list(range(1, 41))
    assert len({entry.nonce for entry in history}) == 40


def publish_on_a_small_disk(registry: Registry, draft: AdapterDraft) -> str:
    """Publish while no file may be larger than 64 KiB; return the error's message."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    with pytest.raises(StoreError) as caught:
        registry.publish(draft)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert registry.list() == []
    return str(caught.value)


def test_a_disk_that_fills_while_publishing_leaves_nothing_behind(
    registry: Registry, make_draft: MakeDraft, make_weights: Callable[..., AdapterWeights], tmp_path: Path
) -> None:
    too_large = {"a.png": b"small", "b.png": bytes(100_000)}
    draft = make_draft(weights=make_weights(rank=1), samples=too_large)
    (message,) = in_processes(publish_on_a_small_disk, tmp_path / "storage", [draft])
    assert str(tmp_path / "storage") in message
    assert "free 0.1 MB or more" in message
    # The weights and the small sample were stored before the large one failed, and are given back.
    assert [path for path in (tmp_path / "storage").rglob("*") if path.is_file()] == []
    manifest = registry.publish(draft)
    assert registry.verify(manifest.name).ok
