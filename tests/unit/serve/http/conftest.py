"""The HTTP service before a scripted engine."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import Live, ScriptedEngine, listening, only


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def live(engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = ServeSettings(base="base", images_per_key=12, max_body_bytes=8192)
    registry = Registry(LocalStore(tmp_path_factory.mktemp("storage")))
    with listening(only(engine), registry, settings, Access(settings)) as live:
        yield live


@pytest.fixture
def big(engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a service with the bodies that it takes by default."""
    settings = ServeSettings(base="base")
    registry = Registry(LocalStore(tmp_path_factory.mktemp("storage")))
    with listening(only(engine), registry, settings, Access(settings)) as live, live.http() as client:
        yield client


@pytest.fixture
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.http() as client:
        yield client


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0) as client:
        yield client
