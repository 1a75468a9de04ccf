"""The reading of photos in a process of its own, one request at a time; see photo_reader."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cat_cluster.data.photo_upload import UploadLimits
from cat_cluster.errors import StoreError
from cat_cluster.spec.job import JobSpec
from serve.http.http_errors import HttpError

_READER = (sys.executable, "-P", "-m", "serve.http.training.photo_reader")  # -P: not from the folder it runs in


class PhotoProcess:
    """Starts the process when it is needed, and anew where it has ended. limit_s: seconds of one request."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._using = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "training-photos")

    async def check(self, file: Path, name: str, limits: UploadLimits) -> dict[str, Any]:
        """Return what an upload holds; the archive to store of it then lies beside it under `archive`.

        Raises HttpError 400 that names the member and the remedy.
        """
        asked = {"do": "check", "file": str(file), "name": name, "limits": asdict(limits)}
        found: dict[str, Any] = await self._ask(asked, "file")
        return found

    async def digests(self, job: JobSpec) -> list[list[str]]:
        """Return the digests of a job's photos; HttpError 400 for what training would refuse; StoreError."""
        found: list[list[str]] = await self._ask({"do": "digest", "job": job.model_dump_json()}, "images")
        return found

    def close(self) -> None:
        """End the process."""
        with self._using:
            self._end()

    async def _ask(self, asked: dict[str, Any], field: str) -> Any:
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._thread, self._exchange, json.dumps(asked).encode())
        if "found" in answer:
            return answer["found"]
        if "away" in answer:
            raise StoreError(answer["away"])
        told = answer.get("refused") or f"{field}: {answer['too_large']}"
        raise HttpError(400, told, "invalid_value", param=field)

    def _exchange(self, line: bytes) -> dict[str, Any]:
        with self._using:
            answer, is_new = b"", False
            while not answer and not is_new:  # one that had nothing to do may end just now
                process, is_new = self._running()
                with suppress(BrokenPipeError):
                    answer = self._line(process, line)
            if answer.endswith(b"\n"):
                found: dict[str, Any] = json.loads(answer)
                return found
            is_late = process.poll() is None
            self._end()
        why = f"could not be read within {self._limit_s:g} s" if is_late else "ended the process that reads it"
        return {"too_large": f"{why}; send fewer or smaller photos"}

    def _line(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        """Return the answer to a line, or what there is of it when the time is up or the process ends."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        answer, until = b"", time.monotonic() + self._limit_s
        while not answer.endswith(b"\n"):
            left = max(0.0, until - time.monotonic())
            if not select.select([process.stdout], [], [], left)[0]:
                return answer or b"late"
            chunk = os.read(process.stdout.fileno(), 2**16)
            if not chunk:
                process.wait(self._limit_s)
                break
            answer += chunk
        return answer

    def _running(self) -> tuple[subprocess.Popen[bytes], bool]:
        """Return the process, and whether it was started just now."""
        if self._process is not None and self._process.poll() is None:
            return self._process, False
        self._end()
        self._process = subprocess.Popen(_READER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process, True

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
