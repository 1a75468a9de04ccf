"""The adapters that a request names: in `model`, in `adapters`, and in its prompt; a refusal names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cat_cluster.data.prompt_syntax import take_tags
from cat_cluster.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    CatClusterError,
    ConflictError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    QuarantinedError,
    RegistryError,
    SpecError,
)
from cat_cluster.registry.references import Reference
from cat_cluster.registry.stacks import StackMember, parse_member
from serve.http.registry_listing import RegistryListing, parse_model
from serve.http.schema import DrawingRequest, ImageRequest
from serve.settings import ServeSettings

# Errors that http_errors says to be about `model`, unless their message begins with another field.
_OF_MODEL = (AdapterFormatError, AdapterMismatchError, AdapterNotFoundError, QuarantinedError)
_OF_ADAPTERS = (*_OF_MODEL, ConflictError, RegistryError)
_OF_FILES = (ObjectNotFoundError, ObjectUnreadableError)
# In a message about a revision: its id, at the start, or in the name of what is damaged; one about a stack has none.
_OF_ONE = re.compile(r"(?:(?:the )?[a-z]+ of )?([a-z0-9-]+)@|the [a-z ]+ (?:adapters|aliases)/([a-z0-9-]+)/")
_MISSING = re.compile(
    r"(?:no adapter ')?([a-z0-9-]+)@"
)  # at the start of a message about one that is not there: its id


@dataclass(frozen=True)
class RequestedStack:
    """prompt: without what names adapters in it; members: their strengths with the request's; fields: of each."""

    prompt: str
    members: tuple[StackMember, ...]
    fields: tuple[str, ...]

    @classmethod
    def of(cls, body: DrawingRequest, settings: ServeSettings) -> RequestedStack:
        """Read a request; SpecError, or AdapterNotFoundError for what can name no adapter, begin with the field."""
        strength = body.strength if isinstance(body, ImageRequest) else 1.0
        prompt, tags = take_tags(body.prompt)
        named = [*_named(body, settings.base), *(("prompt", _tagged(tag, settings.base)) for tag in tags)]
        fields = tuple(field for field, _ in named)
        members = tuple(replace(member, strength=strength * member.strength) for _, member in named)
        _check_number(fields, settings)
        seen = set[str]()
        for field, member in named:
            adapter_id = member.reference.adapter_id
            if adapter_id in seen:
                raise SpecError(
                    f"{field}: {adapter_id} is named twice; name each adapter once, and how much by strength"
                )
            seen.add(adapter_id)
        return cls(prompt, members, fields)

    async def not_found(self, error: AdapterNotFoundError, listing: RegistryListing) -> CatClusterError:
        """Return an engine's error with the field of the member that is not there, without the name of the store.

        It says what there is, unless the listing has every member: that is some seconds old, or they are there again.
        """
        if not self.members:
            return error
        for field, member in zip(self.fields, self.members, strict=True):
            try:
                await listing.summary(member.reference)
            except AdapterNotFoundError as found:
                return _with_field(found, field)
        about = _MISSING.match(str(error))
        ids = [member.reference.adapter_id for member in self.members]
        place = ids.index(about[1]) if about is not None and about[1] in ids else -1
        told = f"no '{self.members[place].reference}' when it was looked up: GET /v1/models lists those there are"
        return _with_field(AdapterNotFoundError(told), self.fields[place])

    def blamed(self, error: Exception) -> Exception:
        """Return an error of the engine, and where it is about adapters, with the field that names them before it."""
        if not isinstance(error, (*_OF_ADAPTERS, *_OF_FILES)) or not self.members:
            return error
        about = _OF_ONE.match(str(error))
        ids = [member.reference.adapter_id for member in self.members]
        found = None if about is None else about[1] or about[2]
        place = ids.index(found) if found in ids else -1
        if isinstance(error, _OF_FILES):  # its message has the store's name
            which = "one of the adapters" if place < 0 else str(self.members[place].reference)
            error = AdapterFormatError(
                f"a stored file of {which} is missing or cannot be read; `cat-cluster adapters verify` says which"
            )
        return _with_field(error, self.fields[-1].partition(".")[0] if place < 0 else self.fields[place])


def _named(body: DrawingRequest, base: str) -> Iterator[tuple[str, StackMember]]:
    """Yield the adapters that `model` or `adapters` names, each with its field."""
    if body.model is not None and body.model != base:
        if body.adapters:
            raise SpecError("model: adapters are named in `model` or in `adapters`; leave one of the two out")
        for part in body.model.split("+"):
            yield "model", StackMember(_reference(part, "model", base))
    for number, adapter in enumerate(body.adapters):
        field = f"adapters.{number}.model"
        yield field, StackMember(_reference(adapter.model, field, base), adapter.strength)


def _reference(text: str, field: str, base: str) -> Reference:
    """Return what one name of a field refers to; the error for another text says what to write in its place."""
    if text == base:
        raise SpecError(f"{field}: {text!r} is the base model, which every image has and no stack names; leave it out")
    try:
        return parse_model(text)
    except AdapterNotFoundError as error:
        if (meant := _meant(text)) is None:
            raise _with_field(error, field) from None
        name, colon, _ = text.strip().partition(":")
        remedy = "drop the spaces"
        if colon:
            choice = json.dumps({"model": name, "strength": meant.strength})
            remedy = f"a strength is given in `adapters`, as {choice}, or in the prompt, as <lora:{text.strip()}>"
        raise _with_field(AdapterNotFoundError(f"{text[:80]!r} is not an adapter id: {remedy}"), field) from None


def _meant(text: str) -> StackMember | None:
    """Return the adapter that a text names but for spaces around it and a strength behind it; None: it names none."""
    try:
        return parse_member(text.strip())
    except RegistryError:
        return None


def _tagged(tag: str, base: str) -> StackMember:
    """Return what `<lora:TAG>` names."""
    name = tag.partition(":")[0]
    if name == base:
        raise SpecError(f"prompt: <lora:{tag[:80]}>: {name!r} is the base model, which every image has; leave it out")
    try:
        parse_model(name)
    except AdapterNotFoundError as error:
        raise AdapterNotFoundError(f"prompt: <lora:{tag[:80]}>: {error}") from None
    try:
        return parse_member(tag)
    except RegistryError as error:
        raise SpecError(f"prompt: {error}") from None


def _check_number(fields: tuple[str, ...], settings: ServeSettings) -> None:
    most, why = min((settings.max_stack, "max_stack"), (settings.slots, "slots"))
    if len(fields) > most:
        field = fields[most].partition(".")[0]
        raise SpecError(
            f"{field}: {len(fields)} adapters are named and an image has up to {most} here; name fewer, or raise {why}"
        )


def _with_field(error: CatClusterError, field: str) -> CatClusterError:
    """Return an error with the field before its message; `model` is what most of them are about anyway."""
    if field == "model" and isinstance(error, _OF_MODEL):
        return error
    return type(error)(f"{field}: {error}")
