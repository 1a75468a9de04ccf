"""Captions and prompts against the limit of the text encoder, which silently reads the start of a longer one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cat_cluster.data.caption_changes import longest_first
from cat_cluster.data.concepts import Concept, has_token
from cat_cluster.errors import ConceptError
from cat_cluster.models.prompt_weights import Prompt, plain_text
from cat_cluster.models.text_limit import TextLimit
from cat_cluster.spec.characters import shown_name
from cat_cluster.spec.fields import MOST_CHUNKS
from cat_cluster.spec.sections import TrainingSpec

_SHOWN = 3  # captions a warning quotes
_QUOTED = 120  # characters that are quoted of a text, from its start and from its end


def check_caption_lengths(
    adapter_id: str, concepts: Sequence[Concept], limit: TextLimit, training: TrainingSpec
) -> tuple[str, ...]:
    """Return a warning for each concept with captions that are too long for the text encoder.

    Raises ConceptError naming the captions whose token is in what is cut off, or may be where their tags are shuffled:
    there prompt and prior prompt are one, and the CAT term would undo what the identity term teaches.
    """
    chunks, warnings = training.prompt_chunks, []
    hint, remedy = " (training.prompt_chunks reads more)", "shorten them, or raise training.prompt_chunks"
    if chunks == MOST_CHUNKS:
        hint, remedy = "", "or shorten them"
    for concept in concepts:
        cut, lost, across = [], [], []
        for example in concept.examples:
            rest = limit.split(Prompt(example.prompt, chunks=chunks))[1]
            latest = longest_first(example.prompt, concept.token, concept.class_noun, training, limit.count)
            if not has_token(limit.split(Prompt(latest, chunks=chunks))[0], concept.token):
                lost.append(f"  {shown_name(example.path.name)}: {quoted(example.prompt)}")
            elif rest:
                cut.append(f"{shown_name(example.path.name)}: {quoted(rest)}")
            if _lies_across(limit, example.prompt, concept.token, chunks):
                across.append(shown_name(example.path.name))
        if lost:
            shuffled = " when their tags are shuffled" if training.shuffle_tags else ""
            heading = (
                f"adapter {adapter_id}: captions: the text encoder reads the first {_read(limit, chunks)}, and the "
                f"token {concept.token!r} comes later in {len(lost)} of {len(concept.examples)} captions{shuffled}; "
                f"write it further to the front, {remedy}"
            )
            raise ConceptError("\n".join([heading, *lost]))
        if cut:
            warnings.append(
                f"adapter {adapter_id}, token {concept.token}: the text encoder reads the first "
                f"{_read(limit, chunks)} of a caption{hint}, and this is not read: {_some(cut)}"
            )
        if across:
            warnings.append(
                f"adapter {adapter_id}, token {concept.token}: it lies across two chunks of the text encoder, which "
                f"reads its halves apart, in the captions of {_some(across)}; write it further to the front"
            )
    return tuple(warnings)


def _some(items: Sequence[str]) -> str:
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return "; ".join([*items[:_SHOWN], *more])


def _lies_across(limit: TextLimit, caption: str, token: str, chunks: int) -> bool:
    """Say whether the end of a chunk falls into each occurrence of the token that is read."""
    room, whole = limit.tokens - 2, []
    for match in re.finditer(r"[^\s,]+", caption):
        if match[0].casefold() == token.casefold():
            before, until = limit.count(caption[: match.start()]), limit.count(caption[: match.end()])
            if until <= chunks * room:
                whole.append(before // room == (until - 1) // room)
    return bool(whole) and not any(whole)


def cut_notes(
    limit: TextLimit, tokens: Sequence[str], *, prompt: Prompt, negative_prompt: Prompt | None = None
) -> Iterator[str]:
    """Yield what people should know of prompts that the text encoder does not read whole.

    tokens: those of the adapter that draws; one that is only in what is cut off draws nothing. Raises SpecError, which
    begins with `prompt` or `negative_prompt`, for a weight that cannot be.
    """
    read, cut = limit.split(prompt)
    rests = {"prompt": cut}
    if negative_prompt is not None:
        rests["negative prompt"] = limit.split(negative_prompt, field="negative_prompt")[1]
    for name, rest in rests.items():
        if rest:
            first = _read(limit, prompt.chunks)
            yield f"the text encoder reads the first {first} of the {name}, and not {quoted(rest)}"
    words = plain_text(prompt.text, prompt.weighting)
    for token in tokens:
        if has_token(words, token) and not has_token(read, token):
            yield f"the token {token!r} is not read, so its concept is not drawn: write it further to the front"


def _read(limit: TextLimit, chunks: int) -> str:
    return f"{limit.tokens} tokens" if chunks == 1 else f"{chunks} chunks of {limit.tokens} tokens"


def quoted(text: str) -> str:
    """Return a text in quotes, a long one without its middle."""
    if len(text) <= 2 * _QUOTED:
        return repr(text)
    return f"{text[:_QUOTED]!r} ... {text[-_QUOTED:]!r}"
