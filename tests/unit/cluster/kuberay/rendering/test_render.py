"""A job spec as Kubernetes objects: what is written, what is refused, and the commands around it."""

from __future__ import annotations

import json
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from cat_cluster.cli.k8s import k8s_app
from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.cluster.kuberay.checks.security import pods_of
from cat_cluster.cluster.kuberay.checks.yaml_text import dump
from cat_cluster.cluster.kuberay.rendering import render
from cat_cluster.cluster.kuberay.rendering.pods import SPEC_FILE
from cat_cluster.cluster.kuberay.rendering.render import (
    RenderOptions,
    expectation_of,
    manifest_text,
    render_job,
    upload_job,
)
from cat_cluster.cluster.kuberay.rendering.sizes import Overrides
from cat_cluster.cluster.stored_spec import load_job
from cat_cluster.errors import ConceptError, SpecError
from cat_cluster.runs.run import Run
from cat_cluster.spec.job import JobSpec, load_spec
from cat_cluster.store import LocalStore

BUCKET = "s3://bucket/prod"
RUN_ID = "run-0123456789ab"


class Bucket(LocalStore):
    """A folder that calls itself a bucket."""

    @property
    def url(self) -> str:
        """The address of the bucket."""
        return BUCKET


def job(**fields: Any) -> JobSpec:
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/concepts/cup"}
    return JobSpec.model_validate({"name": "tea", "adapters": [{"id": "cup", "concepts": [concept]}], **fields})


def rendered(spec: JobSpec, **options: Any) -> dict[str, Any]:
    return render_job(spec, BUCKET, RenderOptions(**options))


def head_of(ray_job: dict[str, Any]) -> dict[str, Any]:
    return ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]  # type: ignore[no-any-return]


def worker_of(ray_job: dict[str, Any]) -> dict[str, Any]:
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


def findings_of(document: dict[str, Any]) -> list[str]:
    return [str(finding) for finding in check_manifests([Document("job", 1, document)], load_schemas())]


def test_the_spec_is_in_the_head_and_the_job_reads_it_as_a_file(tmp_path: Path) -> None:
    """So it goes with the RayJob, whose uid a rendered file cannot know to own another object."""
    ray_job = rendered(job(training={"steps": 40}))
    assert ray_job["kind"] == "RayJob"
    pod = head_of(ray_job)
    volume = next(one for one in pod["spec"]["volumes"] if one["name"] == "job")
    mount = next(one for one in pod["spec"]["containers"][0]["volumeMounts"] if one["name"] == "job")
    (item,) = volume["downwardAPI"]["items"]
    (annotation,) = re.findall(r"^metadata\.annotations\['(.+)'\]$", item["fieldRef"]["fieldPath"])
    assert ray_job["spec"]["entrypoint"] == f"python -m jobs.train {mount['mountPath']}/{item['path']} --retries 2"
    written = tmp_path / "spec.yaml"
    written.write_text(pod["metadata"]["annotations"][annotation])
    assert load_spec(written) == job(training={"steps": 40}, storage=BUCKET)
    assert ray_job["spec"]["backoffLimit"] == 2


def test_a_changed_spec_is_another_job_and_the_same_one_is_not() -> None:
    first, again, changed = (rendered(job(training={"steps": steps}))["metadata"]["name"] for steps in (40, 40, 41))
    assert first == again != changed
    assert first.startswith("tea-")


def test_what_the_pods_are_made_of_is_in_the_name_and_how_the_job_is_started_is_not() -> None:
    """KubeRay keeps the pods of a job that is there; deadline, queue and suspension it would change."""
    made = [{}, {"gpu": True}, {"packs": 2}, {"image": "registry.example/cats:7"}]
    made += [{"sizes": Overrides(**{name: "3Gi"})} for name in ("worker_memory", "head_memory")]
    made += [{"sizes": Overrides(worker_cpu="3")}]
    names = {rendered(job(), **options)["metadata"]["name"] for options in made}
    assert len(names) == len(made)
    started = [
        {},
        {"hours": 2},
        {"suspend": True},
        {"queue": "cats"},
        {"queue": "cats", "priority": "soon"},
        {"image": f"cat-cluster:{version('cat-cluster')}"},
    ]
    assert len({rendered(job(), **options)["metadata"]["name"] for options in started}) == 1


