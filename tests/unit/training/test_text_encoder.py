"""Training of text encoders: a step against PEFT, and what of the laws is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from cat_cluster.data.draws import AdapterTask, Batch, draw_batch
from cat_cluster.data.latents import TextCache
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.models.text_encoders import TextEncoders
from cat_cluster.spec.sections import TextEncoderSpec, TrainingSpec
from cat_cluster.training.engine import TorchEngine
from cat_cluster.training.loop import PackMember, train_pack
from cat_cluster.training.methods import initial_weights, trained_layers
from cat_cluster.training.step import RowLosses, train_step
from cat_cluster.training.teacher import TeacherPool
from cat_cluster.training.texts import RowTexts
from tests.unit.training.test_loop import bit_equal, member, relative_error, train
from tests.unit.training.test_step import concept, gradients, task, with_odd_words, with_training

pytestmark = pytest.mark.slow

TEXT = TrainingSpec(targets="attention", text_encoder=TextEncoderSpec())


@pytest.fixture(params=["tiny_base_folder", "tiny_xl_folder"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return load_base_model(str(request.getfixturevalue(request.param)))


def moved_weights(base: BaseModel, seed: int, training: TrainingSpec = TEXT) -> AdapterWeights:
    """Weights whose B is not zero, as after some training."""
    layers = trained_layers(base, training)
    initial = initial_weights(base.network, layers, rank=4, seed=seed, draw_key="t")
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            name: LoraLayer(layer.down, 0.1 * torch.randn(layer.up.shape, generator=generator))
            for name, layer in initial.layers.items()
        }
    )


def open_bank(base: BaseModel, weights: Sequence[AdapterWeights]) -> LoraBank:
    names = dict.fromkeys(name for one in weights for name in one.layers)
    bank = LoraBank.attach(base.network, layers=list(names))
    for slot, one in enumerate(weights, start=1):
        bank.new_trainable(slot, one)
    return bank


def run(base: BaseModel, bank: LoraBank, batch: Batch, pool: TeacherPool | None = None, **changes: Any) -> RowLosses:
    trainings = [TEXT.model_copy(update=changes)] * len(bank.slots)
    slots = [(bank.named_parameters(slot), trainings[0]) for slot in bank.slots]
    engine = TorchEngine(base, slots, (), trainings[0].bf16)
    return train_step(base, bank, TextCache(base), batch, trainings, engine, pool)


class PeftBase:
    """A base of its own with PEFT's adapters in U-Net and text encoders; predicts one row at a time."""

    def __init__(self, folder: Path, weights: AdapterWeights) -> None:
        self.base = load_base_model(str(folder))
        self.layers: dict[str, nn.Module] = {}
        parts = {"text_encoder_2.": 1, "text_encoder.": 0}
        targets: dict[int | None, dict[str, str]] = {}
        for name in weights.layers:
            prefix, encoder = next(((p, n) for p, n in parts.items() if name.startswith(p)), ("", None))
            path = name.removeprefix(prefix)
            own = None if encoder is None else self.base.text_encoders.models[encoder]
            if own is not None and not hasattr(own, "text_model"):
                path = path.removeprefix("text_model.")
            targets.setdefault(encoder, {})[path] = name
        for encoder, paths in targets.items():
            model: Any = self.base.unet if encoder is None else self.base.text_encoders.models[encoder]
            inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=list(paths)), model)
            for path, name in paths.items():
                module: Any = model.get_submodule(path)
                module.lora_A["default"].weight.data.copy_(weights.layers[name].down)
                module.lora_B["default"].weight.data.copy_(weights.layers[name].up)
                self.layers[name] = module

    def predict(self, noisy: Tensor, t: Tensor, prompt: str, sizes: Any) -> Tensor:
        return predict(self.base, noisy, t, prompt, sizes)

    def gradients(self) -> list[Tensor]:
        sides = [side["default"].weight.grad for one in self.layers.values() for side in (one.lora_A, one.lora_B)]
        return [side for side in sides if side is not None]


def predict(base: BaseModel, noisy: Tensor, t: Tensor, prompt: str, sizes: Any) -> Tensor:
    """One row by diffusers' names; without text SDXL's guidance starts from zeros."""
    (text,) = base.text_encoders.encode([prompt])
    zero = 0.0 if prompt == "" and text.pooled is not None else 1.0
    added = None
    if text.pooled is not None:
        added = {"text_embeds": zero * text.pooled[None], "time_ids": torch.tensor([list(sizes)])}
    prediction: Tensor = base.unet(noisy, t, zero * text.states[None], added_cond_kwargs=added).sample
    return prediction


