"""What the only worker of a group does as adapters come and go; orders and the other workers are stood in for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cat_cluster.cluster import pack_worker
from cat_cluster.cluster.messages import Order, OrderedAdapter
from cat_cluster.cluster.trainer import PackSpec
from cat_cluster.errors import ChangedJobError
from cat_cluster.pipeline.job import train_adapters
from cat_cluster.pipeline.prepare import PreparedAdapter, checkpoints_of, prepare, trained_adapter
from cat_cluster.registry import Registry
from cat_cluster.runs.run import Run
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, ResolvedAdapter, load_spec
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.store import LocalStore
from tests.conftest import TinyBaseFactory
from tests.support.tiny_jobs import adapter, relative_change, write_photos, write_spec

SETTINGS = Settings(device="cpu")


class Driver:
    """Stands in for the driver: gives each order once all adapters of the one before have ended, and hears of them."""

    def __init__(self, *orders: list[OrderedAdapter]) -> None:
        self.orders = [Order(n, tuple(one), last=n == len(orders)) for n, one in enumerate(orders, start=1)]
        self.ended: list[str] = []
        self.failed: dict[str, Exception] = {}
        self.actor = None

    def put(self, kind: str, _: int, *said: Any, **__: Any) -> None:
        if kind == "ended":
            self.ended += said[0]
        elif kind == "failed":
            self.failed[said[0]] = said[1]

    def newest(self) -> Order:
        done = {*self.ended, *self.failed}
        while len(self.orders) > 1 and done.issuperset(one.name for one in self.orders[0].adapters):
            self.orders.pop(0)
        return self.orders[0]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], pack_worker._Worker]:
    alone = {
        "get_rank": lambda: 0,
        "get_world_size": lambda: 1,
        "all_gather_object": lambda all_, own: all_.__setitem__(0, own),
        "broadcast_object_list": lambda _: None,
    }
    monkeypatch.setattr(pack_worker, "distributed", SimpleNamespace(**alone))
    monkeypatch.setattr(pack_worker, "OrderReader", lambda messages, _: messages)
    monkeypatch.setattr(pack_worker, "IDLE_SECONDS", 0.001)
    names = ("open", "admit", "dismiss", "step", "checkpoint")
    monitor: Any = SimpleNamespace(**{name: lambda *_: None for name in names})

    def make(driver: Driver) -> pack_worker._Worker:
        spec = PackSpec(
            number=0,
            cluster=ClusterSpec(),
            storage=LocalStore(tmp_path / "store").url,
            messages=driver,  # type: ignore[arg-type]
            workers=1,
            threads=1,
            on_gpus=False,
            folder=str(tmp_path),
        )
        metrics: Any = SimpleNamespace()
        return pack_worker._Worker(spec, SETTINGS, monitor, metrics, torch.device("cpu"))

    return make


def job_of(folder: Path, bases: dict[str, Path]) -> JobSpec:
    adapters = []
    for seed, (name, base) in enumerate(bases.items()):
        adapters.append(adapter(name, write_photos(folder / name, seed=seed), base=str(base)))
    return load_spec(write_spec(folder / "job.yaml", next(iter(bases.values())), adapters))


def ordered(job: JobSpec, one: PreparedAdapter, store: LocalStore, number: int) -> OrderedAdapter:
    """An adapter as the workers are told, for a run of its own."""
    run = Run(store, f"run-{number:012d}")
    attempt, name = run.claim().number, f"{run.run_id}/{one.resolved.id}"
    return OrderedAdapter(name, one.resolved, one.revision, run.run_id, attempt, job.monitoring)


def test_an_idle_group_trains_another_kind_with_its_own_base(
    tmp_path: Path, tiny_base_factory: TinyBaseFactory, start: Callable[[Driver], pack_worker._Worker]
) -> None:
    job = job_of(tmp_path, {"cup": tiny_base_factory(), "mug": tiny_base_factory(seed=9)})
    store, alone = LocalStore(tmp_path / "store"), LocalStore(tmp_path / "alone")
    prepared = prepare(job, SETTINGS, Registry(store))
    driver = Driver(*([ordered(job, one, store, number)] for number, one in enumerate(prepared)))
    with start(driver) as worker:
        worker.run()
    assert [name.partition("/")[2] for name in driver.ended] == ["cup", "mug"]
    for one in prepared:
        [expected] = train_adapters([one], job, alone, SETTINGS, on_step=lambda _: None)
        trained = trained_adapter(one, store)
        assert trained.weights is not None
        assert expected.weights is not None
        assert relative_change(trained.weights, expected.weights) == 0.0


def test_one_that_cannot_be_prepared_fails_alone_whatever_the_error(
    tmp_path: Path,
    tiny_base_folder: Path,
    start: Callable[[Driver], pack_worker._Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = job_of(tmp_path, {"cup": tiny_base_folder, "mug": tiny_base_folder, "jar": tiny_base_folder})
    store = LocalStore(tmp_path / "store")
    prepared = prepare(job, SETTINGS, Registry(store))
    really = pack_worker.prepare_again

    def prepare_again(resolved: ResolvedAdapter, *given: Any) -> PreparedAdapter:
        if resolved.id == "mug":
            raise ValueError("what nobody had thought of")
        return really(resolved, *given)

    monkeypatch.setattr(pack_worker, "prepare_again", prepare_again)
    jar = checkpoints_of(prepared[2], store)
    for name, data in (("safetensors", b"damaged"), ("json", b"{}")):
        store.put(f"{jar.prefix}/00000002.{name}", data)
        store.put(f"{jar.prefix}/00000001.{name}", data)
    driver = Driver([ordered(job, one, store, number) for number, one in enumerate(prepared)])
    with start(driver) as worker:
        worker.run()
    assert [name.partition("/")[2] for name in driver.ended] == ["cup"]
    reasons = {name.partition("/")[2]: str(error) for name, error in driver.failed.items()}
    assert reasons["mug"] == "preparing it stopped: ValueError: what nobody had thought of"
    assert "damaged" in reasons["jar"]


def test_of_those_that_have_left_nothing_is_kept(
    tmp_path: Path, tiny_base_factory: TinyBaseFactory, start: Callable[[Driver], pack_worker._Worker]
) -> None:
    bases = {"cup": tiny_base_factory(), "mug": tiny_base_factory(seed=9), "jar": tiny_base_factory(seed=10)}
    job = job_of(tmp_path, bases)
    store = LocalStore(tmp_path / "store")
    prepared = prepare(job, SETTINGS, Registry(store))
    driver = Driver(*([ordered(job, one, store, number)] for number, one in enumerate(prepared)))
    with start(driver) as worker:
        worker.run()
        gc.collect()
        assert list(worker._stores) == [("run-000000000002", 1)]
        assert list(worker._bases) == [str(bases["jar"])]


def test_what_is_not_at_its_end_is_not_published(tmp_path: Path, tiny_base_folder: Path) -> None:
    job = job_of(tmp_path, {"cup": tiny_base_folder})
    store = LocalStore(tmp_path / "store")
    [one] = prepare(job, SETTINGS, Registry(store))
    train_adapters([one], job, store, SETTINGS, on_step=lambda _: None)
    assert trained_adapter(one, store).weights is not None
    longer = one.resolved.training.model_copy(update={"steps": 9})
    with pytest.raises(ChangedJobError, match="its last checkpoint is of step 3 of 9"):
        trained_adapter(replace(one, resolved=one.resolved.model_copy(update={"training": longer})), store)
