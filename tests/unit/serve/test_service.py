"""The service in one process: from a call to its events."""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from cat_cluster.lora.formats import write_adapter
from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from serve.calls import Accepted, Event, FileFormat, Finished, Preview, Progress
from serve.probes.revision_monitor import DriftStatus
from tests.support.services import (
    CUP,
    LEVELS,
    Shop,
    events,
    failure_of,
    open_service,
    pictures,
    pixels,
    run,
    stack,
    stock_picture,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]


def test_the_events_of_a_call_are_in_order(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            # Steps enough that a preview is ready before its image, which would else be all that is sent.
            found = await events(service, replace(CUP, count=2, previews=2, progress=True, steps=24))
            manifest = shop.registry.resolve("cup")
            assert found[0] == Accepted(manifest.name)
            assert {type(event) for event in found[1:]} == {Progress, Preview, Finished}
            for index in range(2):
                own = [event for event in found[1:] if event.index == index]  # type: ignore[union-attr]
                assert isinstance(own[-1], Finished)
                assert own[-1].seed == CUP.seed + index
                assert [e.step for e in own if isinstance(e, Progress)] == [*range(1, 25)]
                shown = [(e.number, e.step, e.steps) for e in own if isinstance(e, Preview)]
                assert shown == [(0, 8, 24), (1, 16, 24)]
                assert all(pixels(e.image).shape == (192, 192, 3) for e in own if isinstance(e, Preview))
                assert own[-1].facts["most_rows"] == 4
            text = (await service.metrics()).decode()
            assert 'cat_serve_images_total{outcome="done"} 2.0' in text

    run(main)


def test_an_answer_says_that_there_are_fewer_previews_than_were_asked_for(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            for steps, previews, note in (
                (4, 8, "partial_images: 3 instead of 8; only steps before the last have one"),
                (1, 1, "partial_images: 0 instead of 1; only steps before the last have one"),
                (4, 3, None),
            ):
                found = await events(service, replace(CUP, steps=steps, previews=previews))
                assert isinstance(found[0], Accepted)
                assert found[0].note == note

    run(main)


def test_a_sampler_that_cannot_draw_is_refused_by_the_field(shop: Shop) -> None:
    """Whether it cannot make as many steps, or the base's own scheduler has an option that it does not know."""

    async def main() -> None:
        async with open_service(shop) as service:
            found = failure_of(await events(service, replace(CUP, sampler="lcm", steps=51)))
            assert found.kind == "SpecError"
            assert found.message.startswith("num_inference_steps: sampler 'lcm' makes at most the 50 steps")
            options: Any = service.base.schedule.scheduler_config
            options["use_karras_sigmas"] = True
            found = failure_of(await events(service, replace(CUP, sampler="euler")))
            assert found.kind == "SpecError"
            assert found.message.startswith("sampler: use_karras_sigmas is True in ")
            assert found.message.endswith("or lcm.")
            assert len(pictures(await events(service, replace(CUP, sampler="euler_karras")))) == 1

    run(main)


def test_an_answer_names_the_text_that_was_not_read(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            for model, lost in ((["cup"], True), ([], False)):
                prompt = f"{'on a table in snow, ' * 60}a sks cup"
                accepted = (await events(service, replace(CUP, adapters=stack(*model), prompt=prompt)))[0]
                assert isinstance(accepted, Accepted)
                assert accepted.note is not None
                assert "tokens of the prompt, and not '" in accepted.note
                assert accepted.note.endswith("sks cup'") is not lost
                assert ("the token 'sks' is not read, so its concept is not drawn" in accepted.note) is lost

    run(main)


def test_a_png_says_how_it_was_made(shop: Shop) -> None:
    call = replace(CUP, prompt="a caf\u00e9 cup", negative_prompt="red", adapters=stack("cup:0.5"), sampler="euler")

    async def main() -> None:
        async with open_service(shop) as service:
            [finished] = [e for e in await events(service, call) if isinstance(e, Finished)]
            manifest = shop.registry.resolve("cup")
            digest = manifest.objects["weights"].sha256
            text = Image.open(io.BytesIO(finished.image)).text  # type: ignore[attr-defined]
            assert "trainedAlgorithmicMedia" in text.pop("XML:com.adobe.xmp")
            parameters = text.pop("parameters").splitlines()
            assert text == {
                "prompt": "a caf\u00e9 cup",
                "negative_prompt": "red",
                "seed": "11",
                "steps": "4",
                "guidance": "4.0",
                "sampler": "euler",
                "weighting": "none",
                "prompt_chunks": "1",
                "strength": "0.5",
                "model": manifest.name,
                "request_id": "request-1",
                "adapter_sha256": digest,
            }
            assert parameters[:2] == ["a caf\u00e9 cup", "Negative prompt: red"]
            assert parameters[2].startswith("Steps: 4, Sampler: Euler, CFG scale: 4, Seed: 11, Model: cup@")
            assert f"{manifest.name}: {digest[:12]}" in parameters[2]

    run(main)


def test_an_answer_says_what_was_drawn_as_text_and_what_a_file_has_no_room_for(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            prompt = "a sks cup <lora:mug:0.8> (snow:1.2) " + "\U0001f600" * 31_000
            call = replace(CUP, prompt=prompt, file=FileFormat("jpeg", 80), previews=1)
            began = time.monotonic()
            found = await events(service, call)
            assert time.monotonic() - began < 20
            assert isinstance(found[0], Accepted)
            note = found[0].note or ""
            for told in ("'<lora:mug:0.8>' is drawn as text", "'(snow:1.2)' is drawn as text", "and not '", "JPEG"):
                assert told in note
            assert len(note) < 1500
            for event in found:
                if isinstance(event, Preview | Finished):
                    assert Image.open(io.BytesIO(event.image)).format == "JPEG"
            description = Image.open(io.BytesIO(found[-1].image)).getexif()[0x010E]  # type: ignore[union-attr]
            assert prompt.startswith(json.loads(description)["prompt"])
            assert len(json.loads(description)["prompt"]) > 1000
            assert isinstance((await events(service, CUP))[0], Accepted)

    run(main)


def test_images_are_those_of_the_command_line_and_of_stock_diffusers(shop_of_each_family: Shop, tmp_path: Path) -> None:
    """Concurrent calls of several adapters, strengths and samplers, against one image at a time by other code."""
    shop = shop_of_each_family

    class Nobody:
        def images(self, adapter_id: str, done: int, total: int) -> None: ...

        def message(self, text: str) -> None: ...

    calls = [
        replace(CUP, count=2),
        replace(CUP, adapters=stack("mug:0.5"), sampler="dpmpp_2m"),
        replace(CUP, adapters=stack("jar"), guidance=1.0, steps=6),
        replace(CUP, adapters=(), sampler="euler_ancestral", count=2),
        replace(CUP, adapters=stack("mug"), size=(24, 16), negative_prompt="red"),
    ]

    async def main() -> list[list[Event]]:
        async with open_service(shop, sizes=("24x16",)) as service:
            return await asyncio.gather(*(events(service, call) for call in calls))

    answers = asyncio.run(main())
    for call, answer in zip(calls[:4], answers, strict=False):
        request = DrawRequest(
            call.prompt, call.adapters, str(shop.folder), call.seed, call.steps, call.guidance, call.sampler, call.count
        )
        paths = draw_images(request, tmp_path / "image.png", shop.registry, "cpu", Nobody())
        for ours, path in zip(pictures(answer), paths, strict=True):
            assert np.abs(ours - pixels(path.read_bytes())).max() <= LEVELS
    pipeline = DiffusionPipeline.from_pretrained(shop.folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for call, answer in ((calls[0], answers[0]), (calls[4], answers[4])):
        (member,) = call.adapters
        weights, folder = shop.registry.load_weights(shop.registry.resolve(member.reference)), tmp_path / str(call.seed)
        write_adapter(weights, folder, "diffusers", adapter_id="test", metadata={})
        pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        for index, ours in enumerate(pictures(answer)):
            theirs = stock_picture(pipeline, call, index)
            assert np.abs(ours - np.asarray(theirs, dtype=np.int16)).max() <= LEVELS
        pipeline.unload_lora_weights()
    moved = np.abs(pictures(answers[0])[0] - pictures(answers[1])[0]).max()
    assert moved > 5 * LEVELS, "the adapters do nothing, so nothing was compared"


def test_more_adapters_than_slots_take_turns(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, slots=1) as service:
            calls = [
                replace(CUP, adapters=stack(model), seed=seed) for seed in range(4) for model in ("cup", "mug", "jar")
            ]
            for answer in await asyncio.gather(*(events(service, call) for call in calls)):
                assert len(pictures(answer)) == 1

    run(main)


# -- revisions -----------------------------------------------------------------------------------------------------


def test_a_new_revision_goes_live_and_requests_in_flight_keep_theirs(shop: Shop) -> None:
    old = shop.publish("moving", 20)

    async def main() -> None:
        async with open_service(shop, alias_ttl_s=0.05) as service:
            call = replace(CUP, adapters=stack("moving"))
            before = pictures(await events(service, call))[0]
            stream = service.generate(replace(call, steps=60, progress=True))
            first = [await anext(stream), await anext(stream)]
            new = shop.publish("moving", 21)
            await asyncio.sleep(0.06)
            assert (await events(service, call))[0] == Accepted(new.name)
            assert first[0] == Accepted(old.name)
            rest = [event async for event in stream]
            assert isinstance(rest[-1], Finished)
            assert Image.open(io.BytesIO(rest[-1].image)).text["model"] == old.name  # type: ignore[attr-defined]
            named = pictures(await events(service, replace(call, adapters=stack(old.name))))[0]
            assert np.abs(named - before).max() <= LEVELS
            after = pictures(await events(service, call))[0]
            assert np.abs(after - before).max() > LEVELS

    run(main)


def test_status_and_health(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            lanes = service._parts.engine._running_images._rows
            rows = {(rows._latents.shape[2:], len(rows._latents)) for rows in lanes.values()}
            assert rows == {((8, 8), 8), ((8, 12), 8), ((12, 8), 8)}, "every size takes its memory at the start"
            await events(service, CUP)
            assert len(lanes) == 3
            status = await service.status()
            assert status["sizes"] == ["16x16", "24x16", "16x24"]
            assert status["stack"] == {"most": 2}, "no image has more adapters than there are slots"
            assert status["images"] == {"waiting": 0, "active": 0, "in_flight": 0}
            assert status["stuck_for_s"] < 10
            service.check_health()
            service.prober = SimpleNamespace(states=lambda resident: {"cup@r-1": DriftStatus("alarm")})  # type: ignore[assignment]
            assert (await service.status())["drift"]["cup@r-1"]["state"] == "alarm"
        with pytest.raises(Exception, match="must be replaced"):
            service.check_health()

    run(main)