def test_a_changed_spec_under_a_given_name_is_the_same_job() -> None:
    first, changed = (rendered(job(training={"steps": steps}), name="batch") for steps in (40, 41))
    assert first["metadata"] == changed["metadata"]
    assert head_of(first) != head_of(changed)


@pytest.mark.parametrize("title", ["Frühjahr 2027 & more", "7 cups", "x" * 100, "___"])
def test_any_name_of_a_spec_makes_a_name_that_kubernetes_takes(title: str) -> None:
    assert findings_of(rendered(job(name=title))) == []


@pytest.mark.parametrize("name", ["7cups", "Cups", "x" * 48, "cup-"])
def test_a_name_that_kubernetes_refuses_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="--name"):
        rendered(job(), name=name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *[({"queue": queue}, "--queue") for queue in ("bad queue", "team/a", "a" * 64, "a..b", "-a", "A", "")],
        *[({"queue": "cats", "priority": name}, "--priority") for name in ("very soon", "a/b", "a" * 64, "A", "")],
        ({"priority": "soon"}, "--priority soon: .* give --queue"),
        ({"queue": "cats", "suspend": True}, r"--suspend: .*'\{\"spec\":\{\"active\":false\}\}'"),
        ({"sizes": Overrides(worker_cpu="two")}, "--worker-cpu 'two'"),
        ({"sizes": Overrides(worker_memory="4GB")}, "--worker-memory '4GB'"),
        ({"sizes": Overrides(head_memory="4")}, "--head-memory '4'"),
        *[({"namespace": name}, "--namespace") for name in ("Bad_NS", "a" * 64, "team.a", "a b", "")],
        *[
            ({"image": image}, "--image")
            for image in ("a b", "cats: 7", "Cats:7", "cats@sha256:0a", "cats:", "a//b", "a" * 256, "http://a/b", "")
        ],
        *[({"hours": hours}, "--hours") for hours in (596_524, 10**9, 0)],
        ({"packs": 2**31}, "cluster.workers"),
    ],
)
def test_options_that_kubernetes_refuses_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        rendered(job(), **options)


@pytest.mark.parametrize(
    "options",
    [
        *[{"queue": queue} for queue in ("y", "team.a", "08", "a" * 63)],
        *[{"namespace": name} for name in ("n", "012345678901", "a" * 63)],
        *[
            {"image": image}
            for image in ("y", "1e3", "localhost:5000/a__b/c-d:V1", "GHCR.io/a/b", f"a/b:1@sha256:{'0a' * 32}")
        ],
        {"hours": 596_523},
    ],
)
def test_options_that_kubernetes_takes_are_taken(options: dict[str, Any]) -> None:
    ray_job = rendered(job(), **options)
    assert findings_of(ray_job) == []
    assert yaml.safe_load(manifest_text(ray_job)) == ray_job


def test_workers_and_packs_are_there_from_the_beginning() -> None:
    spec = rendered(job(cluster={"workers": 3}), packs=2)["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (6, 6, 6)
    assert group["scaleStrategy"] == {}
    assert "enableInTreeAutoscaling" not in spec


def test_elastic_workers_scale_and_only_the_autoscaler_has_a_token() -> None:
    ray_job = rendered(job(cluster={"workers": [1, 4]}), gpu=True)
    spec = ray_job["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 4)
    assert "replicas" not in group  # the autoscaler's: a second apply would set them back
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["enableInTreeAutoscaling"] is True
    head = spec["headGroupSpec"]["template"]["spec"]
    assert head["serviceAccountName"] == "cat-training-head"
    assert "api-token" in {one["name"] for one in spec["autoscalerOptions"]["volumeMounts"]}
    assert "api-token" not in {one["name"] for one in head["containers"][0]["volumeMounts"]}
    assert findings_of(ray_job) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"suspend": True}, {"queue": "cats"}, {"queue": "cats", "priority": "soon"}, {"gpu": True, "hours": 2}],
)
def test_every_form_keeps_the_operators_rules(options: dict[str, Any]) -> None:
    ray_job = rendered(job(), **options)
    assert findings_of(ray_job) == []
    spec = ray_job["spec"]
    assert ("deletionStrategy" in spec) != ("ttlSecondsAfterFinished" in spec)
    labels = ray_job["metadata"]["labels"]
    assert labels.get("kueue.x-k8s.io/queue-name") == options.get("queue")
    assert labels.get("kueue.x-k8s.io/priority-class") == options.get("priority")


