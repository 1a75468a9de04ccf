"""Peaks of memory that were measured, or counted: what the rule of sizes.py must cover, and why it has its numbers.

`in process`: the most resident memory of `cat-cluster train SPEC --in-process` with three steps of Pocket-SD on two
CPUs, from wait4's rusage, 2026-11-29. It measures and trains in one process, which Ray does in two. `packing` and
`sharding`: from the result files of jobs/benchmark, which know no Ray and no photos; `sd15` there is a random U-Net of
Stable Diffusion 1.5's size at 128 pixels. No GPU was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Peak:
    """The peak of a process, MiB, with what differs from a spec's defaults; adapters are all in one pack."""

    source: Literal["in process", "packing", "sharding"]
    mib: int
    base: Literal["pocket", "sd15"] = "pocket"
    adapters: int = 1
    method: Literal["cat", "lora"] = "cat"
    training: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=lambda: {"enabled": False})


PROCESS_PEAKS = (
    Peak("in process", 981, training={"rows_per_concept": 1}),
    Peak("in process", 1059),
    Peak("in process", 1330, training={"rows_per_concept": 16}),
    Peak("in process", 1195, method="lora", training={"rows_per_concept": 16}),
    Peak("in process", 1461, training={"rows_per_concept": 16, "cat_fraction": 1.0}),
    Peak("in process", 1402, training={"rows_per_concept": 16, "teacher": "pool", "pool_size": 16}),
    Peak("in process", 1203, training={"rows_per_concept": 16, "joint_rows": False}),
    Peak("in process", 1179, training={"rows_per_concept": 16, "precision": "bf16"}),
    Peak("in process", 1215, training={"rows_per_concept": 16, "gradient_checkpointing": True}),
    Peak("in process", 1112, training={"rank": 64}),
    Peak("in process", 1344, training={"resolution": 128}),
    Peak("in process", 2618, training={"resolution": 128, "rows_per_concept": 16}),
    Peak("in process", 1785, training={"resolution": 256, "rows_per_concept": 2}),
    Peak("in process", 1422, adapters=4),
    Peak("in process", 1782, adapters=8),
    Peak("in process", 2291, adapters=8, training={"rank": 64}),
    Peak("in process", 1188, evaluation={"images_per_prompt": 1}),
    Peak("in process", 1211, evaluation={"images_per_prompt": 4}),
    Peak("packing", 1412, adapters=8),
    Peak("packing", 2371, adapters=16),
    Peak("packing", 4091, adapters=32),
    Peak(
        "sharding",
        4416,
        "sd15",
        2,
        training={"rows_per_concept": 1, "resolution": 128},
        cluster={"workers": 2, "zero_stage": 2},
    ),
    Peak(
        "sharding",
        6700,
        "sd15",
        2,
        training={"rows_per_concept": 1, "resolution": 128},
        cluster={"workers": 2, "zero_stage": 3},
    ),
)
# What the processes of a head with one pack in training held of their own, MiB, 2026-11-29: without the files of their
# libraries, which they share. One Ray of tests/integration/test_submit.py, sampled while it trained.
HEAD_PARTS: Mapping[str, int] = {
    "driver": 542,
    "Ray Train's controller": 372,
    "the task that starts it": 371,
    "its placement group cleaner, data sets, coordinator, barrier and preemption watcher": 543,
    "dashboard": 249,
    "agents, logs": 184,
    "ray start": 117,
    "the job's supervisor, events": 128,
    "gcs, raylet": 50,
}
