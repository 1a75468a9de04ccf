"""The web page in a real browser, before the real service: no mock but where a failure has to be made."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, Route, expect

from cat_cluster.data.concepts import remove_token
from cat_cluster.evaluation.drift import DriftMonitor
from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import Registry
from cat_cluster.store import open_store
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.http.access import Access
from serve.probes.records import ProbeRecord
from serve.service import Service
from serve.settings import ProbeSettings, ServeSettings
from tests.support.browser_page import DRAWN_MS, OpenPage, draw, picture
from tests.support.ingress_server import Live, Shop, furnish, listening, publish, serving

KEY = "sesame"
KINDS = ("base", "without", "with")
MOST_STEPS = 800  # far from done when the test has stopped it
PROBES = 20
ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
DEMO = Path(os.environ.get("CAT_DEMO_REGISTRY", ROOT / "out" / "demo" / "registry"))
UPDATE = os.environ.get("CAT_UPDATE_SCREENSHOTS") == "1"


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Two adapters, cup and mug, and a history of probes of the cup."""
    shop = furnish(tiny_base_folder, tmp_path_factory.mktemp("shop"), max_steps=MOST_STEPS)
    write_history(shop)
    return shop


def write_history(shop: Shop) -> None:
    """Probe records of the cup's latest revision, one a minute: canonical and live, and an alarm at the end."""
    now, latest = time.time(), shop.cups[1]
    monitor = DriftMonitor((latest.reference or {})["concepts"]["sks"])
    hours: dict[str, list[dict[str, Any]]] = {}
    for i in range(PROBES):
        scores = {"kps": 0.2 + 0.01 * (i % 3), "identity": 0.6, "base_drift": 0.06}
        if i % 2:
            monitor.update(scores)
        else:  # only canonical probes have one
            scores["decoy_drift"] = 0.03
        record = ProbeRecord(
            time=now - 60.0 * (PROBES - i),
            replica="test",
            kind="live" if i % 2 else "canonical",
            verdict="alarm" if i == PROBES - 1 else "ok",
            token="sks",
            scores=scores,
            detectors=monitor.to_json() if i % 2 else None,
        )
        hour = time.strftime("%Y%m%dT%H", time.gmtime(record.time))
        hours.setdefault(hour, []).append(record.model_dump(exclude_none=True))
    for hour, records in hours.items():
        key = f"probes/{latest.adapter_id}/{latest.revision}/{hour}/test.json"
        shop.registry.store.put(key, json.dumps(records).encode())


def expect_done(page: Page) -> None:
    for kind in KINDS:
        expect(picture(page, kind)).to_have_attribute("data-state", "done", timeout=DRAWN_MS)


def test_draws_three_pictures_live(open_page: OpenPage) -> None:
    page = open_page().open("#/compare/cup")
    expect(page.get_by_label("Prompt, with the token")).to_have_value(re.compile("a picture of a sks cup "))
    draw(page, seed=7)
    expect_done(page)
    expect(page.locator("#announce")).to_have_text("All 3 pictures are done.")
    seen = page.evaluate("window.seen")
    for kind in KINDS:
        states = [(state, previews) for name, state, previews in seen if name == kind]
        done = next(i for i, (state, _) in enumerate(states) if state == "done")
        partial = [previews for state, previews in states[:done] if state == "denoising"]
        assert max(partial) >= 3, f"{kind}: no partial pictures before the final one"
        shown = picture(page, kind)
        assert shown.get_by_role("img").evaluate("image => image.naturalWidth") == 16
        expect(shown).to_contain_text("Seed7")
        with page.expect_download() as saved:
            shown.get_by_role("link", name="Download PNG").click()
        assert saved.value.path().read_bytes().startswith(b"\x89PNG")
    expect(picture(page, "with").locator(".prompt mark")).to_have_text("sks")
    expect(picture(page, "without").locator(".prompt")).to_have_text(re.compile("a picture of a cup "))
    expect(picture(page, "with").locator("code")).to_have_text(re.compile(r"cup@r-[0-9a-f]{12}"))

    first = page.locator('.picture[data-kind="with"] img').get_attribute("src")
    page.get_by_role("button", name="Another seed").click()
    assert page.get_by_label("Seed", exact=True).input_value() != "7"
    page.get_by_label("Negative prompt").fill("red")
    draw(page, seed=8, steps=5)
    expect(page.locator(".past")).to_have_count(2, timeout=DRAWN_MS)
    page.get_by_role("button", name=re.compile("seed 7$")).click()
    expect(page.locator('.picture[data-kind="with"] img')).to_have_attribute("src", str(first))
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("60")
    expect(page.get_by_label("Negative prompt")).to_have_value("")


