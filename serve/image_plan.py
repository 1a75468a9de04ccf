"""A call with all that it names found: what is to be drawn, with which adapters, and what its files say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cat_cluster.errors import BaseModelError, SpecError
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.edit import EditSource, edit_table
from cat_cluster.models.samplers import SamplerTable, sampler_table
from cat_cluster.registry import Manifest
from cat_cluster.registry.manifest import WEIGHTS
from cat_cluster.registry.stacks import stack_name
from cat_cluster.telemetry import Metrics
from serve.adapters.cache import AdapterCache, Resolved
from serve.calls import Edit, ImageCall
from serve.denoise.codec import Codec
from serve.denoise.engine import DenoisingEngine
from serve.denoise.image import Size
from serve.denoise.image_file import fitting_prompts, image_metadata
from serve.denoise.safety import SafetyChecker
from serve.denoise.sizes import Pixels, chosen_size


@dataclass(frozen=True, eq=False)
class EngineParts:
    """What generating images takes: base model, engine, adapter cache, codec, the sizes served, metrics, checker."""

    base: BaseModel
    engine: DenoisingEngine
    cache: AdapterCache
    codec: Codec
    sizes: tuple[Pixels, ...]
    metrics: Metrics
    checker: SafetyChecker | None = None


@dataclass(frozen=True, eq=False)
class ImagePlan:
    """A call with all that it names found: a manifest for each adapter, sampler table, latent size (H, W), deadline.

    told: the call as its files tell of it. source: what it edits, None: nothing.
    """

    call: ImageCall
    told: ImageCall
    manifests: tuple[Manifest, ...]
    note: str | None
    table: SamplerTable
    size: Size
    deadline: float | None
    drift: str
    base_name: str
    source: EditSource | None = None

    @classmethod
    def of(
        cls,
        call: ImageCall,
        parts: EngineParts,
        found: Sequence[Resolved] = (),
        deadline: float | None = None,
        drift: str = "unknown",
        notes: Sequence[str] = (),
    ) -> ImagePlan:
        """Check a call against what is served; SpecError names the field.

        found: what its adapters' references name, in their order. notes: of what the service makes of the call.
        """
        width, height = chosen_size(call.size, parts.sizes)
        unit = parts.base.pixels_per_latent
        table = _table(call, parts.base)
        source = None if call.edit is None else _source(call.edit, width, height)
        if source is not None:
            source.check_mask(unit)
            table = edit_table(table, call.steps, source.strength)
        manifests = tuple(one.manifest for one in found)
        told, shortened = fitting_prompts(call, _names(manifests, parts.base.name), _digests(manifests))
        said = [*(one.note for one in found), *notes, shortened]
        if call.previews >= len(table):
            fewer = f"{len(table) - 1} instead of {call.previews}"
            said.append(f"partial_images: {fewer}; only steps before the last have one")
        return cls(
            call=call,
            told=told,
            manifests=manifests,
            note="; ".join(note for note in said if note) or None,
            table=table,
            size=(height // unit, width // unit),
            deadline=deadline,
            drift=drift,
            base_name=parts.base.name,
            source=source,
        )

    @property
    def guided(self) -> bool:
        """Whether each image takes a second row for classifier-free guidance."""
        return self.call.guidance > 1.0

    @property
    def model(self) -> str:
        """What serves the call: the base's name, a revision, or the revisions of a stack."""
        return stack_name(_names(self.manifests, self.base_name))

    def metadata(self, seed: int) -> dict[str, str]:
        """What an image's file says of it."""
        return image_metadata(self.told, seed, _names(self.manifests, self.base_name), _digests(self.manifests))


def _table(call: ImageCall, base: BaseModel) -> SamplerTable:
    """Return the table of a call's sampler; SpecError names the field of a request that is to blame."""
    try:
        return sampler_table(call.sampler, base.schedule, call.steps)
    except BaseModelError as error:  # the base's config has an option that another sampler may know
        raise SpecError(f"sampler: {error}") from error
    except SpecError as error:
        raise SpecError(re.sub("^steps:", "num_inference_steps:", str(error))) from error


def _source(edit: Edit, width: int, height: int) -> EditSource:
    pixels = np.frombuffer(edit.pixels, np.uint8).reshape(height, width, 3)
    mask = None if edit.mask is None else np.frombuffer(edit.mask, np.bool_).reshape(height, width)
    return EditSource.of(pixels, mask, edit.strength)


def _names(manifests: Sequence[Manifest], base_name: str) -> list[str]:
    return [manifest.name for manifest in manifests] or [base_name]


def _digests(manifests: Sequence[Manifest]) -> list[str]:
    return [manifest.objects[WEIGHTS].sha256 for manifest in manifests]
