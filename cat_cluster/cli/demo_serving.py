"""The demo's last step: the service is started as a user would start it, and asked for every adapter at once."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cat_cluster.errors import ServingError
from cat_cluster.evaluation.report import Served, ServedPicture

READY_S = 120.0
STOP_S = 60.0


def serve_once(storage: Path, adapters: Sequence[str], token_prompt: str, plain_prompt: str, log: Path) -> Served:
    """Start `cat-cluster serve` on a free port, draw a prompt with each adapter and the base at once, probe, and stop.

    Every adapter gets the prompt with the token and the one without; the base gets the one without. Its output goes
    to `log`. Raises ServingError when the service does not come up or does not answer.
    """
    with _running(storage, log) as address:
        wanted = [
            (None, plain_prompt),
            *((name, prompt) for name in adapters for prompt in (plain_prompt, token_prompt)),
        ]
        with ThreadPoolExecutor(len(wanted)) as pool:
            answers = list(pool.map(lambda ask: _draw(address, *ask), wanted))
        drift = {name: _probed(address, name) for name in adapters}
        pictures = [
            ServedPicture(
                label=adapter or "base model",
                prompt=prompt,
                png=base64.b64decode(answer["data"][0]["b64_json"]),
                model=answer["model"],
                drift="" if adapter is None else drift[adapter],
            )
            for (adapter, prompt), answer in zip(wanted, answers, strict=True)
        ]
        facts = [answer["data"][0]["facts"] for answer in answers]
        return Served(
            pictures=tuple(pictures),
            adapters_in_call=max(fact["most_adapters"] for fact in facts),
            rows_in_call=max(fact["most_rows"] for fact in facts),
            seconds=max(fact["wait_s"] + fact["denoise_s"] + fact["decode_s"] for fact in facts),
        )


@contextmanager
def _running(storage: Path, log: Path) -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-m", "cat_cluster.cli", "serve", "--storage", str(storage), "--port", str(port)]
    # No keys of the user's: this service is for one minute, and for this machine alone.
    environment = {name: value for name, value in os.environ.items() if name not in ("CAT_API_KEYS", "CAT_ADMIN_KEYS")}
    with log.open("wb") as output:
        service = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait_until_ready(service, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
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


def _draw(address: str, adapter: str | None, prompt: str) -> dict[str, Any]:
    body = {"model": adapter, "prompt": prompt, "seed": 7, "num_inference_steps": 25}
    return _ask(address, "/v1/images/generations", body)


def _probed(address: str, adapter: str) -> str:
    """Let the service take a canonical probe of an adapter, and return its drift state."""
    _ask(address, f"/v1/adapters/{adapter}/probe", {})
    return str(_ask(address, f"/v1/adapters/{adapter}/drift")["state"])


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
