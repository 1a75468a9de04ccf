"""YAML as Kubernetes' own parser reads it, in kubectl, which needs no cluster for that."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.checks.yaml_documents import load_documents
from cat_cluster.cluster.kuberay.checks.yaml_text import TAG, dump, plain_tag
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, manifest_text, render_job
from cat_cluster.spec.job import JobSpec

KINDS = {"str": str, "bool": bool, "null": type(None), "int": (int, float), "float": (int, float)}
SCALARS = [
    *("y", "Y", "n", "N", "yes", "no", "on", "off", "true", "false", "yES", "null", "NULL", "~", "NaN", "Inf", "="),
    *("08", "012345678901", "0777", "0888", "0o17", "0O17", "0o18", "0b11", "0b12", "0b", "0x1G", "0x_1", "0X1f"),
    *(".5", ".5e", ".1_0", "._5", "1.", "0.", ".e1", "+.5", "1e3", "1e+3", "1e", "1e+", "1e999", ".5e999", "0x1p4"),
    *("+12", "-12", "+0", "-0b11", "-0o17", "1_000", "1_", "_1", "1__0", "1_000.5", "08_1", "99999999999999999999"),
    *("1:30", "2001-01-01", "2001-1-1T1:1:1Z", "8Gi", "500m", "1.2.3"),
]


def read_by_kubectl(text: str, folder: Path) -> list[dict[str, Any]]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, whose parser is asked: install it to run this")
    file = folder / "all.yaml"
    file.write_text(text)
    done = subprocess.run(
        [kubectl, "label", "--local", "-f", str(file), "seen=yes", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    decoder, rest, found = json.JSONDecoder(), done.stdout.strip(), []
    while rest:
        document, end = decoder.raw_decode(rest)
        del document["metadata"]["labels"]["seen"]
        found.append(document)
        rest = rest[end:].strip()
    return found


def document(data: Any) -> dict[str, Any]:
    return {"apiVersion": "example.org/v1", "kind": "Cup", "metadata": {"name": "a", "labels": {}}, "data": data}


def drawn_scalars() -> list[str]:
    how = random.Random(3)
    texts = {"".join(how.choices("0123456789+-._eExXobyn", k=how.randrange(1, 6))) for _ in range(3000)}
    return sorted(text for text in texts if text not in ("-", "---") and not text.startswith("-."))


def test_plain_scalars_are_what_kubernetes_makes_of_them(tmp_path: Path) -> None:
    texts = [*SCALARS, *drawn_scalars()]
    lines = [f"  k{number}: {text}\n" for number, text in enumerate(texts)]
    (read,) = read_by_kubectl(dump(document({"first": ""})) + "".join(lines), tmp_path)
    wrong = [
        (text, value)
        for number, text in enumerate(texts)
        if not isinstance(value := read["data"][f"k{number}"], KINDS[plain_tag(text).removeprefix(TAG)])
        or (type(value) is bool) != (plain_tag(text) == f"{TAG}bool")
    ]
    assert wrong == []


def test_text_that_is_written_stays_text(tmp_path: Path) -> None:
    texts = [
        *SCALARS,
        *drawn_scalars(),
        "",
        "<<",
        "-",
        " a",
        "a ",
        "a: b",
        "# a",
        "é\n  b\n",
        "\ta\n",
        "\U0001f431",
        "\x7f",
    ]
    written = document({**{f"k{number}": text for number, text in enumerate(texts)}, "y": {"n": "on"}})
    assert read_by_kubectl(dump(written), tmp_path) == [written]


@pytest.mark.parametrize(
    "options",
    [
        RenderOptions(name="y", namespace="n", queue="on", image="1e3"),
        RenderOptions(name="null", namespace="08", queue="1e3", image="y:1.0"),
        RenderOptions(namespace="012345678901", queue="0.5", image="123:012345678901", gpu=True),
    ],
)
def test_options_stay_text_in_a_rendered_job(options: RenderOptions, tmp_path: Path) -> None:
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/concepts/cup"}
    job = JobSpec.model_validate({"name": "y", "adapters": [{"id": "cup", "concepts": [concept]}]})
    ray_job = render_job(job, "s3://bucket/prod", options)
    assert read_by_kubectl(manifest_text(ray_job), tmp_path) == [ray_job]


@pytest.mark.parametrize(
    "data",
    [
        "{a: c, <<: *x}",
        "{<<: *x, a: c}",
        "{<<: [{a: 1, b: 1}, {a: 2, c: 2}]}",
        "{y: x, 012: z, 1e3: w, 0.5: q, -1: t, off: s}",
        "[!!str 8, !!binary aGVsbG8=, !!float 8, !foo bar, ! 8, !!timestamp 2001-01-01, !!int '8', !!bool y]",
        "[1.0, 1e3, 2.50, 08, 0777, 0b11, -0o17, 1_000, <<, *x, '', ~, '~', \"\\u00e9\"]",
        "{a: 2001-01-01T00:00:00Z, b: 1:30, c: =, d: !!map {}, e: !!seq []}",
    ],
)
def test_documents_are_read_as_kubernetes_reads_them(data: str, tmp_path: Path) -> None:
    text = "apiVersion: example.org/v1\nkind: Cup\nmetadata: {name: a, labels: {}}\nx: &x {a: b, z: q}\ndata: " + data
    assert list(load_documents(text)) == read_by_kubectl(text, tmp_path)


@pytest.mark.parametrize("place", ["overlays/local", "overlays/aws"])
def test_manifests_are_read_as_kubernetes_reads_them(place: str, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, whose parser is asked: install it to run this")
    folder = Path(__file__).parents[2] / "k8s" / place
    text = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    read = [document for document in load_documents(text) if document["metadata"].setdefault("labels", {}) is not None]
    assert read == read_by_kubectl(text, tmp_path)
