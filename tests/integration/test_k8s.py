"""The manifests of k8s/, offline: valid strictly, secure, and in step with the code and each other."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import random
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.autoscaler._private.kuberay import autoscaling_config, node_provider
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.serve._private.constants import DEFAULT_HTTP_PORT
from ray.serve.schema import ServeDeploySchema

from cat_cluster.cluster.kuberay.checks.check import Document, ManifestFinding, check_manifests, read_manifests
from cat_cluster.cluster.kuberay.checks.gates import DEFAULT_GATES, EMBEDDED_STORAGE
from cat_cluster.cluster.kuberay.checks.schemas import Schemas, load_schemas
from cat_cluster.cluster.kuberay.checks.security import pods_of
from cat_cluster.cluster.kuberay.rendering import pods as kuberay_pods
from cat_cluster.cluster.kuberay.rendering import render as kuberay
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, render_job
from cat_cluster.cluster.kuberay.rendering.schedule import cron_job
from cat_cluster.cluster.kuberay.rendering.sizes import Overrides, quantity
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, load_spec, parse_spec
from jobs import probe, train
from serve.http.access import ADMIN_KEYS, API_KEYS
from serve.http.image_routes import GRACE_S
from serve.settings import Deployment

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
PLACES = ["base", "overlays/local", "overlays/gpu", "overlays/aws"]
CUSTOM = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
# Fields whose keys are names of the writer's own: a misspelled one is another name.
FREE = {"labels", "annotations", "matchLabels", "data", "limits", "requests", "rayStartParams", "nodeSelector", "hard"}
FUZZED = 40  # keys of each document


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    return load_schemas()


@functools.cache
def built(place: str) -> tuple[Document, ...]:
    """The documents of a kustomization."""
    return built_in(K8S, place)


def built_in(folder: Path, place: str) -> tuple[Document, ...]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, which puts the manifests together: install it to run this")
    done = subprocess.run([kubectl, "kustomize", str(folder / place)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    documents = [one for one in yaml.safe_load_all(done.stdout) if one]
    return tuple(Document(place, number, one) for number, one in enumerate(documents, 1))


def contents(place: str) -> list[dict[str, Any]]:
    return [document.content for document in built(place)]


def of_kind(place: str, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in contents(place) if one["kind"] in kinds]


def clusters(place: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each of KubeRay's objects with its cluster's spec."""
    for one in of_kind(place, *CUSTOM):
        spec = one
        for part in CUSTOM[one["kind"]]:
            spec = spec[part]
        yield one, spec


