"""The rows of one resolution: images of any adapters, prompt, sampler and step count, advanced by one U-Net call.

A guided image takes two rows (with its prompt and with its negative prompt), any other takes one. Rows in use are
always 0 .. count - 1 of the block: when an image leaves, the last rows move into the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_cluster.lora.row_bank import RowAdapter, RowBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning, Sizes, Text
from cat_cluster.models.edit import KeptAreas
from cat_cluster.models.samplers import SamplerTable, advance_rows, gather_coefficients
from cat_cluster.models.step_noise import StepNoise, gather_noise


@dataclass(eq=False)
class ImageRows:
    """An image on its way: two texts, of the prompt and of the negative one, or one, sampler and step.

    adapters are read when the image joins; latents [C, H, W] are its first ones, or, of an image that
    was parked, those it had, with `previous` (the last denoised latents) beside them. noise: of the steps, None where
    the sampler adds none. kept: what an edit puts back.
    """

    texts: Sequence[Text]
    table: SamplerTable
    guidance: float
    latents: Tensor
    adapters: tuple[RowAdapter, ...] = ()
    previous: Tensor | None = None
    noise: StepNoise | None = None
    kept: KeptAreas | None = None
    step: int = 0

    @property
    def rows(self) -> int:
        """How many rows it takes."""
        return len(self.texts)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= len(self.table)


class Rows:
    """At most `capacity` rows of one latent size; not thread-safe: one thread owns the device."""

    def __init__(
        self, base: BaseModel, bank: RowBank, capacity: int, buckets: Sequence[int], size: tuple[int, int]
    ) -> None:
        """`buckets`: rising row counts, the last one `capacity`, to which a call is padded; size: latent (H, W)."""
        self._base = base
        self._buckets = tuple(buckets)
        self._capacity = capacity
        self._block = bank.block(capacity, base.tokenizer.model_max_length)
        state = torch.zeros((capacity, base.latent_channels, *size), device=base.device)
        self._sizes = Sizes.drawn(*(base.pixels_per_latent * side for side in size))
        self._latents, self._previous = state, state.clone()  # [images, C, H, W], images dense
        self.images: list[ImageRows] = []
        self._rows_of: dict[ImageRows, list[int]] = {}
        self._count = 0
        self._index: _Index | None = None  # of these images; made by the step that needs it, which may find no memory

    @property
    def count(self) -> int:
        """Rows in use."""
        return self._count

    def bucket(self, count: int) -> int:
        """Return the number of rows that a call of `count` rows has with its padding."""
        return next(size for size in self._buckets if size >= count)

    def fits(self, image: ImageRows) -> bool:
        """Whether the image's rows are free."""
        return self._count + image.rows <= self._capacity

    def join(self, image: ImageRows) -> None:
        """Bind the image's rows; its adapters' vectors are copied, so that their slots are free for others then."""
        rows = list(range(self._count, self._count + image.rows))
        self._block.bind(rows, [text.states for text in image.texts], image.adapters)
        place = len(self.images)
        self._latents[place].copy_(image.latents)
        if image.previous is None:
            self._previous[place].zero_()
        else:
            self._previous[place].copy_(image.previous)
        self._count += image.rows
        self.images.append(image)
        self._rows_of[image] = rows
        image.adapters = ()
        self._index = None

    def leave(self, image: ImageRows, *, park: bool = False) -> None:
        """Free the image's rows; its latents and, to join again later (`park`), its adapters are left with it.

        These are copies: where there is no memory for them, the image is still in its rows.
        """
        place = self.images.index(image)
        latents, previous = self._latents[place].clone(), self._previous[place].clone()
        adapters = self._block.adapters(self._rows_of[image][0]) if park else ()
        image.latents, image.previous, image.adapters = latents, previous, adapters
        self.drop(image)

    def drop(self, image: ImageRows) -> None:
        """Free the rows of an image that is given up; it takes no memory."""
        place, rows = self.images.index(image), self._rows_of.pop(image)
        last = len(self.images) - 1
        self.images[place] = self.images[last]
        self.images.pop()
        for state in (self._latents, self._previous):
            state[place].copy_(state[last])
        for row in sorted(rows, reverse=True):
            self._fill(row)
        self._index = None

    def step(self) -> None:
        """Advance every image by one step of its own sampler. An exception leaves every image where it was."""
        images, index = self.images, self._indexed()
        device = self._base.device
        steps = [image.step for image in images]
        coefficients = gather_coefficients([image.table for image in images], steps, device)
        latents = self._latents[: len(images)]
        scaled = (coefficients.input_scale.view(-1, 1, 1, 1) * latents).to(self._base.dtype)
        # As long as the longest text of this call: rows of one chunk are computed as if there were no longer ones.
        self._block.fit(index.conditioning.states.shape[1])
        with self._block.call(len(index.image)):
            output = self._base.unet(
                scaled[index.image],
                coefficients.timesteps[index.image],
                **index.conditioning.arguments(),
                return_dict=False,
            )[0].float()
        plain = output[index.negative]
        # An image without guidance has its one row on both sides: the difference is exactly zero.
        predicted = plain + index.guidance.view(-1, 1, 1, 1) * (output[index.prompt] - plain)
        noise = gather_noise([image.noise for image in images], steps, device)  # drawn while a GPU computes the call
        following, denoised = advance_rows(coefficients, latents, predicted, self._previous[: len(images)], noise)
        for place, image in enumerate(images):
            if image.kept is not None:
                following[place] = image.kept.put_back(following[place], image.table, image.step)
        latents.copy_(following)
        self._previous[: len(images)].copy_(denoised)
        for image in images:
            image.step += 1

    def denoised(self, image: ImageRows) -> Tensor:
        """Return a copy of what the image would be by its last step [C, H, W]."""
        return self._previous[self.images.index(image)].clone()

    def _fill(self, row: int) -> None:
        """Free a row by moving the last one into it."""
        last = self._count - 1
        if row == last:
            self._block.clear(row)
        else:
            self._block.move(last, row)
            owner = next(rows for rows in self._rows_of.values() if last in rows)
            owner[owner.index(last)] = row
        self._count = last

    def _indexed(self) -> _Index:
        if self._index is not None:
            return self._index
        owners = {row: place for place, image in enumerate(self.images) for row in self._rows_of[image]}
        texts = {row: text for one in self.images for row, text in zip(self._rows_of[one], one.texts, strict=True)}
        used = [*range(self._count), *[0] * (self.bucket(self._count) - self._count)]  # padded with the first row
        ends = [(self._rows_of[image][0], self._rows_of[image][-1]) for image in self.images]
        self._index = _Index(
            image=self._on_device([owners[row] for row in used]),
            prompt=self._on_device([first for first, _ in ends]),
            negative=self._on_device([last for _, last in ends]),
            guidance=torch.tensor([image.guidance for image in self.images], device=self._base.device),
            conditioning=Conditioning.of([texts[row] for row in used], [self._sizes] * len(used)),
        )
        return self._index

    def _on_device(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._base.device)


@dataclass(frozen=True, eq=False)
class _Index:
    """Which image each row of a call belongs to [bucket]; each image's prompt and negative row, and its guidance.

    conditioning: of the rows [bucket].
    """

    image: Tensor
    prompt: Tensor
    negative: Tensor
    guidance: Tensor
    conditioning: Conditioning
