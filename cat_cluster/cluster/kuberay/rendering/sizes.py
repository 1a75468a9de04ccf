"""What the pods of a training job ask for: memory and CPUs from the spec, by a rule that covers what was measured.

A worker of Ray trains one pack, or measures one adapter, in a process of its own: Python with its libraries, the base,
and what the rows of a step hold until their backward. On a GPU the rows are there, and the base goes through memory.
The head has Ray's own processes, the driver, which loads the bases to check the job, and for each pack that trains the
processes of Ray Train that control it. peaks.py has what was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from cat_cluster.errors import SpecError
from cat_cluster.models.base_files import family_of, parameter_count, read_config
from cat_cluster.models.base_names import EMBEDDED, local_base
from cat_cluster.models.s3_base import S3_SCHEME
from cat_cluster.spec.job import JobSpec, ResolvedAdapter

WORKER_MARGIN = 1.2  # over what the rule gives: allocators fragment, and photos differ
HEAD_MARGIN = 1.25  # Ray ends processes at 95% of what a pod has, and keeps a few idle ones ready
STEP = 256  # MiB that a request is rounded up to
AUTO_PACK = 8  # adapters that `max_pack: auto` gets room for; it takes as many as the memory allows
LEAST_MEMORY = 512 << 20  # bytes; Ray alone needs them
LARGEST_CPUS = 4096
LARGEST_MEMORY = 2**63 - 1  # bytes
GPU_CPUS = 4  # of a worker with a GPU
# MiB, measured on CPUs but for CUDA's, which is a guess.
_RAY_WORKER, _RAY_HEAD = 320, 730  # raylet and agents; with gcs, dashboard and the job's supervisor
_DRIVER, _PACK_CONTROL = 530, 1290  # Ray Train's controller and its six helpers, of which two load torch
_PROCESS = 950  # with torch, diffusers and Ray Train
_EVALUATION, _ADAPTER = 250, 10
_CUDA = 4096  # libraries, context and pinned memory of a process
_CHECKPOINTED = 0.6  # of a row, with gradient checkpointing
_LORA, _LORA_ROW = 8, 8  # bytes a number: weight and gradient; a row's own factors, and gradients
_OPTIMIZER = {"adamw": 8, "adafactor": 0, "prodigy": 16}  # what it keeps, the same
_AVERAGE = 4  # with ema

_SUFFIXES: Mapping[str, Decimal] = {
    **{f"{letter}i": Decimal(1024**power) for power, letter in enumerate("KMGTPE", 1)},
    **{letter: Decimal(1000**power) for power, letter in enumerate("kMGTPE", 1)},
    "m": Decimal("0.001"),
    "": Decimal(1),
}
_QUANTITY = re.compile(r"(?P<number>[0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})(?P<suffix>[KMGTPE]i|[mkMGTPE]?)", re.A)


@dataclass(frozen=True)
class BaseSize:
    """What a base costs, in MiB.

    weights: of its parts in float32; judge: of the model that measures its adapters; row: what a row that has gradients
    holds at `pixels`, its own side; text: what a text does whose encoders are trained; lora, text_lora: numbers of LoRA
    weights at rank 1, of the U-Net and of text encoders.
    """

    weights: float
    judge: float
    row: float
    text: float
    pixels: int
    lora: int
    text_lora: int


# Rows of Stable Diffusion: the tensors that its U-Net keeps for a backward, by its shapes, and half as much again, as
# Pocket-SD's rows have beyond theirs; so of texts and text encoders. Weights and numbers are counted.
POCKET_SIZE = BaseSize(weights=23, judge=2, row=17, text=3, pixels=64, lora=21_504, text_lora=6_912)
SD15_SIZE = BaseSize(weights=4_068, judge=577, row=2_760, text=82, pixels=512, lora=374_016, text_lora=165_888)
SDXL_SIZE = BaseSize(weights=13_233, judge=577, row=19_200, text=364, pixels=1024, lora=2_659_840, text_lora=889_344)
# Stable Diffusion 2.1's.
DEFAULT_SIZE = BaseSize(weights=4_921, judge=577, row=6_200, text=167, pixels=768, lora=380_000, text_lora=423_936)
DEFAULT_NAME = "Stable Diffusion 2.1"


@dataclass(frozen=True)
class Overrides:
    """Sizes that are given, as Kubernetes writes quantities; None: from the spec."""

    worker_cpu: str | None = None
    worker_memory: str | None = None
    head_memory: str | None = None


FROM_SPEC = Overrides()


@dataclass(frozen=True)
class JobSizes:
    """Quantities that the pods of a job ask for. warnings: what is guessed, or less than the spec needs."""

    worker_cpu: str
    worker_memory: str
    head_memory: str
    warnings: tuple[str, ...] = ()


def job_sizes(job: JobSpec, given: Overrides, *, gpu: bool, packs: int) -> JobSizes:
    """Return what the pods of a job ask for. gpu: a worker has one; packs: that train side by side.

    Raises SpecError for quantities that Kubernetes refuses, or with which no pod could start.
    """
    cpu = given.worker_cpu or str(GPU_CPUS if gpu else 1)
    cpus = math.ceil(cpu_amount("--worker-cpu", cpu))
    bases, warnings = _bases(job)
    is_guess = bool(warnings)
    adapters = job.resolved()
    # Ray gives each CPU of a worker to a process that trains or measures, where no GPU limits them.
    together = 1 if gpu else cpus
    process = max(process_mib(group, job, bases[group[0].base], gpu=gpu) for group in _groups(adapters))
    worker = _rounded(WORKER_MARGIN * (_RAY_WORKER + together * process))
    head = _rounded(HEAD_MARGIN * head_mib(bases.values(), min(len(adapters), packs * together)))
    for option, text, needed in (
        ("--worker-memory", given.worker_memory, worker),
        ("--head-memory", given.head_memory, head),
    ):
        if text is not None and memory_amount(option, text) < needed << 20:
            warnings.append(f"{option} {text}: the spec needs about {_written(needed)}; with less it may be killed")
    if is_guess and given.worker_memory and given.head_memory:
        warnings = []  # no size rests on the guess
    return JobSizes(cpu, given.worker_memory or _written(worker), given.head_memory or _written(head), (*warnings,))


def process_mib(adapters: Sequence[ResolvedAdapter], job: JobSpec, base: BaseSize, *, gpu: bool) -> float:
    """Return the peak memory, MiB, of a process that trains a pack of adapters of one base, or measures one of them."""
    workers = job.cluster.workers
    workers = workers if isinstance(workers, int) else workers[0]
    pack = AUTO_PACK if job.cluster.max_pack == "auto" else job.cluster.max_pack
    weights = base.weights * (1 + 1 / workers if job.cluster.zero_stage == 3 else 1)
    measuring = _EVALUATION + base.judge if any(adapter.evaluation.enabled for adapter in adapters) else 0
    if gpu:
        return _PROCESS + _CUDA + weights + measuring
    costs = sorted((_step_mib(adapter, base, workers) for adapter in adapters), reverse=True)
    return _PROCESS + weights + max(sum(costs[:pack]), measuring)


def head_mib(bases: Iterable[BaseSize], packs: int) -> float:
    """Return the peak memory, MiB, of a head whose driver has loaded bases, with packs that train side by side."""
    return _RAY_HEAD + _DRIVER + sum(base.weights + base.judge for base in bases) + packs * _PACK_CONTROL


def cpu_amount(option: str, text: str) -> Decimal:
    """Return a quantity of CPUs, such as 2 or 500m; SpecError names the option."""
    amount = quantity(text)
    if amount is None or not 0 < amount <= LARGEST_CPUS or amount * 1000 % 1:
        raise SpecError(f"{option} {text!r}: must be a number of CPUs up to {LARGEST_CPUS}, such as 2 or 500m")
    return amount


def memory_amount(option: str, text: str) -> Decimal:
    """Return the bytes of a quantity of memory, such as 6Gi; SpecError names the option."""
    amount = quantity(text)
    if amount is None or amount > LARGEST_MEMORY or amount % 1:
        raise SpecError(
            f"{option} {text!r}: must be an amount of memory as Kubernetes writes it, such as 6Gi or 1500Mi"
        )
    if amount < LEAST_MEMORY:
        raise SpecError(
            f"{option} {text!r}: is {amount:f} bytes, and Ray alone needs {_written(LEAST_MEMORY >> 20)}; give more, "
            "such as 6Gi"
        )
    return amount


def quantity(text: str) -> Decimal | None:
    """Return a quantity of Kubernetes', such as 500m or 6Gi, as a number, None for what is none."""
    found = _QUANTITY.fullmatch(text)
    return None if found is None else Decimal(found["number"]) * _SUFFIXES[found["suffix"]]