def naive_loss(student: PeftBase, teacher: BaseModel, one: AdapterTask, batch: Batch) -> Tensor:
    """The design's equation, row by row: the teacher reads the bare encoders' texts, the student its own."""
    rows, scale = one.training.rows_per_concept, student.base.vae.config.scaling_factor
    prior_of = dict(zip(batch.cat_row_M.tolist(), batch.prior_prompts, strict=True))
    share = len([c for c in one.concepts if c.alpha > 0]) * rows / len(prior_of)
    total = torch.zeros(())
    for i, prompt in enumerate(batch.prompts):
        c = one.concepts[int(batch.concept_B[i])]
        mean, logvar = batch.moments[i].unsqueeze(0).chunk(2, dim=1)
        z0 = (mean + (0.5 * logvar).exp() * batch.posterior_noise[i]) * scale
        noise, t, sizes = batch.noise[i].unsqueeze(0), batch.timestep_B[i : i + 1], batch.sizes[i]
        noisy = teacher.schedule.add_noise(z0, noise, t)
        loss = (student.predict(noisy, t, prompt, sizes) - noise).square().mean() / rows
        if i in prior_of:
            with torch.no_grad():
                frozen = predict(teacher, noisy, t, prior_of[i], sizes)
            ours = student.predict(noisy, t, prior_of[i], sizes)
            loss = loss + c.alpha * share * (ours - frozen).square().mean() / rows
        total = total + c.weight * loss
    return total / sum(c.weight for c in one.concepts)


def two_concepts(base: BaseModel, **changes: Any) -> AdapterTask:
    concepts = with_odd_words(
        base, concept(base, "sks", alpha=2.0, weight=3.0), concept(base, "zwx", alpha=0.7, class_noun="fish")
    )
    return task("tea", concepts, decoy_fraction=0.4, **changes)


@pytest.mark.parametrize("joint_rows", [True, False])
def test_the_step_is_pefts_with_a_teacher_that_reads_bare_texts(base: BaseModel, joint_rows: bool) -> None:
    one, weights = two_concepts(base), moved_weights(base, 1)
    drawn = (draw_batch([one], [step], 1000) for step in range(100))
    batch = next(batch for batch in drawn if "" in batch.prior_prompts)  # which is what SDXL has zeros for
    bank = open_bank(base, [weights])
    run(base, bank, batch, joint_rows=joint_rows)
    ours = gradients(bank, 1)
    bank.detach()
    student = PeftBase(base.folder, weights)
    naive_loss(student, base, one, batch).backward()
    theirs = student.gradients()
    assert len(ours) == len(theirs) == 2 * len(weights.layers)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-7)
    assert all(bool(gradient.any()) for gradient in ours), "a layer gets no gradient"


def test_at_the_start_the_cat_loss_is_rounding_alone(base: BaseModel) -> None:
    layers = trained_layers(base, TEXT)
    bank = open_bank(base, [initial_weights(base.network, layers, rank=4, seed=0, draw_key="tea")])
    losses = run(base, bank, draw_batch([two_concepts(base)], [0], 1000))
    assert len(losses.cat_M) == 4
    assert losses.cat_M.max() <= 1e-10 * losses.identity_B.min()


