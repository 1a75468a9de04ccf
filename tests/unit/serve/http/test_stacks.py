"""Stacks over HTTP: three places name adapters, they are one stack to the engine, and what cannot be is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cat_cluster import errors
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.calls import Accepted, Event, Failed, Finished, ImageCall
from serve.http.access import Access
from serve.http.schema import ImageRequest
from serve.http.stacks import RequestedStack
from serve.settings import ServeSettings
from tests.support.ingress_server import (
    ScriptedEngine,
    Shop,
    ask,
    assert_refused,
    furnish,
    listening,
    only,
    picture,
    until,
)
from tests.support.services import stack

R = "r-0123456789ab"

NAMED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model": "cup+mug"}, ("cup", "mug")),
    ({"model": f"cup@prod+mug@{R}+jar"}, ("cup@prod", f"mug@{R}", "jar")),
    ({"model": "cup+mug", "strength": 0.5}, ("cup:0.5", "mug:0.5")),
    ({"adapters": [{"model": "cup"}]}, ("cup",)),
    ({"adapters": [{"model": "cup", "strength": 0.5}, {"model": "mug@prod"}]}, ("cup:0.5", "mug@prod")),
    ({"adapters": [{"model": "cup", "strength": 0.5}, {"model": "mug", "strength": None}], "strength": 1.5},
     ("cup:0.75", "mug:1.5")),
    ({"adapters": [], "model": "cup"}, ("cup",)),
    ({"adapters": None, "model": "cup"}, ("cup",)),
    ({"adapters": [{"model": "cup"}], "model": "base"}, ("cup",)),
    ({"prompt": "a cup <lora:cup:0.8> in snow"}, ("cup:0.8",)),
    ({"prompt": "<lora:cup@prod> a cup <LORA:mug:0.25>", "strength": 2}, ("cup@prod:2", "mug:0.5")),
    ({"prompt": "a cup<lyco:mug:1>", "model": "cup"}, ("cup", "mug")),
    ({"prompt": "a <lora: mug@prod:0 >cup", "adapters": [{"model": "cup"}]}, ("cup", "mug@prod:0")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "members"), NAMED)
def test_every_way_to_name_adapters_is_one_stack(
    http: httpx2.Client, engine: ScriptedEngine, fields: dict[str, Any], members: tuple[str, ...]
) -> None:
    response = ask(http, **fields)
    assert response.status_code == 200, response.text
    (call,) = engine.calls
    assert call.adapters == stack(*members)
    names = "+".join(f"{member.reference.adapter_id}@{R}" for member in call.adapters)
    assert response.json()["model"] == response.headers["x-cat-model"] == names
    assert response.json()["cat"]["note"] is None


@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("a cup <lora:cup:0.8> in snow", "a cup in snow"),
        ("<lora:cup> a cup\nin snow <lora:mug:1>", "a cup\nin snow"),
        ("a cup, <lora:cup:1>, red", "a cup, , red"),
        ("a<lora:cup:1>b", "ab"),
        ("<lora:cup:1>", ""),
        ("a <hypernet:cup:1> b", "a <hypernet:cup:1> b"),
    ],
)
def test_what_names_an_adapter_is_not_drawn(
    http: httpx2.Client, engine: ScriptedEngine, prompt: str, drawn: str
) -> None:
    ask(http, prompt=prompt)
    assert engine.calls[0].prompt == drawn


def test_a_tag_in_the_negative_prompt_names_nothing(http: httpx2.Client, engine: ScriptedEngine) -> None:
    ask(http, negative_prompt="red <lora:cup:1>")
    assert (engine.calls[0].adapters, engine.calls[0].negative_prompt) == ((), "red <lora:cup:1>")


def test_a_base_may_have_the_sign_between_adapters_in_its_name() -> None:
    settings = ServeSettings(base="/models/sd+vae")
    for model, members in ((settings.base, ()), ("cup+mug", stack("cup", "mug"))):
        assert RequestedStack.of(ImageRequest(model=model, prompt="a cup"), settings).members == members


NINE = [f"a{number}" for number in range(9)]

REFUSED: list[tuple[dict[str, Any], int, str, str, str]] = [
    ({"model": "cup+mug+cup"}, 400, "invalid_value", "model", "cup is named twice"),
    ({"model": f"cup+cup@{R}"}, 400, "invalid_value", "model", "cup is named twice"),
    ({"adapters": [{"model": "cup"}, {"model": "cup@prod"}]}, 400, "invalid_value", "adapters.1.model", "twice"),
    ({"model": "cup", "prompt": "<lora:cup:1>"}, 400, "invalid_value", "prompt", "cup is named twice"),
    ({"model": "cup", "adapters": [{"model": "mug"}]}, 400, "invalid_value", "model", "leave one of the two out"),
    ({"model": "cup+mug", "adapters": [{"model": "jar"}]}, 400, "invalid_value", "model", "leave one of the two out"),
    ({"model": "+".join(NINE)}, 400, "invalid_value", "model", "up to 8 here; name fewer, or raise max_stack"),
    ({"adapters": [{"model": one} for one in NINE]}, 400, "invalid_value", "adapters", "9 adapters are named"),
    ({"model": "+".join(NINE[:8]), "prompt": "<lora:x>"}, 400, "invalid_value", "prompt", "9 adapters are named"),
    ({"adapters": [{"model": f"a{n}"} for n in range(33)]}, 400, "invalid_value", "adapters", "at most 32"),
    ({"model": "cup+Not A Name"}, 404, "model_not_found", "model", "'Not A Name' is not an adapter id"),
    ({"model": "cup+"}, 404, "model_not_found", "model", "'' is not an adapter id"),
    ({"model": "base+cup"}, 400, "invalid_value", "model", "'base' is the base model, which every image has"),
    ({"model": "cup+base"}, 400, "invalid_value", "model", "no stack names; leave it out"),
    ({"adapters": [{"model": "cup"}, {"model": "base"}]}, 400, "invalid_value", "adapters.1.model", "the base model"),
    ({"prompt": "<lora:base:1>"}, 400, "invalid_value", "prompt", "'base' is the base model, which every image has"),
    ({"model": "cup + mug"}, 404, "model_not_found", "model", "'cup ' is not an adapter id: drop the spaces"),
    ({"adapters": [{"model": " cup"}]}, 404, "model_not_found", "adapters.0.model", "drop the spaces"),
    ({"model": "cup:0.5+mug:0.7"}, 404, "model_not_found", "model",
     'given in `adapters`, as {"model": "cup", "strength": 0.5}, or in the prompt, as <lora:cup:0.5>'),
    ({"model": "mug@prod:0.7"}, 404, "model_not_found", "model", 'as {"model": "mug@prod", "strength": 0.7}, or in'),
    ({"adapters": [{"model": "cup:1"}]}, 404, "model_not_found", "adapters.0.model", "strength is given in `adapters`"),
    ({"model": "cup:high"}, 404, "model_not_found", "model", "'cup:high' is not an adapter id: use 1 to 63"),
    ({"adapters": [{"model": "cup"}, {"model": "a+b"}]}, 404, "model_not_found", "adapters.1.model",
     "'a+b' is a stack, which has no entry of its own: name each of its adapters by itself"),
    ({"prompt": "<lora:a+b:0.5>"}, 404, "model_not_found", "prompt", "'a+b' is a stack"),
    ({"adapters": [{"model": "cup", "strength": 2.5}]}, 400, "invalid_value", "adapters.0.strength", "less than"),
    ({"adapters": [{"model": "cup", "strength": "1"}]}, 400, "invalid_value", "adapters.0.strength", "number"),
    ({"adapters": [{"model": "cup", "weight": 1}]}, 400, "unknown_parameter", "adapters.0.weight", "no such"),
    ({"adapters": [{"strength": 1}]}, 400, "missing_parameter", "adapters.0.model", "required"),
    ({"adapters": ["cup"]}, 400, "invalid_value", "adapters.0",
     'adapters.0: is no adapter: write {"model": "cup"}, and "strength" beside it'),
    ({"adapters": [{"model": "cup"}, 7]}, 400, "invalid_value", "adapters.1", 'is no adapter: write {"model": ID}'),
    ({"adapters": {"model": "cup"}}, 400, "invalid_value", "adapters", "list"),
    ({"adapters": "cup"}, 400, "invalid_value", "adapters", "list"),
    ({"prompt": "<lora:my cup_v2:1>"}, 404, "model_not_found", "prompt", "'my cup_v2' is not an adapter id"),
    ({"prompt": "<lora:cup:0.5:0.2>"}, 400, "invalid_value", "prompt", "'cup:0.5:0.2' has two strengths: an adapter"),
    ({"prompt": "<lora:cup:nan>"}, 400, "invalid_value", "prompt", "'cup:nan' names no strength behind its ':'"),
    ({"prompt": "<lora:cup@prod:abc>"}, 400, "invalid_value", "prompt", "'cup@prod:abc' names no strength"),
    ({"prompt": "<lora:cup:-1>"}, 400, "invalid_value", "prompt", "a strength is 0 to 2"),
    ({"prompt": "<lora:cup:2.1>"}, 400, "invalid_value", "prompt", "'cup:2.1' is out of range: a strength is 0 to 2"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "code", "param", "told"), REFUSED)
def test_what_cannot_be_a_stack_is_refused_by_its_field(
    http: httpx2.Client, engine: ScriptedEngine, fields: dict[str, Any], status: int, code: str, param: str, told: str
) -> None:
    for stream in (False, True):
        assert told in assert_refused(ask(http, **fields, stream=stream), status, code, param)["message"]
    assert engine.calls == []


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A registry that has the adapters cup and mug."""
    return furnish(tiny_base_folder, tmp_path_factory.mktemp("storage"))


