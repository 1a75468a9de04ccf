"""What the commands for Kubernetes share: their options, and how they write manifests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cat_cluster.cli.options import people

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


def write_manifest(document: dict[str, Any], out: Path | None, warnings: Sequence[str]) -> None:
    """Write an object of Kubernetes to a file, or to stdout, and warnings to people."""
    from cat_cluster.cluster.kuberay.rendering.render import manifest_text
    from cat_cluster.files import write_whole

    for warning in warnings:
        people.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    text = manifest_text(document)
    if out is None:
        sys.stdout.write(text)
    else:
        write_whole(out, text.encode())
        people.print(f"wrote {out}; start it  kubectl apply -f {out}", soft_wrap=True, markup=False)
