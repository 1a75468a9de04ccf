"""The command `k8s train-service`: a training service as a RayJob of Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cat_cluster.cli.k8s_options import (
    NAMESPACE,
    Gpu,
    HeadMemory,
    Image,
    Namespace,
    WorkerCpu,
    WorkerMemory,
    write_manifest,
)
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
from cat_cluster.cli.values import output_file
from cat_cluster.settings import load_settings

Evaluations = Annotated[
    int, typer.Option(min=1, max=1000, help="Adapters measured at once: as many workers beside those of groups.")
]


def train_service(
    storage: Annotated[str | None, typer.Option(help="s3:// address. Default: $CAT_STORAGE.")] = None,
    name: ServiceName = NAME,
    groups: Groups = GROUPS,
    workers: Workers = WORKERS,
    zero_stage: ZeroStage = None,
    max_pack: MaxPack = None,
    checkpoint_every: CheckpointEvery = CHECKPOINT_EVERY,
    owner_limit: OwnerLimit = None,
    base: Base = None,
    evaluations: Evaluations = 1,
    image: Image = None,
    namespace: Namespace = NAMESPACE,
    gpu: Gpu = False,
    worker_cpu: WorkerCpu = None,
    worker_memory: WorkerMemory = None,
    head_memory: HeadMemory = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="<path>", parser=output_file, help="File; default: stdout.")
    ] = None,
) -> None:
    """Write a training service as a RayJob of Kubernetes, for `kubectl apply -f`; its cluster grows with the queue.

    Example: cat-cluster k8s train-service --storage s3://bucket/cat --base pocket --groups 1:4 --out service.yaml
    """
    from cat_cluster.cluster.kuberay.rendering.sizes import Overrides
    from cat_cluster.cluster.kuberay.rendering.train_service import (
        TrainServiceOptions,
        render_train_service,
        sizes_of_service,
    )

    limits, bases = read_limits(owner_limit or ()), tuple(base or ())
    given = {
        "--name": [name],
        "--groups": [groups],
        "--workers": [str(workers)],
        "--zero-stage": [] if zero_stage is None else [str(zero_stage)],
        "--max-pack": [] if max_pack is None else [str(max_pack)],
        "--checkpoint-every": [str(checkpoint_every)],
        "--owner-limit": [f"{owner}={number}" for owner, number in limits.items()],
        "--base": bases,
    }
    url = storage or load_settings().storage
    words = ["--storage", url, *(word for option, values in given.items() for one in values for word in (option, one))]
    options = TrainServiceOptions(
        storage=url,
        service=words,
        groups=read_groups(groups),
        cluster=cluster_of(workers, zero_stage, max_pack, checkpoint_every),
        bases=bases,
        name="cat-train-service" if name == NAME else name,
        namespace=namespace,
        image=image,
        gpu=gpu,
        evaluations=evaluations,
        sizes=Overrides(worker_cpu, worker_memory, head_memory),
    )
    write_manifest(render_train_service(options), out, sizes_of_service(options).warnings)
