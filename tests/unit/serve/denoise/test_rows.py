"""Rows of one size: however images join, leave and are parked, each is what `generate` makes of it alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cat_cluster.lora.row_bank import RowAdapter, RowBank
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.conditioning import Text
from cat_cluster.models.edit import EditSource
from cat_cluster.models.generate import ImageRow
from serve.denoise.rows import ImageRows, Rows
from tests.support.denoised_images import ImageOracle, OracleImage, assert_same_image, random_adapter

CAPACITY = 6
LONG = "a photo of a red cup, " * 24  # 168 tokens of the tiny base: three chunks


def photo(seed: int, strength: float, *, masked: bool = False) -> EditSource:
    """A picture to edit, all of it or its right half."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return EditSource.of(pixels, np.tile(np.arange(16) >= 8, (16, 1)) if masked else None, strength)


WANTED = [
    OracleImage(ImageRow("a red cup", 1, steps=3, sampler="ddim"), 1),
    OracleImage(ImageRow("a photo of a cup", 2, steps=4, sampler="euler", guidance=1.0), 2),
    OracleImage(ImageRow("", 3, steps=4, sampler="dpmpp_2m", guidance=7.5, negative_prompt="red"), 1, 0.5),
    OracleImage(ImageRow("a red cup", 4, steps=1, sampler="dpmpp_2m")),
    OracleImage(ImageRow("a photo", 1, steps=5, sampler="ddim", guidance=0.0)),
    OracleImage(ImageRow("cup of red", 5, steps=2, sampler="euler", guidance=2.0), 2, 1.5),
    OracleImage(ImageRow("cup", 6, steps=5, sampler="dpmpp_2m", guidance=1.0), 1, -0.5),
    OracleImage(ImageRow("a red cup", 7, steps=3, sampler="ddim"), 2, 0.75, ((3, 0.5),)),
    OracleImage(ImageRow("cup", 8, steps=4, sampler="euler", guidance=1.0), 3, 1.0, ((2, -0.5),)),
    OracleImage(ImageRow("a red cup", 9, steps=6, sampler="dpmpp_2m", source=photo(1, 0.7)), 1),
    OracleImage(ImageRow("a cup", 10, steps=3, sampler="euler", source=photo(2, 1.0, masked=True)), 2, 0.5),
    OracleImage(ImageRow("cup", 11, steps=5, guidance=1.0, source=photo(3, 0.8, masked=True))),
    OracleImage(ImageRow(f"{LONG} sks", 9, steps=3, negative_prompt="red", prompt_chunks=4), 1),
    OracleImage(ImageRow("a (red:1.5) cup BREAK a photo", 10, steps=4, weighting="a1111", prompt_chunks=2), 2),
    OracleImage(ImageRow("cup", 11, steps=2, negative_prompt=LONG, prompt_chunks=3)),
    OracleImage(ImageRow(LONG, 12, steps=3, sampler="euler", guidance=1.0, prompt_chunks=3), 3),
    OracleImage(ImageRow("a red cup", 13, steps=4, sampler="euler_ancestral"), 1),
    OracleImage(ImageRow("a photo", 14, steps=5, sampler="dpmpp_2m_sde", guidance=1.0), 2, 0.5),
    OracleImage(ImageRow("cup", 15, steps=5, sampler="dpmpp_2m_sde_karras", source=photo(4, 0.8, masked=True))),
    OracleImage(ImageRow("a cup", 16, steps=4, sampler="lcm", guidance=1.5), 3),
]


@pytest.fixture(scope="module", params=["tiny_base_folder", "tiny_xl_folder"])
def oracle(request: pytest.FixtureRequest) -> ImageOracle:
    base = load_base_model(str(request.getfixturevalue(request.param)))
    oracle = ImageOracle(
        base, {1: random_adapter(base, 1), 2: random_adapter(base, 2, rank=2), 3: random_adapter(base, 3, rank=1)}
    )
    for wanted in WANTED:
        oracle.image(wanted)
    return oracle