def test_a_queued_job_leaves_the_room_that_kueue_gives_away() -> None:
    assert 0 <= rendered(job(), queue="cats")["spec"]["ttlSecondsAfterFinished"] <= 60
    assert rendered(job(), suspend=True)["spec"]["ttlSecondsAfterFinished"] == 600


def test_the_pods_have_what_the_spec_needs_or_what_is_given() -> None:
    large = job(training={"rows_per_concept": 64})
    small_worker, large_worker = (worker_of(rendered(one))["resources"] for one in (job(), large))
    assert small_worker["requests"] == small_worker["limits"] != large_worker["requests"]
    head = head_of(rendered(job()))["spec"]["containers"][0]["resources"]
    assert head["requests"]["memory"] == head["limits"]["memory"]
    given = rendered(job(), gpu=True, sizes=Overrides(worker_cpu="8", worker_memory="40Gi", head_memory="6Gi"))
    assert worker_of(given)["resources"]["limits"] == {"cpu": "8", "memory": "40Gi", "nvidia.com/gpu": "1"}
    assert head_of(given)["spec"]["containers"][0]["resources"]["limits"]["memory"] == "6Gi"
    assert findings_of(given) == []


@pytest.mark.parametrize(("workers", "options"), [(2, {}), ([1, 4], {}), (1, {"gpu": True}), (1, {"queue": "cats"})])
def test_no_service_puts_its_address_into_a_pod(workers: Any, options: dict[str, Any]) -> None:
    pods = [pod for _, pod in pods_of(rendered(job(cluster={"workers": workers}), **options))]
    assert [pod["enableServiceLinks"] for pod in pods] == [False, False, False]  # submitter, head, worker


def test_a_deadline_that_passes_does_not_leave_machines_behind() -> None:
    rules = rendered(job())["spec"]["deletionStrategy"]["deletionRules"]
    ends = {next(iter(rule["condition"].items())) for rule in rules if rule["policy"] == "DeleteCluster"}
    assert ends == {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}


def test_kueue_and_elastic_workers_exclude_each_other() -> None:
    with pytest.raises(SpecError, match="leave --queue out"):
        rendered(job(cluster={"workers": [1, 2]}), queue="cats")


def test_what_lies_on_this_machine_is_refused_with_the_remedy(tmp_path: Path) -> None:
    concept = {"token": "sks", "class_noun": "cup", "images": str(tmp_path)}
    local = job(adapters=[{"id": "cup", "concepts": [concept]}])
    checkpoint = tmp_path / "xl.safetensors"
    checkpoint.touch()
    for spec, storage, said in (
        (local, BUCKET, "--upload"),
        (job(), tmp_path.as_uri(), "s3://bucket/prefix"),
        (job(base=str(tmp_path)), BUCKET, "is a folder of this machine, .* an s3:// address or a hub id"),
        (job(base=str(checkpoint)), BUCKET, "is a file of this machine, .* an s3:// address or a hub id"),
        (job(evaluation={"judge": str(tmp_path)}), BUCKET, "evaluation.judge"),
        (job(training={"general_prompts": str(tmp_path / "prompts.txt")}), BUCKET, "leave the field out"),
    ):
        with pytest.raises(SpecError, match=said):
            render_job(spec, storage, RenderOptions())


def test_upload_stores_photos_once_and_names_the_run(tmp_path: Path) -> None:
    photos = tmp_path / "cup"
    photos.mkdir()
    Image.new("RGB", (64, 64), (90, 20, 200)).save(photos / "a.png")
    concept = {"token": "sks", "class_noun": "cup", "images": str(photos)}
    local = job(adapters=[{"id": "cup", "concepts": [concept]}])
    store = Bucket(tmp_path / "store")
    stored, run_id = upload_job(local, store)
    assert upload_job(local, store) == (stored, run_id)
    address = stored.adapters[0].concepts[0].images
    assert store.list("inputs/") == [address.removeprefix(f"{BUCKET}/")]
    assert run_id.startswith("run-")
    assert findings_of(render_job(stored, store.url, RenderOptions())) == []


