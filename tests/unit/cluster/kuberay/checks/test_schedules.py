"""Jobs on a schedule: what `k8s render --schedule` writes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cat_cluster.cli.app import app
from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests
from cat_cluster.cluster.kuberay.checks.gates import gates_on
from cat_cluster.cluster.kuberay.checks.schedules import schedule_problem
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, render_job
from cat_cluster.cluster.kuberay.rendering.schedule import ray_cron_job
from cat_cluster.errors import SpecError
from cat_cluster.spec.job import JobSpec

SPEC = {
    "name": "nightly",
    "adapters": [
        {"id": "cup", "concepts": [{"token": "sks", "class_noun": "cup", "images": "s3://bucket/concepts/cup"}]}
    ],
}


def ray_job(name: str | None = None) -> dict[str, object]:
    return render_job(JobSpec.model_validate(SPEC), "s3://bucket/prod", RenderOptions(name=name))


def test_the_job_of_a_schedule_is_the_rendered_one() -> None:
    document = ray_cron_job(ray_job(), "0 3 * * *", "Europe/Berlin", suspend=True)
    assert document["kind"] == "RayCronJob"
    assert document["spec"]["jobTemplate"] == ray_job()["spec"]
    assert {name: document["spec"][name] for name in ("schedule", "timeZone", "suspend")} == {
        "schedule": "0 3 * * *",
        "timeZone": "Europe/Berlin",
        "suspend": True,
    }
    found = check_manifests([Document("f", 1, document)], load_schemas(), gates=gates_on("RayCronJob"))
    assert found == []


@pytest.mark.parametrize(
    "schedule",
    [
        "0 3 * * *",
        "*/15 8-18 * * mon-fri",
        "0 0 1,15 * ?",
        "30 4 1 jan SUN",
        "@daily",
        "0 0-23/2 * * 0",
        "@every 1h30m",
    ],
)
def test_schedules_that_the_operator_takes(schedule: str) -> None:
    assert schedule_problem(schedule) is None


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("0 3 * *", "must have 5 fields"),
        ("0 0 3 * * *", "must have 5 fields"),
        ("daily", "must have 5 fields"),
        ("60 3 * * *", "'60' is no minute: 0 to 59"),
        ("0 24 * * *", "'24' is no hour"),
        ("0 3 0 * *", "'0' is no day of the month: 1 to 31"),
        ("0 3 * 13 *", "'13' is no month"),
        ("0 3 * * 7", "'7' is no day of the week: 0 to 6"),
        ("0 5-3 * * *", "'5-3' is no hour"),
        ("*/0 * * * *", "'*/0' is no minute"),
        ("0 3 * * Monday", "'Monday' is no day of the week"),
    ],
)
def test_schedules_that_the_operator_refuses(schedule: str, words: str) -> None:
    with pytest.raises(SpecError, match="--schedule") as hit:
        ray_cron_job(ray_job(), schedule, None)
    assert words in str(hit.value)
    document = {**ray_cron_job(ray_job(), "@daily", None)}
    document["spec"] = {**document["spec"], "schedule": schedule}
    (found,) = check_manifests([Document("f", 1, document)], load_schemas(), gates=gates_on("RayCronJob"))
    assert (found.field, found.message) == ("spec.schedule", schedule_problem(schedule))


def test_an_unknown_time_zone_and_a_name_without_room() -> None:
    with pytest.raises(SpecError, match="--time-zone Mars: is no name"):
        ray_cron_job(ray_job(), "@daily", "Mars")
    with pytest.raises(SpecError, match="may have 36 characters with --schedule"):
        ray_cron_job(ray_job("a" * 37), "@daily", None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--schedule", "@daily", "--upload"], "--upload: stores photos once and for all"),
        (["--schedule", "@daily", "--queue", "train"], "--queue: KubeRay gives the jobs of a RayCronJob no labels"),
        (["--schedule", "@daily", "--cron-job", "--upload"], "--upload: stores photos once and for all"),
        (["--time-zone", "UTC"], "--time-zone UTC: is that of a schedule"),
        (["--cron-job"], "--cron-job: submits a job at the times of --schedule"),
    ],
)
def test_what_does_not_go_with_a_schedule(options: list[str], words: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    done = CliRunner().invoke(app, ["k8s", "render", str(spec), "--storage", "s3://bucket/prod", *options])
    assert done.exit_code != 0
    assert words in str(done.exception)


def test_the_command_writes_it(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    options = ["--storage", "s3://bucket/prod", "--schedule", "0 3 * * *", "--suspend"]
    done = CliRunner().invoke(app, ["k8s", "render", str(spec), *options])
    assert done.exit_code == 0, done.output
    document = yaml.safe_load(done.stdout)
    assert (document["kind"], document["spec"]["suspend"]) == ("RayCronJob", True)
    assert "suspend" not in document["spec"]["jobTemplate"]
