"""Several adapters on the page: the base, the stack and each alone, in a real browser before the real service."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from cat_cluster.models.base_model import load_base_model
from tests.support.browser_page import DRAWN_MS, OpenPage, draw, picture
from tests.support.ingress_server import PATH, Live, Shop, furnish, publish, serving
from tests.support.services import LEVELS

MOST_STEPS = 800  # far from done when the test has stopped it
OTHERS = {"tea-fish": ("zwx", "fish"), "dusk-car": ("vkt", "car")}  # and what each is taught
TOGETHER = "a picture of a sks cup and a zwx fish in the snow"


def furnished(base_folder: Path, storage: Path, **options: Any) -> Shop:
    """cup, mug, tea-fish and dusk-car, each of rank 2; cup and mug have the same token."""
    shop = furnish(base_folder, storage, max_steps=MOST_STEPS, **options)
    base = load_base_model(str(base_folder))
    for seed, (adapter_id, taught) in enumerate(OTHERS.items(), start=20):
        publish(shop.registry, base.unet, base.fingerprint, base.name, adapter_id=adapter_id, seed=seed, concept=taught)
    return shop


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return furnished(tiny_base_folder, tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def strict(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service whose images have at most two adapters, of rank 3 together, and whose mug is quarantined."""
    shop = furnished(tiny_base_folder, tmp_path_factory.mktemp("strict"), max_stack=2, max_rank=3)
    shop.registry.quarantine("mug", shop.mug.revision, "it drew cats")
    with serving(shop) as live:
        yield live


