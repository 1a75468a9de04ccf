"""What users get wrong and what machines do to files: one clear error each, no half-written thing to be seen.

Every test goes through the command line and looks at the exit code, stdout, stderr and the bytes of the store.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load, save

from tests.integration.conftest import Published
from tests.support.tiny_jobs import (
    CommandLine,
    Finished,
    adapter,
    assert_refused,
    largest_file,
    open_registry,
    published_weights,
    run_process,
    stored_files,
    write_photos,
    write_spec,
)

USES: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "--prompt", "a sks cup", "--steps", "1", "--out", "{out}/a.png", "--adapter"),
    "evaluate": ("evaluate", "--json"),
    "export": ("adapters", "export", "--format", "peft", "--out", "{out}/exported"),
}


def spec_with(path: Path, base: Path, photos: Path, place: tuple[str | int, ...], value: object) -> Path:
    """A good spec with one value changed, or one key taken out (value None)."""
    write_spec(path, base, [adapter("cup", photos)])
    spec = yaml.safe_load(path.read_text())
    target: Any = spec
    for part in place[:-1]:
        target = target[part]
    if value is None:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    path.write_text(yaml.safe_dump(spec))
    return path


def use(command: CommandLine, name: str, reference: str, storage: Path, out: Path) -> Finished:
    """Ask for an adapter in one of the ways that read its weights."""
    arguments = [part.format(out=out) for part in USES[name]]
    at = len(arguments) if name == "generate" else 2 if name == "export" else 1
    return command(*arguments[:at], reference, *arguments[at:], "--storage", storage)


@pytest.mark.parametrize(
    ("place", "value", "parts"),
    [
        (("learning_rat",), 0.1, ("learning_rat",)),
        (("training", "lernrate"), 0.1, ("training.lernrate",)),
        (("training", "steps"), "many", ("training.steps", "many")),
        (("training", "learning_rate"), -1, ("training.learning_rate",)),
        (("training", "learning_rate"), 1e39, ("training.learning_rate",)),
        (("adapters", 0, "concepts", 0, "token"), None, ("adapters[0].concepts[0].token",)),
        (("adapters", 0, "concepts", 0, "alpha"), -1, ("adapters[0].concepts[0].alpha",)),
        (("adapters", 0, "concepts"), [], ("adapters[0].concepts",)),
        (("adapters", 0, "id"), "My Cup", ("adapters[0].id",)),
        (("method",), "dreambooth", ("method", "cat", "lora")),
    ],
)
def test_a_bad_field_is_named_by_its_path(
    command: CommandLine,
    tiny_base_folder: Path,
    photos: Path,
    tmp_path: Path,
    place: tuple[str | int, ...],
    value: object,
    parts: tuple[str, ...],
) -> None:
    spec = spec_with(tmp_path / "spec.yaml", tiny_base_folder, photos, place, value)
    storage = tmp_path / "storage"
    assert_refused(command("train", "--in-process", spec, "--storage", storage, "--json"), "spec.yaml", *parts)
    assert_refused(command("spec", "check", spec, "--json"), "spec.yaml", *parts)
    assert not storage.exists()


def test_a_bad_spec_ends_a_real_process_with_1(tiny_base_folder: Path, photos: Path, tmp_path: Path) -> None:
    spec = spec_with(tmp_path / "spec.yaml", tiny_base_folder, photos, ("training", "lernrate"), 1)
    assert_refused(run_process("spec", "check", spec, "--json"), "training.lernrate")


@pytest.mark.parametrize("content", [b"adapters: [", b"- 1\n", b"", b"name: \xff\xfe\n", None])
def test_a_file_that_is_no_spec(command: CommandLine, tmp_path: Path, content: bytes | None) -> None:
    spec = tmp_path / "spec.yaml"
    if content is not None:
        spec.write_bytes(content)
    assert_refused(command("train", "--in-process", spec, "--json"), "spec.yaml")


def no_photos(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def text_as_image(folder: Path) -> None:
    (folder / "9.png").write_text("not a picture")


def cut_off_image(folder: Path) -> None:
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])


def caption_without_token(folder: Path) -> None:
    for image in folder.glob("*.png"):
        image.with_suffix(".txt").write_text("a photo of a cup")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (no_photos, ("holds no image",)),
        (no_folder, ("images",)),
        (text_as_image, ("9.png",)),
        (cut_off_image, ("1.png",)),
        (caption_without_token, ("lack the token 'sks'",)),
    ],
)
def test_bad_photos_of_one_adapter_stop_the_job_before_it_starts(
    command: CommandLine,
    tiny_base_folder: Path,
    photos: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    parts: tuple[str, ...],
) -> None:
    bad = tmp_path / "bad-cup"
    shutil.copytree(photos, bad)
    spoil(bad)
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("good", photos), adapter("bad", bad)])
    storage = tmp_path / "storage"
    assert_refused(command("train", "--in-process", spec, "--storage", storage, "--json"), "bad-cup", *parts)
    assert_refused(command("spec", "check", spec, "--json"), "bad-cup", *parts)
    assert not storage.exists(), "the good adapter was begun"


def truncated_unet(base: Path) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_vae(base: Path) -> None:
    shutil.rmtree(base / "vae")


def broken_config(base: Path) -> None:
    (base / "unet" / "config.json").write_text("{")


def not_finite(base: Path) -> None:
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load(path.read_bytes())
    tensors[min(tensors)].view(-1)[0] = float("nan")
    path.write_bytes(save(tensors))


def refiner(base: Path) -> None:
    (base / "text_encoder").rename(base / "text_encoder_2")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (truncated_unet, ("unet/diffusion_pytorch_model.safetensors",)),
        (no_vae, ("vae",)),
        (broken_config, ("unet/config.json",)),
        (not_finite, ("vae/diffusion_pytorch_model.safetensors", "not finite")),
        (refiner, ("a refiner of Stable Diffusion XL",)),
        (no_folder, ("is neither a folder nor a file",)),
    ],
)
def test_an_unusable_base_folder(
    command: CommandLine,
    tiny_base_folder: Path,
    photos: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    parts: tuple[str, ...],
) -> None:
    base = tmp_path / "spoilt-base"
    shutil.copytree(tiny_base_folder, base)
    spoil(base)
    spec = write_spec(tmp_path / "spec.yaml", base, [adapter("cup", photos)])
    storage = tmp_path / "storage"
    assert_refused(command("train", "--in-process", spec, "--storage", storage, "--json"), "spoilt-base", *parts)
    out = tmp_path / "out.png"
    assert_refused(command("generate", "--base", base, "--prompt", "a cup", "--out", out), "spoilt-base", *parts)
    if spoil in (no_vae, broken_config, refiner, no_folder):  # what a check can see without reading weights
        assert_refused(command("spec", "check", spec, "--json"), "spec.yaml", "adapter cup", "spoilt-base", *parts)
    assert not storage.exists()
    assert not out.exists()


@pytest.mark.parametrize(
    ("base", "part"),
    [
        ("models/sd15.ckpt", "are never read"),
        ("https://hub.example/a/b", "is an address"),
        ("a/b/c", "neither a folder nor a file"),
    ],
)
def test_a_base_that_training_refuses_is_refused_by_the_check(
    command: CommandLine, photos: Path, tmp_path: Path, base: str, part: str
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd15.ckpt").write_bytes(b"weights")
    spec = write_spec(tmp_path / "spec.yaml", base, [adapter("cup", photos)])
    storage = tmp_path / "storage"
    assert_refused(command("spec", "check", spec, "--json"), "spec.yaml", "adapter cup", base, part)
    assert_refused(command("train", "--in-process", spec, "--storage", storage), base, part)


def test_a_judge_that_is_not_there_is_refused_before_training(
    command: CommandLine, tiny_base_folder: Path, photos: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "no-judge"
    judge.mkdir()
    spec = write_spec(
        tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", photos)], evaluation={"judge": str(judge)}
    )
    storage = tmp_path / "storage"
    assert_refused(command("train", "--in-process", spec, "--storage", storage, "--json"), "no-judge")
    assert not storage.exists(), "training was begun for nothing"


def test_too_few_evaluation_images_are_refused_before_training(
    command: CommandLine, tiny_base_folder: Path, photos: Path, judge_folder: Path, tmp_path: Path
) -> None:
    evaluation = {"judge": str(judge_folder), "prompts": ["a {}"], "images_per_prompt": 1}
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", photos)], evaluation=evaluation)
    storage = tmp_path / "storage"
    finished = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert_refused(finished, "evaluation.images_per_prompt")
    assert not storage.exists(), "training was begun for nothing"


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("cupp", ("'cupp'", "did you mean cup")),
        ("cup@prod", ("'prod'", "latest")),
        ("cup@r-000000000000", ("r-000000000000",)),
        ("My Cup", ("'My Cup'",)),
        ("../cup", ("'../cup'",)),
    ],
)
def test_an_unknown_adapter(
    published: Published, command: CommandLine, tmp_path: Path, name: str, reference: str, parts: tuple[str, ...]
) -> None:
    before = stored_files(published.storage)
    assert_refused(use(command, name, reference, published.storage, tmp_path), *parts)
    assert_refused(command("adapters", "show", reference, "--storage", published.storage), *parts)
    assert_refused(command("adapters", "verify", reference, "--json", "--storage", published.storage), *parts)
    assert stored_files(published.storage) == before
    assert not (tmp_path / "a.png").exists()
    assert not (tmp_path / "exported").exists()


def weights_path(published: Published) -> Path:
    return published.storage / open_registry(published.storage).resolve("cup").objects["weights"].key


def truncate(published: Published) -> str:
    path = weights_path(published)
    path.write_bytes(path.read_bytes()[:-10])
    return path.name


def tamper(published: Published) -> str:
    path = weights_path(published)
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)
    return path.name


def remove(published: Published) -> str:
    path = weights_path(published)
    path.unlink()
    return path.name


def tamper_manifest(published: Published) -> str:
    [path] = published.storage.glob("adapters/cup/*/manifest.json")
    path.write_text(path.read_text().replace('"rank":2', '"rank":3').replace('"rank": 2', '"rank": 3'))
    return "manifest.json"


def cut_manifest(published: Published) -> str:
    [path] = published.storage.glob("adapters/cup/*/manifest.json")
    path.write_bytes(path.read_bytes()[:200])
    return "manifest.json"


def poison_with_right_digests(published: Published) -> str:
    """NaN weights whose every digest is right: what a faulty publisher would have stored."""
    [path] = published.storage.glob("adapters/cup/*/manifest.json")
    manifest = json.loads(path.read_text())
    tensors = load(weights_path(published).read_bytes())
    name = max(tensors)
    tensors[name].view(-1)[0] = float("nan")
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    key = f"objects/{digest}.safetensors"
    (published.storage / key).write_bytes(data)
    manifest["objects"]["weights"] = {"key": key, "size": len(data), "sha256": digest}
    fields = {field: value for field, value in manifest.items() if field != "checksum"}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    manifest["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(manifest))
    return "not finite"


@pytest.mark.parametrize("spoil", [truncate, tamper, remove, tamper_manifest, cut_manifest, poison_with_right_digests])
def test_a_damaged_adapter_is_refused_and_verify_says_why(
    published: Published, command: CommandLine, tmp_path: Path, spoil: Callable[[Published], str]
) -> None:
    named = spoil(published)
    before = stored_files(published.storage)
    for name in USES:
        assert_refused(use(command, name, "cup", published.storage, tmp_path), "cup", named)
    assert not (tmp_path / "a.png").exists()
    assert not (tmp_path / "exported").exists()
    report = command("adapters", "verify", "cup", "--json", "--storage", published.storage)
    assert report.code == 1
    assert named in " ".join(report.json()["problems"])
    said = command("adapters", "verify", "cup", "--storage", published.storage)
    assert (said.code, said.out) == (1, "")
    assert "Traceback" not in said.err
    assert command("adapters", "list", "--json", "--storage", published.storage).code == 0
    assert stored_files(published.storage) == before


def test_an_adapter_of_another_base(
    published: Published, command: CommandLine, tiny_base_v_folder: Path, tmp_path: Path
) -> None:
    finished = command(
        *("generate", "--adapter", "cup", "--base", tiny_base_v_folder, "--prompt", "a sks cup"),
        *("--out", tmp_path / "a.png", "--storage", published.storage),
    )
    assert_refused(finished, "cup@r-", "trained on base", str(published.base))
    assert not (tmp_path / "a.png").exists()


def test_places_that_cannot_be_written(published: Published, command: CommandLine, tmp_path: Path) -> None:
    """A file stands where a folder should be: so for the picture, the export and the storage."""
    blocked = tmp_path / "file"
    blocked.write_text("x")
    storage = ("--storage", str(published.storage))
    picture = ("generate", "--adapter", "cup", "--prompt", "a sks cup", "--steps", "1", "--out", blocked / "a.png")
    assert_refused(command(*picture, *storage), str(blocked))
    export = ("adapters", "export", "cup", "--format", "diffusers", "--out", blocked / "deep")
    assert_refused(command(*export, *storage), str(blocked))
    assert_refused(command("train", "--in-process", published.spec, "--storage", blocked, "--json"), str(blocked))
    assert_refused(command("adapters", "list", "--json", "--storage", "s3://bucket/prefix"), "s3")


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    command: CommandLine, tiny_base_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", photos)])
    assert command("train", "--in-process", spec, "--storage", tmp_path / "one", "--json").code == 0
    blocked = tmp_path / "file"
    blocked.write_text("x")
    monkeypatch.setenv("CAT_CACHE_DIR", str(blocked / "cache"))
    finished = command("train", "--in-process", spec, "--storage", tmp_path / "two", "--json")
    assert finished.code == 0, finished.err
    assert published_weights(tmp_path / "two", "cup").digest() == published_weights(tmp_path / "one", "cup").digest()


def test_a_disk_full_while_publishing_shows_nothing_and_costs_no_training(
    command: CommandLine, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos of noise are larger than a checkpoint: the checkpoint fits the disk, the photos do not."""
    photos = write_photos(tmp_path / "photos", side=512)
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", photos)])
    storage = tmp_path / "storage"
    with largest_file(300_000):
        full = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert full.code == 1
    [one] = full.json()["adapters"]
    assert one["outcome"] == "failed"
    for part in ("objects/", "free", "MB"):
        assert part in one["reason"]
    assert "Traceback" not in full.err
    left = stored_files(storage)
    assert left
    assert all(key.startswith("checkpoints/") for key in left), left.keys()
    assert command("adapters", "list", "--json", "--storage", storage).json() == {"adapters": []}

    def no_step(*_: object, **__: object) -> None:
        raise AssertionError("a step was trained again")

    with monkeypatch.context() as patch:
        patch.setattr("cat_cluster.training.loop.train_step", no_step)
        again = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert again.code == 0, again.err
    command("train", "--in-process", spec, "--storage", tmp_path / "roomy", "--json")
    assert published_weights(storage, "cup").digest() == published_weights(tmp_path / "roomy", "cup").digest()
    assert not [key for key in stored_files(storage) if key.startswith("checkpoints/")]


