"""Training on from a published adapter: it begins with that one's weights, and says how far it went from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cat_cluster.errors import AdapterMismatchError, AdapterNotFoundError, SpecError
from cat_cluster.lora.bank import adapted_layers, served_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer, write_adapter
from cat_cluster.models.base_model import load_base_model
from cat_cluster.pipeline.importing import ImportRequest, import_adapter
from cat_cluster.pipeline.job import AdapterResult, Silent, run_job
from cat_cluster.pipeline.prepare import open_bank, pack_member, prepare
from cat_cluster.registry import Manifest, Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store.local import LocalStore
from cat_cluster.training.loop import train_pack

pytestmark = pytest.mark.slow


class Place:
    """A folder with photos, a cache and a store, on one tiny base."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.store = LocalStore(folder / "store")
        self.registry = Registry(self.store)
        self.settings = Settings(cache_dir=folder / "cache", device="cpu")
        (folder / "photos").mkdir()
        for n, colour in enumerate(("red", "navy")):
            Image.new("RGB", (40, 40), colour).save(folder / "photos" / f"{n}.png")

    def job(self, adapter_id: str, **training: Any) -> JobSpec:
        """A job of one adapter that is not measured."""
        concept = {"token": "sks", "class_noun": "cup", "images": str(self.folder / "photos")}
        settings = {"steps": 3, "rank": 2, "rows_per_concept": 2, "learning_rate": 0.02, "targets": "attention"}
        return JobSpec.model_validate(
            {
                "name": "start",
                "base": str(self.base),
                "adapters": [{"id": adapter_id, "concepts": [concept]}],
                "training": {**settings, **training},
                "evaluation": {"enabled": False},
            }
        )

    def train(self, adapter_id: str, **training: Any) -> AdapterResult:
        """Train and publish an adapter."""
        [result] = run_job(self.job(adapter_id, **training), self.store, self.settings)
        return result

    def weights(self, manifest: Manifest | None) -> AdapterWeights:
        """The published weights."""
        assert manifest is not None
        return self.registry.load_weights(manifest)


@pytest.fixture
def place(tmp_path: Path, tiny_base_folder: Path) -> Place:
    return Place(tmp_path, tiny_base_folder)


def products(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    return {name: layer.up @ layer.down for name, layer in weights.layers.items()}


def manifest_of(result: AdapterResult) -> Manifest:
    assert result.manifest is not None, result.reason
    return result.manifest


def test_an_adapter_is_trained_on_and_its_manifest_says_from_what_and_how_far_it_went(place: Place) -> None:
    """Oracle: the loop itself, begun with the weights of the first; the distance from the [out, in] products."""
    first = manifest_of(place.train("first"))
    second = manifest_of(place.train("second", init_from="first", seed=5))
    assert second.spec["training"]["init_from"] == first.name
    found, start = products(place.weights(second)), products(place.weights(first))
    apart = sum(float((found[name] - start[name]).square().sum()) for name in start) ** 0.5
    whole = sum(float(product.square().sum()) for product in start.values()) ** 0.5
    assert second.training["init_from"] == {"adapter": first.name, "distance": pytest.approx(apart / whole, rel=1e-4)}
    assert 0.01 < apart / whole < 5.0
    assert "init_from" not in first.training

    [prepared] = prepare(place.job("second", seed=5), place.settings, place.registry)
    with open_bank(prepared.base, [prepared]) as bank:
        member = pack_member(prepared, None, place.weights(first))
        [alone] = train_pack(prepared.base, bank, [member])
    assert alone.weights is not None
    for name, layer in place.weights(second).layers.items():
        assert torch.equal(layer.up, alone.weights.layers[name].up)
        assert torch.equal(layer.down, alone.weights.layers[name].down)


def test_a_start_is_pinned_when_training_begins(place: Place) -> None:
    """The revision is that of what the alias named: named outright it is the same adapter, moved it is another."""
    first = manifest_of(place.train("first"))
    second = place.train("second", init_from="first")
    again = place.train("second", init_from=f"first@{first.revision}")
    assert (again.outcome, again.revision) == ("already published", second.revision)
    assert place.train("second").revision != second.revision
    place.train("first", seed=1)  # moves the alias
    assert place.train("second", init_from="first").revision != second.revision
    assert place.train("second", init_from=f"first@{first.revision}").outcome == "already published"


def test_layers_that_the_start_has_not_begin_as_ever(place: Place) -> None:
    manifest_of(place.train("first", targets="cross_attention"))
    second = place.train("second", init_from="first", learning_rate=1e-12)
    weights, start = (place.weights(place.registry.resolve(name)) for name in ("second", "first"))
    base = load_base_model(str(place.base))
    assert set(weights.layers) == set(adapted_layers(base.unet, "attention")) > set(start.layers)
    for name, product in products(weights).items():
        wanted = products(start).get(name, torch.zeros_like(product))
        torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-7)
    assert manifest_of(second).training["init_from"]["distance"] < 1e-4


