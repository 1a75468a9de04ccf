"""The parts of a step: which rows go through the U-Net in one call, and which of them each worker computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cat_cluster.data.draws import Batch


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows of a step that one worker computes: rows_B and cat_M are their places in the whole batch.

    A worker without rows computes one that counts for nothing, so that all workers make the same calls; rows_B is
    then empty and the batch has one row. So it is with CAT rows and cat_M, where these have a call of their own.
    """

    batch: Batch
    rows_B: Tensor
    cat_M: Tensor


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
    """The rows of each call, all of one size: an adapter's are dealt out in turn, those with a CAT term first."""
    with_cat = set(batch.cat_row_M.tolist())
    calls: list[list[int]] = [[] for _ in range(max(accumulate))]
    for adapter, count in enumerate(accumulate):
        own = (batch.adapter_B == adapter).nonzero().flatten().tolist()
        dealt = sorted(own, key=lambda row: (row not in with_cat, row))
        for call in range(count):
            calls[call] += dealt[call::count]
    return [rows for call in calls for rows in _by_size(batch, sorted(call))]


def _by_size(batch: Batch, rows: Sequence[int]) -> list[list[int]]:
    """The rows of one call for each size of latents: a U-Net takes one size at a time."""
    sizes = [tuple(batch.moments[row].shape) for row in rows]
    return [[row for row, own in zip(rows, sizes, strict=True) if own == size] for size in sorted(set(sizes))]


def shard_batch(batch: Batch, rank: int, world_size: int, *, cat_apart: bool = False) -> Shard:
    """Return the rows of worker `rank`: dealt out in turn, those with a CAT term first, so that work is even.

    Weights stay those of the whole batch: the workers' gradients add up to its gradient. cat_apart: CAT rows have a
    call of their own, for which a worker without any has one that counts for nothing.
    """
    count = len(batch.prompts)
    if world_size == 1:
        return Shard(batch, torch.arange(count), torch.arange(len(batch.prior_prompts)))
    with_cat = set(batch.cat_row_M.tolist())
    dealt = sorted(range(count), key=lambda row: (row not in with_cat, row))[rank::world_size]
    rows = sorted(dealt)
    if not rows:
        idle = replace(take_rows(batch, [0], []), identity_weight_B=torch.zeros(1))
        return Shard(_with_idle_cat(idle, batch, cat_apart), torch.arange(0), torch.arange(0))
    own = set(rows)
    cat = [m for m, row in enumerate(batch.cat_row_M.tolist()) if row in own]
    part = _with_idle_cat(take_rows(batch, rows, cat), batch, cat_apart)
    return Shard(part, torch.tensor(rows), torch.tensor(cat, dtype=torch.long))


def _with_idle_cat(part: Batch, whole: Batch, cat_apart: bool) -> Batch:
    with_prior = (~whole.outside_M).nonzero().flatten().tolist()
    if not cat_apart or bool((~part.outside_M).any()) or not with_prior:
        return part
    return replace(
        part,
        cat_row_M=torch.cat([part.cat_row_M, torch.zeros(1, dtype=torch.long)]),
        prior_prompts=(*part.prior_prompts, whole.prior_prompts[with_prior[0]]),
        cat_weight_M=torch.cat([part.cat_weight_M, torch.zeros(1)]),
        pool_keys=(*part.pool_keys, None),
        outside_M=torch.cat([part.outside_M, torch.zeros(1, dtype=torch.bool)]),
    )


def take_rows(batch: Batch, rows: Sequence[int], cat: Sequence[int]) -> Batch:
    """Return the rows at places `rows` of a batch with its CAT terms at places `cat`, whose rows are among them."""
    place = {row: i for i, row in enumerate(rows)}
    rows_B, cat_M = torch.tensor(rows), torch.tensor(cat, dtype=torch.long)
    return Batch(
        adapter_B=batch.adapter_B[rows_B],
        concept_B=batch.concept_B[rows_B],
        moments=tuple(batch.moments[row] for row in rows),
        posterior_noise=tuple(batch.posterior_noise[row] for row in rows),
        noise=tuple(batch.noise[row] for row in rows),
        timestep_B=batch.timestep_B[rows_B],
        prompts=tuple(batch.prompts[row] for row in rows),
        sizes=tuple(batch.sizes[row] for row in rows),
        masks=tuple(batch.masks[row] for row in rows),
        identity_weight_B=batch.identity_weight_B[rows_B],
        cat_row_M=torch.tensor([place[int(row)] for row in batch.cat_row_M[cat_M]], dtype=torch.long),
        prior_prompts=tuple(batch.prior_prompts[m] for m in cat),
        cat_weight_M=batch.cat_weight_M[cat_M],
        pool_keys=tuple(batch.pool_keys[m] for m in cat),
        outside_M=batch.outside_M[cat_M],
    )
