"""The safety checker: transformers' own scores, the threshold, and folders that are refused by what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cat_cluster.errors import SpecError
from serve.calls import FileFormat, Verdict
from serve.denoise.image_file import image_file
from serve.denoise.safety import SafetyChecker, open_checker
from serve.settings import SafetySettings, ServeSettings
from tests.support.classifiers import LABELS, pipeline_scores, write_classifier


def opened(folder: Path, *labels: str, **options: object) -> SafetyChecker:
    checker = open_checker(SafetySettings(model=folder, labels=labels or ("odd",), **options), "cpu")
    assert checker is not None
    return checker


def images(count: int, height: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, height, 16 + 8 * n, generator=generator) for n in range(count)]


@pytest.mark.parametrize(
    "config",
    [{}, {"problem_type": "multi_label_classification"}, {"id2label": {0: "odd"}, "label2id": {"odd": 0}}],
    ids=["one of several labels", "independent labels", "a single label"],
)
def test_scores_are_those_of_transformers_own_pipeline(config: dict[str, object], tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model", **config)
    drawn = images(3)
    oracle = pipeline_scores(folder, *(image_file(image, {}, FileFormat("png")) for image in drawn))
    scores = opened(folder).scores(drawn)
    names = list(dict(config.get("id2label", dict(enumerate(LABELS)))).values())
    assert scores.shape == (3, len(names))
    for row, expected in zip(scores, oracle, strict=True):
        assert dict(zip(names, row.tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)
    assert float(scores.std(dim=0).max()) > 0.01  # they depend on the image


def test_a_flagging_label_flags_from_its_threshold_on(tmp_path: Path) -> None:
    checker = opened(write_classifier(tmp_path / "model"), "odd", "loud", threshold=0.4)
    assert checker.verdict(torch.tensor([0.9, 0.05, 0.05])) == Verdict(False, "odd", 0.05)
    assert checker.verdict(torch.tensor([0.2, 0.39, 0.41])) == Verdict(True, "loud", 0.41)
    assert checker.verdict(torch.tensor([0.2, 0.4, 0.4])).flagged


def test_without_settings_nothing_is_checked() -> None:
    assert open_checker(ServeSettings().safety, "cpu") is None


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def changed(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def headless(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def endless(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without("config.json"), "config.json is not there"),
        (without("preprocessor_config.json"), "preprocessor_config.json is not there"),
        (pickled, "no .safetensors file is there; pickled weights"),
        (cut, "no image classifier that loads"),
        (headless, "weights classifier.bias, classifier.weight are missing"),
        (endless, "scores of a blank image are not finite"),
        (changed(problem_type="regression"), "problem_type is regression"),
        (changed(hidden_size=32), "no image classifier that loads"),
        (changed(model_type="of-nobody", auto_map={"AutoConfig": "evil.Config"}), "no image classifier that loads"),
    ],
)
def test_a_folder_that_cannot_check_is_refused(spoil: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model")
    opened(folder)
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    spoil(folder)
    with pytest.raises(SpecError, match=r"^safety\.model: .*give a local folder with config\.json") as refused:
        opened(folder)
    assert reason in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_label_that_the_model_has_not_is_refused_with_those_it_has(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model")
    with pytest.raises(SpecError, match=r"^safety\.labels: 'od' is no label .* its labels are calm, loud, odd$"):
        opened(folder, "odd", "od")
