"""Changes to core lines that the unit tests must notice: `make mutants` makes each in a copy of the tree.

A mutant is a small mistake that somebody could make: a line of the code, what stands there instead, and the tests that
should fail. `python -m tests.mutants` runs them all (about half an hour on 2 cores), `python -m tests.mutants training`
one area. It prints a score per area, and exits with 1 when an area is below 95% or a line is no longer there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("cat_cluster", "serve", "jobs", "tests", "docs", "k8s", "pyproject.toml", "README.md")
LEAST_SCORE = 0.95
SECONDS = 300  # a mutant that hangs the tests is killed too


@dataclass(frozen=True)
class Mutant:
    """A changed line: `before` occurs once in `file`; `tests`, below tests/unit, should fail once it is `after`."""

    area: str
    file: str
    before: str
    after: str
    tests: str


MUTANTS = (
    # data
    Mutant("data", "cat_cluster/data/latents.py", " {self.base.fingerprint} ", " ", "data/test_latents.py"),
    Mutant("data", "cat_cluster/data/latents.py", " {self.base.dtype}", "", "data/test_latents.py"),
    Mutant("data", "cat_cluster/data/latents.py", "{view.example.digest} ", "", "data/test_latents.py"),
    Mutant("data", "cat_cluster/data/latents.py", " {view.crop} ", " ", "data/test_latents.py"),
    Mutant("data", "cat_cluster/data/views.py", '*key, "epoch", epoch', '*key, "epoch"', "data/test_views.py"),
    Mutant(
        "data",
        "cat_cluster/data/draws.py",
        'keyed_generator(training.seed, task.draw_key, step, "cat_rows")',
        'keyed_generator(training.seed, task.adapter_id, step, "cat_rows")',
        "data/test_draws.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/parts.py",
        "sorted(own, key=lambda row: (row not in with_cat, row))",
        "sorted(own)",
        "data/test_parts.py",
    ),
    Mutant(
        "data", "cat_cluster/data/draws.py", "scale[candidates[c]] = 1.0 /", "scale[c] = 1.0 /", "data/test_draws.py"
    ),
    Mutant(
        "data",
        "cat_cluster/data/draws.py",
        "held = concept.alpha * weight * alpha_factor",
        "held = weight * alpha_factor",
        "data/test_draws.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/draws.py",
        "weight = concept.weight / total_weight / rows",
        "weight = concept.weight / rows",
        "data/test_draws.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/draws.py",
        "place = (offset + r) / rows % 1.0",
        "place = offset",
        "data/test_draws.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/decoys.py",
        "if len(pieces) > 1 and pieces not in taken:",
        "if len(pieces) > 1 and word not in found:",
        "data/test_decoys.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/decoys.py",
        "for text in (concept.token, concept.class_noun))]",
        "for text in (concept.class_noun,))]",
        "data/test_decoys.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/decoys.py",
        "in others if replace_token(caption, concept.token, word) not in taught",
        "in others",
        "data/test_decoys.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/decoys.py",
        " and own.isdisjoint(words(other.class_noun))",
        " and concept is not other",
        "data/test_decoys.py",
    ),
    Mutant("data", "cat_cluster/data/draws.py", '*name, "decoy")', "*name)", "data/test_draws.py"),
    Mutant(
        "data",
        "cat_cluster/data/draws.py",
        "return changed, remove_token(changed, concept.token)",
        "return changed, concept.removed_prompts[view]",
        "data/test_caption_changes.py",
    ),
    Mutant("data", "cat_cluster/data/draws.py", '*name, "caption")', '"caption")', "data/test_caption_changes.py"),
    Mutant(
        "data",
        "cat_cluster/data/draws.py",
        "replace_token(prompt, concept.token, words",
        "replace_token(concept.prompts[view], concept.token, words",
        "data/test_caption_changes.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/caption_changes.py",
        "and noun.isdisjoint(words(tag))",
        "",
        "data/test_caption_changes.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/caption_changes.py",
        "key=length, reverse=True",
        "key=length",
        "data/test_caption_changes.py",
    ),
    Mutant("data", "cat_cluster/data/photos.py", 'image.format in ("JPEG", "MPO")', "True", "data/test_heif.py"),
    Mutant("data", "cat_cluster/data/draws.py", '(*name, "decoy")', '("decoy")', "data/test_draws.py"),
    Mutant("data", "cat_cluster/pipeline/prepare.py", "never=DECOYS)", "never=())", "pipeline/test_prepare.py"),
    Mutant(
        "data",
        "cat_cluster/pipeline/prepare.py",
        "draw_key = training.draw_key or resolved.id",
        "draw_key = resolved.id",
        "pipeline/test_prepare.py",
    ),
    Mutant("data", "cat_cluster/data/parts.py", "if world_size == 1:", "if True:", "data/test_draws.py"),
    Mutant(
        "data",
        "cat_cluster/data/latents.py",
        "if path is None or not path.exists():",
        "if True:",
        "data/test_latents.py",
    ),
    # training
    Mutant(
        "training",
        "cat_cluster/training/loop.py",
        "TextCache(base, chunks, most",
        "TextCache(base, 1, most",
        "training/test_long_captions.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/checkpoint.py",
        "len(self.steps) < KEEP_CHECKPOINTS",
        "len(self.steps) <= KEEP_CHECKPOINTS",
        "training/test_checkpoint.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/checkpoint.py",
        "own.step <= step and own.ended(end)",
        "own.ended(end)",
        "training/test_checkpoint.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/checkpoint.py",
        "own.step <= step and own.ended(end)",
        "False",
        "training/test_checkpoint.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/checkpoint.py",
        'tensor.detach().to("cpu", copy=True)',
        "tensor.detach()",
        "training/test_checkpoint.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/checkpoint.py",
        """        self.store.put(self._key(state.step, "safetensors"), data)
        self.store.put(self._key(state.step, "json"), json.dumps(marker).encode())
