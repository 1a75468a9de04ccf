"""What starts training: a job that cannot run is refused before anything large is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_jobs import adapter, write_photos, write_spec

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("module", "first"), [("jobs.train", ()), ("cat_cluster.cli.__main__", ("train",))], ids=["driver", "command"]
)
def test_a_base_that_is_nowhere_is_refused_before_torch_is_loaded(
    tmp_path: Path, module: str, first: tuple[str, ...]
) -> None:
    photos = write_photos(tmp_path / "photos")
    spec = write_spec(tmp_path / "spec.yaml", tmp_path / "no-base", [adapter("cup", photos)])
    code = f"""
import atexit, sys
from {module} import main
atexit.register(lambda: print("loaded:", [name for name in ("torch", "diffusers", "ray") if name in sys.modules]))
sys.argv = ["program", *{[*first, str(spec), "--storage", str(tmp_path / "storage")]}]
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "base of adapter cup: base" in " ".join((ended.stdout + ended.stderr).split())
    assert "no-base" in ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded: []"


def test_a_run_enters_the_queue_without_torch(tmp_path: Path) -> None:
    """To import it, diffusers and transformers takes longer than a warm service takes to begin."""
    photos = write_photos(tmp_path / "photos")
    spec = write_spec(tmp_path / "spec.yaml", "pocket", [adapter("cup", photos)])
    code = f"""
import atexit, sys
from cat_cluster.cli.__main__ import main
atexit.register(lambda: print("loaded:", [name for name in ("torch", "diffusers", "ray") if name in sys.modules]))
sys.argv = ["program", *{["submit", str(spec), "--queue", "--storage", str(tmp_path / "storage")]}]
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded: []"
