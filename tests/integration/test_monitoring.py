"""The rules and dashboards of k8s/monitoring: sound by themselves, true to our metrics, and run by a real Prometheus.

That Prometheus scrapes the metrics ports of two real Rays: one has the service with requests and probes made, the other
a process that records every metric of training.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import Registry
from cat_cluster.store import open_store
from cat_cluster.telemetry import IDENTITY_LOSS, LABELS, SERVING_METRICS, TRAINING_METRICS
from serve.settings import ProbeSettings, ServeSettings
from tests.support.cluster_jobs import train_whole
from tests.support.monitoring import (
    DASHBOARDS,
    FOLDER,
    OPERATOR_RULES,
    RULES,
    SPECS,
    THEIR_LABELS,
    THEIR_METRICS,
    Prometheus,
    Query,
    dashboard_queries,
    panels,
    prometheus,
    rule_queries,
    rules,
    spec_of,
    tool,
)
from tests.support.serving import ROOT, Served, ask, deployment_of, publish_random, served
from tests.support.tiny_jobs import adapter, write_spec

pytestmark = pytest.mark.timeout(300)

# What a service that is well, and has no safety checker, never records.
NEVER = {
    "cat_base_row_mismatches_total",
    "cat_adapters_quarantined_total",
    "cat_serve_safety_images_total",
    "cat_serve_safety_seconds",
}
# In neither rules nor dashboards, on purpose: none so far.
NOT_SHOWN: frozenset[str] = frozenset()
# None of these may fire while the service is well.
PAGES = {rule["alert"] for rule in rules() if rule.get("labels", {}).get("severity") == "critical"}
PATIENCE_S = 60
RAY_LABELS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId"}
PROMPT = "a photo of a sks cup"


def all_queries() -> list[Query]:
    return [*rule_queries(), *dashboard_queries()]


def promtool(*arguments: str | Path, folder: Path = FOLDER) -> None:
    # By default Go spends a quarter of the time on collecting garbage.
    environment = {**os.environ, "GOGC": "400"}
    command = [tool("promtool"), *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_rules_are_sound() -> None:
    promtool("check", "rules", RULES)


def test_the_scrape_configuration_is_sound(tmp_path: Path) -> None:
    """Debian's build knows no kubernetes_sd_configs: the pods' job is checked as if a file named them."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = [job for job in config["scrape_configs"] if "kubernetes_sd_configs" in job]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["file_sd_configs"] = [{"files": ["pods.json"]}]
    for found in (found for one in config["scrape_configs"] for found in one.get("file_sd_configs", [])):
        found["files"] = [Path(file).name for file in found["files"]]  # Ray's own is there or not, or a link to nothing
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "rules.yaml").symlink_to(RULES)
    promtool("check", "config", "prometheus.yaml", folder=tmp_path)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yaml")


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    tests = (FOLDER / "rules_test.yaml").read_text()
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 20
    for rule in alerts:
        name, labels, words = rule["alert"], rule["labels"], rule["annotations"]
        assert re.fullmatch(r"[1-9][0-9]*m", rule["for"]), name
        assert labels["severity"] in ("critical", "warning"), name
        assert labels["component"] in DASHBOARDS, name
        assert "What to do:" in words["description"], name
        assert len(words["summary"]) < 120, name
        assert f'alertname="{name}"' in tests, name
    assert set(re.findall(r'alertname="(\w+)"', tests)) == {rule["alert"] for rule in alerts}


def test_the_operators_rules_are_the_same() -> None:
    document = yaml.safe_load(OPERATOR_RULES.read_text())
    assert document["spec"] == yaml.safe_load(RULES.read_text())


def test_expressions_name_metrics_and_labels_that_exist() -> None:
    records = {rule["record"] for rule in rules() if "record" in rule}
    for query in all_queries():
        assert query.metrics or query.recorded or query.theirs, query.place
        assert query.recorded <= records, query.place
        assert query.theirs <= THEIR_METRICS, query.place
        for spec, label, operator, value in query.matchers:
            where = f"{query.place}: {spec.name}: {label}"
            if label in THEIR_LABELS:
                continue
            assert label in spec.labels, where
            if operator in ("=", "!=") and value != "other":
                assert LABELS[label].allows(value), f"{where}: {value}"
            elif label != "adapter" and LABELS[label].values:
                assert set(value.split("|")) <= set(LABELS[label].values), f"{where}: {value}"
        if query.metrics and not query.recorded:
            known = THEIR_LABELS.union(*(SPECS[name].labels for name in query.metrics))
            assert query.groupings <= known, query.place


