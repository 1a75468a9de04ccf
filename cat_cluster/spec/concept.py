"""One concept of a job spec, and what its token may be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from cat_cluster.spec.characters import control_character, unseen_character
from cat_cluster.spec.fields import ImagesFolder, NotNegative, Positive, Text, words
from cat_cluster.spec.folder_name import filled_from_folder_name
from cat_cluster.spec.sections import Section
from cat_cluster.spec.yaml_file import FieldError

DEFAULT_ALPHA = 5.0
DEFAULT_TEMPLATE = "a photo of a {token} {class_noun}"
CLASS_NOUN_PROMPT = "a photo of a {class_noun}"


def _without_named(schema: dict[str, Any]) -> None:
    schema["required"] = ["images"]  # the others may stand in its name


class ConceptSpec(Section):
    """One concept: its token, its class noun and the folder of its photos. Raises on a token the rules refuse.

    What is left out of token and class noun is read from the folder's name, if that is one of kohya's trainer.
    """

    model_config = ConfigDict(json_schema_extra=_without_named)

    token: Text = Field(
        description="The concept's rare trigger word, one whole word such as sks; it may be left out where the "
        "folder's name has it, as 10_sks cup."
    )
    class_noun: Text = Field(
        description="What the concept is an example of, such as cup; it may be left out where the folder's name has "
        "it, as 10_sks cup."
    )
    images: ImagesFolder = Field(
        description="Folder of the concept's photos, relative to the spec file, or an s3:// address of them; or the "
        "folder around a single one that is named as 10_sks cup."
    )
    alpha: NotNegative = Field(
        default=DEFAULT_ALPHA,
        description="Weight of the concept's CAT term; 0 is plain LoRA, more holds the base closer.",
    )
    weight: Positive = Field(default=1.0, description="Weight of the concept among those of its adapter.")
    captions: Literal["auto", "txt", "metadata", "template"] = Field(
        default="auto",
        description="Where captions come from: text files beside the images, metadata.jsonl or metadata.csv, the "
        "template, or auto: whichever is there, and the template when nothing looks like captions.",
    )
    template: Text | None = Field(
        default=None, description=f"Caption for images without one; the default is {DEFAULT_TEMPLATE!r}."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_by_folder(cls, data: object) -> object:
        filled, errors = filled_from_folder_name(data)
        cls.refuse(errors)
        return filled

    @field_validator("token")
    @classmethod
    def _one_word(cls, token: str) -> str:
        if words(token) != (token.casefold(),) or re.search(r"[{}]", token):
            raise ValueError(f"{token!r} must be one word, without spaces, commas or braces, such as sks")
        if (unseen := unseen_character(token)) is not None:
            raise ValueError(f"{token!r} holds {unseen!r}, which nobody sees or types; type the token anew")
        return token

    @field_validator("class_noun")
    @classmethod
    def _some_words(cls, class_noun: str) -> str:
        if not words(class_noun) or re.search(r"[{}]", class_noun):
            raise ValueError(f"{class_noun!r} must be one or more words without braces, such as cup")
        return class_noun

    @field_validator("class_noun", "template")
    @classmethod
    def _no_controls(cls, text: str | None) -> str | None:
        if text is not None and (control := control_character(text)) is not None:
            raise ValueError(f"{text!r} holds the control character {control!r}; type it anew")
        return text

    @field_validator("template")
    @classmethod
    def _places(cls, template: str | None) -> str | None:
        for place in re.findall(r"\{[^{}]*\}?|\}", template or ""):
            if place not in ("{token}", "{class_noun}"):
                raise ValueError(f"{place!r} is not a place; the places are {{token}} and {{class_noun}}")
        if template is not None and "{token}" not in words(template):
            raise ValueError(f"{template!r} must hold {{token}} as a word of its own, as in {DEFAULT_TEMPLATE!r}")
        return template

    @model_validator(mode="after")
    def _token_is_rare(self) -> Self:
        self.refuse(_token_errors(self))
        return self

    def template_caption(self) -> str:
        """Return the caption of an image that has none of its own, from `template` or the default."""
        template = self.template or DEFAULT_TEMPLATE
        return template.replace("{class_noun}", self.class_noun).replace("{token}", self.token)


def _token_errors(concept: ConceptSpec) -> Iterator[FieldError]:
    """A token that the prior prompt holds as an ordinary word could not be removed without taking that word too."""
    token, noun = concept.token, concept.class_noun
    prior_words = (*words(CLASS_NOUN_PROMPT), *words(concept.template or DEFAULT_TEMPLATE))
    if token.casefold() in words(noun):
        yield ("token",), f"{token!r} is a word of the class noun {noun!r}; choose a rare word such as sks"
    elif token.casefold() in prior_words:
        yield ("token",), f"{token!r} is an ordinary word of the prior prompt; choose a rare word such as sks"
    if concept.template is not None and concept.captions in ("txt", "metadata"):
        remedy = "remove it, or use captions: auto or template"
        yield ("template",), f"is not used with captions: {concept.captions}; {remedy}"
