"""Fine-tuning jobs before a real store: what becomes of a request, who sees it, and how it is followed."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from cat_cluster.errors import StoreError
from cat_cluster.registry import Registry
from cat_cluster.runs.entering import enter_run
from cat_cluster.runs.progress import RunProgress, TokenLoss
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.queue import read_entry
from cat_cluster.runs.run import Run
from cat_cluster.spec.job import load_spec
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.store import LocalStore
from tests.support.counted_stores import CountingStore
from tests.support.ingress_server import Live, assert_refused, until
from tests.support.tiny_jobs import stored_files, write_photos, write_spec
from tests.support.training_http import (
    FILES,
    JOBS,
    KEYS,
    RUNS,
    client_of,
    job_fields,
    photos_zip,
    send,
    training_service,
    zip_of,
)

REVISION = "r-0123456789ab"


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


@pytest.fixture
def live(store: CountingStore) -> Iterator[Live]:
    with training_service(store, KEYS, max_training_steps=900, max_rank=32) as live:
        yield live


@pytest.fixture
def http(live: Live) -> Iterator[httpx2.Client]:
    """A client with the key of ann."""
    with live.http(headers={"authorization": "Bearer ann"}) as client:
        yield client


@pytest.fixture
def file(http: httpx2.Client) -> str:
    return str(send(http, photos_zip(3)).json()["id"])


def of(http: httpx2.Client, key: str) -> httpx2.Client:
    http.headers["authorization"] = f"Bearer {key}"
    return http


def spec_of(store: LocalStore, run_id: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(store.get(f"runs/{run_id}/spec.json"))
    return spec


def test_a_job_is_the_run_that_submit_would_enter(live: Live, store: CountingStore, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "cup", count=3)
    content = zip_of({path.name: path.read_bytes() for path in photos.iterdir()})
    with client_of(live, "ann") as ann:
        file = ann.files.create(file=("photos.zip", content), purpose="fine-tune")
        job = ann.fine_tuning.jobs.create(
            model="base",
            training_file=file.id,
            suffix="my-cup",
            seed=4,
            method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2, "n_epochs": 40}}},
            metadata={"album": "spring"},
            extra_body={
                "token": "sks",
                "class_noun": "cup",
                "alpha": 2.5,
                "rank": 8,
                "training": {"lr_schedule": "constant"},
                "evaluation": {"enabled": False},
                "priority": 3,
                "deadline": "2026-12-01T18:00:00+01:00",
            },
        )
    adapters = [{"id": "my-cup", "concepts": [{"token": "sks", "class_noun": "cup", "images": "cup", "alpha": 2.5}]}]
    training = {"rows_per_concept": 2, "steps": 60, "seed": 4, "rank": 8, "lr_schedule": "constant"}
    spec = load_spec(write_spec(tmp_path / "job.yaml", "base", adapters, training={**training, "learning_rate": 0.001}))
    default = TrainingSpec().learning_rate
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"learning_rate": default})})
    run, is_new = enter_run(spec, store, owner="cli")
    assert (run.run_id, is_new) == (job.id, False), "it waits already"

    stored = spec_of(store, job.id)
    assert stored["storage"] == store.url
    assert stored["adapters"][0]["concepts"][0]["images"].startswith(str(tmp_path / "store" / "files"))
    (key,) = store.list("queue/")
    entry = read_entry(store, key)
    assert (entry.owner, entry.priority, entry.adapters) == (job.organization_id, 3, 1)
    assert entry.deadline == datetime(2026, 12, 1, 17, tzinfo=UTC)
    assert (job.object, job.status, job.model, job.training_file) == ("fine_tuning.job", "queued", "base", file.id)
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert (job.seed, job.metadata, job.validation_file) == (4, {"album": "spring"}, None)
    assert job.hyperparameters.n_epochs == 40


@pytest.mark.parametrize(
    ("given", "training"),
    [
        ({"n_epochs": 100}, {"steps": math.ceil(100 * 3 / 4)}),
        ({"n_epochs": 10, "batch_size": 1}, {"steps": 30, "rows_per_concept": 1}),
        ({"learning_rate_multiplier": 0.5}, {"learning_rate": TrainingSpec().learning_rate * 0.5}),
        ({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}, {}),
    ],
)
def test_openais_hyperparameters_in_this_services_terms(
    http: httpx2.Client, store: CountingStore, file: str, given: dict[str, Any], training: dict[str, Any]
) -> None:
    for fields in (
        {"hyperparameters": given},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}},
    ):
        job = http.post(JOBS, json=job_fields(file, **fields))
        assert job.status_code == 200, job.text
        expected = {**TrainingSpec().model_dump(mode="json"), **training}
        assert spec_of(store, job.json()["id"])["training"] == expected
        assert {**job.json()["hyperparameters"], **given} == job.json()["hyperparameters"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "pocket"}, "model", "is not the base of this service, 'base'"),
    ({"suffix": "My Cup"}, "suffix", "a-z, 0-9 and -"),
    ({"suffix": None}, "suffix", "required"),
    ({"token": None}, "token", "is missing: The concept's rare trigger word"),
    ({"class_noun": None}, "class_noun", "is missing"),
    ({"token": "cup"}, "token", "is a word of the class noun"),
    ({"token": "two words"}, "token", "must be one word"),
    ({"steps": 901}, "steps", "901 is more than 900"),
    ({"steps": 0}, "steps", "greater than or equal to 1"),
    ({"rank": 33}, "rank", "33 is more than 32"),
    ({"learning_rate": -1.0}, "learning_rate", "greater than 0"),
    ({"alpha": -1.0}, "alpha", "greater than or equal to 0"),
    ({"captions": "csv"}, "captions", "auto"),
    ({"template": "a photo"}, "template", "must hold {token}"),
    ({"method": "dpo"}, "method", "'dpo' is no method here: send cat or lora"),
    ({"method": {"type": "dpo"}}, "method", "'dpo' is no method here: send supervised"),
    ({"hyperparameters": {"n_epochs": 3}, "steps": 10}, "n_epochs", "steps was given too"),
    ({"hyperparameters": {"batch_size": 2}, "training": {"rows_per_concept": 2}}, "batch_size", "given too"),
    ({"hyperparameters": {"learning_rate_multiplier": 2}, "learning_rate": 0.1}, "learning_rate_multiplier", "too"),
    ({"hyperparameters": {"learning_rate_multiplier": 2}, "training": {"optimizer": "prodigy"}},
     "learning_rate_multiplier", "is of the learning rate of adamw"),
    ({"hyperparameters": {}, "method": {"type": "supervised"}}, "hyperparameters", "were given twice"),
    ({"steps": 5, "training": {"steps": 5}}, "steps", "was given twice"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater"),
    ({"training": {"stepz": 5}}, "training.stepz", "unknown key; did you mean steps?"),
    ({"training": {"rank": 2, "general_prompts": "/etc/passwd"}}, "training.general_prompts", "is a file"),
    ({"training": {"rows_per_concept": 65}}, "training.rows_per_concept", "65 is more than 64"),
    ({"training": {"crops_per_image": 10**6}}, "training.crops_per_image", "more than 64"),
    ({"evaluation": {"judge": "/models/clip"}}, "evaluation.judge", "is none of auto, pocket"),
    ({"evaluation": {"images_per_prompt": 65}}, "evaluation.images_per_prompt", "65 is more than 64"),
    ({"evaluation": {"steps": 201}}, "evaluation.steps", "201 is more than 200"),
    ({"validation_file": "file-1"}, "validation_file", "leave it out"),
    ({"integrations": [{"type": "wandb"}]}, "integrations", "leave them out"),
    ({"priority": 101}, "priority", "less than or equal to 100"),
    ({"deadline": "tomorrow"}, "deadline", "write a time as ISO 8601"),
    ({"deadline": "2026-12-01T18:00:00"}, "deadline", "give the zone"),
    ({"steps": "many"}, "steps", "integer"),
    ({"n_epochs": 3}, "n_epochs", "no such parameter"),
    ({"storage": "s3://elsewhere/x"}, "storage", "no such parameter"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"training_file": "file-1"}, "training_file", "pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "told"), REFUSED, ids=[f"{one[1]}-{n}" for n, one in enumerate(REFUSED)])
def test_what_cannot_be_done_is_refused_by_its_field(
    http: httpx2.Client, store: CountingStore, file: str, fields: dict[str, Any], param: str, told: str
) -> None:
    before = stored_files(store.folder)
    response = http.post(JOBS, json=job_fields(file, **fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert told in error["message"]
    assert str(store.folder) not in error["message"]
    assert stored_files(store.folder) == before


def test_photos_that_training_would_refuse_are_refused_by_name(http: httpx2.Client, store: CountingStore) -> None:
    content = photos_zip(2, **{"0__txt": b"a cup", "1__txt": b"a sks cup"})
    file = send(http, content).json()["id"]
    error = assert_refused(http.post(JOBS, json=job_fields(file)), 400, "invalid_value", "captions")
    assert f"captions: {file}: 1 of 2 captions lack the token 'sks'" in error["message"]
    assert "0.txt" in error["message"] or "0.png" in error["message"]
    assert "/" not in error["message"].replace("text/plain", "")
    masked = http.post(JOBS, json=job_fields(file, captions="template", training={"masked_loss": True}))
    error = assert_refused(masked, 400, "invalid_value", "training.masked_loss")
    assert "no photo has a mask" in error["message"]
    assert store.list("runs/") == store.list("queue/") == []


def test_callers_see_and_cancel_their_own_jobs_alone(live: Live, http: httpx2.Client, file: str) -> None:
    job = http.post(JOBS, json=job_fields(file)).json()["id"]
    paths = (f"{JOBS}/{job}", f"{JOBS}/{job}/events", f"{JOBS}/{job}/events?stream=true", f"{JOBS}/{job}/checkpoints",
             f"{RUNS}/{job}")  # fmt: skip
    of(http, "bob")
    for path in paths:
        assert_refused(http.get(path), 404, "run_not_found")
    for path in (f"{JOBS}/{job}/cancel", f"{RUNS}/{job}/stop"):
        assert_refused(http.post(path), 404, "run_not_found")
    assert http.get(JOBS).json()["data"] == http.get(RUNS).json()["data"] == []
    assert_refused(http.get(f"{RUNS}?all=true"), 403, "admin_only")
    assert_refused(http.get(f"{JOBS}?after={job}"), 400, "invalid_value", "after")
    of(http, "master")
    for path in paths[:2]:
        assert http.get(path).status_code == 200
    assert [run["id"] for run in http.get(f"{RUNS}?all=true").json()["data"]] == [job]
    assert http.post(f"{JOBS}/{job}/cancel").json()["status"] == "cancelled"
    assert of(http, "ann").get(f"{JOBS}/{job}").json()["status"] == "cancelled"


def test_the_name_of_an_adapter_is_whose_first_trained_it(http: httpx2.Client, store: CountingStore, file: str) -> None:
    assert http.post(JOBS, json=job_fields(file)).status_code == 200
    theirs = send(of(http, "bob"), photos_zip(2)).json()["id"]
    error = assert_refused(http.post(JOBS, json=job_fields(theirs)), 409, "conflict")
    assert "my-cup is an adapter of somebody else: choose another name" in error["message"]
    assert http.post(JOBS, json=job_fields(theirs, "bobs-cup")).status_code == 200
    assert of(http, "ann").post(JOBS, json=job_fields(file, steps=7)).status_code == 200, "her own, once more"
    admins = send(of(http, "master"), photos_zip(1)).json()["id"]
    assert http.post(JOBS, json=job_fields(admins)).status_code == 200


def test_a_published_adapter_of_nobody_is_the_admins(
    http: httpx2.Client, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "summary", lambda registry, adapter_id: adapter_id == "old-cup" or None)
    assert_refused(http.post(JOBS, json=job_fields(file, "old-cup")), 409, "conflict")
    assert http.post(JOBS, json=job_fields(file, "new-cup")).status_code == 200


def test_a_job_that_is_cancelled_and_asked_for_again_goes_on(
    http: httpx2.Client, store: CountingStore, file: str
) -> None:
    first = http.post(JOBS, json=job_fields(file)).json()
    assert http.post(f"{JOBS}/{first['id']}/cancel").json()["status"] == "cancelled"
    again = http.post(JOBS, json=job_fields(file)).json()
    assert (again["id"], again["status"], again["created_at"]) == (first["id"], "queued", first["created_at"])
    assert [job["id"] for job in http.get(JOBS).json()["data"]] == [first["id"]]


def worked_on(store: LocalStore, run_id: str, **changes: Any) -> ProgressWriter:
    """A driver that has claimed the run and keeps its record."""
    run = Run(store, run_id)
    attempt = run.claim_after(run.last_attempt(), "default")
    assert attempt is not None
    begun = RunProgress.begin(run_id, run.read_spec(), state="running", attempt=attempt.number)
    return ProgressWriter(attempt, begun, interval=0.0).__enter__()


def test_the_words_for_how_far_a_job_is(http: httpx2.Client, store: CountingStore, file: str) -> None:
    job = http.post(JOBS, json=job_fields(file)).json()["id"]

    def now() -> dict[str, Any]:
        found: dict[str, Any] = http.get(f"{JOBS}/{job}").json()
        return found

    assert now()["status"] == "queued"
    driver = worked_on(store, job)
    assert now()["status"] == "validating_files"
    driver.adapter("my-cup", revision=REVISION)
    until(lambda: now()["status"] == "queued")
    driver.adapter("my-cup", state="training", step=20, losses={"sks": TokenLoss(identity=0.25)})
    until(lambda: now()["status"] == "running")
    assert now()["cat"]["step"] == 20
    driver.adapter("my-cup", state="evaluating")
    until(lambda: now()["cat"]["phase"] == "evaluating")
    assert now()["status"] == "running"
    driver.adapter("my-cup", state="published", step=300, metrics={"kps": 0.3})
    until(lambda: now()["fine_tuned_model"] == f"my-cup@{REVISION}")
    driver.update(state="done")
    driver.__exit__(None, None, None)
    done = now()
    assert (done["status"], done["error"], done["cat"]["metrics"]) == ("succeeded", None, {"kps": 0.3})
    assert done["finished_at"] >= done["created_at"]
    assert_refused(http.post(f"{JOBS}/{job}/cancel"), 409, "conflict")
    (point,) = http.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    assert (point["fine_tuned_model_checkpoint"], point["step_number"]) == (f"my-cup@{REVISION}", 300)


def test_a_job_that_fails_and_one_that_is_stopped_say_so(http: httpx2.Client, store: CountingStore, file: str) -> None:
    bad, stopped = (http.post(JOBS, json=job_fields(file, name)).json()["id"] for name in ("bad", "stopped"))
    driver = worked_on(store, bad)
    driver.adapter("bad", state="failed", reason="adapter bad: a gradient is not finite")
    driver.__exit__(None, None, None)
    job = http.get(f"{JOBS}/{bad}").json()
    assert (job["status"], job["fine_tuned_model"]) == ("failed", None)
    assert job["error"] == {
        "code": "training_failed",
        "message": "adapter bad: a gradient is not finite",
        "param": None,
    }
    assert http.get(f"{JOBS}/{bad}/events").json()["data"][0]["level"] == "error"

    driver = worked_on(store, stopped)
    driver.adapter("stopped", state="training", step=5)
    until(lambda: http.get(f"{JOBS}/{stopped}").json()["status"] == "running")
    asked = http.post(f"{JOBS}/{stopped}/cancel").json()
    assert (asked["status"], asked["cat"]["is_stopping"]) == ("running", True), "until its driver has seen it"
    driver.update(state="stopped")
    driver.__exit__(None, None, None)
    assert http.get(f"{JOBS}/{stopped}").json()["status"] == "cancelled"


def test_events_are_polled_page_by_page(live: Live, http: httpx2.Client, store: CountingStore, file: str) -> None:
    job = http.post(JOBS, json=job_fields(file)).json()["id"]
    driver = worked_on(store, job)
    losses = {"sks": TokenLoss(identity=0.5, cat=0.1)}
    driver.adapter("my-cup", state="training", step=40, revision=REVISION, losses=losses)
    until(lambda: http.get(f"{JOBS}/{job}").json()["cat"]["step"] == 40)
    with client_of(live, "ann") as ann:
        events = list(ann.fine_tuning.jobs.list_events(job, limit=1))
        assert [event.type for event in events] == ["metrics", "message", "message"]
        assert events[0].message == "my-cup: step 40 of 300"
        assert events[1].message == "The training service default began with it (attempt 1)"
        data: Any = events[0].data
        assert (data["step"], data["total_steps"], data["train_loss"]) == (40, 300, 0.5)
        assert data["losses"]["sks"]["cat"] == 0.1
        store.put(f"checkpoints/my-cup/{REVISION}/00000025.json", b"{}")
        store.put(f"checkpoints/my-cup/{REVISION}/00000025.safetensors", b"")
        (point,) = ann.fine_tuning.jobs.checkpoints.list(job)
        assert (point.step_number, point.fine_tuned_model_checkpoint) == (25, None)
    for query in ("after=run-1", "limit=0", "limit=x", "stream=perhaps"):
        assert http.get(f"{JOBS}/{job}/events?{query}").status_code == 400
    driver.__exit__(None, None, None)


def test_events_are_streamed_until_the_job_has_ended(http: httpx2.Client, store: CountingStore, file: str) -> None:
    job = http.post(JOBS, json=job_fields(file)).json()["id"]

    def train() -> None:
        driver = worked_on(store, job)
        for step in (10, 20):
            driver.adapter("my-cup", state="training", step=step, revision=REVISION)
            time.sleep(2.5)
        driver.adapter("my-cup", state="published", step=300)
        driver.update(state="done")
        driver.__exit__(None, None, None)

    training = threading.Thread(target=train)
    training.start()
    with http.stream("GET", f"{JOBS}/{job}/events?stream=true") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    training.join()
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == ["data: [DONE]"]
    events = [json.loads(lines[2].removeprefix("data: ")) for lines in blocks[:-1]]
    assert [lines[0] for lines in blocks[:-1]] == [f"id: {event['id']}" for event in events]
    told = [event["message"] for event in events]
    assert told[0] == f"Created {job}"
    assert told[-2:] == [f"Published my-cup@{REVISION}", "Done"]
    assert {"my-cup: step 10 of 300", "my-cup: step 20 of 300"} <= set(told)
    assert len(set(told)) == len(told), "none twice"
    rest = http.get(f"{JOBS}/{job}/events?stream=true", headers={"last-event-id": events[-2]["id"]}).text
    assert rest.count("data: ") == 2, "the last event and the end"


def test_streams_are_so_many_and_outlast_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    with training_service(store, {"CAT_API_KEYS": "ann,bob"}, max_event_streams=2) as live, live.http() as http:
        if of(http, "ann"):
            file = send(http, photos_zip()).json()["id"]
            job = http.post(JOBS, json=job_fields(file)).json()["id"]
            with http.stream("GET", f"{JOBS}/{job}/events?stream=true") as first:
                lines = first.iter_lines()
                assert next(lines).startswith("id: ")
                second = http.get(f"{JOBS}/{job}/events?stream=true")
                assert_refused(second, 429, "rate_limit_exceeded")
                monkeypatch.setattr(LocalStore, "get", away)
                time.sleep(6)
                monkeypatch.undo()
                http.post(f"{JOBS}/{job}/cancel")
                assert "data: [DONE]" in list(lines)
            until(lambda: live.app.state.ingress.access._streams == 0)
            assert http.get(f"{JOBS}/{job}/events?stream=true").status_code == 200


def away(store: LocalStore, key: str) -> bytes:
    raise StoreError("away")


def test_a_page_costs_what_it_shows(live: Live, http: httpx2.Client, store: CountingStore, file: str) -> None:
    ids = [http.post(JOBS, json=job_fields(file, f"cup-{number}")).json()["id"] for number in range(5)]

    def cost() -> int:
        store.forget()
        assert [job["id"] for job in http.get(f"{JOBS}?limit=2").json()["data"]] == ids[:-3:-1]
        return store.calls.total()

    few = cost()
    with client_of(live, "ann") as ann:
        assert [job.id for job in ann.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    ids += [http.post(JOBS, json=job_fields(file, f"mug-{number}")).json()["id"] for number in range(5)]
    assert cost() == few <= 12
    run = {
        "name": "a",
        "adapters": [{"id": "jar", "concepts": [{"token": "sks", "class_noun": "jar", "images": file}]}],
    }
    whole = http.post(RUNS, json=run).json()["id"]
    assert [run["id"] for run in http.get(f"{RUNS}?limit=1").json()["data"]] == [whole]
    assert whole not in [job["id"] for job in http.get(JOBS).json()["data"]]
    assert [run["id"] for run in http.get(f"{RUNS}?limit=3&after={whole}").json()["data"]] == ids[:-4:-1]


def test_an_unknown_file_is_not_found(http: httpx2.Client) -> None:
    gone = "file-anonymous-" + "0" * 24
    assert_refused(http.post(JOBS, json=job_fields(gone)), 404, "file_not_found", "training_file")
    assert_refused(http.get(f"{FILES}/{gone}"), 404, "file_not_found")
    for path in ("file-1", "..%2f..", "file-ann-" + "0" * 24):
        assert_refused(http.get(f"{FILES}/{path}"), 404, "file_not_found" if "%" not in path else "not_found")


def test_the_client_reports_a_refusal(live: Live) -> None:
    with client_of(live, "ann") as ann, pytest.raises(openai.NotFoundError) as refused:
        ann.fine_tuning.jobs.retrieve("run-0123456789ab")
    assert refused.value.code == "run_not_found"
