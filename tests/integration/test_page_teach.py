"""Teaching on the page, and the view of runs, in a real browser before the real ingress and a real store."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Page, expect

from cat_cluster.runs.progress import RunProgress, timestamp
from cat_cluster.runs.run import Run
from cat_cluster.runs.services import SERVICES, GroupRecord, PlacedAdapter, ServiceRecord
from cat_cluster.store import ObjectStore
from tests.support.browser_page import OpenPage
from tests.support.ingress_server import Shop, furnish

VIEWS = ("#/teach", "#/runs")


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """cup and mug, both taught with sks."""
    return furnish(tiny_base_folder, tmp_path_factory.mktemp("shop"))


def noise(seed: int, width: int, height: int) -> bytes:
    """A PNG that no other has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, "png")
    return kept.getvalue()


def photo(name: str, seed: int, height: int = 40) -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": noise(seed, 40, height)}


def text(name: str, words: str) -> FilePayload:
    return {"name": name, "mimeType": "text/plain", "buffer": words.encode()}


def choose(page: Page, *files: FilePayload) -> None:
    page.get_by_label("Drop photos here, or choose them").set_input_files(list(files))


def teach(page: Page, noun: str, count: int = 3) -> str:
    """Teach a thing with the page's own proposals; returns the run's id."""
    choose(page, *(photo(f"{number}.png", number) for number in range(count)))
    page.get_by_label("Class noun").fill(noun)
    page.get_by_label("Class noun").press("Tab")
    page.get_by_role("button", name="Teach it").click()
    page.wait_for_url(re.compile(r"#/runs/run-[0-9a-f]{12}$"))
    return page.url.rpartition("/")[2]


def moved(store: ObjectStore, run_id: str, **changes: Any) -> RunProgress:
    """The run's record as a training service would write it next, of its one adapter."""
    run = Run(store, run_id)
    progress = run.progress()
    own = {name: changes.pop(name) for name in list(changes) if name in ("losses", "step", "reason", "metrics")}
    phase = changes.pop("phase")
    progress = progress.with_adapter(progress.adapters[0].id, state=phase, **own).changed(**changes)
    run.write_progress(progress)
    return progress


def test_photos_are_shown_as_they_are_cropped_and_captions_are_checked(open_page: OpenPage, shop: Shop) -> None:
    page = open_page().open("#/teach")
    start = page.get_by_role("button", name="Teach it")
    expect(start).to_be_disabled()
    expect(page.get_by_label("Token", exact=True)).to_have_value("zwx")  # sks is the cup's and the mug's
    choose(
        page,
        photo("a.png", 1),
        photo("tall.png", 2, height=80),
        text("a.txt", "a photo of a red cup"),
        text("b.txt", "x"),
    )
    expect(page.locator("#photo-list li")).to_have_count(2)
    expect(page.locator("#photo-notes")).to_contain_text("b.txt is the caption of no photo")
    expect(page.locator("#crop-note")).to_contain_text("more than a third is cut off")
    page.get_by_label("Class noun").fill("cup")
    page.get_by_label("Class noun").press("Tab")
    expect(page.get_by_label("Name", exact=True)).to_have_value("my-cup")
    caption = page.get_by_label("Caption of a.png")
    expect(caption).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Caption of tall.png")).to_have_attribute("placeholder", "a photo of a zwx cup")
    before = shop.registry.store.list("files/")
    start.click()
    expect(page.locator("#teach-error")).to_contain_text("The caption of a.png lacks the token zwx")
    expect(caption).to_be_focused()
    assert shop.registry.store.list("files/") == before

    caption.fill("a photo of a red zwx cup")
    page.get_by_role("button", name="More").click()
    page.get_by_label("Keep each photo's shape").check()
    expect(page.locator("#crop-note")).to_be_empty()
    page.get_by_label("Training steps").fill("24")
    start.click()
    page.wait_for_url(re.compile(r"#/runs/run-[0-9a-f]{12}$"))
    run = Run(shop.registry.store, page.url.rpartition("/")[2])
    adapter = run.read_spec().resolved()[0]
    assert (adapter.id, adapter.training.steps, adapter.training.aspect_buckets) == ("my-cup", 24, True)
    assert (adapter.concepts[0].token, adapter.concepts[0].class_noun) == ("zwx", "cup")
    assert run.read_spec().monitoring.samples_every == 3
    expect(page.locator(".run-note")).to_contain_text("It waits for its turn")


def test_a_run_is_watched_from_its_first_step_to_its_pictures(open_page: OpenPage, shop: Shop) -> None:
    page = open_page().open("#/teach")
    store = shop.registry.store
    run_id = teach(page, "boat")
    for step, identity in ((10, 0.4), (20, 0.3)):
        moved(
            store,
            run_id,
            phase="training",
            state="running",
            step=step,
            losses={"zwx": {"identity": identity, "cat": 0.1}},
        )
        expect(page.locator(".taught")).to_contain_text(f"{step} of 300 steps", timeout=15_000)
        store.put(f"runs/{run_id}/samples/my-boat/{step:08d}.png", noise(step, 120, 40))
    expect(page.get_by_role("img", name="Identity loss 0.300, CAT loss 0.100 at step 20")).to_be_visible()
    grid = page.get_by_role("img", name="Base, without token, with token, at step 20")
    expect(grid).to_be_visible(timeout=15_000)
    assert grid.evaluate("image => image.decode().then(() => image.naturalWidth)") == 120
    page.get_by_role("button", name="step 10").click()
    expect(page.get_by_role("img", name="Base, without token, with token, at step 10")).to_be_visible()

    scores = {"kps": 0.31, "base_drift": 0.05, "identity_gain": 0.2}
    moved(store, run_id, phase="published", state="done", step=300, metrics=scores)
    expect(page.locator(".scores")).to_contain_text("0.310", timeout=15_000)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_role("link", name="Try it")).to_have_attribute("href", "#/compare/my-boat")