@pytest.mark.parametrize(
    "prompt",
    ["a sks cup in snow", "sks, a cup", "SKS  ,  sks cup", "a <sks> cup, sks", "asks, sksa", "sks", "a\tsks\ncup"],
)
def test_removes_the_token_as_training_does(open_page: OpenPage, prompt: str) -> None:
    page = open_page().open("#/drift")
    removed = page.evaluate(
        "prompt => import('/page/prompts.js').then((module) => module.removeToken(prompt, 'sks'))", prompt
    )
    assert removed == remove_token(prompt, "sks")


def test_stop_cancels(open_page: OpenPage, live: Live) -> None:
    page = open_page().open("#/compare/cup")
    draw(page, seed=1, steps=MOST_STEPS)
    for kind in KINDS:
        expect(picture(page, kind).locator(".status")).to_have_text(re.compile("step .* of 800"), timeout=DRAWN_MS)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#announce")).to_have_text("Stopped. 0 of 3 pictures are done.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    live.await_idle()
    assert all(state != "done" for _, state, _ in page.evaluate("window.seen"))


def test_a_prompt_that_is_typed_before_the_adapters_are_there_stays(open_page: OpenPage) -> None:
    watched = open_page()
    watched.page.route("**/v1/**", lambda route: None)
    page = watched.open("#/compare/cup")
    page.locator("#prompt").fill("my own words, sks, of a cup")
    expect(page.locator("#draw")).to_be_disabled()  # a click would be lost
    watched.page.unroute("**/v1/**")  # lets those go that wait
    expect(page.locator("#prompt-hint")).to_have_text("Without it: my own words, of a cup")
    expect(page.locator("#prompt")).to_have_value("my own words, sks, of a cup")


def test_says_what_is_wrong_and_when_to_try_again(open_page: OpenPage) -> None:
    watched = open_page()
    watched.allowed.add(503)
    page = watched.open("#/compare/cup")
    page.get_by_label("Prompt, with the token").fill("a cup in snow")
    expect(page.locator("#prompt-hint")).to_contain_text("No token in this prompt. Write sks before cup")
    page.locator("#draw").click()
    expect(page.get_by_role("alert")).to_contain_text("none of the adapter's tokens (sks)")

    page.get_by_label("Prompt, with the token").fill("SKS, cup in <b>snow</b>")
    expect(page.locator("#prompt-hint")).to_have_text("Without it: cup in <b>snow</b>")
    body = {"error": {"message": "the service is full: <i>ask again</i>", "type": "server_error", "code": "overloaded"}}
    page.route(
        "**/v1/images/generations", lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=body)
    )
    page.locator("#draw").click()
    alert = page.locator("#draw-error")
    expect(alert).to_contain_text("the service is full: <i>ask again</i>")
    expect(alert).to_contain_text("You can try again now.")
    page.unroute("**/v1/images/generations")
    alert.get_by_role("button", name="Try again").click()
    expect_done(page)
    expect(alert).to_be_hidden()


def test_adapters_that_cannot_be_loaded_now_are_asked_for_again(open_page: OpenPage) -> None:
    watched = open_page()
    watched.allowed.add(503)
    body = {"error": {"message": "the store does not answer", "type": "server_error", "code": "unavailable"}}
    watched.page.route(
        re.compile(r"/v1/adapters\?"), lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=body)
    )
    page = watched.open("#/compare/cup")
    alert = page.locator("#draw-error")
    expect(alert).to_contain_text("the store does not answer")
    expect(alert).to_contain_text("You can try again now.")
    page.unroute(re.compile(r"/v1/adapters\?"))
    alert.get_by_role("button", name="Try again").click()
    draw(page, seed=3, steps=2)
    expect_done(page)


