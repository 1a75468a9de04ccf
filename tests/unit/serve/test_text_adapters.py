"""Adapters of text encoders through a whole service: every row's text is its own adapters', as in stock diffusers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cat_cluster.lora.formats import AdapterWeights, write_adapter
from cat_cluster.lora.row_bank import AdapterLayout, RowAdapter
from cat_cluster.lora.text_bank import TextBank
from cat_cluster.models.base_model import load_base_model
from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.calls import Event, ImageCall
from serve.denoise import codec as codec_module
from tests.support.services import (
    CUP,
    LEVELS,
    Pixels,
    Shop,
    events,
    open_service,
    pictures,
    pixels,
    run,
    stack,
    stock_picture,
)
from tests.support.text_adapters import stock_pipeline, text_paths, whole_adapter
from tests.unit.serve.test_stacks import Nobody

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]

ROOM: dict[str, Any] = {"max_rank": 9, "slots": 3, "max_rows": 16, "sizes": ("24x16", "16x24")}
CALLS = [
    CUP,  # U-Net and text encoders
    replace(CUP, adapters=stack("words:0.75"), negative_prompt="red"),  # text encoders alone
    replace(CUP, adapters=stack("plain")),  # U-Net alone, in all of its linears
    replace(CUP, adapters=()),
    replace(CUP, adapters=stack("cup:0.5", "plain", "words:0.25"), guidance=1.0),
    replace(CUP, adapters=stack("words", "cup"), size=(24, 16), seed=5),
    replace(CUP, adapters=stack("cup:0.5")),  # the same prompt and adapter at another strength
]
NAMES = ("cup", "words", "plain")


@pytest.fixture(scope="module", params=["tiny_base_folder", "tiny_xl_folder"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = request.getfixturevalue(request.param)
    shop = Shop(folder, load_base_model(str(folder)), Registry(LocalStore(tmp_path_factory.mktemp("storage"))))
    for seed, name in enumerate(NAMES, 1):
        shop.publish(name, seed, weights=made(shop, name), token=f"sks{'' if name == 'cup' else seed}")
    return shop


def made(shop: Shop, name: str) -> AdapterWeights:
    return {
        "cup": lambda: whole_adapter(shop.base, 1, rank=3),
        "words": lambda: whole_adapter(shop.base, 2, rank=2, unet=False, text=0.5),
        "plain": lambda: whole_adapter(shop.base, 3, rank=3, text=0.0, everywhere=True),
    }[name]()


async def answers(shop: Shop, calls: Sequence[ImageCall], **settings: Any) -> list[Pixels]:
    async with open_service(shop, **{**ROOM, **settings}) as service:
        found: list[list[Event]] = await asyncio.gather(*(events(service, call) for call in calls))
    return [picture for one in found for picture in pictures(one)]


def furthest(ours: Pixels, theirs: Any) -> int:
    return int(np.abs(ours - np.asarray(theirs, dtype=np.int16)).max())


def test_served_images_are_those_of_the_stock_pipeline_and_of_generate(shop: Shop, tmp_path: Path) -> None:
    together = asyncio.run(answers(shop, CALLS))
    alone = [asyncio.run(answers(shop, [call]))[0] for call in CALLS[:2]]
    pipeline = stock_pipeline(shop.folder, xl=len(shop.base.text_encoders.models) > 1)
    pipeline.scheduler = scheduler(pipeline)
    for name in NAMES:
        write_adapter(made(shop, name), tmp_path / name, "diffusers", adapter_id=name, metadata={})
        pipeline.load_lora_weights(tmp_path / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    for place, (call, ours) in enumerate(zip(CALLS, together, strict=True)):
        set_adapters(pipeline, call)
        theirs = stock_picture(pipeline, call)
        assert furthest(ours, theirs) <= LEVELS, call
        if place < len(alone):
            assert furthest(ours, alone[place]) <= LEVELS, call
        if call.size is None:
            assert furthest(ours, generated(shop, call, tmp_path / "image.png")) <= LEVELS, call
    assert furthest(together[0], together[2]) > 5
    assert furthest(together[1], together[3]) > 5, "an adapter of text encoders alone changes nothing"


def scheduler(pipeline: Any) -> Any:
    from tests.support.denoised_images import stock_scheduler

    return stock_scheduler("ddim", pipeline.scheduler.config)


def set_adapters(pipeline: Any, call: ImageCall) -> None:
    """Each adapter at its strength; a part that an adapter does not change has no such name there."""
    strengths = {member.reference.adapter_id: member.strength for member in call.adapters}
    pipeline.set_adapters(list(NAMES), adapter_weights=[strengths.get(name, 0.0) for name in NAMES])


def generated(shop: Shop, call: ImageCall, path: Path) -> Pixels:
    request = DrawRequest(
        call.prompt, call.adapters, str(shop.folder), call.seed, call.steps, call.guidance, call.sampler
    )
    if call.negative_prompt:
        request = replace(request, negative_prompt=call.negative_prompt)
    (drawn,) = draw_images(request, path, shop.registry, "cpu", Nobody())
    return pixels(drawn.read_bytes())


def test_words_with_weights_in_several_chunks_are_encoded_through_the_adapter(shop: Shop, tmp_path: Path) -> None:
    long = "a (red:1.4) sks cup, " * 12 + "BREAK a (sks cup:0.6)"
    call = replace(CUP, prompt=long, weighting="a1111", prompt_chunks=4, negative_prompt="(blue:1.3)")
    ours, base = asyncio.run(answers(shop, [call, replace(call, adapters=())]))
    request = DrawRequest(
        call.prompt, call.adapters, str(shop.folder), call.seed, call.steps, call.guidance, call.sampler
    )
    request = replace(request, negative_prompt="(blue:1.3)", weighting="a1111", prompt_chunks=4)
    (drawn,) = draw_images(request, tmp_path / "image.png", shop.registry, "cpu", Nobody())
    assert furthest(ours, pixels(drawn.read_bytes())) <= LEVELS
    assert furthest(ours, base) > 5


def test_texts_are_encoded_together_and_remembered_by_revision_and_strength(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[tuple[int, int]] = []
    rows = TextBank.rows

    def watched(self: TextBank, stacks: Sequence[Sequence[RowAdapter]], stack_B: Sequence[int]) -> Any:
        encoded.append((len(stacks), len(stack_B)))
        return rows(self, stacks, stack_B)

    monkeypatch.setattr(TextBank, "rows", watched)

    async def main() -> None:
        async with open_service(shop, **ROOM) as service:
            encoded.clear()
            once = pictures(await events(service, CUP))
            known = len(encoded)
            assert furthest(once[0], pictures(await events(service, replace(CUP, count=2)))[0]) == 0
            assert len(encoded) == known, "a prompt that was encoded through the adapter was encoded again"
            await events(service, replace(CUP, adapters=stack("cup:0.5")))
            assert len(encoded) > known
            # Held back, so that what is asked for meanwhile is encoded in one call.
            gate = asyncio.Event()
            loop = asyncio.get_running_loop()
            held = service._parts.codec._torch.submit(asyncio.run_coroutine_threadsafe(gate.wait(), loop).result)
            prompts = [replace(CUP, prompt=f"a sks cup {n}", adapters=one) for n, one in enumerate(STACKS)]
            asked = [asyncio.ensure_future(events(service, call)) for call in prompts]
            while len(service._parts.codec._prompts) < 2 * len(STACKS) - 1:
                await asyncio.sleep(0.002)
            encoded.clear()
            gate.set()
            await asyncio.gather(*asked)
            held.result()
            assert max(stacks for stacks, _ in encoded) > 2, encoded

    run(main)


STACKS = (stack("cup"), stack("words"), stack("cup:0.5", "words"))


def test_an_adapter_without_text_layers_costs_nothing_and_waits_for_none(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    encode = codec_module.Codec.encode

    def watched(self: Any, prompt: Any, changes: Any = ()) -> Any:
        begun.append(len(changes))
        return encode(self, prompt, changes)

    monkeypatch.setattr(codec_module.Codec, "encode", watched)

    async def main() -> None:
        async with open_service(shop, **ROOM) as service:
            begun.clear()
            cache = service._parts.cache
            await events(service, replace(CUP, adapters=stack("plain")))
            assert begun == [0, 0]
            (slot,) = [slot for slot, _ in cache._slots.held()]
            assert slot.text is None
            plain_bytes = cache.status()["host_bytes"]
            begun.clear()
            await events(service, CUP)
            assert begun == [1, 1], "the base's text was encoded for an adapter that changes it"
            layers = [shop.base.network.get_submodule(name) for name in text_paths(shop.base)]
            pooled = [model.text_projection for model in shop.base.text_encoders.models[1:]]
            of_text = sum(one.in_features + one.out_features for one in [*layers, *pooled]) * ROOM["max_rank"]
            (slot,) = [slot for slot, manifest in cache._slots.held() if manifest.adapter_id == "cup"]
            assert slot.text is not None
            assert slot.text.numel() == of_text
            assert cache.status()["host_bytes"] == 2 * plain_bytes + 4 * of_text
            await cache.unload("cup")
            assert slot.text is None

    run(main)


def test_what_does_not_carry_an_adapter_is_not_encoded_with_it(shop: Shop) -> None:
    call = replace(CUP, prompt="a photo of a cup", gate=True)
    gated, bare = asyncio.run(answers(shop, [call, replace(call, adapters=(), gate=False)]))
    assert furthest(gated, bare) == 0
    both = replace(CUP, adapters=stack("cup", "words"), gate=True)  # its prompt has the token of the cup alone
    gated, alone = asyncio.run(answers(shop, [both, CUP]))
    assert furthest(gated, alone) == 0


def test_a_row_of_an_encoders_call_is_the_sum_of_its_own_stack(shop: Shop) -> None:
    """Oracle: the changes added to the encoders' weights."""
    base = shop.base
    layout = AdapterLayout(base.network, text_paths(base), 5)
    flats = {name: layout.pack(made(shop, name).of_text) for name in ("cup", "words")}
    stacks = [
        [],
        [RowAdapter(flats["cup"], 3, 0.5)],
        [RowAdapter(flats["words"], 2), RowAdapter(flats["cup"], 3, -1.0)],
    ]
    prompts = ["a sks cup", "a red cup", "a sks cup", "a sks cup"]
    bank = TextBank(base.network, layout)
    try:
        with torch.no_grad(), bank.rows(stacks, [0, 1, 2, 1]):
            ours = base.text_encoders.encode(prompts)
        with torch.no_grad():
            plain = base.text_encoders.encode(prompts)
    finally:
        bank.detach()
    for place, found in zip([0, 1, 2, 1], range(4), strict=True):
        changes = {0: [], 1: [("cup", 0.5)], 2: [("words", 1.0), ("cup", -1.0)]}[place]
        with added(shop, changes):
            (expected,) = base.text_encoders.encode([prompts[found]])
        torch.testing.assert_close(ours[found].states, expected.states, rtol=1e-4, atol=1e-5)
        if expected.pooled is not None:
            torch.testing.assert_close(ours[found].pooled, expected.pooled, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours[0].states, plain[0].states), "a base row beside adapted ones has other bits"


class added:
    """The changes of adapters on the text encoders' own weights."""

    def __init__(self, shop: Shop, changes: Sequence[tuple[str, float]]) -> None:
        self._changes = [
            (shop.base.network.get_submodule(name).weight, strength * layer.up @ layer.down)
            for adapter, strength in changes
            for name, layer in made(shop, adapter).of_text.layers.items()
        ]

    def __enter__(self) -> None:
        self._add(1.0)

    def __exit__(self, *_: object) -> None:
        self._add(-1.0)

    def _add(self, sign: float) -> None:
        with torch.no_grad():
            for weight, change in self._changes:
                assert isinstance(weight, Tensor)
                weight.add_(sign * change)
