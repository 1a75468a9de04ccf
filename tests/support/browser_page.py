"""A real browser before the page: what it may not do, and what every test of the page does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page

CHROMIUM = "/usr/bin/chromium"
# The browser asks for nothing by itself, so that every request seen is the page's.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DRAWN_MS = 60_000
# What the pictures go through, as [kind, state, previews]: a picture may be done before a test could look.
RECORD = """
window.seen = [];
new MutationObserver((changes) => {
  for (const { target } of changes) {
    const { kind, state, previews } = target.dataset;
    if (kind) window.seen.push([kind, state, Number(previews ?? 0)]);
  }
}).observe(document, { subtree: true, attributeFilter: ["data-state", "data-previews"] });
"""


@dataclass
class Watched:
    """A page and all that went wrong on it. allowed: statuses whose failures a test brings about."""

    page: Page
    url: str
    allowed: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def _said(self, message: Any) -> None:
        expected = any(f"status of {status} " in message.text for status in self.allowed)
        if message.type == "error" and not expected:
            self.errors.append(message.text)

    def open(self, route: str = "#/compare") -> Page:
        self.page.goto(f"{self.url}/{route}")
        return self.page

    def check(self) -> None:
        assert self.errors == []
        assert self.hosts - {""} <= {urlsplit(self.url).netloc}  # data: and blob: have no host


OpenPage = Callable[..., Watched]


def picture(page: Page, kind: str) -> Locator:
    return page.locator(f'.picture[data-kind="{kind}"]')


def draw(page: Page, *, seed: int, steps: int = 60) -> None:
    page.get_by_label("Seed", exact=True).fill(str(seed))
    if page.locator("#more-fields").is_hidden():
        page.get_by_role("button", name="More").click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_role("button", name="Draw", exact=False).first.click()
