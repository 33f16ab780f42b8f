"""Votes by mouse, key and finger in a real browser."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlt2i.voting.booth import Booth
from rlt2i.voting.page import ServedPage
from tests.helpers.browser import Page, browsing
from tests.voting.conftest import pictures

pytest.importorskip("uvicorn")

NASTY = 'a <b>red</b> "square" & <script>document.title = "gone"</script>'
READY = '!busy && document.getElementById("left").disabled === false && performance.now() - readyAt > SETTLED'


def prompt_is(text: str) -> str:
    return f"document.getElementById('prompt').textContent === {text!r}"


def shown(page: Page) -> list[str]:
    """Names of the images on the left and on the right."""
    return page.value('["left", "right"].map((side) => document.getElementById(side + "-image").src.split("/").pop())')


def fits(page: Page, width: int, height: int) -> None:
    """Everything can be seen and reached without scrolling, and fingers are not too thick."""
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("document.documentElement.scrollHeight") <= height
    for selector in ("#left", "#right", "#undo", "#tie", "#skip"):
        box = page.box(selector)
        assert box["left"] >= 0, selector
        assert box["top"] >= 0, selector
        assert box["right"] <= width, selector
        assert box["bottom"] <= height, selector
        assert min(box["width"], box["height"]) >= 44, selector


def after(page: Page, booth: Booth, votes: int) -> None:
    """Once so many votes are cast and the next pair can be voted on."""
    give_up = time.monotonic() + 20
    while len(booth.folder.votes) < votes:
        assert time.monotonic() < give_up, (page.text(), page.errors)
        time.sleep(0.01)
    page.wait(READY)


@pytest.mark.browser
def test_a_person_votes_by_mouse_key_and_finger(booth: Booth, tmp_path: Path):
    served = ServedPage.open(booth, port=0)
    with browsing(tmp_path / "profile") as page:
        page.size(1280, 800)
        page.open(served.url)
        page.wait('document.body && document.body.innerText.includes("being drawn")')
        slates = [booth.folder.keep(pictures(2, seed=i), f"prompt {i}", {}) for i in range(3)]
        slates.append(booth.folder.keep(pictures(3, seed=9), NASTY, {}))
        booth.ask(slates)

        page.wait(f"{prompt_is('prompt 0')} && {READY}")  # without a reload
        fits(page, 1280, 800)
        left, right = shown(page)
        page.click("#left")
        page.wait(f"{prompt_is('prompt 1')} && {READY}")
        assert booth.folder.verdict("prompt 0", left, right) == "left"

        left, right = shown(page)
        page.key("ArrowRight")
        page.wait(f"{prompt_is('prompt 2')} && {READY}")
        assert booth.folder.verdict("prompt 1", left, right) == "right"
        page.key("u")
        page.wait(f"{prompt_is('prompt 1')} && {READY}")
        assert len(booth.folder.votes) == 1
        page.key("ArrowDown")
        page.wait(f"{prompt_is('prompt 2')} && {READY}")
        assert booth.folder.verdict("prompt 1", left, right) == "tie"

        page.size(375, 667, phone=True)
        fits(page, 375, 667)
        assert page.box("#left")["bottom"] <= page.box("#right")["top"]  # one above the other
        page.screenshot(tmp_path / "phone.png")
        assert np.asarray(Image.open(tmp_path / "phone.png").convert("RGB")).std() > 10
        page.tap("#skip")
        page.wait(f"{prompt_is(NASTY)} && {READY}")
        assert page.value("document.title") == "Vote"
        assert page.value('document.querySelectorAll("h1 *").length') == 0  # text stayed text
        fits(page, 375, 667)
        left, right = shown(page)
        page.tap("#right")
        after(page, booth, 4)
        assert booth.folder.verdict(NASTY, left, right) == "right"
        page.key("s")
        after(page, booth, 5)
        page.key("s")
        page.wait('document.body.innerText.includes("being drawn")')
        assert [vote.choice for vote in booth.folder.votes] == ["left", "tie", "skip", "right", "skip", "skip"]
        assert booth.wait(slates)
        assert len(booth.folder.pairs()) == 2

        booth.end("All done.")
        page.wait('document.body.innerText.includes("All done.")')
        assert page.errors == []
        served.close()
        page.wait('document.body.innerText.includes("Is rlt2i still running?")')
