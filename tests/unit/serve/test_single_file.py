"""A service whose base is a checkpoint in one file draws what stock diffusers draws from that file, in a mixed batch.

The adapters were made for the base's folder, and change text encoders too.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from cat_cluster.models import single_file
from cat_cluster.models.base_model import load_base_model
from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from tests.conftest import TINY_MERGES
from tests.support.denoised_images import stock_scheduler
from tests.support.ldm_files import write_checkpoint
from tests.support.services import CUP, LEVELS, Shop, pixels, stack, stock_picture
from tests.support.text_adapters import kohya_file, whole_adapter
from tests.unit.serve.test_stacks import Nobody
from tests.unit.serve.test_text_adapters import answers, furthest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]

CALLS = [
    CUP,
    replace(CUP, adapters=stack("plain:0.5"), size=(24, 16), negative_prompt="red", seed=12),
    replace(CUP, adapters=(), seed=13),
    replace(CUP, adapters=stack("cup:0.5", "plain"), size=(16, 24), guidance=1.0, seed=14),
]


@dataclass(frozen=True)
class Checkpoint:
    """A base as a file, and the folder it was written from."""

    file: Path
    folder: Path
    xl: bool

    def stock_pipeline(self) -> Any:
        """What a user of diffusers makes of the file."""
        kind = StableDiffusionXLPipeline if self.xl else StableDiffusionPipeline
        pipeline = kind.from_single_file(str(self.file), config=str(self.folder), local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = stock_scheduler("ddim", pipeline.scheduler.config)
        return pipeline


@pytest.fixture(params=["sd1", "sdxl"])
def checkpoint(
    request: pytest.FixtureRequest,
    tiny_base_folder: Path,
    tiny_xl_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Checkpoint:
    """A tiny checkpoint; the configs of its family, which ship of full size, are tiny here."""
    tiny, families = tiny_xl_folder if request.param == "sdxl" else tiny_base_folder, tmp_path / "families"
    shutil.copytree(tiny, families / request.param, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    folder = Path(shutil.copytree(tiny, tmp_path / "folder", ignore=shutil.ignore_patterns("tokenizer*")))
    (families / "clip_merges.txt").write_text("#version: 0.2\n" + "\n".join(TINY_MERGES) + "\n")
    monkeypatch.setattr(single_file, "FAMILIES", families)
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        if (tiny / name).is_dir():
            single_file._write_tokenizer(folder / name, padding)  # CLIP's own order of pieces
    file = write_checkpoint(folder, tmp_path / "anime.safetensors")
    return Checkpoint(file, folder, request.param == "sdxl")


def test_images_are_those_of_stock_diffusers_from_the_file_and_of_generate(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    of_folder = load_base_model(str(checkpoint.folder))
    shop = Shop(checkpoint.file, load_base_model(str(checkpoint.file)), Registry(LocalStore(tmp_path / "storage")))
    made = {"cup": whole_adapter(of_folder, 1, rank=3), "plain": whole_adapter(of_folder, 2, rank=3, text=0.0)}
    pipeline = checkpoint.stock_pipeline()
    for name, weights in made.items():
        shop.publish(name, 0, weights=weights, base_fingerprint=of_folder.fingerprint, base_name=str(checkpoint.folder))
        kohya_file(weights, tmp_path / f"{name}.safetensors", xl=checkpoint.xl)
        pipeline.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    drawn = asyncio.run(answers(shop, CALLS))
    for call, ours in zip(CALLS, drawn, strict=True):
        strengths = {member.reference.adapter_id: member.strength for member in call.adapters}
        pipeline.set_adapters(list(made), adapter_weights=[strengths.get(name, 0.0) for name in made])
        theirs = stock_picture(pipeline, call)
        assert furthest(ours, theirs) <= LEVELS, call
    request = DrawRequest(CUP.prompt, CUP.adapters, str(checkpoint.file), CUP.seed, CUP.steps, CUP.guidance)
    [path] = draw_images(request, tmp_path / "image.png", shop.registry, "cpu", Nobody())
    assert furthest(drawn[0], pixels(path.read_bytes())) <= LEVELS
    (bare,) = asyncio.run(answers(shop, [replace(CUP, adapters=())]))
    assert furthest(drawn[0], bare) > 5 * LEVELS, "the adapters do nothing, so nothing was compared"
