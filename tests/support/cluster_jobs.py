"""What the chaos tests of distributed training share: drivers to kill, exact step journals, a store under watch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from cat_cluster.errors import CatClusterError
from cat_cluster.pipeline.job import AdapterResult, Silent, run_job
from cat_cluster.registry import Registry
from cat_cluster.runs.listing import list_runs
from cat_cluster.runs.run import Run
from cat_cluster.settings import Settings
from cat_cluster.spec.job import load_spec
from cat_cluster.store import LocalStore, ObjectStore, open_store
from tests.support.tiny_jobs import open_registry, relative_change

HOOKS = Path(__file__).parent / "worker_hooks"
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_SECONDS = 240
WORKER = "ray::RayTrainWorker"  # how Ray names the processes of a worker group,
PACK_TASK = "ray::train pack"  # and the task of a pack


@dataclass(frozen=True)
class Note:
    """A step that a worker finished. done: how many each adapter has done of its own."""

    rank: int
    pid: int
    done: dict[str, int]


class StepLog:
    """Every step that every worker of a test has finished, in order: see worker_hooks/sitecustomize.py."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def notes(self) -> list[Note]:
        """All steps so far; a line that a kill cut off is none."""
        if not self.path.exists():
            return []
        lines = [line.split(maxsplit=2) for line in self.path.read_text().split("\n")[:-1]]
        own = [(rank, pid, json.loads(done).items()) for rank, pid, done in lines]
        # In a pack the run and its attempt stand before the id.
        return [Note(int(rank), int(pid), {name.rpartition("/")[2]: n for name, n in done}) for rank, pid, done in own]

    def reached(self) -> int:
        """The highest step of any worker."""
        return max((step for note in self.notes() for step in note.done.values()), default=0)

    def redone(self) -> list[int]:
        """How many steps each start of a worker group did again; fails where a group left a step out.

        A step that no worker had noted at the time is not counted: of a killed one that is at most the last.
        """
        reached: dict[str, int] = {}
        last: dict[tuple[int, str], int] = {}
        again = []
        for note in (note for note in self.notes() if note.rank == 0):
            resumed = []
            for name, step in note.done.items():
                if (note.pid, name) in last:
                    assert step == last[note.pid, name] + 1, note
                elif name in reached:
                    resumed.append(reached[name] + 1 - step)
                else:
                    assert step == 1, note
                last[note.pid, name] = step
                reached[name] = max(reached.get(name, 0), step)
            again += [max(resumed)] if resumed else []
        return again


def _uses(pid: int, folder: str) -> bool:
    """Say whether the process has a file of the folder open."""
    descriptors = f"/proc/{pid}/fd"
    return any(os.readlink(f"{descriptors}/{one}").startswith(f"{folder}/") for one in os.listdir(descriptors))


