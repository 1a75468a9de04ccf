"""A job spec as an object of Kubernetes: a RayJob with a cluster of its own, which holds the spec.

A spec that is too large for that lies in the storage, and the job has its address. The RayJob relies on what
`kubectl apply -k k8s/overlays/...` has put into the namespace: the service accounts, priority classes and network
policies of k8s/base, and the Secrets it names.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from cat_cluster.cluster.kuberay.checks.rules import MAX_NAME_LENGTH, check_namespace
from cat_cluster.cluster.kuberay.checks.yaml_text import dump
from cat_cluster.cluster.kuberay.rendering.pods import (
    IMAGE,
    RUN_LABEL,
    SPEC_FILE,
    STORAGE_ANNOTATION,
    autoscaler_options,
    head_template,
    part_of_project,
    submitter_template,
    worker_template,
)
from cat_cluster.cluster.kuberay.rendering.sizes import FROM_SPEC, JobSizes, Overrides, job_sizes
from cat_cluster.cluster.stored_spec import spec_address, store_spec
from cat_cluster.errors import SpecError
from cat_cluster.registry.manifest import package_version
from cat_cluster.runs.entering import image_digests_of, with_stored_images
from cat_cluster.runs.run import Expectation, run_id_of
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore

RAY_VERSION = "2.60.0"
NAMESPACE = "cat-cluster"
TOKEN_SECRET = "cat-training-ray-token"
RETRIES = 2  # each is a new cluster, and goes on from the store
START_SECONDS = 3600  # machines may have to be bought first
RECORD_SECONDS = 600  # until a driver that starts, at the last moment, has its record in the storage
INSPECTION_SECONDS = 600  # that the cluster of a failed job is kept for inspection
QUEUED_SECONDS = 30  # the same in a queue: Kueue has given the room away, and the metrics are fetched once more
KEEP_SECONDS = 7 * 24 * 3600  # that a job's record is kept in Kubernetes; the run's own is in the storage
LARGEST_INT32 = 2**31 - 1  # of Kubernetes' counts and seconds
MAX_SPEC = 240 << 10  # bytes as JSON: `kubectl apply` keeps an object in an annotation, and these end at 256 KiB
_DIGEST = 8
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_PART = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
_IMAGE_NAME = (  # registry, path, tag, digest
    rf"([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]+)?/)?{_PART}(/{_PART})*"
    r"(:\w[\w.-]{0,127})?(@(sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}))?"
)
_LABELS = part_of_project("training")


@dataclass(frozen=True)
class RenderOptions:
    """What a spec does not say.

    packs: that train side by side; suspend: made, but started later; queue, priority: Kueue's, a LocalQueue and a
    WorkloadPriorityClass; sizes: in place of those that the spec needs.
    """

    name: str | None = None
    namespace: str = NAMESPACE
    image: str | None = None
    gpu: bool = False
    packs: int = 1
    hours: int = 24
    suspend: bool = False
    queue: str | None = None
    priority: str | None = None
    sizes: Overrides = FROM_SPEC


def upload_job(job: JobSpec, store: ObjectStore) -> tuple[JobSpec, str]:
    """Store the local photos of a job as `submit` does; return the job with their addresses, and its run.

    Raises ConceptError for photos that training would refuse, StoreError.
    """
    refuse_local_paths(job, store.url, uploads=True)
    store.check_access()
    return with_stored_images(job, store), run_id_of(job, image_digests_of(job))


def expectation_of(ray_job: dict[str, Any], options: RenderOptions, *, after: int = 0) -> Expectation:
    """Return what those who follow the run of a rendered RayJob wait for. after: the run's last attempt so far.

    Each try of KubeRay's has START_SECONDS to start, but no more than the job has, and a driver some minutes to say so;
    who suspends the job or queues it may let it start at any time.
    """
    name = ray_job["metadata"]["name"]
    waits = options.suspend or options.queue is not None
    look = f"describe rayjob {name}" if options.queue is None else "describe workloads"
    return Expectation(
        job=f"RayJob {name} in namespace {options.namespace}",
        look=f"`kubectl -n {options.namespace} {look}`",
        after=after,
        seconds=None if waits else min((RETRIES + 1) * START_SECONDS, options.hours * 3600) + RECORD_SECONDS,
    )


def render_job(
    job: JobSpec,
    storage: str,
    options: RenderOptions,
    *,
    run_id: str | None = None,
    upload_to: ObjectStore | None = None,
) -> dict[str, Any]:
    """Return the RayJob of a spec.

    run_id: of `upload_job`, which made the job; upload_to: the storage, where a large spec is put. Unless a name is
    given, it ends with a digest of the spec and of what the pods are made of: KubeRay disregards such changes of a job
    that is there, so they make another one. Raises SpecError for what a cluster in Kubernetes cannot see, and what
    Kubernetes or KubeRay refuses; BaseModelError for a base that is none; StoreError.
    """
    refuse_local_paths(job, storage)
    if options.queue is not None and not isinstance(job.cluster.workers, int):
        raise SpecError("cluster.workers: Kueue admits a fixed number; give one, or leave --queue out")
    check_options(options)
    text, sizes = spec_text(job, storage), sizes_of(job, options)
    image = options.image or default_image(gpu=options.gpu)
    name = _name(job.name, text, image, options) if options.name is None else options.name
    check_name(name)
    address = spec_address(text, storage) if is_large(text) else None
    if address is not None and upload_to is None:
        raise SpecError(
            f"the spec has {len(text.encode()) >> 10} KiB, more than an object of Kubernetes holds: give --upload, "
            f"which puts it into the storage as {address}"
        )
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": options.namespace,
            "labels": {**_LABELS, **_queue_labels(options), **({} if run_id is None else {RUN_LABEL: run_id})},
            **({} if run_id is None else {"annotations": {STORAGE_ANNOTATION: storage}}),
        },
        "spec": {
            "entrypoint": _entrypoint(address or SPEC_FILE, run_id),
            **_job_spec(job, image, options, sizes, None if address else text),
        },
    }
    if address is not None and upload_to is not None:
        store_spec(text, upload_to)
    return ray_job


def sizes_of(job: JobSpec, options: RenderOptions) -> JobSizes:
    """Return what the pods of a job ask for, and what of it is doubtful; raises as `job_sizes`."""
    return job_sizes(job, options.sizes, gpu=options.gpu, packs=options.packs)


def manifest_text(document: dict[str, Any]) -> str:
    """Return an object as YAML that Kubernetes and other readers take alike, texts of several lines as they are."""
    return dump(document)


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
                what = "file" if Path(place).is_file() else "folder"
                other = "an s3:// address or a hub id" if field == "base" else "a hub id"
                raise SpecError(
                    f"{field}: {place} is a {what} of this machine, and a cluster in Kubernetes cannot see it; name "
                    f"{other} (adapter {adapter.id})"
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


def spec_text(job: JobSpec, storage: str) -> str:
    """Return a spec as its job reads it, with the storage in it."""
    return dump(job.model_copy(update={"storage": storage}).model_dump(mode="json", exclude_unset=True))


def is_large(text: str) -> bool:
    """Whether a spec leaves too little room in the annotation, where Go's JSON has six characters for <, > and &."""
    return len(json.dumps(text, ensure_ascii=False).encode()) + 5 * sum(map(text.count, "<>&")) > MAX_SPEC


