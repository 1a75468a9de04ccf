"""What the two commands for a training service share: their options, and how these are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cat_cluster.errors import SpecError

if TYPE_CHECKING:
    from cat_cluster.spec.sections import ClusterSpec

NAME, GROUPS, WORKERS, CHECKPOINT_EVERY = "default", "1:1", 1, 50

ServiceName = Annotated[
    str, typer.Option(help="Of the service: one that starts again takes its runs over at once. One process each.")
]
Groups = Annotated[
    str, typer.Option(metavar="LEAST:MOST", help="Groups of workers: kept when nothing waits, and at most.")
]
Workers = Annotated[int, typer.Option(min=1, help="Workers of a group.")]
ZeroStage = Annotated[
    int | None, typer.Option(min=0, max=3, help="DeepSpeed ZeRO stage; none is plain data-parallel torch.")
]
MaxPack = Annotated[int | None, typer.Option(min=1, help="Most adapters of a group; none measures what memory allows.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="The most steps that an interruption may cost.")]
OwnerLimit = Annotated[
    list[str] | None, typer.Option(metavar="OWNER=N", help="Most adapters of an owner that train at once.")
]
Base = Annotated[list[str] | None, typer.Option(help="Base model to load before anybody asks for it.")]


def cluster_of(workers: int, zero_stage: int | None, max_pack: int | None, checkpoint_every: int) -> ClusterSpec:
    """Return how a service's groups train."""
    from cat_cluster.spec.sections import ClusterSpec

    fields = {
        "workers": workers,
        "zero_stage": zero_stage,
        "max_pack": max_pack or "auto",
        "checkpoint_every": checkpoint_every,
    }
    return ClusterSpec.model_validate(fields)


def read_groups(text: str) -> tuple[int, int]:
    """Return least and most groups as `--groups` gives them; SpecError."""
    least, colon, most = text.partition(":")
    if not (least.isdecimal() and (most if colon else least).isdecimal()):
        raise SpecError(f"--groups {text}: write it as LEAST:MOST, such as 1:4, or one number")
    found = int(least), int(most) if colon else max(1, int(least))
    if not 0 <= found[0] <= found[1] or found[1] < 1:
        raise SpecError(f"--groups {text}: the most must be at least 1, and no less than the least")
    return found


def read_limits(pairs: Sequence[str]) -> dict[str, int]:
    """Return the limits of owners as `--owner-limit` gives them; SpecError."""
    limits = {}
    for pair in pairs:
        owner, equals, number = pair.rpartition("=")
        if not (equals and owner and number.isdecimal() and int(number)):
            raise SpecError(f"--owner-limit {pair}: write it as OWNER=N, such as alice=4")
        limits[owner] = int(number)
    return limits
