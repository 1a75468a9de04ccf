"""The parts of a step: every row is computed once, by one worker in one call, and calls are even."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.data.draws import Batch, draw_batch
from cat_cluster.data.parts import step_parts
from tests.unit.data.test_draws import concept, rows_of, task


def drawn(*accumulate: int, rows: int = 2, fraction: float = 0.5) -> Batch:
    """A step of one adapter for each number of calls, the second of two concepts; the photos of the third differ."""
    upright = concept("sks")
    upright = replace(
        upright,
        moments=tuple(view[:, :, :2] if n % 2 else view for n, view in enumerate(upright.moments)),
        masks=tuple(torch.full((1, *view.shape[1:]), 0.5) for view in upright.moments),
    )
    concepts = {1: (concept("sks"), concept("zwx", alpha=3.0)), 2: (upright,)}
    tasks = [
        task(
            f"a-{n}",
            concepts.get(n, (concept("sks"),)),
            rows_per_concept=rows,
            accumulate=calls,
            cat_fraction=fraction,
        )
        for n, calls in enumerate(accumulate)
    ]
    return draw_batch(tasks, [3] * len(tasks), 1000)


@given(
    accumulate=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    fraction=st.sampled_from([0.2, 0.5, 1.0]),
    workers=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_every_row_is_in_one_call_of_one_worker(
    accumulate: list[int], rows: int, fraction: float, workers: int
) -> None:
    batch = drawn(*accumulate, rows=rows, fraction=fraction)
    by_worker = [step_parts(batch, accumulate, rank, workers) for rank in range(workers)]
    assert len({len(parts) for parts in by_worker}) == 1, "all workers make the same calls"
    sizes = len({view.shape for view in batch.moments})
    assert max(accumulate) <= len(by_worker[0]) <= sizes * max(accumulate)
    parts = [part for own in by_worker for part in own]
    assert sorted(torch.cat([part.rows_B for part in parts]).tolist()) == list(range(len(batch.prompts)))
    assert sorted(torch.cat([part.cat_M for part in parts]).tolist()) == list(range(len(batch.prior_prompts)))
    for part in (one for one in parts if len(one.rows_B)):
        noise = [batch.noise[row] for row in part.rows_B.tolist()]
        assert torch.equal(torch.stack(part.batch.noise), torch.stack(noise)), "rows of one size"
        assert part.batch.masks == tuple(batch.masks[row] for row in part.rows_B.tolist())
        assert torch.equal(part.batch.outside_M, batch.outside_M[part.cat_M])
        assert torch.equal(part.batch.identity_weight_B, batch.identity_weight_B[part.rows_B])
        assert torch.equal(part.rows_B[part.batch.cat_row_M], batch.cat_row_M[part.cat_M])
        assert torch.equal(part.batch.cat_weight_M, batch.cat_weight_M[part.cat_M])
        assert part.batch.prior_prompts == tuple(batch.prior_prompts[m] for m in part.cat_M)


@given(calls=st.integers(1, 4), rows=st.integers(1, 3), fraction=st.sampled_from([0.2, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_a_call_has_the_rows_that_were_asked_for_and_its_share_of_cat_terms(
    calls: int, rows: int, fraction: float
) -> None:
    """So memory is that of one call: were the CAT terms to fall as they like, one call could have them all."""
    batch = drawn(1, calls, rows=rows, fraction=fraction)
    parts = step_parts(batch, [1, calls], 0, 1)
    second = [part.batch.adapter_B == 1 for part in parts]
    assert [int(own.sum()) for own in second] == [2 * rows] * calls
    terms = [int(own[part.batch.cat_row_M].sum()) for part, own in zip(parts, second, strict=True)]
    assert max(terms) - min(terms) <= 1


@pytest.mark.parametrize("calls", [2, 3])
def test_the_rows_of_several_calls_are_those_of_one_large_call(calls: int) -> None:
    """Timesteps are stratified over all of them, and so is the share of CAT terms."""
    several, large = drawn(calls, rows=2), drawn(1, rows=2 * calls)
    assert rows_of(several, 0) == rows_of(large, 0)


@given(
    accumulate=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    fraction=st.sampled_from([0.2, 0.5, 1.0]),
    workers=st.integers(2, 5),
)
@settings(max_examples=40, deadline=None)
def test_where_cat_rows_have_a_call_of_their_own_every_worker_makes_it(
    accumulate: list[int], fraction: float, workers: int
) -> None:
    """Else one worker would wait for another's gradients of a call that is never made."""
    batch = drawn(*accumulate, fraction=fraction)
    by_worker = [step_parts(batch, accumulate, rank, workers, cat_apart=True) for rank in range(workers)]
    for call in zip(*by_worker, strict=True):
        assert len({bool((~part.batch.outside_M).any()) for part in call}) == 1
        for part in call:
            idle = len(part.batch.prior_prompts) - len(part.cat_M)
            assert idle in (0, 1)
            assert not idle or part.batch.cat_weight_M[-1] == 0.0
    kept = torch.cat([part.cat_M for parts in by_worker for part in parts]).tolist()
    assert sorted(kept) == list(range(len(batch.prior_prompts)))
