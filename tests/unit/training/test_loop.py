"""Laws of packed training: company, interruption and failure of a neighbour do not change an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel

from cat_cluster.data.draws import AdapterTask, ConceptMaterial
from cat_cluster.errors import CheckpointError
from cat_cluster.lora.bank import LoraBank, adapted_layers, parameter_names
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel
from cat_cluster.spec.sections import TextEncoderSpec
from cat_cluster.store.local import LocalStore
from cat_cluster.training.checkpoint import CheckpointStore, load_newest, tensor_names
from cat_cluster.training.loop import PackMember, TrainedAdapter, train_pack
from cat_cluster.training.methods import initial_weights, trained_layers
from cat_cluster.training.optimizer import state_names
from cat_cluster.training.step_report import StepReport
from tests.unit.training.test_step import concept, of_several_sizes, task, with_mask, with_odd_words, with_training

pytestmark = pytest.mark.slow

STEPS, SHORT, CHECKPOINT_EVERY = 20, 16, 6


def series(folder: Path, pack: list[PackMember]) -> list[CheckpointStore]:
    """One series of checkpoints per adapter of a pack."""
    store = LocalStore(folder)
    ids = [one.task.adapter_id for one in pack]
    return [CheckpointStore(store, f"checkpoints/{adapter_id}", adapter_id) for adapter_id in ids]


class Killed(Exception):
    """Stands for a process that dies between two steps."""


def layers_of(base: BaseModel, one: AdapterTask) -> tuple[str, ...]:
    """What an adapter trains: attention alone, as that is enough, and the text encoders if it asks for them."""
    return trained_layers(base, one.training.model_copy(update={"targets": "attention"}))


def member(
    base: BaseModel,
    one: AdapterTask,
    *,
    rank: int = 4,
    rate: float = 5e-3,
    clip: float | None = 1.0,
    steps: int = STEPS,
) -> PackMember:
    layers = layers_of(base, one)
    initial = initial_weights(base.network, layers, rank=rank, seed=one.training.seed, draw_key=one.draw_key)
    optimiser = {"learning_rate": rate, "max_grad_norm": clip, "warmup_steps": 3, "steps": steps}
    return PackMember(with_training(one, **optimiser), initial)


def members(base: BaseModel) -> list[PackMember]:
    """A pack of three; the last takes fewer steps than the others."""
    joint = with_odd_words(
        base,
        concept(base, "zwx", alpha=1.0, class_noun="fish"),
        concept(base, "ohwx", alpha=3.0, weight=2.0),
    )
    return [
        member(base, task("mug", (concept(base, "sks", alpha=5.0),), block_lr_weights={"down": 0.5, "up": 2.0})),
        member(base, task("tea", joint, cat_fraction=0.5, decoy_fraction=0.6, accumulate=2), rank=2, rate=2e-3),
        member(
            base,
            task("plain", (concept(base, "sks", alpha=0.0),), rows_per_concept=3, ema=0.9),
            rate=1e-2,
            clip=None,
            steps=SHORT,
        ),
    ]


def other_optimisers(base: BaseModel) -> list[PackMember]:
    """The pack with another optimiser for each of two members; Prodigy has little time, so its rate is high.

    The photos of the first are of two sizes, and one has a mask.
    """
    mug, tea, plain = members(base)
    photos = tuple(with_mask(of_several_sizes(base, one)) for one in mug.task.concepts)
    mug = replace(mug, task=replace(mug.task, concepts=photos))
    prodigy = {"optimizer": "prodigy", "learning_rate": 20.0, "block_lr_weights": None}
    adafactor = {"optimizer": "adafactor", "learning_rate": 0.5, "block_lr_weights": {"mid": 0.5}}
    return [
        replace(mug, task=with_training(mug.task, **prodigy, ema=0.5)),
        replace(tea, task=with_training(tea.task, **adafactor)),
        plain,
    ]


def with_text(base: BaseModel) -> list[PackMember]:
    """The pack with two members that train the text encoders, one of them at a rate of its own."""
    mug, tea, plain = members(base)
    tea, plain = (
        replace(one, task=with_training(one.task, text_encoder=TextEncoderSpec(learning_rate=rate)))
        for one, rate in ((tea, 8e-3), (plain, None))
    )
    return [mug, *(replace(one, initial=member(base, one.task, rank=one.initial.rank).initial) for one in (tea, plain))]


def changing_captions(base: BaseModel) -> list[PackMember]:
    """The pack with captions that change, of one member drawn from a pool."""
    tagged = [
        replace(one, task=replace(one.task, concepts=tuple(map(with_tags, one.task.concepts)))) for one in members(base)
    ]
    changes = {"caption_dropout": 0.3, "tag_dropout": 0.3, "shuffle_tags": True}
    pools = ({}, {"teacher": "pool", "pool_size": 6}, {})
    return [
        replace(one, task=with_training(one.task, **changes, **pool)) for one, pool in zip(tagged, pools, strict=True)
    ]


def with_tags(one: ConceptMaterial) -> ConceptMaterial:
    prompts, removed = (
        tuple(f"{text}, snow, dusk, grass" for text in texts) for texts in (one.prompts, one.removed_prompts)
    )
    return replace(one, prompts=prompts, removed_prompts=removed)


PACKS = pytest.mark.parametrize("pack", [members, other_optimisers, changing_captions, with_text])
MakePack = Callable[[BaseModel], list[PackMember]]


def train(
    base: BaseModel, pack: list[PackMember], *, checkpoints: Sequence[CheckpointStore] = (), **options: object
) -> dict[str, TrainedAdapter]:
    if checkpoints:
        pack = [replace(one, checkpoints=own) for one, own in zip(pack, checkpoints, strict=True)]
    layers = dict.fromkeys(layer for one in pack for layer in one.initial.layers)
    bank = LoraBank.attach(base.network, layers=list(layers))
    try:
        return {
            one.adapter_id: one
            for one in train_pack(base, bank, pack, **{"checkpoint_every": CHECKPOINT_EVERY, **options})
        }  # type: ignore[arg-type]
    finally:
        bank.detach()


def names(base: BaseModel, pack: list[PackMember]) -> list[list[str]]:
    """The names of the tensors in the checkpoints of each adapter."""
    return [tensor_names(parameter_names(layers_of(base, one.task)), state_names(one.task.training)) for one in pack]


def relative_error(found: AdapterWeights | None, wanted: AdapterWeights | None) -> float:
    """max over layers of ||W - W_ref||_F / ||W_ref||_F with W = B A."""
    assert found is not None
    assert wanted is not None
    errors = []
    for name, reference in wanted.layers.items():
        product = reference.up @ reference.down
        errors.append(((found.layers[name].up @ found.layers[name].down - product).norm() / product.norm()).item())
    return max(errors)


def bit_equal(one: AdapterWeights | None, other: AdapterWeights | None) -> bool:
    assert one is not None
    assert other is not None
    return all(
        torch.equal(one.layers[n].down, other.layers[n].down) and torch.equal(one.layers[n].up, other.layers[n].up)
        for n in one.layers
    )


@PACKS
def test_a_pack_gives_what_separate_runs_give(of_each_family: BaseModel, pack: MakePack) -> None:
    base = of_each_family
    packed = train(base, pack(base))
    for alone in pack(base):
        separate = train(base, [alone])[alone.task.adapter_id]
        assert relative_error(packed[alone.task.adapter_id].weights, separate.weights) <= 1e-3
    assert not bit_equal(packed["mug"].weights, packed["plain"].weights)


def test_several_calls_of_a_step_are_one_large_call(base: BaseModel) -> None:
    """Each adapter of a pack with a number of calls of its own; no call has more rows than were asked for."""
    pair = concept(base, "sks", alpha=5.0), concept(base, "zwx", alpha=1.0)
    several = [
        member(base, task("mug", pair[:1], cat_fraction=0.5, accumulate=3)),
        member(base, task("tea", pair, rows_per_concept=1, accumulate=2)),
        member(base, task("plain", (concept(base, "sks", alpha=0.0),))),
    ]
    large = [
        replace(one, task=with_training(one.task, rows_per_concept=one.task.training.rows_of_step, accumulate=1))
        for one in several
    ]
    assert [one.task.training.rows_per_concept for one in large] == [6, 2, 2]
    calls: list[int] = []
    hook = base.unet.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    reports: list[StepReport] = []
    found = train(base, several, on_step=reports.append)
    hook.remove()
    assert max(calls) == 2 + 1 + 2 + 2 + 2, "identity rows of all three, and the CAT rows of mug and tea"
    assert {report.rows for report in reports} == {6 + 3 + 4 + 4 + 2}
    wanted_reports: list[StepReport] = []
    wanted = train(base, large, on_step=wanted_reports.append)
    for adapter_id, adapter in wanted.items():
        assert relative_error(found[adapter_id].weights, adapter.weights) <= 1e-3
    for ours, theirs in zip(reports, wanted_reports, strict=True):
        for adapter_id, tokens in theirs.losses.items():
            for token, loss in tokens.items():
                assert ours.losses[adapter_id][token].identity == pytest.approx(loss.identity, rel=1e-3)


def test_an_adapter_with_ema_is_the_average_of_its_weights(base: BaseModel) -> None:
    """Oracle: diffusers' EMAModel over the parameters after each step; the training itself is as without."""
    one, layers = member(base, task("mug", (concept(base, "sks", alpha=5.0),))), adapted_layers(base.unet, "attention")
    last = train(base, [one])["mug"].weights
    bank = LoraBank.attach(base.unet, layers=layers)
    averages: list[EMAModel] = []

    def average(_: StepReport) -> None:
        if not averages:
            averages.append(EMAModel(bank.parameters(1), decay=0.6))
        averages[0].step(bank.parameters(1))

    averaged = replace(one, task=with_training(one.task, ema=0.6))
    (found,) = train_pack(base, bank, [averaged], on_step=average)
    assert bit_equal(bank.export(1), last)
    bank.detach()
    assert found.weights is not None
    assert not bit_equal(found.weights, last)
    shadows = dict(zip(parameter_names(layers), averages[0].shadow_params, strict=True))
    for name, layer in found.weights.layers.items():
        torch.testing.assert_close(layer.down, shadows[f"{name}.lora_A"].detach(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.up, shadows[f"{name}.lora_B"].detach(), rtol=1e-5, atol=1e-7)


@PACKS
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    of_each_family: BaseModel, tmp_path: Path, pack: MakePack
) -> None:
    base = of_each_family
    whole = train(base, pack(base))
    checkpoints = series(tmp_path, pack(base))
    seen: list[int] = []

    def die_at(step: int) -> object:
        def on_step(report: StepReport) -> None:
            seen.append(report.step)
            if report.step == step:
                raise Killed

        return on_step

    for step in (4, 9, 17):
        with pytest.raises(Killed):
            train(base, pack(base), checkpoints=checkpoints, on_step=die_at(step))
    resumed = train(base, pack(base), checkpoints=checkpoints, on_step=die_at(-1))
    assert seen == [*range(1, 5), *range(4, 10), *range(10, 18), *range(16, 21)]
    for adapter_id, adapter in whole.items():
        assert bit_equal(adapter.weights, resumed[adapter_id].weights)
        assert adapter.history == resumed[adapter_id].history


