"""`adapters list`: everything, or a part of it that says where the rest is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from tests.support.counted_stores import fill
from tests.support.ingress_server import publish
from tests.support.tiny_jobs import CommandLine, assert_refused

NAMES = [f"mug-{number}" for number in range(7)]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    unet = torch.nn.ModuleDict({"mid": torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})})
    template = publish(Registry(LocalStore(tmp_path / "one")), unet, "f" * 64, "base")
    fill(tmp_path / "storage", template, NAMES)
    return tmp_path / "storage"


def test_everything_is_listed_or_as_much_as_was_asked_for(command: CommandLine, storage: Path) -> None:
    listed = command("adapters", "list", "--storage", storage, "--json").json()
    assert set(listed) == {"adapters"}
    assert [one["adapter_id"] for one in listed["adapters"]] == NAMES
    found, after = [], []
    for _ in range(3):
        part = command("adapters", "list", "--storage", storage, "--json", "--limit", "3", *after).json()
        found += [one["adapter_id"] for one in part["adapters"]]
        assert part["has_more"] == (len(found) < len(NAMES))
        after = ["--after", found[-1]]
    assert found == NAMES
    rest = command("adapters", "list", "--storage", storage, "--json", "--after", "mug-4").json()
    assert [one["adapter_id"] for one in rest["adapters"]] == NAMES[5:]


def test_everything_is_in_the_order_of_the_ids_and_pages_in_that_of_the_store(
    command: CommandLine, storage: Path
) -> None:
    template = Registry(LocalStore(storage)).resolve("mug-0")
    fill(storage, template, ["cup", "cup-lora"])
    names = ["cup", "cup-lora", *NAMES]
    whole = command("adapters", "list", "--storage", storage, "--json").json()
    assert [one["adapter_id"] for one in whole["adapters"]] == names
    first = command("adapters", "list", "--storage", storage, "--json", "--limit", "1").json()["adapters"]
    rest = command("adapters", "list", "--storage", storage, "--json", "--after", first[0]["adapter_id"]).json()
    assert {one["adapter_id"] for one in (*first, *rest["adapters"])} == set(names)


def test_a_table_says_that_there_are_more(command: CommandLine, storage: Path) -> None:
    part = command("adapters", "list", "--storage", storage, "--limit", "2")
    assert "there are more: --after mug-1" in part.err
    assert ("mug-1" in part.out, "mug-2" in part.out) == (True, False)
    whole = command("adapters", "list", "--storage", storage)
    assert all(name in whole.out for name in NAMES)
    assert whole.err == ""


def test_bad_values_are_refused(command: CommandLine, storage: Path) -> None:
    assert_refused(command("adapters", "list", "--storage", storage, "--after", "Not an id"), "is not an adapter id")
    assert command("adapters", "list", "--storage", storage, "--limit", "0").code == 2
