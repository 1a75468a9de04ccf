"""Draws are functions of their keys: nothing else about a run may change them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.data.draws import (
    AdapterTask,
    Batch,
    ConceptMaterial,
    Decoys,
    draw_batch,
    keyed_generator,
    pool_entries,
)
from cat_cluster.data.parts import shard_batch
from cat_cluster.spec.choices import AlphaSchedule
from cat_cluster.spec.sections import TrainingSpec
from tests.support.texts import square_sizes


def concept(token: str, *, alpha: float = 1.0, weight: float = 1.0, views: int = 3) -> ConceptMaterial:
    moments = torch.from_numpy(keyed_generator("moments", token).standard_normal((views, 8, 4, 4))).float()
    prompts = tuple(f"a {token} cup {i}" for i in range(views))
    removed = tuple(f"a cup {i}" for i in range(views))
    decoys = (Decoys(("bzg", "qhp"), (f"{token}-else",)),) * views
    return ConceptMaterial(
        token, "cup", alpha, weight, tuple(moments), prompts, removed, square_sizes(len(prompts)), decoys
    )


def task(
    adapter_id: str = "mug", concepts: tuple[ConceptMaterial, ...] | None = None, **changes: object
) -> AdapterTask:
    training = TrainingSpec.model_validate({"cat_fraction": 1.0, **changes})
    general = ("a photo of a red car", "a photo of a blue fish")
    return AdapterTask(adapter_id, concepts or (concept("sks"),), training, general)


def rows_of(batch: Batch, adapter: int) -> list[tuple[object, ...]]:
    cat = dict(
        zip(batch.cat_row_M.tolist(), zip(batch.prior_prompts, batch.cat_weight_M.tolist(), strict=True), strict=True)
    )
    return [
        (
            batch.concept_B[i].item(),
            batch.prompts[i],
            batch.timestep_B[i].item(),
            batch.noise[i].tolist(),
            batch.posterior_noise[i].tolist(),
            batch.moments[i].tolist(),
            batch.identity_weight_B[i].item(),
            cat.get(i),
        )
        for i in range(len(batch.prompts))
        if batch.adapter_B[i] == adapter
    ]


def test_rows_do_not_depend_on_the_pack_or_on_dropped_neighbours() -> None:
    mug, tea = task("mug"), task("tea", (concept("zwx"), concept("ohwx", alpha=3.0)), cat_fraction=0.5)
    for step in (0, 7):
        alone = rows_of(draw_batch([mug], [step], 1000), 0)
        assert alone == rows_of(draw_batch([tea, mug], [step, step], 1000), 1)
        assert alone == rows_of(draw_batch([tea, mug], [None, step], 1000), 1)


def test_another_step_seed_or_draw_key_gives_other_draws() -> None:
    first = draw_batch([task()], [0], 1000).noise[0]
    for other in (task(seed=1), task(draw_key="other")):
        assert not torch.equal(first, draw_batch([other], [0], 1000).noise[0])
    assert not torch.equal(first, draw_batch([task()], [1], 1000).noise[0])


@pytest.mark.parametrize("pool", [{}, {"teacher": "pool", "pool_size": 6}])
def test_a_noise_offset_shifts_each_channel_by_a_draw_of_its_own(pool: dict[str, object]) -> None:
    """Oracle: crosslabs' formula, noise + offset * randn(B, C, 1, 1), its draw found in a run with another offset."""
    plain, small, large = (
        draw_batch([task(noise_offset=offset, rows_per_concept=40, **pool)], [2], 1000) for offset in (0.0, 0.1, 0.5)
    )
    plain_noise, small_noise, large_noise = (torch.stack(one.noise) for one in (plain, small, large))
    shift = (large_noise - plain_noise) / 0.5
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    torch.testing.assert_close(small_noise, plain_noise + 0.1 * shift[:, :, :1, :1], atol=1e-6, rtol=0)
    draws = shift[:, :, 0, 0]
    assert len(draws.round(decimals=4).unique()) >= (20 if pool else 150), "one for each row and channel"
    assert abs(float(draws.mean())) < 0.3
    assert 0.75 < float(draws.std()) < 1.25
    for other in (small, large):
        assert other.prompts == plain.prompts
        assert other.prior_prompts == plain.prior_prompts
        assert torch.equal(other.timestep_B, plain.timestep_B)
        assert torch.equal(torch.stack(other.posterior_noise), torch.stack(plain.posterior_noise))


