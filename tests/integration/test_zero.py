"""The laws of training on two workers: plain torch and every ZeRO stage give the adapters of the local loop."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_cluster.cluster import zero
from cat_cluster.errors import CatClusterError
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.training.engine import TorchEngine
from tests.support import gloo_pair
from tests.unit.training.test_loop import members, series, train, with_text

STAGES = gloo_pair.STAGES
LAW = 1e-3  # ||W - W_ref|| / ||W_ref|| after 20 steps (design, section 4)


@pytest.fixture(scope="module")
def folder(tiny_base_folder: Path, tiny_xl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(tiny_xl_folder, folder / "xl")
    shutil.copytree(tiny_base_folder, folder / "base")
    return folder


def found_by_both(folder: Path, what: str) -> list[dict[Any, Any]]:
    """What both workers found; they have no compiler on their path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.gloo_pair", str(rank), port, str(folder), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")},
        )
        for rank in (0, 1)
    ]
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[Any, Any]]:
    return found_by_both(folder, "laws")


@pytest.fixture(scope="module")
def killed_pair(folder: Path) -> list[dict[Any, Any]]:
    return found_by_both(folder, "kills")


@pytest.fixture(scope="module")
def text_pair(folder: Path) -> list[dict[Any, Any]]:
    return found_by_both(folder, "text")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base_model(str(folder / "base"))


@pytest.fixture(scope="module")
def local(base: BaseModel) -> dict[str, Any]:
    return gloo_pair.weights(train(base, members(base)))


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative change of W = B A over all layers of all adapters."""
    assert found.keys() == wanted.keys()
    changes = []
    for adapter_id, layers in wanted.items():
        for name, (down, up) in layers.items():
            ours_down, ours_up = found[adapter_id][name]
            changes.append(float((ours_up @ ours_down - up @ down).norm() / (up @ down).norm()))
    return max(changes)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_give_the_adapters_of_the_local_loop(
    pair: list[dict[Any, Any]], local: dict[str, Any], stage: int | None
) -> None:
    for found in pair:
        assert worst(found["trained", stage], local) <= LAW


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_that_come_and_go_on_two_workers_are_the_ones_trained_alone(
    pair: list[dict[Any, Any]], base: BaseModel, stage: int | None
) -> None:
    alone = [train(base, [one])[one.task.adapter_id] for one in gloo_pair.few_steps(base)]
    wanted = gloo_pair.weights({one.adapter_id: one for one in alone})
    for found in pair:
        assert worst(found["joined", stage], wanted) <= LAW


@pytest.fixture(scope="module")
def local_xl(folder: Path) -> dict[str, Any]:
    base = load_base_model(str(folder / "xl"))
    return gloo_pair.weights(train(base, members(base), steps=gloo_pair.FEW))


@pytest.mark.parametrize("stage", gloo_pair.STAGES_OF_XL)
def test_two_workers_give_the_adapters_of_the_local_loop_for_sdxl_too(
    pair: list[dict[Any, Any]], local_xl: dict[str, Any], stage: int | None
) -> None:
    for found in pair:
        assert worst(found["xl", stage], local_xl) <= LAW


@pytest.mark.parametrize("stage", gloo_pair.STAGES_OF_OPTIMISERS)
def test_two_workers_give_the_adapters_of_the_local_loop_with_every_optimiser(
    pair: list[dict[Any, Any]], base: BaseModel, stage: int | None
) -> None:
    """Prodigy's step size is that of the whole adapter, though each worker has a part of it."""
    local = gloo_pair.weights(train(base, gloo_pair.optimisers(base, stage), steps=gloo_pair.FEW))
    for found in pair:
        assert worst(found["optimisers", stage], local) <= LAW


@pytest.mark.parametrize("stage", gloo_pair.STAGES_OF_PARTS)
def test_two_workers_add_up_the_gradients_of_a_step_of_several_calls(
    pair: list[dict[Any, Any]], base: BaseModel, stage: int | None
) -> None:
    """Rows with and without the token apart, and an adapter that accumulates: four backwards before the optimiser."""
    alone = gloo_pair.weights(train(base, gloo_pair.parted(base), steps=gloo_pair.FEW))
    for found in pair:
        assert worst(found["parted", stage], alone) <= LAW


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_of_uneven_rows_is_that_of_one_worker(
    pair: list[dict[Any, Any]], base: BaseModel, stage: int | None
) -> None:
    """Nine rows on two workers, compared before AdamW, which hides a wrong scale."""
    assert sum(len(one.task.concepts) * one.task.training.rows_per_concept for one in members(base)) % 2 == 1
    fresh = load_base_model(str(base.folder))
    wanted = gloo_pair.gradients(fresh, members(fresh), TorchEngine)
    for found in pair:
        for adapter_id, gradients in wanted.items():
            for ours, theirs in zip(found["gradients", stage][adapter_id], gradients, strict=True):
                assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-9