def test_a_nan_adapter_is_dropped_alone_and_stays_dropped_after_resuming(base: BaseModel, tmp_path: Path) -> None:
    pack = members(base)
    poisoned = concept(base, "zwx", alpha=1.0)
    poisoned.moments[1][:] = float("nan")
    bad = member(base, task("bad", (poisoned,)))
    poisoned_pack = [pack[0], bad, pack[2]]
    company = train(base, poisoned_pack, checkpoints=series(tmp_path, poisoned_pack))
    alone = train(base, [pack[0], pack[2]])
    assert company["bad"].weights is None
    assert "gradient not finite at step" in (company["bad"].dropped or "")
    for adapter_id in ("mug", "plain"):
        assert company[adapter_id].dropped is None
        assert relative_error(company[adapter_id].weights, alone[adapter_id].weights) <= 1e-3
    again = train(base, poisoned_pack, checkpoints=series(tmp_path, poisoned_pack))
    assert again["bad"].dropped == company["bad"].dropped
    assert bit_equal(again["mug"].weights, company["mug"].weights)


def test_a_neighbour_with_a_huge_loss_changes_nothing(base: BaseModel) -> None:
    loud = concept(base, "zwx", alpha=1.0)
    for view in loud.moments:
        view[: base.latent_channels] *= 100.0  # 10,000 times the squared error
    quiet = members(base)[0]
    both = train(base, [quiet, member(base, task("loud", (loud,)))])
    assert relative_error(both["mug"].weights, train(base, [quiet])["mug"].weights) <= 1e-3


