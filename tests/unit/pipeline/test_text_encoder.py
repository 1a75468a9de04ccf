"""A whole job whose adapters train text encoders: what is published, trained on from, exported and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.evaluation.fisher import fisher_drift
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.pipeline.importing import ImportRequest, import_adapter
from cat_cluster.pipeline.job import Silent, run_job
from cat_cluster.pipeline.prepare import checkpoints_of, prepare, trained_adapter
from cat_cluster.pipeline.published_adapters import export_stack
from cat_cluster.registry.stacks import parse_member
from cat_cluster.spec.job import JobSpec
from tests.support.text_adapters import kohya_file, text_paths, whole_adapter
from tests.unit.pipeline.test_start import Place, manifest_of, products

pytestmark = pytest.mark.slow


@pytest.fixture(params=["tiny_base_folder", "tiny_xl_folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path, request.getfixturevalue(request.param))


def trained_text_paths(base: BaseModel) -> set[str]:
    """Every layer of the text encoders but the last of SDXL's first, whose output the U-Net does not read."""
    unread = "text_encoder.text_model.encoder.layers.1." if len(base.text_encoders.models) > 1 else "-"
    return {path for path in text_paths(base) if not path.startswith(unread)}


def of_text(weights: AdapterWeights) -> AdapterWeights:
    return AdapterWeights({name: one for name, one in weights.layers.items() if name.startswith("text_encoder")})


def test_it_is_published_with_its_text_layers_also_from_a_pack_with_others(place: Place) -> None:
    base = load_base_model(str(place.base))
    document: dict[str, Any] = place.job("words", text_encoder={"learning_rate": 0.05}, ema=0.5).model_dump(mode="json")
    (words,) = document["adapters"]
    plain = {**words, "id": "plain", "training": {"text_encoder": None, "ema": None}}
    job = JobSpec.model_validate({**document, "adapters": [words, plain]})
    packs: list[list[str]] = []

    class Told:
        def started(self, steps: dict[str, int], together: int) -> None:
            packs.append(list(steps))

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    results = run_job(job, place.store, place.settings, Told())  # type: ignore[arg-type]
    assert packs == [["words", "plain"]]
    words_manifest, plain_manifest = map(manifest_of, results)
    weights = place.weights(words_manifest)
    assert set(weights.layers) == {*adapted_layers(base.unet, "attention"), *trained_text_paths(base)}
    assert all(bool(product.any()) for product in products(weights).values())
    assert words_manifest.training["text_encoder_layers"] == len(trained_text_paths(base))
    assert plain_manifest.text_layers == 0
    assert not of_text(place.weights(plain_manifest)).layers
    alone = place.weights(manifest_of(place.train("plain")))
    for name, product in products(place.weights(plain_manifest)).items():
        torch.testing.assert_close(product, products(alone)[name], rtol=1e-3, atol=1e-8)


