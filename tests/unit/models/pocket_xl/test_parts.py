from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

from cat_cluster.errors import BaseModelError
from cat_cluster.models.pocket import weights_path
from cat_cluster.models.pocket_xl import world
from cat_cluster.models.pocket_xl.captions import scene_caption
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining import albums, package, text, unet
from cat_cluster.models.pocket_xl.pretraining.classifier import targets
from cat_cluster.models.pocket_xl.pretraining.pretrain import make_tokenizers
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
from cat_cluster.models.pocket_xl.pretraining.vae import other_colours, train_vae
from cat_cluster.models.pretraining.stage import Stage
from cat_cluster.models.pretraining.vae import encode_frames, new_vae


def test_the_vae_goes_on_from_that_of_pocket_sd(emojis: tuple[Emoji, ...], tmp_path: Path) -> None:
    recipe = replace(Recipe.tiny(), vae_steps=1, vae_rate=0.0)
    stage = Stage("vae", tmp_path / "vae.pt", "cpu", 0, lambda _: None)
    trained, _ = train_vae(recipe, emojis, stage)
    started = AutoencoderKL.from_pretrained(weights_path() / "vae")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), started.parameters(), strict=True))


@pytest.fixture(scope="module")
def album(emojis: tuple[Emoji, ...]) -> albums.Album:
    return albums.make_album(emojis, 60, 3)


def test_a_batch_has_frames_of_one_shape_that_come_as_often_as_they_are(album: albums.Album) -> None:
    shapes = [tuple(album.whole(np.random.default_rng(seed), 4).shape) for seed in range(300)]
    assert {shape[:2] for shape in shapes} == {(4, 3)}
    for shape, rows in album.rows.items():
        share = sum(found[2:] == shape for found in shapes) / len(shapes)
        assert share == pytest.approx(len(rows) / len(album.scenes), abs=0.08)


def test_crops_are_windows_of_frames_at_the_things(album: albums.Album) -> None:
    crops = album.crops(np.random.default_rng(0), 8, 32)
    assert crops.shape == (8, 3, 32, 32)
    for crop in crops:
        windows = (frame.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4) for frame in album.frames)
        assert any(bool((found == crop).all((-1, -2, -3)).any()) for found in windows)


def test_other_colours_change_half_of_the_rows_and_no_shape(album: albums.Album) -> None:
    frames = album.whole(np.random.default_rng(1), 40)
    changed = other_colours(frames, np.random.default_rng(2))
    assert changed.shape == frames.shape
    assert changed.dtype == torch.uint8
    same = sum(torch.equal(a, b) for a, b in zip(frames, changed, strict=True))
    assert 8 <= same <= 32
    assert torch.equal(frames, album.whole(np.random.default_rng(1), 40))


def test_text_is_encoded_as_the_stock_pipeline_does(emojis: tuple[Emoji, ...], tmp_path: Path) -> None:
    recipe = Recipe.tiny()
    tokenizers = make_tokenizers(recipe, emojis, tmp_path, 0)
    encoders = text.text_encoders(text.new_towers(recipe, tokenizers[0]))
    pipeline = StableDiffusionXLPipeline(
        vae=new_vae((8, 8, 8), 8, 64),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.new_unet(recipe),
        scheduler=unet.new_scheduler(),
        add_watermarker=False,
    )
    prompts = ["", "a photo of a sks dog beside a truck"]
    states, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    found_states, found_pooled = text.encode_texts(encoders, tokenizers, prompts)
    torch.testing.assert_close(found_states, states)
    torch.testing.assert_close(found_pooled, pooled)