@contextmanager
def open_rows(
    oracle: ImageOracle, buckets: tuple[int, ...] = (CAPACITY,), size: tuple[int, int] = (8, 8)
) -> Iterator[Rows]:
    bank = RowBank(oracle.base.unet, oracle.layout)
    try:
        with torch.inference_mode():
            yield Rows(oracle.base, bank, CAPACITY, buckets, size)
    finally:
        bank.detach()


def leave_when_done(oracle: ImageOracle, rows: Rows, names: dict[ImageRows, OracleImage]) -> None:
    for image in [image for image in rows.images if image.done]:
        rows.leave(image)
        assert_same_image(oracle.decode(image.latents), oracle.image(names[image]), names[image])


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_each_image_as_if_it_were_alone(oracle: ImageOracle, data: st.DataObject) -> None:
    buckets = data.draw(st.sampled_from([(CAPACITY,), (1, 2, 3, 4, 5, 6), (2, 4, 6), (3, 6)]))
    chosen = data.draw(st.lists(st.sampled_from(WANTED), min_size=1, max_size=7))
    with open_rows(oracle, buckets) as rows:
        images = [oracle.rows(wanted) for wanted in chosen]
        names = dict(zip(images, chosen, strict=True))
        waiting, parked, dropped = list(images), list[ImageRows](), 0
        while waiting or parked or rows.images:
            options = ["step"] * 2 if rows.images else []
            ready = [image for image in (*waiting, *parked) if rows.fits(image)]
            options += ["join"] * 3 if ready else []
            options += ["park", "drop"] if rows.images and len(parked) + dropped < 6 else []
            action = data.draw(st.sampled_from(options))
            if action == "step":
                rows.step()
                leave_when_done(oracle, rows, names)
            elif action == "join":
                image = data.draw(st.sampled_from(ready))
                (parked if image in parked else waiting).remove(image)
                rows.join(image)
                assert image.adapters == ()
            else:
                image = data.draw(st.sampled_from(rows.images))
                rows.leave(image, park=action == "park")
                dropped += 1
                if action == "park":
                    parked.append(image)
            assert rows.count == sum(image.rows for image in rows.images) <= CAPACITY
            assert sorted(row for own in rows._rows_of.values() for row in own) == list(range(rows.count))


@pytest.mark.parametrize("buckets", [(6,), (1, 2, 3, 4, 5, 6), (4, 6)])
def test_calls_are_padded_to_buckets(
    oracle: ImageOracle, buckets: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = UNet2DConditionModel.forward

    def counting(self: UNet2DConditionModel, sample: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    with open_rows(oracle, buckets) as rows:
        names = {}
        for wanted in (WANTED[0], WANTED[1], WANTED[2]):  # 5 rows; 3, 4 and 4 steps
            names[image := oracle.rows(wanted)] = wanted
            rows.join(image)
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, names)
    counts = [5, 5, 5, 3]
    assert sizes == [next(size for size in buckets if size >= count) for count in counts]


@pytest.mark.parametrize("wanted", [WANTED[2], WANTED[16]])
def test_parking_changes_no_bit_at_the_same_batch_size(oracle: ImageOracle, wanted: OracleImage) -> None:
    latents = []
    for parks in (0, 1, 3):
        with open_rows(oracle) as rows:
            image, other = oracle.rows(wanted), oracle.rows(WANTED[4])
            rows.join(image)
            rows.join(other)
            for step in range(4):
                if step < parks:
                    rows.leave(image, park=True)
                    rows.join(image)
                rows.step()
            rows.leave(image)
            latents.append(image.latents.clone())
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])


def test_a_failing_call_leaves_every_image_where_it_was(oracle: ImageOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_rows(oracle) as rows:
        names = {oracle.rows(wanted): wanted for wanted in (WANTED[0], WANTED[4])}
        for image in names:
            rows.join(image)
        rows.step()
        before = [state.clone() for state in (rows._latents, rows._previous)]
        with monkeypatch.context() as patch:
            patch.setattr(UNet2DConditionModel, "forward", lambda *_, **__: 1 / 0)
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    rows.step()
        assert [image.step for image in rows.images] == [1, 1]
        assert torch.equal(rows._latents, before[0])
        assert torch.equal(rows._previous, before[1])
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, names)


