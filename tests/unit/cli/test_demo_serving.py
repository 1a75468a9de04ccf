"""What the demo asks the service for: stacks beside the base and their adapters alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_cluster.cli.demo_serving import SEED, DemoService, StackRow, draw_stacks
from cat_cluster.evaluation.grid import Picture
from cat_cluster.models.base_model import load_base_model
from tests.support.ingress_server import Live, ask, furnish, serving
from tests.support.serving import publish_random

pytestmark = pytest.mark.slow

ADAPTERS = ("bowl", "jug")
PROMPTS = ("a picture of a sks cup in snow", "a picture of a zwx fish in snow", "a picture of a cup in snow")


@pytest.fixture(scope="module")
def live(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    shop = furnish(tiny_base_folder, tmp_path_factory.mktemp("shop"))
    base = load_base_model(str(tiny_base_folder))
    for seed, adapter in enumerate(ADAPTERS):
        publish_random(shop.registry, base, adapter, seed)
    with serving(shop) as live:
        yield live


def drawn(live: Live, model: str | None, prompt: str) -> Picture:
    with live.http() as http:
        answer = ask(http, model=model, prompt=prompt, seed=SEED, num_inference_steps=25).json()
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        return np.asarray(image.convert("RGB"))


def test_stacks_stand_beside_the_base_and_their_adapters_alone(live: Live) -> None:
    photo = np.zeros((8, 8, 3), dtype=np.uint8)
    rows = [StackRow(prompt, place, photo) for prompt, place in zip(PROMPTS, (0, 1, 0), strict=True)]
    stacks = draw_stacks(DemoService(live.url), {"CAT": ADAPTERS}, rows)
    columns = [(column.block, column.title) for column in stacks.grid.columns]
    assert columns == [
        ("Untouched", "Base model"),
        ("CAT", "One adapter"),
        ("CAT", "Stack of 2"),
        ("The concept", "Photos"),
    ]
    assert stacks.grid.prompts == PROMPTS
    alone = ("bowl", "jug", "bowl")
    for row, prompt in enumerate(PROMPTS):
        base, one, stack, shown = (column.pictures[row] for column in stacks.grid.columns)
        wanted = [drawn(live, model, prompt) for model in (None, alone[row], "bowl+jug")]
        for picture, other in zip((base, one, stack), wanted, strict=True):
            assert picture is not None
            assert np.abs(picture.astype(int) - other).max() <= 1
        assert np.abs(wanted[1].astype(int) - wanted[2]).max() > 1
        assert shown is photo
    assert stacks.to_json() == {
        "adapters": {"CAT": ["bowl", "jug"]},
        "prompts": list(PROMPTS),
        "seeds": [SEED] * 3,
    }
