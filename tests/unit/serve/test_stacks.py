"""Stacks through a whole service: their images are other programs', and every answer knows all members."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from cat_cluster.lora.formats import AdapterWeights, LoraLayer, write_adapter
from cat_cluster.lora.layers import sizes_of
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from cat_cluster.registry import Manifest
from serve.calls import Accepted, Event, Finished, ImageCall
from serve.probes.revision_monitor import DriftStatus
from serve.settings import ProbeSettings
from tests.support.denoised_images import added
from tests.support.services import (
    CUP,
    LEVELS,
    Pixels,
    Shop,
    events,
    failure_of,
    open_service,
    pictures,
    pixels,
    run,
    stack,
    stock_picture,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]

WIDE: dict[str, Any] = {"max_rank": 9, "slots": 3}  # room for three adapters of rank 3
PAIR = replace(CUP, prompt="a photo of a sks cup", adapters=stack("cup:0.75", "mug:0.5"), seed=21)
CALLS = [
    PAIR,
    replace(PAIR, adapters=stack("mug:0.5", "jar:0.25", "cup"), guidance=1.0, steps=6, seed=22),
    replace(PAIR, adapters=stack("jar", "cup:0.5"), size=(24, 16), negative_prompt="red", seed=23),
    replace(PAIR, adapters=stack("cup", "jar:0"), seed=24),
]


class Nobody:
    def images(self, adapter_id: str, done: int, total: int) -> None: ...

    def message(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def drawn(shop: Shop) -> list[list[Event]]:
    """What the service answers to the stacks among calls of one adapter and of the base."""
    others = [CUP, replace(CUP, adapters=stack("mug:0.5"), seed=5), replace(CUP, adapters=(), seed=6)]

    async def main() -> list[list[Event]]:
        async with open_service(shop, **WIDE, max_rows=16) as service:
            answers = await asyncio.gather(*(events(service, call) for call in (*CALLS, *others)))
            return answers[: len(CALLS)]

    return asyncio.run(main())


def one_picture(found: list[Event]) -> Pixels:
    (picture,) = pictures(found)
    return picture


def closest(ours: Pixels, theirs: Any) -> int:
    return int(np.abs(ours - np.asarray(theirs, dtype=np.int16)).max())


def weights_of(shop: Shop, call: ImageCall) -> list[tuple[Any, float]]:
    return [(shop.registry.load_weights(shop.registry.resolve(m.reference)), m.strength) for m in call.adapters]


def test_images_of_stacks_are_those_of_stock_diffusers(shop: Shop, drawn: list[list[Event]], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(shop.folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for name in ("cup", "mug", "jar"):
        weights = shop.registry.load_weights(shop.registry.resolve(name))
        write_adapter(weights, tmp_path / name, "diffusers", adapter_id=name, metadata={})
        pipeline.load_lora_weights(tmp_path / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    for call, found in zip(CALLS, drawn, strict=True):
        names = [member.reference.adapter_id for member in call.adapters]
        pipeline.set_adapters(names, adapter_weights=[member.strength for member in call.adapters])
        theirs = stock_picture(pipeline, call)
        assert closest(one_picture(found), theirs) <= LEVELS, call


def test_images_of_stacks_are_those_of_weights_to_which_the_changes_were_added(
    shop: Shop, drawn: list[list[Event]]
) -> None:
    for call, found in zip(CALLS, drawn, strict=True):
        if call.size is None:
            with added(shop.base, weights_of(shop, call)):
                row = ImageRow(call.prompt, call.seed, 0, call.steps, call.guidance, call.sampler)
                (theirs,) = generate(shop.base, None, [row])
            assert closest(one_picture(found), image_array(theirs)) <= LEVELS, call


def test_a_stack_is_the_same_alone_and_from_generate(shop: Shop, drawn: list[list[Event]], tmp_path: Path) -> None:
    async def main() -> list[Pixels]:
        async with open_service(shop, **WIDE) as service:
            return [one_picture(await events(service, call)) for call in CALLS]

    alone = asyncio.run(main())
    for call, found, lonely in zip(CALLS, drawn, alone, strict=True):
        assert closest(one_picture(found), lonely) <= LEVELS, call
        if call.size is None:
            request = DrawRequest(
                call.prompt, call.adapters, str(shop.folder), call.seed, call.steps, call.guidance, call.sampler
            )
            (path,) = draw_images(request, tmp_path / "image.png", shop.registry, "cpu", Nobody())
            assert closest(lonely, pixels(path.read_bytes())) <= LEVELS, call
            told = Image.open(path).text  # type: ignore[attr-defined]
            ours = Image.open(io.BytesIO(finished(found).image)).text  # type: ignore[attr-defined]
            assert (told["model"], told["strength"]) == (ours["model"], ours["strength"])
    assert closest(alone[0], one_picture(asyncio.run(draw_one(shop, replace(PAIR, adapters=stack("cup:0.75")))))) > 5


async def draw_one(shop: Shop, call: ImageCall) -> list[Event]:
    async with open_service(shop, **WIDE) as service:
        return await events(service, call)


def finished(found: Sequence[Event]) -> Finished:
    (only,) = [event for event in found if isinstance(event, Finished)]
    return only


def test_the_answer_and_the_file_name_every_member(shop: Shop, drawn: list[list[Event]]) -> None:
    cup, mug = (shop.registry.resolve(name) for name in ("cup", "mug"))
    digests = [manifest.objects["weights"].sha256 for manifest in (cup, mug)]
    assert drawn[0][0] == Accepted(f"{cup.name}+{mug.name}")
    text = Image.open(io.BytesIO(finished(drawn[0]).image)).text  # type: ignore[attr-defined]
    assert (text["model"], text["strength"]) == (f"{cup.name}+{mug.name}", "0.75+0.5")
    assert text["adapter_sha256"] == "+".join(digests)
    hashes = f'Lora hashes: "{cup.name}: {digests[0][:12]}, {mug.name}: {digests[1][:12]}"'
    assert hashes in text["parameters"]


def test_metrics_and_facts_count_every_member(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, **WIDE) as service:
            found = await events(service, replace(PAIR, count=2))
            await events(service, CUP)
            for event in found:
                if isinstance(event, Finished):
                    assert event.facts["most_adapters"] == 2
            text = (await service.metrics()).decode()
            assert 'cat_serve_adapter_images_total{adapter="cup"} 3.0' in text
            assert 'cat_serve_adapter_images_total{adapter="mug"} 2.0' in text
            assert 'cat_serve_images_total{outcome="done"} 3.0' in text

    run(main)


def test_what_cannot_have_its_rows_or_slots_is_refused_before_anything_starts(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, max_rank=5, slots=3) as service:
            (failed,) = await events(service, PAIR)
            assert failure_of([failed]).kind == "AdapterMismatchError"
            told = failure_of([failed]).message
            assert told.startswith("the stack has rank 6 in all and this service takes up to 5: name fewer")
            assert told.endswith("the ranks are cup 3, mug 3")
        async with open_service(shop, max_rank=9, slots=2) as service:
            (failed,) = await events(service, CALLS[1])
            assert failure_of([failed]).kind == "ConflictError"

    run(main)


def test_a_member_of_another_base_is_named(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, **WIDE) as service:
            failed = failure_of(await events(service, replace(PAIR, adapters=stack("cup", "foreign"))))
            assert failed.kind == "AdapterMismatchError"
            assert failed.message.startswith("foreign@")
            await until(lambda: service._in_flight == 0)

    run(main)


def test_more_stacks_than_slots_take_turns(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, max_rank=9, slots=2) as service:
            pairs = [("cup", "mug"), ("mug", "jar"), ("jar", "cup"), ("jar",), ("cup",)]
            calls = [replace(PAIR, adapters=stack(*pair), seed=seed, count=2) for seed in range(4) for pair in pairs]
            for answer in await asyncio.gather(*(events(service, call) for call in calls)):
                assert len(pictures(answer)) == 2

    run(main)


def test_a_member_that_is_deleted_or_moved_while_rows_run_harms_no_image(shop: Shop) -> None:
    first = shop.publish("leaving", 30)

    async def main() -> None:
        async with open_service(shop, **WIDE, alias_ttl_s=0.0) as service:
            call = replace(PAIR, adapters=stack("cup", "leaving"), steps=40)
            whole = one_picture(await events(service, call))
            stream = service.generate(replace(call, progress=True))
            begun = [await anext(stream), await anext(stream)]
            second = shop.publish("leaving", 31)
            shop.registry.delete("leaving", first.revision)
            await service.admin("unload", first.name)
            rest = [event async for event in stream]
            assert begun[0] == Accepted(f"{shop.registry.resolve('cup').name}+{first.name}")
            assert closest(one_picture(rest), whole) <= LEVELS
            assert (await events(service, call))[0] == Accepted(f"{shop.registry.resolve('cup').name}+{second.name}")

    run(main)


def test_a_member_that_is_quarantined_while_rows_run_harms_no_image(shop: Shop) -> None:
    sick = shop.publish("sick", 50)

    async def main() -> None:
        async with open_service(shop, **WIDE, alias_ttl_s=0.0) as service:
            call = replace(PAIR, adapters=stack("cup", "sick"), steps=40)
            whole = one_picture(await events(service, call))
            stream = service.generate(replace(call, progress=True))
            begun = [await anext(stream), await anext(stream)]
            shop.registry.quarantine("sick", sick.revision, "drift")
            refused = failure_of(await events(service, call))
            rest = [event async for event in stream]
            assert isinstance(begun[0], Accepted)
            assert (refused.kind, refused.message.partition(" ")[0]) == ("QuarantinedError", sick.name)
            assert closest(one_picture(rest), whole) <= LEVELS

    run(main)


def test_a_quarantined_member_falls_back_or_refuses_the_stack(shop: Shop) -> None:
    old, new = shop.publish("ailing", 40), shop.publish("ailing", 41)
    shop.registry.quarantine("ailing", new.revision, "drift")

    async def main() -> None:
        call = replace(PAIR, adapters=stack("cup", "ailing"))
        async with open_service(shop, **WIDE) as service:
            failed = failure_of(await events(service, call))
            assert failed.kind == "QuarantinedError"
            assert failed.message.startswith(new.name)
        async with open_service(shop, **WIDE, probes=ProbeSettings(enabled=False, policy="fallback")) as service:
            accepted = (await events(service, call))[0]
            assert isinstance(accepted, Accepted)
            assert accepted.model == f"{shop.registry.resolve('cup').name}+{old.name}"
            assert accepted.note is not None
            assert f"{old.name} serves in its place" in accepted.note

    run(main)


class ProberOfStates:
    """A prober that knows the drift of each adapter, and remembers which images it was offered."""

    def __init__(self, **states: Any) -> None:
        self._states, self.offered = states, list[str]()

    def state(self, manifest: Manifest) -> DriftStatus:
        return DriftStatus(self._states.get(manifest.adapter_id, "unknown"))

    def wants_live(self, manifest: Manifest, call: ImageCall) -> bool:
        self.offered.append(manifest.adapter_id)
        return False


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        ({"cup": "ok", "mug": "ok"}, "ok"),
        ({"cup": "ok"}, "unknown"),
        ({"cup": "warning"}, "warning"),
        ({"cup": "warning", "mug": "alarm"}, "alarm"),
    ],
)
def test_the_drift_of_a_stack_is_that_of_its_worst_member(shop: Shop, states: dict[str, str], worst: str) -> None:
    async def main() -> None:
        async with open_service(shop, **WIDE) as service:
            prober = ProberOfStates(**states)
            service.prober = prober  # type: ignore[assignment]
            accepted = (await events(service, replace(PAIR, steps=1)))[0]
            assert isinstance(accepted, Accepted)
            assert accepted.drift == worst
            await events(service, replace(CUP, steps=1))
            assert prober.offered == ["cup"], "an image of several adapters says nothing about one of them"
            service.prober = None

    run(main)


def test_of_several_the_one_that_does_not_fit_is_named(shop: Shop) -> None:
    """A layer that is not served is seen when the weights are there."""
    inputs, outputs = sizes_of(shop.base.unet.time_embedding.linear_1) or (0, 0)
    layer = LoraLayer(torch.ones(1, inputs), torch.ones(outputs, 1))
    odd = shop.publish("odd", 7, weights=AdapterWeights({"time_embedding.linear_1": layer}))

    async def main() -> None:
        async with open_service(shop, **WIDE, targets="attention_ff") as service:
            for names in (("odd",), ("cup", "odd")):
                found = failure_of(await events(service, replace(CUP, adapters=stack(*names))))
                assert found.kind == "AdapterMismatchError"
                assert found.message.startswith(f"{odd.name}: the adapter changes layer time_embedding.linear_1")

    run(main)
