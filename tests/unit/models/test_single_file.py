"""Checkpoints in one file: written in the layout of ldm by hand, read offline, the same base as the folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from cat_cluster.errors import BaseModelError, OutputError
from cat_cluster.models import single_file
from cat_cluster.models.base_files import check_family
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.base_names import base_folder, check_base, local_base
from cat_cluster.models.generate import ImageRow, generate
from cat_cluster.models.single_file import Checkpoint, read_checkpoint, tokenizer_folder, unpacked
from cat_cluster.models.text_limit import local_text_limit
from tests.conftest import TINY_MERGES, TinyBaseFactory
from tests.support.denoised_images import stock_scheduler
from tests.support.ldm_files import write_checkpoint
from tests.support.meta_unets import SD15, SDXL, meta_unet
from tests.support.tiny_xl import write_tiny_xl_base

KINDS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def folders(tiny_base_factory: TinyBaseFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each kind as a folder, with the tokenizers that this package writes."""
    place = tmp_path_factory.mktemp("families")
    found = {
        "sd1": tiny_base_factory(),
        "sd2": tiny_base_factory(prediction_type="v_prediction", use_linear_projection=True, text_layers=2, seed=7),
        "sdxl": write_tiny_xl_base(tmp_path_factory.mktemp("xl")),
    }
    shipped = single_file.FAMILIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "FAMILIES", place)
        (place / "clip_merges.txt").write_text("#version: 0.2\n" + "\n".join(TINY_MERGES) + "\n")
        for kind, folder in found.items():
            for name, padding in (("tokenizer", "<|endoftext|>" if kind != "sd2" else "!"), ("tokenizer_2", "!")):
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                    single_file._write_tokenizer(folder / name, padding)
            for part in ("scheduler", "unet", "vae", "text_encoder", "text_encoder_2"):
                for path in (folder / part).glob("*.json"):
                    (place / kind / part).mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, place / kind / part)
            shutil.copy(folder / "model_index.json", place / kind)
            # What a file says of its schedule is in the shipped config, or told.
            assert (shipped / kind / "scheduler" / "scheduler_config.json").is_file()
    return {**found, "families": place}