def test_the_pipelines_encoders_are_the_towers_text_halves(emojis: tuple[Emoji, ...], tmp_path: Path) -> None:
    recipe = Recipe.tiny()
    tokenizers = make_tokenizers(recipe, emojis, tmp_path, 0)
    towers = text.new_towers(recipe, tokenizers[0]).eval()
    text.save_towers(towers, tmp_path / "clip")
    first, second = text.text_encoders(text.load_towers(tmp_path / "clip"))
    ids = torch.tensor([tokenizers[0]("a lion", padding="max_length").input_ids])
    with torch.no_grad():
        wanted = towers.judge.text_projection(towers.judge.text_model(input_ids=ids).pooler_output)
        torch.testing.assert_close(second(ids).text_embeds, wanted)
        states = towers.first(ids, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(first(ids, output_hidden_states=True).hidden_states[-2], states)


def test_half_of_a_batch_comes_in_fours_with_a_thing_in_common(album: albums.Album) -> None:
    shown = text._shown_in(album)
    rows = text.batch_rows(shown, album, 16, np.random.default_rng(0))
    assert rows.shape == (16,)
    for four in (rows[:4], rows[4:8]):
        things = [{thing.index for thing in album.scenes[row].things} for row in four]
        assert set.intersection(*things)


def test_the_schedule_is_that_of_stable_diffusion_xl() -> None:
    config = dict(EulerDiscreteScheduler.from_config(dict(unet.new_scheduler().config)).config)
    published = {  # scheduler/scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    }
    assert {name: config[name] for name in published} == published


def test_kept_latents_are_those_of_each_scene_and_a_lost_file_is_made_again(
    emojis: tuple[Emoji, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet, "_SHARD", 7)
    vae = new_vae((8, 8, 8), 8, 64).eval()
    scenes = albums.random_scenes(emojis, 20, 1)
    kept = unet.kept_latents(vae, scenes, emojis, tmp_path)
    for scene, latent in zip(scenes, kept, strict=True):
        wanted = encode_frames(vae, albums.frame_of(scene, emojis)[None])[0] * vae.config.scaling_factor
        torch.testing.assert_close(latent.float(), wanted, rtol=1e-2, atol=1e-3)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    lost = sorted(times)[1]
    lost.unlink()
    again = unet.kept_latents(vae, scenes, emojis, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {lost}


def test_some_rows_have_no_caption_and_half_of_those_are_zeros(emojis: tuple[Emoji, ...], tmp_path: Path) -> None:
    recipe = Recipe.tiny()
    tokenizers = make_tokenizers(recipe, emojis, tmp_path, 0)
    encoders = text.text_encoders(text.new_towers(recipe, tokenizers[0]))
    captions = ["a truck"] * 600
    states, pooled = unet._with_gaps(encoders, tokenizers, captions, np.random.default_rng(0))
    zeros = (states == 0).all((1, 2))
    assert torch.equal(zeros, (pooled == 0).all(1))
    empty, _ = text.encode_texts(encoders, tokenizers, [""])
    none = torch.isclose(states, empty, atol=1e-5).all(2).all(1)
    assert zeros.float().mean() == pytest.approx(0.05, abs=0.025)
    assert none.float().mean() == pytest.approx(0.05, abs=0.025)


def test_the_target_of_a_scene_is_its_things_in_equal_parts(album: albums.Album) -> None:
    rows = np.arange(len(album.scenes))
    things, places = targets(album, rows, 8)
    torch.testing.assert_close(things.sum(1), torch.ones(len(rows)))
    for row, scene in enumerate(album.scenes):
        assert set(things[row].nonzero()[:, 0].tolist()) == {thing.index for thing in scene.things}
        assert world.PLACES[int(places[row])] == scene.place


def test_rare_words_of_the_world_are_spelt_in_pieces(emojis: tuple[Emoji, ...], tmp_path: Path) -> None:
    first, _ = make_tokenizers(Recipe.tiny(), emojis, tmp_path, 0)
    assert first.tokenize("a photo") == ["a</w>", "photo</w>"]
    assert len(first.tokenize("divoire")) > 1
    longest = max(
        len(first(scene_caption(scene, emojis, np.random.default_rng(0), full=True)).input_ids)
        for scene in albums.random_scenes(emojis, 50, 0)
    )
    assert longest > 8


def _archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in ("package/emoji.json", "package/img/google/64/a.png", "package/img/google/sheets-256/a.png"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


def test_an_archive_is_unpacked_if_it_is_the_released_one(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "emoji.tgz")
    with pytest.raises(BaseModelError, match=r"is not emoji-datasource-google@16\.0\.0 as released \(sha512-"):
        package.unpack(archive, tmp_path, "AAAA")
    assert not (tmp_path / "package").exists()
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    package.unpack(archive, tmp_path, digest)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"emoji.tgz", "package/emoji.json", "package/img/google/64/a.png"}


def test_without_npm_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"npm is not installed.*--emojis"):
        package.fetch_emojis(tmp_path / "emojis")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error 404 not found' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(BaseModelError, match=r"failed \(npm error 404 not found\).*registry.*--emojis"):
        package.fetch_emojis(tmp_path / "emojis")


def test_the_unet_is_told_the_size_crop_and_text_of_each_picture(
    emojis: tuple[Emoji, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(Recipe.tiny(), unet_scenes=200, unet_steps=6, unet_batch=8)
    tokenizers = make_tokenizers(recipe, emojis, tmp_path, 0)
    encoders = text.text_encoders(text.new_towers(recipe, tokenizers[0]))
    vae = new_vae((8, 8, 8), 8, 64).eval()
    scenes = albums.random_scenes(emojis, recipe.unet_scenes, 2)  # those of a stage with seed 0
    told: list[tuple[torch.Tensor, torch.Tensor]] = []
    asked: list[str] = []

    def full_caption(scene: world.Scene, *_: object) -> str:
        asked.append(scene_caption(scene, emojis, np.random.default_rng(0), full=True))
        return asked[-1]

    def watched(given: Recipe) -> torch.nn.Module:
        model = new_unet(given)
        model.register_forward_pre_hook(
            lambda _, args, named: told.append((args[0], named["added_cond_kwargs"]["time_ids"])), with_kwargs=True
        )
        return model

    new_unet = unet.new_unet
    monkeypatch.setattr(unet, "new_unet", watched)
    monkeypatch.setattr(unet, "scene_caption", full_caption)
    stage = Stage("unet", tmp_path / "unet.pt", "cpu", 0, lambda _: None)
    unet.train_unet(recipe, emojis, vae, encoders, tokenizers, stage)
    captions = {
        (*scene.time_ids, scene_caption(scene, emojis, np.random.default_rng(0), full=True)) for scene in scenes
    }
    assert len(told) == 6
    assert len(asked) == 6 * 8
    for batch, (noisy, time_ids) in enumerate(told):
        assert {tuple(int(side) * 4 for side in noisy.shape[-2:])} == {tuple(map(int, ids[4:])) for ids in time_ids}
        for row, ids in enumerate(time_ids):
            assert (*map(int, ids), asked[batch * 8 + row]) in captions
    assert len({tuple(noisy.shape) for noisy, _ in told}) > 1