def test_a_disk_full_while_checkpointing(
    command: CommandLine, tiny_base_folder: Path, photos: Path, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", photos)])
    storage = tmp_path / "storage"
    with largest_file(8_000):
        full = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert_refused(full, "checkpoints", "free", "MB")
    assert stored_files(storage) == {}
    assert command("train", "--in-process", spec, "--storage", storage, "--json").code == 0


def test_a_disk_full_while_drawing_and_exporting(published: Published, command: CommandLine, tmp_path: Path) -> None:
    storage = ("--storage", str(published.storage))
    with largest_file(200):
        picture = command(
            *("generate", "--adapter", "cup", "--prompt", "a sks cup", "--steps", "1"),
            *("--out", tmp_path / "a.png", *storage),
        )
        export = command("adapters", "export", "cup", "--format", "kohya", "--out", tmp_path / "exported", *storage)
    assert_refused(picture, "a.png")
    assert_refused(export, "cup.safetensors")
    assert not list(tmp_path.glob("*.png"))
    assert not list((tmp_path / "exported").iterdir())


def test_an_adapter_that_diverges_in_its_last_step_does_not_take_the_job_with_it(
    command: CommandLine, tiny_base_folder: Path, photos: Path, judge_folder: Path, tmp_path: Path
) -> None:
    """No gradient comes after the last step to tell, but its predictions do, when it is measured."""
    bad = adapter("bad", photos, training={"learning_rate": 1e30})
    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny_base_folder,
        [bad, adapter("good", photos)],
        training={"steps": 1},
        evaluation={"judge": str(judge_folder), "prompts": ["a {}"], "images_per_prompt": 2, "steps": 2},
    )
    storage = tmp_path / "storage"
    finished = command("train", "--in-process", spec, "--storage", storage, "--json")
    outcomes = {one["id"]: one for one in finished.json()["adapters"]}
    assert outcomes["bad"]["outcome"] == "failed", finished.out
    assert "not finite" in outcomes["bad"]["reason"]
    assert outcomes["good"]["outcome"] == "published"
    assert finished.code == 1
    assert open_registry(storage).verify("good").ok
    assert command("adapters", "list", "--storage", storage).code == 0

    unmeasured = write_spec(tmp_path / "unmeasured.yaml", tiny_base_folder, [bad], training={"steps": 1})
    assert command("train", "--in-process", unmeasured, "--storage", storage, "--json").code == 0
    judge = ("--judge", str(judge_folder), "--images-per-prompt", "1")
    assert_refused(command("evaluate", "bad", "--json", *judge, "--storage", storage), "not finite", "learning_rate")
