"""What a failure of training or measuring becomes: an error with its remedy, or a result that says whether it lasts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cat_cluster.errors import ChangedJobError, OutOfMemoryError, StoreError
from cat_cluster.evaluation.evaluate import EvaluationMemory
from cat_cluster.models import base_model
from cat_cluster.pipeline import job
from cat_cluster.pipeline.job import finish_adapter, pack_size, train_adapters
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.training.loop import TrainedAdapter

SHORT = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes.")
ADAPTER: Any = SimpleNamespace(
    resolved=SimpleNamespace(id="cup", training=SimpleNamespace(rank=4, text_encoder=None)),
    revision="r-0123456789ab",
    base=None,
    rows=1,
)
DROPPED = TrainedAdapter("cup", None, "gradient not finite at step 1", {})
JOB = JobSpec.model_validate(
    {"name": "a", "adapters": [{"id": "cup", "concepts": [{"token": "sks", "class_noun": "cup", "images": "photos"}]}]}
)


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_training_that_runs_out_of_memory_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "open_bank", failing(SHORT))
    with pytest.raises(OutOfMemoryError, match=r"2\.00 GiB more were asked for.*\(here 3 trained together\)"):
        train_adapters([ADAPTER] * 3, JOB, None, Settings(), on_step=lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(OutOfMemoryError, match=r"\(here 2 trained together\)"):
        pack_size([ADAPTER] * 3, "auto", Settings())


def test_a_base_that_does_not_fit_is_not_called_damaged(tmp_path: Any) -> None:
    with pytest.raises(OutOfMemoryError, match=r"2\.00 GiB more"), base_model._naming_damage(tmp_path):
        raise SHORT


@pytest.mark.parametrize(
    ("error", "reason", "permanent"),
    [
        (SHORT, "out of memory: 2.00 GiB more were asked for", True),
        (StoreError("the store is away"), "the store is away", False),
        (ChangedJobError("its photos changed"), "its photos changed", False),
        (None, "gradient not finite at step 1", True),
    ],
)
def test_a_result_says_whether_its_failure_lasts(
    error: Exception | None, reason: str, permanent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error is not None:
        monkeypatch.setattr(job, "_finish", failing(error))
    monkeypatch.setattr(job, "checkpoints_of", lambda *_: SimpleNamespace(clear=lambda: None))
    registry: Any = SimpleNamespace(store=None)
    result = finish_adapter(ADAPTER, DROPPED, registry, 1.0, lambda *_: None, EvaluationMemory())
    assert (result.outcome, result.revision, result.permanent) == ("failed", "r-0123456789ab", permanent)
    assert (result.reason or "").startswith(reason)