@pytest.fixture
def small(engine: ScriptedEngine, tmp_path: Path) -> Iterator[httpx2.Client]:
    """A client of a service with fewer slots than an image may have adapters."""
    settings = ServeSettings(base="base", slots=2, max_stack=3)
    with (
        listening(only(engine), Registry(LocalStore(tmp_path)), settings, Access(settings)) as live,
        live.http() as http,
    ):
        yield http


def test_more_adapters_than_slots_are_refused_with_the_remedy(small: httpx2.Client) -> None:
    assert ask(small, model="cup+mug").status_code == 200
    told = assert_refused(ask(small, model="cup+mug+jar"), 400, "invalid_value", "model")["message"]
    assert told.endswith("up to 2 here; name fewer, or raise slots")


def failing(error: errors.CatClusterError) -> Any:
    async def script(call: ImageCall) -> AsyncIterator[Event]:
        yield Failed.of(error)

    return script


OF_THE_ENGINE: list[tuple[errors.CatClusterError, dict[str, Any], int, str, str]] = [
    (errors.AdapterMismatchError("the stack has rank 24 in all"), {"model": "cup+mug"}, 422, "model_mismatch",
     "model"),
    (errors.AdapterMismatchError("the stack has rank 24 in all"),
     {"adapters": [{"model": "cup"}, {"model": "mug"}]}, 422, "model_mismatch", "adapters"),
    (errors.AdapterMismatchError("the stack has rank 24 in all"), {"model": "cup", "prompt": "<lora:mug>"}, 422,
     "model_mismatch", "prompt"),
    (errors.AdapterMismatchError(f"mug@{R} was trained on 'x'"), {"adapters": [{"model": "cup"}, {"model": "mug"}]},
     422, "model_mismatch", "adapters.1.model"),
    (errors.QuarantinedError(f"mug@{R} is quarantined"), {"model": "cup", "prompt": "<lora:mug>"}, 409,
     "model_quarantined", "prompt"),
    (errors.QuarantinedError(f"cup@{R} is quarantined"), {"model": "cup", "prompt": "<lora:mug>"}, 409,
     "model_quarantined", "model"),
    (errors.AdapterFormatError("weights of ..."), {"adapters": [{"model": "cup"}]}, 422, "model_damaged", "adapters"),
    (errors.AdapterFormatError(f"weights of mug@{R} have rank 3, its manifest says 2"),
     {"adapters": [{"model": "cup"}, {"model": "mug"}]}, 422, "model_damaged", "adapters.1.model"),
    (errors.RegistryError(f"the manifest adapters/mug/{R}/manifest.json is damaged"),
     {"adapters": [{"model": "cup"}, {"model": "mug"}]}, 400, "invalid_reference", "adapters.1.model"),
    (errors.RegistryError("the alias record aliases/mug/prod/00000002.json is damaged"),
     {"model": "cup", "prompt": "<lora:mug@prod>"}, 400, "invalid_reference", "prompt"),
    (errors.RegistryError(f"the spec of mug@{R} cannot be read"), {"model": "cup+mug"}, 400, "invalid_reference",
     "model"),
    (errors.ObjectNotFoundError(f"weights of mug@{R} is missing from /secret"),
     {"adapters": [{"model": "cup"}, {"model": "mug"}]}, 422, "model_damaged", "adapters.1.model"),
    (errors.ObjectUnreadableError("objects/abc in storage /secret is damaged"),
     {"adapters": [{"model": "cup"}, {"model": "mug"}]}, 422, "model_damaged", "adapters"),
    (errors.ObjectNotFoundError(f"weights of mug@{R} is missing from /secret"), {"model": "mug"}, 422, "model_damaged",
     "model"),
    (errors.AdapterMismatchError(f"the weights of mug@{R} have 9 bytes"), {"model": "cup", "prompt": "<lora:mug>"}, 422,
     "model_mismatch", "prompt"),
    (errors.ConflictError("the stack needs 2 slots at once"), {"model": "cup+mug"}, 409, "conflict", "model"),
    (errors.ConflictError("the stack needs 2 slots at once"), {"adapters": [{"model": "cup"}, {"model": "mug"}]}, 409,
     "conflict", "adapters"),
    (errors.SpecError("size: 17x17 is not served"), {"adapters": [{"model": "cup"}]}, 400, "invalid_value", "size"),
    (errors.AdapterNotFoundError("no adapter 'cup' in storage /secret"), {"adapters": [{"model": "cup"}]}, 404,
     "model_not_found", "adapters.0.model"),
    (errors.AdapterNotFoundError("no adapter 'cup' in storage /secret"), {"prompt": "<lora:cup:0.5>"}, 404,
     "model_not_found", "prompt"),
    (errors.AdapterNotFoundError("no adapter 'cup' in storage /secret"), {"model": "cup+mug"}, 404, "model_not_found",
     "model"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "fields", "status", "code", "param"), OF_THE_ENGINE)
