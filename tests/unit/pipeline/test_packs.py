"""Which adapters train together, and how many at most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from cat_cluster.errors import CheckpointError
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.pipeline.job import pack_size, plan_packs
from cat_cluster.pipeline.prepare import PreparedAdapter
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import LocalStore
from cat_cluster.training import pack_size as memory
from cat_cluster.training.loop import PackMember
from tests.unit.training.test_loop import members, other_optimisers

RANKS, PRECISIONS, BASES = (8, 2, 4, 16), ("fp32", "bf16"), ("one", "other")
MEGABYTE = 2**20


def job_of(adapters: Sequence[dict[str, Any]], **cluster: Any) -> JobSpec:
    concepts = [{"token": "sks", "class_noun": "cup", "images": "photos"}]
    return JobSpec.model_validate(
        {"name": "packs", "adapters": [{"concepts": concepts, **one} for one in adapters], "cluster": cluster}
    )


def prepared(job: JobSpec) -> list[PreparedAdapter]:
    """The adapters of a job without photos, and with the name of a base in place of one."""
    return [
        PreparedAdapter(one, (), SimpleNamespace(fingerprint=one.base, resolution=16), f"r-{one.id}")  # type: ignore[arg-type]
        for one in job.resolved()
    ]


@pytest.fixture
def fifty() -> list[PreparedAdapter]:
    """Two bases, two precisions, four ranks, in no order."""
    return prepared(
        job_of(
            [
                {
                    "id": f"a-{n}",
                    "base": BASES[n % 3 % 2],
                    "training": {"rank": RANKS[n % 4], "precision": PRECISIONS[n % 7 % 2]},
                }
                for n in range(50)
            ]
        )
    )


def kind(adapter: PreparedAdapter) -> tuple[str, str]:
    return adapter.base.fingerprint, adapter.resolved.training.precision


@pytest.mark.parametrize("limit", [1, 3, 8, 32, 50])
def test_packs_are_even_and_of_one_base_and_one_precision(
    fifty: list[PreparedAdapter], tmp_path: Path, limit: int
) -> None:
    asked: list[tuple[str, str]] = []

    def largest(group: Sequence[PreparedAdapter]) -> int:
        asked.append(kind(group[0]))
        return limit

    packs = plan_packs(fifty, LocalStore(tmp_path), largest)
    assert sorted(one.resolved.id for pack in packs for one in pack) == sorted(one.resolved.id for one in fifty)
    kinds = {kind(one) for one in fifty}
    assert len(kinds) == 4
    assert sorted(asked) == sorted(kinds), "the limit is asked for once per group"
    for one in kinds:
        sizes = [len(pack) for pack in packs if kind(pack[0]) == one]
        assert max(sizes) <= limit
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-sum(sizes) // limit), "no more packs than it takes"
    assert all(len({kind(one) for one in pack}) == 1 for pack in packs)


def test_adapters_of_like_rank_come_together(fifty: list[PreparedAdapter], tmp_path: Path) -> None:
    packs = plan_packs(fifty, LocalStore(tmp_path), lambda _: 4)
    for one in {kind(adapter) for adapter in fifty}:
        ranks = [adapter.resolved.training.rank for pack in packs if kind(pack[0]) == one for adapter in pack]
        assert len(set(ranks)) > 1
        assert ranks == sorted(ranks)


def test_adapters_of_like_steps_come_together(tmp_path: Path) -> None:
    steps = {"long": 400, "short": 100, "longer": 500, "middle": 200}
    adapters = prepared(job_of([{"id": name, "training": {"steps": own}} for name, own in steps.items()]))
    packs = plan_packs(adapters, LocalStore(tmp_path), lambda _: 2)
    assert [[one.resolved.id for one in pack] for pack in packs] == [["short", "middle"], ["long", "longer"]]


def test_checkpoints_of_an_earlier_version_are_refused_by_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    adapters = prepared(job_of([{"id": "cup"}, {"id": "mug"}]))
    store.put("runs/mug/r-other/checkpoints/00000012.json", b"{}")  # of settings that nobody asks for any more
    assert len(plan_packs(adapters, store, lambda _: 8)) == 1
    store.put("runs/mug/r-mug/checkpoints/00000012.json", b"{}")
    with pytest.raises(CheckpointError, match=r"adapter mug: runs/mug/r-mug/checkpoints/ in .* remove them to train"):
        plan_packs(adapters, store, lambda _: 8)


def test_what_cannot_share_a_forward_is_kept_apart(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"targets": "attention"},
        {"blocks": "up"},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"joint_rows": False},
        {"compile": True},
        {"resolution": 24},
        {"prompt_chunks": 2},
    ]
    apart = prepared(job_of([{"id": f"a-{n}", "training": change} for n, change in enumerate(changes)]))
    assert [len(pack) for pack in plan_packs(apart, LocalStore(tmp_path), lambda _: 8)] == [1] * len(changes)
    # These are each adapter's own business.
    mixed: list[dict[str, Any]] = [
        *({}, {"rank": 2}, {"learning_rate": 0.1}, {"rows_per_concept": 1}, {"accumulate": 2}, {"steps": 40}),
    ]
    together = prepared(job_of([{"id": f"b-{n}", "training": change} for n, change in enumerate(mixed)]))
    assert [len(pack) for pack in plan_packs(together, LocalStore(tmp_path), lambda _: 8)] == [len(mixed)]


def test_the_spec_may_say_how_many_train_together(tmp_path: Path) -> None:
    ids = [{"id": f"a-{n}"} for n in range(3)]
    settings = Settings(cache_dir=tmp_path)
    for wanted in (1, 2, 40):
        job = job_of(ids, max_pack=wanted)
        assert pack_size(prepared(job), job.cluster.max_pack, settings) == wanted
    automatic = job_of(ids)
    assert pack_size(prepared(automatic)[:1], automatic.cluster.max_pack, settings) == 1, "of one nothing is measured"


@pytest.fixture
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture
def bank(base: BaseModel) -> Iterator[LoraBank]:
    bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, "attention"))
    yield bank
    bank.detach()


def test_the_measured_size_is_between_one_and_the_largest(
    base: BaseModel, bank: LoraBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for free in (0, 10**18):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        sizes.append(memory.measured_pack_size(base, bank, members(base)[:2]))
    assert sizes == [1, memory.LARGEST_PACK]


def test_free_memory_is_what_this_machine_can_give() -> None:
    assert 0 < memory.free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_a_pack_is_measured_on_a_step_whose_rows_are_all_of_the_largest_photo(
    base: BaseModel, bank: LoraBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of photos of two sizes a step may have one call for all rows, the most that it can take."""
    measured: list[list[PackMember]] = []
    assert memory.measured_pack_size(base, bank, other_optimisers(base)[:2]) >= 1, "also where photos have masks"
    monkeypatch.setattr(memory, "_peak_bytes", lambda _base, _bank, pack: measured.append(list(pack)) or len(pack))
    memory.measured_pack_size(base, bank, other_optimisers(base)[:2])
    views = [view for pack in measured for one in pack for concept in one.task.concepts for view in concept.moments]
    before = [view for one in other_optimisers(base)[:2] for concept in one.task.concepts for view in concept.moments]
    assert len({view.numel() for view in before}) == 2
    assert {view.numel() for view in views} == {max(view.numel() for view in before)}


def test_the_measured_size_grows_with_the_free_memory(
    base: BaseModel, bank: LoraBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter takes 100 MB and each further one 40 MB, of the share of the free memory that is used."""
    used = {1: 100 * MEGABYTE, 2: 140 * MEGABYTE}
    monkeypatch.setattr(memory, "_peak_bytes", lambda _base, _bank, pack: used[len(pack)])
    wanted = {50: 1, 100: 1, 139: 1, 141: 2, 301: 6, 10_000: memory.LARGEST_PACK}
    for megabytes, size in wanted.items():
        free = megabytes * MEGABYTE / memory.SHARE
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        assert memory.measured_pack_size(base, bank, members(base)[:2]) == size
