"""The service on its own Ray in its own process: `python -m tests.support.serve_driver DEPLOYMENT.json PORT [nodes]`.

With `nodes` Ray has a node for ingresses (resource `door`), with the only proxy, and another of one CPU for an engine.
It prints one line of JSON when requests are answered, then obeys one line of JSON at a time, a command and its values,
and answers each with one. At the end of its input it ends everything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "a-token-of-the-tests-that-guards-nothing"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serve.proxy.middlewares"  # as the command does

import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions, ProxyLocation

from serve import app, local
from serve.settings import Deployment
from tests.support.stuck_engine import StuckEngine

MEMORY = 100_000_000


class Commands:
    """What the process does when told."""

    def __init__(self, port: int, cluster: Cluster | None) -> None:
        self._port, self._cluster = port, cluster

    def deploy(self, deployment: dict[str, Any]) -> dict[str, Any]:
        """Bring the service to this deployment, and say where its node's metrics are."""
        local.start(Deployment.model_validate(deployment), "127.0.0.1", self._port)
        node, *_ = ray.nodes()
        return {"metrics": f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"}

    def engines(self) -> list[dict[str, Any]]:
        """The status of every engine that answers."""
        answers = self._engine().broadcast("status").results(timeout_s=30, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, dict)]

    def stick(self, pid: int) -> None:
        """Let the next step of one engine hang."""
        self._engine().broadcast("stick", pid).results(timeout_s=30)

    def kill(self, pid: int) -> None:
        """End a process as a fault of the machine does."""
        os.kill(pid, signal.SIGKILL)

    def lose_node(self) -> None:
        """End the node of the engine with all its processes, as a machine that is taken away does."""
        assert self._cluster is not None
        (node,) = self._cluster.worker_nodes
        self._cluster.remove_node(node, allow_graceful=False)

    def add_node(self) -> None:
        """Start a node for an engine."""
        assert self._cluster is not None
        self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    def states(self) -> dict[str, Any]:
        """What Ray Serve says of each deployment's replicas, by state."""
        deployments = ray_serve.status().applications[local.APPLICATION].deployments
        return {name: dict(found.replica_states) for name, found in deployments.items()}

    def _engine(self) -> Any:
        return ray_serve.get_deployment_handle(app.ENGINE, local.APPLICATION)


def main() -> None:
    """Start, and obey."""
    answers, sys.stdout = sys.stdout, sys.stderr  # Ray has its own things to say
    app.EngineReplica = StuckEngine  # type: ignore[misc]
    port, cluster = int(sys.argv[2]), None
    if sys.argv[3:] == ["nodes"]:
        cluster = start_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        ray_serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=port))
    else:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=MEMORY,
            log_to_driver=False,
            _system_config={"metrics_report_interval_ms": 500},
        )
    commands = Commands(port, cluster)
    print(json.dumps(commands.deploy(json.loads(Path(sys.argv[1]).read_text()))), file=answers, flush=True)
    for line in sys.stdin:
        name, *values = json.loads(line)
        print(json.dumps(getattr(commands, name)(*values)), file=answers, flush=True)
    ray_serve.shutdown()
    ray.shutdown()
    if cluster is not None:
        cluster.shutdown()


def start_nodes() -> Cluster:
    """Return two nodes of Ray: the head is where ingresses run, without a CPU, as doors are on Kubernetes."""
    head = {"num_cpus": 0, "resources": {"door": 1}, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    return cluster


if __name__ == "__main__":
    main()
