"""The codec: prompts and latents in batches, previews, and what closing does to those who wait."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cat_cluster.errors import EngineStoppedError, NotFiniteError
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.text_encoders import States, TextEncoders
from serve.calls import FileFormat
from serve.denoise import codec as codec_module
from serve.denoise.codec import AT_ONCE, Codec, colour_map
from tests.support.texts import states_of

SOON = 30.0


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture
def codec(base: BaseModel) -> Iterator[Codec]:
    codec = Codec(base)
    yield codec
    codec.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cat-")]


def latents(seed: int, height: int = 8) -> Tensor:
    return torch.randn(4, height, 8, generator=torch.Generator().manual_seed(seed))


class Held:
    """Holds the worker until it is let go, so that what is asked meanwhile waits."""

    def __init__(self, codec: Codec) -> None:
        self._event = threading.Event()
        self._future: Future[Any] = codec._torch.submit(self._event.wait, SOON)

    def go(self) -> None:
        self._event.set()
        self._future.result(SOON)


def test_what_waits_is_done_together(codec: Codec, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    (red,) = states_of(base, ["red"])
    encode, decode = TextEncoders.encode_chunks, type(base).decode

    def watched(self: TextEncoders, chunks: Sequence[Sequence[int]]) -> States:
        sizes.append(len(chunks))
        return encode(self, chunks)

    def seen(self: BaseModel, values: Tensor) -> Tensor:
        sizes.append(-len(values))
        return decode(self, values)

    monkeypatch.setattr(TextEncoders, "encode_chunks", watched)
    monkeypatch.setattr(type(base), "decode", seen)
    held = Held(codec)
    texts = [codec.encode(Prompt(prompt)) for prompt in ("a cup", "red", "a cup", "")]
    images = [codec.decode(latents(n, height=8 if n % 3 else 12)) for n in range(12)]
    held.go()
    assert torch.equal(texts[0].result(SOON).states, texts[2].result(SOON).states)
    torch.testing.assert_close(texts[1].result(SOON).states, red, rtol=1e-5, atol=1e-5)
    for n, image in enumerate(images):
        alone = decode(base, latents(n, height=8 if n % 3 else 12)[None])[0]
        torch.testing.assert_close(image.result(SOON), alone, rtol=0, atol=3e-5)
    assert sizes == [3, -4, -AT_ONCE]
    codec.encode(Prompt("a cup")).result(0)
    assert len(sizes) == 3, "a prompt is encoded once"


def test_images_that_wait_are_encoded_together(codec: Codec, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = type(base).encode_moments

    def watched(self: BaseModel, pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(type(base), "encode_moments", watched)
    pictures = [torch.rand(3, 16 if n % 3 else 24, 16) * 2 - 1 for n in range(15)]
    held = Held(codec)
    found = [codec.moments(picture) for picture in pictures]
    assert found[0].cancel()
    held.go()
    for picture, moments in list(zip(pictures, found, strict=True))[1:]:
        torch.testing.assert_close(moments.result(SOON), encode(base, picture[None])[0], rtol=1e-4, atol=1e-5)
    assert sizes == [4, AT_ONCE, 2]


def test_prompts_are_remembered_up_to_a_number(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "CHUNKS_KEPT", 4)
    for n in range(20):
        codec.encode(Prompt(f"cup {n}")).result(SOON)
    assert [prompt for prompt, _ in codec._texts] == [Prompt(f"cup {n}") for n in range(16, 20)]
    assert not codec._prompts
    codec.encode(Prompt("x" * 32_000)).result(SOON)
    assert len(codec._texts) == 4
    assert max(len(prompt.text) for prompt, _ in codec._texts) < 32, "a prompt that is kept is short"
    text = "a cup on a table in snow, " * 1200
    assert torch.equal(codec.encode(Prompt(text)).result(SOON).states, states_of(codec._base, [text])[0])
    assert max(len(prompt.text) for prompt, _ in codec._texts) < 500


def test_what_is_remembered_of_prompts_is_bounded_by_their_length(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_module, "CHUNKS_KEPT", 6)
    long = [Prompt(f"{word} in snow " + "a photo of a red cup, " * 24, chunks=8) for word in ("cup", "jar", "mug")]
    short = [Prompt(f"cup {n}") for n in range(4)]
    seen: list[set[Prompt]] = []
    for prompt in (*short, long[0], short[2], long[1], short[1], long[2]):
        length = len(codec.encode(prompt).result(SOON))
        assert length == (3 * 77 if prompt in long else 77)
        kept = codec._texts
        assert sum(len(text) for text in kept.values()) == codec._tokens_kept <= 6 * 77
        seen.append({prompt for prompt, _ in kept})
    assert seen[4:] == [
        {*short[1:], long[0]},
        {*short[1:], long[0]},
        {short[2], long[1]},  # the one that was asked for last of the four
        {short[2], long[1], short[1]},
        {short[1], long[2]},
    ]
    monkeypatch.setattr(codec_module, "CHUNKS_KEPT", 2)
    assert len(codec.encode(Prompt(long[0].text, chunks=4)).result(SOON)) == 3 * 77
    assert not codec._texts, "one that is longer than the bound is not kept"
    assert codec._tokens_kept == 0


def test_one_that_fails_or_is_not_finite_fails_alone(
    codec: Codec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = type(base).decode

    def fragile(self: BaseModel, values: Tensor) -> Tensor:
        if bool((values == 7.0).any()):
            raise MemoryError("too large")
        return decode(self, values)

    monkeypatch.setattr(type(base), "decode", fragile)
    held = Held(codec)
    good, nan, bad = codec.decode(latents(1)), codec.decode(latents(1) / 0.0), codec.decode(torch.full((4, 8, 8), 7.0))
    gone, last = codec.decode(latents(2)), codec.decode(latents(3))
    assert gone.cancel()
    held.go()
    assert good.result(SOON).isfinite().all()
    assert last.result(SOON).isfinite().all()
    with pytest.raises(NotFiniteError, match="not finite"):
        nan.result(SOON)
    with pytest.raises(MemoryError):
        bad.result(SOON)


def test_closing_fails_what_waits_and_what_comes_later(base: BaseModel) -> None:
    codec = Codec(base)
    held = Held(codec)
    waiting: list[Future[Any]] = [codec.encode(Prompt("a cup")), codec.decode(latents(1)), codec.decode(latents(2))]
    waiting.append(codec.moments(torch.zeros(3, 16, 16)))
    cancelled = codec.encode(Prompt("red"))
    cancelled.cancel()
    closing = threading.Thread(target=codec.close)
    closing.start()
    for future in waiting:
        assert isinstance(future.exception(SOON), EngineStoppedError)
    held.go()
    closing.join(SOON)
    assert not closing.is_alive()
    later: list[Callable[[], Future[Any]]] = [
        lambda: codec.encode(Prompt("new")),
        lambda: codec.decode(latents(1)),
        lambda: codec.moments(torch.zeros(3, 16, 16)),
        lambda: codec.file(torch.zeros(3, 4, 4), {}, FileFormat()),
        lambda: codec.preview(latents(1), FileFormat()),
    ]
    for ask in later:
        with pytest.raises(EngineStoppedError):
            ask()
    codec.close()


def test_previews_show_the_colours_of_the_latents(codec: Codec, base: BaseModel) -> None:
    data = codec.preview(latents(1, height=12), FileFormat()).result(SOON)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (128, 192)
    found = colour_map(base)
    assert found.shape == (5, 3)
    torch.testing.assert_close(found, colour_map(base), rtol=1e-3, atol=1e-3)


def test_the_workers_threads_are_its_own(base: BaseModel) -> None:
    torch.set_num_threads(2)
    codec = Codec(base)
    try:
        assert codec._torch.submit(torch.get_num_threads).result(SOON) == 1
    finally:
        codec.close()
        torch.set_num_threads(1)
