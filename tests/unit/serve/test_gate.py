"""The trigger gate through a whole service: an adapter that no word of the prompt asks for is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from serve.calls import Accepted, Event, ImageCall
from tests.support.services import CUP, LEVELS, Shop, events, open_service, pictures, pixels, run, stack

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]

WIDE: dict[str, Any] = {"max_rank": 6, "slots": 3}
BOTH = replace(CUP, adapters=stack("cup:0.75", "fish:0.5"), gate=True, seed=31)


@pytest.fixture(scope="module", autouse=True)
def fish(shop: Shop) -> None:
    """An adapter whose token is zwx; that of the shop's others is sks."""
    shop.publish("fish", 50, token="zwx")


def accepted(found: list[Event]) -> Accepted:
    first = found[0]
    assert isinstance(first, Accepted)
    return first


@pytest.mark.parametrize(
    ("prompt", "carried"),
    [
        ("a photo of a sks cup", ["cup:0.75"]),
        ("a ZWX, fish", ["fish:0.5"]),
        ("a sks cup beside a zwx fish", ["cup:0.75", "fish:0.5"]),
        ("a photo of a cup", []),
    ],
)
def test_it_is_the_image_of_the_adapters_that_the_prompt_asks_for(
    shop: Shop, prompt: str, carried: list[str], tmp_path: Path
) -> None:
    gated = replace(BOTH, prompt=prompt)
    plain = replace(gated, adapters=stack(*carried), gate=False)

    async def main() -> None:
        async with open_service(shop, **WIDE) as service:
            found, expected = [await events(service, call) for call in (gated, plain)]
            assert np.array_equal(pictures(found)[0], pictures(expected)[0])
            assert accepted(found).model == accepted(expected).model
            note = accepted(found).note or ""
            for adapter_id, token in (("cup", "sks"), ("fish", "zwx")):
                left_out = f"gate: {adapter_id} is left out, for the prompt does not name {token}"
                assert (left_out in note) is not any(name.startswith(adapter_id) for name in carried)
            if len(carried) < 2:
                (whole,) = pictures(await events(service, replace(gated, gate=False)))
                assert not np.array_equal(whole, pictures(found)[0])
            told: list[str] = []
            request = DrawRequest(prompt, gated.adapters, str(shop.folder), 31, gated.steps, gate=True)
            (path,) = draw_images(request, tmp_path / "image.png", shop.registry, "cpu", Told(told))
            assert np.abs(pixels(path.read_bytes()) - pictures(found)[0]).max() <= LEVELS
            assert len([line for line in told if line.startswith("gate: ")]) == 2 - len(carried)

    run(main)


class Told:
    """A listener that keeps what it is told."""

    def __init__(self, told: list[str]) -> None:
        self.message = told.append

    def images(self, adapter_id: str, done: int, total: int) -> None: ...


def test_adapters_that_are_left_out_take_no_slots_and_no_rank(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, max_rank=3, slots=1) as service:
            assert len(pictures(await events(service, BOTH))) == 1

    run(main)


def test_a_call_that_is_sent_again_keeps_the_revisions_it_had() -> None:
    call = ImageCall("request-1", "a sks cup", stack("cup:0.75", "fish@prod"), gate=True)
    assert call.pinned("cup@r-0123456789ab").adapters == stack("cup@r-0123456789ab:0.75", "fish@prod")
    assert call.pinned("stable-diffusion-v1-5/stable-diffusion-v1-5") == call
    assert call.pinned("pocket") == call
    of_its_name = replace(call, adapters=stack("pocket@prod"))
    assert of_its_name.pinned("pocket") == of_its_name
    both = call.pinned("cup@r-0123456789ab+fish@r-ba9876543210")
    assert both.adapters == stack("cup@r-0123456789ab:0.75", "fish@r-ba9876543210")
