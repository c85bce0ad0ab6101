"""The page of `kindling inspect`, opened in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.inspect import command as inspect
from tests.unit import hostile
from tests.unit.folders import pair

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"),
)
ATTACK = '<script>document.title = "pwned"</script><img src=x onerror="document.title=1">'

DRIVER = """
const results = {};
const press = key => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const name = () => document.activeElement.querySelector(".name")?.textContent ?? "";
addEventListener("load", async () => {
  await Promise.all([...document.images].map(image => image.decode().catch(() => 0)));
  results.title = document.title;
  results.images = [...document.querySelectorAll(".grid img")].map(image => image.naturalWidth);
  press("ArrowRight"); results.first = name();
  results.outline = getComputedStyle(document.activeElement).outlineStyle;
  press("ArrowRight"); results.second = name();
  press("k"); results.back = name();
  document.activeElement.click();
  results.open = $("detail").open;
  press("ArrowRight"); results.detail = $("title").textContent;
  results.caption = document.querySelector("dialog .text").textContent;
  $("close").click();
  results.closed = !$("detail").open;
  press("/"); results.search = document.activeElement.id;
  $("search").value = "RIVER"; $("search").dispatchEvent(new Event("input"));
  results.found = shown.map(li => li.querySelector(".name").textContent);
  $("search").value = ""; document.querySelector('.chip[data-mark="cropped"]').click();
  results.cropped = shown.map(li => li.querySelector(".name").textContent);
  results.hidden = getComputedStyle(items[0]).display;
  const box = shown[0].querySelector(".crop").getBoundingClientRect();
  const frame = shown[0].querySelector(".frame").getBoundingClientRect();
  results.crop = [box.left - frame.left, box.width].map(side => side / frame.width);
  results.alike = [...document.querySelectorAll("[data-show] img")].map(image => image.alt);
  const pre = document.createElement("pre");
  pre.id = "results"; pre.textContent = JSON.stringify(results);
  document.body.replaceChildren(pre);
});
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of four pictures: two alike, one very wide, one whose caption attacks."""
    root = tmp_path / "data"
    pair(root, "a.png", "a field by the river")
    pair(root, "b.png", ATTACK, seed=1)
    (root / "c.png").write_bytes((root / "a.png").read_bytes())
    (root / "c.txt").write_text("the river again")
    hostile.picture(root / "d.png", width=400, height=80, seed=2)
    (root / "d.txt").write_text("小火人", encoding="utf-8")
    path = tmp_path / "out.html"
    assert inspect.main([str(root), "--resolution", "64", "--html", str(path)]) == 0
    return path


def browse(page: Path, *flags: str, home: Path) -> str:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={home}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout


def test_all_texts_are_escaped_and_nothing_is_fetched(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert html.escape(ATTACK, quote=False).replace('"', "&#34;") in text
    assert ATTACK not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "小火人" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    nonce = re.search(r'nonce="([^"]+)"', text)
    assert nonce
    driven = page.with_name("driven.html")
    script = f'<script nonce="{nonce[1]}">{DRIVER}</script></body>'
    driven.write_text(text.replace("</body>", script), encoding="utf-8")
    dom = browse(driven, "--dump-dom", "--virtual-time-budget=10000", home=tmp_path / "home")
    answer = re.search(r'<pre id="results">(.*?)</pre>', dom, re.DOTALL)
    assert answer, dom[-2000:]
    results = json.loads(html.unescape(answer[1]))
    crop = results.pop("crop")
    assert crop == pytest.approx([(400 - 240) / 2 / 400, 240 / 400], abs=0.01)
    assert results == {
        "title": f"{tmp_path / 'data'} · kindling inspect",
        "images": [96, 96, 96, 256],
        "first": "a.png",
        "outline": "solid",
        "second": "b.png",
        "back": "a.png",
        "open": True,
        "detail": "b.png",
        "caption": ATTACK,
        "closed": True,
        "search": "search",
        "found": ["a.png", "c.png"],
        "cropped": ["d.png"],
        "hidden": "none",
        "alike": ["a.png", "c.png"],
    }


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_dark_screen_gets_a_dark_page(page: Path, tmp_path: Path) -> None:
    shades = {}
    for scheme in (0, 1):  # Blink's dark and light
        shot = tmp_path / f"{scheme}.png"
        flags = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
        browse(page, *flags, "--window-size=900,700", home=tmp_path / f"home{scheme}")
        with Image.open(shot) as image:
            shades[scheme] = np.asarray(image.convert("L"))
    assert np.median(shades[0]) < 50
    assert np.median(shades[1]) > 220
    assert all(shade.std() > 5 for shade in shades.values())  # something is drawn
