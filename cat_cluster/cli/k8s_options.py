"""Options that the commands for Kubernetes share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAMESPACE = "cat-cluster"  # as k8s/base makes it

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (YAML); see `cat-cluster spec schema`.")]
Image = Annotated[
    str | None, typer.Option(metavar="URI", help="Image of every pod. Default: cat-cluster at this version.")
]
Namespace = Annotated[str, typer.Option(help="Namespace, as k8s/base makes it.")]
Context = Annotated[str | None, typer.Option(metavar="NAME", help="Context of kubeconfig. Default: the current one.")]
Name = Annotated[str | None, typer.Option(help="Name of the job. Default: the spec's, with a digest of its content.")]
Gpu = Annotated[bool, typer.Option("--gpu", help="A GPU for each worker.")]
Packs = Annotated[int, typer.Option(min=1, max=1000, help="Packs side by side: each gets the spec's workers.")]
Hours = Annotated[int, typer.Option(min=1, max=8784, help="Hours after which the job is ended.")]
Suspend = Annotated[bool, typer.Option("--suspend", help="Make the job, and start it later.")]
Queue = Annotated[str | None, typer.Option(help="Queue of Kueue that starts the job.")]
Priority = Annotated[str | None, typer.Option(metavar="NAME", help="WorkloadPriorityClass of the job in its queue.")]
WorkerCpu = Annotated[str | None, typer.Option(metavar="CPUS", help="CPUs of a worker. Default: 1, with a GPU 4.")]
WorkerMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory of a worker, such as 6Gi. Default: what the spec needs.")
]
HeadMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory of the head. Default: what the spec needs.")
]
Job = Annotated[str, typer.Argument(metavar="RUN|JOB", help="Run, as `submit` prints it, or the name of its RayJob.")]