def test_entries_of_pools_with_another_noise_offset_are_others() -> None:
    """The base's prediction depends on the noise; equal draws share theirs."""
    keys = [
        {entry.key for entry in pool_entries(task(draw_key="pair", teacher="pool", noise_offset=offset), 1000)}
        for offset in (0.0, 0.0, 0.1)
    ]
    assert keys[0] == keys[1]
    assert not keys[0] & keys[2]


def test_two_adapters_with_one_draw_key_see_equal_rows() -> None:
    pair = [task("cat", draw_key="pair"), task("lora", (concept("sks", alpha=0.0),), draw_key="pair")]
    batch = draw_batch(pair, [3, 3], 1000)
    assert [row[:-1] for row in rows_of(batch, 0)] == [row[:-1] for row in rows_of(batch, 1)]
    assert all(row[-1] is None for row in rows_of(batch, 1))


def test_two_adapters_with_one_draw_key_have_their_cat_term_on_the_same_rows() -> None:
    changes = {"draw_key": "pair", "cat_fraction": 0.25, "rows_per_concept": 4}
    pair = [task("one", **changes), task("two", **changes)]
    for step in range(6):
        batch = draw_batch(pair, [step, step], 1000)
        assert rows_of(batch, 0) == rows_of(batch, 1)


def test_row_weights_add_up_to_the_loss_of_the_design() -> None:
    """sum_k weight_k (identity_k + alpha_k cat_k) / sum_k weight_k, each term a mean over the concept's rows."""
    concepts = (concept("sks", weight=3.0, alpha=2.0), concept("zwx", weight=1.0, alpha=0.5))
    batch = draw_batch([task(concepts=concepts)], [0], 1000)
    for k, (share, alpha) in enumerate([(0.75, 2.0), (0.25, 0.5)]):
        assert batch.identity_weight_B[batch.concept_B == k].sum().item() == pytest.approx(share)
        cat = batch.concept_B[batch.cat_row_M] == k
        assert batch.cat_weight_M[cat].sum().item() == pytest.approx(share * alpha)


