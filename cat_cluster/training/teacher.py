"""The teacher: the same U-Net with every row on slot 0, the zero adapter, and the base's own text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from cat_cluster.data.draws import AdapterTask, Draw, pool_entries
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning, Text

TextEncoder = Callable[[Sequence[str]], list[Text]]
ENTRIES_PER_CALL = 32


@torch.no_grad()
def predict_base(
    unet: UNet2DConditionModel, bank: LoraBank, noisy_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning
) -> Tensor:
    """Return the frozen base model's prediction, [B, C, H, W].

    Call it before the student's forward: modules must not be rebound between a forward and its backward
    (gradient checkpointing recomputes with the binding of that moment).
    """
    with bank.rows([0] * len(noisy_BCHW)):
        prediction: Tensor = unet(noisy_BCHW, timestep_B, **conditioning.arguments(), return_dict=False)[0]
    return prediction


class TeacherPool:
    """The base's predictions on the fixed draws of `teacher: pool`, computed once and kept on the CPU."""

    def __init__(self) -> None:
        self._predictions: dict[str, Tensor] = {}
        self._keys: dict[str, set[str]] = {}  # of each adapter's entries

    def fill(
        self,
        base: BaseModel,
        bank: LoraBank,
        encode_text: TextEncoder,
        tasks: Sequence[AdapterTask],
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Predict every entry of the tasks' pools that is not known yet.

        The calls depend on the tasks alone, not on how far training is: a resumed run gets the same predictions.
        """
        wanted: dict[str, Draw] = {}
        for task in tasks:
            entries = pool_entries(task, base.schedule.num_timesteps)
            own = {entry.key: entry for entry in entries if entry.key is not None}
            self._keys[task.adapter_id] = set(own)
            wanted |= own
        missing: dict[torch.Size, list[tuple[str, Draw]]] = {}  # by size: a U-Net takes one at a time
        for key, entry in wanted.items():
            if key not in self._predictions:
                missing.setdefault(entry.noise.shape, []).append((key, entry))
        for alike in missing.values():
            for start in range(0, len(alike), ENTRIES_PER_CALL):
                keys, chunk = zip(*alike[start : start + ENTRIES_PER_CALL], strict=True)
                predictions = _predict_entries(base, bank, encode_text, chunk, autocast).float().cpu()
                # Copies: a view would keep the whole chunk alive.
                self._predictions.update(zip(keys, map(Tensor.clone, predictions), strict=True))

    def forget(self, adapter_id: str) -> None:
        """Let go of an adapter's predictions, but for those that another one draws from too."""
        own = self._keys.pop(adapter_id, set())
        for key in own.difference(*self._keys.values()):
            del self._predictions[key]

    def predict(
        self,
        unet: UNet2DConditionModel,
        bank: LoraBank,
        noisy_BCHW: Tensor,
        timestep_B: Tensor,
        conditioning: Conditioning,
        keys: Sequence[str | None],
    ) -> Tensor:
        """Return the base's prediction of each row, [B, C, H, W]: the kept one for a key, a fresh one for None.

        Raises KeyError for a key that was not filled.
        """
        fresh = [i for i, key in enumerate(keys) if key is None]
        if len(fresh) == len(keys):
            return predict_base(unet, bank, noisy_BCHW, timestep_B, conditioning)
        predictions = self.known(noisy_BCHW, keys)
        if fresh:
            asked = predict_base(unet, bank, noisy_BCHW[fresh], timestep_B[fresh], conditioning[fresh])
            predictions[fresh] = asked.to(predictions.dtype)
        return predictions

    def known(self, like_BCHW: Tensor, keys: Sequence[str | None]) -> Tensor:
        """Return the kept prediction of each row with a key and zeros for the others, shaped and placed as `like`."""
        predictions = torch.zeros_like(like_BCHW)
        known = [i for i, key in enumerate(keys) if key is not None]
        if known:
            kept = torch.stack([self._predictions[key] for key in keys if key is not None])
            predictions[known] = kept.to(predictions)
        return predictions


def _predict_entries(
    base: BaseModel,
    bank: LoraBank,
    encode_text: TextEncoder,
    entries: Sequence[Draw],
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    moments, posterior_noise, noise = (
        torch.stack([getattr(entry, name) for entry in entries]).to(base.device)
        for name in ("moments", "posterior_noise", "noise")
    )
    timestep = torch.tensor([entry.timestep for entry in entries], device=base.device)
    noisy = base.schedule.add_noise(base.sample_latents(moments, posterior_noise), noise, timestep)
    texts = encode_text([entry.prior_prompt for entry in entries])
    conditioning = Conditioning.of(texts, [entry.sizes for entry in entries])
    with autocast():  # the U-Net alone, as in a step: text that is encoded in bf16 is another text
        return predict_base(base.unet, bank, noisy, timestep, conditioning)
