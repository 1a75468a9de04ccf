"""A job spec as Kubernetes objects: a RayJob with a cluster of its own, and a ConfigMap that holds the spec.

The objects rely on what `kubectl apply -k k8s/overlays/...` has put into the namespace: the service accounts, priority
classes and network policies of k8s/base, and the Secrets it names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from cat_cluster.cluster.kuberay.pods import (
    IMAGE,
    SPEC_FOLDER,
    autoscaler_options,
    head_template,
    submitter_template,
    worker_template,
)
from cat_cluster.cluster.kuberay.rules import MAX_NAME_LENGTH
from cat_cluster.cluster.runs import run_id_of
from cat_cluster.cluster.submit import image_digests_of, with_stored_images
from cat_cluster.errors import SpecError
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore

RAY_VERSION = "2.60.0"
NAMESPACE = "cat-cluster"
TOKEN_SECRET = "cat-training-ray-token"
RETRIES = 2  # each is a new cluster, and goes on from the store
START_SECONDS = 3600  # machines may have to be bought first
INSPECTION_SECONDS = 600  # that the cluster of a failed job is kept for inspection
KEEP_SECONDS = 7 * 24 * 3600  # that a job's record is kept in Kubernetes; the run's own is in the storage
_DIGEST = 8
_IMAGE_NAME = (
    r"[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?(/[a-z0-9][a-z0-9._-]*)*(:[\w][\w.-]{0,127})?(@[a-z0-9]+:[a-f0-9]+)?"
)
_LABELS = {"app.kubernetes.io/part-of": "cat-cluster", "app.kubernetes.io/component": "training"}


@dataclass(frozen=True)
class RenderOptions:
    """What a spec does not say. packs: that train side by side; suspend: made, but started later; queue: Kueue's."""

    name: str | None = None
    namespace: str = NAMESPACE
    image: str | None = None
    gpu: bool = False
    packs: int = 1
    hours: int = 24
    suspend: bool = False
    queue: str | None = None


def upload_job(job: JobSpec, store: ObjectStore) -> tuple[JobSpec, str]:
    """Store the local photos of a job as `submit` does; return the job that names them there, and its run.

    Raises ConceptError for photos that training would refuse, StoreError.
    """
    refuse_local_paths(job, store.url, uploads=True)
    store.check_access()
    return with_stored_images(job, store), run_id_of(job, image_digests_of(job))


def render_job(job: JobSpec, storage: str, options: RenderOptions) -> list[dict[str, Any]]:
    """Return the ConfigMap and the RayJob of a spec, to be applied in this order.

    Unless it is given, the name ends with a digest of the spec: a changed spec is another job, as KubeRay disregards
    changes of one that is there. Raises SpecError for what a cluster in Kubernetes cannot see or KubeRay refuses.
    """
    refuse_local_paths(job, storage)
    if options.queue is not None and not isinstance(job.cluster.workers, int):
        raise SpecError("cluster.workers: Kueue admits a fixed number; give one, or leave --queue out")
    content = job.model_copy(update={"storage": storage}).model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    name = _name(job.name, text) if options.name is None else options.name
    longest = MAX_NAME_LENGTH["RayJob"]
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise SpecError(
            f"--name {name}: must begin with a letter and hold a-z, 0-9 and -, {longest} characters at most"
        )
    _check_options(options)
    about = {"name": name, "namespace": options.namespace, "labels": dict(_LABELS)}
    spec_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": about,
        "immutable": True,
        "data": {"spec.yaml": text},
    }
    queue = {} if options.queue is None else {"kueue.x-k8s.io/queue-name": options.queue}
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {**about, "labels": {**_LABELS, **queue}},
        "spec": _job_spec(job, name, options),
    }
    return [spec_map, ray_job]


def manifest_text(documents: Sequence[dict[str, Any]]) -> str:
    """Return documents as YAML, texts of several lines as they are."""
    return "".join("---\n" + yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=120) for one in documents)