def test_who_follows_an_uploaded_job_can_tell_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cup").mkdir()
    Image.new("RGB", (64, 64), (90, 20, 200)).save(tmp_path / "cup" / "a.png")
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: tea\nadapters: [{id: cup, concepts: [{token: sks, class_noun: cup, images: cup}]}]\n")
    store = Bucket(tmp_path / "store")
    monkeypatch.setattr("cat_cluster.store.open_store", lambda url: store)
    written = CliRunner().invoke(k8s_app, ["render", str(spec), "--storage", BUCKET, "--upload", "--namespace", "cats"])
    assert written.exit_code == 0, written.output
    (run_id,) = {word for word in written.stderr.split() if word.startswith("run-")}
    assert f"cat-cluster jobs status {run_id} --wait --storage {BUCKET}" in written.stderr
    name = yaml.safe_load(written.stdout)["metadata"]["name"]
    expected = Run(store, run_id).expectation()
    assert expected is not None
    assert expected.job == f"RayJob {name} in namespace cats"


def test_why_a_queued_job_waits_is_in_its_workload() -> None:
    options = RenderOptions(queue="cats")
    expected = expectation_of(render_job(job(), BUCKET, options), options)
    assert expected.look == "`kubectl -n cat-cluster describe workloads`"
    assert expected.seconds is None


def test_upload_refuses_photos_that_training_would(tmp_path: Path) -> None:
    (tmp_path / "cup").mkdir()
    (tmp_path / "cup" / "a.png").write_bytes(b"no picture")
    concept = {"token": "sks", "class_noun": "cup", "images": str(tmp_path / "cup")}
    store = Bucket(tmp_path / "store")
    with pytest.raises(ConceptError):
        upload_job(job(adapters=[{"id": "cup", "concepts": [concept]}]), store)


def test_the_yaml_reads_back_as_it_was() -> None:
    ray_job = rendered(job(name="a: b # c"))
    text = manifest_text(ray_job)
    assert yaml.safe_load(text) == ray_job
    assert "&id" not in text
    assert " cat-cluster/spec: |\n" in text


def large_job(adapters: int, noun: str = "cup") -> JobSpec:
    concepts = [{"token": "sks", "class_noun": noun, "images": f"s3://bucket/{n:0400d}"} for n in range(adapters)]
    return job(adapters=[{"id": f"cup-{n}", "concepts": [concept]} for n, concept in enumerate(concepts)])


