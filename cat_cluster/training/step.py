"""One training step of a pack: noise the rows, predict with and without the token, add the losses, go backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cat_cluster.data.draws import Batch
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning, Sizes, Text
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.engine import TrainingEngine, autocast
from cat_cluster.training.losses import pack_loss, prediction_loss
from cat_cluster.training.teacher import TeacherPool, TextEncoder
from cat_cluster.training.texts import RowTexts


@dataclass(frozen=True, eq=False)
class RowLosses:
    """The losses of the terms of a step before their weights: identity_B, and cat_M of those held to the base."""

    identity_B: Tensor
    cat_M: Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """The input of the U-Net: S rows with latents [S, C, H, W], each bound to a slot.

    Texts carry a gradient where the slot's adapter trains text encoders.
    """

    noisy: Tensor
    timestep: Tensor
    texts: list[Text]
    sizes: list[Sizes]
    slot: Tensor

    def __len__(self) -> int:
        return len(self.slot)

    def __getitem__(self, rows: slice | Tensor) -> _Rows:
        places = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        texts, sizes = [self.texts[row] for row in places], [self.sizes[row] for row in places]
        return _Rows(self.noisy[rows], self.timestep[rows], texts, sizes, self.slot[rows])

    @property
    def conditioning(self) -> Conditioning:
        """Made for a call, of its own rows alone: their texts may have a backward of their own."""
        return Conditioning.of(self.texts, self.sizes)

    def followed_by(self, other: _Rows) -> _Rows:
        return _Rows(
            torch.cat([self.noisy, other.noisy]),
            torch.cat([self.timestep, other.timestep]),
            self.texts + other.texts,
            self.sizes + other.sizes,
            torch.cat([self.slot, other.slot]),
        )


@dataclass(frozen=True, eq=False)
class _Terms:
    """T terms of the loss: each compares the prediction of a row with a target [C, H, W].

    mask: the part of the picture that counts, [T, 1, H, W], None where all of every picture does.
    weight: w(t); weight_in_loss: the place in the adapter's loss.
    """

    row: Tensor
    target: Tensor
    mask: Tensor | None
    weight: Tensor
    weight_in_loss: Tensor


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A step's rows, B identity rows on y_T and the CAT rows on y with the same z0, e and t, and its terms in order:

    those of the identity rows, of what is outside their masks, and of the CAT rows. held: how many the first two are.
    asked: rows that the base has yet to predict in the student's own call, and the terms (asked_by) they are for.
    """

    rows: _Rows
    terms: _Terms
    held: int
    asked: _Rows
    asked_by: Tensor


def train_step(
    base: BaseModel,
    bank: LoraBank,
    encode_text: TextEncoder,
    batch: Batch,
    trainings: Sequence[TrainingSpec],
    engine: TrainingEngine,
    pool: TeacherPool | None = None,
    *,
    slots: Sequence[int] | None = None,
) -> RowLosses:
    """Add this batch's gradient of the pack loss to the bank's parameters and return the loss of each of its terms.

    The rows of the batch are of one size. trainings, slots: the settings of each adapter of the batch and its slot in
    the bank; None: 1, 2, .... The [y_T; y] rows ride in one U-Net call or, without joint_rows, in two at half the
    activation memory. The rows of an adapter are bound to its slot and read its texts, the teacher's rows to slot 0 and
    the base's texts: in a call before the student's, or in the same one with their output detached, as the engine wants
    it. Rows that were drawn from a pool take the teacher's prediction from there: `pool` must have been filled with
    their tasks.
    """
    # What is outside a mask is held by the prediction of its identity row, and goes with it.
    order = torch.argsort((~batch.outside_M).long(), stable=True)
    read = RowTexts(base, bank, encode_text, trainings[0].prompt_chunks, alike=engine.world_size > 1)
    slot_B = batch.adapter_B + 1 if slots is None else torch.tensor(slots)[batch.adapter_B]
    inputs = _inputs(base, bank, read, batch, slot_B, trainings, pool or TeacherPool(), order, engine.joined_teacher)
    count = len(batch.prompts)
    parts = [(slice(0, None), slice(0, None))]
    if not trainings[0].joint_rows and not engine.joined_teacher and len(inputs.rows) > count:
        parts = [(slice(0, count), slice(0, inputs.held)), (slice(count, None), slice(inputs.held, None))]
    losses = torch.cat([_backward(bank, engine, inputs, rows, terms) for rows, terms in parts])
    cat_M = torch.empty_like(losses[count:])
    cat_M[order.to(cat_M.device)] = losses[count:]
    return RowLosses(identity_B=losses[:count], cat_M=cat_M)