def refuse_local_paths(job: JobSpec, storage: str, *, uploads: bool = False) -> None:
    """Raise SpecError for paths of this machine. uploads: photos may be here, as they are stored first."""
    if not storage.startswith("s3://"):
        raise SpecError(
            f"storage: {storage} is a folder of this machine, and a cluster in Kubernetes cannot see it; use a bucket "
            "that both reach, as in storage: s3://bucket/prefix or --storage s3://bucket/prefix"
        )
    for adapter in job.resolved():
        here = {"base": adapter.base, "evaluation.judge": adapter.evaluation.judge}
        for field, place in here.items():
            if place.startswith("/"):
                raise SpecError(
                    f"{field}: {place} is a folder of this machine, and a cluster in Kubernetes cannot see it; name a "
                    f"hub id (adapter {adapter.id})"
                )
        if adapter.training.general_prompts is not None:
            raise SpecError(
                f"training.general_prompts: {adapter.training.general_prompts} is a file of this machine, and a "
                f"cluster in Kubernetes cannot see it; leave the field out (adapter {adapter.id})"
            )
        for concept in adapter.concepts:
            if not uploads and "://" not in concept.images:
                raise SpecError(
                    f"images: {concept.images} is a folder of this machine, and a cluster in Kubernetes cannot see it; "
                    f"give --upload, which puts it into the storage, or an s3:// address (adapter {adapter.id})"
                )


def _check_options(options: RenderOptions) -> None:
    """Refuse names that Kubernetes would refuse when the objects are applied, or never find."""
    label = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
    for option, value in (("--namespace", options.namespace), ("--queue", options.queue)):
        if value is not None and not re.fullmatch(label, value):
            raise SpecError(
                f"{option} {value!r}: must hold a-z, 0-9 and -, begin and end with a letter or digit, 63 at most"
            )
    if options.image is not None and not re.fullmatch(_IMAGE_NAME, options.image):
        raise SpecError(f"--image {options.image!r}: is not the name of an image, such as registry.example/cat:1.0")


def _name(title: str, text: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    slug = slug if re.match(r"[a-z]", slug) else f"job-{slug}".rstrip("-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
    return f"{slug[: MAX_NAME_LENGTH['RayJob'] - _DIGEST - 1].rstrip('-')}-{digest}"


def _job_spec(job: JobSpec, name: str, options: RenderOptions) -> dict[str, Any]:
    image = options.image or f"{IMAGE}:{metadata.version('cat-cluster')}{'-gpu' if options.gpu else ''}"
    return {
        "entrypoint": f"python -m jobs.train {SPEC_FOLDER}/spec.yaml",
        "submissionMode": "K8sJobMode",
        **({"suspend": True} if options.suspend else {}),
        "backoffLimit": RETRIES,
        "preRunningDeadlineSeconds": START_SECONDS,
        "activeDeadlineSeconds": options.hours * 3600,
        **_ending(options),
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": submitter_template(image),
        "rayClusterSpec": _cluster_spec(job, name, image, options),
    }


def _ending(options: RenderOptions) -> dict[str, Any]:
    """Who waits for a start, and Kueue, need the simple form, which KubeRay does not let go with rules."""
    if options.suspend or options.queue is not None:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": INSPECTION_SECONDS}
    # The last case is a deadline that passed: the job's own status says nothing then, and machines would stay.
    cases = (("jobStatus", "SUCCEEDED", 60), ("jobStatus", "FAILED", INSPECTION_SECONDS))
    rules = [
        {"policy": policy, "condition": {field: value, "ttlSeconds": seconds}}
        for field, value, soon in (*cases, ("jobDeploymentStatus", "Failed", INSPECTION_SECONDS))
        for policy, seconds in (("DeleteCluster", soon), ("DeleteSelf", KEEP_SECONDS))
    ]
    return {"deletionStrategy": {"deletionRules": rules}}


def _cluster_spec(job: JobSpec, name: str, image: str, options: RenderOptions) -> dict[str, Any]:
    """A job looks at what its cluster has when it starts, so the least it needs is there from the beginning."""
    workers = job.cluster.workers
    least, most = (workers, workers) if isinstance(workers, int) else workers
    scales = most > least
    group = {
        "groupName": "gpu" if options.gpu else "cpu",
        "replicas": least * options.packs,
        "minReplicas": least * options.packs,
        "maxReplicas": most * options.packs,
        "rayStartParams": {},
        "template": worker_template(image, gpu=options.gpu),
    }
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
        **({"enableInTreeAutoscaling": True, "autoscalerOptions": autoscaler_options()} if scales else {}),
        "headGroupSpec": {
            # The driver alone runs on the head: a pack that fills it would take the cluster down with it.
            "rayStartParams": {"num-cpus": "0"},
            "template": head_template(image, spec_map=name, scales=scales),
        },
        "workerGroupSpecs": [group],
    }


class _Dumper(yaml.SafeDumper):
    """YAML for people: a text of several lines as a block, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