def test_training_ends_when_every_adapter_was_dropped(base: BaseModel) -> None:
    poisoned = concept(base, "zwx", alpha=1.0)
    for view in poisoned.moments:
        view[:] = float("nan")
    steps: list[int] = []
    result = train(base, [member(base, task("bad", (poisoned,)))], on_step=lambda report: steps.append(report.step))
    assert steps == [1]
    assert result["bad"].weights is None


def test_reports_carry_losses_per_token(base: BaseModel) -> None:
    reports: list[StepReport] = []
    result = train(base, members(base), on_step=reports.append)
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert set(reports[-1].losses) == {"mug", "tea"}
    last = reports[SHORT - 1].losses
    assert set(last) == {"mug", "tea", "plain"}
    assert set(last["tea"]) == {"zwx", "ohwx"}
    assert last["plain"]["sks"].cat is None
    curves = result["tea"].history
    assert curves["steps"] == list(range(1, STEPS + 1))
    assert len(curves["ohwx"]["identity"]) == STEPS


def test_an_adapter_that_is_done_has_no_more_rows(base: BaseModel) -> None:
    reports: list[StepReport] = []
    result = train(base, members(base), on_step=reports.append)
    assert [dict(one.done) for one in reports] == [
        *({"mug": n, "tea": n, "plain": n} for n in range(1, SHORT + 1)),
        *({"mug": n, "tea": n} for n in range(SHORT + 1, STEPS + 1)),
    ]
    assert [(n, one.ended) for n, one in enumerate(reports, 1) if one.ended] == [
        (SHORT, ("plain",)),
        (STEPS, ("mug", "tea")),
    ]
    assert reports[0].steps == {"mug": STEPS, "tea": STEPS, "plain": SHORT}
    assert reports[SHORT].rows == reports[0].rows - 3
    assert result["plain"].history["steps"] == list(range(1, SHORT + 1))


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(base: BaseModel, tmp_path: Path, damage: str) -> None:
    checkpoints = series(tmp_path, members(base))
    whole = train(base, members(base), checkpoints=checkpoints)
    newest = tmp_path / "checkpoints" / "tea" / f"{STEPS:08d}.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(bytes(data if damage == "flip" else data[: len(data) // 2]))
    states = load_newest(checkpoints, names(base, members(base)), [STEPS, STEPS, SHORT])
    assert [None if state is None else state.step for state in states] == [18, 18, SHORT]
    resumed = train(base, members(base), checkpoints=checkpoints)
    assert bit_equal(resumed["mug"].weights, whole["mug"].weights)


