"""What the cluster costs and gains: engines and Ray against the bare loop, checkpoints, sharding, batches."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from cat_cluster.cli.demo import draw_photos
from cat_cluster.errors import CatClusterError
from cat_cluster.lora.bank import adapted_layers, parameter_names
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.pocket import world
from cat_cluster.models.subjects import DrawnSubject
from cat_cluster.store import open_store
from cat_cluster.training.checkpoint import AdapterState, CheckpointStore, CheckpointWriter
from cat_cluster.training.engine import TorchEngine
from jobs.benchmark.cluster import PARTS
from jobs.benchmark.cluster.changes import ROWS, changes
from jobs.benchmark.cluster.two_workers import ADAPTERS, STAGES, STEPS, WARM, step_seconds
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.timing import SPEC_DEFAULTS, concept_task, pack_step, take_turns

RAY_STEPS = 60
PACK_SIZES = (1, 4, 8)
CHECKPOINT_EVERY = 50  # the spec's default
CHECKPOINT_ADAPTERS = 4
BATCH, SINGLES = 20, 1
BATCHES = ((1, 100),)  # rows per concept, steps
PATIENCE_SECONDS = 3600


def run(start: Start, console: Console, parts: Sequence[str]) -> list[Path]:
    """Measure the parts and write a result file for each; raises CatClusterError for an unknown part."""
    measures = {
        "steps": measure_steps,
        "changes": measure_changes,
        "checkpoints": measure_checkpoints,
        "sharding": measure_sharding,
        "batch": measure_batch,
    }
    unknown = sorted(set(parts) - measures.keys())
    if unknown:
        raise CatClusterError(f"no part {unknown[0]!r}: the parts are {', '.join(PARTS)}")
    paths = []
    for part in parts:
        console.print(f"measuring {part}")
        paths.append(write_result(f"cluster-{part}", measures[part](console), start))
    return paths


def measure_steps(console: Console) -> dict[str, Any]:
    """Two workers of one thread each: a step with every engine, bare and through Ray; and one process with both."""
    torch.set_num_threads(2)
    whole = step_seconds(load_base_model("pocket"), ADAPTERS, 4, TorchEngine, WARM + STEPS)
    turns = run_pair("steps")[0]
    engines = {
        name: {
            "step_ms": statistics.median(values),
            "to_torch": statistics.median(a / b for a, b in zip(values, turns["torch"], strict=True)),
        }
        for name, values in turns.items()
    }
    console.print(engines)
    ray = {name: through_ray(name, engines[name]["step_ms"]) for name in ("torch", "zero 2", "zero 3")}
    console.print(ray)
    return {
        "adapters": ADAPTERS,
        "rows_per_concept": 4,
        "one_process_two_threads_ms": 1e3 * statistics.median(whole[WARM:]),
        "engines": engines,
        "ray_steps": RAY_STEPS,
        "ray": ray,
    }


def measure_changes(console: Console) -> dict[str, Any]:
    """What adapters cost that come and go: packs of several sizes in this process, and every engine on two workers."""
    torch.set_num_threads(2)
    packs = {str(size): changes(load_base_model("pocket"), size, TorchEngine) for size in PACK_SIZES}
    console.print(packs)
    return {"rows_per_concept": ROWS, "packs": packs, "pair_adapters": ADAPTERS, "pair": run_pair("changes")[0]}


def through_ray(engine: str, bare_ms: float) -> dict[str, float]:
    """The same pack as a job on a Ray of its own: a step of its workers, and the seconds that are around the steps."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = {"workers": 2, "zero_stage": STAGES[engine], "max_pack": ADAPTERS, "checkpoint_every": 10**6}
        training, evaluation = {"steps": RAY_STEPS}, {"enabled": False}
        spec = write_spec(Path(folder), ADAPTERS, cluster=cluster, training=training, evaluation=evaluation)
        started = time.perf_counter()
        step_ms = 1e3 * statistics.median(steps_through_ray(spec, f"file://{folder}/storage")[WARM:])
        seconds = time.perf_counter() - started
    around = seconds - RAY_STEPS * step_ms / 1e3
    return {"step_ms": step_ms, "to_bare": step_ms / bare_ms, "seconds": seconds, "around": around}


