"""A packed job killed twelve times and started again each time; a registry whose files are damaged at random."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from cat_cluster.errors import CatClusterError
from cat_cluster.pipeline.job import AdapterResult, run_job
from cat_cluster.registry import Manifest
from cat_cluster.settings import Settings
from cat_cluster.spec.job import load_spec
from cat_cluster.store import LocalStore
from cat_cluster.training.step_report import StepReport
from tests.support.tiny_jobs import adapter, open_registry, published_weights, stored_files, write_photos, write_spec

pytestmark = pytest.mark.chaos

STEPS, CHECKPOINT_EVERY, KILLS, CORRUPTIONS = 60, 5, 12, 300
ADAPTERS = ("bowl", "cup", "mug")
PATIENCE_SECONDS = 120


class StepLog:
    """A JobListener that writes the number of each finished step to a file at once, so that a kill loses none."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def message(self, text: str) -> None:
        """Not kept."""

    def started(self, steps: Mapping[str, int], together: int) -> None:
        """A pack that needs no more steps has begun too."""
        os.write(self._file, b"begin\n")

    def step(self, report: StepReport) -> None:
        """One line a step."""
        os.write(self._file, f"{report.step}\n".encode())

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """These jobs measure nothing."""

    def finished(self, result: AdapterResult) -> None:
        """Not kept."""


def steps_of(journal: Path) -> list[int]:
    """The steps that an attempt finished, in order; a line that the kill cut off is none."""
    if not journal.exists():
        return []
    lines = journal.read_text().split("\n")[:-1]
    return [int(line) for line in lines if line != "begin"]


def attempt(spec: Path, storage: Path, cache: Path, journal: Path) -> None:
    """The body of a process that submits the job."""
    torch.set_num_threads(1)
    run_job(load_spec(spec), LocalStore(storage), Settings(cache_dir=cache, device="cpu"), StepLog(journal))


def start(*arguments: Path) -> ForkServerProcess:
    """Start an attempt; the server has imported torch already, so that it costs no seconds each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cat_cluster.pipeline.job"])
    process = context.Process(target=attempt, args=arguments, daemon=True)
    process.start()
    return process


def wait_for(line: str, journal: Path, process: ForkServerProcess) -> None:
    """Wait until the attempt has written the line, or has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.is_alive() and not (journal.exists() and line in journal.read_text().split()):
        assert time.monotonic() < deadline, "the attempt makes no progress"
        time.sleep(0.001)


class Watcher(threading.Thread):
    """Reads the registry all the time: whatever it lists must be whole at that very moment."""

    def __init__(self, storage: Path) -> None:
        super().__init__(daemon=True)
        self.storage = storage
        self.problems: list[str] = []
        self.looks = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self.stopped.is_set():
            try:
                self.look()
            except CatClusterError as error:
                self.problems.append(str(error))
            self.looks += 1
            time.sleep(0.02)

    def look(self) -> None:
        """Every listed revision verifies, and `latest`, where it is set, names one."""
        registry = open_registry(self.storage)
        for summary in registry.list():
            self.problems += [f"damaged: {revision}" for revision in summary.damaged]
            for revision in summary.revisions:
                self.problems += registry.verify(f"{summary.adapter_id}@{revision}").problems
            if "latest" in summary.aliases:
                registry.load_weights(registry.resolve(summary.adapter_id))


def write_job(folder: Path, base: Path) -> Path:
    adapters = [
        adapter(name, write_photos(folder / name, seed=number), training={"rank": 2 + number, "seed": number})
        for number, name in enumerate(ADAPTERS)
    ]
    training = {"steps": STEPS, "learning_rate": 0.005, "lr_schedule": "cosine", "warmup_steps": 4}
    cluster = {"checkpoint_every": CHECKPOINT_EVERY}
    return write_spec(folder / "spec.yaml", base, adapters, training=training, cluster=cluster)


