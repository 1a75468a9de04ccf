"""A service that checks its images: what is refused is seen by nobody, and what is marked is unchanged."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from cat_cluster.errors import SpecError
from serve.calls import Accepted, FileFormat, Finished, ImageCall, Preview, Progress, Refused, Verdict
from serve.denoise.safety import SafetyChecker
from serve.settings import SafetySettings
from tests.support.classifiers import pipeline_scores, write_classifier
from tests.support.ingress_server import PATH, Live, events_of, furnish, serving
from tests.support.services import CUP, Shop, events, open_service, pixels, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]
CALL = replace(CUP, count=3, previews=2, progress=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def drawn_by(shop: Shop, call: ImageCall, **settings: Any) -> tuple[list[Any], dict[str, Any], str]:
    """A service's events for a call, its status, and its metrics."""
    kept: list[Any] = []

    async def main() -> None:
        async with open_service(shop, **settings) as service:
            kept.extend([await events(service, call), await service.status(), (await service.metrics()).decode()])

    run(main)
    return kept[0], kept[1], kept[2]


def finished(found: list[Any]) -> dict[int, Finished]:
    return {event.index: event for event in found if isinstance(event, Finished)}


def samples(exposition: str, name: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(exposition)
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {tuple(sample.labels[key] for key in sorted(sample.labels)): sample.value for sample in found}


@pytest.fixture(scope="module")
def oracle(shop: Shop, folder: Path) -> dict[int, tuple[Finished, float]]:
    """Each image as a service without a checker draws it, and what transformers' pipeline says of it."""
    images = finished(drawn_by(shop, CALL)[0])
    assert {event.safety for event in images.values()} == {None}
    scores = pipeline_scores(folder, *(images[index].image for index in range(3)))
    return {index: (images[index], scores[index]["odd"]) for index in range(3)}


def between(oracle: dict[int, tuple[Finished, float]]) -> float:
    """A threshold with one or two of the three scores above it."""
    low, middle, high = sorted(score for _, score in oracle.values())
    assert high - low > 1e-3
    return (low + middle) / 2 if middle - low > high - middle else (middle + high) / 2


def test_flagged_images_are_refused_and_the_others_are_what_they_are_without_a_checker(
    shop: Shop, folder: Path, oracle: dict[int, tuple[Finished, float]]
) -> None:
    threshold = between(oracle)
    safety = SafetySettings(model=folder, labels=("odd",), threshold=threshold)
    found, status, metrics = drawn_by(shop, CALL, safety=safety)
    bad = {index for index, (_, score) in oracle.items() if score >= threshold}
    assert 0 < len(bad) < 3
    refused = {event.index: event for event in found if isinstance(event, Refused)}
    assert set(refused) == bad
    assert {(event.seed, event.failure.kind) for event in refused.values()} == {
        (CALL.seed + index, "FlaggedImageError") for index in bad
    }
    assert set(finished(found)) == {0, 1, 2} - bad
    for index, event in finished(found).items():
        assert event.image == oracle[index][0].image
        assert event.safety == Verdict(False, "odd", pytest.approx(oracle[index][1], abs=1e-4))
    # Nothing of an image is seen before its check, and the caller is told.
    assert not [event for event in found if isinstance(event, Preview)]
    assert [event for event in found if isinstance(event, Progress)]
    (accepted,) = [event for event in found if isinstance(event, Accepted)]
    assert "partial_images: no previews are sent" in (accepted.note or "")
    assert status["safety"] == {
        "model": str(folder), "labels": ["odd"], "threshold": threshold, "action": "refuse"
    }  # fmt: skip
    assert samples(metrics, "cat_serve_safety_images_total") == {
        ("refuse", "flagged"): len(bad), ("refuse", "passed"): 3 - len(bad)
    }  # fmt: skip
    assert samples(metrics, "cat_serve_safety_seconds_count") == {(): 3}
    assert samples(metrics, "cat_serve_images_total") == {("refused",): len(bad), ("done",): 3 - len(bad)}


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_marked_images_are_unchanged_and_say_so(
    shop: Shop, folder: Path, oracle: dict[int, tuple[Finished, float]], kind: str
) -> None:
    threshold = between(oracle)
    safety = SafetySettings(model=folder, labels=("odd",), threshold=threshold, action="mark")
    call = replace(CALL, file=FileFormat(kind))
    plain = finished(drawn_by(shop, call)[0])
    found, _, metrics = drawn_by(shop, call, safety=safety)
    assert [event for event in found if isinstance(event, Preview)]
    assert len(finished(found)) == 3
    for index, event in finished(found).items():
        flagged = oracle[index][1] >= threshold
        assert event.safety == Verdict(flagged, "odd", pytest.approx(oracle[index][1], abs=1e-4))
        np.testing.assert_array_equal(pixels(event.image), pixels(plain[index].image))
        said = Image.open(io.BytesIO(event.image))
        exif = said.getexif().get(0x010E)
        text = said.text if kind == "png" else json.loads(str(exif))  # type: ignore[attr-defined]
        assert text.get("safety") == ("flagged" if flagged else None)
        assert text["prompt"] == call.prompt
    assert samples(metrics, "cat_serve_safety_images_total")["mark", "flagged"] >= 1


@pytest.mark.parametrize("action", ["refuse", "mark"])
def test_a_checker_that_fails_lets_no_image_pass_for_a_checked_one(
    shop: Shop, folder: Path, action: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    safety = SafetySettings(model=folder, labels=("odd",), threshold=1.0, action=action)
    checked = SafetyChecker.scores
    asked: list[int] = []

    def fail(self: SafetyChecker, images: list[Any]) -> Any:
        asked.append(len(images))
        if len(asked) > 1:  # not at the start
            raise MemoryError("no room")
        return checked(self, images)

    monkeypatch.setattr(SafetyChecker, "scores", fail)
    with caplog.at_level(logging.ERROR):
        found, _, metrics = drawn_by(shop, replace(CALL, previews=0), safety=safety)
    assert "the safety checker failed" in caplog.text
    assert samples(metrics, "cat_serve_safety_images_total") == {(action, "unchecked"): 3}
    if action == "refuse":
        assert not finished(found)
        assert {event.failure.kind for event in found if isinstance(event, Refused)} == {"UncheckedImageError"}
    else:
        for event in finished(found).values():
            assert event.safety == Verdict(None)
            assert Image.open(io.BytesIO(event.image)).text["safety"] == "not checked"  # type: ignore[attr-defined]


def test_a_service_does_not_start_with_a_checker_that_cannot_be_loaded(shop: Shop, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_service(shop, safety=SafetySettings(model=tmp_path, labels=("odd",))):
            pytest.fail("it started")

    with pytest.raises(SpecError, match=r"^safety\.model: .*config\.json is not there"):
        run(main)


@contextmanager
def checked(base: Path, storage: Path, safety: SafetySettings) -> Iterator[tuple[Live, openai.OpenAI]]:
    with (
        serving(furnish(base, storage, safety=safety)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=2) as client,
    ):
        yield live, client


REQUEST: dict[str, Any] = {"prompt": "a cup", "num_inference_steps": 2, "seed": 5}


def test_over_http_a_refused_call_is_an_error_that_no_client_tries_again(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    folder = write_classifier(tmp_path / "model", certain="odd")
    with checked(tiny_base_folder, tmp_path / "storage", SafetySettings(model=folder, labels=("odd",))) as found:
        live, client = found
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="a cup", n=2, extra_body={"num_inference_steps": 2, "seed": 5})
        assert refused.value.code == "content_flagged"
        assert "2 of 2 images (seed 5, 6): " in refused.value.message
        with live.http() as http:
            streamed = events_of(http.post(PATH, json={**REQUEST, "stream": True, "partial_images": 2}))
            assert [name for name, _ in streamed] == ["error"]
            assert streamed[0][1]["error"]["code"] == "content_flagged"
            assert "b64_json" not in json.dumps(streamed)
        with (
            pytest.raises(openai.APIError, match="takes it for 'odd'"),
            client.images.generate(prompt="a cup", stream=True, extra_body={"num_inference_steps": 2}) as stream,
        ):
            pytest.fail(f"it saw {list(stream)}")


def test_over_http_a_call_keeps_the_images_that_are_not_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model")
    shop = furnish(tiny_base_folder, tmp_path / "plain")
    with serving(shop) as live, live.http() as http:
        plain = [
            base64.b64decode(item["b64_json"]) for item in http.post(PATH, json={**REQUEST, "n": 3}).json()["data"]
        ]
    scores = [found["odd"] for found in pipeline_scores(folder, *plain)]
    low, middle, high = sorted(scores)
    threshold = (low + middle) / 2 if middle - low > high - middle else (middle + high) / 2
    bad = [index for index, score in enumerate(scores) if score >= threshold]
    good = [index for index in range(3) if index not in bad]
    assert bad
    assert good

    safety = SafetySettings(model=folder, labels=("odd",), threshold=threshold)
    with checked(tiny_base_folder, tmp_path / "storage", safety) as (live, client), live.http() as http:
        response = http.post(PATH, json={**REQUEST, "n": 3})
        body = response.json()
        assert response.status_code == 200
        assert response.headers["x-cat-safety"] == "flagged"  # the worst of all, of those in cat.refused too
        assert [item["seed"] for item in body["data"]] == [5 + index for index in good]
        assert [(one["index"], one["seed"], one["error"]["code"]) for one in body["cat"]["refused"]] == [
            (index, 5 + index, "content_flagged") for index in bad
        ]
        # What a program that knows only OpenAI does with it.
        images = client.images.generate(prompt="a cup", n=3, extra_body={"num_inference_steps": 2, "seed": 5}).data
        assert images is not None
        assert len([base64.b64decode(image.b64_json or "") for image in images]) == len(good)
        # More previews are asked for than there are steps: none are sent, and the note says that alone.
        streamed = events_of(http.post(PATH, json={**REQUEST, "n": 3, "stream": True, "partial_images": 8}))
        assert {data["cat"]["note"] for name, data in streamed if name == "image_generation.completed"} == {
            "partial_images: no previews are sent, since this service may refuse the image"
        }
        assert {name: data for name, data in streamed if name == "error"}["error"]["error"]["code"] == "content_flagged"
        completed = [data["index"] for name, data in streamed if name == "image_generation.completed"]
        assert sorted(completed) == good
        assert streamed[-1][0] == "error"

    marking = safety.model_copy(update={"action": "mark"})
    with checked(tiny_base_folder, tmp_path / "marked", marking) as (live, _), live.http() as http:
        response = http.post(PATH, json={**REQUEST, "n": 3})
        assert response.headers["x-cat-safety"] == "flagged"
        found = [item["safety"] for item in response.json()["data"]]
        assert [one["flagged"] for one in found] == [index in bad for index in range(3)]
        assert [one["score"] for one in found] == pytest.approx(scores, abs=1e-4)
        assert {one["label"] for one in found} == {"odd"}
        assert "refused" not in response.json()["cat"]