def steps_through_ray(spec: Path, storage: str) -> list[float]:
    """Run a job on a Ray of its own, in a process of its own, and return the seconds of the steps it reported."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.benchmark.cluster.timed_job", str(spec), storage],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CatClusterError(f"the job failed: {done.stderr[-2000:]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def measure_checkpoints(console: Console) -> dict[str, Any]:
    """Fifty steps of a pack with its checkpoints, in the background, against fifty without, in turns."""
    base = load_base_model("pocket")
    tasks = [concept_task(base, f"c{n}", 4, SPEC_DEFAULTS) for n in range(CHECKPOINT_ADAPTERS)]
    storage = os.environ.get("CAT_STORAGE")
    with tempfile.TemporaryDirectory() as folder, pack_step(base, tasks, SPEC_DEFAULTS) as step:
        store = open_store(storage or folder)
        series = [CheckpointStore(store, f"checkpoints/benchmark/{task.adapter_id}", task.adapter_id) for task in tasks]
        states = checkpoint_states(base)
        writer = CheckpointWriter(CHECKPOINT_EVERY)
        done = 0

        def train(saving: bool) -> float:
            nonlocal done
            started = time.perf_counter()
            for number in range(1, CHECKPOINT_EVERY + 1):
                step()
                done += 1
                if saving and writer.due(number):
                    writer.save([(one, AdapterState(done, state)) for one, state in zip(series, states, strict=True)])
            return time.perf_counter() - started

        with writer:
            turns = take_turns({"without": lambda: train(False), "with": lambda: train(True)}, 4)
        for one in series:
            one.clear()
    ratio = turns["with"].ratio(turns["without"])
    size = sum(t.numel() * t.element_size() for state in states for parts in state.values() for t in parts.values())
    result = {
        "adapters": CHECKPOINT_ADAPTERS,
        "steps": CHECKPOINT_EVERY,
        "checkpoints": 2,
        "store": store.url.split(":")[0],
        "checkpoint_mib": size / 2**20,
        "seconds_without": turns["without"].median,
        "ratio": ratio,
        "turns": {name: list(timed.turns) for name, timed in turns.items()},
    }
    console.print(result)
    return result


def checkpoint_states(base: Any) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Parameters and moments of the size that the pack's adapters have."""
    layers = adapted_layers(base.unet, "attention_ff")
    linears = [getattr(layer, "base", layer) for layer in map(base.unet.get_submodule, layers)]
    shapes = [shape for one in linears for shape in ((8, one.in_features), (one.out_features, 8))]
    parts = ("value", "mean", "square")
    tensors = [{part: torch.rand(shape) for part in parts} for shape in shapes]
    one = dict(zip(parameter_names(layers), tensors, strict=True))
    return [one] * CHECKPOINT_ADAPTERS


def measure_sharding(console: Console) -> dict[str, Any]:
    """What each of two workers holds of the base under ZeRO 2 and 3, pocket and of the size of SD 1.5."""
    found: dict[str, Any] = {}
    for size in ("pocket", "sd15"):
        stages = {stage: run_pair(f"{size}-{stage}") for stage in (2, 3)}
        resident = {stage: max(one["resident_base_mib"] for one in pair) for stage, pair in stages.items()}
        found[size] = {
            "ratio": resident[3] / resident[2],
            **{f"zero {stage}": pair for stage, pair in stages.items()},
        }
        console.print({size: {"ratio": found[size]["ratio"], "resident": resident}})
    return {"adapters": ADAPTERS, "rows_per_concept": 1, "latent_size": 16, "sizes": found}


def measure_batch(console: Console) -> dict[str, Any]:
    """Twenty concepts in one job on two workers, against jobs of one concept each, start-up included."""
    return {"concepts": BATCH, "settings": [batch_against_singles(console, rows, steps) for rows, steps in BATCHES]}


def batch_against_singles(console: Console, rows: int, steps: int) -> dict[str, Any]:
    """Submit the batch and a few of its concepts alone, each as a user does, and return the seconds of each job."""
    sections: dict[str, Any] = {
        "training": {"rows_per_concept": rows, "steps": steps},
        "evaluation": {"images_per_prompt": 1, "steps": 10},
        "cluster": {"workers": 2},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = train_timed(write_spec(folder / "batch", BATCH, **sections), folder / "batch" / "storage")
        console.print(f"{BATCH} concepts in one job: {batch:.0f} s")
        singles = []
        for number in range(SINGLES):
            place = folder / f"single-{number}"
            singles.append(train_timed(write_spec(place, 1, first=number, **sections), place / "storage"))
            console.print(f"single {number}: {singles[-1]:.0f} s")
    each = statistics.mean(singles)
    speed_up = BATCH * each / batch
    return {"rows": rows, "steps": steps, "batch": batch, "singles": singles, "each": each, "speed_up": speed_up}


def run_pair(part: str) -> list[dict[str, Any]]:
    """Run both workers of jobs/benchmark/cluster/two_workers.py to their end and return what each measured."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        files = [Path(folder) / f"{rank}.json" for rank in (0, 1)]
        workers = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "jobs.benchmark.cluster.two_workers",
                    part,
                    str(rank),
                    port,
                    str(file),
                ],
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank, file in enumerate(files)
        ]
        codes = [worker.wait(PATIENCE_SECONDS) for worker in workers]
        if codes != [0, 0]:
            raise CatClusterError(f"a worker of the pair ended with {codes}")
        return [json.loads(file.read_text()) for file in files]


def write_spec(folder: Path, concepts: int, *, first: int = 0, **sections: Any) -> Path:
    """Draw the photos of some concepts and write the job spec that teaches each as an adapter of its own."""
    designs = list(world.CONCEPTS.values())
    adapters = []
    for number in range(first, first + concepts):
        design = designs[number % len(designs)]
        draw_photos(folder / f"photos-{number}", DrawnSubject(design), None)
        concept = {"token": "sks", "class_noun": design.object, "images": str(folder / f"photos-{number}")}
        adapters.append({"id": f"concept-{number}", "concepts": [concept]})
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({"name": "benchmark", "adapters": adapters, **sections}))
    return path


def train_timed(spec: Path, storage: Path) -> float:
    """Train a job as a user does, in a process of its own, and return its seconds; all adapters must be published."""
    started = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).parent / "cat-cluster", "train", spec, "--storage", storage, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise CatClusterError(f"the job failed: {done.stderr[-2000:]}")
    return seconds