def ray_pods(place: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Each pod of Ray's with the labels it will wear: the template's and the operator's."""
    for one, spec in clusters(place):
        groups = [("head", spec["headGroupSpec"])] + [("worker", group) for group in spec["workerGroupSpecs"]]
        for role, group in groups:
            own = {"ray.io/node-type": role, "ray.io/cluster": one["metadata"]["name"]}
            own["ray.io/group"] = group.get("groupName", "headgroup")
            yield {**group["template"]["metadata"]["labels"], **own}, group["template"]["spec"]


def pods(place: str) -> Iterator[dict[str, Any]]:
    for one in contents(place):
        for _, pod in pods_of(one):
            yield pod


def values(document: Any, key: str) -> Iterator[Any]:
    """Every value of a key, at any depth."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from values(value, key)


def serving(place: str) -> dict[str, dict[str, Any]]:
    """The worker groups of the service by their names."""
    (service,) = of_kind(place, "RayService")
    return {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def deployment(place: str) -> Deployment:
    return Deployment.model_validate(serve_config(place)["applications"][0]["args"])


def serve_config(place: str) -> dict[str, Any]:
    (service,) = of_kind(place, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])  # type: ignore[no-any-return]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def job(workers: Any, images: str = "s3://bucket/concepts/cup") -> JobSpec:
    concept = {"token": "sks", "class_noun": "cup", "images": images}
    fields = {"name": "tea", "adapters": [{"id": "cup", "concepts": [concept]}], "cluster": {"workers": workers}}
    return JobSpec.model_validate(fields)


def scheduled_pod() -> tuple[dict[str, str], dict[str, Any]]:
    """The labels and the spec of the pod that submits a job on a schedule."""
    ray_job = render_job(job(1), "s3://bucket/prod", RenderOptions())
    template = cron_job(ray_job, RenderOptions(), "@daily", None)["spec"]["jobTemplate"]["spec"]["template"]
    return template["metadata"]["labels"], template["spec"]


def lines(findings: list[ManifestFinding]) -> str:
    return "\n".join(map(str, findings))


@pytest.mark.parametrize("place", PLACES)
def test_every_document_is_right(place: str, schemas: Schemas) -> None:
    """What needs a feature gate that is off by default is the state of a head that outlives itself, and is said."""
    findings = check_manifests(built(place), schemas, gates=DEFAULT_GATES | {EMBEDDED_STORAGE})
    assert not findings, lines(findings)
    fields = [finding.field for finding in check_manifests(built(place), schemas)]
    embedded = place in ("overlays/gpu", "overlays/aws")
    assert fields == (["spec.rayClusterConfig.gcsFaultToleranceOptions.backend"] if embedded else [])


@pytest.mark.parametrize("instead", ["  - ../../components/gcs-ft\n", None])
@pytest.mark.parametrize("place", ["overlays/gpu", "overlays/aws"])
def test_one_line_says_where_the_head_keeps_its_state(
    place: str, instead: str | None, tmp_path: Path, schemas: Schemas
) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "gpu" / "kustomization.yaml"
    line = "  - ../../components/gcs-embedded\n"
    before, is_there, after = overlay.read_text().partition(line)
    assert is_there
    overlay.write_text(before + (instead or "  []\n") + after)
    documents = built_in(tmp_path / "k8s", place)
    findings = check_manifests(documents, schemas)
    assert not findings, lines(findings)
    service = next(one.content for one in documents if one.content["kind"] == "RayService")
    options = service["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions")
    if instead is None:
        assert options is None
    else:
        assert set(options["redisPassword"]) == {"valueFrom"}
        assert "redis" in {one.content["metadata"]["name"] for one in documents}


@pytest.mark.parametrize("place", PLACES[1:])
def test_nightly_probes_reach_the_doors_and_nothing_else(place: str, tmp_path: Path, schemas: Schemas) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / ("local" if place == "overlays/local" else "gpu") / "kustomization.yaml"
    line = "  - ../../components/nightly-probes\n"
    before, components, after = overlay.read_text().partition("components:\n")
    overlay.write_text(f"{before}components:\n{line}{after}" if components else f"{before}components:\n{line}")
    documents = built_in(tmp_path / "k8s", place)
    findings = check_manifests(documents, schemas, gates=DEFAULT_GATES | {EMBEDDED_STORAGE})
    assert not findings, lines(findings)
    (night,) = (one.content for one in documents if one.content["kind"] == "CronJob")
    template = night["spec"]["jobTemplate"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert template["spec"]["automountServiceAccountToken"] is False
    assert template["spec"]["enableServiceLinks"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    (key,) = (one for one in container["env"] if "valueFrom" in one)
    assert (key["name"], key["valueFrom"]["secretKeyRef"]["key"]) == (ADMIN_KEYS, ADMIN_KEYS)
    python, _, module, address = container["command"]
    assert (python, module) == ("python", probe.__name__)
    (service,) = of_kind(place, "RayService")
    assert address == f"http://{service['metadata']['name']}-serve-svc:{DEFAULT_HTTP_PORT}"
    assert container["image"] == next(values(serving(place)["doors"], "image"))

    worn = template["metadata"]["labels"]
    doors = {"app.kubernetes.io/component": "serving", "ray.io/group": "doors"}
    policies = [one.content for one in documents if one.content["kind"] == "NetworkPolicy"]
    rules = [
        (one["metadata"]["name"], rule)
        for one in policies
        if one["spec"]["podSelector"].get("matchLabels", {}).items() <= worn.items()
        for rule in one["spec"].get("egress", ())
    ]
    assert sorted(name for name, _ in rules) == ["dns", "nightly-probes"]
    way = dict(rules)["nightly-probes"]
    assert way["to"] == [{"podSelector": {"matchLabels": doors}}]
    assert [port["port"] for port in way["ports"]] == [DEFAULT_HTTP_PORT]
    into = next(one["spec"] for one in policies if one["metadata"]["name"] == "nightly-probes-to-doors")
    assert into["podSelector"]["matchLabels"] == doors
    assert into["ingress"][0]["from"] == [{"podSelector": {"matchLabels": worn}}]


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (2, RenderOptions()),
        (1, RenderOptions(gpu=True, packs=3)),
        ([1, 4], RenderOptions(gpu=True)),
        (
            2,
            RenderOptions(
                suspend=True, name="later", namespace="other", image=f"registry.example/cats@sha256:{'0a' * 32}"
            ),
        ),
        (2, RenderOptions(queue="cats", priority="soon", hours=1)),
        (1, RenderOptions(sizes=Overrides(worker_cpu="500m", worker_memory="1.5Gi", head_memory="4G"))),
    ],
)
def test_every_rendered_job_is_right(workers: Any, options: RenderOptions, schemas: Schemas) -> None:
    ray_job = render_job(job(workers), "s3://bucket/prod", options)
    findings = check_manifests([Document("job", 1, ray_job)], schemas)
    assert not findings, lines(findings)
    assert ray_job["metadata"]["namespace"] == options.namespace


def test_the_job_of_the_base_is_what_render_writes() -> None:
    spec = load_spec(K8S / "base" / "specs" / "batch.yaml")
    assert spec.storage is not None
    ray_job = render_job(spec, spec.storage, RenderOptions(name="batch", suspend=True))
    (there,) = (document.content for document in read_manifests([K8S / "base" / "job.yaml"]))
    assert ray_job == there, "render it again: the first lines of k8s/base/specs/batch.yaml say how"


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the keys that a schema knows."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield (*path, name)
            is_map = name in FREE or (path == ("spec",) and name == "selector" and "matchLabels" not in below)
            is_map = is_map or (name == "resources" and "requests" not in below)  # Ray's, of a group
            if not is_map:
                yield from keys(below, (*path, name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from keys(below, (*path, index))


def misspelled(content: dict[str, Any], path: tuple[Any, ...], how: random.Random) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    holder: Any = changed
    for part in path[:-1]:
        holder = holder[part]
    name, at = path[-1], how.randrange(len(path[-1]))
    holder[how.choice([name[:at] + name[at] + name[at:], name[:at] + "Q" + name[at + 1 :], name + "s"])] = holder.pop(
        name
    )
    return changed


@pytest.mark.parametrize("place", ["overlays/aws", "overlays/local"])
def test_a_misspelled_field_at_any_depth_is_refused(place: str, schemas: Schemas) -> None:
    how = random.Random(7)
    for document in built(place):
        found = list(keys(document.content))
        few = FUZZED if document.content["kind"] in CUSTOM else 4  # those of Kubernetes take 30 ms each
        for path in how.sample(found, min(few, len(found))):
            changed = misspelled(document.content, path, how)
            assert check_manifests([Document(place, 1, changed)], schemas), f"{document.title}: {path}"


def test_check_refuses_values_of_the_wrong_kind(schemas: Schemas) -> None:
    how = random.Random(8)
    for document in built("overlays/aws"):
        if document.content["kind"] not in CUSTOM:
            continue
        numbers = [path for path in keys(document.content) if type(at(document.content, path)) in (int, bool)]
        for path in how.sample(numbers, 20):
            changed = copy.deepcopy(document.content)
            at(changed, path[:-1])[path[-1]] = {"not": "this"}
            assert check_manifests([Document("aws", 1, changed)], schemas), path


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        content = content[part]
    return content


@pytest.mark.parametrize("place", PLACES)
def test_entry_points_are_in_the_code(place: str) -> None:
    config = serve_config(place)
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    Deployment.model_validate(application["args"])
    for ray_job in of_kind(place, "RayJob"):
        words = ray_job["spec"]["entrypoint"].split()
        assert words[:3] == ["python", "-m", "jobs.train"]
        assert util.find_spec(words[2]) is not None
        assert train._options(words[3:]).spec == kuberay_pods.SPEC_FILE
        head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        JobSpec.model_validate(yaml.safe_load(head["metadata"]["annotations"][kuberay_pods.SPEC_ANNOTATION]))


@pytest.mark.parametrize("place", PLACES)
def test_the_service_has_room_for_a_second_version_of_itself(place: str) -> None:
    args, groups = deployment(place), serving(place)
    (service,) = of_kind(place, "RayService")
    engines, doors = groups["engines"], groups["doors"]
    limits = engines["template"]["spec"]["containers"][0]["resources"]["limits"]
    each = int(int(limits["cpu"]) // args.engine_cpus)
    if args.engine_gpus:
        each = min(each, int(int(limits["nvidia.com/gpu"]) // args.engine_gpus))
    assert each == 1 or args.most_engines == 1  # else the loss of a pod is that of two engines
    assert engines["minReplicas"] * each >= args.min_engines
    assert engines["maxReplicas"] * each >= 2 * args.most_engines
    ((resource, share),) = args.ingress_resources.items()
    each = int(float(doors["resources"][resource]) // share)
    assert doors["minReplicas"] == args.ingresses  # each a door of its own, also where a new version has room beside it
    assert doors["maxReplicas"] * each >= 2 * args.ingresses
    # Ray's proxy cuts what is in flight when its cluster goes.
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > args.settings.deadline_s


@pytest.mark.parametrize("place", PLACES)
def test_traffic_goes_to_doors_alone_and_nothing_else_runs_there(place: str) -> None:
    (service,) = of_kind(place, "RayService")
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    (port,) = service["spec"]["serveService"]["spec"]["ports"]
    assert (port["name"], port["port"]) == ("serve", DEFAULT_HTTP_PORT)
    # Kubernetes sends nothing to a pod that has no port of this name.
    having = [
        name
        for name, group in serving(place).items()
        for one in group["template"]["spec"]["containers"][0]["ports"]
        if one["name"] == port["targetPort"]
    ]
    assert having == ["doors"]
    cluster = {"metadata": {"name": "a", "namespace": "b"}, "spec": service["spec"]["rayClusterConfig"]}
    types = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    args, counted = deployment(place), {name: types[name]["resources"] for name in ("engines", "doors")}
    assert counted["engines"]["CPU"] >= args.engine_cpus > counted["doors"]["CPU"]
    for resource, share in args.ingress_resources.items():
        assert counted["doors"][resource] >= share
        assert resource not in counted["engines"]
    groups, settings = serving(place), args.settings
    pod = groups["doors"]["template"]["spec"]
    waits = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert settings.deadline_s + GRACE_S < waits < pod["terminationGracePeriodSeconds"]
    callers = next(one for one in of_kind(place, "NetworkPolicy") if one["metadata"]["name"] == "serving-clients")
    assert callers["spec"]["podSelector"]["matchLabels"]["ray.io/group"] == "doors"
    budgets = [one["spec"]["selector"]["matchLabels"] for one in of_kind(place, "PodDisruptionBudget")]
    assert {"engines", "doors"} <= {labels.get("ray.io/group") for labels in budgets}


@pytest.mark.parametrize("place", PLACES)
def test_a_second_apply_changes_nothing(place: str) -> None:
    """What the operator and the autoscaler write into an object is written as they write it, or left to them."""
    for one, spec in clusters(place):
        for group in spec["workerGroupSpecs"]:
            assert group["scaleStrategy"] == {}, one["metadata"]["name"]
            assert ("replicas" in group) != bool(spec.get("enableInTreeAutoscaling")), one["metadata"]["name"]
    for pod in pods(place):
        for container in pod["containers"]:
            for amounts in container["resources"].values():
                assert {type(amount) for amount in amounts.values()} == {str}, container["name"]


def test_ports_and_paths_are_those_of_ray() -> None:
    ours = kuberay_pods
    assert ours.GCS_PORT == ray_constants.DEFAULT_PORT
    assert ours.DASHBOARD_PORT == ray_constants.DEFAULT_DASHBOARD_PORT
    assert ours.AGENT_PORT == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert ours.AUTOSCALER_METRICS_PORT == AUTOSCALER_METRIC_PORT
    assert ours.DASHBOARD_METRICS_PORT == DASHBOARD_METRIC_PORT
    assert ours.HEALTH_PATH in PUBLIC_EXACT_PATHS  # probes have no token
    assert Path(node_provider.IN_CLUSTER_TOKEN_PATH).parent == Path(ours.TOKEN_FOLDER)
    assert Path(node_provider.IN_CLUSTER_CA_CERT_PATH).parent == Path(ours.TOKEN_FOLDER)


@pytest.mark.parametrize("place", PLACES)
def test_ports_of_manifests_agree_with_each_other(place: str) -> None:
    known = {
        "gcs-server": kuberay_pods.GCS_PORT,
        "dashboard": kuberay_pods.DASHBOARD_PORT,
        "serve": DEFAULT_HTTP_PORT,
        "metrics": kuberay_pods.METRICS_PORT,
        "as-metrics": kuberay_pods.AUTOSCALER_METRICS_PORT,
        "dash-metrics": kuberay_pods.DASHBOARD_METRICS_PORT,
    }
    assert serve_config(place)["http_options"]["port"] == DEFAULT_HTTP_PORT
    for labels, pod in ray_pods(place):
        container = pod["containers"][0]
        assert {one["name"]: one["containerPort"] for one in container["ports"]}.items() <= known.items()
        assert "metrics" in {one["name"] for one in container["ports"]}  # what PodMonitors look for
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[name]["httpGet"]
            is_service = labels["app.kubernetes.io/component"] == "serving" and labels["ray.io/node-type"] == "worker"
            if is_service and name == "readinessProbe":
                assert (asked["path"], asked["port"]) == ("/-/healthz", DEFAULT_HTTP_PORT)
            else:
                assert (asked["path"], asked["port"]) == (kuberay_pods.HEALTH_PATH, kuberay_pods.AGENT_PORT)
    listened = {one["containerPort"] for pod in pods(place) for one in values(pod, "ports") for one in one}
    for policy in of_kind(place, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            assert {one["port"] for one in rule.get("ports", ())} <= listened, policy["metadata"]["name"]


@pytest.mark.parametrize("place", PLACES)
def test_every_selector_finds_a_pod_and_every_pod_a_policy(place: str) -> None:
    labels = [worn for worn, _ in ray_pods(place)]
    labels += [one["spec"]["template"]["metadata"]["labels"] for one in of_kind(place, "StatefulSet", "Deployment")]
    labels += [one["spec"]["submitterPodTemplate"]["metadata"]["labels"] for one in of_kind(place, "RayJob")]
    labels += [scheduled_pod()[0]]

    def fits(selector: Mapping[str, Any], worn: Mapping[str, str]) -> bool:
        return selector.get("matchLabels", {}).items() <= worn.items()

    for one in of_kind(place, "NetworkPolicy", "PodDisruptionBudget"):
        selector = one["spec"].get("podSelector") or one["spec"].get("selector") or {}
        assert any(fits(selector, worn) for worn in labels), one["metadata"]["name"]
    for one in of_kind(place, "PodDisruptionBudget"):  # Kubernetes finds no scale of KubeRay's objects
        assert isinstance(one["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in one["spec"]
    deny = next(one for one in of_kind(place, "NetworkPolicy") if one["metadata"]["name"] == "deny-all")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for one in of_kind(place, "Service"):
        assert one["spec"].get("type", "ClusterIP") == "ClusterIP"
    for _, spec in clusters(place):
        assert spec["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"


@pytest.mark.parametrize("place", PLACES)
def test_what_pods_refer_to_is_there(place: str) -> None:
    names = {
        kind: {one["metadata"]["name"] for one in of_kind(place, kind)} for kind in ("ConfigMap", "ServiceAccount")
    }
    priorities = {one["metadata"]["name"]: one["value"] for one in of_kind(place, "PriorityClass")}
    made = re.findall(r"make_secret ([a-z0-9-]+)|create secret generic ([a-z0-9-]+)", (K8S / "secrets.sh").read_text())
    secrets = {name for pair in made for name in pair if name}
    for labels, pod in ray_pods(place):
        assert pod["serviceAccountName"] in names["ServiceAccount"]
        assert pod["priorityClassName"] == f"cat-cluster-{labels['app.kubernetes.io/component']}"
        assert pod["priorityClassName"] in priorities
    assert priorities["cat-cluster-serving"] > priorities["cat-cluster-training"]
    _, scheduled = scheduled_pod()
    assert scheduled["serviceAccountName"] in names["ServiceAccount"]
    assert scheduled["priorityClassName"] in priorities
    for one in of_kind(place, "RoleBinding"):
        for subject in one["subjects"]:
            if subject["kind"] == "ServiceAccount":
                assert subject["name"] in names["ServiceAccount"]
                assert subject["namespace"] == one["metadata"]["namespace"]
    for one in contents(place):
        found = [ref["name"] for key in ("secretRef", "secretKeyRef") for ref in values(one, key)]
        assert {*found, *values(one, "secretName")} <= secrets, one["metadata"]["name"]
        configured = [ref["name"] for ref in values(one, "configMapRef")]
        assert set(configured) <= names["ConfigMap"]


@pytest.mark.parametrize("place", PLACES)
def test_settings_are_those_of_the_code(place: str) -> None:
    known = {f"CAT_{name.upper()}" for name in Settings.model_fields}
    named = {one["name"] for pod in pods(place) for one in values(pod, "env") for one in one}
    settings = next(one for one in of_kind(place, "ConfigMap") if one["metadata"]["name"] == "cat-cluster-settings")
    ours = {name for name in {*named, *settings["data"]} if name.startswith("CAT_")}
    assert ours <= known
    assert {"CAT_CACHE_DIR", "CAT_STORAGE"} <= ours
    script = (K8S / "secrets.sh").read_text()
    assert all(f"{name}=%s" in script for name in (API_KEYS, ADMIN_KEYS))
    storage = serve_config(place)["applications"][0]["args"]["settings"]["storage"]
    assert storage == settings["data"]["CAT_STORAGE"]


@pytest.mark.parametrize("place", PLACES)
def test_secrets_are_named_and_never_written(place: str) -> None:
    assert not of_kind(place, "Secret")
    for one in contents(place):
        for entries in values(one, "env"):
            for entry in entries:
                if re.search(r"KEY|TOKEN|PASSWORD|SECRET", entry["name"]):
                    assert "value" not in entry, entry["name"]
        for password in values(one, "redisPassword"):
            assert set(password) == {"valueFrom"}
    for _, spec in clusters(place):
        assert spec["authOptions"]["mode"] == "token"
        assert spec["authOptions"]["secretName"]


@pytest.mark.parametrize("place", PLACES)
def test_only_the_autoscaler_reaches_the_api_server(place: str) -> None:
    for pod in pods(place):
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert kuberay_pods.TOKEN_FOLDER not in {one["mountPath"] for one in container["volumeMounts"]}
    for one in of_kind(place, "ServiceAccount"):
        assert one["automountServiceAccountToken"] is False
    for one in of_kind(place, "Role"):
        for rule in one["rules"]:
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            # But for the keys of a bucket that is in the namespace, which every job has anyway.
            if "secrets" in rule["resources"]:
                assert (place, rule["resourceNames"], rule["verbs"]) == ("overlays/local", ["cat-cluster-s3"], ["get"])
    assert not of_kind(place, "ClusterRole", "ClusterRoleBinding")


@pytest.mark.parametrize("place", PLACES)
def test_no_service_puts_its_address_into_a_pod(place: str) -> None:
    """Service `s3` would give SeaweedFS S3_PORT=tcp://..., which it reads as a setting of its own and stops."""
    found = list(pods(place))
    assert len(found) >= 7
    for pod in found:
        assert pod["enableServiceLinks"] is False, pod["containers"][0]["name"]


@pytest.mark.parametrize("place", PLACES)
def test_pods_have_limits_and_no_root_they_could_write_to(place: str) -> None:
    for _, pod in ray_pods(place):
        container = pod["containers"][0]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        empty = {one["name"] for one in pod["volumes"] if "emptyDir" in one}
        home = next(one["value"] for one in container["env"] if one["name"] == "HOME")
        assert mounted["/tmp"] in empty
        assert mounted[home] in empty
        assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys() >= {"cpu", "memory"}
    config = serve_config(place)["applications"][0]["args"]["settings"]
    assert config["disk_cache"].startswith("/scratch/")


def requests(*containers: dict[str, Any], pods: int = 1) -> Counter[str]:
    """What pods of these containers ask for: CPUs, and bytes of memory."""
    found: Counter[str] = Counter()
    for one in containers:
        for name, text in one["resources"]["requests"].items():
            amount = quantity(text)
            assert amount is not None, text
            found[name] += float(amount) * pods  # type: ignore[assignment]
    return found


def cluster_requests(spec: dict[str, Any]) -> Counter[str]:
    """What a Ray cluster asks for that has no more workers than it must."""
    scaler = [spec["autoscalerOptions"]] if spec.get("enableInTreeAutoscaling") else []
    found = requests(*spec["headGroupSpec"]["template"]["spec"]["containers"], *scaler)
    for group in spec["workerGroupSpecs"]:
        found += requests(*group["template"]["spec"]["containers"], pods=group["minReplicas"])
    return found


def test_all_of_operations_at_once_fits_a_small_machine() -> None:
    """Overlay local with its service, standing cluster and S3 server, and a job, on 4 cores and 16 GiB."""
    text = (ROOT / "jobs" / "specs" / "single.yaml").read_text().replace("../../out/demo/", "s3://cat-storage/")
    ray_job = render_job(parse_spec(text.encode(), "single.yaml"), "s3://cat-storage/prod", RenderOptions())
    found = cluster_requests(ray_job["spec"]["rayClusterSpec"])
    found += requests(*ray_job["spec"]["submitterPodTemplate"]["spec"]["containers"])
    for one, spec in clusters("overlays/local"):
        found += cluster_requests(spec) if not one["spec"].get("suspend") else Counter()
    for one in of_kind("overlays/local", "StatefulSet", "Deployment"):
        found += requests(*one["spec"]["template"]["spec"]["containers"], pods=one["spec"]["replicas"])
    assert 2 < found["cpu"] <= 4
    assert 8 << 30 < found["memory"] <= 12 << 30


def test_training_cannot_take_what_serving_needs() -> None:
    for place in PLACES:
        (quota,) = of_kind(place, "ResourceQuota")
        (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
        assert scope == {"scopeName": "PriorityClass", "operator": "In", "values": ["cat-cluster-training"]}
        training = next(one for one in of_kind(place, "PriorityClass") if "training" in one["metadata"]["name"])
        assert training["preemptionPolicy"] == "Never"
        spot = [pod for labels, pod in ray_pods(place) if "tolerations" in pod and labels["ray.io/node-type"] == "head"]
        assert not spot  # a head on a machine that is taken away takes its cluster along


def test_aws_reads_no_stored_key() -> None:
    assert "cat-cluster-s3" not in json.dumps(contents("overlays/aws"))
    for one in of_kind("overlays/aws", "ServiceAccount"):
        assert one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")


def test_local_needs_no_gpu_and_reaches_its_own_bucket() -> None:
    assert "nvidia.com/gpu" not in json.dumps([one for one, _ in clusters("overlays/local")])
    (service,) = of_kind("overlays/local", "Service")
    settings = next(one for one in of_kind("overlays/local", "ConfigMap") if "AWS_ENDPOINT_URL" in one["data"])
    port = service["spec"]["ports"][0]["port"]
    assert settings["data"]["AWS_ENDPOINT_URL"] == f"http://{service['metadata']['name']}:{port}"
    (server,) = of_kind("overlays/local", "StatefulSet")
    bucket = next(one for one in server["spec"]["template"]["spec"]["containers"][0]["args"] if "bucket" in one)
    assert settings["data"]["CAT_STORAGE"].startswith(f"s3://{bucket.partition('=')[2]}/")


@pytest.mark.parametrize("place", PLACES)
def test_versions_agree(place: str) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert pinned[1] == kuberay.RAY_VERSION
    assert {spec["rayVersion"] for _, spec in clusters(place)} == {pinned[1]}
    ours = [image for pod in pods(place) for image in values(pod, "image") if "cat-cluster" in image]
    assert ours
    assert {image.rpartition(":")[2].removesuffix("-gpu") for image in ours} == {project()["version"]}
    for pod in pods(place):
        for image in values(pod, "image"):
            assert image.rpartition(":")[2] not in ("", "latest", image)
