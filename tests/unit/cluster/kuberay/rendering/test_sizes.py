"""What the pods of a job ask for: enough for what was measured, no more than is needed, and what was given instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.rendering import sizes
from cat_cluster.cluster.kuberay.rendering.peaks import HEAD_PARTS, PROCESS_PEAKS, Peak
from cat_cluster.cluster.kuberay.rendering.sizes import (
    DEFAULT_SIZE,
    POCKET_SIZE,
    SD15_SIZE,
    SDXL_SIZE,
    BaseSize,
    JobSizes,
    Overrides,
    cpu_amount,
    head_mib,
    job_sizes,
    memory_amount,
    process_mib,
)
from cat_cluster.errors import BaseModelError, SpecError
from cat_cluster.lora.bank import adapted_layers, text_layers
from cat_cluster.lora.layers import sizes_of as layer_sizes
from cat_cluster.models.base_files import parameter_count
from cat_cluster.models.base_names import base_folder
from cat_cluster.models.network import Network
from cat_cluster.spec.job import JobSpec, parse_spec
from tests.support.meta_unets import (
    CLIP_G,
    CLIP_L,
    SD15,
    SDXL,
    kept_by_a_row,
    kept_by_a_text,
    meta_text_encoder,
    meta_unet,
)

ROOT = Path(__file__).parents[5]
GIB = 1 << 30
HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat_cluster.models.base_names.snapshot_download", _nothing)


def _nothing(*_: Any, **__: Any) -> str:
    raise OSError("the hub is away")


def job(adapters: int = 1, **fields: Any) -> JobSpec:
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/cup"}
    every = [{"id": f"cup-{n}", "concepts": [concept]} for n in range(adapters)]
    return JobSpec.model_validate({"name": "tea", "adapters": every, **fields})


def sizes_of(spec: JobSpec, *, gpu: bool = False, packs: int = 1, **given: str) -> JobSizes:
    return job_sizes(spec, Overrides(**given), gpu=gpu, packs=packs)


def worker_gib(spec: JobSpec, **options: Any) -> float:
    return float(memory_amount("", sizes_of(spec, **options).worker_memory)) / GIB


def head_gib(spec: JobSpec, **options: Any) -> float:
    return float(memory_amount("", sizes_of(spec, **options).head_memory)) / GIB


@pytest.mark.parametrize("peak", PROCESS_PEAKS, ids=str)
def test_a_process_gets_what_was_measured_and_little_more(peak: Peak) -> None:
    spec = job(
        peak.adapters,
        method=peak.method,
        training=peak.training,
        cluster={"max_pack": peak.adapters, **peak.cluster},
        evaluation=peak.evaluation,
    )
    base = {"pocket": POCKET_SIZE, "sd15": SD15_SIZE}[peak.base]
    ruled = process_mib(spec.resolved(), spec, base, gpu=False)
    assert peak.mib <= ruled <= (1.25 if peak.source == "in process" else 1.5) * peak.mib


def test_the_table_has_what_the_benchmarks_measured() -> None:
    results = ROOT / "jobs" / "benchmark" / "results"
    packing = json.loads((results / "packing.json").read_text())["memory"]
    ours = {peak.adapters: peak.mib for peak in PROCESS_PEAKS if peak.source == "packing"}
    assert ours == pytest.approx({number: packing[str(number)]["peak_mib"] for number in ours}, abs=1)
    text = (results / "cluster-sharding.json").read_text()
    for peak in PROCESS_PEAKS:
        if peak.source == "sharding":
            assert f'"peak_mib": {peak.mib - 1}.' in text or f'"peak_mib": {peak.mib}.' in text


def test_a_head_gets_what_was_measured_and_little_more() -> None:
    measured = sum(HEAD_PARTS.values())
    assert measured <= head_mib([POCKET_SIZE], 1) <= 1.05 * measured


def test_the_sizes_of_pocket_are_those_of_its_files() -> None:
    assert parameter_count(base_folder("pocket")) * 4 / 2**20 == pytest.approx(POCKET_SIZE.weights, abs=1)


@pytest.mark.parametrize(("config", "size"), [(SD15, SD15_SIZE), (SDXL, SDXL_SIZE)])
def test_rows_of_large_bases_are_counted_by_their_shapes(
    config: Mapping[str, Any], size: BaseSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1.45 <= size.row / kept_by_a_row(config, monkeypatch) <= 1.6  # half as much again, as the table has it
    unet = meta_unet(config)
    linears = [unet.get_submodule(name) for name in adapted_layers(unet, "attention_ff")]
    assert size.lora == sum(linear.in_features + linear.out_features for linear in linears)
    assert size.pixels == 8 * unet.config.sample_size


@pytest.mark.parametrize(
    ("configs", "size"), [([CLIP_L], SD15_SIZE), ([{**CLIP_L, "num_hidden_layers": 11}, CLIP_G], SDXL_SIZE)]
)
def test_texts_of_large_bases_are_counted_by_their_shapes(
    configs: list[Mapping[str, Any]], size: BaseSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SDXL's first encoder nothing reads the last of 12 layers, so it is not trained."""
    assert 1.45 <= size.text / kept_by_a_text(configs, monkeypatch) <= 1.6
    network = Network(meta_unet(SD15), [meta_text_encoder(config) for config in configs])
    sizes_of_layers = [layer_sizes(network.get_submodule(name)) for name in text_layers(network)]
    assert size.text_lora == sum(sum(found) for found in sizes_of_layers if found is not None)


