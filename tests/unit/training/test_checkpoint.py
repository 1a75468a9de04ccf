"""Checkpoints name their tensors: an order means nothing, and a name that is missing or too many is refused."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cat_cluster.errors import CheckpointError, StoreError
from cat_cluster.lora.bank import adapted_layers, parameter_names
from cat_cluster.models.base_model import BaseModel
from cat_cluster.store.local import LocalStore
from cat_cluster.training.checkpoint import AdapterState, CheckpointStore, CheckpointWriter, load_newest, tensor_names
from cat_cluster.training.step_report import StepReport
from tests.unit.training.test_loop import STEPS, Killed, bit_equal, member, names, series, train
from tests.unit.training.test_step import concept, task

pytestmark = pytest.mark.slow

Tensors = dict[str, tuple[dict[str, object], bytes]]


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Write a safetensors file anew, tensors in the order `change` gives them, and its digest into the marker."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    tensors = {}
    for name, info in header.items():
        start, stop = info["data_offsets"]
        tensors[name] = info, data[end + start : end + stop]
    header, body = {}, b""
    for name, (info, content) in change(tensors).items():
        header[name] = {**info, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    written = len(text).to_bytes(8, "little") + text + body
    file.write_bytes(written)
    marker = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**marker, "sha256": hashlib.sha256(written).hexdigest()}))


def killed_at_nine(base: BaseModel, folder: Path) -> list[Path]:
    """Train one adapter for nine steps and die; return the files of its two checkpoints."""

    def die(report: StepReport) -> None:
        if report.step == 9:
            raise Killed

    pack = [member(base, task("mug", (concept(base, "sks", alpha=5.0),)))]
    with pytest.raises(Killed):
        train(base, pack, checkpoints=series(folder, pack), on_step=die)
    return sorted((folder / "checkpoints" / "mug").glob("*.safetensors"))


def test_a_tensor_bears_the_path_of_its_module(base: BaseModel, tmp_path: Path) -> None:
    pack = [member(base, task("mug", (concept(base, "sks", alpha=5.0),)))]
    trained = train(base, pack, checkpoints=series(tmp_path, pack))["mug"].weights
    assert trained is not None
    stored = load_file(tmp_path / "checkpoints" / "mug" / f"{STEPS:08d}.safetensors")
    for path, layer in trained.layers.items():
        assert torch.equal(stored[f"{path}.lora_A.value"], layer.down)
        assert torch.equal(stored[f"{path}.lora_B.value"], layer.up)
        assert stored[f"{path}.lora_A.mean"].shape == stored[f"{path}.lora_A.square"].shape == layer.down.shape
    assert len(stored) == 2 * 3 * len(trained.layers)


def one_state(step: int, value: torch.Tensor) -> AdapterState:
    parts = {part: value.clone() for part in ("value", "mean", "square")}
    return AdapterState(step, {"layer.lora_A": parts}, None, {}, [])


def test_a_checkpoint_holds_what_was_there_when_it_was_taken(tmp_path: Path) -> None:
    """Training goes on in the same tensors while the checkpoint is written."""
    go_on = threading.Event()

    class SlowSeries(CheckpointStore):
        def save(self, state: AdapterState) -> None:
            assert go_on.wait(30)
            super().save(state)

    checkpoints = SlowSeries(LocalStore(tmp_path), "checkpoints/mug", "run")
    state = one_state(5, torch.zeros(3))
    with CheckpointWriter(100) as writer:
        writer.save([(checkpoints, state)])
        for tensor in state.parameters["layer.lora_A"].values():
            tensor.fill_(7.0)
        go_on.set()
    stored = checkpoints.load(5, tensor_names(["layer.lora_A"], ("mean", "square"))).parameters["layer.lora_A"]
    assert list(stored) == ["value", "mean", "square"]
    assert all(torch.equal(tensor, torch.zeros(3)) for tensor in stored.values())


def test_a_checkpoint_of_the_time_of_adamw_alone_is_read(tmp_path: Path) -> None:
    """Its marker has no numbers of the optimiser; one that has them gives back the same, to the bit."""
    checkpoints = CheckpointStore(LocalStore(tmp_path), "checkpoints/mug", "run")
    names = tensor_names(["layer.lora_A"], ("mean", "square"))
    numbers = {"d": 0.1 + 0.2, "d_max": 1e-300, "numerator": -0.0}
    checkpoints.save(replace(one_state(5, torch.zeros(3)), numbers=numbers))
    assert checkpoints.load(5, names).numbers == numbers
    marker = tmp_path / "checkpoints" / "mug" / "00000005.json"
    content = json.loads(marker.read_text())
    del content["numbers"]
    marker.write_text(json.dumps(content))
    assert checkpoints.load(5, names).numbers == {}


def test_a_marker_is_written_after_its_tensors(tmp_path: Path) -> None:
    """A reader that finds the marker finds the tensors."""
    written: list[str] = []

    class Watched(LocalStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            super().put(key, data, if_absent=if_absent)
            written.append(key.rsplit(".", 1)[-1])

    CheckpointStore(Watched(tmp_path), "checkpoints/mug", "run").save(one_state(5, torch.zeros(3)))
    assert written == ["safetensors", "json"]


def test_a_store_that_is_away_is_no_damage(tmp_path: Path) -> None:
    """Whoever heard of damage would remove what is whole."""

    class Away(LocalStore):
        def get(self, key: str) -> bytes:
            raise StoreError("the store is away")

    CheckpointStore(LocalStore(tmp_path), "checkpoints/mug", "run").save(one_state(2, torch.ones(1)))
    with pytest.raises(StoreError, match="the store is away"):
        load_newest([CheckpointStore(Away(tmp_path), "checkpoints/mug", "run")], [["layer.lora_A.value"]], [9])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(LocalStore(tmp_path), "checkpoints/mug", "run")
    seen = [checkpoints.steps()]
    for step in (5, 10, 15):
        checkpoints.save(one_state(step, torch.zeros(3)))
        seen.append(checkpoints.steps())
    assert seen == [[], [5], [5, 10], [10, 15]]


DROPPED = -1


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        pytest.param([(10, 15), (10, 15)], [15, 15], id="the newest of all"),
        pytest.param([(10, 15), (5, 10)], [10, 10], id="a crash between two writes"),
        pytest.param([(5,), ()], [0, 0], id="a crash between the first two writes"),
        pytest.param([(10, 15), (10, 12)], [15, 12], id="one ended before"),
        pytest.param([(5, 10), (10, 12)], [10, 10], id="a crash while one ended"),
        pytest.param([(15, 20), (5, 10)], [20, 10], id="at steps of their own"),
        pytest.param([(15, 20), ()], [20, 0], id="one that is new"),
        pytest.param([(15, 20), (3, DROPPED)], [20, DROPPED], id="one was dropped before"),
        pytest.param([(15,), (10, 12)], [15, 12], id="one ended and one had a single write"),
        pytest.param([(), ()], [0, 0], id="none yet"),
    ],
)
def test_where_a_pack_goes_on(tmp_path: Path, kept: list[tuple[int, ...]], wanted: list[int]) -> None:
    """The first takes 30 steps, the second 12. Adapters that went side by side go on side by side."""
    stores = [CheckpointStore(LocalStore(tmp_path), f"checkpoints/{n}", "run") for n in range(2)]
    for store, steps in zip(stores, kept, strict=True):
        for step in steps:
            state = one_state(abs(step) if step != DROPPED else 4, torch.zeros(3))
            store.save(replace(state, dropped="NaN" if step == DROPPED else None))
    wanted_names = tensor_names(["layer.lora_A"], ["mean", "square"])
    found = load_newest(stores, [wanted_names] * 2, [30, 12])
    assert [0 if one is None else DROPPED if one.dropped else one.step for one in found] == wanted


def test_the_order_in_a_file_means_nothing(base: BaseModel, tmp_path: Path) -> None:
    pack = [member(base, task("mug", (concept(base, "sks", alpha=5.0),)))]
    whole = train(base, pack)
    for file in killed_at_nine(base, tmp_path):
        before = file.read_bytes()
        rewrite(file, lambda found: dict(reversed(found.items())))
        assert file.read_bytes()[-200:] != before[-200:]
    seen: list[int] = []
    resumed = train(base, pack, checkpoints=series(tmp_path, pack), on_step=lambda report: seen.append(report.step))
    assert seen[0] == 10, "it began anew"
    assert bit_equal(resumed["mug"].weights, whole["mug"].weights)


def test_the_order_of_the_names_asked_for_means_nothing(base: BaseModel, tmp_path: Path) -> None:
    killed_at_nine(base, tmp_path)
    pack = [member(base, task("mug", (concept(base, "sks", alpha=5.0),)))]
    [checkpoints], [asked] = series(tmp_path, pack), names(base, pack)
    one, other = (checkpoints.load(9, some).parameters for some in (asked, asked[::-1]))
    assert list(one) == parameter_names(adapted_layers(base.unet, "attention")) == list(other)[::-1]
    assert all(torch.equal(tensor, other[name][part]) for name in one for part, tensor in one[name].items())


@pytest.mark.parametrize("kind", ["missing", "extra"])
def test_a_name_that_is_missing_or_too_many_is_refused(base: BaseModel, tmp_path: Path, kind: str) -> None:
    pack = [member(base, task("mug", (concept(base, "sks", alpha=5.0),)))]
    bad = names(base, pack)[0][4] if kind == "missing" else "up_blocks.9.lora_A.value"

    def change(tensors: Tensors) -> Tensors:
        if kind == "missing":
            return {name: found for name, found in tensors.items() if name != bad}
        return {**tensors, bad: next(iter(tensors.values()))}

    for file in killed_at_nine(base, tmp_path):
        rewrite(file, change)
    with pytest.raises(CheckpointError, match=f"{'lacks' if kind == 'missing' else 'unknown tensor'} {bad}; remove"):
        train(base, pack, checkpoints=series(tmp_path, pack))
