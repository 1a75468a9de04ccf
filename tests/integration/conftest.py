"""Fixtures of the integration tests: photos, a judge, a published adapter, the command line, a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from cat_cluster.cluster.kuberay.checks.schemas import Schemas, load_schemas
from tests.support.browser_page import ARGUMENTS, CHROMIUM, RECORD, OpenPage, Watched
from tests.support.tiny_jobs import CommandLine, Finished, adapter, run_process, write_judge, write_photos, write_spec

if TYPE_CHECKING:
    from tests.support.ingress_server import Live, Shop


@dataclass(frozen=True)
class Published:
    """A storage with one adapter in it, `cup` with the token sks, and the spec that made it."""

    storage: Path
    spec: Path
    base: Path


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    """The schemas that manifests are held to."""
    return load_schemas()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "cup")


@pytest.fixture(scope="session")
def judge_folder(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "clip", tiny_base_folder / "tokenizer")


@pytest.fixture(scope="session")
def first_run(
    tiny_base_folder: Path, photos: Path, judge_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Published, Finished]:
    """`cat-cluster train SPEC --storage URL --json` in a process of its own, measured; and how it ended."""
    folder = tmp_path_factory.mktemp("published")
    evaluation = {
        "prompts": ["a picture of a {}", "a drawing of a {}"],
        "images_per_prompt": 1,
        "steps": 2,
        "judge": str(judge_folder),
    }
    spec = write_spec(
        folder / "spec.yaml",
        tiny_base_folder,
        [adapter("cup", photos)],
        training={"steps": 6, "learning_rate": 0.3},
        evaluation=evaluation,
    )
    storage = folder / "storage"
    finished = run_process("train", "--in-process", spec, "--storage", storage.as_uri(), "--json")
    return Published(storage, spec, tiny_base_folder), finished


@pytest.fixture
def published(first_run: tuple[Published, Finished], tmp_path: Path) -> Published:
    """A copy of that storage for one test to do with as it likes."""
    made, finished = first_run
    assert finished.code == 0, finished.err
    storage = tmp_path / "storage"
    shutil.copytree(made.storage, storage)
    return Published(storage, made.spec, made.base)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live(shop: Shop) -> Iterator[Live]:
    """The service with what a module's own `shop` has in it."""
    from tests.support.ingress_server import serving  # takes seconds that tests without a page need not wait

    with serving(shop) as live:
        yield live


@pytest.fixture(scope="module")
def page_url(live: Live) -> str:
    return live.url


@pytest.fixture
def open_page(browser: Browser, page_url: str) -> Iterator[OpenPage]:
    """Opens pages; at the end, none may have had an error or have asked another host."""
    opened: list[Watched] = []
    with ExitStack() as contexts:

        def open_one(width: int = 1280, height: int = 800, url: str = page_url, **options: Any) -> Watched:
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            contexts.callback(context.close)
            context.add_init_script(RECORD)
            opened.append(Watched(context.new_page(), url))
            return opened[-1]

        yield open_one
        for watched in opened:
            watched.check()
