"""From a folder of photos and captions to the examples of a concept, refusing what would teach the wrong thing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from PIL import Image

from cat_cluster.data.captions import read_captions
from cat_cluster.data.masks import Mask, mask_of_alpha, masks_among, read_mask, refuse_masks
from cat_cluster.data.photo_folder import find_images, folder_with_photos, passed_over
from cat_cluster.data.photos import MOST_DECODED_BYTES, decoded_bytes, read_photo
from cat_cluster.data.s3_photos import local_images
from cat_cluster.errors import ConceptError
from cat_cluster.spec.characters import shown_name
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.fields import words
from cat_cluster.spec.folder_name import read_folder_name
from cat_cluster.spec.job import AdapterSpec


@dataclass(frozen=True, eq=False)
class Example:
    """One photo with its prompt.

    path, digest: the file and the digest of what was read from it. image: RGB in sRGB, upright, alpha laid over white.
    prompt: the caption y_T. prior_prompt: y, the same with only the token removed. mask: where in it the concept is;
    None where all of it counts.
    """

    path: Path
    digest: str
    image: Image.Image
    prompt: str
    prior_prompt: str
    mask: Mask | None = None


@dataclass(frozen=True, eq=False)
class Concept:
    """A subject to teach: its N examples, its token, and the weights of its loss terms (alpha_k and weight_k).

    captions_from: where the prompts come from, in words. passed_over: names in the folder that were not used.
    warnings: what people should know of how the folder was read.
    """

    token: str
    class_noun: str
    alpha: float
    weight: float
    examples: tuple[Example, ...]
    captions_from: str = ""
    passed_over: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def has_token(prompt: str, token: str) -> bool:
    """Say whether `token` is a whole word of the prompt, whatever its case: `<shs>` is not `shs`."""
    return token.casefold() in words(prompt)


def remove_token(prompt: str, token: str) -> str:
    """Return the prompt without any occurrence of the token as a whole word; all else stays byte for byte.

    One following comma and the spaces around it go with each occurrence: "shs, a cat statue" -> "a cat statue".
    """
    kept, end = [], 0
    for match in re.finditer(r"([^\s,]+)\s*(?:,\s*)?", prompt):
        if match[1].casefold() == token.casefold():
            kept.append(prompt[end : match.start()])
            end = match.end()
    return "".join([*kept, prompt[end:]])


def replace_token(prompt: str, token: str, word: str) -> str:
    """Return the prompt with `word` wherever the token stands as a whole word; all else stays byte for byte."""
    return re.sub(r"[^\s,]+", lambda found: word if found[0].casefold() == token.casefold() else found[0], prompt)


def load_concept(spec: ConceptSpec, cache_dir: Path | None = None, *, masked: bool = False) -> Concept:
    """Read the images and captions of one concept, in the order of their file names.

    cache_dir: where photos from an s3:// address are kept; by default the cache of the settings. masked: whether the
    photos' masks are read, files beside them or their own transparency; a file is refused where they are not.
    Raises ConceptError that names every file that cannot be used, and what to do: an empty or missing folder, one with
    photos in subfolders, a damaged, tiny or huge image, more photos than memory should hold, an s3:// address that
    cannot be read, captions that are missing, disagree, lack the token, or are of a kind that is not read.
    """
    local = local_images(spec.images, cache_dir)
    folder = local.folder
    found = find_images(folder)
    masks = masks_among(found)
    if not masked:
        refuse_masks(masks)
    mask_of = {photo: mask for mask, photo in masks.items()}
    paths = tuple(path for path in found if path not in masks)
    captions = read_captions(spec, folder, paths)
    _refuse_without_token(spec, captions.by_image)
    examples, errors = [], _header_errors(folder, found, masked=masked)
    for path in paths:
        if path in errors or mask_of.get(path) in errors:
            continue
        prompt = captions.by_image[path]
        try:
            examples.append(_example(spec, path, prompt, mask_of.get(path), masked=masked))
        except ConceptError as error:
            errors[path] = str(error)
    if errors:
        lines = [errors[path] for path in found if path in errors]
        raise ConceptError("\n".join([f"images: {folder} has files that cannot be used:", *lines]))
    left = tuple(sorted({*passed_over(folder, (*found, *captions.files)), *local.left_there}))
    return Concept(
        token=spec.token,
        class_noun=spec.class_noun,
        alpha=spec.alpha,
        weight=spec.weight,
        examples=tuple(examples),
        captions_from=captions.source,
        passed_over=left,
        warnings=tuple(_name_warnings(spec, local.name)),
    )


def _name_warnings(spec: ConceptSpec, name: str) -> Iterator[str]:
    """Yield what kohya's trainer would read in a folder's name and is not done here."""
    named = read_folder_name(name)
    if named is None:
        return
    if not named.fits(spec.token, spec.class_noun):
        yield (
            f"images: {shown_name(name)!r} is named for {f'{named.token} {named.class_noun}'.strip()!r}, as kohya's "
            f"trainer has it, and {spec.token} {spec.class_noun} is taught from it, as the spec says"
        )
    if named.repeats > 1:
        yield (
            f"images: the {named.repeats} of {shown_name(name)!r}, the repeats of kohya's trainer, changes nothing: "
            "each concept has as many rows, and each of its photos is seen equally often; `weight` gives a concept a "
            "larger share"
        )


def _example(spec: ConceptSpec, path: Path, prompt: str, mask: Path | None, *, masked: bool) -> Example:
    photo = read_photo(path)
    where = None
    if masked:
        where = mask_of_alpha(path, photo) if mask is None else read_mask(mask, photo)
    return Example(path, photo.digest, photo.image, prompt, remove_token(prompt, spec.token), where)


def _header_errors(folder: Path, paths: Sequence[Path], *, masked: bool) -> dict[Path, str]:
    """Return what the headers of the photos and masks are refused for, before any is decoded.

    masked: whether transparency is kept beside the colours. Raises ConceptError when all of them together would take
    more memory than a concept may.
    """
    errors, total = {}, 0
    for path in paths:
        try:
            total += decoded_bytes(path) * (4 if masked else 3) // 3
        except ConceptError as error:
            errors[path] = str(error)
    if total > MOST_DECODED_BYTES:
        raise ConceptError(
            f"images: {folder}: its {len(paths)} photos take {total / 2**30:.1f} GiB of memory, and one concept may "
            f"take {MOST_DECODED_BYTES / 2**30:.0f} GiB; use fewer, or save them smaller (base models see at most 1024 "
            "pixels of the shorter side)"
        )
    return errors


def load_concepts(
    adapter_id: str, specs: Sequence[ConceptSpec], cache_dir: Path | None = None, *, masked: bool = False
) -> tuple[Concept, ...]:
    """Read all concepts of an adapter and check their tokens; raises ConceptError naming the adapter too.

    masked: as in load_concept; refused where no photo has a mask.
    """
    try:
        concepts = tuple(load_concept(spec, cache_dir, masked=masked) for spec in specs)
        check_tokens(concepts)
        if masked and not any(example.mask is not None for concept in concepts for example in concept.examples):
            raise ConceptError(
                "training.masked_loss: no photo has a mask; put 1-mask.png beside 1.jpg, white where the concept is, "
                "use photos with transparent areas, or leave masked_loss out"
            )
    except ConceptError as error:
        raise ConceptError(f"adapter {adapter_id}: {error}") from error
    return concepts


def folder_warnings(adapter_id: str, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """Return the warnings of an adapter's concepts, each with whose it is."""
    return tuple(f"adapter {adapter_id}, token {one.token}: {text}" for one in concepts for text in one.warnings)


