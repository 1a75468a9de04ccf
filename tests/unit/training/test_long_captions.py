"""Captions of several chunks in a step: both terms read them whole, whatever lengths share a call with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cat_cluster.data.draws import AdapterTask, draw_batch
from cat_cluster.data.latents import TextCache
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.training.step import train_step
from tests.unit.training import test_step as steps
from tests.unit.training.test_loop import bit_equal, member, relative_error, series, train
from tests.unit.training.test_step import (
    concept,
    gradients,
    naive_gradients,
    open_bank,
    open_engine,
    task,
    trained_weights,
)

WORDS = "in snow on grass by a red car "


@pytest.fixture(params=["tiny_base_folder", "tiny_xl_folder"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return load_base_model(str(request.getfixturevalue(request.param)))


def long_task(base: BaseModel, adapter_id: str = "tea", **changes: object) -> AdapterTask:
    """Four views: of one chunk, of three, and one that is of two with its token and of one without."""
    room = base.tokenizer.model_max_length - 2
    edge = "a sks cup"
    while len(base.spell(edge)) <= room:
        edge += " car"
    one = concept(base, "sks", alpha=2.0)
    prompts = ("a sks cup", f"a sks cup {WORDS * 25}", edge)
    removed = tuple(prompt.replace("sks ", "") for prompt in prompts)
    assert len(base.spell(removed[2])) <= room
    moments = (*one.moments, one.moments[0] + 1)
    views = replace(one, moments=moments, prompts=prompts, removed_prompts=removed, sizes=(one.sizes[0],) * 3)
    return task(adapter_id, (views,), rows_per_concept=6, prompt_chunks=3, prior_prompt="mixture", **changes)


def states_of_chunks(base: BaseModel, prompts: list[str]) -> Tensor:
    """[1, n L, D] by a plain loop: each chunk's tokens between marks, alone, through the stock encoders."""
    [prompt] = prompts
    room = base.tokenizer.model_max_length - 2
    tokens = base.spell(prompt)
    found = []
    for start in range(0, min(3 * room, max(1, len(tokens))), room):
        states = []
        for tokenizer, model in zip(base.text_encoders.tokenizers, base.text_encoders.models, strict=True):
            marked = [tokenizer.bos_token_id, *tokens[start : start + room], tokenizer.eos_token_id]
            ids = torch.tensor([marked + [tokenizer.pad_token_id] * (room + 2 - len(marked))])
            with torch.no_grad():
                output = model(ids, output_hidden_states=True)
            of_two = len(base.text_encoders.models) == 2
            states.append(output.hidden_states[-2] if of_two else output.last_hidden_state)
        found.append(torch.cat(states, dim=-1))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("joint_rows", [True, False])
def test_the_step_equals_a_naive_reference_whose_rows_are_each_alone(
    base: BaseModel, joint_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row of the reference is padded or masked, and each of its chunks is encoded by itself."""
    one, weights = long_task(base, joint_rows=joint_rows), trained_weights(base, 4, seed=1)
    batch = draw_batch([one], [2], 1000)
    lengths = {len(text) for text in TextCache(base, chunks=3)(batch.prompts + batch.prior_prompts)}
    assert lengths == {77, 2 * 77, 3 * 77}
    bank = open_bank(base, [weights])
    train_step(base, bank, TextCache(base, chunks=3), batch, [one.training], open_engine(base, bank))
    ours = gradients(bank, 1)
    bank.detach()

    monkeypatch.setattr(steps, "states_of", states_of_chunks)
    theirs = naive_gradients(base, one, weights, batch)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-7)


def test_the_cat_loss_of_long_captions_is_nothing_at_the_start(base: BaseModel) -> None:
    """Student and teacher read the same text of a row, however long those beside it are."""
    one = long_task(base)
    bank = open_bank(base, [member(base, one).initial])
    batch = draw_batch([one], [2], 1000)
    losses = train_step(base, bank, TextCache(base, chunks=3), batch, [one.training], open_engine(base, bank))
    assert losses.cat_M.max() < 1e-10 * losses.identity_B.mean()


@pytest.mark.slow
def test_packing_resuming_and_the_pool_keep_their_laws(base: BaseModel, tmp_path: Path) -> None:
    def pack() -> list:  # type: ignore[type-arg]
        return [
            member(base, long_task(base, "mug")),
            member(base, long_task(base, "tea", teacher="pool", pool_size=3, shuffle_tags=True), rank=2),
        ]

    whole = train(base, pack())
    for alone in pack():
        separate = train(base, [alone])[alone.task.adapter_id]
        assert relative_error(whole[alone.task.adapter_id].weights, separate.weights) <= 1e-3
    train(base, pack(), steps=12, checkpoints=series(tmp_path, pack()))
    resumed = train(base, pack(), checkpoints=series(tmp_path, pack()))
    assert all(bit_equal(resumed[name].weights, whole[name].weights) for name in whole)
    cut = train(base, [replace(one, task=steps.with_training(one.task, prompt_chunks=1)) for one in pack()])
    assert not bit_equal(cut["mug"].weights, whole["mug"].weights)
