"""A real cluster for the tests of tests/e2e: kubectl, the commands of docs/operations.md, and load from inside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "docs" / "operations.md"
NAMESPACE = "cat-cluster"
CLIENTS = "cat-e2e"  # a namespace that may draw
STRANGERS = "cat-e2e-strangers"  # and one that may not
IMAGE = "cat-cluster:0.2.0"
STORAGE = "s3://cat-storage/prod"
STANDING_WORKERS = "ray.io/cluster=cat-training,ray.io/node-type=worker"
LOAD = Path(__file__).with_name("cluster_load.py")

Json = dict[str, Any]
Found = TypeVar("Found")


def command(*words: str, stdin: str | None = None, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root; its output is text."""
    return subprocess.run(words, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=seconds, check=False)


def kubectl(*words: str, stdin: str | None = None, seconds: float = 300) -> str:
    """Run kubectl in the namespace of the project and return what it prints; AssertionError where it fails."""
    done = command("kubectl", "-n", NAMESPACE, *words, stdin=stdin, seconds=seconds)
    assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}{done.stdout}"
    return done.stdout


def objects(*words: str) -> list[Json]:
    """Return the objects that `kubectl get` finds."""
    found: Json = json.loads(kubectl("get", *words, "-o", "json", "--ignore-not-found") or '{"items": []}')
    items: list[Json] = found.get("items", [found])
    return items


def pods(labels: str) -> list[Json]:
    """Return the pods with some labels that are not on their way out."""
    return [pod for pod in objects("pods", "-l", labels) if "deletionTimestamp" not in pod["metadata"]]


def is_ready(one: Json) -> bool:
    """Say whether an object's condition Ready is true."""
    conditions = one.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def name_of(one: Json) -> str:
    return str(one["metadata"]["name"])


def wait_until(what: str, look: Callable[[], Found], seconds: float = 300, every: float = 2) -> Found:
    """Return what `look` finds once that is true; AssertionError after some seconds."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"not {what} within {seconds:.0f} s: {found!r}"
        time.sleep(every)


def documented(start: str) -> list[str]:
    """Return the shell blocks of the paragraph of docs/operations.md that begins with `start`, up to the next such."""
    text = OPERATIONS.read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n{start}")
    assert found, f"docs/operations.md has no paragraph that begins with {start!r}"
    paragraph = re.split(r"\n(?=\*\*|## )", rest, maxsplit=1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", paragraph, flags=re.DOTALL)
    assert blocks, f"docs/operations.md: no commands under {start!r}"
    return [str(block) for block in blocks]


def s3_access() -> str:
    """The lines of docs/operations.md by which this machine reaches the S3 server of `local`."""
    lines = OPERATIONS.read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.startswith("export AWS_") or "port-forward svc/s3 " in line]
    assert len(wanted) == 4, wanted
    return "\n".join([*wanted, "sleep 3", ""])


@contextmanager
def shell(script: str, seconds: float = 300, **variables: str) -> Iterator[subprocess.CompletedProcess[str]]:
    """Run commands as a person would in a shell; what they leave in the background ends with the block."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        # What runs in the background keeps the pipes open: the shell's own end counts.
        process.wait(timeout=seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
        yield subprocess.CompletedProcess(script, process.returncode, output, errors)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run_in(pod: Sequence[str], script: str, *arguments: str) -> Json:
    """Run Python in a pod, given as kubectl's words for it, and return the JSON that it prints."""
    done = command("kubectl", *pod, "--", "python", "-c", script, *arguments, seconds=120)
    assert done.returncode == 0, f"{pod}: {done.stderr}"
    answer: Json = json.loads(done.stdout.splitlines()[-1])
    return answer


class Load:
    """Requests from a pod of the namespace of clients, from the beginning of a block to its end."""

    def __init__(self, model: str, *, clients: int = 2, name: str = "load") -> None:
        self._words = ["kubectl", "-n", CLIENTS]
        self._name = name
        self._model, self._clients = model, clients
        self.tally: Json = {}

    def __enter__(self) -> Load:
        self._remove()
        keys = objects("secret", "cat-cluster-api-keys")[0]["data"]["CAT_API_KEYS"]
        url = f"http://cat-serving.{NAMESPACE}.svc:8000"
        container = {
            "name": "load",
            "image": IMAGE,
            "command": ["python", "-c", LOAD.read_text(encoding="utf-8"), url, self._model, str(self._clients)],
            "env": [{"name": "KEYS", "value": keys}],
            "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
        }
        spec = {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 0}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": self._name}, "spec": spec}
        done = command(*self._words, "apply", "-f", "-", stdin=json.dumps(pod))
        assert done.returncode == 0, done.stderr
        wait_until("the first picture of the load", lambda: '"first"' in self._log(), 180)
        return self

    def __exit__(self, *_: object) -> None:
        command(*self._words, "exec", self._name, "--", "touch", "/tmp/stop")
        try:
            wait_until("the end of the load", lambda: '"answers"' in self._log(), 200)
            self.tally = json.loads(self._log().splitlines()[-1])
        finally:
            self._remove()

    def _log(self) -> str:
        return command(*self._words, "logs", self._name).stdout

    def _remove(self) -> None:
        command(*self._words, "delete", "pod", self._name, "--ignore-not-found", "--now", "--wait")


def answered(tally: Json) -> str:
    """Say how a load went, for the table; AssertionError for a request that was not answered with a picture."""
    answers = tally["answers"]
    total = sum(answers.values())
    assert answers == {"200": total}, tally
    return f"{total} of {total} requests answered, the slowest after {tally['slowest']:.1f} s"