def _written(mib: int) -> str:
    return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"


def _rounded(mib: float) -> int:
    return STEP * math.ceil(mib / STEP)


def _groups(adapters: Sequence[ResolvedAdapter]) -> list[list[ResolvedAdapter]]:
    """Return adapters by base: a pack has one."""
    return [[one for one in adapters if one.base == base] for base in dict.fromkeys(one.base for one in adapters)]


def _step_mib(adapter: ResolvedAdapter, base: BaseSize, workers: int) -> float:
    """Return what an adapter adds to a step of its pack: the rows that a worker has of it, and its weights."""
    training = adapter.training
    rows = math.ceil(len(adapter.concepts) * training.rows_per_concept / workers)
    predicted = rows * (1 + (training.cat_fraction if adapter.method == "cat" else 0))
    row = base.row * ((training.resolution or base.pixels) / base.pixels) ** 2
    row *= _CHECKPOINTED if training.gradient_checkpointing else 1
    trains_text = training.text_encoder is not None
    row += base.text * training.prompt_chunks if trains_text else 0  # at most: rows with the same prompt share one
    numbers = (base.lora + (base.text_lora if trains_text else 0)) * training.rank
    state = _LORA + _OPTIMIZER[training.optimizer] + (0 if training.ema is None else _AVERAGE)
    return _ADAPTER + predicted * row + numbers * (state + predicted * _LORA_ROW) / 2**20