def check_options(options: RenderOptions) -> None:
    """Raise SpecError for what Kubernetes would refuse when the objects are applied, or never find."""
    check_namespace(options.namespace)
    for option, name in (("--queue", options.queue), ("--priority", options.priority)):
        if name is not None and not (len(name) <= 63 and re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", name)):
            raise SpecError(
                f"{option} {name!r}: must hold a-z, 0-9, - and ., begin and end with a letter or digit, 63 at most"
            )
    if options.priority is not None and options.queue is None:
        raise SpecError(
            f"--priority {options.priority}: is the place in a queue of Kueue; give --queue, or leave it out"
        )
    if options.suspend and options.queue is not None:
        raise SpecError(
            "--suspend: Kueue starts a job in its queue all the same; leave it out, and hold the job by its Workload: "
            f'`kubectl -n {options.namespace} patch workload NAME --type merge -p \'{{"spec":{{"active":false}}}}\'`'
        )
    if options.image is not None and not (len(options.image) <= 255 and re.fullmatch(_IMAGE_NAME, options.image)):
        raise SpecError(f"--image {options.image!r}: is not the name of an image, such as registry.example/cat:1.0")
    if not 1 <= options.hours <= LARGEST_INT32 // 3600:
        raise SpecError(f"--hours {options.hours}: must be from 1 to {LARGEST_INT32 // 3600}")


def check_name(name: str) -> None:
    """Raise SpecError for what is no name of a RayJob."""
    longest = MAX_NAME_LENGTH["RayJob"]
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise SpecError(
            f"--name {name}: must begin with a letter and hold a-z, 0-9 and -, {longest} characters at most"
        )


def default_image(*, gpu: bool = False) -> str:
    """Return the image of this version of the package, as the overlays name it."""
    return f"{IMAGE}:{package_version()}{'-gpu' if gpu else ''}"


def _name(title: str, text: str, image: str, options: RenderOptions) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    slug = slug if re.match(r"[a-z]", slug) else f"job-{slug}".rstrip("-")
    made_of = json.dumps([text, image, options.gpu, options.packs, astuple(options.sizes)])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:_DIGEST]
    return f"{slug[: MAX_NAME_LENGTH['RayJob'] - _DIGEST - 1].rstrip('-')}-{digest}"


