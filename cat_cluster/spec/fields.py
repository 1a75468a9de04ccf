"""Field types of the job spec: the limits of each kind of value, and how its paths are made absolute.

A validation context {"folder": Path} says where the spec file lies; a spec made in Python has none, and its
paths stay as given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from cat_cluster.spec.choices import BlockGroup, MethodName, MetricName
from cat_cluster.spec.yaml_file import describe

LARGEST_SEED = 2**63 - 1
LARGEST_COUNT = 10**9
LARGEST_FACTOR = 10**6
MOST_CHUNKS = 16  # read of a text; each is as long as the text encoder reads at once
PLANNED_METHODS = ("dreambooth", "textual_inversion")
GATE_METRICS = get_args(MetricName)
BLOCK_GROUPS: tuple[BlockGroup, ...] = get_args(BlockGroup)
_Item = TypeVar("_Item")
CONDITION = re.compile(r"(>=|<=)\s*(-?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)")
_S3_ADDRESS = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/.*)?", re.DOTALL)
_REFERENCE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}(@(r-[0-9a-f]{12}|(?!r-)[a-z0-9][a-z0-9-]{0,62}))?")
_NAMED_BASES_AND_JUDGES = ("pocket", "pocket-xl", "pocket-classifier", "auto")


def words(text: str) -> tuple[str, ...]:
    """Split a prompt into its words at whitespace and commas, lower case folded (design: token rules)."""
    return tuple(text.casefold().replace(",", " ").split())


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


def _method(value: object) -> object:
    if value in PLANNED_METHODS:
        raise ValueError(f"{value!r} is not available in this version; available: {', '.join(get_args(MethodName))}")
    return value


def _workers(value: object) -> object:
    bounds = value if isinstance(value, list | tuple) and len(value) == 2 else (value,)
    whole = [bound for bound in bounds if isinstance(bound, int) and not isinstance(bound, bool) and bound >= 1]
    if len(whole) < len(bounds) or whole != sorted(whole):
        raise ValueError(f"must be a whole number, at least 1, or a pair [least, most], got {describe(value)}")
    return value


def _prompts(value: object) -> object:
    if value == "default":
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"must be default or a list of prompts, got {describe(value)}")
    for prompt in value:
        if not isinstance(prompt, str) or prompt.count("{}") != 1:
            raise ValueError(
                f"{describe(prompt)} must hold {{}} once, where the subject goes, as in 'a picture of a {{}} in snow'"
            )
    return value


def _pack_size(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be auto or a whole number, at least 1, got {describe(value)}")


def _conditions(value: object) -> object:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"must map metrics to conditions, as in {{kps: '>=0.1'}}, got {describe(value)}")
    for metric, condition in value.items():
        if metric not in GATE_METRICS:
            raise ValueError(f"{describe(metric)} is not a metric; the metrics are {', '.join(GATE_METRICS)}")
        if not isinstance(condition, str) or not CONDITION.fullmatch(condition.strip()):
            raise ValueError(f"{metric} has {describe(condition)}; write >= or <= and a number, as in '>=0.1'")
    return value


def _block_factors(value: object) -> object:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"must map blocks to factors, as in {{down: 0.5, mid: 0.5}}, got {describe(value)}")
    for group, factor in value.items():
        if group not in BLOCK_GROUPS:
            raise ValueError(f"{describe(group)} is not a group of blocks; the groups are {', '.join(BLOCK_GROUPS)}")
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not number or not 0.0 < factor <= LARGEST_FACTOR:
            raise ValueError(f"{group} has {describe(factor)}; write a number above 0, `blocks` leaves blocks out")
    return value


def _some(values: tuple[_Item, ...]) -> tuple[_Item, ...]:
    if not values:
        raise ValueError("must have at least one entry, got an empty list")
    return values


def _absolute(value: str, folder: Path) -> str:
    return os.path.normpath(folder / Path(value).expanduser())


def _spec_folder(info: ValidationInfo) -> Path | None:
    """Return the folder of the spec file being read; None for a spec made in Python, whose paths stay as given."""
    return info.context["folder"] if info.context else None


def _images_folder(value: str, info: ValidationInfo) -> str:
    folder = _spec_folder(info)
    if folder is None:
        return value
    if "://" in value:
        return _s3_address(value, "images lie in a folder or under s3://bucket/prefix")
    path = _absolute(value, folder)
    if not os.path.isdir(path):
        kind = "is a file; name the folder it is in" if os.path.exists(path) else "is not there"
        raise ValueError(f"{path} {kind} (paths are relative to the spec file)")
    return path


def _s3_address(value: str, remedy: str) -> str:
    if not value.startswith("s3://"):
        raise ValueError(f"{value!r} is of a kind that is not supported: {remedy}")
    if not _S3_ADDRESS.fullmatch(value):
        raise ValueError(f"{value!r} is not an S3 address; write s3://bucket/prefix")
    return value


def _prompts_file(value: str, info: ValidationInfo) -> str:
    folder = _spec_folder(info)
    if folder is None:
        return value
    path = _absolute(value, folder)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file (one prompt a line; paths are relative to the spec file)")
    return path


def _name_or_folder(value: str, info: ValidationInfo) -> str:
    """A path is taken as one when it looks so or something is there; any other text is a name, as a hub id."""
    folder = _spec_folder(info)
    if folder is None or "://" in value or value in _NAMED_BASES_AND_JUDGES:
        return value
    path = _absolute(value, folder)
    return path if value.startswith((".", "/", "~")) or os.path.exists(path) else value


def _reference(value: str) -> str:
    if not _REFERENCE.fullmatch(value):
        raise ValueError(f"{value!r} names no published adapter; write its id, id@alias or id@r-0123456789ab")
    return value


def _storage_place(value: str, info: ValidationInfo) -> str:
    folder = _spec_folder(info)
    if folder is None or value.startswith("file://"):
        return value
    if "://" in value:
        return _s3_address(value, "storage is a folder, file:///folder or s3://bucket/prefix")
    return _absolute(value, folder)


Count = Annotated[int, BeforeValidator(_number), Field(ge=1, le=LARGEST_COUNT)]
Whole = Annotated[int, BeforeValidator(_number), Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[int, BeforeValidator(_number), Field(ge=0, le=LARGEST_SEED)]
Pixels = Annotated[int, BeforeValidator(_number), Field(ge=8, le=8192, multiple_of=8)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
AdapterId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
PublishedAdapter = Annotated[Text, AfterValidator(_reference)]
Method = Annotated[MethodName, BeforeValidator(_method)]
Workers = Annotated[Count | tuple[Count, Count], BeforeValidator(_workers)]
PackSize = Annotated[Literal["auto"] | Count, BeforeValidator(_pack_size)]
Conditions = Annotated[dict[str, str], BeforeValidator(_conditions)]
BlockFactors = Annotated[dict[BlockGroup, float], BeforeValidator(_block_factors)]
Prompts = Annotated[Literal["default"] | tuple[str, ...], BeforeValidator(_prompts)]
# Not a length limit: pydantic counts the valid entries only and would report one bad entry twice.
OneOrMore = Annotated[tuple[_Item, ...], AfterValidator(_some), Field(json_schema_extra={"minItems": 1})]
ImagesFolder = Annotated[Text, AfterValidator(_images_folder)]
PromptsFile = Annotated[Text, AfterValidator(_prompts_file)]
NameOrFolder = Annotated[Text, AfterValidator(_name_or_folder)]
StoragePlace = Annotated[Text, AfterValidator(_storage_place)]
