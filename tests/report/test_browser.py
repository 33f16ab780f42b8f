"""The report in a real browser: it must not only parse, it must show."""

import html
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlt2i.report import write_report
from rlt2i.report.charts import SERIES, SERIES_DARK
from rlt2i.report.pictures import FAILURE, SUCCESS, rgb
from tests.helpers.browser import FLAGS, find_browser


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


def open_page(browser: str, page: Path, profile: Path, *flags: str) -> str:
    """What the browser prints, with a fresh profile and no network."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode()


def share(picture: np.ndarray, colour: str, tolerance: int = 12) -> float:
    """Share of pixels of about this colour."""
    return float((np.abs(picture.astype(int) - rgb(colour)).max(axis=-1) <= tolerance).mean())


@pytest.mark.browser
def test_the_report_renders(make_run, tmp_path, browser):
    page = write_report(make_run(per_category=4))
    dom = open_page(browser, page, tmp_path / "profile-dom", "--dump-dom")
    for anchor in ("curve", "images", "maps", "categories", "training", "timing", "recipe", "versions", "reproduce"):
        assert re.search(rf'<section[^>]* id="{anchor}"', dom), anchor
    assert "0.47 → 0.66" in html.unescape(dom)
    assert dom.count("<img") > 50
    assert dom.count('class="chart"') > 8
    assert "<b>red</b>" not in dom  # a prompt stayed text
    assert "<script" not in dom

    shot = tmp_path / "light.png"
    open_page(browser, page, tmp_path / "profile-light", f"--screenshot={shot}", "--window-size=1200,7000")
    light = np.asarray(Image.open(shot).convert("RGB"))
    assert light.shape[:2] == (7000, 1200)
    assert light.std() > 10  # not blank
    for colour in (SUCCESS, FAILURE, SERIES[0], SERIES[1]):  # frames and curves were painted
        assert share(light, colour) > 1e-4, colour
    margin = light[:, :30].reshape(-1, 3)
    assert (margin == margin[0]).all()  # nothing runs out of the column
    assert (light[:, -30:].reshape(-1, 3) == margin[0]).all()


@pytest.mark.browser
def test_the_report_renders_in_dark_mode_and_on_a_phone(make_run, tmp_path, browser):
    page = write_report(make_run(per_category=4))
    phone = tmp_path / "phone.html"  # windows are at least 500 pixels wide, frames are not
    frame = f'<iframe src="{page.as_uri()}" style="width: 390px; height: 6000px; border: 0"></iframe>'
    phone.write_text(
        f'<meta name="color-scheme" content="light dark"><body style="margin: 0">{frame}', encoding="utf-8"
    )
    shot = tmp_path / "dark.png"
    flags = ("--force-dark-mode", f"--screenshot={shot}", "--window-size=520,6000")
    open_page(browser, phone, tmp_path / "profile", *flags)
    dark = np.asarray(Image.open(shot).convert("RGB"))[:, :390]
    assert dark.mean() < 70
    assert dark.std() > 10
    assert share(dark, SERIES_DARK[0]) > 1e-4
    assert (dark[:, -8:].reshape(-1, 3) == dark[0, 0]).all()  # nothing is cut at the right edge
