"""Stacks on the command line: drawn together, exported as one file, and refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from cat_cluster.lora.formats import write_adapter
from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from tests.support.services import LEVELS, Pixels, Shop
from tests.support.tiny_jobs import CommandLine, assert_refused

pytestmark = pytest.mark.slow

PROMPT, SEED, STEPS = "a photo of a sks cup", 11, 4


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    storage = tmp_path_factory.mktemp("storage")
    shop = Shop(tiny_base_folder, load_base_model(str(tiny_base_folder)), Registry(LocalStore(storage)))
    for seed, name in enumerate(("cup", "mug"), 1):
        shop.publish(name, seed)
    shop.publish("foreign", 1, base_fingerprint="f" * 64)
    return shop


def drawn(command: CommandLine, shop: Shop, out: Path, *arguments: str, prompt: str = PROMPT) -> Image.Image:
    settings = ("--prompt", prompt, "--seed", str(SEED), "--steps", str(STEPS), "--base", shop.folder, "--out", out)
    finished = command("generate", *settings, "--storage", shop.registry.store.url, *arguments)
    assert finished.code == 0, finished.err
    return Image.open(out)


def levels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.int16)


@pytest.fixture(scope="module")
def stock(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(shop.folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def stock_picture(pipeline: StableDiffusionPipeline) -> Pixels:
    generator = torch.Generator("cpu").manual_seed(SEED)
    return levels(pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=4.0, generator=generator).images[0])


@pytest.fixture(scope="module")
def expected(shop: Shop, stock: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Pixels:
    """Stock diffusers' picture of cup at 0.5 and mug at 0.75."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("cup", "mug"):
        weights = shop.registry.load_weights(shop.registry.resolve(name))
        path = write_adapter(weights, folder / name, "diffusers", adapter_id=name, metadata={})
        stock.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    stock.set_adapters(["cup", "mug"], adapter_weights=[0.5, 0.75])
    picture = stock_picture(stock)
    stock.unload_lora_weights()
    return picture


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (("--adapter", "cup:0.5", "--adapter", "mug@latest:0.75"), PROMPT),
        (("--adapter", "cup", "--adapter", "mug:1.5", "--strength", "0.5"), PROMPT),
        (("--adapter", "cup:0.5"), f"{PROMPT} <lora:mug:0.75>"),
        ((), f"<lora:cup:0.5> {PROMPT} <lora:mug:0.75>"),
    ],
)
def test_several_adapters_are_drawn_as_stock_diffusers_draws_them(
    command: CommandLine, shop: Shop, expected: Pixels, tmp_path: Path, arguments: tuple[str, ...], prompt: str
) -> None:
    image = drawn(command, shop, tmp_path / "a.png", *arguments, prompt=prompt)
    assert np.abs(levels(image) - expected).max() <= LEVELS
    text = image.text  # type: ignore[attr-defined]
    assert text["model"] == "+".join(shop.registry.resolve(name).name for name in ("cup", "mug"))
    assert (text["strength"], text["prompt"]) == ("0.5+0.75", PROMPT)
    single = levels(drawn(command, shop, tmp_path / "b.png", "--adapter", "cup:0.5"))
    assert np.abs(single - expected).max() > 5 * LEVELS


@pytest.mark.parametrize("fmt", ["diffusers", "kohya"])
def test_an_exported_stack_is_one_file_for_stock_diffusers(
    command: CommandLine, shop: Shop, stock: StableDiffusionPipeline, expected: Pixels, tmp_path: Path, fmt: str
) -> None:
    storage = ("--storage", shop.registry.store.url)
    finished = command("adapters", "export", "cup:0.5", "mug:0.75", "--format", fmt, "--out", tmp_path, *storage)
    assert finished.code == 0, finished.err
    [path] = tmp_path.glob("*.safetensors")
    assert path.name == {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "cup+mug.safetensors"}[fmt]
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key or "lora_down" in key}  # noqa: SIM118
    names = [shop.registry.resolve(name) for name in ("cup", "mug")]
    assert told["adapter"] == "+".join(manifest.name for manifest in names)
    assert (told["strength"], told["tokens"]) == ("0.5+0.75", "sks")
    assert ranks == {sum(manifest.rank for manifest in names)}
    stock.load_lora_weights(path.parent, weight_name=path.name)
    try:
        assert np.abs(stock_picture(stock) - expected).max() <= LEVELS
    finally:
        stock.unload_lora_weights()