def test_the_engines_errors_name_the_field_that_names_the_adapter(
    http: httpx2.Client,
    engine: ScriptedEngine,
    error: errors.CatClusterError,
    fields: dict[str, Any],
    status: int,
    code: str,
    param: str,
) -> None:
    engine.script = failing(error)
    told = assert_refused(ask(http, **fields), status, code, param)["message"]
    assert "/secret" not in told
    assert any(word in told for word in ("cup", "weights", "size", "mug", "one of the adapters", "the stack"))


@pytest.mark.parametrize(
    ("told", "fields", "param"),
    [
        ("no adapter 'mug@latest' in storage /secret", {"adapters": [{"model": "cup"}, {"model": "mug"}]},
         "adapters.1.model"),
        (f"mug@{R} was deleted: GET", {"model": "cup", "prompt": "<lora:mug>"}, "prompt"),
        ("no adapter 'cup@stable' in storage s3://key@secret/secret", {"model": "cup@stable+mug"}, "model"),
        (f"cup@{R} was deleted: GET", {"adapters": [{"model": "cup"}], "prompt": "<lora:mug>"}, "adapters.0.model"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_there_again_is_refused_by_its_field(
    engine: ScriptedEngine, shop: Shop, told: str, fields: dict[str, Any], param: str
) -> None:
    """The engine has not found it, and by the time that the registry is asked, or was asked last, it is there."""
    settings = ServeSettings(base="base")
    engine.script = failing(errors.AdapterNotFoundError(told))
    with (
        listening(only(engine), shop.registry, settings, Access(settings)) as live,
        live.http() as http,
    ):
        message = assert_refused(ask(http, **fields), 404, "model_not_found", param)["message"]
    assert "secret" not in message
    assert ("cup" if "cup" in told else "mug") in message


def test_the_log_names_every_member(
    http: httpx2.Client, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def script_of(model: str) -> Any:
        async def script(call: ImageCall) -> AsyncIterator[Event]:
            yield Accepted(model)
            yield Finished(0, 0, picture())

        return script

    engine.script = script_of(f"cup@{R}+mug@{R}")
    with caplog.at_level(logging.INFO, "cat_cluster.serve"):
        ask(http, model="cup+mug")
        engine.script = failing(errors.OverloadedError("full"))
        ask(http, model="cup+mug@prod")
        until(lambda: len(caplog.records) == 2)  # the log is written after the response
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["model"] for line in lines] == [f"cup@{R}+mug@{R}", "cup@latest+mug@prod"]


@pytest.mark.parametrize("path", ["models/cup+mug", "adapters/cup@prod+mug", "adapters/cup+mug/drift"])
def test_a_stack_has_no_entry_of_its_own(http: httpx2.Client, path: str) -> None:
    told = assert_refused(http.get(f"/v1/{path}"), 404, "model_not_found", "model")["message"]
    assert told.endswith("is a stack, which has no entry of its own: name each of its adapters by itself")
