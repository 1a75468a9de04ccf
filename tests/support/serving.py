"""The service as its users have it: on real Ray Serve, in processes of its own, over HTTP on a free port."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import generate
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from serve.settings import ServeSettings
from tests.support.denoised_images import random_adapter
from tests.support.motifs import GENERATIONS, Motif
from tests.support.ray_head import free_ports

ROOT = Path(__file__).resolve().parents[2]
PATH = GENERATIONS
LEVELS = 1  # of 255: a picture of 8 bits may round to the neighbouring level

Pixels = NDArray[np.int16]


@dataclass
class Served:
    """A service that answers at `url`; `metrics`: the address of its Ray node's metrics."""

    url: str
    process: subprocess.Popen[str]
    folder: Path
    metrics: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, command: str, *values: Any) -> Any:
        """Have the process obey a command of tests/support/serve_driver.py; its answer."""
        assert self.process.stdin is not None
        with self._lock:
            self.process.stdin.write(json.dumps([command, *values]) + "\n")
            self.process.stdin.flush()
            return self._answer()

    def http(self, **options: Any) -> httpx2.Client:
        """A client of the service."""
        return httpx2.Client(base_url=self.url, timeout=120, **options)

    def log(self) -> str:
        """What the processes of Ray's workers have written to stderr."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.rglob("worker-*.err")))

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the service ended: {(self.folder / 'driver.err').read_text()[-3000:]}"
        return json.loads(line)


def deployment_of(settings: ServeSettings, **changes: Any) -> dict[str, Any]:
    """The document of a Deployment that sets no CPU of the machine aside."""
    return {"settings": settings.model_dump(mode="json"), "engine_cpus": 0.0, **changes}


def publish_random(registry: Registry, base: BaseModel, adapter_id: str, seed: int) -> Manifest:
    """Publish an adapter of random weights that shows in every picture; another seed makes another revision."""
    weights = random_adapter(base, seed)
    resolved = ResolvedAdapter(
        id=adapter_id,
        base=base.name,
        method="cat",
        concepts=(ConceptSpec(token="sks", class_noun="cup", images="photos", alpha=2.0),),
        training=TrainingSpec(rank=weights.rank, seed=seed),
        evaluation=EvaluationSpec(),
    )
    return registry.publish(
        AdapterDraft(
            adapter_id=adapter_id,
            resolved=resolved,
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            image_digests=["1" * 64],
            weights=weights,
            training={},
        )
    )


class Gallery:
    """What `generate` draws of each revision, or stack of revisions, alone: the pictures that the service must give."""

    def __init__(self, registry: Registry, base: BaseModel, steps: int) -> None:
        self._registry, self._base, self._steps = registry, base, steps
        self._known: dict[tuple[str, Motif, int], Pixels] = {}

    def add(self, manifest: Manifest, motifs: Sequence[Motif], seeds: range) -> None:
        """Draw a revision's pictures of the motifs, each with every seed."""
        self.add_stack([(manifest, 1.0)], motifs, seeds)

    def add_stack(self, stack: Sequence[tuple[Manifest, float]], motifs: Sequence[Motif], seeds: range) -> None:
        """Draw the pictures of revisions together, each with its strength; one stack of the same revisions alone."""
        name = "+".join(manifest.name for manifest, _ in stack)
        assert not any(known == name for known, _, _ in self._known), f"{name} has pictures"
        weights = stack_weights([(self._registry.load_weights(one), strength) for one, strength in stack])
        bank = LoraBank.attach(self._base.unet, layers=list(weights.layers))
        bank.load(1, weights)
        try:
            wanted = [(motif, seed) for motif in motifs for seed in seeds]
            images = generate(self._base, bank, [motif.row(seed, self._steps) for motif, seed in wanted])
        finally:
            bank.detach()
        for (motif, seed), image in zip(wanted, images, strict=True):
            pixels = (image * 255).round().permute(1, 2, 0).cpu().numpy().astype(np.int16)
            self._known[name, motif, seed] = pixels

    def check_it_tells_apart(self) -> None:
        """No revision's picture could be taken for another's."""
        for motif, seed in {(motif, seed) for _, motif, seed in self._known}:
            pictures = np.stack([known for key, known in self._known.items() if key[1:] == (motif, seed)])
            apart = np.abs(pictures[:, None] - pictures[None]).reshape(len(pictures), len(pictures), -1).max(-1)
            assert apart[~np.eye(len(pictures), dtype=bool)].min(initial=255) > 4 * LEVELS

    def wrong(self, answer: Mapping[str, Any], motif: Motif) -> list[int]:
        """The seeds of an answer whose pictures are not those of the revision that it names."""
        return [
            one["seed"]
            for one in answer["data"]
            if np.abs(pixels_of(one) - self._known[answer["model"], motif, one["seed"]]).max() > LEVELS
        ]


def pixels_of(image: Mapping[str, Any]) -> Pixels:
    """The picture of an item of an answer."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))), dtype=np.int16)


def ask(http: httpx2.Client, model: str, steps: int, **fields: Any) -> httpx2.Response:
    """Ask for an image of a seed."""
    body = {"model": model, "prompt": "a photo of a cup", "seed": 1, "num_inference_steps": steps, **fields}
    return http.post(PATH, json=body)


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder for Ray, not one of pytest's: the paths of its sockets must stay under 108 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def surroundings(folder: Path, **environment: str) -> dict[str, str]:
    """The environment of a process with a Ray of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1", **environment}


@contextmanager
def served(deployment: Mapping[str, Any], *, nodes: bool = False, **environment: str) -> Iterator[Served]:
    """Serve a deployment (see deployment_of) until the end of the block, and see that no process is left.

    nodes: on several nodes of Ray, see tests/support/serve_driver.py.
    """
    with ray_folder() as folder:
        (folder / "deployment.json").write_text(json.dumps(deployment))
        (port,) = free_ports(1)
        words = [str(folder / "deployment.json"), str(port), *(["nodes"] if nodes else [])]
        with (folder / "driver.err").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.serve_driver", *words],
                cwd=ROOT,
                env=surroundings(folder, **environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        service = Served(f"http://127.0.0.1:{port}", process, folder)
        try:
            service.metrics = service._answer()["metrics"]
            yield service
        finally:
            end(process)


def end(process: subprocess.Popen[str], seconds: float = 30) -> None:
    """End a process, in its own way if that works, with all that it started."""
    with suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
        with suppress(subprocess.TimeoutExpired, OSError):
            if process.stdin is not None:
                process.stdin.close()
                process.wait(seconds)
        for one in (process, *started):
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(started, timeout=5)
    process.wait()


def until(condition: Callable[[], Any], seconds: float = 30, pause: float = 0.1) -> Any:
    """Wait for something to become true; what it was."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(pause)
    return found
