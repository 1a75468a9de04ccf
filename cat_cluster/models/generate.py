"""Images from a base and its adapters, rows of any adapter, prompt, sampler and step count denoised together."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cat_cluster.files import write_whole
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning, Sizes, Text
from cat_cluster.models.edit import EditSource, edit_table
from cat_cluster.models.image_start import ImageStart, start_from_image, start_from_noise
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.models.provenance import XMP_CHUNK, xmp_packet
from cat_cluster.models.samplers import SamplerTable, advance_rows, gather_coefficients, sampler_table
from cat_cluster.models.step_noise import gather_noise
from cat_cluster.spec.choices import SamplerName, Weighting


@dataclass(frozen=True)
class ImageRow:
    """One image to make: the same as a stock pipeline's with a CPU generator of this seed and this adapter.

    weighting: how words of both prompts are weighted; prompt_chunks: how many chunks of each are read at most.
    source: the image that it is made from, of the base's own size; None: from noise alone.
    """

    prompt: str
    seed: int
    slot: int = 0
    steps: int = 25
    guidance: float = 4.0
    sampler: SamplerName = "ddim"
    negative_prompt: str = ""
    weighting: Weighting = "none"
    prompt_chunks: int = 1
    source: EditSource | None = None

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What is encoded: the prompt and, with guidance, the negative one."""
        prompt = Prompt(self.prompt, self.weighting, self.prompt_chunks)
        if not self.guided:
            return (prompt,)
        return prompt, Prompt(self.negative_prompt, self.weighting, self.prompt_chunks, negative=True)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance adds an unconditional row (guidance above 1, as in the stock pipeline)."""
        return self.guidance > 1.0


@dataclass
class _ActiveRow:
    """An image on its way: its index in the result, its sampler and what the sampler carries between steps."""

    index: int
    row: ImageRow
    table: SamplerTable
    text: Text
    negative_text: Text
    start: ImageStart
    latents: Tensor = field(init=False)
    previous: Tensor = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.latents = self.start.latents
        self.previous = torch.zeros_like(self.latents)


def generate(
    base: BaseModel,
    bank: LoraBank | None,
    rows: Sequence[ImageRow],
    *,
    rows_per_call: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Make one image per row: [N, 3, H, W] in [0, 1], float32 on the CPU, in the order of `rows`.

    At most `rows_per_call` U-Net rows ride in a call (a guided image takes two, both with its slot); a finished
    image leaves and the next one joins at once. Texts are encoded through each row's adapter too. bank None means the
    bare base. on_progress receives (steps done, steps in all) summed over images. Raises SpecError for an unknown
    sampler, an impossible number of steps, or a weight that cannot be.
    """
    if rows_per_call < 1:
        raise ValueError(f"rows_per_call is {rows_per_call}; it must be at least 1")
    if bank is None and any(row.slot != 0 for row in rows):
        raise ValueError("a row names an adapter's slot, and no bank is given")
    tables = {course: _table(base, *course) for course in {_course(row) for row in rows}}
    sources = {row.source for row in rows if row.source is not None}
    moments = {source: base.encode_moments(source.pixels.unsqueeze(0))[0] for source in sources}
    texts = _encode_prompts(base, bank, rows, rows_per_call)
    images = torch.empty(len(rows), 3, base.resolution, base.resolution)
    waiting, active = deque(enumerate(rows)), list[_ActiveRow]()
    done, total = 0, sum(len(tables[_course(row)]) for row in rows)
    with torch.no_grad():
        while waiting or active:
            while waiting and _fits(active, waiting[0][1], rows_per_call):
                index, row = waiting.popleft()
                active.append(_start(base, index, row, tables[_course(row)], texts, moments))
            _step(base, bank, active)
            done += len(active)
            finished = [entry for entry in active if entry.step == len(entry.table)]
            active = [entry for entry in active if entry.step < len(entry.table)]
            if finished:
                decoded = base.decode(torch.stack([entry.latents for entry in finished])).cpu()
                images[[entry.index for entry in finished]] = decoded
            if on_progress is not None:
                on_progress(done, total)
    return images