def test_an_exported_adapter_of_full_strength_is_what_was_published(
    command: CommandLine, shop: Shop, tmp_path: Path
) -> None:
    finished = command(
        "adapters", "export", "cup", "--format", "diffusers", "--out", tmp_path, "--storage", shop.registry.store.url
    )
    assert finished.code == 0, finished.err
    manifest = shop.registry.resolve("cup")
    weights, metadata = shop.registry.load_weights(manifest), {
        "adapter": manifest.name, "tokens": "sks", "base_fingerprint": manifest.base_fingerprint,
    }  # fmt: skip
    again = write_adapter(weights, tmp_path / "again", "diffusers", adapter_id="cup", metadata=metadata)
    with safe_open(tmp_path / again.name, "pt") as found, safe_open(again, "pt") as wanted:
        assert found.metadata().items() >= wanted.metadata().items()
        names = list(wanted.keys())
        assert sorted(found.keys()) == sorted(names)
        assert all(torch.equal(found.get_tensor(name), wanted.get_tensor(name)) for name in names)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("cup", "cup@latest"), "cup is named twice"),
        (("cup", "mug:x"), "'mug:x' names no strength behind its ':'"),
        (("cup:nan",), "'cup:nan' names no strength"),
        (("cup", "Not A Name"), "'Not A Name' is not an adapter id"),
        (("cup+mug",), "'cup+mug' names several adapters: name each by itself"),
        (("cup:0.5+mug:0.7",), "names several adapters: name each by itself"),
        (("cup:0.5:0.2",), "'cup:0.5:0.2' has two strengths"),
        (("cup", "nobody"), "nobody"),
        (("cup", "foreign"), "foreign@"),
        (("cup", "mug:3"), "'mug:3' is out of range: a strength is 0 to 2"),
        (("cup:-1",), "'cup:-1' is out of range: a strength is 0 to 2"),
    ],
)
def test_what_cannot_be_a_stack_is_refused(
    command: CommandLine, shop: Shop, tmp_path: Path, names: tuple[str, ...], told: str
) -> None:
    storage = ("--storage", shop.registry.store.url)
    picture = ("--prompt", "a cup", "--steps", "1", "--base", shop.folder, "--out", tmp_path / "a.png")
    options = [word for name in names for word in ("--adapter", name)]
    assert_refused(command("generate", *options, *picture, *storage), told)
    ended = command("adapters", "export", *names, "--format", "peft", "--out", tmp_path / "out", *storage)
    assert_refused(ended, told)
    assert not list(tmp_path.rglob("*.*"))


def test_a_name_in_the_prompt_that_is_no_adapter_is_refused(command: CommandLine, shop: Shop, tmp_path: Path) -> None:
    for tag, told in (("<lora:nobody:1>", "nobody"), ("<lora:My Cup>", "'My Cup'"), ("<lora:cup:a>", "'cup:a'")):
        options = ("--prompt", f"a {tag} cup", "--out", tmp_path / "a.png", "--storage", shop.registry.store.url)
        assert_refused(command("generate", *options), told)


@pytest.mark.parametrize("strength", ["3", "-1"])
def test_a_strength_of_all_adapters_that_the_service_refuses_is_refused(
    command: CommandLine, shop: Shop, tmp_path: Path, strength: str
) -> None:
    options = ("--prompt", PROMPT, "--adapter", "cup", "--out", tmp_path / "a.png", "--base", shop.folder)
    finished = command("generate", *options, "--storage", shop.registry.store.url, "--strength", strength)
    assert_refused(finished, f"--strength {strength} is out of range: a strength is 0 to 2")


def test_what_asks_for_less_of_no_adapter_is_said_to_change_nothing(
    command: CommandLine, tiny_base_folder: Path, tmp_path: Path
) -> None:
    settings = ("--prompt", PROMPT, "--steps", "1", "--base", tiny_base_folder, "--out", tmp_path / "a.png")
    finished = command("generate", *settings, "--strength", "0.5", "--gate")
    assert finished.code == 0, finished.err
    for option in ("--strength", "--gate"):
        assert f"warning: {option} changes nothing: the base model alone has no adapter" in finished.err
    assert "warning" not in command("generate", *settings).err


def test_an_image_that_is_not_finite_is_not_written(command: CommandLine, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    settings = ("--prompt", PROMPT, "--steps", "1", "--base", shop.folder, "--out", out, "--count", "2")
    finished = command("generate", *settings, "--storage", shop.registry.store.url, "--guidance", "1e38")
    assert_refused(finished, "the image is not finite", "lower the strength or the guidance")
    assert not list(tmp_path.iterdir())
