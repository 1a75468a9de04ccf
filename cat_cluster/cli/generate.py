"""cat-cluster generate: images of adapters, of stacks and of the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cat_cluster.cli.options import (
    LARGEST_FIRST_SEED,
    MOST_IMAGES,
    Storage,
    device,
    open_registry,
    people,
    progress,
)
from cat_cluster.cli.values import png_file, read_file
from cat_cluster.models.prompt_weights import PROMPT_CHUNKS
from cat_cluster.spec.choices import SamplerName, Weighting
from cat_cluster.spec.fields import MOST_CHUNKS

PromptText = Annotated[
    str,
    typer.Option(
        help="Prompt; an adapter's concept appears where its token is a word of it. <lora:NAME:0.7> names an adapter."
    ),
]
NegativePrompt = Annotated[
    str, typer.Option(help="What to keep out of the picture; it needs guidance. It names no adapter and opens no gate.")
]
OutFile = Annotated[
    Path,
    typer.Option(
        metavar="<path>",
        parser=png_file,
        help="PNG file to write; -0, -1, ... are added to its name when count > 1.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="Adapter id, id@alias or id@revision; with :0.7, at strength 0.7. Once per adapter. None: the base."
    ),
]
ImageFile = Annotated[
    Path | None,
    typer.Option(
        metavar="<path>",
        help="Image to begin with, scaled and cropped to the base's own size.",
    ),
]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        metavar="<path>",
        help="What of the image to draw anew: the transparent areas of a file of the same width and height, or the "
        "white ones of a black and white one.",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        help="How strongly the adapters act, times the strength of each; 1 as trained. With --image: how far the "
        "image may change, above 0 to 1; default 0.8, with a mask 1; the adapters have theirs in --adapter ID:0.7."
    ),
]
Gate = Annotated[bool, typer.Option("--gate", help="Leave out adapters none of whose tokens is a word of the prompt.")]
WeightingName = Annotated[
    Weighting, typer.Option(help="a1111: words have weights, as (word:1.2), (word) and \\[word]; none: that is text.")
]
Chunks = Annotated[
    int, typer.Option(min=1, max=MOST_CHUNKS, help="Most chunks of the prompt that are read; 1: its start alone.")
]


def generate(
    prompt: PromptText,
    out: OutFile,
    negative_prompt: NegativePrompt = "",
    adapter: Adapters = None,
    base: Annotated[str | None, typer.Option(help="Base model. Default: the adapter's own, else pocket.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_FIRST_SEED, help="Seed; image i of several uses seed + i.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; up to 1 means none.")] = 4.0,
    sampler: Annotated[SamplerName, typer.Option(help="Sampler.")] = "ddim",
    image: ImageFile = None,
    mask: MaskFile = None,
    strength: Strength = None,
    gate: Gate = False,
    weighting: WeightingName = "none",
    prompt_chunks: Chunks = PROMPT_CHUNKS,
    count: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Number of images.")] = 1,
    storage: Storage = None,
) -> None:
    """Generate images with an adapter, with several whose changes add up, or with the base model alone.

    Example: cat-cluster generate --adapter striped-cup --prompt "a photo of a sks cup in snow" --out cup.png
    """
    from cat_cluster.data.prompt_syntax import take_tags
    from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
    from cat_cluster.registry.stacks import check_strength, parse_member

    files = read_file(image), read_file(mask)
    text, tags = take_tags(prompt)
    members = [parse_member(name) for name in (*(adapter or ()), *tags)]
    of_adapters, of_edit = (1.0 if strength is None else strength, None) if image is None else (1.0, strength)
    check_strength(of_adapters, f"--strength {of_adapters:g}")
    stack = [replace(member, strength=of_adapters * member.strength) for member in members]
    for option, given in (("--strength", of_adapters != 1.0), ("--gate", gate)):
        if given and not stack:
            people.print(f"warning: {option} changes nothing: the base model alone has no adapter", soft_wrap=True)
    request = DrawRequest(
        text,
        stack,
        base,
        seed,
        steps,
        guidance,
        sampler,
        count,
        gate,
        negative_prompt=negative_prompt,
        weighting=weighting,
        prompt_chunks=prompt_chunks,
        image=files[0],
        mask=files[1],
        edit_strength=of_edit,
    )
    with progress("draw") as listener:
        paths = draw_images(request, out, open_registry(storage) if stack else None, device(), listener)
    for path in paths:
        people.print(f"wrote {path}")