def test_a_neighbour_that_leaves_texts_alone_reads_those_that_are_kept(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And prompts that rows of an adapter share are encoded once; those of two adapters once for each."""
    pair = [two_concepts(base), task("plain", (concept(base, "ohwx", alpha=2.0),))]
    bare = TEXT.model_copy(update={"text_encoder": None})
    weights = [moved_weights(base, 1), moved_weights(base, 2, bare)]
    batch = draw_batch(pair, [1, 1], 1000)
    encoded: list[int] = []
    encode = TextEncoders.encode_chunks

    def watched(self: TextEncoders, chunks: Sequence[Sequence[int]]) -> Any:
        encoded.append(len(chunks))
        return encode(self, chunks)

    bank, texts = open_bank(base, weights), TextCache(base)
    texts([*batch.prompts, *batch.prior_prompts])
    monkeypatch.setattr(TextEncoders, "encode_chunks", watched)
    slots = [(bank.named_parameters(slot), TEXT) for slot in (1, 2)]
    train_step(base, bank, texts, batch, [TEXT, bare], TorchEngine(base, slots, (), False))
    own = [i for i, adapter in enumerate(batch.adapter_B.tolist()) if adapter == 0]
    priors = zip(batch.cat_row_M.tolist(), batch.prior_prompts, strict=True)
    prior = {prompt for row, prompt in priors if row in own}
    assert encoded == [len({batch.prompts[i] for i in own}), len(prior)]
    packed = [gradients(bank, 1), gradients(bank, 2)]
    bank.detach()
    for one, own_weights, expected in zip(pair, weights, packed, strict=True):
        bank = open_bank(base, [own_weights])
        run(base, bank, draw_batch([one], [1], 1000))
        for ours, alone in zip(expected, gradients(bank, 1), strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-7)
        bank.detach()


def test_captions_of_several_chunks_are_read_through_the_adapter(base: BaseModel) -> None:
    weights, long = moved_weights(base, 1), "a sks cup in snow, " * 30
    bank = open_bank(base, [weights])
    read = RowTexts(base, bank, TextCache(base, 3), 3, alike=False)
    texts = read([long, "a sks cup", long], torch.tensor([1, 1, 0]))
    bank.detach()
    peft = PeftBase(base.folder, weights).base
    theirs = encode_prompts(peft, peft.text_limit, [Prompt(long, chunks=3), Prompt("a sks cup", chunks=3)])
    assert [len(text) for text in texts] == [3 * 77, 77, 3 * 77]
    for ours, expected in zip(texts, theirs, strict=False):
        torch.testing.assert_close(ours.states, expected.states, rtol=1e-4, atol=1e-5)
    assert not texts[2].states.requires_grad
    assert not torch.allclose(texts[2].states, texts[0].states)


def test_the_pool_holds_what_the_base_predicts_of_bare_texts(base: BaseModel) -> None:
    """A step with the pooled teacher is one with the teacher online, also once the adapter has moved."""
    one = two_concepts(base, teacher="pool", pool_size=2)
    batch, weights = draw_batch([one], [3], 1000), moved_weights(base, 3)
    assert all(key is not None for key in batch.pool_keys)
    found = []
    for online in (False, True):
        bank = open_bank(base, [weights])
        pool = TeacherPool()
        pool.fill(base, bank, TextCache(base), [one], lambda: torch.no_grad())
        drawn = replace(batch, pool_keys=(None,) * len(batch.pool_keys)) if online else batch
        run(base, bank, drawn, pool)
        found.append(gradients(bank, 1))
        bank.detach()
    for pooled, online_gradient in zip(*found, strict=True):
        torch.testing.assert_close(pooled, online_gradient, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_texts_are_encoded_in_fp32_and_activations_may_be_computed_again(base: BaseModel, precision: str) -> None:
    one = two_concepts(base)
    batch, seen, found = draw_batch([one], [0], 1000), [], []
    hook = base.text_encoders.models[0].register_forward_hook(lambda *args: seen.append(args[2][0].dtype))
    for checkpointed in (False, True):
        bank = open_bank(base, [moved_weights(base, 1)])
        if checkpointed:
            base.unet.train()
            base.unet.enable_gradient_checkpointing()
        run(base, bank, batch, precision=precision)
        base.unet.eval()
        base.unet.disable_gradient_checkpointing()
        found.append(gradients(bank, 1))
        bank.detach()
    hook.remove()
    assert set(seen) == {torch.float32}
    for plain, again in zip(*found, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-8} if precision == "fp32" else {"rtol": 0.1, "atol": 1e-4}
        torch.testing.assert_close(again, plain, **tolerance)


def test_text_layers_have_a_learning_rate_of_their_own(tiny_base_folder: Path) -> None:
    """Oracle: torch's AdamW with a parameter group for them, on the gradients that are the engine's."""
    base = load_base_model(str(tiny_base_folder))
    training = TrainingSpec(
        steps=5, learning_rate=2e-3, lr_schedule="constant", warmup_steps=0, max_grad_norm=None,
        text_encoder=TextEncoderSpec(learning_rate=3e-4), targets="attention",
    )  # fmt: skip
    weights = moved_weights(base, 1)
    bank = open_bank(base, [weights])
    parameters = bank.named_parameters(1)
    engine = TorchEngine(base, [(parameters, training)], (), False)
    theirs = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
    groups = [
        {"params": [p for n, p in theirs.items() if n.startswith("text_encoder") == of_text], "lr": rate}
        for of_text, rate in ((False, 2e-3), (True, 3e-4))
    ]
    adamw = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            theirs[name].grad = parameter.grad.clone()
        engine.step()
        adamw.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7)
    bank.detach()


def test_an_adapter_whose_text_is_poisoned_leaves_its_neighbours_alone(tiny_base_folder: Path) -> None:
    base = load_base_model(str(tiny_base_folder))
    good = text_member(base, task("good", (concept(base, "sks", alpha=1.0),)))
    bad = text_member(base, task("bad", (concept(base, "zwx", alpha=1.0),)))
    name = next(name for name in bad.initial.layers if name.startswith("text_encoder"))
    broken = dict(bad.initial.layers)
    broken[name] = replace(broken[name], down=torch.full_like(broken[name].down, float("nan")))
    together = train(base, [good, PackMember(bad.task, AdapterWeights(broken))], steps=4)
    assert "gradient not finite at step" in (together["bad"].dropped or "")
    assert relative_error(together["good"].weights, train(base, [good], steps=4)["good"].weights) <= 1e-3


def text_member(base: BaseModel, one: AdapterTask) -> PackMember:
    return member(base, with_training(one, text_encoder=TextEncoderSpec()))


def test_a_bank_for_a_neighbour_that_trains_texts_changes_no_bit_of_one_that_does_not(tiny_base_folder: Path) -> None:
    base = load_base_model(str(tiny_base_folder))
    plain = member(base, task("plain", (concept(base, "sks", alpha=2.0),)))
    alone = train(base, [plain], steps=4)["plain"].weights
    layers = [*plain.initial.layers, *trained_layers(base, TEXT)]
    bank = LoraBank.attach(base.network, layers=list(dict.fromkeys(layers)))
    (found,) = train_pack(base, bank, [plain], steps=4)
    bank.detach()
    assert bit_equal(found.weights, alone)