@given(fraction=st.floats(0.01, 1.0), rows=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_cat_fraction_takes_exactly_its_share_of_rows(fraction: float, rows: int) -> None:
    concepts = (concept("sks"), concept("zwx", alpha=0.0), concept("ohwx"))
    one, candidates, taken = task(concepts=concepts, cat_fraction=fraction, rows_per_concept=rows), 2 * rows, 0
    for step in range(12):
        batch = draw_batch([one], [step], 1000)
        count = len(batch.cat_row_M)
        assert count in (math.floor(fraction * candidates), math.ceil(fraction * candidates - 1e-6))
        assert len(batch.prior_prompts) == count
        assert not (batch.concept_B[batch.cat_row_M] == 1).any()
        scale = batch.cat_weight_M / batch.identity_weight_B[batch.cat_row_M]
        torch.testing.assert_close(scale, torch.full((count,), 1 / fraction))
        taken += count
        assert abs(taken - fraction * candidates * (step + 1)) < 1


def test_half_of_one_row_is_every_second_step() -> None:
    one = task(cat_fraction=0.5, rows_per_concept=1)
    assert [len(draw_batch([one], [step], 1000).prior_prompts) for step in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("schedule", ["constant", "high_noise", "low_noise"])
def test_an_alpha_schedule_moves_alpha_over_timesteps_and_keeps_its_mean(schedule: AlphaSchedule) -> None:
    weights, timesteps = [], []
    for step in range(200):
        batch = draw_batch([task(alpha_schedule=schedule)], [step], 1000)
        weights += (batch.cat_weight_M / batch.identity_weight_B).tolist()
        timesteps += batch.timestep_B.tolist()
    expected = {"constant": [1.0] * 800, "high_noise": [(t + 0.5) / 500 for t in timesteps]}
    expected["low_noise"] = [2 - high for high in expected["high_noise"]]
    assert weights == pytest.approx(expected[schedule], abs=1e-5)
    assert sum(weights) / len(weights) == pytest.approx(1.0, abs=0.01)


def test_alpha_zero_draws_no_prior_rows() -> None:
    batch = draw_batch([task(concepts=(concept("sks", alpha=0.0),))], [0], 1000)
    assert batch.prior_prompts == ()
    assert len(batch.cat_row_M) == 0


def test_every_view_is_seen_equally_often_and_timesteps_cover_the_schedule() -> None:
    shown: list[str] = []
    timesteps = []
    for step in range(30):
        batch = draw_batch([task(rows_per_concept=2)], [step], 1000)
        timesteps += batch.timestep_B.tolist()
        shown += batch.prompts
    seen = {prompt: shown.count(prompt) for prompt in shown}
    orders = [tuple(shown[start : start + 3]) for start in range(0, len(shown), 3)]
    assert set(seen.values()) == {20}
    assert len(set(orders)) > 1, "each epoch has an order of its own"
    assert min(timesteps) >= 0
    assert max(timesteps) < 1000
    assert all(abs(a - b) == 500 for a, b in zip(timesteps[::2], timesteps[1::2], strict=True))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_removed", {"removed": 1.0}),
        ("class_noun", {"class": 1.0}),
        ("empty", {"empty": 1.0}),
        ("mixture", {"removed": 0.5, "empty": 0.25, "general": 0.25}),
    ],
)
def test_prior_prompts_follow_their_mode(mode: str, expected: dict[str, float]) -> None:
    counts: dict[str, int] = {}
    for step in range(100):
        for prompt in draw_batch([task(prior_prompt=mode, rows_per_concept=8)], [step], 1000).prior_prompts:
            kind = {"": "empty", "a photo of a cup": "class"}.get(prompt, "removed" if "cup" in prompt else "general")
            counts[kind] = counts.get(kind, 0) + 1
    assert {kind: count / 800 for kind, count in counts.items()} == pytest.approx(expected, abs=0.06)


def kind_of(prompt: str) -> str:
    odd, other = "bzg" in prompt or "qhp" in prompt, "-else" in prompt
    return "odd" if odd else "other" if other else "prior"


@pytest.mark.parametrize("pool", [{}, {"teacher": "pool", "pool_size": 50}])
@pytest.mark.parametrize(("fraction", "joint"), [(0.25, True), (0.5, True), (0.5, False)])
def test_decoys_are_their_share_of_the_prior_prompts_and_of_the_photo_itself(
    fraction: float, joint: bool, pool: dict[str, object]
) -> None:
    """Half of them are other tokens where there are some; all else of a row is as it is without decoys."""
    one = concept("sks", views=16)
    if not joint:
        one = dataclasses.replace(one, decoys=tuple(Decoys(decoys.odd_words) for decoys in one.decoys))
    plain, decoyed, more = (
        task(concepts=(one,), rows_per_concept=8, decoy_fraction=share, **pool) for share in (0.0, fraction, 0.75)
    )
    counts = {"odd": 0, "other": 0, "prior": 0}
    words: set[str] = set()
    replaced: set[str] = set()
    for step in range(100):
        without, some, most = (draw_batch([variant], [step], 1000) for variant in (plain, decoyed, more))
        assert [row[:-1] for row in rows_of(without, 0)] == [row[:-1] for row in rows_of(some, 0)]
        for prompt, before, next_share, caption in zip(
            some.prior_prompts, without.prior_prompts, most.prior_prompts, some.prompts, strict=True
        ):
            kind = kind_of(prompt)
            counts[kind] += 1
            if kind == "prior":
                assert prompt == before
            else:
                assert prompt == next_share, "a smaller share of decoys is a part of a larger one"
                assert prompt.split()[-1] == caption.split()[-1]
                words.add(prompt.split()[1])
                replaced.add(before)
    shares = {kind: count / 800 for kind, count in counts.items()}
    other = fraction / 2 if joint else 0.0
    expected = {"odd": fraction - other, "other": other, "prior": 1 - fraction}
    assert shares == pytest.approx(expected, abs=0.06)
    assert words == {"bzg", "qhp", *(["sks-else"] if joint else [])}
    assert {"", *task().general_prompts} <= replaced, "what is left keeps the shares of the mixture"