def test_a_step_that_fails_once_its_noise_is_drawn_is_made_again_with_it(
    oracle: ImageOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_rows(oracle) as rows:
        names = {oracle.rows(wanted): wanted for wanted in (WANTED[16], WANTED[17], WANTED[18])}
        for image in names:
            rows.join(image)
        rows.step()
        with monkeypatch.context() as patch:
            patch.setattr("serve.denoise.rows.advance_rows", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rows.step()
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, names)


def test_an_image_whose_numbers_overflowed_leaves_nothing_to_the_next_in_its_place(oracle: ImageOracle) -> None:
    with open_rows(oracle) as rows:
        rows.join(spoilt := oracle.rows(WANTED[0]))
        rows.step()
        for state in (rows._latents, rows._previous):
            state.fill_(float("nan"))
        rows.leave(spoilt)
        rows.join(following := oracle.rows(WANTED[0]))
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, {following: WANTED[0]})


def test_an_image_that_cannot_join_leaves_no_trace(oracle: ImageOracle) -> None:
    with open_rows(oracle) as rows:
        good, bad, wrong = oracle.rows(WANTED[0]), oracle.rows(WANTED[2]), oracle.rows(WANTED[1])
        rows.join(good)
        bad.adapters = (RowAdapter(torch.zeros(oracle.layout.size + 1), 1),)
        wrong.latents = torch.zeros(4, 9, 9)
        for image in (bad, wrong):
            with pytest.raises(RuntimeError):
                rows.join(image)
        assert (rows.images, rows.count) == ([good], 2)
        later = oracle.rows(WANTED[4])  # a base row where the bad one was to be
        rows.join(later)
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, {good: WANTED[0], later: WANTED[4]})


def seen_texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, tuple[int, ...], torch.Tensor | None]]:
    """What each U-Net call gets as texts from now on: shape, strides, and the mask."""
    seen: list[tuple[torch.Size, tuple[int, ...], torch.Tensor | None]] = []
    forward = UNet2DConditionModel.forward

    def watching(self: UNet2DConditionModel, *args: object, **kwargs: object) -> object:
        texts = kwargs["encoder_hidden_states"]
        assert isinstance(texts, torch.Tensor)
        mask = kwargs.get("encoder_attention_mask")
        assert mask is None or isinstance(mask, torch.Tensor)
        seen.append((texts.shape, texts.stride(), mask))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watching)
    return seen


