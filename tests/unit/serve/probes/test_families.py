"""Canonical probes of adapters of each family: what a service draws again has the scores that training measured."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.models.base_model import load_base_model
from cat_cluster.pipeline.job import run_job
from cat_cluster.spec.job import JobSpec
from serve.settings import ProbeSettings
from tests.support.services import Shop, open_service
from tests.unit.pipeline.test_start import Place

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]

MEASURED = {"prompts": ["a picture of a {}", "a {} in snow"], "images_per_prompt": 1, "steps": 2, "judge": "pocket"}


@pytest.mark.parametrize("trains_text", [False, True])
@pytest.mark.parametrize("family", ["tiny_base_folder", "tiny_xl_folder", "tiny_xl_v_folder"])
def test_a_probe_finds_the_scores_of_the_manifest_and_a_damaged_slot(
    request: pytest.FixtureRequest, family: str, trains_text: bool, tmp_path: Path
) -> None:
    place = Place(tmp_path, request.getfixturevalue(family))
    text: dict[str, Any] = {"text_encoder": {}} if trains_text else {}
    job = place.job("cup", learning_rate=0.3, **text).model_dump(mode="json")
    [result] = run_job(JobSpec.model_validate({**job, "evaluation": MEASURED}), place.store, place.settings)
    assert result.manifest is not None, result.reason
    assert bool(result.manifest.text_layers) == trains_text
    shop = Shop(place.base, load_base_model(str(place.base)), place.registry)

    async def probed() -> tuple[dict[str, Any], dict[str, Any]]:
        async with open_service(shop, probes=ProbeSettings(canonical_every_s=1e6)) as service:
            sound = await service.admin("probe", "cup")
            for slot, _ in service._parts.cache._slots.held():
                slot.flat.zero_()
            return sound, await service.admin("probe", "cup")

    sound, damaged = asyncio.run(probed())
    assert sound["verdict"] == "ok", sound["reason"]
    assert sound["scores"] == pytest.approx(sound["expected"], abs=0.005)
    assert sound["expected"]["base_drift"] > 0.01, "the adapter does nothing, so nothing was compared"
    assert damaged["verdict"] == "alarm"