def test_catalogue_and_detail(open_page: OpenPage, shop: Shop) -> None:
    page = open_page().open("#/adapters")
    cards = page.locator(".adapter")
    expect(cards).to_have_count(2)
    expect(cards.first).to_contain_text("cup")
    expect(cards.first).to_contain_text(f"{(shop.cups[1].metrics or {})['kps']:.3f}")
    expect(cards.first).to_contain_text(shop.cups[1].revision)
    expect(cards.first).to_contain_text("stable")
    for image in cards.first.get_by_role("img").all():
        expect(image).to_have_attribute("src", re.compile("^blob:"))
    page.get_by_label("Filter").first.fill("mug")
    expect(cards).to_have_count(1)
    expect(page.locator("#count")).to_have_text("1 of 2 adapters")
    page.get_by_label("Filter").first.fill("")
    page.get_by_label("Sort by").select_option("kps")

    page.get_by_role("link", name="cup", exact=True).click()
    expect(page.get_by_role("heading", level=1, name="cup")).to_be_focused()
    expect(page.get_by_role("img", name=re.compile("^KPS: [0-9.]+, 95% interval [0-9.]+ to"))).to_be_visible()
    revisions = page.locator(".revisions li")
    expect(revisions).to_have_count(2)
    expect(revisions.filter(has_text=shop.cups[0].revision)).to_contain_text("stable")
    expect(page.locator(".snippet").first).to_contain_text(f"{page.url.split('#')[0]}v1/images/generations")
    expect(page.locator(".snippet").last).to_contain_text('model="cup"')
    page.get_by_role("link", name="Draw with it").click()
    expect(page.get_by_role("combobox", name="Adapter")).to_have_value("cup")


def test_shows_the_adapters_of_every_page(open_page: OpenPage) -> None:
    watched = open_page()
    asked: list[str] = []

    def one_a_page(route: Route) -> None:
        asked.append(urlsplit(route.request.url).query)
        route.continue_(url=re.sub(r"limit=\d+", "limit=1", route.request.url))

    watched.page.route(re.compile(r"/v1/adapters\?"), one_a_page)
    page = watched.open("#/adapters")
    expect(page.locator(".adapter")).to_have_count(2)
    expect(page.locator("#count")).to_have_text("2 adapters")
    assert asked == ["limit=500", "limit=500&after=cup"]


def test_drift_chart(open_page: OpenPage) -> None:
    page = open_page().open("#/drift")
    card = page.locator(".drift").filter(has=page.get_by_role("link", name="cup", exact=True))
    for name in (
        "KPS of 20 probes; the last is .*; the reference is",
        "Base drift of 20 probes",
        "Drift with a word never taught of 10 probes; the last is 0.03",
        "The detector's statistic",
    ):
        expect(card.get_by_role("img", name=re.compile(f"^{name}"))).to_be_visible()
    assert card.locator("svg .mark.live").count() > 0
    assert card.locator("svg .mark.alarm").count() > 0
    expect(card).to_contain_text("20 probes, 1 alarm")
    expect(card).to_contain_text("annotate")
    card.get_by_text("The probes as a table").click()
    expect(card.locator("tbody tr")).to_have_count(20)
    silent = page.locator(".silent")
    expect(silent).to_contain_text("Nothing was measured in the last 24 hours")
    expect(silent.get_by_role("link")).to_have_text(["mug"])


