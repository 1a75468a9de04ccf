"""From a job spec to what is trained: an adapter's decoys, the sizes of its crops, its masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cat_cluster.data.decoys import odd_words
from cat_cluster.data.draws import AdapterTask
from cat_cluster.errors import SpecError
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.pipeline import prepare
from cat_cluster.registry import Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import LocalStore

MakeTask = Callable[..., AdapterTask]


@pytest.fixture
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture
def make_task(base: BaseModel, tmp_path: Path) -> MakeTask:
    """The task of one adapter, mug unless another id is given, with these tokens."""
    Image.new("RGB", (48, 40), (20, 90, 200)).save(tmp_path / "1.png")

    def make(*tokens: str, adapter_id: str = "mug", **training: Any) -> AdapterTask:
        concepts = [{"token": token, "class_noun": f"n{i}", "images": str(tmp_path)} for i, token in enumerate(tokens)]
        adapter = {"id": adapter_id, "concepts": concepts, "training": training}
        job = JobSpec.model_validate({"name": "decoys", "base": str(base.folder), "adapters": [adapter]})
        found = prepare.prepare_adapter(job.resolved()[0], Settings(), {str(base.folder): base})
        return prepare.pack_member(found, None).task

    return make


def words_of(task: AdapterTask) -> set[str]:
    return {word for one in task.concepts for decoys in one.decoys for word in decoys.odd_words}


def test_an_adapters_tokens_and_the_words_it_is_judged_by_are_no_decoys(
    base: BaseModel, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = odd_words(0, "mug", "sks", spell=base.spell, never=())[:2]
    assert {first, second} <= words_of(make_task("sks", decoy_fraction=0.5))
    monkeypatch.setattr(prepare, "DECOYS", (second,))
    joint = make_task("sks", first.upper(), decoy_fraction=0.5)
    assert words_of(joint).isdisjoint({first, second, "sks"})
    assert joint.concepts[0].decoys[0].other_tokens == (first.upper(),)


def test_bases_that_are_to_be_kept_are_loaded_once_and_of_the_others_the_last(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (48, 40), (20, 90, 200)).save(tmp_path / "1.png")
    loaded: list[str] = []
    judged: list[str] = []
    monkeypatch.setattr(prepare, "load_base_model", lambda name, **_: loaded.append(name) or base)
    monkeypatch.setattr(prepare, "load_judges", lambda name, _: judged.append(name))
    preparation, registry = prepare.Preparation(Settings(), 1, keep=["kept"]), Registry(LocalStore(tmp_path / "store"))
    preparation.load("kept")
    concepts = [{"token": "sks", "class_noun": "cup", "images": str(tmp_path)}]
    for name in ("kept", "one", "other", "other", "kept", "one"):
        job = JobSpec.model_validate({"name": "bases", "base": name, "adapters": [{"id": "mug", "concepts": concepts}]})
        preparation.adapter(job.resolved()[0], registry)
    assert loaded == ["kept", "one", "other", "one"]
    assert judged == ["auto"] * 4


def test_decoys_are_keyed_as_all_draws_are(make_task: MakeTask) -> None:
    mug = words_of(make_task("sks", decoy_fraction=0.5))
    assert words_of(make_task("sks", decoy_fraction=0.1, adapter_id="tea", draw_key="mug")) == mug
    for other in (
        make_task("sks", decoy_fraction=0.5, seed=1),
        make_task("sks", decoy_fraction=0.5, adapter_id="tea"),
        make_task("zwx", decoy_fraction=0.5),
    ):
        assert len(words_of(other) & mug) <= 2


def test_without_decoy_rows_there_are_no_decoys(make_task: MakeTask) -> None:
    assert make_task("sks").concepts[0].decoys == ()


def test_photos_are_cropped_to_buckets_and_masked_where_the_spec_says_so(make_task: MakeTask, tmp_path: Path) -> None:
    Image.new("RGB", (40, 64), (20, 90, 200)).save(tmp_path / "2.png")
    (plain,) = make_task("sks").concepts
    assert [view.shape[1:] for view in plain.moments] == [(8, 8), (8, 8)]
    assert plain.masks == ()
    Image.new("L", (40, 64), 255).save(tmp_path / "2-mask.png")
    (found,) = make_task("sks", aspect_buckets=True, masked_loss=True).concepts
    assert [(size.target_width, size.target_height) for size in found.sizes] == [(16, 16), (12, 20)]
    assert [view.shape[1:] for view in found.moments] == [(8, 8), (10, 6)]
    first, second = found.masks
    assert first is None
    assert second is not None
    assert second.shape == (1, 10, 6)


def test_a_resolution_without_buckets_is_refused(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Stable Diffusion's: its U-Net halves an image's side three times behind the VAE's eighth."""
    monkeypatch.setattr(BaseModel, "size_unit", 16)
    make_task("sks", resolution=32, aspect_buckets=True)
    make_task("sks", resolution=40)
    with pytest.raises(SpecError, match=r"training\.resolution: 40 is not a multiple of 16, .* \(adapter mug\)$"):
        make_task("sks", resolution=40, aspect_buckets=True)
