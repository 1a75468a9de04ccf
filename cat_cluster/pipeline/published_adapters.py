"""Using published adapters: measuring one again on its photos, generating images and exporting, one or several."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cat_cluster.data.concepts import Concept, load_concept
from cat_cluster.data.edit_image import read_edit_image
from cat_cluster.data.prompt_syntax import syntax_notes
from cat_cluster.data.text_length import cut_notes
from cat_cluster.errors import AdapterMismatchError, BaseModelError, EvaluationError, NotFiniteError, SpecError
from cat_cluster.evaluation.evaluate import Evaluator
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import write_adapter
from cat_cluster.lora.layer_names import names_depend_on_base
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.base_names import local_base
from cat_cluster.models.edit import EditSource
from cat_cluster.models.edit_steps import edit_strength, steps_made
from cat_cluster.models.fingerprint import fingerprints
from cat_cluster.models.generate import ImageRow, generate, save_png
from cat_cluster.models.prompt_weights import PROMPT_CHUNKS, Prompt, plain_text
from cat_cluster.models.unet_layout import unet_layout
from cat_cluster.registry import Manifest, Reference, Registry
from cat_cluster.registry.file_header import FileSubject, shown_metadata
from cat_cluster.registry.gate import gate_note, opens_gate
from cat_cluster.registry.objects import PHOTO_PREFIX
from cat_cluster.registry.stacks import StackMember, check_once_each, stack_name
from cat_cluster.spec.characters import control_character
from cat_cluster.spec.choices import AdapterFormat, SamplerName, Weighting
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.imported import ImportedConcept
from cat_cluster.spec.sections import EvaluationSpec


class ImageListener(Protocol):
    """Receives how many denoising steps of an adapter's images are done."""

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """`done` of `total` denoising steps are done."""


class DrawListener(ImageListener, Protocol):
    """Receives the progress of images that are drawn, and what people should know of them."""

    def message(self, text: str) -> None:
        """A line for people."""


@dataclass(frozen=True)
class DrawRequest:
    """Images to draw: image i of `count` uses seed + i. adapters: whose changes add up; none: the base alone.

    gate: leave out adapters none of whose tokens the prompt has. negative_prompt: what guidance leads away from.
    weighting: how words of both prompts are weighted. prompt_chunks: how many chunks of each are read at most. image: a
    file's bytes, to begin with; mask: those of one of its size, which marks what is drawn anew; edit_strength: how far
    the image may change, None: the default one.
    """

    prompt: str
    adapters: Sequence[StackMember] = ()
    base: str | None = None
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0
    sampler: SamplerName = "ddim"
    count: int = 1
    gate: bool = False
    negative_prompt: str = ""
    weighting: Weighting = "none"
    prompt_chunks: int = PROMPT_CHUNKS
    image: bytes | None = field(default=None, repr=False)
    mask: bytes | None = field(default=None, repr=False)
    edit_strength: float | None = None


def evaluate_published(
    registry: Registry,
    reference: Reference | str,
    device: str,
    listener: ImageListener,
    changes: Mapping[str, Any],
    base: BaseModel | None = None,
) -> Evaluation:
    """Measure a published adapter on its stored photos, with its own evaluation settings but for `changes`."""
    manifest = registry.resolve(reference)
    settings = manifest.settings
    base = base or load_base_model(manifest.base_name, device=device)
    spec = EvaluationSpec.model_validate({**settings.evaluation.model_dump(), **changes})
    described: Sequence[ConceptSpec | ImportedConcept] = settings.concepts
    bank = open_adapter(registry, manifest, base)
    try:
        with tempfile.TemporaryDirectory() as folder:
            concepts = [
                _stored_concept(registry, manifest, concept, k, Path(folder) / str(k))
                for k, concept in enumerate(described)
            ]
            return Evaluator(base, bank).evaluate(
                1, concepts, spec, on_progress=lambda done, total: listener.images(manifest.name, done, total)
            )
    finally:
        bank.detach()