def test_a_job_that_trains_text_encoders_asks_for_their_memory() -> None:
    plain, texts = (job(base=HUB, training={"rank": 64, "rows_per_concept": 8, **more}) for more in ({}, TEXTS))
    more = worker_gib(texts) - worker_gib(plain)
    numbers = DEFAULT_SIZE.text_lora * 64 * (8 + 8 + 12 * 8) / GIB  # weight, gradient and moments, and of each row
    assert more == pytest.approx(1.2 * (12 * DEFAULT_SIZE.text / 1024 + numbers), abs=0.26)


TEXTS: Mapping[str, Any] = {"text_encoder": {}}


def test_a_base_of_sdxl_is_sized_like_one(tiny_xl_folder: Path) -> None:
    found = sizes.base_size(str(tiny_xl_folder))
    assert found is not None
    assert found.weights == pytest.approx(parameter_count(tiny_xl_folder) * 4 / 2**20)
    assert found.row == pytest.approx(SDXL_SIZE.row * (64 / 1024) ** 2 * 8 / 320)  # 8 latents of 8 pixels, 8 channels
    assert found.lora == round(SDXL_SIZE.lora * 8 / 320)


def test_a_small_job_asks_for_little_and_a_head_for_no_more_when_rows_are_many() -> None:
    text = (ROOT / "jobs" / "specs" / "single.yaml").read_text().replace("../../out/demo/", "s3://bucket/")
    spec = parse_spec(text.encode(), "single.yaml")
    assert worker_gib(spec) <= 2
    assert head_gib(spec) == 3.25
    large = job(training={"rows_per_concept": 64, "resolution": 128})
    assert worker_gib(large) > 8
    assert head_gib(large) == 3.25


@pytest.mark.parametrize(
    "more",
    [
        {"training": {"rows_per_concept": 64}},
        {"training": {"resolution": 256}},
        {"training": {"rank": 512}},
        {"adapters": 8},
        {"adapters": 20, "cluster": {"max_pack": 20}},
    ],
)
def test_what_takes_memory_asks_for_it(more: dict[str, Any]) -> None:
    assert worker_gib(job(**more)) > worker_gib(job())


def test_method_workers_and_pack_count() -> None:
    rows = {"training": {"rows_per_concept": 64}}
    assert worker_gib(job(method="lora", **rows)) < worker_gib(job(**rows))
    assert worker_gib(job(cluster={"workers": 4}, **rows)) < worker_gib(job(**rows))
    assert worker_gib(job(cluster={"workers": [1, 4]}, **rows)) == worker_gib(job(**rows))
    assert worker_gib(job(8, cluster={"max_pack": 1}, **rows)) == worker_gib(job(**rows))
    assert worker_gib(job(30)) == worker_gib(job(8))  # max_pack: auto fits itself to what it has


def test_every_pack_side_by_side_has_its_controllers_on_the_head() -> None:
    assert head_gib(job(4), packs=4) - head_gib(job(4)) == pytest.approx(3 * 1.57, abs=0.25)
    assert head_gib(job(1), packs=4) == head_gib(job(1))


