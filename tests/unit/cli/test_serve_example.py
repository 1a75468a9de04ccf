"""The request that `cat-cluster serve` prints, run by a shell against a server that answers as the service does."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cat_cluster.cli.serve import _example_request


class Keyed(BaseHTTPRequestHandler):
    """Gives a picture to those who have the key, and reads the request."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["prompt"]
        allowed = self.headers.get("authorization") == "Bearer sesame"
        picture = {"data": [{"b64_json": base64.b64encode(b"a picture").decode()}]}
        answer = json.dumps(picture if allowed else {"error": {"message": "a key is needed"}}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Keyed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    everything = {**os.environ, "PATH": path, **environment}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=everything, capture_output=True, text=True)


def test_it_draws_with_the_key_and_says_why_not_without(address: str, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"an earlier picture")
    refused = run(_example_request(address, keyed=False), tmp_path)
    assert (refused.returncode, refused.stderr) == (1, "a key is needed\n")
    assert image.read_bytes() == b"an earlier picture"
    drawn = run(_example_request(address, keyed=True), tmp_path, KEY="sesame")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert image.read_bytes() == b"a picture"