@pytest.mark.parametrize("stage", STAGES)
def test_a_slot_with_a_bad_gradient_is_dropped_on_all_workers_and_alone(
    pair: list[dict[Any, Any]], base: BaseModel, stage: int | None
) -> None:
    healthy = gloo_pair.weights(train(base, [members(base)[0], members(base)[2]], steps=gloo_pair.FEW))
    for found in pair:
        after = dict(found["poisoned", stage])
        assert "gradient not finite at step" in after.pop("bad")
        assert worst(after, healthy) <= LAW


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_without_rows_takes_part(pair: list[dict[Any, Any]], base: BaseModel, stage: int | None) -> None:
    alone = gloo_pair.weights(train(base, gloo_pair.one_row(base), steps=gloo_pair.FEW))
    for found in pair:
        assert worst(found["one row", stage], alone) <= LAW


@pytest.mark.parametrize("stage", gloo_pair.STAGES_OF_TEXT)
def test_two_workers_train_text_encoders_as_the_local_loop_does(
    text_pair: list[dict[Any, Any]], base: BaseModel, stage: int | None
) -> None:
    """Also where one of them has no row whose text is adapted, in one call and in two."""
    local = gloo_pair.weights(train(base, with_text(base), steps=gloo_pair.FEW))
    sparse = gloo_pair.weights(train(base, gloo_pair.sparse_text(base), steps=gloo_pair.FEW))
    for found in text_pair:
        assert worst(found["text", stage], local) <= LAW
        assert worst(found["sparse", stage, False], sparse) <= LAW
        if stage in gloo_pair.STAGES_OF_PARTS:
            assert worst(found["sparse", stage, True], sparse) <= LAW
    assert text_pair[0]["invalidations", stage] == 0


def test_two_workers_train_both_text_encoders_of_sdxl_as_the_local_loop_does(
    text_pair: list[dict[Any, Any]], folder: Path
) -> None:
    base = load_base_model(str(folder / "xl"))
    local = gloo_pair.weights(train(base, with_text(base), steps=gloo_pair.FEW))
    for found in text_pair:
        assert worst(found["xl"], local) <= LAW


@pytest.fixture(scope="module")
def unbroken(base: BaseModel) -> dict[str, Any]:
    """What a run that is not resumed has after as many steps as the resumed ones."""
    return gloo_pair.weights(train(base, members(base), steps=gloo_pair.RESUMED))


@pytest.mark.chaos
@pytest.mark.parametrize(("before", "after"), gloo_pair.RESUMPTIONS)
def test_a_run_is_resumed_at_another_stage(
    killed_pair: list[dict[Any, Any]], unbroken: dict[str, Any], before: int | None, after: int | None
) -> None:
    for found in killed_pair:
        assert worst(found["resumed", before, after], unbroken) <= LAW
        assert found["first step", before, after] == 7, "it began anew, or further back than its last checkpoint"


@pytest.mark.chaos
def test_a_run_of_two_workers_is_resumed_by_one(
    killed_pair: list[dict[Any, Any]], base: BaseModel, unbroken: dict[str, Any], folder: Path
) -> None:
    assert killed_pair
    seen: list[int] = []
    resumed = train(
        base,
        members(base),
        steps=gloo_pair.RESUMED,
        checkpoints=series(folder / "alone", members(base)),
        on_step=lambda report: seen.append(report.step),
    )
    assert seen == list(range(7, gloo_pair.RESUMED + 1))
    assert worst(gloo_pair.weights(resumed), unbroken) <= LAW


def test_zero_3_repeats_its_trace(pair: list[dict[Any, Any]]) -> None:
    """One forward and one backward a step: nothing is invalidated, and a change would be noticed."""
    assert pair[0]["invalidations", 3] == 0
    assert pair[0]["control"] > 0, "the count sees nothing, so its zero says nothing"


def test_nothing_is_compiled(pair: list[dict[Any, Any]], folder: Path) -> None:
    assert pair
    assert not (folder / "extensions").exists()


def test_another_deepspeed_than_the_tested_one_is_refused(monkeypatch: pytest.MonkeyPatch, base: BaseModel) -> None:
    monkeypatch.setattr(zero, "TESTED", "0.1")
    with pytest.raises(CatClusterError, match=r"needs deepspeed 0\.1\.x"):
        zero._do_without_compiler()
