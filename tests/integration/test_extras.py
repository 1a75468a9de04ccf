"""Without the extras c2pa, cluster, otel, s3, serve and k8s: the core works, and what needs one of them says which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.tiny_jobs import Finished, adapter, assert_refused, write_spec

# What only the extras bring; requests is there with diffusers too.
PACKAGES = (
    *("ray", "deepspeed", "boto3", "botocore", "fastapi", "starlette", "fastapi_swagger"),
    *("c2pa", "opentelemetry"),
    *("jsonschema", "jsonschema_rs", "kubernetes_validate"),
)
SECONDS = 240
# Runs commands in one process in which those packages are not installed, as far as an import can tell.
SCRIPT = """
import contextlib, io, json, sys
from importlib.machinery import PathFinder

packages, commands = json.loads(sys.argv[1])

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in packages else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from cat_cluster.cli import app, jobs, k8s, serve

ended = []
for command in commands:
    sys.argv = ["cat-cluster", *command]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.main()
        except SystemExit as end:
            ended.append([int(end.code or 0), out.getvalue(), err.getvalue()])
print(json.dumps(ended), file=sys.__stdout__)
assert not {name.partition(".")[0] for name in sys.modules} & set(packages)
"""


def run_without_extras(*commands: list[str]) -> list[Finished]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([PACKAGES, commands])],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return [Finished(*one) for one in json.loads(done.stdout.splitlines()[-1])]


def test_the_core_works_without_them(tiny_base_folder: Path, photos: Path, judge_folder: Path, tmp_path: Path) -> None:
    evaluation = {"prompts": ["a picture of a {}"], "images_per_prompt": 2, "steps": 2, "judge": str(judge_folder)}
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", photos)], evaluation=evaluation)
    storage = ["--storage", str(tmp_path / "storage")]
    image = tmp_path / "cup.png"
    trained, listed, measured, exported, drawn, runs, base, refused = run_without_extras(
        ["train", "--in-process", str(spec), *storage, "--json"],
        ["adapters", "list", *storage, "--json"],
        ["evaluate", "cup", "--images-per-prompt", "2", "--judge", str(judge_folder), *storage, "--json"],
        ["adapters", "export", "cup", "--format", "peft", "--out", str(tmp_path / "peft"), *storage],
        ["generate", "--prompt", "a sks cup", "--adapter", "cup", "--steps", "2", "--out", str(image), *storage],
        ["jobs", "list", *storage, "--json"],
        ["base", "path", "pocket"],
        ["train", str(spec), *storage],
    )
    assert [one.code for one in (trained, listed, measured, exported, drawn, runs, base)] == [0] * 7, trained
    assert trained.json()["adapters"][0]["id"] == listed.json()["adapters"][0]["adapter_id"] == "cup"
    assert "kps" in measured.json()
    assert image.is_file()
    assert_refused(refused, "pip install 'cat-cluster[cluster]'", "--in-process")


def test_what_needs_an_extra_says_which(tmp_path: Path, photos: Path) -> None:
    spec = write_spec(tmp_path / "spec.yaml", "pocket", [adapter("cup", photos)])
    storage = ["--storage", str(tmp_path / "storage")]
    commands = {
        "cluster": ["submit", str(spec), "--address", "http://127.0.0.1:1", *storage],
        "s3": ["adapters", "list", "--storage", "s3://bucket/prod"],
        "serve": ["serve", *storage],
        "k8s": ["k8s", "check", str(spec)],
        "cluster,serve": ["demo", "--out", str(tmp_path / "demo")],
    }
    for extra, refused in zip(commands, run_without_extras(*commands.values()), strict=True):
        assert_refused(refused, f"pip install 'cat-cluster[{extra}]'")