def _backward(bank: LoraBank, engine: TrainingEngine, inputs: _Inputs, of_rows: slice, of_terms: slice) -> Tensor:
    """Go forward and backward on some of the rows with their terms, and return the terms' losses."""
    rows, terms = inputs.rows[of_rows], inputs.terms
    target, mask = terms.target[of_terms], None if terms.mask is None else terms.mask[of_terms]
    count = len(rows)
    if len(inputs.asked):
        rows = rows.followed_by(inputs.asked)
    with bank.rows(rows.slot):
        prediction = engine.predict(rows.noisy, rows.timestep, rows.conditioning)
        if len(inputs.asked):
            target = target.index_copy(0, inputs.asked_by, prediction[count:].detach().to(target.dtype))
        of_term = prediction[:count].index_select(0, terms.row[of_terms] - of_rows.start)
        loss = prediction_loss(of_term, target, terms.weight[of_terms], mask)
        engine.backward(pack_loss(loss, terms.weight_in_loss[of_terms]))
    return loss.detach()


def _inputs(
    base: BaseModel,
    bank: LoraBank,
    read: RowTexts,
    batch: Batch,
    slot: Tensor,
    trainings: Sequence[TrainingSpec],
    pool: TeacherPool,
    order: Tensor,
    joined: bool,
) -> _Inputs:
    """order: the M places of the batch's terms that are held to the base, in the order of the terms."""
    device = base.device
    moments, posterior_noise, noise = (
        _move(torch.stack(drawn), device) for drawn in (batch.moments, batch.posterior_noise, batch.noise)
    )
    timestep = _move(batch.timestep_B, device)
    latents = base.sample_latents(moments, posterior_noise)
    noisy = base.schedule.add_noise(latents, noise, timestep)
    target = base.schedule.target(latents, noise, timestep)
    identity = _Rows(noisy, timestep, read(batch.prompts, slot), list(batch.sizes), slot)
    count, held = len(identity), len(identity) + int(batch.outside_M.sum())
    row, weight, weight_in_loss = torch.arange(count), _loss_weight(base, batch, trainings), batch.identity_weight_B
    rows, asked, asked_by = identity, identity[:0], torch.empty(0, dtype=torch.long)
    if len(order):
        row_M = batch.cat_row_M[order]
        keys = [batch.pool_keys[m] for m in order.tolist()]
        prompts = [batch.prior_prompts[m] for m in order.tolist()]
        on_device = _move(row_M, device)
        teacher = _Rows(
            noisy[on_device],
            timestep[on_device],
            read.bare(prompts),
            [batch.sizes[i] for i in row_M.tolist()],
            torch.zeros(len(order), dtype=torch.long),
        )
        if joined:
            known = pool.known(teacher.noisy, keys)
            fresh = torch.tensor([m for m, key in enumerate(keys) if key is None], dtype=torch.long)
            asked, asked_by = teacher[fresh], fresh + count
        else:
            with autocast(base, bf16=trainings[0].bf16):
                known = pool.predict(base.unet, bank, teacher.noisy, teacher.timestep, teacher.conditioning, keys)
        prior = slice(held - count, None)
        students = replace(teacher, slot=slot[row_M])[prior]
        rows = identity.followed_by(replace(students, texts=read(prompts[prior], students.slot)))
        target = torch.cat([target, known.to(target.dtype)])
        row = torch.cat([row, row_M[: held - count], torch.arange(count, len(rows))])
        weight = torch.cat([weight, weight[row_M]])
        weight_in_loss = torch.cat([weight_in_loss, batch.cat_weight_M[order]])
    terms = _Terms(
        _move(row, device),
        target,
        _masks(batch, order, device),
        _move(weight, device),
        _move(weight_in_loss, device),
    )
    return _Inputs(rows, terms, held, asked, _move(asked_by, device))


def _masks(batch: Batch, order: Tensor, device: torch.device) -> Tensor | None:
    """Return what counts in each term's picture: the mask of an identity row, outside it the rest, else all of it."""
    if all(mask is None for mask in batch.masks):
        return None
    whole = torch.ones(1, *batch.noise[0].shape[1:])
    inside = [whole if mask is None else mask for mask in batch.masks]
    terms = zip(batch.cat_row_M[order].tolist(), batch.outside_M[order].tolist(), strict=True)
    return _move(torch.stack([*inside, *(1 - inside[row] if outside else whole for row, outside in terms)]), device)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _loss_weight(base: BaseModel, batch: Batch, trainings: Sequence[TrainingSpec]) -> Tensor:
    weight_B = torch.ones(len(batch.prompts))
    for adapter, training in enumerate(trainings):
        rows = batch.adapter_B == adapter
        if training.min_snr_gamma is not None and bool(rows.any()):
            weight_B[rows] = base.schedule.loss_weight(batch.timestep_B[rows], training.min_snr_gamma).float()
    return weight_B
