"""The loop this project is measured against: one adapter at a time, PEFT in diffusers' U-Net, three forwards a step.

Written as one would write it without this project, and kindly: latents and text embeddings are cached, the optimiser
is torch's own, and the teacher is the same U-Net with its adapter disabled, under no_grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import nn
from torch.nn import functional

from cat_cluster.data.latents import TextCache
from cat_cluster.lora.bank import adapted_layers
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning
from cat_cluster.training.engine import autocast
from jobs.benchmark.timing import OPTIMISER, RANK, Step, StepOptions, concept_task, synchronise


def peft_step(base: BaseModel, rows: int, options: StepOptions) -> tuple[Step, list[nn.Parameter]]:
    """Return a function that does one step of CAT (LoRA at alpha 0) on a copy of the U-Net, and what it trains."""
    unet = deepcopy(base.unet)  # PEFT leaves its wrappers behind
    layers = list(adapted_layers(unet, "attention_ff"))
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
    material = concept_task(base, "reference", rows, options).concepts[0]
    scheduler = DDPMScheduler.from_config(dict(base.schedule.scheduler_config))
    cache, sizes = TextCache(base), material.sizes[0]
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=OPTIMISER.learning_rate, weight_decay=OPTIMISER.weight_decay)
    generator, turns = torch.Generator().manual_seed(0), count()
    general = base.general_prompts()

    def encoded(prompts: Sequence[str]) -> dict[str, Any]:
        return Conditioning.of(cache(prompts), [sizes] * len(prompts)).arguments()

    def step() -> None:
        turn = next(turns)
        views = [(turn * rows + row) % len(material.prompts) for row in range(rows)]
        moments = torch.stack([material.moments[view] for view in views])
        latents = base.sample_latents(moments.to(base.device), torch.zeros(()))
        noise = torch.randn(latents.shape, generator=generator).to(base.device)
        timestep = torch.randint(0, base.schedule.num_timesteps, (rows,), generator=generator).to(base.device)
        noisy = scheduler.add_noise(latents, noise, timestep)
        with autocast(base, bf16=options.bf16):
            prediction = unet(noisy, timestep, **encoded([material.prompts[view] for view in views])).sample
        loss = functional.mse_loss(prediction.float(), noise)
        if options.alpha > 0:
            other = ("", general[turn % len(general)])[turn % 4 // 2]
            prior = encoded([material.removed_prompts[view] if turn % 2 else other for view in views])
            unet.disable_adapters()
            with torch.no_grad(), autocast(base, bf16=options.bf16):
                teacher = unet(noisy, timestep, **prior).sample
            unet.enable_adapters()
            with autocast(base, bf16=options.bf16):
                student = unet(noisy, timestep, **prior).sample
            loss = loss + options.alpha * functional.mse_loss(student.float(), teacher.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMISER.max_grad_norm or 1.0)
        optimizer.step()
        synchronise(base)

    return step, parameters