def test_rows_of_one_chunk_are_computed_as_if_there_were_no_longer_ones(
    oracle: ImageOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask, the same shapes and strides, and to the bit the same latents, before and after a long prompt."""
    seen, latents, width = seen_texts(monkeypatch), [], oracle.base.unet.config.cross_attention_dim
    with open_rows(oracle) as rows:
        strides = {kept.stride() for kept in rows._block._kept.values()}
        for _ in range(2):
            rows.join(image := oracle.rows(WANTED[0]))
            while not image.done:
                rows.step()
            rows.leave(image)
            latents.append(image.latents)
            assert {kept.stride() for kept in rows._block._kept.values()} == strides
            assert [(shape, stride, mask) for shape, stride, mask in seen] == [
                ((CAPACITY, 77, width), (77 * width, width, 1), None)
            ] * 3
            seen.clear()
            rows.join(long := oracle.rows(WANTED[12]))
            rows.step()
            rows.leave(long)
            (((_, length, _), _, mask),) = seen
            assert length == 3 * 77
            assert mask is not None
            assert mask.sum(dim=1).tolist() == [3 * 77, 77, *[3 * 77] * 4], "the negative prompt is shorter"
            seen.clear()
    assert torch.equal(*latents)


def test_texts_of_one_length_need_no_mask_however_long_they_are(
    oracle: ImageOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_texts(monkeypatch)
    with open_rows(oracle) as rows:
        names = {oracle.rows(WANTED[15]): WANTED[15] for _ in range(2)}
        for image in names:
            rows.join(image)
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, names)
    assert [(shape[1], mask) for shape, _, mask in seen] == [(3 * 77, None)] * 3


def test_what_a_long_prompt_leaves_behind_a_shorter_one_is_not_read(oracle: ImageOracle) -> None:
    """A mask alone would not keep out what is not finite: 0 times NaN is NaN."""
    with open_rows(oracle) as rows:
        spoilt = oracle.rows(WANTED[12])
        spoilt.texts = tuple(Text(text.states * float("nan"), text.pooled) for text in spoilt.texts)
        rows.join(longest := oracle.rows(WANTED[14]))
        rows.join(spoilt)
        rows.step()
        rows.leave(spoilt)
        names = {longest: WANTED[14], oracle.rows(WANTED[0]): WANTED[0]}
        rows.join(list(names)[1])
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, names)


def test_a_long_prompt_that_cannot_join_changes_nothing(oracle: ImageOracle) -> None:
    with open_rows(oracle) as rows:
        good, bad = oracle.rows(WANTED[0]), oracle.rows(WANTED[12])
        rows.join(good)
        bad.latents = torch.zeros(4, 9, 9)
        with pytest.raises(RuntimeError):
            rows.join(bad)
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, {good: WANTED[0]})


@contextmanager
def memory_for_two_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys and values of the third layer find no memory, and the block raises."""
    new_zeros, taken = torch.Tensor.new_zeros, 0

    def few(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken > 2:
            raise torch.OutOfMemoryError("no memory is left")
        return new_zeros(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", few)
        with pytest.raises(torch.OutOfMemoryError):
            yield
    assert taken == 3


def test_memory_that_ends_while_a_long_prompt_joins_or_leaves_changes_nothing(
    oracle: ImageOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have keys and values of another length by then, which the neighbours must not see."""
    with open_rows(oracle) as rows:
        good, long = oracle.rows(WANTED[4]), oracle.rows(WANTED[12])
        names = {good: WANTED[4], long: WANTED[12]}
        rows.join(good)
        rows.step()
        with memory_for_two_layers(monkeypatch):
            rows.join(long)
        assert (rows.images, rows.count) == ([good], 1)
        rows.step()
        rows.join(long)
        rows.step()
        rows.leave(long, park=True)
        with memory_for_two_layers(monkeypatch):
            rows.step()
        assert (good.step, long.step) == (3, 1)
        rows.step()
        rows.join(long)
        while rows.images:
            rows.step()
            leave_when_done(oracle, rows, names)


def test_what_the_image_would_be_is_seen_on_the_way(oracle: ImageOracle) -> None:
    with open_rows(oracle) as rows:
        image = oracle.rows(WANTED[0])
        rows.join(image)
        for _ in range(3):
            rows.step()
        # DDIM's last step goes to the denoised latents themselves, but for the schedule's last noise level.
        shown = rows.denoised(image)
        rows.leave(image)
    assert float((shown - image.latents).abs().max()) < 0.2
    assert shown.data_ptr() != rows._previous.data_ptr()


def test_another_size(oracle: ImageOracle) -> None:
    """12 x 8 latents: rows of a batch against each alone."""
    chosen = [WANTED[0], WANTED[2]]
    alone = []
    for wanted in chosen:
        with open_rows(oracle, size=(12, 8)) as rows:
            image = oracle.rows(wanted, (12, 8))
            rows.join(image)
            for _ in range(wanted.row.steps):
                rows.step()
            rows.leave(image)
            alone.append(image.latents)
    with open_rows(oracle, size=(12, 8)) as rows:
        images = [oracle.rows(wanted, (12, 8)) for wanted in chosen]
        for image in images:
            rows.join(image)
        while rows.images:
            rows.step()
            for image in [image for image in rows.images if image.done]:
                rows.leave(image)
    for image, latents in zip(images, alone, strict=True):
        torch.testing.assert_close(image.latents, latents, rtol=0, atol=1e-4)
