"""Gates in a job spec: what `evaluation.require` accepts, and that gates need an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cat_cluster.errors import SpecError
from cat_cluster.spec.job import JobSpec, load_spec


def load(folder: Path, job: dict[str, Any], *adapters: dict[str, Any]) -> JobSpec:
    """A spec with one adapter per evaluation override; without any, one adapter with none."""
    (folder / "photos").mkdir(exist_ok=True)
    concepts = [{"token": "sks", "class_noun": "cup", "images": "photos"}]
    listed = [
        {"id": f"cup-{n}", "concepts": concepts, **({"evaluation": one} if one else {})}
        for n, one in enumerate(adapters or ({},))
    ]
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"name": "gated", "adapters": listed, "evaluation": job}))
    return load_spec(path)


def test_gates_are_kept_and_may_be_overridden_or_lifted_per_adapter(tmp_path: Path) -> None:
    gates = {"kps": ">=0.1", "base_drift": "<=1.2e-1", "identity_gain": ">= -0.05"}
    spec = load(tmp_path, {"require": gates}, {}, {"require": {"kps": ">=0.2"}}, {"require": None, "enabled": False})
    assert [one.evaluation.require for one in spec.resolved()] == [gates, {"kps": ">=0.2"}, None]


@pytest.mark.parametrize(
    ("require", "expected"),
    [
        ({"kpz": ">=0.1"}, "'kpz' is not a metric; the metrics are kps, kps_all_pairs"),
        ({"leak_matrix": "<=0.1"}, "'leak_matrix' is not a metric"),
        ({"kps": "0.1"}, "kps has '0.1'; write >= or <= and a number"),
        ({"kps": ">0.1"}, "kps has '>0.1'"),
        ({"kps": ">=nan"}, "kps has '>=nan'"),
        ({"kps": ">=0.1 <=0.2"}, "kps has '>=0.1 <=0.2'"),
        ({"kps": 0.1}, "kps has 0.1; write >= or <="),
        ({}, "must map metrics to conditions"),
        ([">=0.1"], "must map metrics to conditions"),
        ("kps>=0.1", "must map metrics to conditions"),
    ],
)
def test_a_bad_gate_is_named(tmp_path: Path, require: object, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, {"require": require})
    assert "evaluation.require" in str(caught.value)
    assert expected in str(caught.value)


GATES = {"kps": ">=0.1"}


@pytest.mark.parametrize(
    ("job", "adapters", "places"),
    [
        ({"enabled": False, "require": GATES}, [{}], ["evaluation.require"]),
        ({"enabled": False, "require": GATES}, [{}, {}], ["evaluation.require"]),
        ({"enabled": False}, [{"require": GATES}], ["adapters[0].evaluation.require"]),
        ({"require": GATES}, [{}, {"enabled": False}], ["adapters[1].evaluation.enabled"]),
        ({}, [{"enabled": False, "require": GATES}], ["adapters[0].evaluation.require"]),
    ],
)
def test_gates_without_an_evaluation_are_refused_where_they_meet(
    tmp_path: Path, job: dict[str, Any], adapters: list[dict[str, Any]], places: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, job, *adapters)
    lines = [line.strip() for line in str(caught.value).splitlines() if "require needs an evaluation" in line]
    assert [line.split(" (line ")[0] for line in lines] == places


def test_an_evaluation_of_one_image_is_refused_where_it_is_set(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"evaluation\.images_per_prompt .*: one image cannot be measured"):
        load(tmp_path, {"prompts": ["{} on a table"], "images_per_prompt": 1})
    with pytest.raises(SpecError, match=r"adapters\[1\]\.evaluation\.images_per_prompt"):
        load(tmp_path, {"prompts": ["{} on a table"]}, {}, {"images_per_prompt": 1})
    load(tmp_path, {"prompts": ["{} on a table", "{} at sea"], "images_per_prompt": 1})
    load(tmp_path, {"prompts": ["{} on a table"], "images_per_prompt": 1, "enabled": False})
