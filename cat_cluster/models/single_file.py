"""Checkpoints in one file, as A1111, ComfyUI and Civitai use them, unpacked once into a diffusers folder.

The family is read from the names of the tensors, and its configs ship in `families/`: nothing is downloaded. The folder
is kept in the cache; the base's name stays the file's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError, safe_open

from cat_cluster.errors import BaseModelError
from cat_cluster.models.cached_folders import is_whole, whole_folder
from cat_cluster.settings import load_settings

Kind = Literal["sd1", "sd2", "sdxl"]
FAMILIES = Path(__file__).parent / "families"
PICKLED = (".ckpt", ".pt", ".pth", ".bin")  # how the names of checkpoints end that are pickles
_SUPPORTED = "use a text-to-image checkpoint of Stable Diffusion 1.x, 2.x or XL"
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXT: Mapping[Kind, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
# Tensors that other checkpoints have and these have not, and what they are then.
_OTHERS: Mapping[str, str] = {
    "conditioner.embedders.0.model.": "a refiner of Stable Diffusion XL",
    f"{_UNET}joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    f"{_UNET}double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "lora_unet_": "a LoRA, which `cat-cluster adapters import` reads",
    "lora_te": "a LoRA, which `cat-cluster adapters import` reads",
    "unet.": "a LoRA, which `cat-cluster adapters import` reads",
    "base_model.model.": "a LoRA, which `cat-cluster adapters import` reads",
    "edm_mean": "Playground 2.5",
    "edm_vpred.": "a checkpoint with EDM's noise levels, such as CosXL",
    "noise_augmentor.": "Stable unCLIP",
    f"{_UNET}position_net.": "GLIGEN",
    "down_blocks.": "a U-Net alone, as diffusers keeps it in the folder unet: give the whole folder",
}
_LABELS = f"{_UNET}label_emb."  # of SDXL; in Stable Diffusion 2.x of unCLIP alone
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_SIDE_OF_NOISE = 512  # pixels, of a Stable Diffusion 2.x that predicts noise; those that predict v draw 768
_DTYPES = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """What the head of a file says: its family, how its U-Net predicts, and the dtype of each part."""

    kind: Kind
    prediction_type: str
    zero_snr: bool
    dtypes: Mapping[str, str]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the head of a checkpoint; no weights are read.

    How it predicts is told by ComfyUI's marks `v_pred` and `ztsnr`, by the key `modelspec.prediction_type` of its
    metadata, or by `parameterization` in a YAML file of its name beside it, as A1111 has it; else it predicts noise.
    Raises BaseModelError for another family, a missing part, and a file of Stable Diffusion 2.x that does not tell.
    """
    if path.suffix.lower() != ".safetensors":
        raise not_read(str(path))
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            head = _Head({n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}, file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise BaseModelError(f"{path} is damaged ({error}); download the base again.") from error
    return _checkpoint(str(path), head, path.with_suffix(".yaml"))


def not_read(name: str) -> BaseModelError:
    """Return the error for a file that is no .safetensors one, wherever it lies: how to convert it."""
    return BaseModelError(
        f"base {name} is no .safetensors file, and pickled ones ({', '.join(PICKLED)}) are never read: convert it "
        "once, in a place where you trust it, with "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), of an XL with "
        "StableDiffusionXLPipeline."
    )


