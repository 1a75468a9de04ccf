"""Loading bases from folders made here, against the stock pipeline; refusals by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import cat_cluster.models.base_names
from cat_cluster.errors import BaseModelError
from cat_cluster.models.base_model import BaseModel, as_stock_pipeline_reads, load_base_model
from cat_cluster.models.base_names import base_folder, check_base, lasting_name, local_base
from cat_cluster.models.fingerprint import fingerprints
from tests.support.texts import states_of

pytestmark = pytest.mark.slow

PROMPTS = ["a photo of a red sks cup", "", "a cup " * 60, "two caf\u00e9s, at night!"]
UNET = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture
def copy(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "copy"))


def edit_config(folder: Path, component: str, **changes: Any) -> None:
    path = folder / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(folder: Path, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = edit(tensors["conv_in.weight"])
    save_file(tensors, folder / UNET)


def test_shapes_and_frozenness(base: BaseModel) -> None:
    assert (base.resolution, base.latent_channels, base.latent_size) == (16, 4, 8)
    for module in (base.unet, base.vae, *base.text_encoders.models):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("fixture", ["tiny_base_folder", "tiny_base_v_folder"])
def test_text_is_encoded_as_the_stock_pipeline_does(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    expected, negative = stock.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["red"] * len(PROMPTS))
    base = load_base_model(str(folder))
    assert torch.equal(states_of(base, PROMPTS), expected)
    assert torch.equal(states_of(base, ["red"] * len(PROMPTS)), negative)


def test_a_config_that_asks_for_the_attention_mask_gets_it(copy: Path) -> None:
    edit_config(copy, "text_encoder", use_attention_mask=True)
    stock = StableDiffusionPipeline.from_pretrained(copy)
    expected, _ = stock.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(states_of(load_base_model(str(copy)), PROMPTS), expected)


def test_moments_latents_and_images_equal_the_stock_vae(base: BaseModel, tiny_base_folder: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_base_folder)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = stock.vae.encode(pixels).latent_dist
    moments = base.encode_moments(pixels)
    torch.testing.assert_close(moments, posterior.parameters)
    latents = base.sample_latents(moments, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
    expected = posterior.sample(torch.Generator().manual_seed(2)) * stock.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    images = stock.image_processor.postprocess(decoded.detach(), output_type="pt")
    torch.testing.assert_close(base.decode(latents), images)


def test_half_precision_files_are_cast_up(tiny_base_factory: Callable[..., Path]) -> None:
    plain = load_base_model(str(tiny_base_factory(dtype=torch.float16)))
    variant = load_base_model(str(tiny_base_factory(dtype=torch.float16, variant="fp16")))
    assert {parameter.dtype for parameter in plain.unet.parameters()} == {torch.float32}
    assert plain.fingerprint == variant.fingerprint
    for ours, theirs in zip(plain.unet.parameters(), variant.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_sharded_weights_load_and_have_the_same_fingerprint(base: BaseModel, copy: Path) -> None:
    base.unet.save_pretrained(copy / "unet", max_shard_size="20KB")
    (copy / UNET).unlink(missing_ok=True)
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    sharded = load_base_model(str(copy))
    assert sharded.fingerprint == base.fingerprint
    first = sorted((copy / "unet").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(BaseModelError, match=first.name):
        load_base_model(str(copy))


def test_a_base_can_be_loaded_in_another_dtype(tiny_base_folder: Path, base: BaseModel) -> None:
    half = load_base_model(str(tiny_base_folder), dtype=torch.bfloat16)
    for module in (half.unet, half.vae, *half.text_encoders.models):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert half.fingerprint == base.fingerprint
    assert states_of(half, ["a cup"]).dtype == torch.bfloat16
    assert half.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "offset"), [({"steps_offset": 0}, 1), ({"steps_offset": 1}, 1), ({"clip_sample": True}, None)]
)
def test_the_scheduler_config_is_corrected_as_by_the_stock_pipeline(config: dict[str, Any], offset: int) -> None:
    corrected = as_stock_pipeline_reads(config)
    assert corrected["clip_sample"] is False
    assert corrected.get("steps_offset") == offset


# ---- fingerprint


def test_fingerprint_does_not_depend_on_place_or_time(base: BaseModel, copy: Path) -> None:
    assert fingerprints(copy).content == base.fingerprint


def change_one_weight(folder: Path) -> None:
    edit_tensor(folder, lambda weight: weight + torch.eye(3)[None, None] * 1e-6)


def change_a_shape(folder: Path) -> None:
    edit_tensor(folder, lambda weight: weight.flatten())


def change_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "merges.txt"
    head, first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, second, first, *rest]) + "\n")


def change_the_prediction_type(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))


def change_the_betas(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.012", "0.013"))


@pytest.mark.parametrize(
    "change",
    [change_one_weight, change_a_shape, change_the_tokenizer, change_the_prediction_type, change_the_betas],
)
def test_fingerprint_depends_on_everything_that_shapes_an_image(
    base: BaseModel, copy: Path, change: Callable[[Path], None]
) -> None:
    change(copy)
    assert fingerprints(copy).content != base.fingerprint


def test_fingerprint_is_cached_by_path_size_and_time(
    copy: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    assert fingerprints(copy).content == base.fingerprint
    (cached,) = (tmp_path / "cache" / "fingerprints").iterdir()
    cached.write_text(f"{'0' * 64} {'1' * 64}")
    assert fingerprints(copy).content == "0" * 64
    cached.write_text("half a dig")
    assert fingerprints(copy).content == base.fingerprint
    change_one_weight(copy)
    assert fingerprints(copy).content not in ("0" * 64, base.fingerprint)


def test_the_digest_of_earlier_versions_is_kept_so_that_their_adapters_are_known(base: BaseModel, copy: Path) -> None:
    """Oracle: the rule of version 0.1 in a plain loop: tensors by the files' names, and the tokenizer's bytes."""
    digest = hashlib.sha256()
    for component, stem in (("text_encoder", "model"), *((c, "diffusion_pytorch_model") for c in ("unet", "vae"))):
        for name, tensor in sorted(load_file(copy / component / f"{stem}.safetensors").items()):
            digest.update(f"{component}\0{name}\0{list(tensor.shape)}\0".encode() + tensor.numpy().tobytes())
    for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"):
        data = (copy / "tokenizer" / name).read_bytes()
        digest.update(f"tokenizer\0{name}\0{len(data)}\0".encode() + data)
    betas = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
    rest = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None}
    digest.update(json.dumps({**betas, **rest}, sort_keys=True).encode())
    assert base.fingerprints == (base.fingerprint, digest.hexdigest())


def test_older_names_of_tensors_do_not_count(base: BaseModel, copy: Path) -> None:
    vae, text = copy / "vae" / "diffusion_pytorch_model.safetensors", copy / "text_encoder" / "model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, tensor in load_file(vae).items():
        for now, before in older.items():
            if f".attentions.0.{now}." in name:
                name = name.replace(f".{now}.", f".{before}.")
        found[name] = tensor
    assert sum(".query." in name for name in found) == 4, "weight and bias, in encoder and decoder"
    save_file(found, vae)
    words = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(text).items()}
    save_file({**words, "text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}, text)
    assert fingerprints(copy).content == base.fingerprint
    assert fingerprints(copy).earlier != base.earlier_fingerprint
    again = load_base_model(str(copy))
    for ours, theirs in zip(again.vae.parameters(), base.vae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_cache_that_cannot_be_written_is_no_error(
    copy: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "file"))
    assert fingerprints(copy).content == base.fingerprint


# ---- general prompts


def test_general_prompts_are_the_bases_own_or_the_shipped_ones(copy: Path) -> None:
    shipped = load_base_model(str(copy)).general_prompts()
    assert len(shipped) >= 150
    assert len(set(shipped)) == len(shipped)
    (copy / "general_prompts.txt").write_text("a fish\n\n  a red house \n")
    assert load_base_model(str(copy)).general_prompts() == ("a fish", "a red house")


# ---- refusals


def only_pickle(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def truncate(folder: Path) -> None:
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: len(data) // 2])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    del tensors["conv_in.bias"]
    save_file(tensors, folder / UNET)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "half of an sdxl": (lambda folder: (folder / "text_encoder_2").mkdir(), "text_encoder_2/config.json is missing"),
    "sdxl without its second text encoder": (
        lambda folder: edit_config(folder, "unet", addition_embed_type="text_time"),
        "addition_embed_type is 'text_time', as in Stable Diffusion XL, and text_encoder_2/ is missing",
    ),
    "sd3": (lambda folder: (folder / "transformer").mkdir(), "Stable Diffusion 3 or Flux"),
    "inpainting": (lambda folder: edit_config(folder, "unet", in_channels=9), "in_channels is 9 .* an inpainting"),
    "image-conditioned": (
        lambda folder: edit_config(folder, "unet", in_channels=8),
        "in_channels is 8 .* image-conditioned",
    ),
    "unclip": (lambda folder: edit_config(folder, "unet", class_embed_type="projection"), "unCLIP"),
    "lcm": (lambda folder: edit_config(folder, "unet", time_cond_proj_dim=256), "latent consistency"),
    "parts of two bases": (
        lambda folder: edit_config(folder, "unet", cross_attention_dim=768),
        "cross_attention_dim is 768 and the text encoder's hidden_size is 16",
    ),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), "vae/config.json is missing"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler/scheduler_config.json is missing"),
    "no weights": (lambda folder: (folder / UNET).unlink(), "diffusion_pytorch_model.safetensors is missing"),
    "broken config": (lambda folder: (folder / "unet/config.json").write_text("{"), "unet/config.json cannot be read"),
    "config of another kind": (lambda folder: (folder / "vae/config.json").write_text("[]"), "not a JSON object"),
    "pickled weights": (only_pickle, "pickled weights only.*safe_serialization=True"),
    "truncated weights": (truncate, "diffusion_pytorch_model.safetensors is damaged"),
    "nan weights": (
        lambda folder: edit_tensor(folder, lambda weight: weight * float("nan")),
        "tensor conv_in.weight has values that are not finite",
    ),
    "infinite weights": (
        lambda folder: edit_tensor(folder, lambda weight: weight.half() * 6e4 * 6e4),
        "tensor conv_in.weight has values that are not finite",
    ),
    "a missing tensor": (drop_a_tensor, "unet.*conv_in.bias"),
    "another shape": (lambda folder: edit_tensor(folder, lambda weight: weight[:, :2].contiguous()), "unet"),
    "no longest text": (
        lambda folder: (folder / "tokenizer/tokenizer_config.json").write_text("{}"),
        "model_max_length must be set, and at most 77",
    ),
    "no prediction type we know": (
        lambda folder: (folder / "scheduler/scheduler_config.json").write_text('{"prediction_type": "sample"}'),
        "prediction_type 'sample'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_name(case: str, copy: Path) -> None:
    damage, message = REFUSALS[case]
    damage(copy)
    with pytest.raises(BaseModelError, match=message):
        load_base_model(str(copy))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "nothing", "a/b/c", "owner/"])
def test_a_name_that_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(BaseModelError, match="is neither a folder nor a file"):
        base_folder(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "has no name"),
        ("  ", "has no name"),
        ("https://hub.example/owner/base", "is an address, which is not opened: give 'pocket', 'pocket-xl'"),
        ("gs://bucket/base", "is an address"),
        ("models/sd15.ckpt", r"are never read.*from_single_file\(FILE\)\.save_pretrained"),
        ("./models/sd15.safetensors", "is damaged"),
    ],
)
def test_what_is_no_folder_is_never_looked_up_on_the_hub(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd15.ckpt").write_bytes(b"weights")
    (tmp_path / "models" / "sd15.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    for ask in (base_folder, check_base):
        with pytest.raises(BaseModelError, match=message):
            ask(name)


@pytest.mark.parametrize("case", list(REFUSALS)[: list(REFUSALS).index("truncated weights")])
def test_what_a_folders_files_tell_is_refused_without_reading_weights(case: str, copy: Path) -> None:
    assert check_base(str(copy)) is None
    damage, message = REFUSALS[case]
    damage(copy)
    with pytest.raises(BaseModelError, match=message):
        check_base(str(copy))


def test_pocket_is_the_shipped_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tmp_path / "base_names.py"
    monkeypatch.setattr(cat_cluster.models.base_names, "__file__", str(module))
    with pytest.raises(BaseModelError, match="cat-cluster pocket pretrain"):
        base_folder("pocket")
    (tmp_path / "pocket" / "weights").mkdir(parents=True)
    (tmp_path / "pocket" / "weights" / "model_index.json").write_text("{}")
    assert base_folder("pocket") == tmp_path / "pocket" / "weights"


# ---- hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_in_the_local_cache_needs_no_network(hub_cache: Path, tiny_base_folder: Path, base: BaseModel) -> None:
    commit = "a" * 40
    repository = hub_cache / "models--someone--tiny"
    shutil.copytree(tiny_base_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_base_model("someone/tiny").fingerprint == base.fingerprint


def test_a_hub_id_that_cannot_be_downloaded_names_the_remedy(hub_cache: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'someone/absent'.*HF_HUB_OFFLINE.*path of a diffusers folder"):
        load_base_model("someone/absent")


def test_an_embedded_base_that_is_not_finished_is_refused_with_the_way_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "weights" / "vae"
    unfinished.mkdir(parents=True)
    monkeypatch.setitem(cat_cluster.models.base_names.EMBEDDED, "pocket-xl", str(tmp_path))
    for asked in (base_folder, local_base, check_base):
        with pytest.raises(BaseModelError, match=r"model_index\.json is missing.*pocket pretrain --base pocket-xl"):
            asked("pocket-xl")
    assert lasting_name("pocket-xl") == "pocket-xl"
