"""Shared fixtures, the S3 server among them, and complete tiny Stable Diffusion folders made by the real libraries."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# kubectl and other tools that pip installs are found whether the virtual environment is activated or not.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import pytest
import torch

from tests.support.marks import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.support.marks import pytest_make_collect_report as pytest_make_collect_report
from tests.support.marks import pytest_runtest_makereport as pytest_runtest_makereport
from tests.support.marks import pytest_runtest_protocol as pytest_runtest_protocol
from tests.support.s3_server import S3Server, ServerUnavailableError

TinyBaseFactory = Callable[..., Path]

# The scheduler_config.json of Stable Diffusion 1.5, which leaves timestep_spacing to each scheduler.
STABLE_DIFFUSION_SCHEDULER: Mapping[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
TINY_MERGES = (
    "a t",
    "p h",
    "o t",
    "ph ot",
    "phot o</w>",
    "o f</w>",
    "c u",
    "cu p</w>",
    "i n</w>",
    "r e",
    "re d</w>",
)


@pytest.fixture(scope="session", autouse=True)
def _small_and_offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One torch thread, no hub, and a cache folder of the session's own."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server on loopback, for the whole session.

    Under pytest-xdist each worker starts its own: tests stop and damage their server, which no other worker may see.
    """
    server = S3Server()
    try:
        server.start()
    except ServerUnavailableError as error:
        pytest.skip(f"no S3 server: {error}")
    with server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an empty bucket, with the AWS variables set for it and no other AWS settings in reach."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return s3_server.create_bucket(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="session")
def tiny_base_factory(tmp_path_factory: pytest.TempPathFactory) -> TinyBaseFactory:
    """Makes diffusers folders of a tiny random Stable Diffusion; see write_tiny_base for its options."""

    def make(**options: Any) -> Path:
        return write_tiny_base(tmp_path_factory.mktemp("base"), **options)

    return make


@pytest.fixture(scope="session")
def tiny_base_folder(tiny_base_factory: TinyBaseFactory) -> Path:
    """A tiny random Stable Diffusion 1.x: 4 latent channels of 8 x 8, images of 16 x 16 pixels."""
    return tiny_base_factory()


@pytest.fixture(scope="session")
def tiny_base_v_folder(tiny_base_factory: TinyBaseFactory) -> Path:
    """A tiny random Stable Diffusion 2.x: v-prediction, linear projections, two text layers."""
    return tiny_base_factory(prediction_type="v_prediction", use_linear_projection=True, text_layers=2, seed=7)


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion XL of the same sizes."""
    from tests.support.tiny_xl import write_tiny_xl_base

    return write_tiny_xl_base(tmp_path_factory.mktemp("base-xl"))


@pytest.fixture(scope="session")
def tiny_xl_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v-prediction on a schedule of zero terminal SNR."""
    from tests.support.tiny_xl import ZERO_SNR, write_tiny_xl_base

    return write_tiny_xl_base(tmp_path_factory.mktemp("base-xl-v"), scheduler_config=ZERO_SNR, seed=3)


def write_tiny_base(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    use_linear_projection: bool = False,
    text_layers: int = 1,
    in_channels: int = 4,
    scheduler_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    seed: int = 0,
) -> Path:
    """Write all parts of a pipeline and its model_index.json; the same seed gives the same weights."""
    # Not at the top: the process that only hands tests to pytest-xdist's workers need not wait for these.
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            use_linear_projection=use_linear_projection,
        )
        vae = AutoencoderKL(
            sample_size=16,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
        write_tiny_tokenizer(folder / "tokenizer")
        vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=text_layers,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=vocabulary["<|startoftext|>"],
                eos_token_id=vocabulary["<|endoftext|>"],
                pad_token_id=vocabulary["<|endoftext|>"],
            )
        )
    for name, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        if dtype != torch.float32:
            module.to(dtype)
        module.save_pretrained(folder / name, variant=variant)
    config = {
        **STABLE_DIFFUSION_SCHEDULER,
        "prediction_type": prediction_type,
        **(scheduler_config if scheduler_config is not None else {}),
    }
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
    write_model_index(folder, config["_class_name"])
    return folder


def write_model_index(folder: Path, scheduler_class: str) -> None:
    """The model_index.json by which a stock pipeline finds the parts."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of GPT-2's and CLIP's byte-level BPE, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + position) for position, byte in enumerate(others)
    }
    return [stand_in[byte] for byte in range(256)]


def write_tiny_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer in the release layout: every byte, every byte at a word's end, a few merges."""
    folder.mkdir(parents=True)
    letters = byte_alphabet()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m.split()) for m in TINY_MERGES)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(TINY_MERGES) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )
