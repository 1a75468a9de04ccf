"""The command `train-service`: trains what `submit --queue` asks for, as long as it runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from cat_cluster.cli.options import Storage, people
from cat_cluster.errors import SpecError, needs_extra
from cat_cluster.settings import load_settings

if TYPE_CHECKING:
    from cat_cluster.spec.sections import ClusterSpec


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


def train_service(
    storage: Storage = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster this machine is in. Default: $RAY_ADDRESS, else Ray starts here.")
    ] = None,
    name: ServiceName = "default",
    groups: Groups = "1:1",
    workers: Workers = 1,
    zero_stage: ZeroStage = None,
    max_pack: MaxPack = None,
    checkpoint_every: CheckpointEvery = 50,
    owner_limit: OwnerLimit = None,
    base: Base = None,
) -> None:
    """Train runs as they come in: `cat-cluster submit SPEC --queue` enters one, and its adapters join those that train.

    Example: cat-cluster train-service --storage s3://bucket/cat --base pocket
    """
    from cat_cluster.store import open_store

    least_and_most, limits = read_groups(groups), read_limits(owner_limit or ())
    settings = load_settings()
    store = open_store(storage or settings.storage)
    with needs_extra("cluster", "the training service"):
        from cat_cluster.cluster.service_process import run_train_service
        from cat_cluster.cluster.train_service import ServiceOptions
    cluster = cluster_of(workers, zero_stage, max_pack, checkpoint_every)
    options = ServiceOptions(name, least_and_most, cluster, limits, tuple(base or ()))
    try:
        run_train_service(store.url, settings, options, _say, address=address)
    except KeyboardInterrupt:
        _say("stopped; what is not done waits in the queue and goes on from its last checkpoints")


def _say(text: str) -> None:
    people.print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}", markup=False, highlight=False, soft_wrap=True)


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
