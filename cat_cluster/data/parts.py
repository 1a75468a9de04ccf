"""The parts of a step: which rows go through the U-Net in one call, and which of them each worker computes."""

from __future__ import annotations

from collections.abc import Sequence

from cat_cluster.data.draws import Batch, Shard, shard_batch, take_rows


def step_parts(
    batch: Batch, accumulate: Sequence[int], rank: int, world_size: int, *, cat_apart: bool = False
) -> list[Shard]:
    """Return worker `rank`'s rows of each call of a step, one after the other; their gradients add up to the batch's.

    accumulate: per adapter of the pack, in how many calls its rows are computed. cat_apart: as in shard_batch. Weights
    stay those of the whole batch.
    """
    parts = []
    for rows in _calls(batch, accumulate):
        cat = [m for m, row in enumerate(batch.cat_row_M.tolist()) if row in rows]
        shard = shard_batch(take_rows(batch, rows, cat), rank, world_size, cat_apart=cat_apart)
        parts.append(
            Shard(
                shard.batch,
                rows_B=batch.adapter_B.new_tensor(rows)[shard.rows_B],
                cat_M=batch.adapter_B.new_tensor(cat)[shard.cat_M],
            )
        )
    return parts


def _calls(batch: Batch, accumulate: Sequence[int]) -> list[list[int]]:
    """The rows of each call: an adapter's are dealt out in turn, those with a CAT term first: calls are even."""
    with_cat = set(batch.cat_row_M.tolist())
    calls: list[list[int]] = [[] for _ in range(max(accumulate))]
    for adapter, count in enumerate(accumulate):
        own = (batch.adapter_B == adapter).nonzero().flatten().tolist()
        dealt = sorted(own, key=lambda row: (row not in with_cat, row))
        for call in range(count):
            calls[call] += dealt[call::count]
    return [sorted(rows) for rows in calls if rows]