def requests_of(page: Page) -> list[dict[str, Any]]:
    """The bodies of the images that the page asks for, as they are sent."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if PATH in request.url else None)
    return sent


def combobox(page: Page, place: int) -> Locator:
    return page.get_by_role("combobox", name=f"Adapter {place}", exact=True)


def pixels(png: bytes) -> NDArray[np.int16]:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_draws_the_base_the_stack_and_each_alone(open_page: OpenPage, live: Live) -> None:
    page = open_page().open("#/compare/cup")
    sent = requests_of(page)
    page.get_by_role("button", name="Add an adapter").click()
    expect(combobox(page, 2)).to_be_focused()
    combobox(page, 2).click()
    expect(page.get_by_role("option")).to_have_count(3)  # not the cup once more
    page.get_by_role("option", name="tea-fish").click()
    expect(page.get_by_label("Prompt, with the tokens")).to_have_value(TOGETHER)
    # Small ones: random adapters at full strength enlarge the rounding that depends on what else is in a U-Net call.
    page.get_by_label("Strength of cup").fill("0.3")
    page.get_by_label("Strength of tea-fish").fill("0.2")
    page.get_by_role("button", name="More").click()
    page.get_by_label("Negative prompt").fill(" red, blurred ")
    draw(page, seed=7, steps=5)
    titles = ["Base", "Stack", "cup alone", "tea-fish alone"]
    for title in titles:
        card = page.get_by_role("article", name=title, exact=True)
        expect(card).to_have_attribute("data-state", "done", timeout=DRAWN_MS)
    expect(page.locator("#announce")).to_have_text("All 4 pictures are done.")
    assert page.locator(".picture h2").all_text_contents() == titles
    assert page.locator(".picture .badge").count() == 3  # the base has no drift

    cup, fish = {"model": "cup", "strength": 0.3}, {"model": "tea-fish", "strength": 0.2}
    named: list[dict[str, Any]] = [{"model": sent[0]["model"]}, {"adapters": [cup, fish]}, cup, fish]
    settings = {"seed": 7, "num_inference_steps": 5, "guidance_scale": 4, "sampler": "ddim"}
    common = {"prompt": TOGETHER, "negative_prompt": "red, blurred", **settings}
    assert len(sent) == len(named), "a picture that nobody asked for"
    seen = []
    with live.http() as http:
        for request, fields, title in zip(sent, named, titles, strict=True):
            assert {**fields, **common}.items() <= request.items()
            assert ("adapters" in request) != ("model" in request)
            card = page.get_by_role("article", name=title, exact=True)
            with page.expect_download() as saved:
                card.get_by_role("link", name="Download PNG").click()
            seen.append(pixels(saved.value.path().read_bytes()))
            answer = http.post(PATH, json={**fields, **common}).json()
            assert np.abs(seen[-1] - pixels(base64.b64decode(answer["data"][0]["b64_json"]))).max() <= LEVELS
            expect(card.locator("code")).to_have_text(answer["model"])
    assert min(np.abs(one - other).max() for one, other in combinations(seen, 2)) > 10 * LEVELS
    assert [card.locator("mark").all_text_contents() for card in page.get_by_role("article").all()] == [
        [],
        ["sks", "zwx"],
        ["sks"],
        ["zwx"],
    ]


def test_the_address_names_the_adapters(open_page: OpenPage) -> None:
    page = open_page().open("#/compare/cup@stable:0.5+tea-fish")
    expect(combobox(page, 1)).to_have_value("cup")
    expect(combobox(page, 2)).to_have_value("tea-fish")
    expect(page.get_by_label("Strength of cup")).to_have_value("0.5")
    page.get_by_role("button", name="More").click()
    expect(page.get_by_label("Revision of cup")).to_have_value("stable")
    page.get_by_label("Strength of tea-fish").fill("1.5")
    page.get_by_label("Revision of cup").select_option("")
    assert page.url.endswith("#/compare/cup:0.5+tea-fish:1.5")
    page.get_by_role("link", name="Adapters", exact=True).click()
    expect(page.locator(".adapter")).to_have_count(4)
    page.go_back()
    expect(page.get_by_label("Strength of tea-fish")).to_have_value("1.5")

    page = open_page().open("#/compare/cup@gone+nothing")
    errors = page.locator(".member .field-error")
    expect(errors.first).to_have_text("cup has no revision or alias gone any more; latest is chosen.")
    expect(errors.last).to_have_text("There is no adapter nothing in this registry; choose another.")
    page.locator("#draw").click()
    told = page.locator("#draw-error")
    expect(told).to_have_text("Adapter 2: there is no adapter nothing in this registry; choose one, or remove it.")
    expect(combobox(page, 2)).to_be_focused()
    expect(errors.last).to_have_text("There is no adapter nothing in this registry; choose another.")
    combobox(page, 2).fill("fish")
    combobox(page, 2).press("Enter")
    expect(errors.last).to_be_hidden()


def test_a_stack_that_is_too_large_is_refused_at_its_adapters_and_the_rest_is_drawn(
    open_page: OpenPage, strict: Live
) -> None:
    watched = open_page(url=strict.url)
    watched.allowed |= {400, 422}
    page = watched.open("#/compare/cup+tea-fish")
    draw(page, seed=7, steps=5)
    expect(page.locator("#announce")).to_have_text("3 of 4 pictures are done.", timeout=DRAWN_MS)
    reason = re.compile(r"^the stack has rank 4 in all and this service takes up to 3: .* cup 2, tea-fish 2$")
    expect(picture(page, "stack").get_by_role("definition")).to_have_text(reason)
    expect(page.locator("#adapters-error")).to_have_text(reason)
    expect(page.locator("#draw-error")).to_be_hidden()
    for card in (picture(page, "base"), *picture(page, "alone").all()):
        expect(card).to_have_attribute("data-state", "done")
    expect(page.get_by_role("button", name="At most 2 adapters")).to_be_disabled()
    page.get_by_role("button", name="Remove tea-fish").click()
    expect(page.locator("#adapters-error")).to_be_hidden()
    expect(page.get_by_role("button", name="Add an adapter")).to_be_focused()

    page = watched.open("#/compare/cup+tea-fish+dusk-car")  # the same document
    expect(combobox(page, 3)).to_have_value("dusk-car")
    draw(page, seed=7, steps=5)
    expect(page.locator("#announce")).to_have_text("4 of 5 pictures are done.", timeout=DRAWN_MS)
    expect(page.locator("#adapters-error")).to_contain_text("3 adapters are named and an image has up to 2 here")


def test_what_is_wrong_with_one_adapter_is_said_at_that_one(open_page: OpenPage, strict: Live) -> None:
    watched = open_page(url=strict.url)
    watched.allowed.add(409)
    page = watched.open("#/compare/cup+mug")
    draw(page, seed=7, steps=5)
    expect(page.locator("#announce")).to_have_text("2 of 4 pictures are done.", timeout=DRAWN_MS)
    expect(page.locator('.picture[data-adapter="cup"]')).to_have_attribute("data-state", "done")
    expect(page.locator('.picture[data-adapter="mug"]')).to_contain_text("it drew cats")
    expect(picture(page, "stack")).to_contain_text("it drew cats")
    assert combobox(page, 1).get_attribute("aria-invalid") == "false"
    assert combobox(page, 2).get_attribute("aria-invalid") == "true"
    expect(combobox(page, 2)).to_have_accessible_description(re.compile("^mug@r-.*it drew cats"))
    expect(page.locator("#draw-error")).to_be_hidden()
    combobox(page, 2).fill("fish")
    combobox(page, 2).press("ArrowDown")
    combobox(page, 2).press("Enter")
    expect(combobox(page, 2)).to_have_value("tea-fish")
    expect(page.locator(".field-error").filter(visible=True)).to_have_count(0)


def test_stop_cancels_all(open_page: OpenPage, live: Live) -> None:
    page = open_page().open("#/compare/cup+mug+tea-fish+dusk-car")
    sent = requests_of(page)
    draw(page, seed=1, steps=MOST_STEPS)
    drawing = page.locator(".status").filter(has_text=re.compile("step .* of 800"))
    expect(drawing).to_have_count(5, timeout=DRAWN_MS)
    expect(page.locator("#engine-text")).to_contain_text("10 of 16 rows in use", timeout=DRAWN_MS)  # it may still ask
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#announce")).to_have_text("Stopped. 0 of 6 pictures are done.")
    live.await_idle()
    assert len(sent) == 5, "the sixth picture waited, and was not asked for any more"
    assert all(state != "done" for _, state, _ in page.evaluate("window.seen"))


def test_works_by_keyboard_and_shows_again(open_page: OpenPage) -> None:
    page = open_page().open("#/compare/cup")
    only = page.get_by_role("combobox", name="Adapter", exact=True)
    expect(only).to_have_value("cup")
    only.focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Add an adapter")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("fish")
    page.keyboard.press("Enter")
    expect(combobox(page, 2)).to_have_value("tea-fish")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Strength of tea-fish")).to_be_focused()
    page.keyboard.type("0.7")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".past")).to_have_count(1, timeout=DRAWN_MS)
    page.get_by_label("Strength of tea-fish").focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Remove tea-fish")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Add an adapter")).to_be_focused()
    expect(only).to_have_value("cup")
    expect(page.get_by_label("Prompt, with the token")).to_have_value("a picture of a sks cup in the snow")
    assert page.url.endswith("#/compare/cup")
    draw(page, seed=8, steps=3)
    expect(page.locator(".past")).to_have_count(2, timeout=DRAWN_MS)
    expect(page.locator(".picture")).to_have_count(3)

    page.get_by_role("button", name=re.compile(r"cup \+ tea-fish, seed 7$")).click()
    expect(page.locator(".picture")).to_have_count(4)
    expect(page.get_by_label("Strength of tea-fish")).to_have_value("0.7")
    expect(page.get_by_label("Prompt, with the tokens")).to_have_value(TOGETHER)
    assert page.url.endswith("#/compare/cup+tea-fish:0.7")


def test_says_which_tokens_a_prompt_lacks_and_keeps_words_of_ones_own(open_page: OpenPage) -> None:
    page = open_page().open("#/compare/cup+tea-fish")
    page.get_by_label("Prompt, with the tokens").fill("my sks cup, far away")
    hint = page.locator("#prompt-hint")
    expect(hint).to_have_text("Not in this prompt, and so not drawn: zwx (tea-fish).")
    combobox(page, 1).fill("dusk")
    combobox(page, 1).press("Enter")
    expect(page.get_by_label("Prompt, with the tokens")).to_have_value("my vkt car, far away")
    page.get_by_label("Prompt, with the tokens").fill("my VKT, car with a zwx fish")
    expect(hint).to_have_text("All pictures have this prompt.")


def test_a_small_screen_scrolls_one_way(open_page: OpenPage) -> None:
    page = open_page(360, 740, reduced_motion="reduce").open("#/compare/cup+tea-fish:0.7+dusk-car")
    draw(page, seed=3, steps=2)
    expect(page.locator(".past")).to_have_count(1, timeout=DRAWN_MS)
    expect(page.locator(".picture")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Remove cup").scroll_into_view_if_needed()
    box = page.get_by_role("button", name="Remove cup").bounding_box()
    assert box is not None
    assert box["width"] >= 24 <= box["height"]  # WCAG 2.2, target size
    assert box["x"] + box["width"] <= 360
