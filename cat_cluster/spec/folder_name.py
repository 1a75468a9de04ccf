"""The name of a folder of photos as kohya's trainer reads it: repeats, token and class noun, as in `10_sks cup`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cat_cluster.spec.fields import words
from cat_cluster.spec.yaml_file import FieldError

# That trainer splits at the first underscore, and leaves out a folder without a number, or with 0, before it. Of four
# digits a number is a year: nobody repeats photos so often.
_NAME = re.compile(r"0*([1-9][0-9]{0,2})_(.+)")


@dataclass(frozen=True)
class FolderName:
    """What a name says. class_noun: the words behind the token, "" where there is none."""

    repeats: int
    token: str
    class_noun: str

    def fits(self, token: str, class_noun: str) -> bool:
        """Say whether each word of the name is the token or one of the class noun, in any case."""
        return set(words(f"{self.token} {self.class_noun}")) <= {token.casefold(), *words(class_noun)}


def read_folder_name(images: str) -> FolderName | None:
    """Read the last part of a path or address; None where it is no such name."""
    match = _NAME.fullmatch(images.rstrip("/").rpartition("/")[2])
    said = match[2].replace(",", " ").split() if match else []
    return FolderName(int(match[1]), said[0], " ".join(said[1:])) if match and said else None


def filled_from_folder_name(concept: object) -> tuple[object, list[FieldError]]:
    """Return a concept of a spec with the token and class noun that the name of its images says, where it lacks them.

    Nothing is filled in where what is given differs from the name: the error says so, at the field that is lacking.
    """
    if not isinstance(concept, Mapping) or not isinstance(images := concept.get("images"), str):
        return concept, []
    named = read_folder_name(images.strip())
    if named is None:
        return concept, []
    said = {"token": named.token, **({"class_noun": named.class_noun} if named.class_noun else {})}
    wrong = [name for name in said if name in concept and words(str(concept[name])) != words(said[name])]
    lacking = [name for name in said if name not in concept]
    if wrong and lacking:
        other = f"{images!r} is named for {said[wrong[0]]!r}, not {concept[wrong[0]]!r}"
        return concept, [((lacking[0],), f"is missing, and {other}; give it here")]
    return {**said, **concept}, []