@pytest.mark.timeout(900)
def test_a_packed_job_survives_twelve_kills(tiny_base_folder: Path, tmp_path: Path) -> None:
    spec, cache = write_job(tmp_path, tiny_base_folder), tmp_path / "cache"
    start(spec, tmp_path / "whole", cache, tmp_path / "whole.journal").join(PATIENCE_SECONDS)
    assert steps_of(tmp_path / "whole.journal") == list(range(1, STEPS + 1))

    rng = random.Random(12)
    # Ten kills while training, two while the finished adapters are published.
    points = [*sorted(rng.sample(range(1, STEPS), KILLS - 2)), STEPS, STEPS]
    storage = tmp_path / "storage"
    watcher = Watcher(storage)
    watcher.start()
    reached, killed = 0, 0
    for number, point in enumerate(points):
        journal = tmp_path / f"{number}.journal"
        process = start(spec, storage, cache, journal)
        begun = "begin" if point <= reached else str(point)
        wait_for(begun, journal, process)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        reached = check_progress(steps_of(journal), reached)
    journal = tmp_path / "last.journal"
    last = start(spec, storage, cache, journal)
    last.join(PATIENCE_SECONDS)
    assert last.exitcode == 0
    check_progress(steps_of(journal), reached)
    watcher.stopped.set()
    watcher.join()

    assert killed >= KILLS - 2, "too few of the kills met a living process"
    assert watcher.looks > KILLS
    assert watcher.problems == []
    for name in ADAPTERS:
        ours, theirs = (open_registry(place).resolve(name) for place in (storage, tmp_path / "whole"))
        assert ours.revision == theirs.revision
        assert ours.objects == theirs.objects, "the weights are not bit-equal"
        assert ours.training["history"] == theirs.training["history"]
        assert [move.revision for move in open_registry(storage).alias_history(name, "latest")] == [ours.revision]
    shown = {key for key in stored_files(storage) if "/.tmp-" not in key}
    named = {stored.key for name in ADAPTERS for stored in open_registry(storage).resolve(name).objects.values()}
    assert {key for key in shown if key.startswith("objects/")} == named, "objects are left that nobody names"
    assert not [key for key in shown if key.startswith("checkpoints/")], "checkpoints are left behind"


def check_progress(steps: list[int], reached: int) -> int:
    """An attempt goes on in order and repeats at most CHECKPOINT_EVERY steps; return how far the job has come."""
    if steps:
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert 0 <= reached + 1 - steps[0] <= CHECKPOINT_EVERY, (reached, steps[0])
    return max([reached, *steps])


@pytest.fixture(scope="module")
def healthy(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with two published adapters."""
    folder = tmp_path_factory.mktemp("healthy")
    adapters = [adapter(name, write_photos(folder / name, seed=n)) for n, name in enumerate(ADAPTERS[:2])]
    spec = write_spec(folder / "spec.yaml", tiny_base_folder, adapters)
    settings = Settings(cache_dir=folder / "cache", device="cpu")
    run_job(load_spec(spec), LocalStore(folder / "storage"), settings, StepLog(folder / "journal"))
    return folder / "storage"


def corrupted(data: bytes, rng: random.Random) -> bytes | None:
    """Damaged bytes: bits flipped, cut off, zeroed in part, grown, or None for a file that is gone."""
    kind = rng.choice(["flip", "flip", "flips", "cut", "cut", "zero", "grow", "empty", "gone"])
    damaged = bytearray(data)
    at = rng.randrange(len(data))
    if kind == "flip":
        damaged[at] ^= 1 << rng.randrange(8)
    elif kind == "flips":
        for _ in range(20):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del damaged[at:]
    elif kind == "zero":
        damaged[at : at + 16] = bytes(len(damaged[at : at + 16]))
    elif kind == "grow":
        damaged += rng.randbytes(rng.randint(1, 40))
    return None if kind == "gone" else b"" if kind == "empty" else bytes(damaged)


def test_no_damage_passes_for_an_adapter(healthy: Path, tmp_path: Path) -> None:
    """300 damages of one file each: an answer is the right one, or an error of ours; verify misses nothing."""
    storage = tmp_path / "storage"
    shutil.copytree(healthy, storage)
    right = {name: open_registry(storage).resolve(name) for name in ADAPTERS[:2]}
    digests = {name: published_weights(storage, name).digest() for name in right}
    files = sorted(path for path in storage.rglob("*") if path.is_file())
    rng = random.Random(300)
    refused = 0
    for _ in range(CORRUPTIONS):
        path = rng.choice(files)
        original = path.read_bytes()
        damaged = corrupted(original, rng)
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        for name, manifest in right.items():
            for reference in (name, manifest.name):
                refused += use(storage, reference, manifest, digests[name])
            check_verify(storage, manifest, path, changed=damaged != original)
        path.write_bytes(original)
    assert refused > CORRUPTIONS / 2, "the damages hit nothing"
    assert all(open_registry(storage).verify(name).ok for name in right)


def use(storage: Path, reference: str, right: Manifest, digest: str) -> bool:
    """Resolve and load; right bytes or an error of ours (True)."""
    registry = open_registry(storage)
    try:
        manifest = registry.resolve(reference)
        assert manifest == right
        assert registry.load_weights(manifest).digest() == digest
    except CatClusterError:
        return True
    return False


def check_verify(storage: Path, manifest: Manifest, path: Path, *, changed: bool) -> None:
    """verify calls a revision whole only while its manifest says what it said and none of its objects is changed."""
    registry = open_registry(storage)
    try:
        whole = registry.verify(manifest.name).ok
    except CatClusterError:
        return
    if whole:
        assert registry.resolve(manifest.name) == manifest
        named = {stored.key for stored in manifest.objects.values()}
        assert not changed or path.relative_to(storage).as_posix() not in named, f"verify does not see {path}"