def test_an_adapter_without_scores_is_said_to_be_unmeasured(
    open_page: OpenPage, tiny_base_folder: Path, tmp_path: Path
) -> None:
    shop, base = furnish(tiny_base_folder, tmp_path), load_base_model(str(tiny_base_folder))
    plate, jar = (
        publish(shop.registry, base.unet, base.fingerprint, base.name, adapter_id=name, measured=False)
        for name in ("plate", "jar")
    )
    now, reason = time.time(), f"{plate.name} was published unmeasured"
    records = [
        ProbeRecord(time=now - ago, replica="test", kind="canonical", verdict="error", reason=reason)
        for ago in (20.0, 10.0)
    ]
    hour = time.strftime("%Y%m%dT%H", time.gmtime(now))
    document = json.dumps([record.model_dump(exclude_none=True) for record in records])
    shop.registry.store.put(f"probes/plate/{plate.revision}/{hour}/test.json", document.encode())
    told = "This revision was published without being measured"
    with serving(shop) as live:
        watched = open_page(url=live.url)
        page = watched.open("#/drift")
        card = page.locator(".drift").filter(has=page.get_by_role("heading", name="plate", exact=True))
        expect(card).to_contain_text(told)
        expect(card).to_contain_text("cat-cluster evaluate plate")
        expect(card).to_contain_text("Not probed")
        expect(card).not_to_contain_text("alarm")
        expect(page.locator(".chart")).to_have_count(0)
        expect(page.locator(".silent li").filter(has_text="jar")).to_have_text(
            "jar (not measured, so it cannot be probed)"
        )
        expect(page.locator(".silent li").filter(has_text="cup")).to_have_text("cup")
        page.get_by_role("link", name="Adapters", exact=True).click()
        cards = page.locator(".adapter")
        expect(cards.filter(has_text="plate")).to_contain_text("Published without being measured: no scores")
        expect(cards.filter(has_text="mug")).not_to_contain_text("without being measured")
        page.get_by_role("link", name="plate", exact=True).click()
        expect(page.locator(".detail")).to_contain_text(told)
        expect(page.locator(".detail")).to_contain_text("cat-cluster evaluate plate")
        watched.check()
    assert jar.metrics is None


def test_adapters_are_in_the_order_of_their_ids_and_the_shortest_match_is_first(
    open_page: OpenPage, tiny_base_folder: Path, tmp_path: Path
) -> None:
    shop, base = furnish(tiny_base_folder, tmp_path), load_base_model(str(tiny_base_folder))
    for name in ("cup-lora", "a-cup-lora"):
        publish(shop.registry, base.unet, base.fingerprint, base.name, adapter_id=name)
    with serving(shop) as live:
        page = open_page(url=live.url).open("#/compare/mug")
        adapter = page.get_by_role("combobox", name="Adapter")
        expect(adapter).to_have_value("mug")
        adapter.click()
        ids = page.locator(".option-id")
        expect(ids).to_have_text(["a-cup-lora", "cup", "cup-lora", "mug"])
        adapter.fill("cup-l")
        expect(ids).to_have_text(["cup-lora", "a-cup-lora"])
        adapter.fill("cup")
        adapter.press("Enter")
        expect(adapter).to_have_value("cup")


