"""A training step against a naive reference with a second frozen U-Net as teacher and PEFT as the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from cat_cluster.data.decoys import with_decoys
from cat_cluster.data.draws import AdapterTask, Batch, ConceptMaterial, draw_batch
from cat_cluster.data.keys import keyed_generator
from cat_cluster.data.latents import TextCache
from cat_cluster.data.parts import step_parts
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.conditioning import Sizes
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.engine import TorchEngine, autocast
from cat_cluster.training.loss_curves import LossCurves, step_sums
from cat_cluster.training.methods import initial_weights
from cat_cluster.training.step import RowLosses, train_step
from cat_cluster.training.teacher import TeacherPool
from tests.support.texts import plain_replacement, states_of

GENERAL = ("a photo of a red car", "a photo of a blue fish")


def concept(
    base: BaseModel, token: str, *, alpha: float, weight: float = 1.0, class_noun: str = "cup"
) -> ConceptMaterial:
    shape = (2, 2 * base.latent_channels, base.latent_size, base.latent_size)
    moments = torch.from_numpy(keyed_generator("moments", token).standard_normal(shape, dtype=np.float32))
    removed = (f"a {class_noun}", f"a {class_noun} in snow")
    prompts = (f"a {token} {class_noun}", f"{token}, a {class_noun} in snow")
    sizes = (Sizes.drawn(16, 16), Sizes(40, 24, 3, 1, 16, 16))
    return ConceptMaterial(token, class_noun, alpha, weight, tuple(moments), prompts, removed, sizes)


def of_several_sizes(base: BaseModel, one: ConceptMaterial) -> ConceptMaterial:
    """The concept with its second photo upright."""
    shape = (2 * base.latent_channels, base.latent_size + 4, base.latent_size - 4)
    upright = torch.from_numpy(keyed_generator("upright", one.token).standard_normal(shape, dtype=np.float32))
    sizes = (one.sizes[0], Sizes(60, 20, 3, 1, 2 * shape[1], 2 * shape[2]))
    return replace(one, moments=(one.moments[0], upright), sizes=sizes)


def with_mask(one: ConceptMaterial) -> ConceptMaterial:
    """The concept with a mask of its second photo, some of it half in."""
    height, width = one.moments[1].shape[1:]
    mask = torch.zeros(1, height, width)
    mask[:, 1 : height // 2, 1 : width // 2 + 1] = 1.0
    mask[:, height // 2] = 0.5
    return replace(one, masks=(None, mask))


def with_odd_words(base: BaseModel, *concepts: ConceptMaterial) -> tuple[ConceptMaterial, ...]:
    """The concepts of an adapter with their decoys."""
    return with_decoys(concepts, seed=3, draw_key="decoys", spell=base.spell, never=())


def task(adapter_id: str, concepts: tuple[ConceptMaterial, ...], **changes: Any) -> AdapterTask:
    """A task of two rows per concept that all carry the CAT term; `changes` are training settings."""
    values: dict[str, Any] = {"seed": 3, "rows_per_concept": 2, "cat_fraction": 1.0}
    return AdapterTask(adapter_id, concepts, TrainingSpec(**{**values, **changes}), GENERAL)


def with_training(one: AdapterTask, **changes: Any) -> AdapterTask:
    """The same task with other training settings."""
    return replace(one, training=one.training.model_copy(update=changes))


def trained_weights(base: BaseModel, rank: int, seed: int) -> AdapterWeights:
    """Weights whose B is not zero, as after some training."""
    initial = initial_weights(base.unet, adapted_layers(base.unet, "attention"), rank=rank, seed=seed, draw_key="t")
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            name: LoraLayer(layer.down, 0.05 * torch.randn(layer.up.shape, generator=generator))
            for name, layer in initial.layers.items()
        }
    )


@pytest.fixture
def base_v(tiny_base_v_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_v_folder))


@pytest.fixture
def base_xl(tiny_xl_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_xl_folder))


@pytest.fixture
def base_xl_v(tiny_xl_v_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_xl_v_folder))


def open_bank(base: BaseModel, weights: list[AdapterWeights]) -> LoraBank:
    bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, "attention"))
    for slot, one in enumerate(weights, start=1):
        bank.new_trainable(slot, one)
    return bank


def open_engine(base: BaseModel, bank: LoraBank, *, bf16: bool = False) -> TorchEngine:
    training = TrainingSpec(learning_rate=1e-3, weight_decay=0.0, max_grad_norm=None, lr_schedule="constant", steps=10)
    slots = [(bank.named_parameters(slot), training) for slot in bank.slots]
    return TorchEngine(base, slots, (), bf16)


def gradients(bank: LoraBank, slot: int) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in bank.parameters(slot)]


def run(base: BaseModel, bank: LoraBank, batch: Batch, **changes: Any) -> RowLosses:
    """One step, in a call for each size of its rows."""
    training = TrainingSpec(**changes)
    engine, encode_text = open_engine(base, bank, bf16=training.bf16), TextCache(base)
    losses = RowLosses(torch.zeros(len(batch.prompts)), torch.zeros(len(batch.prior_prompts)))
    for part in step_parts(batch, [1] * len(bank.slots), 0, 1):
        own = train_step(base, bank, encode_text, part.batch, [training] * len(bank.slots), engine)
        losses.identity_B[part.rows_B], losses.cat_M[part.cat_M] = own.identity_B, own.cat_M
    return losses


def alone(unet: UNet2DConditionModel, base: BaseModel, noisy: Tensor, t: Tensor, prompt: str, sizes: Sizes) -> Tensor:
    """One row's prediction by diffusers' names; without text SDXL's guidance starts from zeros, and so does this."""
    states, added = states_of(base, [prompt]), None
    if len(base.text_encoders.models) == 2:
        (text,) = base.text_encoders.encode([prompt])
        assert text.pooled is not None
        zero = 0.0 if prompt == "" else 1.0
        states = zero * states
        added = {"text_embeds": zero * text.pooled.unsqueeze(0), "time_ids": torch.tensor([list(sizes)])}
    prediction: Tensor = unet(noisy, t, states, added_cond_kwargs=added).sample
    return prediction


