"""Stable Diffusion XL against diffusers' own pipeline: texts, pictures, sizes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from cat_cluster.errors import BaseModelError
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer, write_adapter
from cat_cluster.models.base_files import parameter_count
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.base_names import check_base
from cat_cluster.models.fingerprint import fingerprints
from cat_cluster.models.generate import ImageRow, generate
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.models.samplers import SAMPLERS
from cat_cluster.spec.choices import SamplerName
from tests.support.denoised_images import stock_image

PROMPTS = ["a photo of a sks cup", "", "a red cup, " * 40]


@pytest.fixture(scope="module")
def base(tiny_xl_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_xl_folder))


@pytest.fixture(scope="module")
def stock(tiny_xl_folder: Path) -> StableDiffusionXLPipeline:
    return stock_pipeline(tiny_xl_folder)


@pytest.fixture
def copy(tiny_xl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_xl_folder, tmp_path / "copy"))


def stock_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_config(folder: Path, part: str, **changes: Any) -> None:
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_texts_are_those_of_the_stock_pipeline(base: BaseModel, stock: StableDiffusionXLPipeline) -> None:
    expected, _, pooled, _ = stock.encode_prompt(PROMPTS, None, "cpu", 1, False)
    found = encode_prompts(base, base.text_limit, [Prompt(text) for text in PROMPTS])
    for row, (text, same) in enumerate(zip(found, base.text_encoders.encode(PROMPTS), strict=True)):
        assert text.pooled is not None
        assert same.pooled is not None
        assert torch.equal(same.states, expected[row])
        assert torch.equal(same.pooled, pooled[row])
        torch.testing.assert_close(text.states, expected[row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(text.pooled, pooled[row], rtol=1e-5, atol=1e-6)


def test_without_a_negative_prompt_guidance_starts_from_zeros_where_the_base_says_so(
    base: BaseModel, stock: StableDiffusionXLPipeline, copy: Path
) -> None:
    _, negative, _, pooled = stock.encode_prompt("a cup", None, "cpu", 1, True)
    (none,) = encode_prompts(base, base.text_limit, [Prompt("", negative=True)])
    assert none.pooled is not None
    assert torch.equal(none.states, negative[0])
    assert torch.equal(none.pooled, pooled[0])
    assert not negative.any()
    edit_config(copy, "model_index.json", force_zeros_for_empty_prompt=False)
    other = load_base_model(str(copy))
    (read,) = encode_prompts(other, other.text_limit, [Prompt("", negative=True)])
    (as_text,) = encode_prompts(base, base.text_limit, [Prompt("")])
    assert torch.equal(read.states, as_text.states)
    assert as_text.states.any()


def test_an_index_that_does_not_say_whether_guidance_starts_from_zeros_is_read_as_the_stock_pipeline_does(
    copy: Path,
) -> None:
    index = copy / "model_index.json"
    said = json.loads(index.read_text())
    del said["force_zeros_for_empty_prompt"]
    index.write_text(json.dumps(said))
    stock = StableDiffusionXLPipeline.from_pretrained(copy, local_files_only=True)
    assert stock.config.force_zeros_for_empty_prompt is True
    assert load_base_model(str(copy)).text_encoders.zeros_without_text is True
    index.write_text(json.dumps({**said, "force_zeros_for_empty_prompt": False}))
    assert load_base_model(str(copy)).text_encoders.zeros_without_text is False


@pytest.mark.parametrize("content", ["{", "[]", '{"force_zeros_for_empty_prompt": "no"}'])
def test_an_index_that_cannot_be_read_is_refused_not_taken_for_a_no(copy: Path, content: str) -> None:
    (copy / "model_index.json").write_text(content)
    for refuses in (check_base, load_base_model):
        with pytest.raises(BaseModelError, match=r"model_index\.json"):
            refuses(str(copy))


def test_weights_restore_the_mean_of_each_encoder_and_leave_the_pooled_text(base: BaseModel) -> None:
    """Independent oracle: each encoder's states of each chunk, weighted token by token; as AUTOMATIC1111 has it."""
    limit = base.text_limit
    (found,) = encode_prompts(base, limit, [Prompt("a (cup:1.5) BREAK (red:0.5)", "a1111", 4)])
    (plain,) = encode_prompts(base, limit, [Prompt("a cup BREAK red", "a1111", 4)])
    (first,) = encode_prompts(base, limit, [Prompt("a cup")])
    assert found.pooled is not None
    assert first.pooled is not None
    torch.testing.assert_close(found.pooled, first.pooled, rtol=1e-5, atol=1e-6)
    heavy = {2: 1.5, 77 + 1: 0.5, 77 + 2: 0.5, 77 + 3: 0.5}  # "a" and "cup</w>" are a token each, "red" is in three
    heavy = {place: weight for place, weight in heavy.items() if place < 77 + 1 + len(base.spell("red"))}
    for encoder in (slice(0, 16), slice(16, 40)):
        for chunk in range(2):
            states = plain.states[77 * chunk : 77 * (chunk + 1), encoder]
            weighted = torch.stack([heavy.get(77 * chunk + at, 1.0) * row for at, row in enumerate(states)])
            if abs(float(states.mean())) > 1e-3 * float(states.abs().mean()):
                weighted = weighted * (states.mean() / weighted.mean())
            ours = found.states[77 * chunk : 77 * (chunk + 1), encoder]
            torch.testing.assert_close(ours, weighted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_picture_is_the_stock_pipelines(
    base: BaseModel, stock: StableDiffusionXLPipeline, sampler: SamplerName
) -> None:
    rows = [
        ImageRow("a photo of a sks cup", 3, steps=4, sampler=sampler, guidance=5.0),
        ImageRow("a red cup", 4, steps=3, sampler=sampler, guidance=1.0),
        ImageRow("cup", 5, steps=5, sampler=sampler, guidance=7.0, negative_prompt="red"),
    ]
    for ours, row in zip(generate(base, None, rows), rows, strict=True):
        torch.testing.assert_close(ours, stock_image(stock, row), rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_v_prediction_with_zero_terminal_snr(tiny_xl_v_folder: Path, sampler: SamplerName) -> None:
    row = ImageRow("a photo of a sks cup", 3, steps=6, sampler=sampler, guidance=5.0)
    (ours,) = generate(load_base_model(str(tiny_xl_v_folder)), None, [row])
    torch.testing.assert_close(ours, stock_image(stock_pipeline(tiny_xl_v_folder), row), rtol=0, atol=3e-5)


@pytest.mark.slow
def test_an_adapter_draws_the_same_in_the_stock_pipeline(base: BaseModel, copy: Path, tmp_path: Path) -> None:
    layers, generator = adapted_layers(base.unet, "attention_ff"), torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    linears = {name: base.unet.get_submodule(name) for name in layers}
    weights = AdapterWeights(
        {name: LoraLayer(random(3, one.in_features), random(one.out_features, 3)) for name, one in linears.items()}
    )
    path = write_adapter(weights, tmp_path / "cup", "diffusers", adapter_id="cup", metadata={})
    stock = stock_pipeline(copy)
    stock.load_lora_weights(str(path.parent), weight_name=path.name)
    row = ImageRow("a photo of a sks cup", 3, slot=1, steps=4, guidance=5.0)
    bank = LoraBank.attach(base.unet, layers=layers)
    try:
        bank.load(1, weights)
        adapted, bare = generate(base, bank, [row, ImageRow("a photo of a sks cup", 3, steps=4, guidance=5.0)])
    finally:
        bank.detach()
    torch.testing.assert_close(adapted, stock_image(stock, row), rtol=0, atol=3e-5)
    assert float((adapted - bare).abs().max()) > 0.02, "the adapter does nothing, so nothing was compared"


def test_a_vae_that_overflows_in_half_precision_is_kept_in_full(tiny_xl_folder: Path, copy: Path) -> None:
    half = load_base_model(str(tiny_xl_folder), dtype=torch.float16)
    assert {half.unet.dtype, *(model.dtype for model in half.text_encoders.models)} == {torch.float16}
    assert half.vae.dtype == torch.float32
    assert half.decode(torch.ones(1, 4, 8, 8, dtype=torch.float16)).dtype == torch.float32
    assert half.encode_moments(torch.zeros(1, 3, 16, 16)).isfinite().all()
    assert load_base_model(str(tiny_xl_folder), dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    edit_config(copy, "vae/config.json", force_upcast=False)
    assert load_base_model(str(copy), dtype=torch.float16).vae.dtype == torch.float16


def test_the_digest_is_of_both_text_encoders(copy: Path, base: BaseModel) -> None:
    assert fingerprints(copy).content == base.fingerprint
    modules = (base.unet, base.vae, *base.text_encoders.models)
    assert parameter_count(copy) == sum(each.numel() for module in modules for each in module.state_dict().values())
    (copy / "tokenizer_2" / "merges.txt").write_text("#version: 0.2\na t\n")
    assert fingerprints(copy).content != base.fingerprint


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a refiner": (lambda folder: shutil.rmtree(folder / "text_encoder"), "a refiner of Stable Diffusion XL"),
    "a refiner's U-Net": (
        lambda folder: edit_config(folder, "unet/config.json", projection_class_embeddings_input_dim=20 + 5 * 8),
        "this is a refiner, or its parts do not belong together",
    ),
    "inpainting": (lambda folder: edit_config(folder, "unet/config.json", in_channels=9), "an inpainting base"),
    "another U-Net": (
        lambda folder: edit_config(folder, "unet/config.json", addition_embed_type="image"),
        "addition_embed_type is 'image'",
    ),
    "no second tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "tokenizer_2/tokenizer_config.json"),
    "no second text encoder": (
        lambda folder: shutil.rmtree(folder / "text_encoder_2"),
        r"hidden_size is 16; these parts do not belong together",
    ),
    "Playground's VAE": (
        lambda folder: edit_config(folder, "vae/config.json", latents_mean=[0.0] * 4),
        "latents_mean and latents_std",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_by_name_before_weights_are_read(case: str, copy: Path) -> None:
    damage, message = REFUSALS[case]
    damage(copy)
    for refuses in (check_base, load_base_model):
        with pytest.raises(BaseModelError, match=message):
            refuses(str(copy))


def test_tokenizers_that_spell_differently_are_refused(copy: Path) -> None:
    vocabulary = json.loads((copy / "tokenizer_2" / "vocab.json").read_text())
    vocabulary["cup</w>"], vocabulary["red</w>"] = vocabulary["red</w>"], vocabulary["cup</w>"]
    (copy / "tokenizer_2" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(BaseModelError, match="tokenizer/ and tokenizer_2/ spell differently"):
        load_base_model(str(copy))


def test_an_unfinished_second_text_encoder_is_refused(copy: Path) -> None:
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"text_encoder_2: model.safetensors is missing"):
        check_base(str(copy))
