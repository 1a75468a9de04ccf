"""The command line as users and programs meet it: exit codes, one JSON document on stdout, the rest on stderr."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from cat_cluster.evaluation.intervals import METRICS
from cat_cluster.training import TRAINING_VERSION
from tests.integration.conftest import Published
from tests.support.tiny_jobs import (
    CommandLine,
    Finished,
    adapter,
    assert_refused,
    open_registry,
    run_process,
    stored_files,
    write_spec,
)

PROMISED = (
    "kps",
    "kps_all_pairs",
    "identity_similarity",
    "identity_gain",
    "prompt_similarity",
    "base_drift",
    "fisher_drift",
    "diversity_ratio",
)


def test_train_in_a_process_prints_one_document_and_publishes(first_run: tuple[Published, Finished]) -> None:
    made, finished = first_run
    assert finished.code == 0, finished.err
    [one] = finished.json()["adapters"]
    manifest = open_registry(made.storage).resolve("cup")
    assert (one["id"], one["revision"], one["outcome"]) == ("cup", manifest.revision, "published")
    assert one["reason"] is None
    assert manifest.metrics is not None
    assert one["metrics"] == {name: manifest.metrics[name] for name in PROMISED}
    assert "published cup" in finished.err
    assert not [key for key in stored_files(made.storage) if key.startswith("checkpoints/")], (
        "checkpoints are left behind"
    )


def test_train_again_changes_nothing_and_says_so(published: Published, command: CommandLine) -> None:
    before = stored_files(published.storage)
    finished = command("train", "--in-process", published.spec, "--storage", published.storage, "--json")
    assert finished.code == 0
    [one] = finished.json()["adapters"]
    assert one["outcome"] == "already published"
    assert set(one["metrics"]) == set(PROMISED)
    assert stored_files(published.storage) == before
    assert "train " not in finished.err, "a training bar was shown"


def test_a_changed_spec_makes_a_new_revision_and_latest_moves(
    published: Published, command: CommandLine, photos: Path, tmp_path: Path
) -> None:
    old = open_registry(published.storage).resolve("cup")
    spec = write_spec(tmp_path / "changed.yaml", published.base, [adapter("cup", photos)], storage="storage")
    # The storage is the spec's own, relative to the spec file.
    finished = command("train", "--in-process", spec, "--json")
    assert finished.code == 0
    [one] = finished.json()["adapters"]
    registry = open_registry(published.storage)
    assert one["outcome"] == "published"
    assert one["revision"] != old.revision
    assert one["metrics"] == {}
    assert registry.resolve("cup").revision == one["revision"]
    assert registry.resolve(f"cup@{old.revision}") == old
    assert [move.revision for move in registry.alias_history("cup", "latest")] == [old.revision, one["revision"]]


def test_a_release_of_the_package_retrains_nothing_and_another_training_version_does(
    published: Published, command: CommandLine, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_spec(tmp_path / "spec.yaml", published.base, [adapter("cup", photos)])
    train = ("train", "--in-process", spec, "--storage", tmp_path / "storage", "--json")
    [first] = command(*train).json()["adapters"]
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "7.3.0" if name == "cat-cluster" else version(name))
    [again] = command(*train).json()["adapters"]
    assert (again["outcome"], again["revision"]) == ("already published", first["revision"])
    for room in ("prepare", "job"):
        monkeypatch.setattr(f"cat_cluster.pipeline.{room}.TRAINING_VERSION", TRAINING_VERSION + 1)
    [other] = command(*train).json()["adapters"]
    assert other["outcome"] == "published"
    assert other["revision"] != first["revision"]
    manifest = open_registry(tmp_path / "storage").resolve("cup")
    assert (manifest.revision, manifest.package_version) == (other["revision"], "7.3.0")


def test_changed_photos_make_a_new_revision(
    published: Published, command: CommandLine, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos.iterdir():
        Image.open(path).rotate(90).save(folder / path.name)
    spec = published.spec.read_text().replace(str(photos), str(folder))
    (tmp_path / "spec.yaml").write_text(spec)
    before = open_registry(published.storage).resolve("cup").revision
    finished = command("train", "--in-process", tmp_path / "spec.yaml", "--storage", published.storage, "--json")
    assert finished.json()["adapters"][0]["revision"] != before


def test_adapters_list_show_and_verify(published: Published, command: CommandLine) -> None:
    storage = ("--storage", str(published.storage))
    listed = command("adapters", "list", "--json", *storage).json()["adapters"]
    [one] = listed
    assert one["adapter_id"] == "cup"
    assert one["aliases"] == {"latest": one["revisions"][0]}
    assert "sks" in command("adapters", "list", *storage).out

    shown = command("adapters", "show", "cup", *storage).json()
    assert shown["concepts"][0]["token"] == "sks"
    assert shown["base_name"] == str(published.base)
    assert set(PROMISED) <= set(shown["metrics"])
    assert command("adapters", "show", f"cup@{shown['revision']}", *storage).json() == shown

    report = command("adapters", "verify", "cup", "--json", *storage)
    assert (report.code, report.json()["problems"]) == (0, [])
    assert report.json()["objects"] == len(shown["objects"])
    said = command("adapters", "verify", "cup", *storage)
    assert (said.code, said.out) == (0, "")
    assert "is whole" in said.err


def test_aliases_move_roll_back_and_guard_against_delete(published: Published, command: CommandLine) -> None:
    storage = ("--storage", str(published.storage))
    revision = open_registry(published.storage).resolve("cup").revision
    moved = command("adapters", "alias", "cup", "prod", revision, *storage).json()
    assert [move["revision"] for move in moved["history"]] == [revision]
    assert command("adapters", "alias", "cup", "prod", *storage).json() == moved
    assert command("adapters", "show", "cup@prod", *storage).json()["revision"] == revision

    before = stored_files(published.storage)
    assert_refused(command("adapters", "delete", "cup", revision, *storage), "'latest'", "'prod'")
    assert stored_files(published.storage) == before


def test_delete_takes_an_unnamed_revision_and_its_objects(
    published: Published, command: CommandLine, photos: Path, tmp_path: Path
) -> None:
    storage = ("--storage", str(published.storage))
    old = open_registry(published.storage).resolve("cup")
    spec = write_spec(tmp_path / "changed.yaml", published.base, [adapter("cup", photos)])
    new = command("train", "--in-process", spec, "--json", *storage).json()["adapters"][0]["revision"]
    finished = command("adapters", "delete", "cup", old.revision, *storage)
    assert (finished.code, finished.out) == (0, "")
    registry = open_registry(published.storage)
    assert [manifest.revision for manifest in registry.revisions("cup")] == [new]
    assert not registry.store.exists(old.objects["weights"].key)
    assert registry.verify("cup").ok, "an object that both revisions name was taken"


@pytest.mark.parametrize(
    ("fmt", "names"),
    [
        ("diffusers", {"pytorch_lora_weights.safetensors"}),
        ("peft", {"adapter_model.safetensors", "adapter_config.json"}),
        ("kohya", {"cup.safetensors"}),
    ],
)
def test_export_writes_the_names_of_each_format(
    published: Published, command: CommandLine, tmp_path: Path, fmt: str, names: set[str]
) -> None:
    out = tmp_path / "exported"
    finished = command("adapters", "export", "cup", "--format", fmt, "--out", out, "--storage", published.storage)
    assert (finished.code, finished.out) == (0, "")
    assert {path.name for path in out.iterdir()} == names
    [weights] = out.glob("*.safetensors")
    assert load_file(weights)


def test_evaluate_prints_plain_floats_intervals_leaks_and_judge(published: Published, command: CommandLine) -> None:
    finished = command("evaluate", "cup", "--storage", published.storage, "--json")
    assert finished.code == 0
    measured = finished.json()
    assert set(METRICS) == set(PROMISED)
    for name in PROMISED:
        assert type(measured[name]) is float, name
        low, high = measured["intervals"][name]
        assert low <= high
    assert measured["judge"]["digest"]
    assert measured["leak_matrix"]
    manifest = open_registry(published.storage).resolve("cup")
    assert manifest.metrics is not None
    # Photos of at most 512 pixels are stored whole, so a published adapter measures again as it did in training.
    for name in PROMISED:
        assert measured[name] == pytest.approx(manifest.metrics[name], abs=1e-5), name


def test_evaluate_for_people_leaves_stdout_empty(published: Published, command: CommandLine) -> None:
    finished = command("evaluate", "cup", "--storage", published.storage, "--images-per-prompt", "2")
    assert (finished.code, finished.out) == (0, "")
    assert "base_drift" in finished.err


def test_generate_writes_images_that_carry_their_parameters(
    published: Published, command: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "cup.png"
    arguments = ("--prompt", "a photo of a sks cup", "--steps", "3", "--guidance", "2", "--seed", "7")
    storage = ("--storage", str(published.storage))
    finished = command("generate", "--adapter", "cup", *arguments, "--out", out, *storage)
    assert (finished.code, finished.out) == (0, "")
    image = Image.open(out)
    manifest = open_registry(published.storage).resolve("cup")
    wanted = {"prompt": "a photo of a sks cup", "seed": "7", "steps": "3", "guidance": "2.0", "model": manifest.name}
    assert {key: image.info[key] for key in wanted} == wanted

    several = tmp_path / "several.png"
    command("generate", "--adapter", "cup", *arguments, "--count", "2", "--out", several, *storage)
    # Other rows in the call may change the last bits of a float, and so round a pixel to the next level.
    first = np.asarray(Image.open(tmp_path / "several-0.png"), dtype=np.int16)
    assert np.abs(first - np.asarray(image, dtype=np.int16)).max() <= 1
    assert Image.open(tmp_path / "several-1.png").info["seed"] == "8"

    command("generate", "--base", published.base, *arguments, "--out", tmp_path / "base.png")
    assert Image.open(tmp_path / "base.png").tobytes() != image.tobytes()
    command("generate", "--adapter", "cup", *arguments, "--strength", "0", "--out", tmp_path / "zero.png", *storage)
    assert Image.open(tmp_path / "zero.png").tobytes() == Image.open(tmp_path / "base.png").tobytes()


def test_spec_check_and_schema(published: Published, command: CommandLine) -> None:
    checked = command("spec", "check", published.spec, "--json")
    assert checked.code == 0
    [one] = checked.json()["adapters"]
    assert one["training"]["steps"] == 6
    said = command("spec", "check", published.spec)
    assert (said.code, said.out) == (0, "")
    assert "cup: sks cup" in said.err

    schema = command("spec", "schema").json()
    assert {"name", "base", "adapters", "training"} <= set(schema["properties"])


def test_base_path_prints_the_folder_alone(published: Published, command: CommandLine) -> None:
    finished = command("base", "path", published.base)
    assert (finished.code, finished.out) == (0, f"{published.base}\n")


def test_the_storage_comes_from_the_environment(
    published: Published, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAT_STORAGE", str(published.storage))
    assert command("adapters", "show", "cup").json()["adapter_id"] == "cup"


def test_the_help_and_usage_errors_of_a_process() -> None:
    """A mistyped option ends with 2, as in any command line; neither needs torch, so both come at once."""
    wrong = run_process("train", "--in-process", "spec.yaml", "--storag", "x")
    assert (wrong.code, wrong.out) == (2, "")
    assert "--storag" in wrong.err
    assert "Traceback" not in wrong.err
    helped = run_process("--help")
    assert helped.code == 0
    assert "adapters" in helped.out


def test_json_documents_hold_no_nan(published: Published, command: CommandLine) -> None:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    for arguments in (("adapters", "show", "cup"), ("adapters", "list", "--json")):
        json.loads(command(*arguments, "--storage", published.storage).out, parse_constant=refuse)