def annotation_size(document: dict[str, Any]) -> int:
    """Bytes of what `kubectl apply` keeps of an object in an annotation: Go's JSON."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) + 5 * sum(map(text.count, "<>&"))


@pytest.mark.slow
@pytest.mark.parametrize("noun", ["cup", "<&>" * 9, "ä" * 40])
def test_a_spec_is_in_the_job_as_long_as_kubectl_can_keep_it(noun: str, tmp_path: Path) -> None:
    store = Bucket(tmp_path)
    jobs = [large_job(n, noun) for n in range(20, 600, 40)]
    written = [render_job(one, BUCKET, RenderOptions(), run_id=RUN_ID, upload_to=store) for one in jobs]
    sizes = [annotation_size(one) for one in written if SPEC_FILE in one["spec"]["entrypoint"]]
    assert 150 << 10 < max(sizes) <= 256 << 10
    assert len(sizes) < len(written)


@pytest.mark.slow
def test_a_larger_spec_lies_in_the_storage_and_the_job_reads_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, large = Bucket(tmp_path / "store"), large_job(2_701)
    with pytest.raises(SpecError, match=r"KiB.*give --upload"):
        render_job(large, store.url, RenderOptions())
    with pytest.raises(SpecError, match="--name"):
        render_job(large, store.url, RenderOptions(name="A B"), run_id=RUN_ID, upload_to=store)
    assert store.list("specs/") == []
    written: list[Any] = []  # once: that takes seconds
    monkeypatch.setattr(render, "dump", lambda value: written.append(value) or dump(value))
    monkeypatch.setattr(render, "image_digests_of", lambda _: [])  # its photos are in no bucket
    monkeypatch.setattr(render, "run_id_of", lambda *_: RUN_ID)
    assert upload_job(large, store) == (large, RUN_ID)
    ray_job = render_job(large, store.url, RenderOptions(), run_id=RUN_ID, upload_to=store)
    assert len(written) == 1
    assert findings_of(ray_job) == []
    assert annotation_size(ray_job) < 20_000
    assert "cat-cluster/spec" not in json.dumps(ray_job)
    *words, address, _, _, option, run_id = ray_job["spec"]["entrypoint"].split()
    assert (words, option, run_id) == (["python", "-m", "jobs.train"], "--expected", RUN_ID)
    stored = address.replace(BUCKET, (tmp_path / "store").as_uri())
    assert load_job(stored) == large.model_copy(update={"storage": BUCKET})
    changed = render_job(large_job(2_702), store.url, RenderOptions(), run_id=RUN_ID, upload_to=store)
    assert changed["metadata"]["name"] != ray_job["metadata"]["name"]


@pytest.mark.slow
def test_three_megabytes_of_spec_are_rendered_in_seconds(tmp_path: Path) -> None:
    template = f"a photo of a {{token}} {{class_noun}} {'on a table ' * 13}"
    adapters = [
        f"- id: cup-{n}\n  concepts:\n  - {{token: sks, class_noun: cup, images: s3://bucket/{n:0200d}, "
        f"template: '{template}'}}\n"
        for n in range(7_000)
    ]
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"name: tea\nadapters:\n{''.join(adapters)}")
    assert spec.stat().st_size > 3_000_000
    read = load_spec(spec)
    started = time.process_time()
    text = manifest_text(render_job(read, BUCKET, RenderOptions(), run_id=RUN_ID, upload_to=Bucket(tmp_path / "store")))
    # Measured 1.5 s. The bound is far off: it tells work that grows with the square of the concepts, nothing finer.
    assert time.process_time() - started < 20
    assert len(text) < 20_000


def test_the_commands(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(job().model_dump(mode="json", exclude_unset=True)))
    runner = CliRunner()
    written = runner.invoke(k8s_app, ["render", str(spec), "--storage", BUCKET, "--image", "registry/cats:7"])
    assert written.exit_code == 0, written.output
    assert yaml.safe_load(written.stdout)["kind"] == "RayJob"
    assert written.stderr == ""
    assert written.stdout.count("registry/cats:7") == 3

    out = tmp_path / "out" / "job.yaml"
    assert runner.invoke(k8s_app, ["render", str(spec), "--storage", BUCKET, "--out", str(out)]).exit_code == 0
    assert yaml.safe_load(out.read_text())["kind"] == "RayJob"

    options = ["--queue", "cats", "--priority", "soon", "--worker-cpu", "2", "--worker-memory", "1Gi"]
    queued = runner.invoke(k8s_app, ["render", str(spec), "--storage", BUCKET, *options, "--head-memory", "5Gi"])
    assert queued.stderr.startswith("warning: --worker-memory 1Gi: the spec needs about ")
    ray_job = yaml.safe_load(queued.stdout)
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "soon"
    assert worker_of(ray_job)["resources"]["requests"] == {"cpu": "2", "memory": "1Gi"}
    assert head_of(ray_job)["spec"]["containers"][0]["resources"]["requests"]["memory"] == "5Gi"

    crds = tmp_path / "crds"
    crds.mkdir()
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}
    crd = {
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "example.org",
            "names": {"kind": "Cup"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}],
        },
    }
    (crds / "cup.yaml").write_text(yaml.safe_dump(crd))
    cup = {"apiVersion": "example.org/v1", "kind": "Cup", "metadata": {"name": "a"}, "spec": {"sise": 1}}
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump({**cup, "spec": {"size": 1}}))
    bad.write_text(yaml.safe_dump(cup))
    checked = runner.invoke(k8s_app, ["check", str(good), "--crds", str(crds)])
    assert checked.exit_code == 0
    assert checked.stderr.startswith("1 document is right\nnot looked at:\n- ")
    piped = runner.invoke(k8s_app, ["check", "-", "--crds", str(crds), "--json"], input=bad.read_text())
    assert piped.exit_code == 1
    record = json.loads(piped.stdout)
    assert [problem["field"] for problem in record["problems"]] == ["spec.sise"]
    assert record["not_looked_at"]
    refused = runner.invoke(k8s_app, ["check", str(bad), "--crds", str(crds)])
    assert isinstance(refused.exception, SpecError)
    found, end = str(refused.exception).split("\n", 1)
    assert found == f"{bad}: document 1 (Cup a): spec.sise: unknown field; did you mean size?"
    assert end.startswith("not looked at:\n- ")