def naive_loss(
    base: BaseModel, teacher: UNet2DConditionModel, one: AdapterTask, batch: Batch, gamma: float | None
) -> Tensor:
    """The design's equation with plain loops, three forwards per row and diffusers' own noising."""
    scheduler = DDPMScheduler.from_config(dict(base.schedule.scheduler_config))
    rows = one.training.rows_per_concept
    terms = zip(batch.cat_row_M.tolist(), batch.prior_prompts, batch.outside_M.tolist(), strict=True)
    prior_of = {row: prompt for row, prompt, outside in terms if not outside}
    share = len([c for c in one.concepts if c.alpha > 0]) * rows / max(1, len(prior_of))
    total = torch.zeros(())
    for k, c in enumerate(one.concepts):
        identity, cat = torch.zeros(()), torch.zeros(())
        for i in [i for i in range(len(batch.prompts)) if int(batch.concept_B[i]) == k]:
            mean, logvar = batch.moments[i][None].chunk(2, dim=1)
            z0 = (mean + (0.5 * logvar).exp() * batch.posterior_noise[i]) * base.vae.config.scaling_factor
            noise, t = batch.noise[i][None], batch.timestep_B[i : i + 1]
            noisy = scheduler.add_noise(z0, noise, t)
            v_prediction = base.schedule.prediction_type == "v_prediction"
            target = scheduler.get_velocity(z0, noise, t) if v_prediction else noise
            alpha_bar = scheduler.alphas_cumprod[t].item()
            snr = alpha_bar / (1 - alpha_bar)
            w = 1.0 if gamma is None else min(snr, gamma) / (snr + 1 if v_prediction else snr)
            student = alone(base.unet, base, noisy, t, batch.prompts[i], batch.sizes[i])
            mask = torch.ones(1, *noise.shape[2:]) if batch.masks[i] is None else batch.masks[i]
            assert mask is not None
            inside = ((student - target).square() * mask).sum() / (noise.shape[1] * mask.sum())
            identity = identity + w * inside / rows
            if bool((mask < 1).any()):
                removed = c.removed_prompts[c.prompts.index(batch.prompts[i])]
                with torch.no_grad():
                    frozen = alone(teacher, base, noisy, t, removed, batch.sizes[i])
                around = ((student - frozen).square() * (1 - mask)).sum() / (noise.shape[1] * (1 - mask).sum())
                cat = cat + w * around / rows
            if i in prior_of:
                with torch.no_grad():
                    frozen = alone(teacher, base, noisy, t, prior_of[i], batch.sizes[i])
                ours = alone(base.unet, base, noisy, t, prior_of[i], batch.sizes[i])
                cat = cat + w * share * (ours - frozen).square().mean() / rows
        total = total + c.weight * (identity + c.alpha * cat)
    return total / sum(c.weight for c in one.concepts)


