"""The teacher pool: its predictions are the base's own, made once, whatever else happens to the run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cat_cluster.data.draws import AdapterTask, draw_batch, pool_entries
from cat_cluster.data.latents import TextCache
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.training import teacher as teacher_module
from cat_cluster.training.step import train_step
from cat_cluster.training.teacher import TeacherPool
from tests.unit.training.test_loop import Killed, bit_equal, member, relative_error, series, train
from tests.unit.training.test_step import (
    concept,
    gradients,
    of_several_sizes,
    open_bank,
    open_engine,
    task,
    trained_weights,
    with_mask,
    with_odd_words,
    with_training,
)


@pytest.fixture(params=["tiny_base_folder", "tiny_xl_folder"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return load_base_model(str(request.getfixturevalue(request.param)))


def filled(base: BaseModel, bank: LoraBank, *tasks: AdapterTask) -> TeacherPool:
    pool = TeacherPool()
    pool.fill(base, bank, TextCache(base), tasks, nullcontext)
    return pool


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_from_the_pool_is_the_step_that_asks_the_teacher(base: BaseModel, masked: bool) -> None:
    """Independent oracle: the same rows with their keys taken away, so that the teacher is asked about each."""
    first = concept(base, "sks", alpha=2.0)
    tea = task(
        "tea",
        with_odd_words(base, with_mask(first) if masked else first, concept(base, "zwx", alpha=0.7)),
        cat_fraction=0.5,
        decoy_fraction=0.5,
        teacher="pool",
        pool_size=3,
    )
    found = []
    for keys in (True, False):
        bank = open_bank(base, [trained_weights(base, 4, seed=1)])
        pool = filled(base, bank, tea)
        batch = draw_batch([tea], [5], 1000)
        assert all(batch.pool_keys)
        if not keys:
            batch = replace(batch, pool_keys=(None,) * len(batch.pool_keys))
        losses = train_step(base, bank, TextCache(base), batch, [tea.training], open_engine(base, bank), pool)
        found.append((losses.cat_M, gradients(bank, 1)))
        bank.detach()
    assert (found[0][0] > 0).all()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-8)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_where_the_teacher_rides_in_the_students_call_the_pool_answers_for_its_rows(
    base: BaseModel, masked: bool
) -> None:
    """As at ZeRO 3. Oracle: the teacher in a call of its own, asked about every row; here about every second one."""
    first = concept(base, "sks", alpha=2.0)
    tea = task("tea", (with_mask(first) if masked else first,), rows_per_concept=4, teacher="pool", pool_size=3)
    found, asked = [], list[int]()
    for joined in (True, False):
        bank = open_bank(base, [trained_weights(base, 4, seed=1)])
        pool, engine = filled(base, bank, tea), open_engine(base, bank)
        engine.joined_teacher = joined
        batch = draw_batch([tea], [5], 1000)
        keys = [key if joined and place % 2 else None for place, key in enumerate(batch.pool_keys)]
        hook = base.unet.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
        losses = train_step(
            base, bank, TextCache(base), replace(batch, pool_keys=tuple(keys)), [tea.training], engine, pool
        )
        hook.remove()
        found.append((losses.cat_M, gradients(bank, 1)))
        bank.detach()
    students, terms = 4 + int((~batch.outside_M).sum()), len(batch.outside_M)
    assert asked == [students + terms - terms // 2, terms, students]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-8)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_the_base_is_asked_once_about_each_entry_and_never_in_a_step(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    really = teacher_module.predict_base

    def counting(unet, bank, noisy, timestep, text):  # type: ignore[no-untyped-def]
        asked.append(len(noisy))
        return really(unet, bank, noisy, timestep, text)

    monkeypatch.setattr(teacher_module, "predict_base", counting)
    pair = [
        member(base, task(name, (concept(base, "sks", alpha=alpha),), teacher="pool", pool_size=4, draw_key="pair"))
        for name, alpha in (("one", 2.0), ("two", 9.0), ("plain", 0.0))
    ]
    train(base, pair)
    assert sum(asked) == 2 * 4, "two views of four entries, shared by adapters on equal draws; plain LoRA needs none"


def test_what_an_adapter_that_leaves_drew_from_goes_unless_another_draws_from_it(base: BaseModel) -> None:
    one = task("one", (concept(base, "sks", alpha=2.0),), teacher="pool", pool_size=4, draw_key="pair")
    two = replace(one, adapter_id="two")
    bank = open_bank(base, [trained_weights(base, 4, seed=1)])
    pool = filled(base, bank, one, two)
    [*keys] = (entry.key for entry in pool_entries(one, 1000))
    like = torch.zeros(len(keys), 4, 8, 8)
    pool.forget("one")
    assert pool.known(like, keys).abs().amax(dim=(1, 2, 3)).min() > 0
    pool.forget("two")
    pool.forget("stranger")
    for key in keys:
        with pytest.raises(KeyError):
            pool.known(like[:1], [key])


@pytest.mark.parametrize("masked", [False, True])
def test_entries_are_those_that_rows_are_drawn_from(base: BaseModel, masked: bool) -> None:
    photos = with_mask(of_several_sizes(base, concept(base, "sks", alpha=1.0)))
    photos = photos if masked else replace(photos, masks=())
    mug = task("mug", (photos,), rows_per_concept=3, teacher="pool", pool_size=5, prior_prompt="empty")
    entries = {entry.key: entry for entry in pool_entries(mug, 1000)}
    prompts = [entry.prior_prompt for entry in entries.values()]
    assert prompts.count("") == 2 * 5
    assert prompts.count(photos.removed_prompts[1]) == len(entries) - 2 * 5 == (5 if masked else 0)
    seen = set()
    for step in range(40):
        batch = draw_batch([mug], [step], 1000)
        for row, key, prompt in zip(batch.cat_row_M.tolist(), batch.pool_keys, batch.prior_prompts, strict=True):
            assert key is not None
            seen.add(key)
            assert torch.equal(batch.noise[row], entries[key].noise)
            assert int(batch.timestep_B[row]) == entries[key].timestep
            assert prompt == entries[key].prior_prompt
    assert seen == set(entries)
    strata = sorted(entry.timestep for entry in entries.values() if entry.prior_prompt == "")
    assert all(200 * (i // 2) <= t < 200 * (i // 2 + 1) for i, t in enumerate(strata))


def test_keys_tell_apart_all_that_changes_the_prediction(base: BaseModel) -> None:
    mug = task("mug", (concept(base, "sks", alpha=1.0),), teacher="pool", pool_size=2)
    other_photos = replace(mug.concepts[0], moments=tuple(view + 1 for view in mug.concepts[0].moments))
    variants = [
        mug,
        with_training(mug, seed=8),
        with_training(mug, draw_key="other"),
        with_training(mug, prior_prompt="class_noun"),
        replace(mug, concepts=(other_photos,)),
    ]
    keys = [entry.key for one in variants for entry in pool_entries(one, 1000)]
    assert len(set(keys)) == len(keys) == 4 * len(variants)
    assert list(pool_entries(with_training(mug, teacher="online"), 1000)) == []


@pytest.mark.slow
def test_packed_and_resumed_training_from_a_pool_keep_their_laws(base: BaseModel, tmp_path: Path) -> None:
    def pack() -> list:  # type: ignore[type-arg]
        return [
            member(base, task("mug", (concept(base, "sks", alpha=5.0),), teacher="pool", pool_size=3)),
            member(
                base,
                task("tea", (concept(base, "zwx", alpha=1.0),), teacher="pool", pool_size=6, cat_fraction=0.5),
                rank=2,
            ),
            member(base, task("online", (concept(base, "ohwx", alpha=1.0),))),
        ]

    whole = train(base, pack())
    for alone in pack():
        separate = train(base, [alone])[alone.task.adapter_id]
        assert relative_error(whole[alone.task.adapter_id].weights, separate.weights) <= 1e-3

    def die(report) -> None:  # type: ignore[no-untyped-def]
        if report.step == 9:
            raise Killed

    with pytest.raises(Killed):
        train(base, pack(), checkpoints=series(tmp_path, pack()), on_step=die)
    resumed = train(base, pack(), checkpoints=series(tmp_path, pack()))
    assert all(bit_equal(whole[name].weights, resumed[name].weights) for name in whole)
