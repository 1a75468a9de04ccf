"""Recorders: what the loop reports is what the metrics and TensorBoard show, each step once, also after a resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cat_cluster.errors import OutputError
from cat_cluster.models.base_model import BaseModel
from cat_cluster.store.protocol import check_key
from cat_cluster.telemetry import Metrics, PrometheusBackend
from cat_cluster.training.loss_curves import ConceptLoss
from cat_cluster.training.recorders import TensorBoardRecorder, TrainingMetrics
from cat_cluster.training.step_report import StepReport
from tests.support.tiny_jobs import largest_file
from tests.unit.training.test_loop import SHORT, STEPS, members, train

pytestmark = pytest.mark.slow


def report(step: int, *, loss: float = 0.5, attempt: float = 0.0) -> StepReport:
    losses = {
        "mug": {"sks": ConceptLoss(loss, 0.25, outside=1.5)},
        "tea": {"zwx": ConceptLoss(attempt, None), "<shs>": ConceptLoss(0.125, 0.75)},
    }
    done, steps = {"mug": step, "tea": step + 3}, {"mug": 20, "tea": 23}
    return StepReport(done, steps, 0.5, 6, losses, {}, {"mug": {"sks": 2.0}})


def curves(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in curves(folder).Scalars(tag)]


def series(backend: PrometheusBackend) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(backend.exposition().decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_a_report_fills_the_metrics() -> None:
    backend = PrometheusBackend()
    recorder = TrainingMetrics(Metrics(backend))
    recorder.step(report(1, loss=0.9))
    recorder.step(report(2))
    found = series(backend)
    assert found["cat_training_steps_total",] == 2.0
    assert found["cat_training_rows_total",] == 12.0
    assert found["cat_training_steps_per_second",] == 2.0
    assert found["cat_training_rows_per_second",] == 12.0
    assert found["cat_training_identity_loss", "mug", "sks"] == 0.5
    assert found["cat_training_cat_loss", "tea", "<shs>"] == 0.75
    assert ("cat_training_cat_loss", "tea", "zwx") not in found


def test_a_drop_counts_once_and_not_again_after_a_resume(base: BaseModel) -> None:
    backend = PrometheusBackend()
    recorder = TrainingMetrics(Metrics(backend))
    pack = members(base)
    for view in pack[0].task.concepts[0].moments:
        view[:] = float("nan")
    reports: list[StepReport] = []
    train(base, pack, on_step=lambda one: (recorder.step(one), reports.append(one)))
    assert [set(one.dropped) for one in reports] == [{"mug"}] * STEPS
    assert series(backend)["cat_training_dropped_adapters_total",] == 1.0
    resumed = PrometheusBackend()
    TrainingMetrics(Metrics(resumed)).step(reports[7])
    assert series(resumed)["cat_training_dropped_adapters_total",] == 0.0


def test_tensorboard_shows_what_the_loop_reports(base: BaseModel, tmp_path: Path) -> None:
    recorder = TensorBoardRecorder(tmp_path)
    reports: list[StepReport] = []
    train(base, members(base), on_step=lambda one: (recorder.step(one), reports.append(one)))
    recorder.close()
    speed = {"speed/steps_per_second", "speed/rows_per_second"}
    wanted = {
        "mug": {"identity_loss/sks", "cat_loss/sks", *speed},
        "tea": {f"{loss}/{token}" for loss in ("identity_loss", "cat_loss") for token in ("zwx", "ohwx")} | speed,
        "plain": {"identity_loss/sks", *speed},
    }
    assert {path.name: set(curves(path).Tags()["scalars"]) for path in tmp_path.iterdir()} == wanted
    shown = curve(tmp_path / "tea", "identity_loss/ohwx")
    assert shown == [(one.step, pytest.approx(one.losses["tea"]["ohwx"].identity)) for one in reports]
    assert [step for step, _ in curve(tmp_path / "plain", "identity_loss/sks")] == list(range(1, SHORT + 1))


def test_scales_speed_and_tokens_of_any_letters_are_kept(tmp_path: Path) -> None:
    recorder = TensorBoardRecorder(tmp_path / "made" / "here")
    recorder.step(report(1))
    recorder.flush()
    folder = tmp_path / "made" / "here"
    assert curve(folder / "mug", "alpha_scale/sks") == [(1, 2.0)]
    assert curve(folder / "tea", "cat_loss/<shs>") == [(4, 0.75)], "over its own steps"
    assert curve(folder / "mug", "speed/steps_per_second") == [(1, 2.0)]
    assert curve(folder / "tea", "speed/rows_per_second") == [(4, 12.0)]
    assert curve(folder / "mug", "outside_loss/sks") == [(1, 1.5)]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same-folder", "fetched-from-the-store"])
def test_after_a_resume_every_step_is_shown_once(tmp_path: Path, elsewhere: bool) -> None:
    first, second = tmp_path / "first", tmp_path / "second" if elsewhere else tmp_path / "first"
    killed = TensorBoardRecorder(first)
    for step in range(1, 10):
        killed.step(report(step, attempt=1.0))
    picture = Image.new("RGB", (8, 8), "red")
    killed.images("mug", 3, picture)
    killed.images("mug", 9, picture)
    uploaded = killed.files()
    killed.close()
    resumed = TensorBoardRecorder(second)
    for step in range(6, 13):
        resumed.step(report(step, attempt=2.0))
    resumed.images("mug", 9, Image.new("RGB", (8, 8), "blue"))
    uploaded |= resumed.files()
    assert len(uploaded) == 2 * 2
    assert all(check_key(f"runs/cup/tensorboard/{name}") for name in uploaded)
    shown = tmp_path / "shown"
    shown.mkdir()
    for name, data in uploaded.items():
        (shown / name).parent.mkdir(exist_ok=True)
        (shown / name).write_bytes(data)
    wanted = [(step, 1.0) for step in range(1, 6)] + [(step, 2.0) for step in range(6, 13)]
    assert curve(shown / "tea", "identity_loss/zwx") == [(step + 3, value) for step, value in wanted]
    assert [event.step for event in curves(shown / "mug").Images("samples")] == [3, 9]


def test_files_hold_all_that_was_recorded_so_far(tmp_path: Path) -> None:
    recorder = TensorBoardRecorder(tmp_path)
    assert recorder.files() == {}
    recorder.flush()
    recorder.close()
    recorder.step(report(1))
    one = recorder.files()
    recorder.step(report(2))
    two = recorder.files()
    assert [name.partition("/")[0] for name in one] == ["mug", "tea"]
    assert list(one) == list(two)
    assert all(two[name].startswith(data) and len(two[name]) > len(data) for name, data in one.items())
    recorder.close()
    recorder.close()
    assert recorder.files() == two


def test_nothing_is_kept_of_an_adapter_that_has_left(tmp_path: Path) -> None:
    recorder = TensorBoardRecorder(tmp_path)
    recorder.step(report(1))
    recorder.forget("mug")
    recorder.forget("mug")
    assert [name.partition("/")[0] for name in recorder.files()] == ["tea"]
    assert list(recorder._open_writers) == ["tea"]
    recorder.step(report(2))
    recorder.close()
    assert [step for step, _ in curve(tmp_path / "mug", "alpha_scale/sks")] == [2]


def test_a_picture_is_kept_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    recorder = TensorBoardRecorder(tmp_path)
    recorder.images("mug", 4, Image.fromarray(pixels))
    recorder.close()
    (event,) = curves(tmp_path / "mug").Images("samples")
    assert (event.step, event.width, event.height) == (4, 20, 30)
    (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png")), pixels)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"TensorBoard files: cannot write .*: .*/file is a file, not a folder"):
        TensorBoardRecorder(tmp_path / "file" / "tensorboard")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    recorder = TensorBoardRecorder(tmp_path / "small")
    recorder.step(report(1))

    def go_on() -> None:
        for step in range(2, 100):
            recorder.step(report(step))
            recorder.flush()

    with largest_file(1000), pytest.raises(OutputError, match=r"small.*free space"):
        go_on()
    recorder.step(report(200))
    recorder.close()
    steps = [step for step, _ in curve(tmp_path / "small" / "mug", "alpha_scale/sks")]
    assert (steps[0], steps[-1]) == (1, 200)


def test_tensorboard_is_loaded_by_those_who_use_it_only() -> None:
    code = "import sys, cat_cluster.training.recorders; sys.exit('tensorboard' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