def _queue_labels(options: RenderOptions) -> dict[str, str]:
    labels = {"queue-name": options.queue, "priority-class": options.priority}
    return {f"kueue.x-k8s.io/{name}": value for name, value in labels.items() if value is not None}


def _entrypoint(spec: str, run_id: str | None) -> str:
    expected = "" if run_id is None else f" --expected {run_id}"
    return f"python -m jobs.train {shlex.quote(spec)} --retries {RETRIES}{expected}"


def _job_spec(job: JobSpec, image: str, options: RenderOptions, sizes: JobSizes, spec: str | None) -> dict[str, Any]:
    return {
        "submissionMode": "K8sJobMode",
        **({"suspend": True} if options.suspend else {}),
        "backoffLimit": RETRIES,
        "preRunningDeadlineSeconds": START_SECONDS,
        "activeDeadlineSeconds": options.hours * 3600,
        **_ending(options),
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": submitter_template(image),
        "rayClusterSpec": _cluster_spec(job, image, options, sizes, spec),
    }


def _ending(options: RenderOptions) -> dict[str, Any]:
    """Who waits for a start, and Kueue, need the simple form, which KubeRay does not let go with rules."""
    if options.suspend or options.queue is not None:
        seconds = INSPECTION_SECONDS if options.queue is None else QUEUED_SECONDS
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": seconds}
    # The last case is a deadline that passed: the job's own status says nothing then, and machines would stay.
    cases = (("jobStatus", "SUCCEEDED", 60), ("jobStatus", "FAILED", INSPECTION_SECONDS))
    rules = [
        {"policy": policy, "condition": {field: value, "ttlSeconds": seconds}}
        for field, value, soon in (*cases, ("jobDeploymentStatus", "Failed", INSPECTION_SECONDS))
        for policy, seconds in (("DeleteCluster", soon), ("DeleteSelf", KEEP_SECONDS))
    ]
    return {"deletionStrategy": {"deletionRules": rules}}


def _cluster_spec(
    job: JobSpec, image: str, options: RenderOptions, sizes: JobSizes, spec: str | None
) -> dict[str, Any]:
    """A job looks at what its cluster has when it starts, so the least it needs is there from the beginning."""
    workers = job.cluster.workers
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if most * options.packs > LARGEST_INT32:
        raise SpecError(
            f"cluster.workers: {most} workers for each of {options.packs} packs are more than {LARGEST_INT32} pods; "
            "give fewer, or a smaller --packs"
        )
    replicas = (least * options.packs, most * options.packs)
    return cluster_spec(image, sizes, replicas, gpu=options.gpu, spec=spec)


def cluster_spec(
    image: str, sizes: JobSizes, replicas: tuple[int, int], *, gpu: bool, spec: str | None = None
) -> dict[str, Any]:
    """Return the spec of a cluster that trains. replicas: least and most workers; spec: of a job that it holds."""
    least, most = replicas
    scales = most > least
    group = {
        "groupName": "gpu" if gpu else "cpu",
        # Those of a group that scales are the autoscaler's, and applying the job again must not set them back.
        **({} if scales else {"replicas": least}),
        "minReplicas": least,
        "maxReplicas": most,
        "scaleStrategy": {},  # as the operator writes it
        "rayStartParams": {},
        "template": worker_template(image, sizes.worker_cpu, sizes.worker_memory, gpu=gpu),
    }
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
        **({"enableInTreeAutoscaling": True, "autoscalerOptions": autoscaler_options()} if scales else {}),
        "headGroupSpec": {
            # The driver alone runs on the head: a pack that fills it would take the cluster down with it.
            "rayStartParams": {"num-cpus": "0"},
            "template": head_template(image, sizes.head_memory, spec=spec, scales=scales),
        },
        "workerGroupSpecs": [group],
    }
