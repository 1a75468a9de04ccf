"""The example of docs/serving.md, command by command: its certificate signs, and its reader trusts the image."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from serve.calls import FileFormat
from serve.denoise.image_file import image_file
from serve.denoise.signing import open_signer
from serve.settings import ServeSettings

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## What an image says of itself") : PAGE.index("## Drift\n")]


def block(language: str, word: str) -> str:
    """The block of the section that has a word in it."""
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    (only,) = [text for text in found if word in text]
    return only


def test_the_example_signs_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "-euc", block("sh", "openssl")], check=True, capture_output=True)
    settings = ServeSettings.model_validate(yaml.safe_load(Path("service.yaml").read_text()))
    signer = open_signer(settings.signing)
    assert signer is not None
    assert signer.subject == "CN=Example images,O=Example"
    image = image_file(torch.zeros(3, 16, 16), {}, FileFormat("png"))
    Path("cup.png").write_bytes(signer.sign(image, "image/png", {"model": "cup@r-0123456789ab"}))
    exec(compile(block("python", "c2pa"), "docs/serving.md", "exec"), {})
    state, assertions = capsys.readouterr().out.splitlines()
    assert state == "Trusted"
    assert "c2pa.created" in assertions
    assert "cup@r-0123456789ab" in assertions


def test_the_settings_that_the_page_shows_are_settings() -> None:
    shown = ServeSettings.model_validate(yaml.safe_load(block("yaml", "certificates")))
    assert shown.signing is not None