""",
        """        self.store.put(self._key(state.step, "json"), json.dumps(marker).encode())
        self.store.put(self._key(state.step, "safetensors"), data)
""",
        "training/test_checkpoint.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/step.py",
        "with autocast(base, bf16=trainings[0].bf16):",
        "with autocast(base, bf16=False):",
        "training/test_step.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/step.py",
        "[batch.sizes[i] for i in row_M.tolist()]",
        "[batch.sizes[0] for _ in row_M.tolist()]",
        "training/test_step.py",
    ),
    Mutant(
        "training",
        "cat_cluster/data/crops.py",
        "round(top * down), round(left * across)",
        "round(left * across), round(top * down)",
        "data/test_crops.py",
    ),
    Mutant(
        "data",
        "cat_cluster/data/crops.py",
        "key=lambda size: (share_cut(photo, size), -size.width * size.height, size)",
        "key=lambda size: (-size.width * size.height, share_cut(photo, size), size)",
        "data/test_crops.py",
    ),
    Mutant("data", "cat_cluster/data/masks.py", "None if photo.alpha is None", "None if True", "data/test_masks.py"),
    Mutant(
        "data",
        "cat_cluster/data/draws.py",
        "if _mask(concept, view) is not None:\n                    yield",
        "if False:\n                    yield",
        "training/test_teacher.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/losses.py",
        "mask_B1HW.sum((1, 2, 3)) * error.shape[1]",
        "torch.full_like(weight_B, error[0].numel())",
        "training/test_step.py",
    ),
    Mutant("training", "cat_cluster/training/step.py", "1 - inside[row]", "whole", "training/test_step.py"),
    Mutant(
        "training",
        "cat_cluster/data/latents.py",
        'negative=prompt == ""',
        "negative=False",
        "data/test_latents.py",
    ),
    Mutant(
        "serving",
        "cat_cluster/models/text_encoders.py",
        "output.hidden_states[-2]",
        "output.hidden_states[-1]",
        "models/test_sdxl.py",
    ),
    Mutant(
        "serving",
        "serve/denoise/rows.py",
        "Sizes.drawn(*(base.pixels_per_latent * side for side in size))",
        "Sizes.drawn(base.resolution, base.resolution)",
        "serve/test_service.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/teacher.py",
        "    with autocast():",
        "    if True:",
        "training/test_step.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/teacher.py",
        "@torch.no_grad()\ndef predict_base(",
        "def predict_base(",
        "training/test_step.py",
    ),
    Mutant(
        "training", "cat_cluster/training/teacher.py", "[0] * len(noisy", "[1] * len(noisy", "training/test_step.py"
    ),
    Mutant(
        "training",
        "cat_cluster/training/optimizer.py",
        "if training.max_grad_norm is not None and norm > training.max_grad_norm:",
        "if training.max_grad_norm is not None:",
        "training/test_optimizer.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/update_rules.py",
        "torch._foreach_mul_(step.values, [1.0 - rate * step.weight_decay for rate in step.rates])",
        "pass",
        "training/test_optimizer.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/optimizer.py",
        "average_decay(training.ema, step.count)",
        "training.ema",
        "training/test_optimizer.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/optimizer.py",
        "count=slot.steps_done + 1",
        "count=1",
        "training/test_optimizer.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/optimizer.py",
        'rates=[group["lr"] * factor for factor in factors]',
        'rates=[group["lr"] for _ in factors]',
        "training/test_optimizer.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/optimizer.py",
        "own.numbers.update(numbers)",
        "pass",
        "training/test_update_rules.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/optimizer.py",
        "self.steps_done < self.end",
        "True",
        "training/test_loop.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/update_rules.py",
        'beta3 * numbers["numerator"] +',
        'numbers["numerator"] +',
        "training/test_update_rules.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/update_rules.py",
        "(_root_mean_square(move) / self.CLIP).clamp(min=1.0)",
        "1.0",
        "training/test_update_rules.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/drift_budget.py",
        "DriftBudgetState(scale or 1.0, identity, cat) for",
        "DriftBudgetState(scale or 1.0) for",
        "training/test_drift_budget.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/step.py",
        "slot_B = batch.adapter_B + 1 if slots is None",
        "slot_B = torch.ones_like(batch.adapter_B) if slots is None",
        "training/test_step.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/step.py",
        "slot=slot[row_M])",
        "slot=slot[: len(row_M)])",
        "training/test_step.py",
    ),
    Mutant(
        "training",
        "cat_cluster/training/step.py",
        "torch.cat([weight_in_loss, batch.cat_weight_M[order]])",
        "torch.cat([weight_in_loss, weight_in_loss[row_M]])",
        "training/test_step.py",
    ),
    # lora
    Mutant("lora", "cat_cluster/lora/weights.py", "{name} {tuple(tensor.shape)} ", "", "lora/test_formats.py"),
    Mutant("lora", "cat_cluster/lora/weights.py", "{name} {tuple", "{tuple", "lora/test_formats.py"),
    Mutant("lora", "cat_cluster/lora/weights.py", " {tuple(tensor.shape)} ", " ", "lora/test_formats.py"),
    Mutant("lora", "cat_cluster/lora/layer_names.py", "    place = 1\n", "    place = 0\n", "lora/test_sdxl_files.py"),
    Mutant("lora", "cat_cluster/lora/layer_names.py", '"emb_layers.1"', '"emb_layers.0"', "lora/test_sdxl_files.py"),
    Mutant(
        "lora",
        "cat_cluster/lora/layer_names.py",
        "unet is not None and has_pooled_text(unet)",
        "unet is not None and not has_pooled_text(unet)",
        "lora/test_sdxl_files.py",
    ),
    Mutant(
        "lora", "cat_cluster/lora/reduction.py", "scale_of(rank1 or rank2)", "scale_of(rank2)", "lora/test_reduction.py"
    ),
    Mutant("lora", "cat_cluster/lora/reduction.py", "scale_of(len(w1_b))", "scale_of(None)", "lora/test_reduction.py"),
    Mutant("lora", "cat_cluster/lora/reduction.py", "squares[rank:]", "squares[rank + 1 :]", "lora/test_reduction.py"),
    Mutant(
        "lora",
        "cat_cluster/lora/reduction.py",
        "flatten().sort(descending=True)",
        "flatten().sort(descending=False)",
        "lora/test_reduction.py",
    ),
    Mutant(
        "lora",
        "cat_cluster/lora/reading.py",
        "1.0 if rank is None else alpha / rank",
        "alpha / (rank or 1)",
        "lora/test_reduction.py",
    ),
    Mutant(
        "lora",
        "cat_cluster/lora/families.py",
        "(_SDXL in file.name) != (_SDXL in",
        "(_SDXL in file.name) == (_SDXL in",
        "lora/test_families.py",
    ),
    Mutant(
        "lora",
        "cat_cluster/lora/families.py",
        "and file.width != base.width",
        "and file.width == base.width",
        "lora/test_families.py",
    ),
    Mutant(
        "lora",
        "cat_cluster/lora/foreign_parts.py",
        'for part in layer.tensors if part == "magnitude"',
        'for part in layer.tensors if part == "mid"',
        "lora/test_foreign_parts.py",
    ),
    Mutant(
        "lora",
        "cat_cluster/lora/peft_config.py",
        "if part in omitted}",
        "if part}",
        "lora/test_foreign_parts.py",
    ),
    # evaluation
    Mutant(
        "evaluation",
        "cat_cluster/evaluation/prompts.py",
        "taken = {token.lower() for token in tokens}",
        "taken = set(tokens)",
        "evaluation/test_prompts.py",
    ),
    Mutant(
        "evaluation",
        "cat_cluster/evaluation/prompts.py",
        "word for word in words if word not in taken",
        "word for word in words",
        "evaluation/test_prompts.py",
    ),
    Mutant(
        "evaluation",
        "cat_cluster/evaluation/results.py",
        "seed - self.spec.seed for seed in found.seeds",
        "i for i, _ in enumerate(found.seeds)",
        "evaluation/test_evaluate.py",
    ),
    # store
    Mutant(
        "store",
        "cat_cluster/store/local.py",
        "_write_synced(temporary, data)",
        "_write_synced(temporary := path, data)",
        "store/test_local.py",
    ),
    Mutant("store", "cat_cluster/store/local.py", "if if_absent:", "if False:", "store/test_local.py"),
    Mutant(
        "store",
        "cat_cluster/store/s3.py",
        'hasty.put(key, b"2", if_absent=True)',
        "return",
        "store/test_s3.py",
    ),
    # registry
    Mutant("registry", "cat_cluster/registry/kept.py", "version != entry.version", "version is None", "registry"),
    Mutant("registry", "cat_cluster/registry/kept.py", "self._size > self._most", "False", "registry/test_listing.py"),
    Mutant(
        "registry",
        "cat_cluster/registry/objects.py",
        "name == WEIGHTS or _owned(adapter_id, stored.sha256) in stored.key",
        "True",
        "registry/test_listing.py",
    ),
    Mutant(
        "registry",
        "cat_cluster/registry/objects.py",
        "_owned(draft.adapter_id, digest)",
        "digest",
        "registry/test_listing.py",
    ),
    Mutant(
        "registry",
        "cat_cluster/registry/summary.py",
        "listed, aliases.values()",
        "listed, ()",
        "registry/test_listing.py",
    ),
    Mutant(
        "registry",
        "cat_cluster/registry/summary.py",
        "len(found) > limit",
        "len(found) == limit",
        "registry/test_listing.py",
    ),
    Mutant("registry", "cat_cluster/registry/references.py", "/~", "/", "registry/test_listing.py"),
    # runs
    Mutant(
        "runs",
        "cat_cluster/runs/run.py",
        "asked_to_stop() >= self.number",
        "asked_to_stop() == self.number",
        "runs/test_run.py",
    ),
    Mutant(
        "runs", "cat_cluster/runs/run.py", "is_claimed(self.number + 1)", "is_claimed(self.number)", "runs/test_run.py"
    ),
    Mutant("runs", "cat_cluster/runs/tries.py", " or last.untried >= retries", "", "runs/test_tries.py"),
    Mutant("runs", "cat_cluster/runs/progress.py", " and all(failed)", "", "cluster/test_driver.py"),
    Mutant("runs", "cat_cluster/runs/queue.py", "if_absent=not was_stopped", "if_absent=False", "runs/test_queue.py"),
    Mutant("runs", "cat_cluster/runs/queue.py", "None if has_ended else _named", "_named", "runs/test_queue.py"),
    Mutant("runs", "cat_cluster/runs/queue.py", " and previous.attempt == attempt", " and False", "runs/test_queue.py"),
    Mutant(
        "runs",
        "cat_cluster/runs/queue_reader.py",
        "min(self._newest, self._now())",
        "self._newest",
        "runs/test_queue_reader.py",
    ),
    Mutant("runs", "cat_cluster/runs/queue_reader.py", "key > after and ", "", "runs/test_queue_reader.py"),
    Mutant(
        "runs",
        "cat_cluster/runs/lease.py",
        "min(now - before.looked, HEARTBEAT_SECONDS)",
        "now - before.looked",
        "runs/test_lease.py",
    ),
    Mutant("runs", "cat_cluster/runs/progress.py", "* MISSED_HEARTBEATS", "* 5", "runs/test_lease.py"),
    Mutant("runs", "cat_cluster/runs/lease.py", "record_of > seen.attempt", "record_of > 0", "runs/test_lease.py"),
    Mutant("runs", "cat_cluster/runs/lease.py", "self._own.get(run_id)", "None", "runs/test_lease.py"),
    Mutant("runs", "cat_cluster/runs/lease.py", " and claim.service == self.service", "", "runs/test_lease.py"),
    Mutant("runs", "cat_cluster/runs/fair_share.py", ", reverse=True", "", "runs/test_fair_share.py"),
    Mutant("runs", "cat_cluster/runs/fair_share.py", "(self._held[owner], self", "(self", "runs/test_fair_share.py"),
    Mutant("runs", "cat_cluster/runs/fair_share.py", " self._last_turn[owner],", "", "runs/test_fair_share.py"),
    Mutant("runs", "cat_cluster/runs/fair_share.py", "self._held[owner] + 1)", "1)", "runs/test_fair_share.py"),
    Mutant(
        "runs", "cat_cluster/runs/fair_share.py", "deadline or entry.submitted", "submitted", "runs/test_fair_share.py"
    ),
    # cluster
    Mutant(
        "cluster", "cat_cluster/cluster/trainer.py", "if failure.permanent:", "if False:", "cluster/test_trainer.py"
    ),
    # serving
    Mutant(
        "serving",
        "serve/handle_client.py",
        "event = await anext(stream, None)  # raises",
        "event = await self._first(stream, None)  # raises",
        "serve/test_handle_client.py",
    ),
    Mutant("serving", "serve/proxy.py", 'message["status"] >= 400 and', "False and", "serve/test_proxy.py"),
    Mutant("serving", "serve/denoise/image_file.py", "xmp=xmp, ", "", "serve/denoise/test_image_file.py"),
    Mutant(
        "serving",
        "serve/denoise/rows.py",
        "**index.conditioning.arguments(),",
        "encoder_hidden_states=index.conditioning.states,",
        "serve/denoise/test_rows.py",
    ),
    Mutant(
        "serving",
        "cat_cluster/lora/row_bank.py",
        "kept_BLO[row, length:].zero_()",
        "pass",
        "serve/denoise/test_rows.py",
    ),
    Mutant(
        "serving",
        "serve/denoise/rows.py",
        "self._block.fit(index.conditioning.states.shape[1])",
        "pass",
        "serve/denoise/test_rows.py",
    ),
    Mutant(
        "serving",
        "cat_cluster/models/prompts.py",
        "weighted * (before / after)",
        "weighted * 1.0",
        "models/test_prompts.py",
    ),
    Mutant(
        "serving",
        "serve/service.py",
        "words = plain_text(call.prompt, call.weighting)",
        "words = call.prompt",
        "serve/test_prompts.py",
    ),
    Mutant(
        "serving",
        "serve/denoise/safety.py",
        "score >= self._settings",
        "score > self._settings",
        "serve/denoise/test_safety.py",
    ),
    Mutant(
        "serving",
        "serve/running_call.py",
        "verdict is not None and self._refuses",
        "verdict is not None and verdict.flagged and self._refuses",
        "serve/test_checked_service.py",
    ),
    Mutant("serving", "serve/denoise/signing.py", "_now() >= self.expires", "False", "serve/denoise/test_signing.py"),
    Mutant(
        "serving",
        "serve/denoise/signing.py",
        'if fault["code"] != "signingCredential.untrusted"',
        "if False",
        "serve/denoise/test_signing.py",
    ),
    Mutant(
        "serving",
        "serve/denoise/credentials.py",
        "chain[0].public_key() != key.public_key()",
        "False",
        "serve/denoise/test_signing.py",
    ),
    Mutant(
        "serve/adapters",
        "serve/adapters/cache.py",
        "async with self._stacking:",
        "if True:",
        "serve/adapters/test_stacks.py",
    ),
    Mutant(
        "lora", "cat_cluster/lora/row_bank.py", "taken += adapter.rank", "taken = adapter.rank", "lora/test_row_bank.py"
    ),
    Mutant(
        "serve/denoise", "serve/denoise/rows.py", "self._previous[place].zero_()", "pass", "serve/denoise/test_rows.py"
    ),
    Mutant(
        "serve/denoise",
        "serve/denoise/rows.py",
        "self._previous[place].copy_(image.previous)",
        "pass",
        "serve/denoise/test_rows.py",
    ),
    Mutant(
        "serve/denoise",
        "cat_cluster/models/step_noise.py",
        "while self._drawn <= step:",
        "if True:",
        "serve/denoise/test_rows.py",
    ),
    Mutant("models", "cat_cluster/models/image_start.py", "skipped=1", "skipped=0", "models/test_step_noise.py"),
    Mutant(
        "models",
        "cat_cluster/models/samplers.py",
        "noise_dtype=torch.float32 if sde else None",
        "noise_dtype=None",
        "models/test_step_noise.py",
    ),
    Mutant(
        "models",
        "cat_cluster/models/samplers.py",
        "per_row(coefficients.on_noise)[noise.places] * noise.values",
        "per_row(coefficients.on_noise)[: len(noise.values)] * noise.values",
        "models/test_samplers.py",
    ),
    Mutant(
        "models",
        "cat_cluster/models/noise_levels.py",
        "_interpolated(timesteps[[0, -1]], _diffusers_sigmas(schedule))",
        "_diffusers_sigmas(schedule)[[-1, 0]]",
        "models/test_samplers.py",
    ),
    Mutant(
        "serve/http",
        "serve/http/registry_listing.py",
        "len(found) > wanted.limit)",
        "page.has_more)",
        "serve/http/test_pages.py",
    ),
    Mutant("serve/http", "serve/http/stacks.py", "ids.index(about[1])", "0", "serve/http/test_stacks.py"),
    Mutant(
        "serve/http",
        "serve/http/image_routes.py",
        "body.seed is None or body.seed == ANY_SEED",
        "not body.seed or body.seed == ANY_SEED",
        "serve/http",
    ),
    Mutant(
        "serve/http",
        "serve/http/access.py",
        "use.tokens = min(float(self._per_minute), use.tokens + (now - use.at) * rate)",
        "use.tokens = use.tokens + (now - use.at) * rate",
        "serve/http/test_access.py",
    ),
    Mutant(
        "serve/adapters",
        "serve/adapters/resolver.py",
        "_Known(resolved, started)",
        "_Known(resolved, self._clock())",
        "serve/adapters/test_resolver.py",
    ),
    Mutant(
        "serve/probes",
        "serve/probes/prober.py",
        "            monitor.alarm_handled = False\n        elif",
        "            pass\n        elif",
        "serve/probes/test_prober.py",
    ),
    Mutant(
        "serve/probes",
        "serve/probes/revision_monitor.py",
        "paired_similarity(rows[4:5], rows[3:4])",
        "paired_similarity(rows[2:3], rows[3:4])",
        "serve/probes/test_prober.py",
    ),
    Mutant(
        "serve/probes",
        "serve/probes/revision_monitor.py",
        "self.canonical, self.reason, self.alarm_handled = None, None, False",
        "self.canonical, self.reason = None, None",
        "serve/probes/test_prober.py",
    ),
    # text encoders
    Mutant(
        "text encoders",
        "cat_cluster/training/step.py",
        "            read.bare(prompts),",
        "            read(prompts, slot[row_M]),",
        "training/test_text_encoder.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/training/texts.py",
        "slots = [slot for _, slot in adapted]",
        "slots = [1 for _ in adapted]",
        "training/test_text_encoder.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/training/texts.py",
        "Text(0.0 * text.states",
        "Text(text.states",
        "training/test_text_encoder.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/training/optimizer.py",
        "own / training.learning_rate",
        "own",
        "training/test_text_encoder.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/training/methods.py",
        " if not layer.startswith(unread)",
        "",
        "training/test_text_encoder.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/evaluation/fisher.py",
        "for of_slot in (0, slot)",
        "for of_slot in (0, 0)",
        "pipeline/test_text_encoder.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/spec/imported.py",
        'set() if self.text_encoders else {"text_encoders"}',
        '{"text_encoders"}',
        "cli/test_import.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/models/generate.py",
        "return slot if bank is not None and bank.adapts_text(slot) else 0",
        "return 0",
        "lora/test_text_files.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/lora/layer_names.py",
        '"lora_te2_": "text_encoder_2_"',
        '"lora_te2_": "text_encoder_"',
        "lora/test_text_files.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/lora/peft_config.py",
        "self.of_part.get(part_of(layer))",
        'self.of_part.get("unet")',
        "lora/test_text_files.py",
    ),
    Mutant(
        "text encoders",
        "cat_cluster/lora/text_bank.py",
        "up_SOR[stack_B].mT",
        "up_SOR[:1].expand(len(stack_B), -1, -1).mT",
        "serve/test_text_adapters.py",
    ),
    Mutant(
        "text encoders",
        "serve/denoise/codec.py",
        "return self.name, self.adapter.strength",
        "return self.name, 1.0",
        "serve/test_text_adapters.py",
    ),
    Mutant(
        "text encoders",
        "serve/adapters/slots.py",
        "slot.manifest, slot.text = None, None",
        "slot.manifest = None",
        "serve/test_text_adapters.py",
    ),
    Mutant(
        "text encoders",
        "serve/running_call.py",
        "manifest.text_layers for manifest",
        "False for manifest",
        "serve/test_text_adapters.py",
    ),
)


def run(areas: Sequence[str]) -> bool:
    """Try the mutants of these areas (none: all), print what survived and the scores; whether all are high enough."""
    chosen = [mutant for mutant in MUTANTS if not areas or mutant.area in areas]
    killed: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory(prefix="cat-mutants-") as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder) / name)
        for number, mutant in enumerate(chosen, start=1):
            found = is_killed(mutant, Path(folder))
            killed.setdefault(mutant.area, []).append(found)
            sys.stdout.write(f"{number}/{len(chosen)} {'killed' if found else 'SURVIVED'} {describe(mutant)}\n")
            sys.stdout.flush()
    for area, results in killed.items():
        sys.stdout.write(f"{area}: {sum(results)} of {len(results)} killed\n")
    return all(sum(results) >= LEAST_SCORE * len(results) for results in killed.values())


def is_killed(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests fail with this change in the copy of the tree; ValueError when its line is not there once."""
    path = folder / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.before) != 1:
        raise ValueError(f"{mutant.file} has {mutant.before!r} {original.count(mutant.before)} times: mend the mutant")
    path.write_text(original.replace(mutant.before, mutant.after), encoding="utf-8")
    tests = [str(folder / "tests" / "unit" / name) for name in mutant.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise ValueError(f"the tests of {describe(mutant)} did not run: {done.stdout.decode()[-2000:]}")
    return done.returncode == 1


def describe(mutant: Mutant) -> str:
    """Return a mutant as one line."""
    return f"{mutant.file}: {mutant.before.strip()!r} -> {mutant.after.strip()!r}"


def main(areas: Iterable[str]) -> int:
    """Run the mutants of the named areas; the exit code."""
    known, asked = {mutant.area for mutant in MUTANTS}, list(areas)
    if unknown := sorted(set(asked) - known):
        sys.stderr.write(f"no area {unknown[0]!r}: the areas are {', '.join(sorted(known))}\n")
        return 2
    return 0 if run(asked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
