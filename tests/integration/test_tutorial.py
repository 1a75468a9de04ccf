"""docs/tutorial.md and the program of docs/api.md, run as they stand on the page."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.http.schema import ImageRequest

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SAVED_AS = re.compile(r"[Ss]ave this as\s+`([\w.-]+)`")
SECONDS = 800  # minutes more than it takes, for a machine with other work

pytestmark = pytest.mark.timeout(SECONDS + 60)


def pieces(page: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Return a page's files by name, its shell blocks that are run, and those that say why they are not."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    files: dict[str, str] = {}
    run, skipped = [], []
    for block in _BLOCK.finditer(text):
        reason, language, body = block.groups()
        if language == "sh":
            (skipped if reason else run).append(body)
        else:
            *_, name = _SAVED_AS.findall(text[: block.start()])
            assert name not in files, f"two blocks are saved as {name}"
            files[name] = body
    return files, run, skipped


def run_script(folder: Path, script: str) -> str:
    """Run a shell script in a folder as a reader would, with this environment's commands; return its stdout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CAT_")}
    paths = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CAT_CACHE_DIR": str(folder / "cache"),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",  # as in the other tests, which may run beside this one
    }
    process = subprocess.Popen(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env={**environment, **paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):  # what bash started, if it is still running
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has followed the tutorial."""
    folder = tmp_path_factory.mktemp("my-project")
    files, run, _ = pieces("tutorial.md")
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "printed.txt").write_text(run_script(folder, "\n".join(run)), encoding="utf-8")
    return folder


def distance(one: Path, other: Path) -> float:
    """Mean difference of two images in levels of 255."""
    pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) for path in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


def test_the_tutorial_makes_an_adapter_that_does_what_the_page_says(project: Path) -> None:
    scores = json.loads((project / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    assert scores["identity_gain"] > 0.05
    assert scores["base_drift"] < 0.12
    assert scores["kps"] > 0.05
    changed = distance(project / "with-token.png", project / "base.png")
    kept = distance(project / "without-token.png", project / "base.png")
    assert kept < changed / 2
    assert (project / "exported" / "pytorch_lora_weights.safetensors").stat().st_size > 0
    assert '"alias": "prod"' in (project / "printed.txt").read_text(encoding="utf-8")


def test_the_program_of_the_api_page_draws_the_same_images(project: Path) -> None:
    files, *_ = pieces("api.md")
    assert sum(bool(line.strip()) for line in files["program.py"].splitlines()) <= 16
    (project / "program.py").write_text(files["program.py"], encoding="utf-8")
    assert "already published" in run_script(project, "python program.py")
    for name in ("with-token", "without-token", "base"):
        assert distance(project / f"api-{name}.png", project / f"{name}.png") < 0.02  # one level here and there


def test_what_is_not_run_says_why_and_is_right() -> None:
    _, _, skipped = pieces("tutorial.md")
    assert len(skipped) == 3
    (request,) = [block for block in skipped if "curl" in block]
    words = shlex.split(request.replace("\\\n", " "))
    ImageRequest.model_validate_json(words[words.index("-d") + 1])
