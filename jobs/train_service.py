"""Entry point of the Ray job that is a training service: `python -m jobs.train_service OPTIONS`.

It runs `cat-cluster train-service OPTIONS`, and starts it again when it has ended by itself: a process that must not
continue ends with exit code 1, and the next goes on from the checkpoints. SIGTERM and Ctrl-C end both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import FrameType

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before it starts again; each is twice the one before
STEADY_SECONDS = 600.0  # after which the next pause is the first one again
_COMMAND = (sys.executable, "-m", "cat_cluster.cli", "train-service")


def main(options: Sequence[str] | None = None) -> int:
    """Run the service until it is asked to end; return its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    pause = FIRST_PAUSE
    while True:
        started = time.monotonic()
        code = _run_once(sys.argv[1:] if options is None else options)
        if code == 0:
            return 0
        if time.monotonic() - started >= STEADY_SECONDS:
            pause = FIRST_PAUSE
        say(f"the training service ended with exit code {code}: it starts again in {pause:.0f} s")
        try:
            time.sleep(pause)
        except KeyboardInterrupt:
            return code
        pause = min(2 * pause, LONGEST_PAUSE)


def say(text: str) -> None:
    """Write a line with the time."""
    sys.stderr.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n")
    sys.stderr.flush()


def _run_once(options: Sequence[str]) -> int:
    """Run the service to its end; asked to end, it gives its runs back first."""
    service = subprocess.Popen([*_COMMAND, *options])
    try:
        return service.wait()
    except KeyboardInterrupt:
        service.terminate()
        service.wait()
        return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