def naive_gradients(
    base: BaseModel, one: AdapterTask, weights: AdapterWeights, batch: Batch, gamma: float | None = None
) -> list[Tensor]:
    """The gradients of naive_loss for the weights, in PEFT's own layers; the base's U-Net has them afterwards."""
    teacher = UNet2DConditionModel.from_pretrained(base.folder / "unet")
    base.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(weights.layers)))
    for name, layer in weights.layers.items():
        module = base.unet.get_submodule(name)
        module.lora_A["default"].weight.data.copy_(layer.down)
        module.lora_B["default"].weight.data.copy_(layer.up)
    naive_loss(base, teacher, one, batch, gamma).backward()
    return [
        getattr(base.unet.get_submodule(name), side)["default"].weight.grad
        for name in weights.layers
        for side in ("lora_A", "lora_B")
    ]


@pytest.mark.parametrize("joint_rows", [True, False])
@pytest.mark.parametrize(
    ("kind", "gamma", "fraction", "decoys", "offset", "photos"),
    [
        ("base", None, 1.0, 0.0, 0.0, "square"),
        ("base", 5.0, 0.5, 0.0, 0.3, "masked"),
        ("base_v", 5.0, 1.0, 0.0, 0.3, "mixed"),
        ("base", None, 1.0, 0.7, 0.0, "square"),
        ("base", None, 0.5, 0.0, 0.0, "mixed masked"),
        ("base_xl", None, 1.0, 0.0, 0.0, "mixed"),
        ("base_xl_v", 5.0, 0.5, 0.7, 0.3, "mixed masked"),
    ],
)
def test_the_step_equals_a_naive_three_forward_reference(
    request: pytest.FixtureRequest,
    kind: str,
    gamma: float | None,
    fraction: float,
    decoys: float,
    offset: float,
    photos: str,
    joint_rows: bool,
) -> None:
    base: BaseModel = request.getfixturevalue(kind)
    first = concept(base, "sks", alpha=2.0, weight=3.0)
    first = of_several_sizes(base, first) if "mixed" in photos else first
    first = with_mask(first) if "masked" in photos else first
    concepts = with_odd_words(base, first, concept(base, "zwx", alpha=0.7, class_noun="fish"))
    one = task("tea", concepts, cat_fraction=fraction, decoy_fraction=decoys, noise_offset=offset)
    weights = trained_weights(base, 4, seed=1)
    batch = draw_batch([one], [5], 1000)
    bank = open_bank(base, [weights])
    run(base, bank, batch, min_snr_gamma=gamma, joint_rows=joint_rows)
    ours = gradients(bank, 1)
    bank.detach()

    theirs = naive_gradients(base, one, weights, batch, gamma)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-7)


def test_cat_loss_and_gradient_are_exactly_zero_at_the_start(base: BaseModel) -> None:
    """Student and teacher ride in calls of equal shape here, so equality is to the bit."""
    layers = adapted_layers(base.unet, "attention")
    bank = open_bank(base, [initial_weights(base.unet, layers, rank=4, seed=0, draw_key="mug")])
    full = draw_batch([task("mug", (concept(base, "sks", alpha=5.0),))], [0], 1000)
    object.__setattr__(full, "identity_weight_B", torch.zeros_like(full.identity_weight_B))
    losses = run(base, bank, full, joint_rows=False)
    assert len(losses.cat_M) == 2
    assert torch.equal(losses.cat_M, torch.zeros(2))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(bank, 1))
    assert (losses.identity_B > 0).all()


def test_the_loss_of_decoy_rows_is_exactly_zero_at_the_start(base: BaseModel) -> None:
    layers = adapted_layers(base.unet, "attention")
    bank = open_bank(base, [initial_weights(base.unet, layers, rank=4, seed=0, draw_key="tea")])
    pair = concept(base, "sks", alpha=5.0), concept(base, "zwx", alpha=5.0, class_noun="fish")
    tea = task("tea", with_odd_words(base, *pair), rows_per_concept=8, decoy_fraction=0.99)
    batch = draw_batch([tea], [0], 1000)
    decoys = {
        plain_replacement(caption, one.token, word)
        for one in tea.concepts
        for caption, each in zip(one.prompts, one.decoys, strict=True)
        for word in (*each.odd_words, *each.other_tokens)
    }
    assert set(batch.prior_prompts) <= decoys
    assert any("zwx" in prompt and "cup" in prompt for prompt in batch.prior_prompts)
    without_identity = replace(batch, identity_weight_B=torch.zeros_like(batch.identity_weight_B))
    losses = run(base, bank, without_identity, joint_rows=False)
    assert torch.equal(losses.cat_M, torch.zeros(16))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(bank, 1))


