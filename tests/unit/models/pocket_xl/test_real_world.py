from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from cat_cluster.errors import BaseModelError
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining import real_world


def test_it_has_the_published_parameters_and_gives_a_logit_for_each_class(tmp_path: Path) -> None:
    model = real_world.Lite0()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008  # 4.7 M in the publication
    save_file(model.state_dict(), tmp_path / "lite0.safetensors")
    loaded = real_world.load_lite0(tmp_path / "lite0.safetensors")
    pictures = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pictures), model.eval()(pictures))
    assert loaded(pictures).shape == (2, 1000)


@given(
    st.integers(min_value=1, max_value=20), st.integers(min_value=1, max_value=20), st.sampled_from((3, 5)), st.data()
)
def test_padding_makes_a_convolution_give_one_value_for_each_stride(
    height: int, width: int, kernel: int, data: st.DataObject
) -> None:
    stride = data.draw(st.sampled_from((1, 2)))
    x = torch.ones(1, 1, height, width)
    padded = real_world.same_padded(x, kernel, stride)
    made = nn.functional.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride)
    assert made.shape[-2:] == (-(-height // stride), -(-width // stride))
    above, left = (int(line.nonzero()[0]) for line in (padded[0, 0].sum(1), padded[0, 0].sum(0)))
    below, right = padded.shape[-2] - height - above, padded.shape[-1] - width - left
    assert 0 <= below - above <= 1
    assert 0 <= right - left <= 1


def test_a_picture_is_recognised_if_its_class_is_first_or_among_five() -> None:
    def judge(pictures: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(pictures), 1000)
        logits[:, [849, 1, 2, 3, 850]] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
        return logits

    class Judge(nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return judge(pictures)

    pictures = torch.zeros(4, 3, 8, 8)
    found = real_world.recognised(Judge(), pictures, ["teapot", "teapot", "teddy bear", "pizza"], batch=3)
    assert found == {"top1": 0.5, "top5": 0.75}


def test_every_class_is_of_imagenet_and_of_one_thing() -> None:
    numbers = list(real_world.CLASSES.values())
    assert len(set(numbers)) == len(numbers) >= 100
    assert all(0 <= number < 1000 for number in numbers)


def test_a_file_that_is_no_lite0_is_one_clear_error(tmp_path: Path, emojis: tuple[Emoji, ...]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(BaseModelError, match=r"not EfficientNet-Lite0.*docs/pocket-xl\.md"):
        real_world.load_lite0(tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(BaseModelError, match="not EfficientNet-Lite0"):
        real_world.load_lite0(tmp_path / "b.safetensors")