def image_array(images: Tensor) -> NDArray[np.uint8]:
    """Return images [..., 3, H, W] in [0, 1] as uint8 [..., H, W, 3]."""
    levels = (images.float().clamp(0.0, 1.0) * 255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = levels.movedim(-3, -1).cpu().numpy()
    return pixels


def png_bytes(image: Tensor, metadata: Mapping[str, str], *, edited: bool = False) -> bytes:
    """Return an image [3, H, W] in [0, 1] as a PNG whose text chunks are `metadata`, and XMP that a model drew it.

    edited: it was made from another image, and the XMP says that a model edited it.
    """
    return png_of(image_array(image), metadata, edited=edited)


def png_of(pixels: NDArray[np.uint8], metadata: Mapping[str, str], *, edited: bool = False) -> bytes:
    """Return a drawn image, uint8 [H, W, 3], as png_bytes does."""
    chunks = PngInfo()
    chunks.add_itxt(XMP_CHUNK, xmp_packet(edited=edited))
    for key, value in metadata.items():
        chunks.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(image: Tensor, path: Path, metadata: Mapping[str, str], *, edited: bool = False) -> None:
    """Write an image [3, H, W] in [0, 1] as png_bytes makes it; whole or not at all.

    Raises OutputError naming the file when the place cannot be written or its disk is full.
    """
    write_whole(path, png_bytes(image, metadata, edited=edited))


@torch.no_grad()
def _encode_prompts(
    base: BaseModel, bank: LoraBank | None, rows: Sequence[ImageRow], at_once: int
) -> dict[tuple[Prompt, int], Text]:
    """Encode what rows name, by prompt and slot: once for each adapter that changes texts, else once for all."""
    named = [(row.prompts[0], row.slot) for row in rows] + [(row.prompts[1], row.slot) for row in rows if row.guided]
    prompts = list(dict.fromkeys((prompt, _text_slot(bank, slot)) for prompt, slot in named))
    texts: dict[tuple[Prompt, int], Text] = {}
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        bind = None if bank is None else partial(_bind_text, bank, [slot for _, slot in part])
        encoded = encode_prompts(base, base.text_limit, [prompt for prompt, _ in part], bind)
        texts.update(zip(part, encoded, strict=True))
    return {(prompt, slot): texts[prompt, _text_slot(bank, slot)] for prompt, slot in named}


def _bind_text(bank: LoraBank, slots: Sequence[int], owners: Sequence[int]) -> AbstractContextManager[None]:
    return bank.text_rows([slots[owner] for owner in owners])


def _text_slot(bank: LoraBank | None, slot: int) -> int:
    """Return the slot whose text a row of a slot reads: 0 where its adapter leaves texts alone."""
    return slot if bank is not None and bank.adapts_text(slot) else 0


def _fits(active: Sequence[_ActiveRow], row: ImageRow, rows_per_call: int) -> bool:
    taken = sum(2 if entry.row.guided else 1 for entry in active)
    return not active or taken + (2 if row.guided else 1) <= rows_per_call


def _course(row: ImageRow) -> tuple[SamplerName, int, float | None]:
    """Return what an image's table depends on: sampler, steps, and the strength of an edit."""
    return row.sampler, row.steps, None if row.source is None else row.source.strength


def _table(base: BaseModel, sampler: SamplerName, steps: int, strength: float | None) -> SamplerTable:
    table = sampler_table(sampler, base.schedule, steps)
    return table if strength is None else edit_table(table, steps, strength)


def _start(
    base: BaseModel,
    index: int,
    row: ImageRow,
    table: SamplerTable,
    texts: Mapping[tuple[Prompt, int], Text],
    moments: Mapping[EditSource, Tensor],
) -> _ActiveRow:
    source = row.source
    if source is None:
        start = start_from_noise(base, row.seed, table)
    else:
        start = start_from_image(base, moments[source], source.mask, source.strength, row.seed, table)
    text, negative_text = (texts[prompt, row.slot] for prompt in (row.prompts[0], row.prompts[-1]))
    return _ActiveRow(index, row, table, text, negative_text, start)


def _step(base: BaseModel, bank: LoraBank | None, active: Sequence[_ActiveRow]) -> None:
    """Advance every active row by one step of its own sampler, with one U-Net call."""
    steps = [entry.step for entry in active]
    coefficients = gather_coefficients([entry.table for entry in active], steps)
    latents = torch.stack([entry.latents for entry in active])
    guided = [position for position, entry in enumerate(active) if entry.row.guided]
    scaled = coefficients.input_scale.to(base.device).view(-1, 1, 1, 1) * latents
    timesteps = coefficients.timesteps.to(base.device)
    texts = [*(entry.text for entry in active), *(active[i].negative_text for i in guided)]
    conditioning = Conditioning.of(texts, [Sizes.drawn(base.resolution, base.resolution)] * len(texts))
    slots = [entry.row.slot for entry in active] + [active[position].row.slot for position in guided]
    with _bound(bank, slots):
        output = base.unet(
            torch.cat([scaled, scaled[guided]]).to(base.dtype),
            torch.cat([timesteps, timesteps[guided]]),
            **conditioning.arguments(),
            return_dict=False,
        )[0].float()
    conditional, unconditional = output[: len(active)], output[len(active) :]
    if guided:
        scale = torch.tensor([active[position].row.guidance for position in guided], device=base.device)
        difference = conditional[guided] - unconditional
        conditional[guided] = unconditional + scale.view(-1, 1, 1, 1) * difference
    previous = torch.stack([entry.previous for entry in active])
    noise = gather_noise([entry.start.noise for entry in active], steps, base.device)
    following, denoised = advance_rows(coefficients, latents, conditional, previous, noise)
    for position, entry in enumerate(active):
        entry.latents, entry.previous = following[position], denoised[position]
        if entry.start.kept is not None:
            entry.latents = entry.start.kept.put_back(entry.latents, entry.table, entry.step)
        entry.step += 1


def _bound(bank: LoraBank | None, slots: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext() if bank is None else bank.rows(slots)
