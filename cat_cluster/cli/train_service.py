"""The command `train-service`: trains what `submit --queue` asks for, as long as it runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from cat_cluster.cli.options import Storage, people
from cat_cluster.cli.train_service_options import (
    CHECKPOINT_EVERY,
    GROUPS,
    NAME,
    WORKERS,
    Base,
    CheckpointEvery,
    Groups,
    MaxPack,
    OwnerLimit,
    ServiceName,
    Workers,
    ZeroStage,
    cluster_of,
    read_groups,
    read_limits,
)
from cat_cluster.errors import needs_extra
from cat_cluster.settings import load_settings


def train_service(
    storage: Storage = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster this machine is in. Default: $RAY_ADDRESS, else Ray starts here.")
    ] = None,
    name: ServiceName = NAME,
    groups: Groups = GROUPS,
    workers: Workers = WORKERS,
    zero_stage: ZeroStage = None,
    max_pack: MaxPack = None,
    checkpoint_every: CheckpointEvery = CHECKPOINT_EVERY,
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