def test_decoys_do_not_depend_on_the_pack_or_on_what_was_drawn_before() -> None:
    mug = task("mug", decoy_fraction=0.5)
    tea = task("tea", (concept("zwx"), concept("ohwx", alpha=3.0)), cat_fraction=0.5, decoy_fraction=0.7)
    seen = set()
    for step in (9, 0, 4):
        alone = rows_of(draw_batch([mug], [step], 1000), 0)
        assert alone == rows_of(draw_batch([tea, mug], [step, step], 1000), 1)
        assert alone == rows_of(draw_batch([mug, tea], [step, None], 1000), 0)
        seen.update(kind_of(prompt) for prompt in draw_batch([mug], [step], 1000).prior_prompts)
    assert seen == {"odd", "other", "prior"}


def test_a_pools_decoys_are_its_entries_and_their_keys_tell_them_apart() -> None:
    plain, decoyed = (task(decoy_fraction=share, teacher="pool", pool_size=30) for share in (0.0, 0.5))
    pairs = list(zip(pool_entries(plain, 1000), pool_entries(decoyed, 1000), strict=True))
    assert {kind_of(entry.prior_prompt) for _, entry in pairs} == {"odd", "other", "prior"}
    assert all((a.key == b.key) == (a.prior_prompt == b.prior_prompt) for a, b in pairs)


def test_decoy_rows_without_decoys_are_refused_and_plain_lora_needs_none() -> None:
    bare = dataclasses.replace(concept("sks"), decoys=())
    with pytest.raises(ValueError, match="mug: decoy_fraction needs decoys, and concept 'sks' has none"):
        task(concepts=(bare,), decoy_fraction=0.5)
    lora = task(concepts=(dataclasses.replace(bare, alpha=0.0),), decoy_fraction=0.5)
    assert draw_batch([lora], [0], 1000).prior_prompts == ()


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_workers_share_the_rows_of_a_step(workers: int) -> None:
    """Each row, with its CAT term, is one worker's; terms are shared evenly, and weights are the whole batch's."""
    tasks = [task("mug", rows_per_concept=3, cat_fraction=0.5), task("tea", (concept("zwx"),), rows_per_concept=2)]
    batch = draw_batch(tasks, [1, 1], 1000)
    whole = rows_of(batch, 0) + rows_of(batch, 1)
    shards = [shard_batch(batch, rank, workers) for rank in range(workers)]
    assert sorted(row for one in shards for row in one.rows_B.tolist()) == list(range(len(whole)))
    assert sorted(m for one in shards for m in one.cat_M.tolist()) == list(range(len(batch.prior_prompts)))
    for count in ([len(one.rows_B) for one in shards], [len(one.cat_M) for one in shards]):
        assert max(count) - min(count) <= 1
    for one in shards:
        own = rows_of(one.batch, 0) + rows_of(one.batch, 1)
        if len(one.rows_B):
            assert own == [whole[row] for row in one.rows_B.tolist()]
        else:
            assert (len(own), one.batch.identity_weight_B.tolist(), len(one.batch.prior_prompts)) == (1, [0.0], 0)


def test_a_pack_without_active_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter of the pack trains any more"):
        draw_batch([task()], [None], 1000)


def test_material_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        task().training = TrainingSpec(seed=3)  # type: ignore[misc]