def test_an_adapter_resumes_in_other_company(base: BaseModel, tmp_path: Path) -> None:
    """A checkpoint is the adapter's own: half its steps in a pack of three, the other half alone."""
    pack = members(base)

    def die(report: StepReport) -> None:
        if report.step == 13:
            raise Killed

    with pytest.raises(Killed):
        train(base, pack, checkpoints=series(tmp_path, pack), on_step=die)
    steps: list[int] = []
    alone = train(base, [pack[1]], checkpoints=series(tmp_path, [pack[1]]), on_step=lambda r: steps.append(r.step))
    assert steps == list(range(13, 21))
    assert relative_error(alone["tea"].weights, train(base, [members(base)[1]])["tea"].weights) <= 1e-3


def test_an_adapter_joins_others_that_are_further(base: BaseModel, tmp_path: Path) -> None:
    """The others go on from their checkpoints; the one that is new takes all of its steps, and no adapter notices."""
    whole, pack = train(base, members(base)), members(base)
    checkpoints = series(tmp_path, pack)

    def die(report: StepReport) -> None:
        if report.step == 13:
            raise Killed

    with pytest.raises(Killed):
        train(base, [pack[0], pack[2]], checkpoints=[checkpoints[0], checkpoints[2]], on_step=die)
    reports: list[StepReport] = []
    found = train(base, members(base), checkpoints=checkpoints, on_step=reports.append)
    assert reports[0].done == {"mug": 13, "tea": 1, "plain": 13}
    assert [report.done.get("tea") for report in reports] == list(range(1, STEPS + 1))
    for adapter_id, adapter in whole.items():
        assert relative_error(found[adapter_id].weights, adapter.weights) <= 1e-3
        assert found[adapter_id].history["steps"] == adapter.history["steps"]


def test_checkpoints_of_another_run_are_refused(base: BaseModel, tmp_path: Path) -> None:
    pack = members(base)
    checkpoints = series(tmp_path, pack)
    train(base, pack, checkpoints=checkpoints)
    assert [one.steps() for one in checkpoints] == [[18, 20], [18, 20], [15, SHORT]]
    with pytest.raises(CheckpointError, match="belongs to another run"):
        replace(checkpoints[0], run="other").load(20, names(base, pack)[0])
    for one in checkpoints:
        one.clear()
    assert LocalStore(tmp_path).list("") == []