def test_bounds_of_histograms_are_buckets() -> None:
    bounds = [(spec, value) for query in all_queries() for spec, label, _, value in query.matchers if label == "le"]
    assert bounds
    for spec, value in bounds:
        assert value in [str(bound) for bound in spec.buckets], spec.name  # Ray writes them as Python does


def test_every_metric_is_shown_and_every_record_used() -> None:
    named = set[str]().union(*(query.metrics for query in all_queries()))
    assert {spec.name for spec in (*TRAINING_METRICS, *SERVING_METRICS)} - named == NOT_SHOWN
    used = set[str]().union(*(query.recorded for query in all_queries()))
    assert {query.record for query in rule_queries()} - {None} <= used


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_complete(name: str) -> None:
    document = json.loads(DASHBOARDS[name].read_text())
    assert document["uid"] == f"cat-cluster-{name}"
    assert document["schemaVersion"] == 39  # Grafana 11's
    variables = {one["name"]: one for one in document["templating"]["list"]}
    assert set(variables) == {"datasource", "namespace", "adapter"}
    taken = set[tuple[int, int]]()
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    for panel in document["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels(name):
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["description"], panel["title"]
        assert defaults["unit"], panel["title"]
        if panel["type"] == "stat":
            assert defaults["thresholds"]["steps"], panel["title"]
        for target in panel["targets"]:
            assert 'namespace=~"$namespace"' in target["expr"], panel["title"]


def test_kustomize_builds_what_the_operator_and_grafana_take() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    documents = {f"{one['kind']}/{one['metadata']['name']}": one for one in yaml.safe_load_all(built.stdout)}
    assert set(documents) == {
        "ConfigMap/cat-cluster-dashboards",
        "PodMonitor/cat-cluster-head",
        "PodMonitor/cat-cluster-workers",
        "PrometheusRule/cat-cluster",
    }
    assert documents["PrometheusRule/cat-cluster"]["spec"] == yaml.safe_load(RULES.read_text())
    boards = documents["ConfigMap/cat-cluster-dashboards"]["data"]
    assert {Path(name).stem for name in boards} == set(DASHBOARDS)
    for name in ("head", "workers"):
        (endpoint,) = documents[f"PodMonitor/cat-cluster-{name}"]["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == "metrics"


@pytest.fixture(scope="module")
def recording() -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of the metrics of a Ray node on which every metric of training was recorded.

    And what has it show an adapter no more.
    """
    command = [sys.executable, "-m", "tests.support.record_metrics"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            lines = process.stdin

            def forget(adapter_id: str) -> None:
                lines.write(f"{adapter_id}\n")
                lines.flush()

            yield process.stdout.readline().strip(), forget
            process.communicate("", timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0


@pytest.fixture
def training_metrics(recording: tuple[str, Callable[[str], None]]) -> str:
    return recording[0]


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Our series by name and our labels' values."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: dict[tuple[str, ...], float] = {}
    for sample in (one for family in families for one in family.samples if one.name.startswith("ray_cat_")):
        ours = {n: v for n, v in sample.labels.items() if n not in RAY_LABELS and not n.startswith("otel_")}
        found[sample.name, *(ours[name] for name in sorted(ours))] = sample.value
    return found


@pytest.mark.ray
def test_what_a_process_records_is_at_the_metrics_port_of_its_node_as_long_as_it_holds(
    recording: tuple[str, Callable[[str], None]],
) -> None:
    training_metrics, forget = recording
    losses = f"ray_{IDENTITY_LOSS.name}"
    wanted = {
        ("ray_cat_training_steps_total",): 2.0,
        ("ray_cat_training_dropped_adapters_total",): 3.0,
        ("ray_cat_packs_running",): 2.0,
        ("ray_cat_store_retries_total", "read"): 2.0,
        ("ray_cat_checkpoint_seconds_count",): 1.0,
        ("ray_cat_checkpoint_seconds_bucket", "1.0"): 0.0,
        ("ray_cat_checkpoint_seconds_bucket", "2.5"): 1.0,
        (losses, "mug", "<shs>"): 2.0,
        (losses, "cup-0", "sks"): 0.0,
        (losses, "other", "other"): 7.0,
    }
    deadline = time.monotonic() + PATIENCE_S
    while not wanted.items() <= (found := scrape(training_metrics)).items():
        assert time.monotonic() < deadline, {series: found.get(series) for series in wanted}
        time.sleep(0.2)
    assert len([name for name, *_ in found if name == losses]) == 5
    shown = {name for name, *_ in found}
    assert {f"ray_{one.name}{'_count' if one.kind == 'histogram' else ''}" for one in TRAINING_METRICS} <= shown
    forget("cup-0")
    deadline = time.monotonic() + PATIENCE_S
    while (losses, "cup-0", "sks") in (found := scrape(training_metrics)):
        assert time.monotonic() < deadline, "shown for ever"
        time.sleep(0.5)
    assert found[losses, "mug", "<shs>"] == 2.0


@pytest.fixture(scope="module")
def service(
    tiny_base_folder: Path, photos: Path, judge_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The service with one slot; its adapters: one evaluated, one not, one whose weights are damaged."""
    folder = tmp_path_factory.mktemp("monitored")
    storage = folder / "storage"
    evaluation = {"prompts": ["a picture of a {}", "a drawing of a {}"], "images_per_prompt": 4, "steps": 2}
    spec = write_spec(
        folder / "spec.yaml",
        tiny_base_folder,
        [adapter("cup", photos)],
        training={"steps": 2},
        evaluation={**evaluation, "judge": str(judge_folder)},
    )
    train_whole(spec, storage)
    registry, base = Registry(open_store(str(storage))), load_base_model(str(tiny_base_folder))
    publish_random(registry, base, "mug", 1)
    sound = set(storage.rglob("*.safetensors"))
    publish_random(registry, base, "damaged", 2)
    (weights,) = set(storage.rglob("*.safetensors")) - sound
    weights.write_bytes(b"no weights")
    settings = ServeSettings(
        base=str(tiny_base_folder),
        storage=str(storage),
        device="cpu",
        threads=1,
        slots=1,
        max_rows=8,
        row_buckets=(4, 8),
        probes=ProbeSettings(live_share=1.0, canonical_every_s=3600),
    )
    with served(deployment_of(settings)) as running:
        yield running


def make_traffic(service: Served) -> None:
    """Images of two adapters that share a slot, of the base, of none, and of one that does not load; and a probe."""
    with service.http() as http:
        probed = http.post("/v1/adapters/cup/probe")
        assert probed.json()["result"]["verdict"] == "ok", probed.text
        base = http.get("/v1/models").json()["data"][0]["id"]
        for model, code in (("cup", 200), ("mug", 200), (base, 200), ("nobody", 404), ("cup", 200)):
            assert ask(http, model, 2, prompt=PROMPT).status_code == code, model
        http.post("/v1/adapters/mug/unload")  # so that it is fetched again
        assert ask(http, "damaged", 2).status_code >= 400


@contextmanager
def traffic(service: Served) -> Iterator[None]:
    """Make traffic once a second until the end of the block."""
    ended = threading.Event()

    def run() -> None:
        make_traffic(service)
        while not ended.wait(1.0):
            make_traffic(service)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            yield
        finally:
            ended.set()
        running.result()


@pytest.mark.ray
def test_a_real_prometheus_runs_every_expression_and_shows_what_was_done(
    service: Served, training_metrics: str, tmp_path: Path
) -> None:
    ports = [urlsplit(url).netloc for url in (service.metrics, training_metrics)]
    with prometheus(tmp_path, *ports) as running, traffic(service):
        asked = [query for query in dashboard_queries() if not query.metrics & NEVER]
        asked += [Query(query.place, query.record) for query in rule_queries() if query.record is not None]
        asked += [Query(name, name) for name in THEIR_METRICS]
        deadline = time.monotonic() + PATIENCE_S
        while asked := [query for query in asked if not has_data(running, query)]:
            assert time.monotonic() < deadline, "no data: " + "; ".join(query.place for query in asked)
            time.sleep(1.0)
        for query in all_queries():
            running.query(query.concrete)  # alerts and what a healthy service never records: these have no data
        for name, metric, label in choices():
            found = running.get(f"label/{label}/values", **{"match[]": metric})
            assert found or label == "namespace", name  # which Kubernetes gives
        states = [rule for group in running.get("rules")["groups"] for rule in group["rules"]]
        assert len(states) == len(rules())
        assert [(rule["name"], rule.get("lastError")) for rule in states if rule["health"] != "ok"] == []
        assert not {rule["name"] for rule in states if rule.get("state") == "firing"} & PAGES


def has_data(running: Prometheus, query: Query) -> bool:
    """No step is made any more where training was recorded: rates are 0 there, and quantiles of them no number."""
    found = running.query(query.concrete)
    return bool(found) and (query.place.startswith("training:") or any(one["value"][1] != "NaN" for one in found))


def choices() -> list[tuple[str, str, str]]:
    """Dashboard, metric and label of every variable whose choices are a label's values."""
    found = []
    for name, path in DASHBOARDS.items():
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
                assert asked is not None, variable
                assert spec_of(asked[1].removeprefix("ray_"))
                found.append((name, asked[1], asked[2]))
    return found
