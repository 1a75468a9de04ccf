"""The serving benchmarks do what they time: equal images from every backend; a missed figure is called missed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cat_cluster.errors import CatClusterError, SpecError
from cat_cluster.lora.bank import adapted_layers, served_layers
from cat_cluster.models.base_model import load_base_model
from cat_cluster.telemetry import PROBE_ROW_STEPS, ROW_STEPS, UNET_SECONDS, WAIT_SECONDS
from jobs.benchmark.__main__ import app
from jobs.benchmark.pages import page_texts, write_pages
from jobs.benchmark.random_bases import write_random_base
from jobs.benchmark.record import ROOT, begin, read_result
from jobs.benchmark.serving import calls, rates
from jobs.benchmark.serving import measure as serving
from jobs.benchmark.serving.backends import InOwnProcess, InThisProcess
from jobs.benchmark.serving.baselines import static_batches
from jobs.benchmark.serving.between_steps import spent_on_probes, waits_in_steps
from jobs.benchmark.serving.calls import banked
from jobs.benchmark.serving.measure import PARTS, Size
from jobs.benchmark.serving.rates import busy_rate
from jobs.benchmark.serving.verdicts import verdicts
from jobs.benchmark.serving.workbench import Numbering, Request, Scale, take_turns_for
from serve.settings import ServeSettings
from tests.support.adder import Adder

TINY = Scale(
    rows=4,
    concurrency=4,
    steps=3,
    adapters=16,
    mixes=(1, 3),
    slots=(16, 3),
    threads=(1,),
    call_rows=(1, 4),
    stack_rows=(2, 4),
    images=6,
    serial_images=3,
    arrivals=6,
    step_range=(2, 4),
)
MEASURED = tuple(part for part in PARTS if part != "probes")  # a tiny base has no judge


_VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
_TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_UNET = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def tiny_base(folder: Path) -> str:
    unet = {
        **_UNET,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    }
    return write_random_base(folder / "base", "sd15", {"unet": unet, "vae": _VAE, "text_encoder": _TEXT})


def tiny_xl_base(folder: Path) -> str:
    unet = {
        **_UNET,
        "cross_attention_dim": 64,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 1),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    second = {**_TEXT, "projection_dim": 32}
    changes = {"unet": unet, "vae": _VAE, "text_encoder": _TEXT, "text_encoder_2": second}
    return write_random_base(folder / "base", "sdxl", changes)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all parts find on a tiny base, each in the least turns."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(serving.SIZES, "tiny", Size("serving", tiny_base, TINY, MEASURED))
        for module, number in ((rates, "ADAPTERS"), (calls, "PEFT_ADAPTERS")):
            patch.setattr(module, number, 4)  # PEFT loads them slowly
        serving.run(
            begin(allow_dirty=True),
            Console(quiet=True),
            MEASURED,
            "tiny",
            "cpu",
            0.0,
            own_processes=False,
            results=folder,
        )
    found = read_result("serving", folder)
    assert found is not None
    return found


@pytest.mark.slow
def test_every_part_is_measured_and_says_where(result: dict[str, Any]) -> None:
    assert list(result["parts"]) == list(MEASURED)
    for part in result["parts"].values():
        assert {"measured", "commit", "dirty", "machine", "load_before", "load_after"} <= set(part)


@pytest.mark.slow
def test_every_way_draws_the_same_images(result: dict[str, Any]) -> None:
    differences = {**result["parts"]["serial"]["differences"], **result["parts"]["peft"]["differences"]}
    assert set(differences) == {"hot swap", "set_adapters", "fuse and unfuse", "PEFT"}
    assert all(gap["max"] <= 1.0 for gap in differences.values())  # of 255: rounding
    call = result["parts"]["overhead"]["difference"]
    assert call["to_peft"] < 1e-5 < call["to_bare"]


@pytest.mark.slow
def test_the_parts_draw_the_same_images_of_an_sdxl(tmp_path: Path) -> None:
    few = replace(TINY, images=2, serial_images=2, mixes=(1,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(serving.SIZES, "tiny-xl", Size("serving-sdxl", tiny_xl_base, few, ("overhead", "serial", "peft")))
        for module, number in ((rates, "ADAPTERS"), (calls, "PEFT_ADAPTERS")):
            patch.setattr(module, number, 2)
        quiet, start = Console(quiet=True), begin(allow_dirty=True)
        serving.run(start, quiet, (), "tiny-xl", "cpu", 0.0, own_processes=False, results=tmp_path)
    found = read_result("serving-sdxl", tmp_path)
    assert found is not None
    differences = {**found["parts"]["serial"]["differences"], **found["parts"]["peft"]["differences"]}
    assert all(gap["max"] <= 1.0 for gap in differences.values())  # of 255: rounding
    assert found["parts"]["overhead"]["difference"]["to_peft"] < 1e-5
    assert "(a GPU, a random base of Stable Diffusion XL's size)" in page_texts(tmp_path)["serving-sdxl.md"]


@pytest.mark.slow
def test_a_stack_is_what_diffusers_makes_of_its_adapters(result: dict[str, Any]) -> None:
    part = result["parts"]["stacks"]
    assert set(part["images"]["differences"]) == {"set_adapters", "fuse and unfuse"}
    assert all(gap["max"] <= 1.0 for gap in part["images"]["differences"].values())  # of 255: rounding
    assert part["difference"]["to_one"] == 0.0
    assert part["difference"]["to_diffusers"] < 1e-5 < part["difference"]["to_bare"]
    assert all(calls["turns"] >= 3 and min(calls["ms"].values()) > 0 for calls in part["calls"].values())
    assert list(part["calls"]) == ["2", "4"]
    assert [int(size) for size in part["bytes"].values()] == [n * part["bytes"]["16"] for n in (1, 2, 4)]


@pytest.mark.slow
def test_adapters_are_swapped_where_slots_are_few(result: dict[str, Any]) -> None:
    swaps = result["parts"]["adapters"]["swaps"]
    assert swaps["16"] == 3
    assert result["parts"]["join"]["wait_steps"]["most"] > 0
    assert result["parts"]["join"]["swap"]["bytes"] > 0


@pytest.mark.slow
def test_the_page_calls_a_missed_figure_missed(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "serving.json").write_text(json.dumps(result), encoding="utf-8")
    text = page_texts(tmp_path)["serving.md"]
    found = verdicts(result["parts"])
    assert text.count("**missed**") == sum(not verdict.reached for verdict in found)
    assert len(found) == 2 + 2 + 1 + 1 + 3 + 2 + 3 + 1
    for over, reached in ((1.4, True), (1.399, False)):
        backends = {"engine": {"engine_over": 1.0}, "a": {"engine_over": over}, "b": {"engine_over": 9.0}}
        assert [verdict.reached for verdict in verdicts({"serial": {"backends": backends}})] == [reached]
    for throughput, reached in ((0.981, True), (0.979, False)):
        assert [one.reached for one in verdicts({"probes": {"throughput": throughput}})] == [reached]
    for over, ms, reached in ((1.05, 4.9, True), (1.051, 5.0, False)):
        part = {
            **result["parts"]["stacks"],
            "calls": {"2": {"stack_over_one": over}},
            "bind_ms": {"4 of rank 8": {"1": ms}},
        }
        assert [one.reached for one in verdicts({"stacks": part})] == [reached] * 2
        assert len(verdicts({"stacks": {**part, "device": "cuda"}})) == 1
    pages = write_pages(tmp_path, tmp_path / "pages")
    assert {path.name for path in pages} == {"README.md", "serving.md"}
    assert (tmp_path / "pages" / "serving.png").stat().st_size > 5_000


def test_the_bank_that_is_measured_has_the_layers_of_the_service(tiny_base_folder: Path) -> None:
    base = load_base_model(str(tiny_base_folder))
    layers = served_layers(base.unet, ServeSettings().targets)
    assert len(layers) > len(adapted_layers(base.unet, "attention_ff"))
    bench: Any = SimpleNamespace(load=lambda: base, compile=False)
    with ExitStack() as cleanup:
        assert tuple(banked(bench, cleanup, 4)[1].layout.shapes) == layers


def test_probes_need_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serving.SIZES, "tiny", Size("serving", tiny_base, TINY))
    with pytest.raises(SpecError, match="judge"):
        serving.run(
            begin(allow_dirty=True),
            Console(quiet=True),
            ["probes"],
            "tiny",
            "cpu",
            0.0,
            own_processes=False,
            results=tmp_path,
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serving", "--only", "overheat"], "overhead"),
        (["serving", "--size", "sd3"], "sd15"),
        (["serving", "--size", "sd15", "--only", "probes"], "poisson"),
        (["packing", "--size", "sd3"], "pocket, sd15"),
        (["buckets", "--size", "sd3"], "pocket, sd15"),
        (["cluster", "--only", "ray"], "sharding"),
        (["study", "--only", "triple"], "joint"),
        (["frontier", "--only", "nothing"], "alpha"),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(arguments: list[str], says: str) -> None:
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "unknown; choose from" in refused.output.replace("\n", " ")
    assert says in refused.output


@pytest.mark.slow
def test_it_runs_where_neither_ray_nor_deepspeed_is() -> None:
    absent = ("ray", "deepspeed", "fastapi", "boto3", "matplotlib", "psutil")
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import jobs.benchmark.serving.measure"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_a_contender_apart_answers_as_one_here_does() -> None:
    with InOwnProcess(Adder, 1) as apart, InThisProcess(Adder, 1) as here:
        for backend in (apart, here):
            assert backend.get("add", 2) == 3
            assert backend.seconds("add", 2) >= 0.0
            assert backend.get("add", 0) == 5
        with pytest.raises(CatClusterError, match="TypeError"):
            apart.get("add", "one")
        with pytest.raises(CatClusterError, match="ended"):
            apart.get("add", 1)


def test_waits_are_told_in_calls() -> None:
    unet, wait = UNET_SECONDS.name, WAIT_SECONDS.name
    events = [(1.0, wait, 0.2), (2.0, unet, 1.0), (2.0, wait, 0.25), (3.0, unet, 1.0), (3.1, wait, 1.3)]
    events += [(9.0, wait, 0.0)]  # the engine was idle
    assert waits_in_steps(events) == [(0.25, 1), (1.3, 2)]


def test_row_steps_of_probes_and_the_time_of_their_own_calls() -> None:
    of_unet = [(0.3, 16.0, 0.0), (0.1, 0.0, 2.0), (0.4, 12.0, 4.0)]  # seconds, rows of users, of probes
    names = (UNET_SECONDS.name, ROW_STEPS.name, PROBE_ROW_STEPS.name)
    events = [(0.0, name, value) for call in of_unet for name, value in zip(names, call, strict=True)]
    assert spent_on_probes(events) == (28.0, 6.0, pytest.approx(0.125))


def test_a_static_batch_takes_what_has_arrived() -> None:
    batches: list[int] = []
    requests = [Request("a", "p", n, 1) for n in range(6)]
    done = static_batches(lambda batch: batches.append(len(batch)), requests, [0.0] * 5 + [0.05], 3)
    assert batches == [3, 2, 1]
    assert done == sorted(done)
    assert done[-1] >= 0.05
    assert busy_rate([1.0, 1.0, 2.0, 3.0]) == 1.0


def test_turns_go_both_ways_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def variant(name: str) -> Any:
        return lambda: float(len(order.append(name) or order))

    times = take_turns_for({"a": variant("a"), "b": variant("b")}, 0.0)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert len(times["a"].turns) == 3
    numbers = Numbering()
    assert (numbers.take(3), numbers.take(2), numbers.at) == (0, 3, 5)
