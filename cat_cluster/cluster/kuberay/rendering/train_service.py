"""A training service as an object of Kubernetes: a RayJob without an end, whose cluster grows with the queue.

Its entry point starts the service again when it ends by itself, on the cluster that is there; KubeRay makes a new
cluster when the head is lost. A RayService would not do: it serves an application of Ray Serve.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cat_cluster.cluster.kuberay.rendering.pods import part_of_project, submitter_template
from cat_cluster.cluster.kuberay.rendering.render import (
    INSPECTION_SECONDS,
    NAMESPACE,
    START_SECONDS,
    RenderOptions,
    check_name,
    check_options,
    cluster_spec,
    default_image,
    refuse_local_paths,
)
from cat_cluster.cluster.kuberay.rendering.sizes import AUTO_PACK, FROM_SPEC, JobSizes, Overrides, job_sizes
from cat_cluster.errors import SpecError
from cat_cluster.spec.job import JobSpec
from cat_cluster.spec.sections import ClusterSpec

NAME = "cat-train-service"
TRIES = 1000  # each is a new cluster, or a new pod that follows the job: the service is not to end for want of them


@dataclass(frozen=True)
class TrainServiceOptions:
    """What a training service in Kubernetes is.

    service: its own options, as `cat-cluster train-service` takes them; groups: least and most of them; cluster: of a
    group; bases: that its groups load, and that its pods have room for; evaluations: that are measured at once, beside
    the groups; sizes: in place of those that the bases need.
    """

    storage: str
    service: Sequence[str]
    groups: tuple[int, int]
    cluster: ClusterSpec
    bases: Sequence[str]
    name: str = NAME
    namespace: str = NAMESPACE
    image: str | None = None
    gpu: bool = False
    evaluations: int = 1
    sizes: Overrides = FROM_SPEC


def render_train_service(options: TrainServiceOptions) -> dict[str, Any]:
    """Return the RayJob of a training service.

    Raises SpecError for what a cluster in Kubernetes cannot see, and what Kubernetes or KubeRay refuses; BaseModelError
    for a base that is none.
    """
    check_name(options.name)
    check_options(RenderOptions(namespace=options.namespace, image=options.image))
    image, sizes = options.image or default_image(gpu=options.gpu), sizes_of_service(options)
    (least, most), workers = options.groups, options.cluster.workers
    assert isinstance(workers, int)  # the command takes a number
    # A service looks at what its cluster has when it starts, so one group is there from the beginning.
    replicas = tuple(groups * workers + options.evaluations for groups in (max(1, least), most))
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "labels": part_of_project("training"),
        },
        "spec": {
            "entrypoint": f"python -m jobs.train_service {shlex.join(options.service)}",
            "submissionMode": "K8sJobMode",
            "backoffLimit": TRIES,
            "preRunningDeadlineSeconds": START_SECONDS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": INSPECTION_SECONDS,
            "submitterConfig": {"backoffLimit": TRIES},
            "submitterPodTemplate": submitter_template(image),
            "rayClusterSpec": cluster_spec(image, sizes, (replicas[0], replicas[1]), gpu=options.gpu),
        },
    }


def sizes_of_service(options: TrainServiceOptions) -> JobSizes:
    """Return what the pods ask for: room for a full group of adapters at the defaults, of each base."""
    if not options.bases:
        raise SpecError("--base: its pods are sized by the bases that it trains on; name at least one")
    most = AUTO_PACK if options.cluster.max_pack == "auto" else options.cluster.max_pack
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/photos"}
    adapters = [
        {"id": f"adapter-{place}-{number}", "base": base, "concepts": [concept]}
        for place, base in enumerate(options.bases)
        for number in range(most)
    ]
    fields = {"name": options.name, "adapters": adapters, "cluster": options.cluster.model_dump()}
    job = JobSpec.model_validate(fields)
    refuse_local_paths(job, options.storage)
    return job_sizes(job, options.sizes, gpu=options.gpu, packs=options.groups[1])
