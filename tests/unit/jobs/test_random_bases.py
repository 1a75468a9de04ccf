"""Bases of chance have the sizes of the releases."""

from __future__ import annotations

import pytest
import torch

from cat_cluster.errors import SpecError
from jobs.benchmark import random_bases
from jobs.benchmark.random_bases import random_base
from tests.support.meta_unets import SD15, SDXL, meta_unet


@pytest.mark.parametrize(("size", "config", "texts"), [("sd15", SD15, [768]), ("sdxl", SDXL, [768, 1280])])
def test_a_random_base_has_the_shapes_of_its_release(size: str, config: dict[str, object], texts: list[int]) -> None:
    """Oracle: the release's own unet/config.json. On the device that has shapes alone: an SDXL takes 10 GB."""
    base = random_base(size, on="meta")
    wanted = {name: tuple(one.shape) for name, one in meta_unet(config).named_parameters()}
    assert {name: tuple(one.shape) for name, one in base.unet.named_parameters()} == wanted
    assert [model.config.hidden_size for model in base.text_encoders.models] == texts
    assert base.resolution == (512 if size == "sd15" else 1024)
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="the size sdxl is measured on a GPU"):
        random_bases.random_base("sdxl")