def test_a_start_that_does_not_fit_is_refused_by_name_before_anything_is_trained(
    place: Place, tiny_base_v_folder: Path
) -> None:
    first = manifest_of(place.train("first"))
    with pytest.raises(SpecError, match=f"adapter second: {first.name} has rank 2 and training.rank is 4: set it to 2"):
        place.train("second", init_from="first", rank=4)
    with pytest.raises(
        AdapterMismatchError, match=r"changes down_blocks\.\S+attn1\.\S+, which targets: cross_attention"
    ):
        place.train("second", init_from="first", targets="cross_attention")
    with pytest.raises(AdapterMismatchError, match=r"changes down_blocks.* and blocks: up leave out"):
        place.train("second", init_from="first", blocks="up")
    with pytest.raises(AdapterNotFoundError, match=r"training\.init_from of adapter second: .*frist"):
        place.train("second", init_from="frist")
    with pytest.raises(AdapterNotFoundError, match="prod"):
        place.train("second", init_from="first@prod")
    place.registry.quarantine("first", first.revision, "drifted")
    with pytest.raises(SpecError, match=r"is in quarantine \(drifted\)"):
        place.train("second", init_from="first")
    place.registry.release("first", first.revision)
    place.base = tiny_base_v_folder
    with pytest.raises(AdapterMismatchError, match=r"init_from of adapter second: .* was trained on base"):
        place.train("second", init_from="first")
    assert [one.adapter_id for one in place.registry.list()] == ["first"]


def test_an_imported_start_with_layers_that_no_training_adapts_is_told_so(place: Place) -> None:
    """As the files of kohya's trainer for Stable Diffusion 1.x have them: the convolutions around attention."""
    base = load_base_model(str(place.base))
    convolution = next(name for name in served_layers(base.unet, "attention_ff") if name.endswith("proj_in"))
    width = base.unet.get_submodule(convolution).in_channels
    layer = LoraLayer(torch.ones(2, int(width)), torch.ones(int(width), 2), convolution=True)
    path = write_adapter(AdapterWeights({convolution: layer}), place.folder, "diffusers", adapter_id="x", metadata={})
    import_adapter(
        ImportRequest(path, "guest", ["sks"], ["cup"], base=str(place.base)), place.registry, "cpu", Silent()
    )
    with pytest.raises(
        AdapterMismatchError, match=rf"changes {convolution}, which no training adapts, .* convolutions"
    ):
        place.train("second", init_from="guest", targets="attention_ff")


def test_a_bank_begins_with_the_start(place: Place) -> None:
    """Before the first step the adapter is the start, not the base."""
    first = manifest_of(place.train("first"))
    [prepared] = prepare(place.job("second", init_from="first"), place.settings, place.registry)
    start = place.weights(first)
    member = pack_member(prepared, None, start)
    assert all(torch.equal(layer.up, start.layers[name].up) for name, layer in member.initial.layers.items())
