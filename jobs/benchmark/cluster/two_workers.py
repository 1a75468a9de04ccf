"""Two workers that measure: `python -m jobs.benchmark.cluster.two_workers PART RANK PORT FILE`; cluster.py starts both.

steps: the seconds of a step with every engine, in turns. changes: what adapters cost that come and go, with every
engine. memory: what a base of the size of Stable Diffusion 1.5 holds and peaks at under ZeRO 2 or 3.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed

from cat_cluster.cluster.zero import zero_engine
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.training.engine import EngineFactory, TorchEngine
from cat_cluster.training.loop import PackMember, train_pack
from cat_cluster.training.methods import initial_weights
from cat_cluster.training.pack_size import peak_resident
from jobs.benchmark.cluster.changes import changes
from jobs.benchmark.random_bases import random_base
from jobs.benchmark.timing import RANK, SPEC_DEFAULTS, concept_task

ADAPTERS = 2
STAGES: dict[str, int | None] = {"torch": None, "zero 0": 0, "zero 1": 1, "zero 2": 2, "zero 3": 3}
STEPS, WARM, TURNS = 12, 3, 3


def engine(stage: int | None) -> EngineFactory:
    """Return the maker of an engine: plain torch for None, else a ZeRO stage."""
    return TorchEngine if stage is None else zero_engine(stage)


def step_seconds(base: BaseModel, adapters: int, rows: int, make: EngineFactory, steps: int) -> list[float]:
    """Train a pack of made-up concepts and return the seconds of each step."""
    layers = adapted_layers(base.unet, "attention_ff")
    bank = LoraBank.attach(base.unet, layers=layers)
    members = [
        PackMember(
            concept_task(base, f"c{n}", rows, SPEC_DEFAULTS),
            initial_weights(base.unet, layers, rank=RANK, seed=0, draw_key=str(n)),
        )
        for n in range(adapters)
    ]
    seconds: list[float] = []
    train_pack(base, bank, members, steps=steps, on_step=lambda r: seconds.append(r.seconds), make_engine=make)
    return seconds


def measure_steps() -> dict[str, Any]:
    """Return engine -> the median milliseconds of a step in each turn; the engines take turns."""
    found: dict[str, list[float]] = {name: [] for name in STAGES}
    for _ in range(TURNS):
        for name, stage in STAGES.items():
            gc.collect()
            seconds = step_seconds(load_base_model("pocket"), ADAPTERS, 4, engine(stage), WARM + STEPS)
            found[name].append(1e3 * statistics.median(seconds[WARM:]))
    return found


def measure_memory(base: BaseModel, stage: int, steps: int, rows: int) -> dict[str, Any]:
    """Return MiB per worker: the base's weights before and after sharding, the process's peak; and seconds a step."""
    whole = base_bytes(base)
    seconds = step_seconds(base, ADAPTERS, rows, engine(stage), steps)
    return {
        "stage": stage,
        "base_mib": whole / 2**20,
        "resident_base_mib": base_bytes(base) / 2**20,
        "peak_mib": peak_resident() / 2**20,
        "resident_mib": psutil.Process().memory_info().rss / 2**20,
        "step_seconds": seconds,
    }


def base_bytes(base: BaseModel) -> int:
    """Return the bytes of the U-Net's weights that this process holds: whole tensors and its shards of others."""
    total = 0
    for parameter in base.unet.parameters():
        total += parameter.data.numel() * parameter.element_size()
        shard = getattr(parameter, "ds_tensor", None)
        total += 0 if shard is None else shard.numel() * shard.element_size()
    return total


def main() -> None:
    """Be one worker of the pair and write what it measured."""
    part, rank, port, file = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    if part == "steps":
        found = measure_steps()
    elif part == "changes":
        found = {
            name: changes(load_base_model("pocket"), ADAPTERS, engine(stage), TURNS) for name, stage in STAGES.items()
        }
    elif part.startswith("sd15-"):
        found = measure_memory(random_base(on="cpu", latent_size=16), int(part[-1]), steps=2, rows=1)
    else:
        found = measure_memory(load_base_model("pocket"), int(part[-1]), steps=2, rows=1)
    file.write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