def draw_images(
    request: DrawRequest, out: Path, registry: Registry | None, device: str, listener: DrawListener
) -> list[Path]:
    """Draw the images of a request and write them as PNGs that carry their parameters; return the paths.

    Raises SpecError for a text with control characters, which neither the tokenizer nor the PNG has a place for, or
    with a weight that cannot be, or an image, a mask or a strength that cannot be used, RegistryError for an adapter
    named twice, NotFiniteError for an image that would show nothing.
    """
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if (control := control_character(text)) is not None:
            raise SpecError(f"{name}: holds the control character {control!r}; remove it, or type the prompt anew")
    words = plain_text(request.prompt, request.weighting)
    _check_edit(request)
    members = request.adapters
    check_once_each(member.reference for member in members)
    opened: list[tuple[Manifest, float]] = []
    if members:
        if registry is None:
            raise EvaluationError(f"adapter {members[0].reference} needs a registry: give --storage")
        opened = [(registry.resolve(member.reference), member.strength) for member in members]
    base_name = request.base or (opened[0][0].base_name if opened else "pocket")
    if request.gate:
        shut = [manifest for manifest, _ in opened if not opens_gate(manifest, words)]
        opened = [(manifest, strength) for manifest, strength in opened if manifest not in shut]
        for manifest in shut:
            listener.message(gate_note(manifest))
    manifests = [manifest for manifest, _ in opened]
    base = load_base_model(base_name, device=device)
    bank = None if registry is None or not opened else open_stack(registry, opened, base)
    tokens = [concept.token for manifest in manifests for concept in manifest.concepts]
    slot = 0 if bank is None else 1
    first = ImageRow(
        request.prompt,
        request.seed,
        slot,
        request.steps,
        request.guidance,
        request.sampler,
        request.negative_prompt,
        request.weighting,
        request.prompt_chunks,
        source=None if request.image is None else _source(request.image, request, base, listener),
    )
    for note in _notes(first, base, tokens):
        listener.message(f"warning: {note}")
    rows = [replace(first, seed=request.seed + i) for i in range(request.count)]
    name = stack_name(manifest.name for manifest in manifests) or base.name
    strength = stack_name(str(strength) for _, strength in opened) or "1.0"
    images = _finite(generate(base, bank, rows, on_progress=lambda done, total: listener.images(name, done, total)))
    paths = []
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        path = out if request.count == 1 else out.with_stem(f"{out.stem}-{i}")
        parameters = {key: str(value) for key, value in vars(row).items() if key not in ("slot", "source")}
        if (source := row.source) is not None:
            masked = str(source.mask is not None).lower()
            parameters |= {"denoising_strength": str(source.strength), "masked": masked}
        save_png(image, path, {**parameters, "model": name, "strength": strength}, edited=source is not None)
        paths.append(path)
    return paths


def _finite(images: Tensor) -> Tensor:
    """Return the images; NotFiniteError where a file would show nothing of one."""
    if not bool(images.isfinite().all()):
        raise NotFiniteError("the image is not finite: lower the strength or the guidance, or use another adapter")
    return images


def _notes(row: ImageRow, base: BaseModel, tokens: Sequence[str]) -> Iterator[str]:
    """Yield what people should know of how the prompts of an image are read."""
    prompt, negative = (Prompt(text, row.weighting, row.prompt_chunks) for text in (row.prompt, row.negative_prompt))
    yield from cut_notes(base.text_limit, tokens, prompt=prompt, negative_prompt=negative)
    yield from syntax_notes(row.prompt, row.negative_prompt, row.weighting)
    if row.negative_prompt and not row.guided:
        yield "negative_prompt: changes nothing without guidance; it needs one above 1"


def _check_edit(request: DrawRequest) -> None:
    """Refuse what cannot be meant before a base is loaded."""
    if request.image is None and request.mask is not None:
        raise SpecError("mask: marks what of an image is drawn anew; give --image too")
    if request.image is not None and request.edit_strength is not None:
        steps_made(request.steps, request.edit_strength)


def _source(image: bytes, request: DrawRequest, base: BaseModel, listener: DrawListener) -> EditSource:
    """Read the image that a request begins with, at the base's own size."""
    read = read_edit_image(image, request.mask, (base.resolution, base.resolution))
    for note in read.notes:
        listener.message(f"note: {note}")
    strength = edit_strength(request.edit_strength, masked=read.mask is not None)
    source = EditSource.of(read.pixels, read.mask, strength)
    source.check_mask(base.pixels_per_latent)
    return source


