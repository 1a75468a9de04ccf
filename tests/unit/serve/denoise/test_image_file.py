"""Image files: every format carries the same parameters, where other programs look for them, and its quality counts."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import serve
from cat_cluster.models.generate import image_array
from cat_cluster.spec.choices import SamplerName
from serve.calls import FileFormat, FileKind, ImageCall
from serve.denoise.image_file import fitting_prompts, image_file, image_metadata
from tests.support.provenance import DRAWN, said_in_xmp, xmp_of
from tests.support.services import stack

KINDS: list[FileKind] = ["png", "jpeg", "webp"]
CALL = ImageCall("request-1", "a caf\u00e9 \u4e2d \U0001f600 <b>\n&", stack("cup"), negative_prompt="red", seed=11)


def picture() -> torch.Tensor:
    """Smooth colours with some noise, as a drawn picture has them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(64, 96), mode="bicubic")[0]
    return (smooth + 0.02 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def told(data: bytes) -> dict[str, str]:
    """What a file says of its image, read by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            text = dict(image.text)  # type: ignore[attr-defined]
            del text["XML:com.adobe.xmp"]
            return text
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert comment[:8] == b"UNICODE\0"
        own: dict[str, str] = json.loads(exif[ExifTags.Base.ImageDescription])
        return {**own, "parameters": comment[8:].decode("utf-16-be")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_carries_the_same_parameters(kind: FileKind) -> None:
    metadata = image_metadata(CALL, 12, ["cup@r-0123456789ab"], ["d" * 64])
    data = image_file(picture(), metadata, FileFormat(kind))
    assert told(data) == metadata
    assert metadata["parameters"].startswith(CALL.prompt)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (kind.upper(), (96, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_has_a_part_for_each_adapter(kind: FileKind) -> None:
    call = replace(CALL, adapters=stack("cup:0.5", "mug"))
    names = ["cup@r-0123456789ab", "mug@r-ba9876543210"]
    metadata = image_metadata(call, 12, names, ["d" * 64, "e" * 64])
    found = told(image_file(picture(), metadata, FileFormat(kind)))
    assert found["model"] == "cup@r-0123456789ab+mug@r-ba9876543210"
    assert found["strength"] == "0.5+1.0"
    assert found["adapter_sha256"] == f"{'d' * 64}+{'e' * 64}"
    hashes = f"{names[0]}: {'d' * 12}, {names[1]}: {'e' * 12}"
    assert found["parameters"].endswith(f'Model: {found["model"]}, Lora hashes: "{hashes}"')


def test_samplers_have_automatic1111s_names_in_files_and_on_the_page() -> None:
    """As its modules/sd_samplers_kdiffusion.py and modules/sd_samplers_timesteps.py have them."""
    names = {
        "ddim": "DDIM",
        "euler": "Euler",
        "euler_karras": "Euler Karras",
        "euler_ancestral": "Euler a",
        "dpmpp_2m": "DPM++ 2M",
        "dpmpp_2m_karras": "DPM++ 2M Karras",
        "dpmpp_2m_sde": "DPM++ 2M SDE",
        "dpmpp_2m_sde_karras": "DPM++ 2M SDE Karras",
        "lcm": "LCM",
    }
    assert tuple(names) == get_args(SamplerName)
    for sampler, name in names.items():
        metadata = image_metadata(replace(CALL, sampler=sampler), 12, ["cup@r-0123456789ab"], ["d" * 64])
        assert metadata["sampler"] == sampler
        assert f"Steps: 25, Sampler: {name}, CFG scale: 4, " in metadata["parameters"]
    page = (Path(serve.__file__).parent / "page" / "index.html").read_text()
    choice = page.partition('<select id="sampler">')[2].partition("</select>")[0]
    assert re.findall(r'<option value="(.+?)">(.+?)</option>', choice) == list(names.items())


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_quality_is_size_against_likeness(kind: FileKind) -> None:
    original, sizes, faults = picture(), [], []
    for quality in (0, 50, 100):
        data = image_file(original, {}, FileFormat(kind, quality))
        sizes.append(len(data))
        with Image.open(io.BytesIO(data)) as image:
            assert not image.getexif()
            faults.append(float(np.abs(np.asarray(image, dtype=float) - image_array(original)).mean()))
    assert sizes == sorted(set(sizes))
    assert faults == sorted(set(faults), reverse=True)
    assert faults[-1] < 4.0
    whole = image_file(original, {}, FileFormat("png"))
    assert image_file(original, {}, FileFormat("png", 0)) == whole
    with Image.open(io.BytesIO(whole)) as image:
        assert np.array_equal(np.asarray(image), image_array(original))


@pytest.mark.parametrize("letter", ["a", "\u4e2d", "\U0001f600", '"'])
@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_prompts_are_carried_or_the_note_says_how_much(kind: FileKind, letter: str) -> None:
    call = replace(CALL, prompt=letter * 32_000, negative_prompt=letter * 4000, file=FileFormat(kind))
    kept, note = fitting_prompts(call, ["cup@r-0123456789ab"], ["d" * 64])
    metadata = image_metadata(kept, 2**63 - 1, ["cup@r-0123456789ab"], ["d" * 64])
    data = image_file(picture(), metadata, call.file)
    assert told(data) == metadata
    assert said_in_xmp(xmp_of(data)) == DRAWN
    if kind == "jpeg":
        assert note is not None
        assert f"the first {len(kept.prompt)} characters" in note
        assert {"a": 17_000, '"': 12_000}.get(letter, 2000) <= len(kept.prompt) < 32_000
        assert kept.negative_prompt == call.negative_prompt[: len(kept.prompt)]
    else:
        assert (kept, note) == (call, None)


@pytest.mark.parametrize("metadata", [{}, image_metadata(CALL, 12, ["cup@r-0123456789ab"], ["d" * 64])])
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_says_in_xmp_that_a_model_drew_it(kind: FileKind, metadata: dict[str, str]) -> None:
    # Previews, which have no metadata, among them.
    assert said_in_xmp(xmp_of(image_file(picture(), metadata, FileFormat(kind)))) == DRAWN


def test_usual_prompts_are_carried_whole() -> None:
    call = replace(CALL, prompt="a photo of a sks cup " * 100, file=FileFormat("jpeg"))
    assert fitting_prompts(call, ["base"], []) == (call, None)