@pytest.fixture(autouse=True)
def tiny_families(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shipped configs are of full size; these have tiny ones in their place, and a cache of their own."""
    monkeypatch.setattr(single_file, "FAMILIES", folders["families"])
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def files(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Each kind as one file; that of Stable Diffusion 2.x says that it predicts v."""
    told = {"sd2": {"modelspec.prediction_type": "v"}}
    return {
        kind: write_checkpoint(folders[kind], tmp_path / f"{kind}.safetensors", metadata=told.get(kind))
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_base_of_its_folder(folders: dict[str, Path], files: dict[str, Path], kind: str) -> None:
    found, wanted = load_base_model(str(files[kind])), load_base_model(str(folders[kind]))
    for ours, theirs in (
        (found.unet, wanted.unet),
        (found.vae, wanted.vae),
        *zip(found.text_encoders.models, wanted.text_encoders.models, strict=True),
    ):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert found.fingerprint == wanted.fingerprint
    assert found.name == str(files[kind])
    assert found.schedule.prediction_type == wanted.schedule.prediction_type
    rows = [ImageRow("a photo of a sks cup", 5, steps=3, negative_prompt="red")]
    assert torch.equal(generate(found, None, rows), generate(wanted, None, rows))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_that_of_the_stock_pipeline_from_the_file(
    folders: dict[str, Path], files: dict[str, Path], kind: str
) -> None:
    stock_kind = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    stock = stock_kind.from_single_file(str(files[kind]), config=str(folders[kind]), local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = stock_scheduler("ddim", stock.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(5)
    (theirs,) = stock("a photo of a sks cup", num_inference_steps=3, guidance_scale=4.0, generator=generator).images
    (ours,) = generate(load_base_model(str(files[kind])), None, [ImageRow("a photo of a sks cup", 5, steps=3)])
    difference = np.abs((ours * 255).round().permute(1, 2, 0).numpy() - np.asarray(theirs, dtype=np.float32))
    assert difference.max() <= 1


def test_a_file_is_unpacked_once_and_again_when_it_changes(files: dict[str, Path], folders: dict[str, Path]) -> None:
    first = base_folder(str(files["sd1"]))
    marker = first / "marker"
    marker.touch()
    assert base_folder(str(files["sd1"])) == first
    assert marker.exists()
    write_checkpoint(folders["sd1"], files["sd1"], dtype=torch.float16)
    assert base_folder(str(files["sd1"])) != first
    assert not list(first.parent.glob("*-*")), "half-made folders are left"


def test_parts_keep_the_dtype_of_the_file(files: dict[str, Path], folders: dict[str, Path]) -> None:
    tensors = load_file(files["sdxl"])
    mixed = {name: one.half() if name.startswith("model.") else one for name, one in tensors.items()}
    save_file(mixed, files["sdxl"])
    folder = unpacked(files["sdxl"])
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {one.dtype for one in unet.values()} == {torch.float16}
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert {one.dtype for one in vae.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_position_ids_of_any_dtype_widen_no_part(files: dict[str, Path], dtype: torch.dtype) -> None:
    tensors = load_file(files["sd1"])
    save_file(
        {name: one.to(dtype) if "position_ids" in name else one.half() for name, one in tensors.items()}, files["sd1"]
    )
    assert set(read_checkpoint(files["sd1"]).dtypes.values()) == {"float16"}
    load_base_model(str(files["sd1"]))


def test_no_v_prediction_is_missed(files: dict[str, Path], folders: dict[str, Path]) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    write_checkpoint(folders["sdxl"], files["sdxl"], marks=marks)
    base = load_base_model(str(files["sdxl"]))
    assert base.schedule.prediction_type == "v_prediction"
    assert base.schedule.scheduler_config["timestep_spacing"] == "trailing"
    assert float(base.schedule.alphas_cumprod[-1]) == 0.0
    assert read_checkpoint(files["sd1"]).prediction_type == "epsilon"
    files["sd1"].with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    assert read_checkpoint(files["sd1"]).prediction_type == "v_prediction"


def test_a_stable_diffusion_2_must_say_what_it_predicts(files: dict[str, Path], folders: dict[str, Path]) -> None:
    silent = write_checkpoint(folders["sd2"], files["sd2"])
    with pytest.raises(BaseModelError, match=r"write sd2\.yaml beside it with the line `parameterization: v`"):
        check_base(str(silent))
    silent.with_suffix(".yaml").write_text("parameterization: v\n")
    assert read_checkpoint(silent).prediction_type == "v_prediction"
    silent.with_suffix(".yaml").write_text("parameterization: x0\n")
    with pytest.raises(BaseModelError, match=r"sd2\.yaml cannot be read"):
        check_base(str(silent))


def test_a_stable_diffusion_2_that_predicts_noise_draws_512_pixels_and_one_that_predicts_v_768(
    files: dict[str, Path], folders: dict[str, Path]
) -> None:
    """The shipped U-Net is that of 768; the tiny one takes 8 pixels for each of its latents too, or fewer."""
    wide = base_folder(str(files["sd2"]))
    assert json.loads((wide / "unet" / "config.json").read_text())["sample_size"] == 8
    noise = write_checkpoint(folders["sd2"], files["sd2"], metadata={"modelspec.prediction_type": "epsilon"})
    assert load_base_model(str(noise)).resolution == 512


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_older_names_of_the_text_encoder_are_the_same_base(files: dict[str, Path], kind: str) -> None:
    """Older files have cond_stage_model.transformer.embeddings and so on, which A1111 reads too."""
    wanted = load_base_model(str(files[kind])).fingerprint
    older = {
        name.replace(".transformer.text_model.", ".transformer."): one for name, one in load_file(files[kind]).items()
    }
    save_file(older, files[kind])
    assert load_base_model(str(files[kind])).fingerprint == wanted


def test_names_in_any_case_and_any_letters_and_links_are_the_same_base(files: dict[str, Path], tmp_path: Path) -> None:
    wanted = load_base_model(str(files["sd1"])).fingerprint
    for name in ("model.SAFETENSORS", "ein schönes Modell #1 [v2] %20.safetensors"):
        assert load_base_model(str(shutil.copy(files["sd1"], tmp_path / name))).fingerprint == wanted
    (tmp_path / "link.safetensors").symlink_to(files["sd1"])
    assert load_base_model(str(tmp_path / "link.safetensors")).fingerprint == wanted


@pytest.mark.parametrize(
    "gone", ["model_index.json", "unet", "vae/diffusion_pytorch_model.safetensors", "tokenizer_2/merges.txt"]
)
def test_what_has_gone_from_the_cache_is_unpacked_again(files: dict[str, Path], gone: str) -> None:
    folder = unpacked(files["sdxl"])
    wanted = load_base_model(str(files["sdxl"]))
    if (folder / gone).is_dir():
        shutil.rmtree(folder / gone)
    else:
        (folder / gone).unlink()
    again = load_base_model(str(files["sdxl"]))
    assert again.fingerprint == wanted.fingerprint
    assert again.text_encoders.zeros_without_text is True
    assert (folder / gone).exists()
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


def test_a_tokenizer_that_has_gone_from_the_cache_is_written_again(files: dict[str, Path]) -> None:
    folder = tokenizer_folder(files["sd1"])
    (folder / "tokenizer" / "merges.txt").unlink()
    assert local_text_limit(str(files["sd1"])) is not None


def test_a_file_that_changes_while_it_is_read_leaves_nothing(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unpack = single_file._unpack

    def unpack_while_it_changes(path: Path, found: Checkpoint, folder: Path) -> None:
        unpack(path, found, folder)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(single_file, "_unpack", unpack_while_it_changes)
    with pytest.raises(BaseModelError, match="was changed while it was read"):
        base_folder(str(files["sd1"]))
    assert not list((tmp_path / "cache" / "bases").iterdir())


def test_of_two_that_unpack_at_once_the_first_is_kept(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = single_file._unpack

    def unpack_while_another_does(path: Path, found: Checkpoint, folder: Path) -> None:
        unpack(path, found, folder)
        monkeypatch.setattr(single_file, "_unpack", unpack)
        (unpacked(path) / "marker").touch()

    monkeypatch.setattr(single_file, "_unpack", unpack_while_another_does)
    folder = unpacked(files["sd1"])
    assert (folder / "marker").exists()
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


def test_captions_are_held_to_the_limit_of_a_file_without_unpacking_it(files: dict[str, Path], tmp_path: Path) -> None:
    limit = local_text_limit(str(files["sdxl"]))
    assert limit is not None
    assert limit.tokens == 77
    assert not (tmp_path / "cache" / "bases").exists()
    assert tokenizer_folder(files["sdxl"]) == tokenizer_folder(files["sdxl"])


# ---- refusals


def without(start: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: one for name, one in tensors.items() if not name.startswith(start)}


def with_more(**more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): one for name, one in more.items()}}


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
REFUSALS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no VAE": (without("first_stage_model."), "has no VAE"),
    "no text encoder": (without("cond_stage_model."), "has no text encoder"),
    "no U-Net": (without("model.diffusion_model."), "has no U-Net of Stable Diffusion"),
    "inpainting": (lambda tensors: {**tensors, CONV_IN: torch.zeros(8, 9, 3, 3)}, "takes 9 channels, .* an inpainting"),
    "image-conditioned": (lambda tensors: {**tensors, CONV_IN: torch.zeros(8, 8, 3, 3)}, "an image-conditioned"),
    "refiner": (with_more(conditioner__embedders__0__model__ln_final__weight=torch.zeros(1)), "is a refiner"),
    "SD3": (with_more(model__diffusion_model__joint_blocks__0=torch.zeros(1)), "is Stable Diffusion 3"),
    "Flux": (lambda _: {"double_blocks.0.img_attn.proj.weight": torch.zeros(1)}, "is Flux"),
    "a LoRA": (lambda _: {"lora_unet_mid_block.lora_down.weight": torch.zeros(1)}, "is a LoRA, .* adapters import"),
    "Playground 2.5": (with_more(edm_mean=torch.zeros(4)), "is Playground 2.5"),
    "CosXL": (with_more(edm_vpred__sigma_max=torch.zeros(1)), "EDM's noise levels, such as CosXL"),
    "unCLIP": (with_more(model__diffusion_model__label_emb__0__0__weight=torch.zeros(2, 2)), "is Stable unCLIP"),
    "GLIGEN": (with_more(model__diffusion_model__position_net__linears__0__bias=torch.zeros(2)), "is GLIGEN"),
    "no shape of a convolution": (lambda tensors: {**tensors, CONV_IN: torch.zeros(3)}, "takes None channels"),
    "integers": (
        lambda tensors: {**tensors, CONV_IN: torch.zeros(8, 4, 3, 3, dtype=torch.int8)},
        "are I8; use a checkpoint in fp16, bf16 or fp32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_base_is_refused_by_its_head(files: dict[str, Path], case: str) -> None:
    change, message = REFUSALS[case]
    save_file({name: one.contiguous() for name, one in change(load_file(files["sd1"])).items()}, files["sd1"])
    for refuses in (check_base, base_folder):
        with pytest.raises(BaseModelError, match=message):
            refuses(str(files["sd1"]))


def test_what_the_head_says_of_prediction_is_known_or_refused(files: dict[str, Path], folders: dict[str, Path]) -> None:
    write_checkpoint(folders["sdxl"], files["sdxl"], metadata={"modelspec.prediction_type": "v-pred"})
    with pytest.raises(BaseModelError, match=r"modelspec\.prediction_type in its head is 'v-pred', and may be v, "):
        check_base(str(files["sdxl"]))


def test_a_u_net_with_more_tensors_than_its_family_has_is_refused(files: dict[str, Path]) -> None:
    more = {"model.diffusion_model.middle_block.1.temporal.weight": torch.zeros(2, 2)}
    save_file({**load_file(files["sdxl"]), **more}, files["sdxl"])
    with pytest.raises(BaseModelError, match=r"its U-Net has \d+ tensors and its family's \d+, so it is of another"):
        base_folder(str(files["sdxl"]))


def test_a_checkpoint_that_is_not_there_is_not_sought_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for refuses in (check_base, base_folder):
        with pytest.raises(BaseModelError, match=r"'models/none\.safetensors' is neither a folder nor a file"):
            refuses("models/none.safetensors")


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.pt", "model"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        with pytest.raises(BaseModelError, match=r"from_single_file\(FILE\)\.save_pretrained\(FOLDER\)"):
            check_base(str(tmp_path / name))


@pytest.mark.parametrize(
    "name",
    ["s3://bucket/bases/anime.ckpt", "s3://bucket/anime.CKPT", "owner/repository/v2/anime.ckpt", "models/anime.pt"],
)
def test_pickles_elsewhere_are_refused_alike_before_anything_is_asked_for_them(name: str) -> None:
    """In S3, on the hub, and where there is no such file; without a server and without the hub."""
    for refuses in (check_base, base_folder, local_base):
        with pytest.raises(BaseModelError, match=rf"{name} .*from_single_file\(FILE\)\.save_pretrained\(FOLDER\)"):
            refuses(name)


def test_damage_is_named(files: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    data = files["sd1"].read_bytes()
    files["sd1"].write_bytes(data[: len(data) // 2])
    with pytest.raises(BaseModelError, match="damaged"):
        check_base(str(files["sd1"]))
    tensors = load_file(files["sdxl"])
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, files["sdxl"])
    with pytest.raises(BaseModelError, match="lacks tensors of its family"):
        base_folder(str(files["sdxl"]))
    assert not list((tmp_path / "cache" / "bases").iterdir()), "half of a base is kept"


def test_a_cache_without_room_is_named(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set CAT_CACHE_DIR"):
        base_folder(str(files["sd1"]))


def test_a_disk_that_fills_up_while_weights_are_written_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    """The configs and tokenizers still fit, the U-Net does not; the library then raises an error of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"File too large.*set CAT_CACHE_DIR"):
            base_folder(str(files["sdxl"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "cache" / "bases").iterdir()), "half of a base is kept"


# ---- what ships


@pytest.mark.parametrize(("kind", "config"), [("sd1", SD15), ("sdxl", SDXL)])
def test_shipped_configs_are_those_of_the_releases(
    kind: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    shipped = json.loads((single_file.FAMILIES / kind / "unet" / "config.json").read_text())
    ours = {name: one.shape for name, one in meta_unet(shipped).state_dict().items()}
    assert ours == {name: one.shape for name, one in meta_unet(config).state_dict().items()}


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # published examples of openai/clip-vit-large-patch14's tokenizer
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a photo of a dog", [320, 1125, 539, 320, 1929]),
        ("hello world", [3306, 1002]),
    ],
)
def test_the_shipped_vocabulary_is_clips(
    text: str, ids: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    monkeypatch.undo()
    single_file._write_tokenizer(tmp_path / "tokenizer", "!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer(text).input_ids == [49406, *ids, 49407]
    assert len(tokenizer) == 49408
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 77


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_folders_are_complete_but_for_weights(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    folder = Path(shutil.copytree(single_file.FAMILIES / kind, tmp_path / kind))
    for name in ("tokenizer", "tokenizer_2"):
        single_file._write_tokenizer(folder / name, "!")
    check_family(folder)