def test_a_task_elsewhere_finds_what_the_last_checkpoint_holds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tasks of a cluster do, which measure what others have trained."""
    kept: list[Any] = []
    for ema in (None, 0.5):
        job = place.job(f"words-{'mean' if ema else 'last'}", text_encoder={}, ema=ema)
        [prepared] = prepare(job, place.settings, place.registry)
        store = type(checkpoints_of(prepared, place.store))
        monkeypatch.setattr(store, "clear", lambda self: None)
        [result] = run_job(job, place.store, place.settings)
        found = trained_adapter(prepared, place.store).weights
        assert found is not None
        kept.append(found)
        for name, layer in place.weights(result.manifest).layers.items():
            assert torch.equal(layer.up, found.layers[name].up)
    assert of_text(kept[0]).digest() != of_text(kept[1]).digest()


def test_training_goes_on_from_text_layers_and_refuses_to_lose_them(place: Place) -> None:
    first = manifest_of(place.train("first", text_encoder={}))
    second = place.train("second", init_from="first", text_encoder={"learning_rate": 1e-12}, learning_rate=1e-12)
    start = products(place.weights(first))
    for name, product in products(place.weights(manifest_of(second))).items():
        torch.testing.assert_close(product, start[name], rtol=1e-4, atol=1e-7)
    with pytest.raises(
        AdapterMismatchError, match=r"changes text_encoder\..* training without text_encoder leaves out"
    ):
        place.train("third", init_from="first")
    manifest_of(place.train("bare"))
    later = manifest_of(place.train("later", init_from="bare", text_encoder={"learning_rate": 1e-12}))
    assert later.training["text_encoder_layers"]
    assert all(product.abs().max() < 1e-9 for product in products(of_text(place.weights(later))).values())


def test_training_goes_on_from_a_file_of_kohyas_trainer(place: Place, tmp_path: Path) -> None:
    """It has every layer of every text encoder; of SDXL's first one nothing reads the last, which stays behind."""
    base = load_base_model(str(place.base))
    file = kohya_file(whole_adapter(base, 1, rank=2), tmp_path / "x.safetensors", xl=len(base.text_encoders.models) > 1)
    guest = import_adapter(
        ImportRequest(file, "guest", ["sks"], ["cup"], base=str(place.base)), place.registry, "cpu", Silent()
    )
    rates = {"learning_rate": 1e-12, "text_encoder": {"learning_rate": 1e-12}}
    later = manifest_of(place.train("later", init_from="guest", targets="attention_ff", **rates))
    start, found = (products(place.weights(one)) for one in (guest, later))
    assert set(start) == {*adapted_layers(base.unet, "attention_ff"), *text_paths(base)}
    assert set(found) == {*adapted_layers(base.unet, "attention_ff"), *trained_text_paths(base)}
    for name, product in found.items():
        torch.testing.assert_close(product, start[name], rtol=1e-4, atol=1e-7)
    assert later.training["init_from"]["distance"] < 1e-4


def test_it_is_exported_under_the_names_of_its_base(place: Place, tmp_path: Path) -> None:
    place.train("words", text_encoder={})
    path = export_stack(place.registry, [parse_member("words")], tmp_path / "kohya", "kohya")
    told = {key.split("_text_model")[0] for key in load_file(path) if "_text_model" in key}
    of_two = len(load_base_model(str(place.base)).text_encoders.models) > 1
    assert told == ({"lora_te1", "lora_te2"} if of_two else {"lora_te"})
    with pytest.raises(AdapterFormatError, match="file for each model"):
        export_stack(place.registry, [parse_member("words")], tmp_path / "peft", "peft")


def test_drift_is_measured_with_each_sides_own_texts(place: Place) -> None:
    """Oracle: a copy of the base with the change added to its text encoders' weights."""
    base, changed = (load_base_model(str(place.base)) for _ in range(2))
    weights = whole_adapter(base, 1, unet=False, text=0.5)
    with torch.no_grad():
        for name, layer in weights.layers.items():
            weight = changed.network.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight += layer.up @ layer.down
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts, seeds = ["a cup", "a red cup"], [1, 2]
    bank = LoraBank.attach(base.network, layers=list(weights.layers))
    bank.load(1, weights)
    found = fisher_drift(base, bank, 1, images, prompts, seeds)
    bank.detach()
    predictions: list[list[torch.Tensor]] = []
    for one in (changed, base):
        seen: list[torch.Tensor] = []
        hook = one.unet.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output[0].float()))
        bare = LoraBank.attach(one.network, layers=list(weights.layers))
        bare.load(1, AdapterWeights({}))
        fisher_drift(one, bare, 1, images, prompts, seeds)
        bare.detach()
        hook.remove()
        predictions.append(seen)
    apart = torch.cat([(a - b).square().flatten(1).mean(1) for a, b in zip(*predictions, strict=True)][::2])
    expected = apart.view(2, -1).mean(1)
    assert expected.min() > 1e-6
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=1e-3, atol=1e-9)
