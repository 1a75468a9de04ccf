"""The image's recipe and the script that makes Secrets, read and run without Docker or a cluster."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

from cat_cluster.cluster.kuberay.rendering import pods as kuberay_pods
from serve.http.access import ADMIN_KEYS, API_KEYS

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def test_the_image_is_built_of_what_is_there() -> None:
    text = (K8S / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for word in line.split()]
    assert {"cat_cluster", "serve", "jobs", "pyproject.toml", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    installs = re.findall(r"pip install[^\n&]*", text)
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    extras = re.search(r"for name in \(([^)]+)\)", text)
    assert extras is not None
    assert set(re.findall(r"\w+", extras[1])) == project()["optional-dependencies"].keys() - {"all", "dev", "heic"}
    assert f"org.opencontainers.image.version={project()['version']}" in text
    low, high = re.findall(r"\d+\.\d+", project()["requires-python"])
    python = re.search(r"^ARG PYTHON=(\d+)\.(\d+)-", text, re.M)
    assert python is not None
    assert tuple(map(int, low.split("."))) <= tuple(map(int, python.groups())) < tuple(map(int, high.split(".")))


def test_the_last_stages_have_no_root_and_no_build_tools() -> None:
    text = (K8S / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S))
    assert set(stages) == {"build", "cpu", "gpu", "gpu-compile"}
    assert f"USER {kuberay_pods.USER}:{kuberay_pods.USER}" in stages["cpu"]
    for name in ("cpu", "gpu"):
        assert not re.search(r"apt-get|pip |gcc|build-essential|USER root", stages[name])
    assert stages["gpu-compile"].rstrip().count("USER") == 2
    assert "PYTHONUNBUFFERED=1" in stages["cpu"]
    assert "HF_HUB_OFFLINE" not in text
    assert re.search(r"^FROM cpu$", text, re.M)  # what is built when no target is named


def test_secrets_are_made_once_and_given_by_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(
        '#!/bin/sh\nprintf "%s " "$@" >> "$CALLS"\ncase "$3" in get) exit "$FOUND" ;; *) cat >> "$VALUES" ;; esac\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    calls, given = tmp_path / "calls", tmp_path / "given"
    calls.touch()
    given.touch()

    def run(found: str, *options: str) -> None:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "VALUES": str(given), "FOUND": found}
        subprocess.run(["bash", str(K8S / "secrets.sh"), *options], check=True, env=environment, timeout=60)

    run("0", "--local-s3")
    assert not given.read_text()
    run("1", "--namespace", "cats", "--local-s3")
    pairs = [line.split("=") for line in given.read_text().splitlines()]
    assert [name for name, _ in pairs].count("auth_token") == 2
    assert {API_KEYS, ADMIN_KEYS, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} < {name for name, _ in pairs}
    assert len({value for _, value in pairs}) == len(pairs)
    assert all(len(value) >= 20 and value not in calls.read_text() for _, value in pairs)
    assert "-n cats" in calls.read_text()
