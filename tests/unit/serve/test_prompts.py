"""Long and weighted prompts through a whole service: images, notes, the gate, and what files tell of them."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from cat_cluster.registry.stacks import parse_member
from cat_cluster.spec.choices import Weighting
from serve.calls import Accepted, Event, Failed, Finished
from tests.support.services import CUP, LEVELS, Shop, events, open_service, pictures, pixels, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]

LONG = "a photo of a red cup, " * 12  # 84 tokens: the second chunk begins before its end
WEIGHTED = replace(CUP, prompt="a (photo:1.7) of a (sks:1.3) [cup]", weighting="a1111")
FAR = replace(CUP, prompt=f"{LONG}a sks cup", prompt_chunks=2)


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.message = self.lines.append

    def images(self, adapter_id: str, done: int, total: int) -> None: ...


def note(found: list[Event]) -> str:
    assert isinstance(found[0], Accepted)
    return found[0].note or ""


def drawn_again(shop: Shop, file: bytes, folder: Path) -> np.ndarray[Any, Any]:
    """The image that `generate` makes of what a served PNG says of itself."""
    text = Image.open(io.BytesIO(file)).text  # type: ignore[attr-defined]
    assert text["weighting"] in get_args(Weighting)
    request = DrawRequest(
        text["prompt"],
        [replace(parse_member(text["model"]), strength=float(text["strength"]))],
        str(shop.folder),
        int(text["seed"]),
        int(text["steps"]),
        float(text["guidance"]),
        text["sampler"],
        weighting=text["weighting"],
        prompt_chunks=int(text["prompt_chunks"]),
    )
    (path,) = draw_images(request, folder / "again.png", shop.registry, "cpu", Told())
    again = Image.open(path).text  # type: ignore[attr-defined]
    assert {key: again[key] for key in ("prompt", "weighting", "prompt_chunks")} == {
        key: text[key] for key in ("prompt", "weighting", "prompt_chunks")
    }
    return pixels(path.read_bytes())


def test_an_image_is_that_of_generate_with_what_its_file_says_in_any_batch(shop: Shop, tmp_path: Path) -> None:
    calls = [
        WEIGHTED,
        FAR,
        CUP,
        replace(CUP, prompt="a (sks:1.2) cup"),
        replace(WEIGHTED, prompt=f"{LONG}BREAK a (sks:1.4) cup", prompt_chunks=4, sampler="euler", steps=6),
        replace(FAR, guidance=1.0),
    ]

    async def main() -> None:
        async with open_service(shop) as service:
            alone = [pictures(await events(service, call))[0] for call in calls]
            together = await asyncio.gather(*(events(service, call) for call in calls))
            for image, found in zip(alone, together, strict=True):
                assert np.abs(image - pictures(found)[0]).max() <= LEVELS
                file = found[-1]
                assert isinstance(file, Finished)
                assert np.abs(image - drawn_again(shop, file.image, tmp_path)).max() <= LEVELS
            plain = pictures(await events(service, replace(WEIGHTED, weighting="none")))[0]
            assert np.abs(plain - alone[0]).max() > LEVELS
            same = replace(CUP, weighting="a1111", prompt_chunks=4)
            assert np.array_equal(pictures(await events(service, same))[0], alone[2]), "there is no syntax in it"

    run(main)


def test_a_token_in_the_second_chunk_is_read_and_the_gate_sees_it(shop: Shop) -> None:
    without = replace(FAR, prompt=f"{LONG}a cup")
    far_weight = replace(FAR, prompt=f"{LONG}a (sks:1.3) cup", weighting="a1111")

    async def main() -> None:
        async with open_service(shop) as service:
            assert note(await events(service, FAR)) == ""
            assert "the token 'sks' is not read" in note(await events(service, replace(FAR, prompt_chunks=1)))
            assert "the token 'sks' is not read" in note(await events(service, replace(far_weight, prompt_chunks=1)))
            read, unread = [pictures(await events(service, call))[0] for call in (FAR, without)]
            assert np.abs(read - unread).max() > LEVELS
            for call in (FAR, far_weight, replace(WEIGHTED, prompt="a ((sks)) cup")):
                whole, gated = [await events(service, replace(call, gate=gate)) for gate in (False, True)]
                assert note(gated) == ""
                assert np.array_equal(pictures(whole)[0], pictures(gated)[0])
            assert "gate: cup is left out" in note(await events(service, replace(without, gate=True)))
            text = replace(CUP, prompt="a (sks:1.3) cup", gate=True)
            assert "gate:" not in note(await events(service, text)), "it is read as text, the token with it"

    run(main)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("gate", [False, True])
def test_a_weight_that_cannot_be_is_refused_by_its_field(shop: Shop, field: str, gate: bool) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            bad = replace(CUP, gate=gate, weighting="a1111", **{field: "a sks (cup:12)"})  # type: ignore[arg-type]
            (failed,) = await events(service, bad)
            assert isinstance(failed, Failed)
            assert (failed.kind, failed.message.partition(":")[0]) == ("SpecError", field)
            assert len(pictures(await events(service, replace(bad, weighting="none")))) == 1

    run(main)


def test_generate_tells_what_it_does_not_read_and_refuses_a_bad_weight(shop: Shop, tmp_path: Path) -> None:
    told = Told()
    request = DrawRequest("a (sks:1.2) cup", base=str(shop.folder), steps=1)
    draw_images(request, tmp_path / "a.png", None, "cpu", told)
    assert "'(sks:1.2)' is drawn as text" in told.lines[0]
    assert "--weighting" in told.lines[0]
    told = Told()
    draw_images(replace(request, weighting="a1111"), tmp_path / "a.png", None, "cpu", told)
    assert told.lines == []
    draw_images(replace(request, prompt=LONG * 5, prompt_chunks=3), tmp_path / "a.png", None, "cpu", told)
    assert "the text encoder reads the first 3 chunks of 77 tokens of the prompt, and not '" in told.lines[0]
    with pytest.raises(Exception, match="prompt: 'a' has the weight 99"):
        draw_images(replace(request, prompt="(a:99)", weighting="a1111"), tmp_path / "b.png", None, "cpu", told)
    assert not (tmp_path / "b.png").exists()