def check_head(name: str, data: bytes, beside: Path) -> None:
    """Refuse a checkpoint that is elsewhere by the JSON of its head; raises BaseModelError as read_checkpoint.

    beside: where a copy of its YAML file would be.
    """
    try:
        found = json.loads(data)
        metadata = found.pop("__metadata__", {})
        tensors = {key: (one["dtype"], tuple(one["shape"])) for key, one in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{name} is damaged (its head is no head of safetensors); upload it again.") from error
    _checkpoint(name, _Head(tensors, metadata), beside)


@dataclass(frozen=True)
class _Head:
    """Dtype and shape of each tensor of a file, and its metadata."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]


def _checkpoint(name: str, head: _Head, beside: Path) -> Checkpoint:
    kind = _kind(name, list(head.tensors))
    dtypes = {part: _dtype(name, head, prefix) for part, prefix in _parts(kind).items()}
    channels = next(iter(head.tensors[_CONV_IN][1][1:]), None)
    if channels != 4:
        what = "an inpainting" if channels == 9 else "an image-conditioned"
        raise BaseModelError(f"{name}: its U-Net takes {channels} channels, which is {what} checkpoint; {_SUPPORTED}.")
    told = _prediction_told(name, head, beside)
    if told is None and kind == "sd2":
        raise BaseModelError(
            f"{name} is a Stable Diffusion 2.x, of which some predict noise and others v, and it does not say which: "
            f"write {Path(name).with_suffix('.yaml').name} beside it with the line `parameterization: v` (768 pixels) "
            "or `parameterization: eps` (512)."
        )
    return Checkpoint(kind, told or "epsilon", "ztsnr" in head.tensors, dtypes)


def tokenizer_folder(path: Path) -> Path:
    """Return a folder with the tokenizer of a checkpoint, without unpacking the checkpoint."""
    place = load_settings().cache_dir / "tokenizers" / read_checkpoint(path).kind
    if not is_whole(place):
        with whole_folder(place) as folder:
            _write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    return place


def unpacked(path: Path) -> Path:
    """Return the diffusers folder of a checkpoint: from the cache, else made there.

    Raises BaseModelError as read_checkpoint and for weights that do not fit their family; OutputError where the cache
    cannot be written.
    """
    found = read_checkpoint(path)
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{found}".encode()).hexdigest()
    place = load_settings().cache_dir / "bases" / key[:32]
    if not is_whole(place):
        with whole_folder(place) as folder:
            _unpack(path, found, folder)
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (facts.st_size, facts.st_mtime_ns):
                raise BaseModelError(f"{path} was changed while it was read; try again once it is whole.")
    return place


def _unpack(path: Path, found: Checkpoint, folder: Path) -> None:
    write_family(folder, found.kind)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"prediction_type": found.prediction_type}
    if found.zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps(config, indent=2))
    if found.kind == "sd2" and found.prediction_type == "epsilon":
        _set_side(folder, _SIDE_OF_NOISE)
    for part, module in _modules(path, found, folder):
        left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if left:
            raise BaseModelError(
                f"{path}: its {part} lacks {len(left)} tensors, the first {left[0]}; download it again."
            )
        module.save_pretrained(folder / part)


def write_family(folder: Path, kind: str) -> None:
    """Write what a family's releases have beside weights: configs, scheduler and tokenizers, in diffusers' layout."""
    shutil.copytree(FAMILIES / kind, folder, dirs_exist_ok=True)
    paddings = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[kind]
    for name, padding in zip(("tokenizer", "tokenizer_2"), paddings, strict=False):
        _write_tokenizer(folder / name, padding)


def _set_side(folder: Path, pixels: int) -> None:
    """Set the side of the base's own images in the configs of its U-Net and VAE."""
    vae = json.loads((folder / "vae" / "config.json").read_text())
    for part, side in (("unet", pixels >> (len(vae["block_out_channels"]) - 1)), ("vae", pixels)):
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": side}, indent=2))


def _modules(path: Path, found: Checkpoint, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a checkpoint, one in memory at a time, each in the dtype that the file has it in."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    given = {"config": str(folder), "local_files_only": True}
    # The library reads any file as a pickle whose name does not end in these letters, in this case.
    named = folder.parent / "checkpoint.safetensors"
    named.symlink_to(path.resolve())
    with _naming_misfits(path):
        for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            dtype = getattr(torch, found.dtypes[part])
            module = kind.from_single_file(str(named), subfolder=part, torch_dtype=dtype, **given)
            if part == "unet":
                _check_no_more(path, module.state_dict())
            yield part, module
        pipeline_kind = StableDiffusionXLPipeline if found.kind == "sdxl" else StableDiffusionPipeline
        parts = [part for part in found.dtypes if part.startswith("text_encoder")]
        texts = _text_tensors(named, found.kind)
        for part in parts:
            others = {other: None for other in ("unet", "vae", *parts) if other != part}
            dtype = getattr(torch, found.dtypes[part])
            yield part, getattr(pipeline_kind.from_single_file(str(texts), torch_dtype=dtype, **others, **given), part)


def _check_no_more(path: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a file whose U-Net has more tensors than its family's: the library passes over them."""
    with safe_open(path, framework="numpy") as file:
        count = sum(name.startswith(_UNET) for name in file.keys())  # noqa: SIM118
    if count > len(expected):
        raise BaseModelError(
            f"{path}: its U-Net has {count} tensors and its family's {len(expected)}, so it is of another; "
            f"{_SUPPORTED}."
        )


def _text_tensors(checkpoint: Path, kind: Kind) -> Path:
    """Return a file with the text encoders by the names that the library reads: older ones lack `text_model.`."""
    from safetensors.torch import save_file

    prefix = _TEXT[kind][0]
    with safe_open(checkpoint, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(_TEXT[kind])]  # noqa: SIM118
        if kind == "sd2" or any(name.startswith(f"{prefix}text_model.") for name in names):
            return checkpoint
        renamed = {name.replace(prefix, f"{prefix}text_model.", 1): file.get_tensor(name) for name in names}
    written = checkpoint.with_stem("texts")
    save_file(renamed, written)
    return written


@contextmanager
def _naming_misfits(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError, AttributeError) as error:
        if "meta tensor" in str(error):  # how the library meets a tensor that nothing was read for
            raise BaseModelError(f"{path} lacks tensors of its family; download it again.") from error
        raise BaseModelError(
            f"{path} cannot be read as a checkpoint of its family ({' '.join(str(error).split())[:300]}); download it "
            "again."
        ) from error


def _kind(path: str, names: list[str]) -> Kind:
    for start, what in _OTHERS.items():
        if _has(names, start):
            raise BaseModelError(f"{path} is {what}, and no base here; {_SUPPORTED}.")
    found: list[Kind] = [kind for kind, starts in _TEXT.items() if all(_has(names, start) for start in starts)]
    if _CONV_IN not in names:
        raise BaseModelError(f"{path} has no U-Net of Stable Diffusion ({_CONV_IN}); {_SUPPORTED}.")
    if found and found[0] != "sdxl" and _has(names, _LABELS):
        raise BaseModelError(f"{path} is Stable unCLIP ({_LABELS}...), and no base here; {_SUPPORTED}.")
    if not found:
        raise BaseModelError(
            f"{path} has no text encoder: it is a U-Net alone, as ComfyUI keeps them in models/unet; use the whole "
            "checkpoint."
        )
    if not _has(names, _VAE):
        raise BaseModelError(f"{path} has no VAE ({_VAE}...); use a checkpoint that contains one.")
    return found[0]


def _has(names: list[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _parts(kind: Kind) -> dict[str, str]:
    """Return the prefix of each part's tensors."""
    texts = dict(zip(("text_encoder", "text_encoder_2"), _TEXT[kind], strict=False))
    return {"unet": _UNET, "vae": _VAE, **texts}


def _dtype(name: str, head: _Head, prefix: str) -> str:
    """Return the narrowest dtype that holds all weights of a part; position_ids, of whatever dtype, are none."""
    weights = (one for key, one in head.tensors.items() if key.startswith(prefix) and "position_ids" not in key)
    kinds = {dtype for dtype, _ in weights} - {"I64", "I32", "BOOL"}
    if unknown := kinds - set(_DTYPES):
        raise BaseModelError(
            f"{name}: tensors of {prefix}... are {min(unknown)}; use a checkpoint in fp16, bf16 or fp32."
        )
    dtypes = {_DTYPES[kind] for kind in kinds}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _prediction_told(name: str, head: _Head, beside: Path) -> str | None:
    words = {"v": "v_prediction", "v_prediction": "v_prediction", "eps": "epsilon", "epsilon": "epsilon"}
    if "v_pred" in head.tensors:
        return "v_prediction"
    if said := head.metadata.get("modelspec.prediction_type"):
        if said not in words:
            raise BaseModelError(
                f"{name}: modelspec.prediction_type in its head is {str(said)[:60]!r}, and may be {', '.join(words)}: "
                "write it anew."
            )
        return words[said]
    if not beside.is_file():
        return None
    try:
        said = _parameterization(yaml.safe_load(beside.read_text(encoding="utf-8")))
        return words[said or "eps"]
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise BaseModelError(
            f"{beside} cannot be read ({error}); it may say `parameterization: v` or `eps`."
        ) from error


def _parameterization(config: Any) -> str | None:
    """Return what a config says at its top, or where those of Stable Diffusion's own repository have it."""
    if not isinstance(config, dict):
        return None
    if "parameterization" in config:
        return str(config["parameterization"])
    for inner in (config.get("model"), config.get("params")):
        if (said := _parameterization(inner)) is not None:
            return said
    return None


def _write_tokenizer(folder: Path, padding: str) -> None:
    """Write CLIP's tokenizer as the releases have it; the vocabulary follows from the merges."""
    merges = (FAMILIES / "clip_merges.txt").read_text(encoding="utf-8")
    letters = _letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["".join(line.split(" ")) for line in merges.splitlines()[1:]]
    vocabulary = {piece: place for place, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": padding,
        "unk_token": "<|endoftext|>",
    }
    config = {**special, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir()
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", config),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _letters() -> list[str]:
    """Return the printable stand-in of each byte, those first that stand for themselves (GPT-2's byte-level BPE)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + place) for place in range(len(others)))]
