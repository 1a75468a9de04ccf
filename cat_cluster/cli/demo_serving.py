"""The demo's last step: the service is started as a user would start it, and asked for adapters and stacks at once."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cat_cluster.errors import ServingError
from cat_cluster.evaluation.grid import Column, Grid, Picture
from cat_cluster.evaluation.report import Served, ServedPicture, Stacks

READY_S = 120.0
STOP_S = 60.0
SEED = 7


@dataclass(frozen=True)
class Ask:
    """One picture to draw: its prompt, and the model: an adapter, a stack "a+b", or None for the base."""

    model: str | None
    prompt: str


@dataclass(frozen=True, eq=False)
class StackRow:
    """One row of the stacks' grid: a prompt about a concept, its place among the adapters, and one of its photos."""

    prompt: str
    concept: int
    photo: Picture


@dataclass(frozen=True)
class DemoService:
    """A running service of the demo's registry."""

    address: str

    def draw(self, asks: Sequence[Ask]) -> list[dict[str, Any]]:
        """Ask for all of them at once; returns the answers in their order. Raises ServingError."""
        with ThreadPoolExecutor(len(asks)) as pool:
            return list(pool.map(self._draw, asks))

    def probe(self, adapter: str) -> str:
        """Let the service take a canonical probe of an adapter, and return its drift state."""
        _ask(self.address, f"/v1/adapters/{adapter}/probe", {})
        return str(_ask(self.address, f"/v1/adapters/{adapter}/drift")["state"])

    def _draw(self, ask: Ask) -> dict[str, Any]:
        body = {"model": ask.model, "prompt": ask.prompt, "seed": SEED, "num_inference_steps": 25}
        return _ask(self.address, "/v1/images/generations", body)


def draw_together(service: DemoService, adapters: Sequence[str], token_prompt: str, plain_prompt: str) -> Served:
    """Draw a prompt with each adapter and the base at once, and probe each adapter.

    Every adapter gets the prompt with the token and the one without; the base gets the one without.
    """
    asks = [Ask(None, plain_prompt)]
    asks += [Ask(name, prompt) for name in adapters for prompt in (plain_prompt, token_prompt)]
    answers = service.draw(asks)
    drift = {name: service.probe(name) for name in adapters}
    pictures = [
        ServedPicture(
            label=ask.model or "base model",
            prompt=ask.prompt,
            png=_png(answer),
            model=answer["model"],
            drift="" if ask.model is None else drift[ask.model],
        )
        for ask, answer in zip(asks, answers, strict=True)
    ]
    facts = [answer["data"][0]["facts"] for answer in answers]
    return Served(
        pictures=tuple(pictures),
        adapters_in_call=max(fact["most_adapters"] for fact in facts),
        rows_in_call=max(fact["most_rows"] for fact in facts),
        seconds=max(fact["wait_s"] + fact["denoise_s"] + fact["decode_s"] for fact in facts),
    )


def draw_stacks(service: DemoService, adapters: Mapping[str, Sequence[str]], rows: Sequence[StackRow]) -> Stacks:
    """Draw every row with the base, and by each method with the adapter of its concept alone and with all of them.

    adapters: method's label -> its adapters, in the order of the concepts.
    """
    models: dict[tuple[str, str], list[str | None]] = {("Untouched", "Base model"): [None] * len(rows)}
    for label, names in adapters.items():
        models[label, "One adapter"] = [names[row.concept] for row in rows]
        models[label, f"Stack of {len(names)}"] = ["+".join(names)] * len(rows)
    answers = service.draw([Ask(m, row.prompt) for own in models.values() for m, row in zip(own, rows, strict=True)])
    pictures = iter(np.asarray(Image.open(io.BytesIO(_png(answer))).convert("RGB")) for answer in answers)
    columns = [Column(block, title, "", tuple(next(pictures) for _ in rows)) for block, title in models]
    photos = Column("The concept", "Photos", "", tuple(row.photo for row in rows))
    grid = Grid(tuple(row.prompt for row in rows), (SEED,) * len(rows), (*columns, photos))
    return Stacks(grid, adapters)


@contextmanager
def serving(storage: Path, log: Path, base: str) -> Iterator[DemoService]:
    """Run `cat-cluster serve` on a free port while the block runs; what it prints goes to `log`.

    Raises ServingError when it does not come up.
    """
    port = _free_port()
    command = [sys.executable, "-m", "cat_cluster.cli", "serve", "--storage", str(storage), "--port", str(port)]
    command += ["--base", base]
    # No keys of the user's: this service is for one minute, and for this machine alone.
    environment = {name: value for name, value in os.environ.items() if name not in ("CAT_API_KEYS", "CAT_ADMIN_KEYS")}
    with log.open("wb") as output:
        service = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait_until_ready(service, f"http://127.0.0.1:{port}", log)
            yield DemoService(f"http://127.0.0.1:{port}")
        finally:
            service.send_signal(signal.SIGINT)
            try:
                service.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(service.pid, signal.SIGKILL)


def _wait_until_ready(service: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if service.poll() is not None:
            raise ServingError(f"the service ended before it was ready; its output is in {log}")
        try:
            _ask(address, "/ready")
            return
        except ServingError:
            time.sleep(0.5)
    raise ServingError(f"the service was not ready after {READY_S:.0f} s; its output is in {log}")


def _png(answer: Mapping[str, Any]) -> bytes:
    return base64.b64decode(answer["data"][0]["b64_json"])


def _ask(address: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=READY_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise ServingError(f"{path} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
    except OSError as error:
        raise ServingError(f"the service at {address} does not answer ({error})") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
