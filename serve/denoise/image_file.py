"""Images as files: PNG, JPEG or WebP, each with its own keys and the `parameters` line that other tools read."""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

from PIL import Image
from torch import Tensor

from cat_cluster.models.generate import image_array, png_bytes
from cat_cluster.models.provenance import xmp_packet
from cat_cluster.registry.stacks import stack_name
from cat_cluster.spec.choices import SamplerName
from serve.calls import FileFormat, ImageCall

_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286  # tags of EXIF: ImageDescription, the folder of UserComment
# As AUTOMATIC1111 names them, so that it finds them again when an image's parameters are pasted.
_SAMPLERS: Mapping[SamplerName, str] = {
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
_JPEG_EXIF = 65400  # bytes that a JPEG has for it, less the digits of a longer seed; PNG and WebP have no limit


def image_file(image: Tensor, metadata: Mapping[str, str], file: FileFormat, *, edited: bool = False) -> bytes:
    """Return an image [3, H, W] in [0, 1] as a file that carries `metadata`, and in XMP that a model drew or edited it.

    PNG has it in text chunks. JPEG and WebP have `parameters` in EXIF's UserComment, where AUTOMATIC1111 writes it, and
    the other keys in ImageDescription as JSON.
    """
    if file.kind == "png":
        return png_bytes(image, metadata, edited=edited)
    # Without subsampling a JPEG keeps its colours as sharp as its shapes.
    options = {"subsampling": 0} if file.kind == "jpeg" else {}
    buffer = io.BytesIO()
    xmp = xmp_packet(edited=edited).encode()
    Image.fromarray(image_array(image)).save(
        buffer, file.kind, quality=file.quality, exif=_exif(metadata), xmp=xmp, **options
    )
    return buffer.getvalue()


def image_metadata(call: ImageCall, seed: int, served_by: Sequence[str], digests: Sequence[str]) -> dict[str, str]:
    """Return what an image's file says of it; served_by: the revisions, or the base's name; digests: of their weights.

    `model`, `strength` and `adapter_sha256` of a stack have a part for each adapter, with a + between them. An edit has
    the share of steps that were made as `denoising_strength`, for `strength` is that of the adapters.
    `parameters` follows AUTOMATIC1111's form and names, so that its readers show prompt, sampler, seed and model.
    """
    text = {
        "prompt": call.prompt,
        "negative_prompt": call.negative_prompt,
        "seed": str(seed),
        "steps": str(call.steps),
        "guidance": str(call.guidance),
        "sampler": call.sampler,
        "weighting": call.weighting,
        "prompt_chunks": str(call.prompt_chunks),
        "strength": stack_name(str(member.strength) for member in call.adapters) or "1.0",
        "model": stack_name(served_by),
        "request_id": call.request_id,
    }
    if call.edit is not None:
        text["denoising_strength"] = str(call.edit.strength)
        text["masked"] = str(call.edit.mask is not None).lower()
    if digests:
        text["adapter_sha256"] = stack_name(digests)
    return {**text, "parameters": _parameters(call, seed, served_by, digests)}


def fitting_prompts(call: ImageCall, served_by: Sequence[str], digests: Sequence[str]) -> tuple[ImageCall, str | None]:
    """Return the call with as much of its prompts as its files can carry, and a note if that is not all."""
    if call.file.kind != "jpeg":
        return call, None

    def cut(length: int) -> ImageCall:
        return replace(call, prompt=call.prompt[:length], negative_prompt=call.negative_prompt[:length])

    def is_too_long(length: int) -> bool:
        return len(_exif(image_metadata(cut(length), call.seed, served_by, digests)).tobytes()) > _JPEG_EXIF

    longest = max(len(call.prompt), len(call.negative_prompt))
    if not is_too_long(longest):
        return call, None
    length = bisect_left(range(longest), True, key=is_too_long) - 1
    note = f"the JPEG carries the first {length} characters of each prompt; png and webp have room for all of it"
    return cut(length), note


def _exif(metadata: Mapping[str, str]) -> Image.Exif:
    exif, own = Image.Exif(), dict(metadata)
    parameters = own.pop("parameters", None)
    if parameters is not None:
        exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
    if own:
        exif[_DESCRIPTION] = json.dumps(own)  # ASCII, as the tag has to be
    return exif


def _parameters(call: ImageCall, seed: int, served_by: Sequence[str], digests: Sequence[str]) -> str:
    lines = [call.prompt]
    if call.negative_prompt:
        lines.append(f"Negative prompt: {call.negative_prompt}")
    facts = [
        f"Steps: {call.steps}",
        f"Sampler: {_SAMPLERS[call.sampler]}",
        f"CFG scale: {call.guidance:g}",
        f"Seed: {seed}",
        f"Model: {stack_name(served_by)}",
    ]
    if call.edit is not None:
        facts.append(f"Denoising strength: {call.edit.strength:g}")
    if digests:
        hashes = [f"{name}: {digest[:12]}" for name, digest in zip(served_by, digests, strict=True)]
        facts.append(f'Lora hashes: "{", ".join(hashes)}"')
    return "\n".join([*lines, ", ".join(facts)])
