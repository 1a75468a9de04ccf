"""How prompts are read, over HTTP: a request's own wish, the service's settings, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cat_cluster.errors import SpecError
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.calls import Event, Failed, ImageCall
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import ScriptedEngine, ask, assert_refused, listening, only


@pytest.fixture
def weighing(engine: ScriptedEngine, tmp_path: Path) -> Iterator[httpx2.Client]:
    """A client of a service that weights words where nobody says otherwise, and reads two chunks."""
    settings = ServeSettings(base="base", weighting="a1111", max_prompt_chunks=2)
    registry = Registry(LocalStore(tmp_path))
    with listening(only(engine), registry, settings, Access(settings)) as live, live.http() as client:
        yield client


@pytest.mark.parametrize(
    ("fields", "weighting"),
    [({}, "none"), ({"weighting": None}, "none"), ({"weighting": "none"}, "none"), ({"weighting": "a1111"}, "a1111")],
)
def test_words_have_weights_where_a_request_asks(
    http: httpx2.Client, engine: ScriptedEngine, fields: dict[str, Any], weighting: str
) -> None:
    assert ask(http, **fields).status_code == 200
    assert (engine.calls[0].weighting, engine.calls[0].prompt_chunks) == (weighting, 4)


@pytest.mark.parametrize(
    ("fields", "weighting"), [({}, "a1111"), ({"weighting": None}, "a1111"), ({"weighting": "none"}, "none")]
)
def test_a_service_may_weight_them_where_a_request_says_nothing(
    weighing: httpx2.Client, engine: ScriptedEngine, fields: dict[str, Any], weighting: str
) -> None:
    assert ask(weighing, **fields).status_code == 200
    assert (engine.calls[0].weighting, engine.calls[0].prompt_chunks) == (weighting, 2)


def test_tags_are_taken_out_before_words_are_weighted(http: httpx2.Client, engine: ScriptedEngine) -> None:
    ask(http, prompt="a (cup <lora:cup:0.8>:1.2) in snow", weighting="a1111")
    assert engine.calls[0].prompt == "a (cup :1.2) in snow"
    assert str(engine.calls[0].adapters[0].reference) == "cup@latest"


@pytest.mark.parametrize("value", ["A1111", "compel", "", 1, True, ["a1111"]])
def test_another_weighting_is_refused_by_its_field(http: httpx2.Client, engine: ScriptedEngine, value: Any) -> None:
    error = assert_refused(ask(http, weighting=value), 400, "invalid_value", "weighting")
    assert "'none' or 'a1111'" in error["message"]
    assert engine.calls == []


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_weight_that_cannot_be_blames_its_prompt(http: httpx2.Client, engine: ScriptedEngine, field: str) -> None:
    async def refuse(call: ImageCall) -> AsyncIterator[Event]:
        yield Failed.of(SpecError(f"{field}: 'a' has the weight 99"))

    engine.script = refuse
    assert_refused(ask(http, weighting="a1111"), 400, "invalid_value", field)


@pytest.mark.parametrize("chunks", [0, 17])
def test_a_service_reads_a_number_of_chunks_that_it_can_hold(chunks: int) -> None:
    with pytest.raises(ValueError, match="max_prompt_chunks"):
        ServeSettings(max_prompt_chunks=chunks)