def test_keyboard_alone(open_page: OpenPage) -> None:
    page = open_page().open("#/compare/cup")
    expect(page.get_by_role("combobox", name="Adapter")).to_have_value("cup")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    adapter = page.get_by_role("combobox", name="Adapter")
    expect(adapter).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.type("mu")
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(adapter).to_have_value("mug")
    for _ in range(2):  # another adapter, the prompt
        page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt, with the token")).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect_done(page)
    expect(picture(page, "with").locator("code")).to_have_text(re.compile("mug@"))

    page.get_by_role("link", name="Adapters", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1, name="Adapters")).to_be_focused()
    expect(page.locator(".adapter")).to_have_count(2)
    for _ in range(4):  # filter, sort, what the metrics mean, the first card
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1, name="cup")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_screen_scrolls_one_way(open_page: OpenPage, scheme: str) -> None:
    watched = open_page(360, 740, color_scheme=scheme, reduced_motion="reduce")
    page = watched.open("#/compare/cup")
    draw(page, seed=3, steps=2)
    expect_done(page)
    for route, ready in (
        ("#/compare/cup", ".past"),
        ("#/adapters", ".adapter"),
        ("#/adapters/cup", ".snippet"),
        ("#/drift", ".chart svg"),
    ):
        page.evaluate("route => { location.hash = route; }", route)
        expect(page.locator(ready).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, route


def test_asks_for_a_key(open_page: OpenPage, shop: Shop) -> None:
    with serving(shop, Access(shop.settings, api_keys=[KEY])) as guarded:
        watched = open_page(url=guarded.url)
        watched.allowed.add(401)
        page = watched.open("#/adapters")
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("send one of this service's API keys")
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_be_visible()
        expect(page.locator(".adapter")).to_have_count(0)
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator(".adapter")).to_have_count(2)
        expect(page.locator(".adapter img").first).to_have_attribute("src", re.compile("^blob:"))
        page.get_by_role("link", name="Compare", exact=True).click()
        expect(page.get_by_role("combobox", name="Adapter")).to_have_value(re.compile("cup|mug"))
        draw(page, seed=2, steps=2)
        expect_done(page)
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
        watched.check()


@pytest.fixture
def shown_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The service to take pictures of: the demo's registry where the documentation's are made, else the tests' own."""
    if not UPDATE:
        yield request.getfixturevalue("page_url")
        return
    assert DEMO.is_dir(), "the documentation's pictures show the demo: run `make demo` first"
    storage = tmp_path / "registry"
    shutil.copytree(DEMO, storage, ignore=shutil.ignore_patterns("probes"))
    probes = ProbeSettings(live_share=1.0, canonical_every_s=20.0)
    settings = ServeSettings(storage=str(storage), device="cpu", probes=probes)

    @asynccontextmanager
    async def opened() -> Any:
        async with Service.open(settings, Metrics(PrometheusBackend(), SERVING_METRICS)) as service:
            yield service

    with listening(opened(), Registry(open_store(str(storage))), settings, Access(settings)) as live:
        yield live.url


def wait_for_probes(page: Page, url: str, adapter: str, count: int) -> None:
    """Probes follow pictures in spare moments."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        history = page.request.get(f"{url}/v1/adapters/{adapter}/drift?hours=1").json()["history"]
        if sum(record["kind"] == "live" for record in history) >= count:
            return
        page.wait_for_timeout(300)
    raise AssertionError(f"{count} pictures of {adapter} did not become as many live probes")


@pytest.mark.timeout(600)
def test_screenshots(open_page: OpenPage, shown_url: str, tmp_path: Path) -> None:
    """For the documentation with CAT_UPDATE_SCREENSHOTS=1: the demo's adapters, with pictures and probes of now."""
    folder, adapter = (IMAGES, "striped-cup") if UPDATE else (tmp_path, "cup")
    page = open_page(url=shown_url, device_scale_factor=1, color_scheme="light").open(f"#/compare/{adapter}")
    seeds = (*range(11, 25), 1006) if UPDATE else (7,)
    expect(page.get_by_role("combobox", name="Adapter")).to_have_value(adapter)
    for drawn, seed in enumerate(seeds, start=1):
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.locator("#draw").click()
        expect(page.locator(".past")).to_have_count(drawn, timeout=DRAWN_MS)
        if UPDATE:
            wait_for_probes(page, shown_url, adapter, drawn)
    page.wait_for_timeout(300)
    page.screenshot(path=folder / "page-compare.png")
    page.get_by_role("link", name="Adapters", exact=True).click()
    expect(page.locator(".adapter img").last).to_have_attribute("src", re.compile("^blob:"))
    page.wait_for_timeout(300)
    page.screenshot(path=folder / "page-adapters.png")
    page.get_by_role("link", name="Drift", exact=True).click()
    expect(page.locator(".chart svg").first).to_be_visible()
    page.wait_for_timeout(300)
    page.screenshot(path=folder / "page-drift.png")
    for name in ("compare", "adapters", "drift"):
        assert (folder / f"page-{name}.png").stat().st_size > 10_000