def test_the_list_says_why_a_run_failed_and_stop_asks_for_it(open_page: OpenPage, shop: Shop) -> None:
    page = open_page().open("#/teach")
    stopped = teach(page, "car")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".run-note")).to_contain_text("Stopped", timeout=15_000)
    page.goto(page.url.partition("#")[0] + "#/teach")
    failed = teach(page, "star", count=4)
    moved(shop.registry.store, failed, phase="failed", state="failed", reason="a gradient is not finite")
    page.get_by_role("link", name="Runs", exact=True).click()
    row = page.locator(".run", has_text="my-star")
    expect(row).to_contain_text("Failed")
    expect(row).to_contain_text("a gradient is not finite")
    expect(page.locator(".run", has_text="my-car")).to_contain_text("Stopped")
    row.get_by_role("link").click()
    expect(page.locator(".taught")).to_contain_text("a gradient is not finite")
    assert {stopped, failed} <= {key.split("/")[1] for key in shop.registry.store.list("runs/")}


def test_the_slots_of_each_service_say_who_trains_with_whom(open_page: OpenPage, shop: Shop) -> None:
    page, store = open_page().open("#/runs"), shop.registry.store
    expect(page.locator("#services")).to_contain_text("No training service works for this storage")
    page.goto(page.url.partition("#")[0] + "#/teach")
    run_id = teach(page, "kite")
    own = PlacedAdapter(run_id=run_id, adapter="my-kite", steps=300)
    other = PlacedAdapter(run_id="run-00000000000a", adapter="secret", steps=300)
    busy = GroupRecord(number=0, slots=4, base="pocket", resolution=64, adapters=(own, other))
    idle = GroupRecord(number=1, slots=0)

    def tell(**changes: Any) -> None:
        told = ServiceRecord(name="night", host="gpu-7", started=timestamp(), updated=timestamp(), workers=1, **changes)
        store.put(f"{SERVICES}night.json", told.model_dump_json().encode())

    tell(groups=(busy, idle), waiting=3)
    page.get_by_role("link", name="Runs", exact=True).click()
    service = page.get_by_role("region", name="Training service night")
    expect(service).to_contain_text("2 of 4 slots taken, 3 adapters wait, 0 being measured")
    expect(service).to_contain_text("Group 0 (pocket, 64 px): share each call of the U-Net")
    expect(service).to_contain_text("Group 1: waits for adapters")
    expect(service.locator(".slots li")).to_have_text(["my-kite", "secret", "free", "free"])  # without keys all is seen
    service.get_by_role("link", name="my-kite").click()
    page.wait_for_url(re.compile(f"#/runs/{run_id}$"))
    tell(measuring=(own,))
    page.get_by_role("link", name="Runs", exact=True).click()
    expect(service).to_contain_text("Trained, and being measured")
    store.delete(f"{SERVICES}night.json")


def test_it_works_by_keyboard_and_on_a_small_screen(open_page: OpenPage, shop: Shop) -> None:
    page = open_page().open("#/teach")
    page.set_viewport_size({"width": 360, "height": 740})
    choose(page, photo("a-photo-with-quite-a-long-name-from-a-camera.png", 1), photo("b.png", 2))
    page.get_by_label("Class noun").focus()
    page.keyboard.type("tree")
    page.keyboard.press("Enter")
    expect(page.locator("#teach-error")).to_be_hidden()
    page.wait_for_url(re.compile(r"#/runs/run-"))
    for route in (*VIEWS, f"#/{page.url.partition('#/')[2]}"):
        page.goto(page.url.partition("#")[0] + route)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, route


def test_what_the_service_refuses_is_said_in_its_words(open_page: OpenPage) -> None:
    watched = open_page()
    watched.allowed = {400}
    page = watched.open("#/teach")
    choose(page, {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator(".unseen")).to_be_visible()
    page.get_by_label("Class noun").fill("cup")
    page.get_by_role("button", name="Teach it").click()
    expect(page.locator("#teach-error")).to_contain_text("a.png")
    expect(page.locator("#photo-list li")).to_have_count(1)


def test_the_zip_is_one_that_others_read(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page().open("#/teach")
    sent = page.evaluate(
        "import('/page/zip.js')"
        ".then(({ zipped }) => zipped([['0.png', new Blob(['photo'])], ['ö.txt', new Blob(['a cup'])]]))"
        ".then((blob) => blob.arrayBuffer()).then((buffer) => [...new Uint8Array(buffer)])"
    )
    with zipfile.ZipFile(io.BytesIO(bytes(sent))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {"0.png": b"photo", "ö.txt": b"a cup"}