def upload_warnings(adapters: Sequence[AdapterSpec]) -> tuple[str, ...]:
    """Return what is to be known of the names of folders before they are uploaded, which leaves no name.

    Raises ConceptError for a folder that is not there.
    """
    return tuple(
        f"adapter {adapter.id}, token {spec.token}: {text}"
        for adapter in adapters
        for spec in adapter.concepts
        if "://" not in spec.images
        for text in _name_warnings(spec, folder_with_photos(Path(spec.images)).name)
    )


def check_tokens(concepts: Sequence[Concept]) -> None:
    """Check the tokens of one adapter against each other; raises ConceptError naming the token and the caption.

    Each token belongs to one concept, and no other concept's caption holds it: the prior prompt would keep it,
    so one concept's CAT term would hold back what the other's identity term teaches.
    """
    for first, second in combinations(concepts, 2):
        if first.token.casefold() == second.token.casefold():
            raise ConceptError(
                f"token: {second.token!r} is used by two concepts of one adapter; give each a token of its own"
            )
    for concept in concepts:
        for other in concepts:
            for example in concept.examples if other is not concept else ():
                if has_token(example.prompt, other.token):
                    raise ConceptError(
                        f"captions: {shown_name(example.path)}: the caption {example.prompt!r} of token "
                        f"{concept.token!r} holds the token {other.token!r} of another concept of the adapter; leave "
                        "it out of this caption"
                    )


def _refuse_without_token(spec: ConceptSpec, captions: Mapping[Path, str]) -> None:
    lacking = [path for path, caption in captions.items() if not has_token(caption, spec.token)]
    if lacking:
        # Without its token y equals y_T, and the CAT term would undo what the identity term teaches.
        heading = (
            f"captions: {lacking[0].parent}: {len(lacking)} of {len(captions)} captions lack the token {spec.token!r} "
            "as a word of its own; write it into them, correct `token`, or use captions: template"
        )
        raise ConceptError(
            "\n".join([heading, *(f"  {shown_name(path.name)}: {captions[path]!r}" for path in lacking)])
        )


def image_digests(concepts: Sequence[Concept]) -> list[str]:
    """Return one sha256 per photo over its bytes, its caption and its mask's file: any changed is another adapter."""
    return [
        hashlib.sha256(_content(example).encode()).hexdigest() for concept in concepts for example in concept.examples
    ]


def _content(example: Example) -> str:
    mask = f" mask {example.mask.digest}" if example.mask is not None and example.mask.digest else ""
    return f"{example.digest} {example.prompt}{mask}"