def test_the_cat_loss_of_a_concept_counts_its_decoys(base: BaseModel) -> None:
    """Independent oracle: each row predicted by itself, with the adapter and without; mean over a concept's rows."""
    pair = concept(base, "sks", alpha=2.0), concept(base, "zwx", alpha=0.7, class_noun="fish")
    tea = task("tea", with_odd_words(base, *pair), rows_per_concept=4, decoy_fraction=0.6)
    bank = open_bank(base, [trained_weights(base, 4, seed=1)])
    batch = draw_batch([tea], [1], 1000)
    losses = run(base, bank, batch)
    [sums] = step_sums([tea], batch, losses)
    recorded = LossCurves(sums, 10).record(1, sums)
    latents = base.sample_latents(torch.stack(batch.moments), torch.stack(batch.posterior_noise))
    noisy = base.schedule.add_noise(latents, torch.stack(batch.noise), batch.timestep_B)
    found: dict[int, list[float]] = {0: [], 1: []}
    with torch.no_grad():
        for row, prompt in zip(batch.cat_row_M.tolist(), batch.prior_prompts, strict=True):
            predictions = []
            for slot in (1, 0):
                with bank.rows([slot]):
                    inputs = noisy[row : row + 1], batch.timestep_B[row : row + 1], states_of(base, [prompt])
                    predictions.append(base.unet(*inputs).sample)
            found[int(batch.concept_B[row])].append((predictions[0] - predictions[1]).square().mean().item())
    removed = {prompt for one in tea.concepts for prompt in (*one.removed_prompts, *GENERAL, "")}
    assert {prompt in removed for prompt in batch.prior_prompts} == {True, False}
    for k, token in enumerate(("sks", "zwx")):
        assert len(found[k]) == 4
        assert recorded[token].cat == pytest.approx(sum(found[k]) / 4, rel=1e-4)


def test_what_is_outside_masks_is_recorded_apart(base: BaseModel) -> None:
    """It is not 0 before training, and would be taken for drift."""
    mug = task("mug", (with_mask(concept(base, "sks", alpha=2.0)),), rows_per_concept=4, cat_fraction=0.5)
    batch = draw_batch([mug], [0], 1000)
    outside = batch.outside_M
    assert (int(outside.sum()), int((~outside).sum())) == (2, 2)
    losses = RowLosses(torch.ones(4), torch.where(outside, 7.0, 0.25))
    curves = LossCurves(["sks"], 10)
    found = curves.record(1, step_sums([mug], batch, losses)[0])["sks"]
    assert (found.identity, found.cat, found.outside) == (1.0, 0.25, 7.0)
    assert curves.curves()["sks"]["outside"] == [7.0]
    earlier = LossCurves(["sks"], 10)
    earlier.restore({"sks": {"0": [3.0, 3, 0.5, 2]}})
    assert earlier.curves()["sks"] == {"identity": [1.0], "cat": [0.25]}


@pytest.mark.parametrize("pooled", [False, True])
def test_the_cat_loss_is_exactly_zero_at_the_start_in_bf16_too(base: BaseModel, pooled: bool) -> None:
    """Student and teacher round alike: both predict under autocast, in calls of equal shape."""
    layers = adapted_layers(base.unet, "attention")
    bank = open_bank(base, [initial_weights(base.unet, layers, rank=4, seed=0, draw_key="mug")])
    changes = {"teacher": "pool", "pool_size": 1} if pooled else {}
    mug = task("mug", (concept(base, "sks", alpha=5.0),), precision="bf16", joint_rows=False, **changes)
    batch, pool = draw_batch([mug], [0], 1000), TeacherPool()
    pool.fill(base, bank, TextCache(base), [mug], lambda: autocast(base, bf16=True))
    engine = open_engine(base, bank, bf16=True)
    losses = train_step(base, bank, TextCache(base), batch, [mug.training], engine, pool)
    assert len(losses.cat_M) == 2
    assert torch.equal(losses.cat_M, torch.zeros(2))


