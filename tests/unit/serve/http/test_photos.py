"""Training photos are personal data: they are for admins, and for others only where the operator says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import ScriptedEngine, assert_refused, listening, only, picture, publish

PHOTO, DRAWN = "photo-0-000.png", ["sample-0-with-0.png", "sample-0-without-0.png"]


@contextmanager
def served(tmp_path: Path, *, keys: bool, **options: Any) -> Iterator[httpx2.Client]:
    registry = Registry(LocalStore(tmp_path))
    publish(registry, torch.nn.ModuleDict({"mid": torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})}), "f" * 64, "b")
    settings = ServeSettings(base="base", **options)
    access = Access(settings, api_keys=["user"], admin_keys=["master"]) if keys else Access(settings)
    with listening(only(ScriptedEngine()), registry, settings, access) as live, live.http() as http:
        yield http


def seen(http: httpx2.Client, key: str | None) -> tuple[bool, int]:
    """Whether the listings name the photo, and the status of the photo itself; drawn samples are for everybody."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    listed = http.get("/v1/adapters", headers=headers).json()["data"][0]["latest"]["samples"]
    detailed = http.get("/v1/adapters/cup", headers=headers).json()["samples"]
    assert listed == detailed
    assert [name for name in listed if name != PHOTO] == DRAWN
    assert http.get(f"/v1/adapters/cup/samples/{DRAWN[0]}", headers=headers).content == picture()
    return PHOTO in listed, http.get(f"/v1/adapters/cup/samples/{PHOTO}", headers=headers).status_code


@pytest.mark.parametrize(
    ("key", "show", "expected"),
    [("user", False, (False, 403)), ("user", True, (True, 200)), ("master", False, (True, 200))],
)
def test_photos_are_for_admin_keys_or_where_they_are_shown(
    tmp_path: Path, key: str, show: bool, expected: tuple[bool, int]
) -> None:
    with served(tmp_path, keys=True, show_photos=show) as http:
        assert seen(http, key) == expected


def test_a_refusal_says_what_to_do_and_not_what_there_is(tmp_path: Path) -> None:
    with served(tmp_path, keys=True) as http:
        headers = {"authorization": "Bearer user"}
        for name in (PHOTO, "photo-0-design.json", "photo-9-999.png"):
            error = assert_refused(http.get(f"/v1/adapters/cup/samples/{name}", headers=headers), 403, "admin_only")
            assert "show_photos" in error["message"]
        known = http.get(f"/v1/adapters/cup/samples/{PHOTO}", headers={"authorization": "Bearer master"})
        again = {**headers, "if-none-match": known.headers["etag"]}
        assert http.get(f"/v1/adapters/cup/samples/{PHOTO}", headers=again).status_code == 403


def test_without_any_keys_whoever_uses_this_machine_is_the_admin(tmp_path: Path) -> None:
    with served(tmp_path, keys=False, cors_origins=("http://localhost:3000",)) as http:
        assert seen(http, None) == (True, 200)
        page = {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}
        assert http.get(f"/v1/adapters/cup/samples/{PHOTO}", headers=page).status_code == 403