def open_adapter(registry: Registry, manifest: Manifest, base: BaseModel, *, strength: float = 1.0) -> LoraBank:
    """Put a published adapter into slot 1 of a new bank in the base's U-Net; `detach()` takes the bank out again.

    Raises AdapterMismatchError for another base than it was trained on, AdapterFormatError for damaged weights.
    """
    return open_stack(registry, [(manifest, strength)], base)


def open_stack(registry: Registry, members: Sequence[tuple[Manifest, float]], base: BaseModel) -> LoraBank:
    """Put published adapters, each at its strength, together into slot 1 of a new bank; see `open_adapter`."""
    loaded = [
        (registry.load_weights(manifest, base_fingerprints=base.fingerprints, unet=base.network), strength)
        for manifest, strength in members
    ]
    weights = stack_weights(loaded)
    bank = LoraBank.attach(base.network, layers=list(weights.layers))
    bank.load(1, weights)
    return bank


def export_stack(registry: Registry, members: Sequence[StackMember], folder: Path, fmt: AdapterFormat) -> Path:
    """Write published adapters as one file, each strength folded in, and return its path.

    Of several its rank is the sum of theirs. Raises AdapterMismatchError for adapters of different bases, RegistryError
    for one named twice, BaseModelError where kohya's names of an SDXL's layers are asked for without its base.
    """
    check_once_each(member.reference for member in members)
    manifests = [registry.resolve(member.reference) for member in members]
    first = manifests[0]
    other = next((one for one in manifests if one.base_fingerprint != first.base_fingerprint), None)
    if other is not None and not _of_one_base(manifests):
        raise AdapterMismatchError(
            f"{first.name} was trained on base {first.base_name!r} and {other.name} on {other.base_name!r}, or on "
            "other weights of that name: export adapters of one base"
        )
    metadata = {
        "adapter": stack_name(manifest.name for manifest in manifests),
        "tokens": " ".join(dict.fromkeys(concept.token for one in manifests for concept in one.concepts)),
        "base_fingerprint": first.base_fingerprint,
    }
    if any(member.strength != 1.0 for member in members):
        metadata["strength"] = stack_name(str(member.strength) for member in members)
    loaded = [(registry.load_weights(one), member.strength) for one, member in zip(manifests, members, strict=True)]
    weights, adapter_id = stack_weights(loaded), stack_name(manifest.adapter_id for manifest in manifests)
    metadata |= shown_metadata([FileSubject.of_manifest(one) for one in manifests], weights, adapter_id)
    if len(manifests) == 1:
        metadata["modelspec.date"] = first.created
    unet = unet_layout(first.base_name) if fmt == "kohya" and names_depend_on_base(weights.layers) else None
    return write_adapter(weights, folder, fmt, adapter_id=adapter_id, metadata=metadata, unet=unet)


def _of_one_base(manifests: Sequence[Manifest]) -> bool:
    """Say whether adapters with different digests know the same base: by its digest now, and that of before 0.2."""
    try:
        folder = local_base(manifests[0].base_name)
        return folder is not None and {one.base_fingerprint for one in manifests} <= {*fingerprints(folder)}
    except BaseModelError:  # without the base nothing says so
        return False


def _stored_concept(
    registry: Registry, manifest: Manifest, spec: ConceptSpec | ImportedConcept, index: int, folder: Path
) -> Concept:
    folder.mkdir()
    prefix = f"{PHOTO_PREFIX}{index}-"
    for name in manifest.objects:
        if name.startswith(prefix):
            (folder / name.removeprefix(prefix)).write_bytes(registry.read_object(manifest, name))
    if not any(folder.glob("*.png")):
        raise EvaluationError(
            f"{manifest.name} holds no photos of {spec.token!r}: train its spec again, or import it again with --photos"
        )
    return load_concept(
        ConceptSpec(token=spec.token, class_noun=spec.class_noun, images=str(folder), captions="template")
    )
