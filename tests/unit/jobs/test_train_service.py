"""The entry point of a training service that is a Ray job: it starts the service again, and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import train_service

ROOT = Path(__file__).resolve().parents[3]
TWICE = """
import pathlib, sys
ends = pathlib.Path(sys.argv[1])
ends.write_text(ends.read_text() + "x" if ends.exists() else "x")
sys.exit(0 if len(ends.read_text()) == 3 else 1)
"""
GIVES_BACK = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("given back")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("works", flush=True)
time.sleep(60)
"""


def test_a_service_that_ends_by_itself_starts_again_until_it_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(train_service, "_COMMAND", (sys.executable, "-c", TWICE))
    monkeypatch.setattr(train_service.time, "sleep", pauses.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert train_service.main([str(tmp_path / "ends")]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert pauses == [1.0, 2.0]
    assert capsys.readouterr().err.count("ended with exit code 1") == 2


def test_asked_to_end_it_waits_until_the_runs_are_given_back(tmp_path: Path) -> None:
    code = f"from jobs import train_service; train_service._COMMAND = {(sys.executable, '-c', GIVES_BACK)!r}; "
    program = f"{code}import sys; sys.exit(train_service.main([{str(tmp_path / 'end')!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    process.terminate()
    assert process.wait(30) == 0
    assert (tmp_path / "end").read_text() == "given back"
