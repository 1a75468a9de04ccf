"""Bases that lie in a real S3 server: a folder, and a checkpoint in one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import boto3
import pytest
import torch

from cat_cluster.errors import BaseModelError, StoreError
from cat_cluster.models import single_file
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.base_names import base_folder, check_base, local_base
from tests.conftest import TINY_MERGES
from tests.support.ldm_files import write_checkpoint


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


def upload(folder: Path, address: str) -> None:
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")


def test_a_folder(s3_bucket: str, tiny_base_folder: Path, tmp_path: Path, cache: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle, which is never fetched")
    shutil.copy(next((folder / "unet").glob("*.safetensors")), folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    address = f"{s3_bucket}/bases/tiny"
    upload(folder, address)
    assert check_base(address) is None
    assert not cache.exists(), "a check fetches no weights"
    assert local_base(address) is None
    base = load_base_model(address)
    assert base.fingerprint == load_base_model(str(tiny_base_folder)).fingerprint
    assert base.name == address
    assert {path.suffix for path in base.folder.rglob("*") if path.is_file()} <= {".json", ".txt", ".safetensors"}
    assert not list(base.folder.rglob("*.fp16.*"))
    (base.folder / "marker").touch()
    assert (base_folder(f"{address}/") / "marker").exists(), "fetched again"
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    upload(folder, address)
    for refuses in (check_base, base_folder):
        with pytest.raises(BaseModelError, match="an inpainting"):
            refuses(address)


def test_parts_of_either_variant_what_has_gone_from_the_cache_and_missing_weights(
    s3_bucket: str, tiny_base_folder: Path, tmp_path: Path, cache: Path
) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    address = f"{s3_bucket}/bases/mixed"
    upload(folder, address)
    assert check_base(address) is None
    wanted = load_base_model(str(folder)).fingerprint
    base = load_base_model(address)
    assert base.fingerprint == wanted
    (base.folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert load_base_model(address).fingerprint == wanted
    shutil.rmtree(cache)
    address = f"{s3_bucket}/bases/lacking"
    upload(Path(shutil.copytree(folder, tmp_path / "lacking", ignore=lambda *_: ["model.safetensors"])), address)
    for refuses in (check_base, base_folder):
        with pytest.raises(BaseModelError, match=rf"{address}/text_encoder: model\.safetensors is missing"):
            refuses(address)
    assert not cache.exists()


def test_a_checkpoint(
    s3_bucket: str, tiny_base_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = tmp_path / "families"
    families.mkdir()
    monkeypatch.setattr(single_file, "FAMILIES", families)
    (families / "clip_merges.txt").write_text("#version: 0.2\n" + "\n".join(TINY_MERGES) + "\n")
    shutil.copytree(tiny_base_folder, families / "sd1", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    files = tmp_path / "files"
    files.mkdir()
    write_checkpoint(tiny_base_folder, files / "cups.safetensors")
    (files / "cups.yaml").write_text("parameterization: v\n")
    upload(files, f"{s3_bucket}/bases")
    address = f"{s3_bucket}/bases/cups.safetensors"
    assert check_base(address) is None
    assert not cache.exists()
    base, wanted = load_base_model(address), load_base_model(str(tiny_base_folder))
    assert base.schedule.prediction_type == "v_prediction", "the YAML file beside it is read"
    for ours, theirs in zip(base.unet.parameters(), wanted.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (files / "cups.safetensors").write_bytes(b"no head")
    upload(files, f"{s3_bucket}/bases")
    with pytest.raises(BaseModelError, match="is damaged"):
        check_base(address)


def test_what_is_not_there_is_named(s3_bucket: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.txt").write_text("nothing to draw with")
    upload(tmp_path / "more", f"{s3_bucket}/bases")
    with pytest.raises((BaseModelError, StoreError), match=r"cups\.safetensors|nothing that could be used"):
        check_base(f"{s3_bucket}/bases/cups.safetensors")
    with pytest.raises(BaseModelError, match=r"is missing; a base is a complete diffusers folder"):
        check_base(f"{s3_bucket}/bases")
    with pytest.raises(StoreError):
        check_base("s3://no-such-bucket-of-ours/base")
