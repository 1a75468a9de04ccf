"""Rows of one size: however images join, leave and are parked, each is what `generate` makes of it alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cat_cluster.lora.row_bank import RowBank
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.generate import ImageRow
from serve.denoise.rows import ImageRows, Rows
from tests.support.denoised_images import Studio, Wanted, assert_same_image, random_adapter

CAPACITY = 6
WANTED = [
    Wanted(ImageRow("a red cup", 1, steps=3, sampler="ddim"), 1),
    Wanted(ImageRow("a photo of a cup", 2, steps=4, sampler="euler", guidance=1.0), 2),
    Wanted(ImageRow("", 3, steps=4, sampler="dpmpp_2m", guidance=7.5, negative_prompt="red"), 1, 0.5),
    Wanted(ImageRow("a red cup", 4, steps=1, sampler="dpmpp_2m")),
    Wanted(ImageRow("a photo", 1, steps=5, sampler="ddim", guidance=0.0)),
    Wanted(ImageRow("cup of red", 5, steps=2, sampler="euler", guidance=2.0), 2, 1.5),
    Wanted(ImageRow("cup", 6, steps=5, sampler="dpmpp_2m", guidance=1.0), 1, -0.5),
]


@pytest.fixture(scope="module")
def studio(tiny_base_folder: Path) -> Studio:
    base = load_base_model(str(tiny_base_folder))
    studio = Studio(base, {1: random_adapter(base, 1), 2: random_adapter(base, 2, rank=2)})
    for wanted in WANTED:
        studio.alone(wanted)
    return studio


@contextmanager
def open_rows(studio: Studio, buckets: tuple[int, ...] = (CAPACITY,), size: tuple[int, int] = (8, 8)) -> Iterator[Rows]:
    bank = RowBank(studio.base.unet, studio.layout)
    try:
        with torch.inference_mode():
            yield Rows(studio.base, bank, CAPACITY, buckets, size)
    finally:
        bank.detach()


def leave_when_done(studio: Studio, rows: Rows, names: dict[ImageRows, Wanted]) -> None:
    for image in [image for image in rows.images if image.done]:
        rows.leave(image)
        assert_same_image(studio.decode(image.latents), studio.alone(names[image]), names[image])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_each_image_as_if_it_were_alone(studio: Studio, data: st.DataObject) -> None:
    buckets = data.draw(st.sampled_from([(CAPACITY,), (1, 2, 3, 4, 5, 6), (2, 4, 6), (3, 6)]))
    chosen = data.draw(st.lists(st.sampled_from(WANTED), min_size=1, max_size=7))
    with open_rows(studio, buckets) as rows:
        images = [studio.rows(wanted) for wanted in chosen]
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
                leave_when_done(studio, rows, names)
            elif action == "join":
                image = data.draw(st.sampled_from(ready))
                (parked if image in parked else waiting).remove(image)
                rows.join(image)
                assert image.adapter is None
            else:
                image = data.draw(st.sampled_from(rows.images))
                rows.leave(image, park=action == "park")
                dropped += 1
                if action == "park":
                    parked.append(image)
            assert rows.count == sum(image.rows for image in rows.images) <= CAPACITY
            assert sorted(row for own in rows._rows_of.values() for row in own) == list(range(rows.count))


@pytest.mark.parametrize("buckets", [(6,), (1, 2, 3, 4, 5, 6), (4, 6)])
def test_calls_are_padded_to_buckets(studio: Studio, buckets: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = UNet2DConditionModel.forward

    def counting(self: UNet2DConditionModel, sample: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    with open_rows(studio, buckets) as rows:
        names = {}
        for wanted in (WANTED[0], WANTED[1], WANTED[2]):  # 5 rows; 3, 4 and 4 steps
            names[image := studio.rows(wanted)] = wanted
            rows.join(image)
        while rows.images:
            rows.step()
            leave_when_done(studio, rows, names)
    counts = [5, 5, 5, 3]
    assert sizes == [next(size for size in buckets if size >= count) for count in counts]


def test_parking_changes_no_bit_at_the_same_batch_size(studio: Studio) -> None:
    latents = []
    for parks in (0, 1, 3):
        with open_rows(studio) as rows:
            image, other = studio.rows(WANTED[2]), studio.rows(WANTED[4])
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


def test_a_failing_call_leaves_every_image_where_it_was(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_rows(studio) as rows:
        names = {studio.rows(wanted): wanted for wanted in (WANTED[0], WANTED[4])}
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
            leave_when_done(studio, rows, names)


def test_an_image_that_cannot_join_leaves_no_trace(studio: Studio) -> None:
    with open_rows(studio) as rows:
        good, bad, wrong = studio.rows(WANTED[0]), studio.rows(WANTED[2]), studio.rows(WANTED[1])
        rows.join(good)
        bad.adapter = torch.zeros(studio.layout.size + 1)
        wrong.latents = torch.zeros(4, 9, 9)
        for image in (bad, wrong):
            with pytest.raises(RuntimeError):
                rows.join(image)
        assert (rows.images, rows.count) == ([good], 2)
        later = studio.rows(WANTED[4])  # a base row where the bad one was to be
        rows.join(later)
        while rows.images:
            rows.step()
            leave_when_done(studio, rows, {good: WANTED[0], later: WANTED[4]})


def test_what_the_image_would_be_is_seen_on_the_way(studio: Studio) -> None:
    with open_rows(studio) as rows:
        image = studio.rows(WANTED[0])
        rows.join(image)
        for _ in range(3):
            rows.step()
        # DDIM's last step goes to the denoised latents themselves, but for the schedule's last noise level.
        shown = rows.denoised(image)
        rows.leave(image)
    assert float((shown - image.latents).abs().max()) < 0.2
    assert shown.data_ptr() != rows._previous.data_ptr()


def test_another_size(studio: Studio) -> None:
    """12 x 8 latents: rows of a batch against each alone."""
    chosen = [WANTED[0], WANTED[2]]
    alone = []
    for wanted in chosen:
        with open_rows(studio, size=(12, 8)) as rows:
            image = studio.rows(wanted, (12, 8))
            rows.join(image)
            for _ in range(wanted.row.steps):
                rows.step()
            rows.leave(image)
            alone.append(image.latents)
    with open_rows(studio, size=(12, 8)) as rows:
        images = [studio.rows(wanted, (12, 8)) for wanted in chosen]
        for image in images:
            rows.join(image)
        while rows.images:
            rows.step()
            for image in [image for image in rows.images if image.done]:
                rows.leave(image)
    for image, latents in zip(images, alone, strict=True):
        torch.testing.assert_close(image.latents, latents, rtol=0, atol=1e-4)
