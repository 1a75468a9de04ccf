"""Adapters that join and leave a pack between two steps become what they would have become alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.data.latents import TextCache
from cat_cluster.errors import CheckpointError
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Text
from cat_cluster.training import loop
from cat_cluster.training.loop import Pack, PackMember
from tests.unit.training.test_loop import (
    SHORT,
    STEPS,
    MakePack,
    bit_equal,
    changing_captions,
    members,
    other_optimisers,
    relative_error,
    series,
    train,
    with_text,
)

pytestmark = pytest.mark.slow


@contextmanager
def pack_of(base: BaseModel, known: list[PackMember], first: PackMember, **options: Any) -> Iterator[Pack]:
    """A pack in which any of the known adapters may train."""
    layers = dict.fromkeys(layer for one in known for layer in one.initial.layers)
    bank = LoraBank.attach(base.network, layers=list(layers))
    try:
        with Pack(base, bank, [first], **options) as pack:
            yield pack
    finally:
        bank.detach()


@pytest.mark.parametrize("pack", [members, other_optimisers, with_text])
def test_adapters_that_come_and_go_are_the_ones_trained_alone(
    of_each_family: BaseModel, tmp_path: Path, pack: MakePack
) -> None:
    """Mug is parked at its third step and again at its eighth; tea and plain come while others train, and end."""
    base = of_each_family
    wanted = {one.task.adapter_id: train(base, [one])[one.task.adapter_id] for one in pack(base)}
    known = {one.task.adapter_id: one for one in pack(base)}
    stores = {name: series(tmp_path, [one])[0] for name, one in known.items()}
    found, done = {}, []
    known = {name: replace(one, checkpoints=stores[name]) for name, one in known.items()}
    with pack_of(base, list(known.values()), known["mug"]) as running:

        def steps(count: int) -> None:
            done.extend(dict(running.step().done) for _ in range(count))

        steps(2)
        running.change(join=[known["tea"]])
        steps(1)
        assert not bit_equal(running.result("mug").weights, wanted["mug"].weights)
        running.change(leave=["mug"])
        steps(2)
        running.change(join=[known["mug"]])
        steps(5)
        running.change(leave=["mug"], join=[known["plain"]])
        steps(SHORT)
        assert running.training == ()
        found |= {name: running.result(name) for name in ("plain", "tea")}
        running.change(leave=["plain", "tea"], join=[known["mug"]])
        while running.training:
            steps(1)
        found["mug"] = running.result("mug")
    assert [one["mug"] for one in done if "mug" in one] == list(range(1, STEPS + 1))
    assert [one["tea"] for one in done if "tea" in one] == list(range(1, STEPS + 1))
    assert stores["plain"].steps()[-1] == SHORT
    for name, adapter in wanted.items():
        assert relative_error(found[name].weights, adapter.weights) <= 1e-3
        assert found[name].history["steps"] == adapter.history["steps"]


def test_who_comes_or_goes_changes_nothing_of_the_others(base: BaseModel, tmp_path: Path) -> None:
    mug, tea, plain = other_optimisers(base)
    store = series(tmp_path, [mug])[0]
    mug = replace(mug, checkpoints=store)
    with pack_of(base, [mug, tea, plain], mug) as running:
        for _ in range(3):
            running.step()
        before = running.result("mug")
        running.change(join=[tea])
        assert bit_equal(running.result("mug").weights, before.weights)
        running.change(leave=["tea"])
        after = running.result("mug")
        assert bit_equal(after.weights, before.weights)
        assert after.history == before.history
        for _ in range(5):
            running.step()
        company = running.result("mug").weights
    with pack_of(base, [mug, tea, plain], mug) as alone:
        for _ in range(8):
            alone.step()
        assert bit_equal(alone.result("mug").weights, company)


def test_texts_are_bounded_from_when_an_adapter_with_captions_that_change_joins(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mug, tea, plain = members(base)
    changing = changing_captions(base)[1]
    kept: list[dict[str, object]] = []

    class Watched(TextCache):
        def __call__(self, prompts: Sequence[str]) -> list[Text]:
            kept.append(self.texts)  # type: ignore[arg-type]
            return super().__call__(prompts)

    monkeypatch.setattr(loop, "TextCache", Watched)
    monkeypatch.setattr(loop, "KEPT_CHUNKS", 3)
    with pack_of(base, [mug, tea, plain], mug) as running:
        running.step()
        assert len(kept[-1]) > 3
        running.change(join=[changing])
        for _ in range(2):
            running.step()
        assert len(kept[-1]) == 3


def test_texts_of_those_who_have_left_do_not_stay_for_ever(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MOST_CHUNKS", 4)
    with pack_of(base, members(base), members(base)[0]) as running:
        running.change(join=members(base)[1:])
        running.step()
        assert len(running._encode_text.texts) == 4


def test_who_cannot_join_or_leave_is_told_why(base: BaseModel) -> None:
    mug, tea, plain = members(base)
    with pack_of(base, [mug, tea, plain], mug) as running:
        with pytest.raises(ValueError, match="nobody would be left"):
            running.change(leave=["mug"])
        with pytest.raises(ValueError, match="plain cannot leave: it is not in the pack"):
            running.change(leave=["plain"])
        with pytest.raises(ValueError, match="mug cannot join: it is there already"):
            running.change(join=[tea, mug])
        assert running.training == ("mug",)


def test_a_newcomer_with_damaged_checkpoints_harms_nobody(base: BaseModel, tmp_path: Path) -> None:
    mug, tea, plain = members(base)
    store = series(tmp_path, [tea])[0]
    store.store.put(f"{store.prefix}/00000003.json", b"{}")
    with pack_of(base, [mug, tea, plain], mug) as running:
        running.step()
        with pytest.raises(CheckpointError, match="checkpoint 3 is damaged"):
            running.change(join=[replace(tea, checkpoints=store)])
        assert running.step().done == {"mug": 2}