def test_the_teacher_builds_no_graph(base: BaseModel) -> None:
    """Its activations would be kept for a backward that never comes."""
    bank = open_bank(base, [trained_weights(base, 4, seed=1)])
    batch = draw_batch([task("mug", (concept(base, "sks", alpha=5.0),))], [0], 1000)
    modes: list[bool] = []
    base.unet.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    run(base, bank, batch)
    assert modes == [False, True]


def test_each_cat_row_is_bound_to_its_own_adapter(base: BaseModel) -> None:
    """Also where the first member has a CAT term on some of its rows only, so that places of rows and terms differ."""
    pair = [
        task("some", (concept(base, "sks", alpha=2.0),), cat_fraction=0.5),
        task("all", (concept(base, "zwx", alpha=2.0),)),
    ]
    weights = [trained_weights(base, 4, seed=1), trained_weights(base, 4, seed=2)]
    bank = open_bank(base, weights)
    run(base, bank, draw_batch(pair, [0, 0], 1000))
    packed = [gradients(bank, 1), gradients(bank, 2)]
    bank.detach()
    for one, own, expected in zip(pair, weights, packed, strict=True):
        bank = open_bank(base, [own])
        run(base, bank, draw_batch([one], [0], 1000))
        for ours, alone in zip(expected, gradients(bank, 1), strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-7)
        bank.detach()


@pytest.mark.parametrize("joint_rows", [True, False])
def test_alpha_zero_is_plain_lora_to_the_bit(base: BaseModel, joint_rows: bool) -> None:
    weights = trained_weights(base, 4, seed=2)
    bank = open_bank(base, [weights])
    batch = draw_batch([task("mug", (concept(base, "sks", alpha=0.0),))], [0], 1000)
    losses = run(base, bank, batch, joint_rows=joint_rows)
    ours = gradients(bank, 1)
    assert len(losses.cat_M) == 0
    bank.detach()

    bank = open_bank(base, [weights])
    latents = base.sample_latents(torch.stack(batch.moments), torch.stack(batch.posterior_noise))
    with bank.rows(batch.adapter_B + 1):
        prediction = base.unet(
            base.schedule.add_noise(latents, torch.stack(batch.noise), batch.timestep_B),
            batch.timestep_B,
            states_of(base, list(batch.prompts)),
        ).sample
        plain = (prediction - torch.stack(batch.noise)).square().flatten(1).mean(1)
        (plain * batch.identity_weight_B).sum().backward()
    assert torch.equal(losses.identity_B, plain.detach())
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(bank, 1), strict=True))


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_a_poisoned_adapter_leaves_its_neighbours_gradient_unchanged(base: BaseModel, poison: float) -> None:
    good, bad = task("good", (concept(base, "sks", alpha=1.0),)), task("bad", (concept(base, "zwx", alpha=1.0),))
    weights = [trained_weights(base, 4, seed=1), trained_weights(base, 2, seed=2)]
    found = []
    for factor in (1.0, poison):
        bank = open_bank(base, weights)
        batch = draw_batch([good, bad], [0, 0], 1000)
        of_bad = (batch.adapter_B == 1).tolist()
        moments = tuple(view * factor if bad else view for view, bad in zip(batch.moments, of_bad, strict=True))
        run(base, bank, replace(batch, moments=moments))
        found.append((gradients(bank, 1), gradients(bank, 2)))
        bank.detach()
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_gradient_checkpointing_and_bf16_are_the_same_step_up_to_rounding(base: BaseModel) -> None:
    one = task("mug", (concept(base, "sks", alpha=2.0),))
    batch = draw_batch([one], [0], 1000)
    found: dict[str, list[Tensor]] = {}
    for name in ("plain", "checkpointed", "bf16"):
        bank = open_bank(base, [trained_weights(base, 4, seed=1)])
        if name == "checkpointed":
            base.unet.train()
            base.unet.enable_gradient_checkpointing()
        run(base, bank, batch, precision="bf16" if name == "bf16" else "fp32")
        base.unet.eval()
        base.unet.disable_gradient_checkpointing()
        found[name] = gradients(bank, 1)
        bank.detach()
    for plain, checkpointed, low in zip(*found.values(), strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)
        assert (low - plain).norm() <= 0.1 * plain.norm() + 1e-6