def _bases(job: JobSpec) -> tuple[dict[str, BaseSize], list[str]]:
    """Return the sizes of a job's bases by name, and of which ones they are guessed."""
    sizes, warnings = {}, []
    for name in dict.fromkeys(adapter.base for adapter in job.resolved()):
        size = base_size(name)
        if size is None:
            size = DEFAULT_SIZE
            fetch = "" if name.startswith(S3_SCHEME) else "fetch it, or "
            warnings.append(
                f"base {name!r} is not on this machine, so the pods are as large as {DEFAULT_NAME} needs; {fetch}"
                "give --worker-memory and --head-memory"
            )
        sizes[name] = size
    return sizes, warnings


def base_size(name: str) -> BaseSize | None:
    """Return what a base costs, None for one in S3 or of the hub that is not in its cache; raises BaseModelError."""
    if name in EMBEDDED:
        return POCKET_SIZE
    folder = local_base(name)
    if folder is None:
        return None
    config = read_config(folder, "unet")
    like = SDXL_SIZE if family_of(folder) == "sdxl" else SD15_SIZE
    pixels = 8 * _number(config.get("sample_size"), like.pixels // 8)
    channels: Any = config.get("block_out_channels")
    width = _number(channels[0] if isinstance(channels, list) and channels else None, 320)
    row = like.row * (pixels / like.pixels) ** 2 * width / 320
    weights = parameter_count(folder) * 4 / 2**20
    lora, text_lora = (round(numbers * width / 320) for numbers in (like.lora, like.text_lora))
    return BaseSize(weights, like.judge, row, like.text * width / 320, pixels, lora, text_lora)


def _number(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default