@dataclass
class Process:
    """A process of a test; it and all the Ray processes it starts have their logs in a temporary folder of its own."""

    popen: subprocess.Popen[str]
    temporary: Path
    log: Path

    def family(self) -> list[psutil.Process]:
        """The process and all it started that are alive, orphans too (Ray overwrites what else could name them)."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid == self.popen.pid or _uses(process.pid, str(self.temporary)):
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """The training workers among them."""
        return self.named(WORKER)

    def named(self, beginning: str) -> list[psutil.Process]:
        """Those among them whose command line begins so."""
        found = []
        for process in self.family():
            with suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(beginning):
                    found.append(process)
        return found

    def await_true(self, condition: Callable[[], object], pause: float = 0.02) -> None:
        """Wait until the condition holds; fails when the process ends first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.popen.poll() is None, f"has ended:\n{self.said()[-3000:]}"
            assert time.monotonic() < deadline, f"no progress:\n{self.said()[-3000:]}"
            time.sleep(pause)

    def said(self) -> str:
        """What the process has written."""
        return self.log.read_text(errors="replace")

    def send(self, line: str) -> str:
        """Write a line to its input and return the line it answers."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()
        return self.popen.stdout.readline().strip()

    def kill(self) -> None:
        """End the process itself as a crash does; what it started finds out alone."""
        self.popen.kill()
        self.popen.wait()

    def end(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the process to end by itself and return its exit code."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.said()[-3000:]}") from None


@dataclass
class Site:
    """A place to run one job in: its spec, its storage in S3, and the processes that work on it."""

    folder: Path
    spec: Path
    url: str
    processes: list[Process] = field(default_factory=list)

    @property
    def journal(self) -> StepLog:
        """The steps of all workers here."""
        return StepLog(self.folder / "journal")

    @property
    def store(self) -> ObjectStore:
        """The storage, with nothing remembered."""
        return open_store(self.url)

    def drive(self, address: str | None = None) -> Process:
        """Start `cat-cluster train`, with a Ray of its own or on the cluster at the address."""
        command = ["-m", "cat_cluster.cli", "train", str(self.spec), "--storage", self.url]
        return self.start([*command, *([] if address is None else ["--address", address])])

    def cluster(self, *cpus: int) -> tuple[Process, str]:
        """Start a cluster with a node for each number and return it and its address."""
        process = self.start(["-m", "tests.support.node_cluster", *map(str, cpus)], stdout=subprocess.PIPE)
        assert process.popen.stdout is not None
        address = process.popen.stdout.readline().strip()
        assert address, process.said()[-3000:]
        return process, address

    def await_step(self, step: int, driver: Process) -> None:
        """Wait until any worker has finished the step."""
        driver.await_true(lambda: self.journal.reached() >= step)

    def run(self) -> Run:
        """The one run of the storage."""
        (progress,), damaged = list_runs(self.store)
        assert not damaged
        return Run(self.store, progress.run_id)

    def objects(self) -> dict[str, bytes]:
        """Every object of the storage."""
        return {key: self.store.get(key) for key in self.store.list("")}

    def start(self, command: list[str], *, stdout: int | None = None) -> Process:
        """Start Python with a command line, in an environment of its own."""
        log = self.folder / f"{len(self.processes)}.log"
        temporary = Path(tempfile.mkdtemp(prefix="cc-", dir="/tmp"))  # Ray's sockets allow 107 characters of path
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {
            "CAT_TEST_JOURNAL": str(self.folder / "journal"),
            "CAT_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HOOKS}{os.pathsep}{ROOT}",
            "RAY_TMPDIR": str(temporary),
            "TMPDIR": str(temporary),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            # A node counts as lost after two seconds of silence, not after fifteen.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
        }
        with log.open("w") as output:
            popen = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=output if stdout is None else stdout,
                stderr=output,
                text=True,
                env={**inherited, **own},
                start_new_session=True,
            )
        process = Process(popen, temporary, log)
        self.processes.append(process)
        return process

    def clean(self) -> None:
        """Leave no process and no folder behind."""
        for process in self.processes:
            left = process.family()
            for one in left:
                with suppress(psutil.Error):
                    one.kill()
            psutil.wait_procs(left, timeout=5)
            with suppress(subprocess.TimeoutExpired):
                process.popen.wait(5)
            for stream in (process.popen.stdin, process.popen.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            shutil.rmtree(process.temporary, ignore_errors=True)


@contextmanager
def suspended(processes: list[psutil.Process]) -> Iterator[None]:
    """Hold processes still, as a machine that swaps or a debugger does."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)


class Watcher(threading.Thread):
    """Reads the registry all the time: whatever it lists must be whole at that very moment. A context manager."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.problems: list[str] = []
        self.looks = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Look until stopped; twice a second, for the two processors are busy."""
        while not self.stopped.wait(0.5):
            try:
                self.look()
            except CatClusterError as error:
                self.problems.append(str(error))
            self.looks += 1

    def look(self) -> None:
        """Every listed revision verifies, and `latest`, where it is set, names one that loads."""
        registry = Registry(self.store)
        for summary in registry.list():
            self.problems += [f"damaged: {revision}" for revision in summary.damaged]
            for revision in summary.revisions:
                self.problems += registry.verify(f"{summary.adapter_id}@{revision}").problems
            if "latest" in summary.aliases:
                registry.load_weights(registry.resolve(summary.adapter_id))

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()


class _Published(Silent):
    """Shows nothing, and wants every adapter published."""

    def finished(self, result: AdapterResult) -> None:
        """The reference must not fail."""
        assert result.outcome == "published", result.reason


def train_whole(spec: Path, folder: Path) -> Path:
    """The job without Ray and without interruption; return its storage."""
    torch.set_num_threads(1)
    run_job(load_spec(spec), LocalStore(folder), Settings(device="cpu"), _Published())
    return folder


def check_published(store: ObjectStore, whole: Path, adapters: tuple[str, ...]) -> None:
    """Each adapter was published once, with the weights of the job that nobody disturbed, and no checkpoint is left."""
    ours, theirs = Registry(store), open_registry(whole)
    for name in adapters:
        one, other = ours.resolve(name), theirs.resolve(name)
        assert one.revision == other.revision
        assert relative_change(ours.load_weights(one), theirs.load_weights(other)) <= 1e-3
        assert [move.revision for move in ours.alias_history(name, "latest")] == [one.revision]
    assert {summary.adapter_id: list(summary.revisions) for summary in ours.list()} == {
        name: [theirs.resolve(name).revision] for name in adapters
    }
    assert store.list("checkpoints/") == [], "checkpoints are left behind"
