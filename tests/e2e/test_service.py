"""The service under load: its engine, its head and its versions go, and every request is answered."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Figures
from tests.support.kubernetes import (
    ROOT,
    Load,
    answered,
    command,
    is_ready,
    kubectl,
    name_of,
    objects,
    pods,
    wait_until,
)

ADAPTER = "striped-cup"
ENGINES = "app.kubernetes.io/component=serving,ray.io/group=engines"
DOORS = "app.kubernetes.io/component=serving,ray.io/group=doors"
HEADS = "app.kubernetes.io/component=serving,ray.io/node-type=head"
Variant = Callable[..., None]


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """Apply overlay `local` with some JSON patches of its RayService and some components."""
    folder = tmp_path_factory.mktemp("overlay")

    def apply(*patches: object, components: tuple[str, ...] = ()) -> None:
        away = Path(os.path.relpath(ROOT / "k8s", folder))
        target = {"kind": "RayService", "name": "cat-serving"}
        kustomization = {
            "resources": [str(away / "overlays/local")],
            "components": [str(away / "components" / name) for name in components],
            "patches": [{"target": target, "patch": json.dumps([patch])} for patch in patches],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        kubectl("apply", "-k", str(folder))

    return apply


def service() -> dict[str, object]:
    found: dict[str, object] = objects("rayservice", "cat-serving")[0]
    return found


def active_cluster() -> str:
    return str(objects("rayservice", "cat-serving")[0]["status"]["activeServiceStatus"].get("rayClusterName", ""))


def annotated(value: str) -> object:
    """A patch that changes an annotation of the head's pod, as docs/operations.md says for a new environment."""
    path = "/spec/rayClusterConfig/headGroupSpec/template/metadata/annotations"
    return {"op": "add", "path": path, "value": {"cat-cluster/e2e": value}}


def test_the_only_engine_is_killed(figures: Figures) -> None:
    """The only engine's pod killed under load"""
    with Load(ADAPTER) as load:
        time.sleep(5)
        kubectl("delete", "pod", "-l", ENGINES, "--grace-period=0", "--force")
        wait_until("another engine", lambda: any(map(is_ready, pods(ENGINES))))
        time.sleep(15)
    figures[""] = answered(load.tally)


def configured(change: Callable[[dict[str, Any]], None]) -> object:
    """A patch of `serveConfigV2` by which the application's arguments change."""
    config = yaml.safe_load(service()["spec"]["serveConfigV2"])  # type: ignore[index]
    change(config["applications"][0]["args"])
    return {"op": "replace", "path": "/spec/serveConfigV2", "value": yaml.safe_dump(config)}


def test_its_configuration_changes(variant: Variant, figures: Figures) -> None:
    """`serveConfigV2` changed under load"""
    with Load(ADAPTER) as load:
        variant(configured(lambda arguments: arguments["settings"].update(alias_ttl_s=3)))
        time.sleep(5)
        wait_until("a service that is ready", lambda: is_ready(service()))
        time.sleep(40)
    figures[""] = answered(load.tally)


def test_another_version(variant: Variant, figures: Figures) -> None:
    """A second cluster takes over under load: `gcs-embedded`, and two doors"""
    before = active_cluster()
    # As in base: an ingress in each, and as many doors again for those of a new version.
    group = {"minReplicas": 2, "maxReplicas": 4, "resources": {"CPU": "0", "door": "1"}}
    doors = [
        {"op": "replace", "path": f"/spec/rayClusterConfig/workerGroupSpecs/1/{field}", "value": value}
        for field, value in group.items()
    ]
    two = configured(lambda arguments: arguments.update(ingresses=2))
    with Load(ADAPTER) as load:
        # The annotation makes a new cluster: KubeRay disregards numbers of pods in one that runs.
        variant(two, *doors, annotated("another version"), components=("gcs-embedded",))
        wait_until("a second cluster that has the traffic", lambda: active_cluster() not in ("", before), 420)
        wait_until("a service that is ready", lambda: is_ready(service()))
        wait_until("the end of the first cluster", lambda: not objects("pods", "-l", f"ray.io/cluster={before}"), 420)
    figures[""] = answered(load.tally)


def doors_of(cluster: str) -> tuple[str, ...]:
    """The names of a cluster's doors that are ready and stay, once there are two."""
    ready = tuple(name_of(pod) for pod in pods(f"{DOORS},ray.io/cluster={cluster}") if is_ready(pod))
    return ready if len(ready) == 2 else ()


def test_a_door_goes(figures: Figures) -> None:
    """One of two doors deleted under load, as where a machine is drained"""
    first, _ = wait_until("two doors", lambda: doors_of(active_cluster()), 240)
    with Load(ADAPTER) as load:
        time.sleep(5)
        kubectl("delete", "pod", first, "--wait=false")
        # KubeRay makes another once this one has gone, which its grace of 210 s may take.
        wait_until("another door", lambda: first not in (doors_of(active_cluster()) or (first,)), 420)
        time.sleep(10)
    figures[""] = answered(load.tally)


def test_the_head_is_killed(figures: Figures) -> None:
    """`gcs-embedded`: the head's pod killed under load"""
    wait_until("one cluster", lambda: len(pods(HEADS)) == 1, 420)
    engine = name_of(pods(ENGINES)[0])
    with Load(ADAPTER) as load:
        kubectl("delete", "pod", "-l", HEADS, "--grace-period=0", "--force")
        time.sleep(20)
        wait_until("another head", lambda: any(map(is_ready, pods(HEADS))))
        time.sleep(60)  # engines that lose their head restart 50 s after it
    figures[""] = answered(load.tally)
    assert [name_of(pod) for pod in pods(ENGINES)] == [engine]


def test_the_page_of_the_service_answers() -> None:
    """Health and metrics of a door, from a namespace of clients"""
    name = name_of(next(pod for pod in pods("ray.io/group=doors") if is_ready(pod)))
    script = (
        "import json,urllib.request as u; "
        "print(json.dumps({p: u.urlopen('http://127.0.0.1:8000/' + p).status for p in ('health', 'metrics')}))"
    )
    done = command("kubectl", "-n", "cat-cluster", "exec", name, "--", "python", "-c", script)
    assert json.loads(done.stdout) == {"health": 200, "metrics": 200}, done.stderr
