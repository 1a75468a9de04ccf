"""Whole jobs on Ray: the adapters of the local loop, failures that stay alone, gates, monitoring, early errors.

All jobs run one after another in one process (tests/support/ray_jobs.py), and the tests read what they left. The
storage in S3 is copied to a folder, so that all are read alike.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cat_cluster.evaluation.intervals import METRICS
from cat_cluster.runs.progress import RunProgress
from cat_cluster.store import open_store
from tests.support import ray_plan
from tests.support.ray_plan import GOOD, MEASURED, STEPS
from tests.support.s3_server import S3Server
from tests.support.tiny_jobs import (
    Finished,
    adapter,
    assert_refused,
    open_registry,
    published_weights,
    relative_change,
    start_process,
    stored_files,
    write_photos,
    write_spec,
)

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
LAW = 1e-3  # ||W - W_ref|| / ||W_ref|| after 20 steps (design, section 4)
JOBS_SECONDS, REFUSAL_SECONDS = 800, 120


@dataclass(frozen=True)
class Jobs:
    """Where each job kept its adapters, and how it ended."""

    folder: Path
    results: dict[str, dict[str, Any]]

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.results:
            pytest.skip("no S3 server")
        return self.results[name]

    def adapters(self, name: str) -> dict[str, dict[str, Any]]:
        """The adapters in the job's JSON, by id."""
        return {one["id"]: one for one in json.loads(self[name]["out"])["adapters"]}

    def progress(self, name: str) -> RunProgress:
        """The record of the one run in the job's storage."""
        *_, record = sorted((self.folder / name).glob("runs/run-*/progress/*.json"))
        return RunProgress.model_validate_json(record.read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of all concepts, and what the jobs make of them."""
    folder = tmp_path_factory.mktemp("cluster")
    for seed, name in enumerate(["cup", "mug", "spoilt", *GOOD]):
        write_photos(folder / "photos" / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """An empty bucket with the AWS variables set for it as long as the module runs; None where there is no server."""
    try:
        server: S3Server = request.getfixturevalue("s3_server")
    except pytest.skip.Exception:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        for name, value in {**server.environment, **nothing, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        yield server.create_bucket(f"cluster-{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """A folder for Ray, not one of pytest's: the paths of its sockets must stay under 108 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def plan(folder: Path, tiny_base_folder: Path, judge_folder: Path, bucket: str | None) -> list[dict[str, Any]]:
    return ray_plan.write_plan(folder, tiny_base_folder, judge_folder, bucket)


@pytest.fixture(scope="module")
def jobs(folder: Path, plan: list[dict[str, Any]], nowhere: object, bucket: str | None, ray_folder: Path) -> Jobs:
    """All jobs, done."""
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    extensions = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    process = subprocess.run(
        [sys.executable, "-m", "tests.support.ray_jobs", str(folder / "plan.json"), str(folder / "results.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=JOBS_SECONDS,
        env={**environment, **extensions, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(ray_folder)},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    if bucket is not None:
        store = open_store(f"{bucket}/prod")
        for key in store.list(""):
            (folder / "apart" / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / "apart" / key).write_bytes(store.get(key))
    return Jobs(folder, json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def nowhere(folder: Path, tiny_base_folder: Path, ray_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A job for a cluster that does not answer, started beside the others: it waits long for the answer."""
    spec = write_spec(folder / "address.yaml", tiny_base_folder, [adapter("cup", folder / "photos" / "cup")])
    storage, there = (folder / "address").as_uri(), "127.0.0.1:1"
    process = start_process(
        "train", spec, "--storage", storage, "--json", "--address", there, RAY_TMPDIR=str(ray_folder)
    )
    yield process
    process.kill()
    process.communicate()


WAYS = ("apart", "batch", "stream")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_gives_the_adapter_of_the_local_loop(jobs: Jobs, way: str) -> None:
    """One worker with plain torch, one or two with ZeRO 2; alone, packed, joining others; photos and adapters in S3."""
    assert jobs[way]["packs"], jobs[way]["err"]
    ours, theirs = (open_registry(jobs.folder / name).resolve("cup") for name in (way, "local"))
    assert ours.revision == theirs.revision == jobs.adapters(way)["cup"]["revision"]
    ours_weights, theirs_weights = (published_weights(jobs.folder / name, "cup") for name in (way, "local"))
    assert relative_change(ours_weights, theirs_weights) <= LAW
    assert ours.training["history"]["steps"] == theirs.training["history"]["steps"]


def test_the_jobs_were_spread_as_their_specs_say(jobs: Jobs) -> None:
    assert jobs["apart"]["packs"] == [{"ids": ["cup"], "workers": 1}, {"ids": ["mug"], "workers": 1}]
    (pack,) = jobs["batch"]["packs"]
    assert (len(pack["ids"]), pack["workers"]) == (22, [1, 2])
    assert jobs["stream"]["packs"] == [{"ids": [*GOOD[:2], "cup", "mug"], "workers": 2}], "no worker started anew"
    assert {one["outcome"] for one in jobs.adapters("stream").values()} == {"published", "rejected"}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_but_the_registry_and_the_runs_record_is_left(jobs: Jobs, way: str) -> None:
    assert jobs[way]
    keys = stored_files(jobs.folder / way)
    assert not [key for key in keys if "checkpoints" in key]
    runs = {key.split("/")[2] for key in keys if key.startswith("runs/")}
    assert runs <= {"spec.json", "attempts", "progress", "tensorboard", "samples"}
    assert {key.split("/")[0] for key in keys} <= {"runs", "adapters", "aliases", "objects"}


@pytest.mark.parametrize("way", WAYS)
def test_a_task_measures_what_the_process_measures(jobs: Jobs, way: str) -> None:
    ours, theirs = (jobs.adapters(name)["cup"]["metrics"] for name in (way, "local"))
    assert set(ours) == set(theirs) == set(METRICS)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert jobs.progress(way).adapter("cup").metrics == pytest.approx(ours)


def test_of_a_batch_the_bad_ones_fail_alone(jobs: Jobs) -> None:
    outcomes, record = jobs.adapters("batch"), jobs.progress("batch")
    assert jobs["batch"]["code"] == 1
    assert (record.state, record.reason, record.attempt) == ("failed", None, 1)
    published = {"cup", *GOOD}
    assert {one for one in outcomes if outcomes[one]["outcome"] == "published"} == published
    assert {one.adapter_id for one in open_registry(jobs.folder / "batch").list()} == {*published, "mug"}
    for name in published:
        standing, manifest = record.adapter(name), open_registry(jobs.folder / "batch").resolve(name)
        assert (standing.state, standing.step, standing.reason) == ("published", STEPS, None)
        assert standing.revision == manifest.revision == outcomes[name]["revision"]
        assert open_registry(jobs.folder / "batch").verify(name).problems == ()
        assert set(standing.losses) == {concept.token for concept in manifest.concepts}
    scores = {name: outcomes[name]["metrics"] for name in ("cup", *GOOD[:MEASURED])}
    assert all(set(one) == set(METRICS) for one in scores.values())
    assert len({one["kps"] for one in scores.values()}) == len(scores), "each has its own"
    assert outcomes[GOOD[MEASURED]]["metrics"] == {}


def test_an_adapter_that_diverges_says_so(jobs: Jobs) -> None:
    outcome, standing = jobs.adapters("batch")["diverging"], jobs.progress("batch").adapter("diverging")
    assert (outcome["outcome"], standing.state) == ("failed", "failed")
    assert "not finite at step 1" in outcome["reason"]
    assert standing.reason == outcome["reason"]
    assert "failed diverging" in jobs["batch"]["err"]


def test_photos_that_turn_bad_after_the_check_are_named(jobs: Jobs) -> None:
    outcome, standing = jobs.adapters("batch")["spoilt"], jobs.progress("batch").adapter("spoilt")
    assert (outcome["outcome"], standing.state) == ("failed", "failed")
    assert outcome["reason"].startswith("adapter spoilt: images:")
    assert "1.png: is not a readable image" in outcome["reason"]
    assert standing.reason == outcome["reason"]
    assert "Traceback" not in jobs["batch"]["err"]


def test_the_same_job_again_is_already_done(jobs: Jobs) -> None:
    again, record = jobs.adapters("published again"), jobs.progress("unpublished")
    assert jobs["published again"]["code"] == 0
    assert jobs["published again"]["packs"] == []
    assert (again["cup"]["outcome"], again["mug"]["outcome"]) == ("already published", "rejected")
    assert again["cup"]["metrics"] == jobs.adapters("published")["cup"]["metrics"]
    assert (record.state, record.attempt) == ("done", 2)
    assert [(one.state, one.step) for one in record.adapters] == [("already published", 0), ("rejected", 0)]


def test_what_is_trained_and_not_published_is_only_measured(jobs: Jobs) -> None:
    before = jobs.adapters("unpublished")
    assert [one["outcome"] for one in before.values()] == ["failed", "failed"]
    assert all("the store is away" in one["reason"] for one in before.values())
    after = jobs.adapters("published")
    assert jobs["published"]["packs"] == []
    assert (after["cup"]["outcome"], after["mug"]["outcome"]) == ("published", "rejected")
    assert jobs.progress("unpublished").state == "done"
    ours, theirs = (published_weights(jobs.folder / name, "cup") for name in ("unpublished", "local"))
    assert ours.digest() == theirs.digest()
    assert not [key for key in stored_files(jobs.folder / "unpublished") if "checkpoints" in key]


@pytest.mark.parametrize("name", ["batch", "unpublished"])
def test_an_adapter_that_fails_its_gate_is_rejected(jobs: Jobs, name: str) -> None:
    outcome = jobs.adapters("published" if name == "unpublished" else name)["mug"]
    standing, registry = jobs.progress(name).adapter("mug"), open_registry(jobs.folder / name)
    assert (outcome["outcome"], standing.state) == ("rejected", "rejected")
    if name == "batch":  # the other has run again since, and tells it shorter
        assert standing.reason == outcome["reason"]
    assert outcome["reason"].startswith("kps is ")
    assert outcome["reason"].endswith("it must be >= 2")
    (manifest,) = registry.revisions("mug")
    assert (manifest.status, manifest.revision) == ("rejected", outcome["revision"])
    assert [(one.latest, dict(one.aliases)) for one in registry.list() if one.adapter_id == "mug"] == [(None, {})]


def test_a_rejected_adapter_is_no_failure_of_the_job(jobs: Jobs) -> None:
    assert jobs["published"]["code"] == 0
    assert jobs.progress("unpublished").state == "done"


def test_a_job_leaves_curves_and_pictures(jobs: Jobs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert jobs["apart"]
    (run,) = (jobs.folder / "apart" / "runs").glob("run-*")
    curves = EventAccumulator(str(run / "tensorboard" / "cup")).Reload()
    assert {f"{kind}_loss/sks" for kind in ("identity", "cat")} <= set(curves.Tags()["scalars"])
    assert [point.step for point in curves.Scalars("identity_loss/sks")] == list(range(1, STEPS + 1))
    assert curves.Tags()["images"] == ["samples"]
    pictures = sorted((run / "samples" / "cup").iterdir())
    assert [picture.name for picture in pictures] == [f"{step:08d}.png" for step in (10, 20)]
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            assert min(image.size) >= 16


def test_the_nodes_metrics_tell_of_the_job(jobs: Jobs) -> None:
    found = jobs["apart"]["metrics"]
    assert found["ray_cat_checkpoint_bytes_total"] > 10_000
    exact = {name: value for name, value in ray_plan.METRICS.items() if name != "ray_cat_checkpoint_bytes_total"}
    assert {name: found.get(name) for name in exact} == exact
    assert set(ray_plan.GAUGES) <= set(jobs["apart"]["seen"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("workers", ("cluster.workers: 4096 workers need as many", "ask for at most 2")),
        ("bucket", ("no-such-bucket",)),
        ("secret", ("s3://cluster-", "AWS_SECRET_ACCESS_KEY")),
        ("endpoint", ("http://127.0.0.1:1",)),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    jobs: Jobs, bucket: str | None, name: str, parts: tuple[str, ...]
) -> None:
    told = jobs[name]
    assert told["packs"] == []
    assert_refused(Finished(told["code"], told["out"], told["err"]), *parts)
    assert stored_files(jobs.folder / name) == {}
    if bucket is not None:
        assert name != "secret" or bucket in told["err"]
        assert open_store(f"{bucket}/{name}").list("") == []


def test_a_cluster_that_does_not_answer_is_named(nowhere: subprocess.Popen[str], folder: Path) -> None:
    out, err = nowhere.communicate(timeout=REFUSAL_SECONDS)
    assert_refused(Finished(nowhere.returncode, out, err), "no Ray cluster at 127.0.0.1:1", "check the address")
    assert stored_files(folder / "address") == {}