def test_each_cpu_of_a_worker_is_for_a_process_where_no_gpu_limits_them() -> None:
    assert sizes_of(job()).worker_cpu == "1"
    assert worker_gib(job(), worker_cpu="4") > 3 * worker_gib(job())
    assert worker_gib(job(), worker_cpu="500m") == worker_gib(job())
    assert head_gib(job(4), worker_cpu="4") == head_gib(job(4), packs=4)
    assert sizes_of(job(), gpu=True).worker_cpu == "4"
    assert worker_gib(job(), gpu=True, worker_cpu="16") == worker_gib(job(), gpu=True)


def test_rows_are_on_the_gpu_where_there_is_one() -> None:
    rows = {"training": {"rows_per_concept": 64, "resolution": 256}}
    assert worker_gib(job(**rows), gpu=True) == worker_gib(job(), gpu=True)


def test_a_base_that_is_not_here_gets_a_default_and_is_named() -> None:
    found = sizes_of(job(base=HUB))
    (warning,) = found.warnings
    assert warning == (
        f"base '{HUB}' is not on this machine, so the pods are as large as Stable Diffusion 2.1 needs; fetch it, or "
        "give --worker-memory and --head-memory"
    )
    (of_s3,) = sizes_of(job(base="s3://bases/xl")).warnings
    assert of_s3.endswith("as large as Stable Diffusion 2.1 needs; give --worker-memory and --head-memory")
    assert float(memory_amount("", found.head_memory)) > (DEFAULT_SIZE.weights + 2048) * 2**20
    assert worker_gib(job(base=HUB), gpu=True) < 16
    assert sizes_of(job()).warnings == ()
    # Sizes that were given, as to the pod of a schedule, are held against no guess.
    assert sizes_of(job(base=HUB), worker_memory="4Gi", head_memory="4Gi").warnings == ()
    assert len(sizes_of(job(base=HUB), worker_memory="4Gi").warnings) == 2


def test_a_base_of_the_hub_that_is_here_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat_cluster.models.base_names.snapshot_download", lambda *_, **__: base_folder("pocket"))
    found = sizes.base_size(HUB)
    assert found is not None
    assert found.weights == pytest.approx(POCKET_SIZE.weights, abs=1)
    assert found.pixels == 128  # of its U-Net's 16 x 16 latents, as Stable Diffusion's VAE makes them
    assert sizes_of(job(base=HUB)).warnings == ()


def test_what_is_no_base_is_refused() -> None:
    with pytest.raises(BaseModelError, match="is neither a folder nor a file"):
        sizes_of(job(base="nonsense"))


def test_given_sizes_are_taken_and_too_small_ones_warned_of() -> None:
    given = {"worker_cpu": "2", "worker_memory": "6Gi", "head_memory": "4096Mi"}
    assert sizes_of(job(), **given) == JobSizes("2", "6Gi", "4096Mi")
    found = sizes_of(job(), worker_memory="850Mi", head_memory="1Gi")
    assert (found.worker_memory, found.head_memory) == ("850Mi", "1Gi")
    assert found.warnings == (
        "--worker-memory 850Mi: the spec needs about 2Gi; with less it may be killed",
        "--head-memory 1Gi: the spec needs about 3328Mi; with less it may be killed",
    )


@pytest.mark.parametrize("text", ["1", "1.5", "500m", "2.", ".5", "4096"])
def test_cpus_as_kubernetes_writes_them(text: str) -> None:
    assert cpu_amount("--worker-cpu", text) > 0


@pytest.mark.parametrize("text", ["", "0", "-1", "1 ", "two", "1e3", "4097", "1Gi", "0.5m", "1.0001", "½", "٣", "1\n"])
def test_what_are_no_cpus_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"--worker-cpu .*such as 2 or 500m"):
        cpu_amount("--worker-cpu", text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6Gi", 6 << 30), ("1500Mi", 1500 << 20), ("1.5Gi", 3 << 29), ("2G", 2 * 10**9), ("1073741824", GIB)],
)
def test_memory_as_kubernetes_writes_it(text: str, size: int) -> None:
    assert memory_amount("--head-memory", text) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *[(text, "such as 6Gi or 1500Mi") for text in ("", "6 Gi", "6GB", "6gi", "-6Gi", "six", "8Ei", "1e30", "1.3")],
        ("4", "is 4 bytes, and Ray alone needs 512Mi"),
        ("100Mi", "Ray alone needs 512Mi"),
    ],
)
def test_what_is_no_memory_is_refused(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"--head-memory .*{said}"):
        memory_amount("--head-memory", text)
