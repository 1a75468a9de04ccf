"""The timing benchmarks really do what they time: steps that train, in turns, beside a loop that trains too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cat_cluster.lora.bank import adapted_layers
from cat_cluster.models.base_model import BaseModel, load_base_model
from jobs.benchmark.pages import page_texts
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.timing import StepOptions, Timed, concept_task, pack_step, take_turns
from jobs.benchmark.training import buckets
from jobs.benchmark.training.optimisations import VARIANTS
from jobs.benchmark.training.packing import SIZES, compare_methods
from jobs.benchmark.training.peft_loop import peft_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_trains(base: BaseModel, name: str) -> None:
    options = VARIANTS[name]
    with pack_step(
        base, [concept_task(base, "one", 2, options), concept_task(base, "two", 2, options)], options
    ) as step:
        for _ in range(3):
            step()
    assert not any("lora" in parameter for parameter, _ in base.unet.named_parameters())


def test_the_reference_loop_trains_its_adapter_and_leaves_the_unet_as_it_was(base: BaseModel) -> None:
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    step, parameters = peft_step(base, 2, StepOptions())
    first = [parameter.detach().clone() for parameter in parameters]
    for _ in range(4):
        step()
    assert len(parameters) == 2 * len(adapted_layers(base.unet, "attention_ff"))
    assert not any(torch.equal(parameter, start) for parameter, start in zip(parameters, first, strict=True))
    after = base.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_buckets_and_squares_are_compared_by_their_pixels(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each pixel of a bucket taking as long as one of a square is a ratio of 1."""
    sizes = buckets.bucket_sizes(base)
    share = buckets.pixels(sizes) / (6 * base.resolution**2)
    assert 0.8 <= share <= 1
    assert len(set(sizes)) >= 3
    found = buckets.compare_sizes(base, 2, StepOptions(joint_rows=True), 1)
    assert all(ratio > 0 for ratio in found["time_per_pixel"].values())
    times = {"squares": Timed((2.0,)), "like": Timed((2.0 * share,)), "unlike": Timed((4.0 * share,))}
    monkeypatch.setattr(buckets, "take_turns", lambda variants, turns: times)
    result = {
        "resolution": 16,
        "sizes": [[12, 18]],
        "pixels": share,
        "rows_per_concept": 4,
        "adapters": {"8": buckets.compare_sizes(base, 8, StepOptions(), 1)},
    }
    assert result["adapters"]["8"]["time_per_pixel"]["like"] == pytest.approx(1.0)
    write_result("buckets", result, Start("2026-11-25T06:03:30+00:00", "3e808594ebfb", dirty=False), tmp_path)
    assert f"| 8 | 2000 | {2000 * share:.0f} | 1.00x | {4000 * share:.0f} |" in page_texts(tmp_path)["buckets.md"]


def test_methods_are_compared_in_turns(base: BaseModel) -> None:
    found = compare_methods(base, SIZES["pocket"], 1, 1, 1)
    assert set(found["step_seconds"]) == {
        "reference",
        "sequential",
        "packed",
        "sequential, optimised",
        "packed, optimised",
    }
    assert all(seconds > 0 for seconds in found["step_seconds"].values())
    assert set(found["speed_up"]) == {
        "packed over sequential",
        "packed over reference",
        "packed and optimised over reference",
    }


def test_turns_alternate_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def measure(name: str, seconds: list[float]) -> float:
        order.append(name)
        return seconds.pop(0)

    slow, fast = [9.0, 2.0, 4.0], [9.0, 1.0, 1.0]
    times = take_turns({"slow": lambda: measure("slow", slow), "fast": lambda: measure("fast", fast)}, 2)
    assert order == ["slow", "fast"] * 3
    assert times["slow"] == Timed((2.0, 4.0))
    assert times["slow"].ratio(times["fast"]) == 3.0
