"""The pages in a real Chromium, if installed: no messages on the console, and nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest
from tests.unit.report.studies import add_mismatch, doctor_json, fill_study, probe_json

from betterhalf.report.data import load
from betterhalf.report.page import render
from betterhalf.run_dir import RunDir

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=2000"),
)

# The page forbids scripts, so the frame around it measures: every element that extends beyond the screen and is not in
# a scrolling box, with all details unfolded.
_MEASURE = """
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach(one => one.open = true);
  const wide = [...page.body.querySelectorAll("*")].filter(one =>
    one.getBoundingClientRect().right > 376 && !one.closest(".scroll,details,pre"));
  const small = [...page.querySelectorAll("svg text")].filter(one => one.textContent &&
    parseFloat(getComputedStyle(one).fontSize) * one.ownerSVGElement.getBoundingClientRect().width / 440 < 8.5);
  const seen = {width: page.documentElement.scrollWidth, figures: page.querySelectorAll("figure").length,
    wide: wide.map(one => one.outerHTML.slice(0, 80)), small: small.length};
  document.body.textContent = "found" + JSON.stringify(seen) + "end";
});
"""


@pytest.fixture(scope="module")
def browser() -> str:
    """Path of the browser."""
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def test_pages_fit_a_phone_without_a_word_on_the_console(
    browser: str, tmp_path: Path, make_sanity: Callable[..., RunDir]
) -> None:
    sanity = make_sanity(steps=20)
    add_mismatch(sanity.arm("bf16"), "bf16", 20)
    probe = fill_study(tmp_path / "probe", "probe.json", probe_json())
    doctor = fill_study(tmp_path / "doctor", "doctor.json", doctor_json(unsafe=True))
    frame = escape(render(load([sanity, probe, doctor])), quote=True)
    wrapper = tmp_path / "phone.html"
    wrapper.write_text(
        f"<!doctype html><meta charset=utf-8><title>phone</title><body style='margin:0'><script>{_MEASURE}</script>"
        f"<iframe style='width:375px;height:800px;border:0' srcdoc=\"{frame}\"></iframe></body>"
    )
    done = subprocess.run(
        [browser, *_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"found(\{.*\})end", done.stdout)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(found.group(1).replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["wide"] == []
    assert seen["width"] <= 375
    assert seen["figures"] == 43
    assert seen["small"] == 0
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
