"""Interrupted jobs end as uninterrupted ones, and one adapter that diverges fails alone."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from cat_cluster.registry import AdapterDraft, Manifest, Registry
from tests.support.tiny_jobs import (
    CommandLine,
    adapter,
    assert_refused,
    open_registry,
    published_weights,
    relative_change,
    start_process,
    stored_files,
    write_photos,
    write_spec,
)

PATIENCE_SECONDS = 200


class Crash(BaseException):
    """The process is gone; nothing may catch this."""


@pytest.fixture
def two_photos(tmp_path: Path) -> tuple[Path, Path]:
    return write_photos(tmp_path / "cup", seed=1), write_photos(tmp_path / "mug", seed=2)


def test_a_job_killed_in_the_middle_ends_bit_equal(
    command: CommandLine, tiny_base_folder: Path, two_photos: tuple[Path, Path], tmp_path: Path
) -> None:
    cup, mug = two_photos
    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny_base_folder,
        [adapter("cup", cup), adapter("mug", mug, token="zwx", training={"rank": 3, "seed": 4})],
        training={"steps": 30, "lr_schedule": "cosine", "warmup_steps": 5, "learning_rate": 0.005},
        cluster={"checkpoint_every": 4},
    )
    storage = tmp_path / "storage"
    process = start_process("train", "--in-process", spec, "--storage", storage, "--json")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list(storage.glob("checkpoints/**/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.002)
    process.kill()
    out, _ = process.communicate()
    assert (process.returncode, out) == (-signal.SIGKILL, "")
    assert open_registry(storage).list() == []
    assert not [key for key in stored_files(storage) if key.startswith(("adapters/", "aliases/", "objects/"))]

    resumed = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert resumed.code == 0, resumed.err
    whole = command("train", "--in-process", spec, "--storage", tmp_path / "whole", "--json")
    for adapter_id in ("cup", "mug"):
        ours, theirs = (open_registry(place).resolve(adapter_id) for place in (storage, tmp_path / "whole"))
        assert ours.revision == theirs.revision
        assert ours.objects == theirs.objects, "the weights' digests differ"
        assert ours.training["history"] == theirs.training["history"]
        assert len(ours.training["history"]["steps"]) == 30
    assert resumed.json()["adapters"] == whole.json()["adapters"]
    # A writer that is killed leaves its unnamed file behind, which no reader sees.
    assert not [key for key in stored_files(storage) if key.startswith("checkpoints/") and "/.tmp-" not in key]


def test_a_crash_between_two_publications_costs_no_training(
    command: CommandLine,
    tiny_base_folder: Path,
    two_photos: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first adapter of a pack is out, the second is not: its last checkpoint is still found."""
    cup, mug = two_photos
    adapters = [adapter("cup", cup), adapter("mug", mug, token="zwx")]
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, adapters)
    storage = tmp_path / "storage"
    publish = Registry.publish

    def crash_at_mug(registry: Registry, draft: AdapterDraft) -> Manifest:
        if draft.adapter_id == "mug":
            raise Crash
        return publish(registry, draft)

    def no_step(*_: object, **__: object) -> None:
        raise AssertionError("a step was trained again")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "publish", crash_at_mug)
        with pytest.raises(Crash):
            command("train", "--in-process", spec, "--storage", storage, "--json")
    assert [one.adapter_id for one in open_registry(storage).list()] == ["cup"]
    before = open_registry(storage).resolve("cup")
    with monkeypatch.context() as patch:
        patch.setattr("cat_cluster.training.loop.train_step", no_step)
        again = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert again.code == 0, again.err
    assert [one["outcome"] for one in again.json()["adapters"]] == ["already published", "published"]
    assert open_registry(storage).resolve("cup") == before
    command("train", "--in-process", spec, "--storage", tmp_path / "whole", "--json")
    assert published_weights(storage, "mug").digest() == published_weights(tmp_path / "whole", "mug").digest()
    assert not [key for key in stored_files(storage) if key.startswith("checkpoints/")]


def test_checkpoints_of_an_earlier_version_are_neither_read_nor_passed_over(
    command: CommandLine, tiny_base_folder: Path, two_photos: tuple[Path, Path], tmp_path: Path
) -> None:
    """They lie where an earlier version kept them, under the revision that the job has still."""
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", two_photos[0])])
    whole = command("train", "--in-process", spec, "--storage", tmp_path / "whole", "--json").json()
    old = tmp_path / "storage" / "runs" / "cup" / whole["adapters"][0]["revision"] / "checkpoints"
    old.mkdir(parents=True)
    (old / "00000002.json").write_text("{}")
    (old / "00000002.safetensors").write_bytes(b"0.value")
    before = stored_files(tmp_path / "storage")
    refused = command("train", "--in-process", spec, "--storage", tmp_path / "storage", "--json")
    assert_refused(refused, "adapter cup", "/checkpoints/", "earlier cat-cluster", "remove them")
    assert stored_files(tmp_path / "storage") == before
    shutil.rmtree(old)
    assert command("train", "--in-process", spec, "--storage", tmp_path / "storage").code == 0


def test_an_adapter_that_diverges_fails_alone(
    command: CommandLine, tiny_base_folder: Path, two_photos: tuple[Path, Path], tmp_path: Path
) -> None:
    cup, mug = two_photos
    good = adapter("good", cup)
    bad = adapter("bad", mug, token="zwx", training={"learning_rate": 1e30})
    training = {"steps": 20, "learning_rate": 0.005}
    packed = write_spec(tmp_path / "packed.yaml", tiny_base_folder, [bad, good], training=training)
    storage = tmp_path / "storage"
    finished = command("train", "--in-process", packed, "--storage", storage, "--json")
    assert finished.code == 1
    outcomes = {one["id"]: one for one in finished.json()["adapters"]}
    assert outcomes["bad"]["outcome"] == "failed"
    assert "not finite at step 1" in outcomes["bad"]["reason"]
    assert outcomes["good"]["outcome"] == "published"
    assert [one.adapter_id for one in open_registry(storage).list()] == ["good"]
    assert "failed bad" in finished.err

    alone = write_spec(tmp_path / "alone.yaml", tiny_base_folder, [good], training=training)
    assert command("train", "--in-process", alone, "--storage", tmp_path / "alone", "--json").code == 0
    ours, theirs = published_weights(storage, "good"), published_weights(tmp_path / "alone", "good")
    assert relative_change(ours, theirs) <= 1e-3

    again = command("train", "--in-process", packed, "--storage", storage, "--json")
    assert again.code == 1
    assert [one["outcome"] for one in again.json()["adapters"]] == ["failed", "already published"]
