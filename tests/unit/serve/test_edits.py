"""Edits in the service: in calls with other images, each is the one of the command line and of stock diffusers."""

from __future__ import annotations

import asyncio
import io
import threading
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c2pa import Reader
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from cat_cluster.lora.formats import write_adapter
from cat_cluster.models.base_model import BaseModel
from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from serve.calls import Accepted, Edit, Event, FileFormat, FileKind, Finished, ImageCall, Preview, Progress
from serve.probes.prober import Prober
from serve.settings import ProbeSettings
from tests.support.authority import Authority, signing_settings
from tests.support.provenance import EDITED, EDITED_MEDIA, said_in_xmp, xmp_of
from tests.support.services import CUP, LEVELS, Pixels, Shop, events, failure_of, open_service, pictures, run, stack

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]

SIDE = 16


def photo(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def half(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """White in its right half."""
    return Image.fromarray(np.tile(np.where(np.arange(width) >= width // 2, 255, 0).astype(np.uint8), (height, 1)))


def edit(image: Image.Image, mask: Image.Image | None = None, strength: float = 0.75) -> Edit:
    marks = None if mask is None else (np.asarray(mask) >= 128).tobytes()
    return Edit(image.tobytes(), marks, strength)


PHOTO = replace(CUP, size=(SIDE, SIDE), steps=8, edit=edit(photo()))
PART = replace(PHOTO, edit=edit(photo(), half(), 1.0))


class Nobody:
    def images(self, adapter_id: str, done: int, total: int) -> None: ...

    def message(self, text: str) -> None: ...


def on_the_command_line(shop: Shop, folder: Path, call: ImageCall, image: Path, mask: Path | None) -> list[Pixels]:
    assert call.edit is not None
    request = DrawRequest(
        *(call.prompt, call.adapters, str(shop.folder), call.seed, call.steps, call.guidance, call.sampler),
        count=call.count,
        image=image.read_bytes(),
        mask=None if mask is None else mask.read_bytes(),
        edit_strength=call.edit.strength,
    )
    paths = draw_images(request, folder / "image.png", shop.registry, "cpu", Nobody())
    return [np.asarray(Image.open(path), dtype=np.int16) for path in paths]


def test_images_are_those_of_the_command_line(shop: Shop, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    half().save(tmp_path / "half.png")
    calls = [
        replace(PHOTO, count=2),
        replace(PHOTO, adapters=stack("mug:0.5"), sampler="dpmpp_2m"),
        replace(PART, adapters=(), sampler="euler_ancestral"),
        replace(PART, adapters=stack("cup:0.5"), guidance=1.0, edit=edit(photo(), half(), 0.6)),
    ]

    async def main() -> list[list[Event]]:
        async with open_service(shop) as service:
            return await asyncio.gather(*(events(service, call) for call in calls))

    for call, answer in zip(calls, asyncio.run(main()), strict=True):
        assert call.edit is not None
        mask = None if call.edit.mask is None else tmp_path / "half.png"
        theirs = on_the_command_line(shop, tmp_path, call, tmp_path / "photo.png", mask)
        for ours, own in zip(pictures(answer), theirs, strict=True):
            assert np.abs(ours - own).max() <= LEVELS


@pytest.mark.parametrize("masked", [False, True])
def test_images_are_those_of_stock_diffusers_with_the_adapter(shop: Shop, tmp_path: Path, masked: bool) -> None:
    """Another size than the base's own, two images of a call, and neighbours in the same U-Net calls."""
    picture, mask = photo(24, 16, 3), half(24, 16) if masked else None
    call = replace(PHOTO, size=(24, 16), count=2, negative_prompt="red", edit=edit(picture, mask, 0.75))
    neighbours = [replace(PHOTO, adapters=stack("mug")), replace(call, seed=99, edit=None), PART]

    async def main() -> list[list[Event]]:
        async with open_service(shop) as service:
            return await asyncio.gather(*(events(service, one) for one in (call, *neighbours)))

    drawn, *others = asyncio.run(main())
    pipeline: Any = StableDiffusionImg2ImgPipeline.from_pretrained(shop.folder, safety_checker=None)
    of_mask: dict[str, Any] = {}
    if masked:
        pipeline = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
        of_mask = {"mask_image": mask, "width": 24, "height": 16}
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    weights = shop.registry.load_weights(shop.registry.resolve("cup"))
    write_adapter(weights, tmp_path, "diffusers", adapter_id="test", metadata={})
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    for index, ours in enumerate(pictures(drawn)):
        theirs = pipeline(
            call.prompt,
            image=picture,
            strength=0.75,
            negative_prompt="red",
            num_inference_steps=call.steps,
            guidance_scale=call.guidance,
            generator=torch.Generator("cpu").manual_seed(call.seed + index),
            **of_mask,
        ).images[0]
        assert np.abs(ours - np.asarray(theirs, dtype=np.int16)).max() <= LEVELS
    moved = np.abs(pictures(drawn)[0] - pictures(others[1])[0]).max()
    assert moved > 5 * LEVELS, "the photo changes nothing, so nothing was compared"


def test_no_neighbour_notices_an_edit(shop: Shop) -> None:
    calls = [
        CUP,
        replace(CUP, adapters=(), sampler="dpmpp_2m_sde", steps=6),
        replace(PHOTO, seed=3, sampler="euler_ancestral"),
        replace(PART, adapters=stack("jar"), seed=4),
        replace(PART, guidance=1.0, sampler="dpmpp_2m", edit=edit(photo(seed=5), half(), 0.5)),
    ]

    async def main() -> tuple[list[list[Event]], list[list[Event]]]:
        async with open_service(shop, max_rows=16, slots=4) as service:
            together = await asyncio.gather(*(events(service, call) for call in calls))
            return list(together), [await events(service, call) for call in calls]

    together, alone = asyncio.run(main())
    shared = [event.facts["most_rows"] for found in together for event in found if isinstance(event, Finished)]
    assert max(shared) > 4
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pictures(one)[0] - pictures(other)[0]).max() <= LEVELS


def test_an_edit_makes_its_share_of_the_steps_and_says_so(shop: Shop) -> None:
    call = replace(PHOTO, steps=10, progress=True, previews=3, edit=edit(photo(), None, 0.35))

    async def main() -> None:
        async with open_service(shop) as service:
            found = await events(service, call)
            assert [(e.step, e.steps) for e in found if isinstance(e, Progress)] == [(1, 3), (2, 3), (3, 3)]
            assert isinstance(found[0], Accepted)
            assert found[0].note == "partial_images: 2 instead of 3; only steps before the last have one"
            assert isinstance(found[-1], Finished)
            text = Image.open(io.BytesIO(found[-1].image)).text  # type: ignore[attr-defined]
            assert (text["denoising_strength"], text["masked"], text["steps"]) == ("0.35", "false", "10")
            assert text["strength"] == "1.0"
            assert (
                text["parameters"].endswith("Denoising strength: 0.35") or "strength: 0.35, Lora" in text["parameters"]
            )
            assert said_in_xmp(xmp_of(found[-1].image)) == EDITED
            for wrong, said in ((0.05, "leaves none to make"), (0.0, "out of range"), (1.5, "out of range")):
                failed = failure_of(await events(service, replace(call, edit=edit(photo(), None, wrong))))
                assert (failed.kind, failed.message.startswith("strength: ")) == ("SpecError", True)
                assert said in failed.message
            marks = Image.new("L", (SIDE, SIDE), 0)
            marks.putpixel((5, 5), 255)
            failed = failure_of(await events(service, replace(call, edit=edit(photo(), marks, 1.0))))
            assert failed.kind == "SpecError"
            assert failed.message.startswith("mask: what it marks")

    run(main)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_edit_is_not_signed_as_an_image_that_a_model_created_alone(
    shop: Shop, tmp_path: Path, kind: FileKind
) -> None:
    files = signing_settings(tmp_path, Authority.make())

    async def main() -> None:
        async with open_service(shop, signing=files) as service:
            for call, masked in ((PHOTO, "false"), (PART, "true")):
                assert call.edit is not None
                found = await events(service, replace(call, previews=1, file=FileFormat(kind)))
                assert isinstance(found[-1], Finished)
                with Reader(f"image/{kind}", io.BytesIO(found[-1].image)) as reader:
                    manifest = reader.get_active_manifest()
                    assert reader.get_validation_state() == "Valid"
                assert manifest is not None
                said = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
                (action,) = said["c2pa.actions.v2"]["actions"]
                assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", EDITED_MEDIA)
                model = said["cat-cluster.model"]
                assert (model["denoising_strength"], model["masked"]) == (str(call.edit.strength), masked)
                for event in found:
                    if isinstance(event, Preview | Finished):
                        assert said_in_xmp(xmp_of(event.image)) == EDITED

    run(main)


def test_an_image_is_encoded_once_for_its_call_and_beside_the_steps(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the VAE is at work on an image, others go on being denoised, to their last step."""
    encoded: list[int] = []
    held, encode = threading.Event(), BaseModel.encode_moments

    def slow(self: BaseModel, pixels: Tensor) -> Tensor:
        encoded.append(len(pixels))
        assert threading.current_thread().name.startswith("cat-codec")
        held.wait(20)
        return encode(self, pixels)

    async def main() -> None:
        async with open_service(shop) as service:
            async with aclosing(service.generate(replace(CUP, steps=90, progress=True))) as stream:
                while not isinstance(await anext(stream), Progress):
                    pass
                monkeypatch.setattr(BaseModel, "encode_moments", slow)
                edited = asyncio.ensure_future(events(service, replace(PHOTO, count=3)))
                while not encoded:
                    await asyncio.sleep(0.001)
                # Its engine may be some steps ahead of what has been read, but not all of them.
                before, after = service._parts.engine.active, 0
                async for event in stream:
                    after += isinstance(event, Progress)
                    if isinstance(event, Progress) and event.step == 90:
                        break
                assert (before, after >= 1, held.is_set()) == (1, True, False)
                held.set()
                assert isinstance([event async for event in stream][-1], Finished)
            assert len(pictures(await edited)) == 3
            assert encoded == [1]

    run(main)


def test_a_call_that_goes_while_its_image_is_encoded_leaves_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, begun, encode = threading.Event(), threading.Event(), BaseModel.encode_moments

    def slow(self: BaseModel, pixels: Tensor) -> Tensor:
        begun.set()
        held.wait(20)
        return encode(self, pixels)

    async def main() -> None:
        async with open_service(shop) as service:
            monkeypatch.setattr(BaseModel, "encode_moments", slow)
            try:
                async with aclosing(service.generate(replace(PHOTO, count=2))) as stream:
                    assert isinstance(await anext(stream), Accepted)
                    await asyncio.to_thread(begun.wait, 20)
                late = failure_of(await events(service, replace(PHOTO, deadline_s=0.2)))
                assert late.kind == "DeadlineError"
                assert late.message.startswith("the deadline passed before the image could begin: ")
            finally:
                held.set()
            monkeypatch.undo()
            assert len(pictures(await events(service, PHOTO))) == 1

    run(main)  # open_service sees that no lease and no image is left


def test_a_service_that_stops_before_the_image_is_encoded_is_an_event(shop: Shop) -> None:
    """So that over a handle the call goes to another engine."""

    async def main() -> None:
        async with open_service(shop) as service:
            plan = service._plan

            async def last(call: ImageCall) -> Any:
                planned = await plan(call)
                await asyncio.to_thread(service._parts.codec.close)
                return planned

            service._plan = last  # type: ignore[method-assign]
            assert failure_of(await events(service, replace(PHOTO, count=2))).kind == "EngineStoppedError"

    run(main)


def test_an_edit_says_nothing_about_its_adapter_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a probe of every image, an edit is none to compare with others."""
    probed: list[ImageCall] = []

    async def live(self: Prober, manifest: Any, call: ImageCall, seed: int, image: Any) -> None:
        probed.append(call)

    monkeypatch.setattr(Prober, "live", live)
    monkeypatch.setattr(Prober, "wants_live", lambda self, manifest, call: True)

    async def main() -> None:
        async with open_service(shop, probes=ProbeSettings(live_share=1.0, canonical_every_s=1e6)) as service:
            await events(service, PHOTO)
            await events(service, CUP)
            await asyncio.sleep(0)  # the probe's task begins

    run(main)
    assert probed == [CUP]
