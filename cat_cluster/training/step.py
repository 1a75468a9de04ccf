"""One training step of a pack: noise the rows, predict with and without the token, add the losses, go backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """The losses of each row of a step before their weights: identity_B, and cat_M of the CAT rows."""

    identity_B: Tensor
    cat_M: Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """The input of the U-Net: B identity rows on y_T, then M CAT rows on y with the same z0, e and t.

    noisy and target are [B+M, C, H, W]; loss_weight is w(t), row_weight the weight in the loss.
    texts are those that the student reads, with their gradient where its adapter trains text encoders. asked: CAT rows
    whose target the base model has yet to predict, in the student's own call, from the texts asked_texts.
    """

    noisy: Tensor
    timestep: Tensor
    texts: list[Text]
    sizes: list[Sizes]
    target: Tensor
    slot: Tensor
    loss_weight: Tensor
    row_weight: Tensor
    asked: Tensor
    asked_texts: list[Text]


def train_step(
    base: BaseModel,
    bank: LoraBank,
    encode_text: TextEncoder,
    batch: Batch,
    trainings: Sequence[TrainingSpec],
    engine: TrainingEngine,
    pool: TeacherPool | None = None,
) -> RowLosses:
    """Add this batch's gradient of the pack loss to the bank's parameters and return each row's losses.

    trainings: the settings of each adapter of the pack. The [y_T; y] rows ride in one U-Net call or, without
    joint_rows, in two at half the activation memory. The rows of adapter a are bound to slot a + 1 and read its texts,
    the teacher's rows to slot 0 and the base's own texts: in a call before the student's, or in the same one with their
    output detached, as the engine wants it. Rows that were drawn from a pool take the teacher's prediction from there:
    `pool` must have been filled with their tasks.
    """
    read = RowTexts(base, bank, encode_text, alike=engine.world_size > 1)
    rows = _rows(base, bank, read, batch, trainings, pool or TeacherPool(), joined=engine.joined_teacher)
    identity_count, count = len(batch.prompts), len(rows.slot)
    parted = not trainings[0].joint_rows and not engine.joined_teacher and count > identity_count
    losses, start = [], 0
    for end in [identity_count, count] if parted else [count]:
        losses.append(_backward(bank, engine, rows, slice(start, end)))
        start = end
    all_rows = torch.cat(losses)
    return RowLosses(identity_B=all_rows[:identity_count], cat_M=all_rows[identity_count:])


def _backward(bank: LoraBank, engine: TrainingEngine, rows: _Rows, part: slice) -> Tensor:
    """Go forward and backward on some of the rows, predicting the targets of rows.asked on the way; return losses."""
    noisy, timestep, target = (x[part] for x in (rows.noisy, rows.timestep, rows.target))
    texts, sizes, slot, asked, count = rows.texts[part], rows.sizes[part], rows.slot[part], rows.asked, len(target)
    if len(asked):
        noisy, timestep = (torch.cat([x, x[asked]]) for x in (noisy, timestep))
        texts, sizes = [*texts, *rows.asked_texts], [*sizes, *(sizes[row] for row in asked.tolist())]
        slot = torch.cat([slot, torch.zeros(len(asked), dtype=slot.dtype)])
    with bank.rows(slot):
        prediction = engine.predict(noisy, timestep, Conditioning.of(texts, sizes))
        if len(asked):
            target = target.index_copy(0, asked, prediction[count:].detach().to(target.dtype))
        loss = prediction_loss(prediction[:count], target, rows.loss_weight[part])
        engine.backward(pack_loss(loss, rows.row_weight[part]))
    return loss.detach()


def _rows(
    base: BaseModel,
    bank: LoraBank,
    read: RowTexts,
    batch: Batch,
    trainings: Sequence[TrainingSpec],
    pool: TeacherPool,
    *,
    joined: bool,
) -> _Rows:
    device = base.device
    noise, timestep = _move(batch.noise, device), _move(batch.timestep_B, device)
    latents = base.sample_latents(_move(batch.moments, device), _move(batch.posterior_noise, device))
    noisy = base.schedule.add_noise(latents, noise, timestep)
    target = base.schedule.target(latents, noise, timestep)
    slot, sizes = batch.adapter_B + 1, list(batch.sizes)
    texts = read(batch.prompts, slot)
    asked_texts: list[Text] = []
    loss_weight = _loss_weight(base, batch, trainings)
    row_weight = batch.identity_weight_B
    asked = torch.empty(0, dtype=torch.long)
    if batch.prior_prompts:
        cat = batch.cat_row_M
        on_device = _move(cat, device)
        prior_noisy, prior_timestep = noisy[on_device], timestep[on_device]
        prior_sizes = [batch.sizes[row] for row in cat.tolist()]
        prior = read.bare(batch.prior_prompts)
        if joined:
            teacher = pool.known(prior_noisy, batch.pool_keys)
            fresh = [m for m, key in enumerate(batch.pool_keys) if key is None]
            asked, asked_texts = torch.tensor(fresh) + len(slot), [prior[m] for m in fresh]
        else:
            bare = Conditioning.of(prior, prior_sizes)
            with autocast(base, bf16=trainings[0].bf16):
                teacher = pool.predict(base.unet, bank, prior_noisy, prior_timestep, bare, batch.pool_keys)
        # Encoded in a call of their own, for they may have a backward of their own.
        texts, sizes = texts + read(batch.prior_prompts, slot[cat]), sizes + prior_sizes
        noisy, timestep = torch.cat([noisy, prior_noisy]), torch.cat([timestep, prior_timestep])
        target = torch.cat([target, teacher.to(target.dtype)])
        slot, loss_weight = torch.cat([slot, slot[cat]]), torch.cat([loss_weight, loss_weight[cat]])
        row_weight = torch.cat([row_weight, batch.cat_weight_M])
    return _Rows(
        noisy=noisy,
        timestep=timestep,
        texts=texts,
        sizes=sizes,
        target=target,
        slot=slot,
        loss_weight=_move(loss_weight, device),
        row_weight=_move(row_weight, device),
        asked=_move(asked.long(), device),
        asked_texts=asked_texts,
    )


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
