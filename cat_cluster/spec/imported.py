"""What is known of an adapter that was trained elsewhere: its tokens, and what it is measured with."""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.fields import AdapterId, OneOrMore, Text
from cat_cluster.spec.sections import EvaluationSpec


class ImportedConcept(BaseModel):
    """A concept of an imported adapter; how it was trained is not known. The token rules of a job spec hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    token: Text = Field(description="The trigger word the adapter was taught.")
    class_noun: Text = Field(description="What the concept is an example of.")
    alpha: None = Field(default=None, description="Not known.")
    weight: None = Field(default=None, description="Not known.")

    @model_validator(mode="after")
    def _obeys_the_token_rules(self) -> Self:
        ConceptSpec(token=self.token, class_noun=self.class_noun, images=".")
        return self


class ImportedAdapter(BaseModel):
    """An adapter read from a file of another tool; takes the place of the settings in its manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    id: AdapterId = Field(description="Name of the adapter.")
    base: Text = Field(description="Base model it is used with.")
    method: Literal["imported"] = Field(default="imported", description="It was trained elsewhere.")
    concepts: OneOrMore[ImportedConcept] = Field(description="Concepts of the adapter.")
    evaluation: EvaluationSpec = Field(description="How it is measured.")
    rank: int | None = Field(default=None, ge=1, description="Rank of the LoRA that stands for LoHa and LoKr layers.")
    text_encoders: bool = Field(default=False, description="Whether layers of text encoders are applied.")
    source: Text = Field(description="Name of the file.")
    source_sha256: str = Field(description="sha256 of the file's bytes.")

    @model_validator(mode="after")
    def _tokens_differ(self) -> Self:
        tokens = [concept.token.casefold() for concept in self.concepts]
        if len(set(tokens)) < len(tokens):
            raise ValueError("two concepts have the same token: name each token once")
        return self

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON; the file counts by its content, not by its name.

        What was added later counts where it says something, so that earlier revisions are found: a rank if given, text
        encoders if applied.
        """
        silent = {"rank"} if self.rank is None else set()
        silent |= set() if self.text_encoders else {"text_encoders"}
        content = self.model_dump(mode="json", exclude={"source", *silent})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
