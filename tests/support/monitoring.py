"""What k8s/monitoring says: its rules, its dashboards, and the metrics their PromQL names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from cat_cluster.telemetry import SERVING_METRICS, TRAINING_METRICS, MetricSpec
from tests.support.ray_head import free_ports
from tests.support.serving import until

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
RULES, OPERATOR_RULES = FOLDER / "rules.yaml", FOLDER / "prometheusrule.yaml"
DASHBOARDS = {path.stem: path for path in sorted((FOLDER / "dashboards").glob("*.json"))}
SPECS: Mapping[str, MetricSpec] = {spec.name: spec for spec in (*TRAINING_METRICS, *SERVING_METRICS)}
VARIABLES = {"$namespace": ".*", "$adapter": ".*", "$__rate_interval": "15s"}
# Ray's, Prometheus' and the scrape configuration's own labels.
THEIR_LABELS = frozenset({"job", "instance", "namespace", "le", "SessionName", "WorkerId", "replica"})
# Metrics of theirs: whether a target, a node, and an engine are there. test_monitoring.py sees them in a real scrape.
THEIR_METRICS = frozenset(
    {
        "up",
        "ray_node_cpu_count",
        "ray_serve_deployment_replica_healthy",
        "ray_serve_deployment_replica_starts_total",
    }
)
_SERIES = re.compile(r"\bray_(cat_[a-z_]+)(?:\{([^}]*)\})?")
_RECORDED = re.compile(r"\b[a-z]+(?:_[a-z]+)*:cat_[a-z_]+:[a-z0-9_]+")
_MATCHER = re.compile(r"\s*([A-Za-z_]+)\s*(=~|!~|!=|=)\s*\"([^\"]*)\"\s*")
_GROUPING = re.compile(r"\b(?:by|on|group_left)\s*\(([^)]*)\)")


@dataclass(frozen=True)
class Query:
    """A PromQL expression and where it is from; record: the name it is recorded under, if any."""

    place: str
    expr: str
    record: str | None = None

    @property
    def metrics(self) -> set[str]:
        """The project's metrics it names, as the specs do."""
        return {spec_of(name).name for name, _ in _SERIES.findall(self.expr)}

    @property
    def theirs(self) -> set[str]:
        """The metrics it names that are not the project's."""
        return set(re.findall(r"\bray_(?!cat_)[a-z_]+|\bup\b", self.expr))

    @property
    def recorded(self) -> set[str]:
        """The recorded series it names."""
        return set(_RECORDED.findall(self.expr))

    @property
    def matchers(self) -> list[tuple[MetricSpec, str, str, str]]:
        """Metric, label, operator and value of everything between braces."""
        found = []
        for name, inside in _SERIES.findall(self.expr):
            matched = [_MATCHER.fullmatch(part) for part in filter(None, inside.split(","))]
            assert all(matched), f"{self.place}: cannot read {{{inside}}}"
            found += [(spec_of(name), *one.groups()) for one in matched if one is not None]
        return found

    @property
    def groupings(self) -> set[str]:
        """The labels that it sums and joins by."""
        return {label.strip() for inside in _GROUPING.findall(self.expr) for label in inside.split(",")} - {""}

    @property
    def concrete(self) -> str:
        """The expression with Grafana's variables filled in."""
        expr = self.expr
        for name, value in VARIABLES.items():
            expr = expr.replace(name, value)
        assert "$" not in expr, f"{self.place}: an unknown variable"
        return expr


def spec_of(name: str) -> MetricSpec:
    """Return the spec of a series by its name without Ray's prefix; KeyError for none."""
    if name in SPECS:
        return SPECS[name]
    spec = SPECS[re.sub(r"_(bucket|count)$", "", name)]
    if spec.kind != "histogram":
        raise KeyError(name)
    return spec


def rules() -> list[dict[str, Any]]:
    """Every rule of rules.yaml."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_queries() -> list[Query]:
    """The expression of every rule."""
    return [Query(rule.get("alert") or rule["record"], rule["expr"], rule.get("record")) for rule in rules()]


def panels(dashboard: str) -> list[dict[str, Any]]:
    """A dashboard's panels but its rows."""
    return [panel for panel in json.loads(DASHBOARDS[dashboard].read_text())["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """Every query of every panel."""
    return [
        Query(f"{name}: {panel['title']}: {target['legendFormat']}", target["expr"])
        for name in DASHBOARDS
        for panel in panels(name)
        for target in panel["targets"]
    ]


def tool(name: str) -> str:
    """Return the path of promtool or prometheus."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return path


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    http: httpx2.Client

    def get(self, path: str, **parameters: str) -> Any:
        """The data of a response of its API, which must be a success."""
        response = self.http.get(f"/api/v1/{path}", params=parameters)
        assert response.status_code == 200, (parameters, response.text)
        return response.json()["data"]

    def query(self, expr: str) -> list[Any]:
        """The series that an expression gives now."""
        return list(self.get("query", query=expr)["result"])


@contextmanager
def prometheus(folder: Path, *targets: str) -> Iterator[Prometheus]:
    """Run Prometheus with the rules, over the metrics at some addresses, once a second."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["scrape_configs"] = [{"job_name": "cat-cluster", "static_configs": [{"targets": list(targets)}]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                # A Debian package's place for these is not another's.
                "--web.console.libraries=/nowhere",
                "--web.console.templates=/nowhere",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx2.Client(base_url=f"http://{address}", timeout=10) as http:

            def ready() -> bool:
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                with suppress(httpx2.TransportError):
                    return http.get("/-/ready").status_code == 200
                return False

            until(ready, 20)
            yield Prometheus(http)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
