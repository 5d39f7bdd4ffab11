"""The pages in a real Chromium, if installed: figures, values on hover, switches, zoom, and a phone's width."""

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
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=60000"),
)

# The page runs its own script alone, so the frame around it measures: every element that extends beyond the screen and
# is not in a scrolling box, with all details unfolded; figures before and after the event that precedes printing.
_MEASURE = """
addEventListener("load", async () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const wait = () => new Promise(done => setTimeout(done, 50));
  const drawn = () => [...page.querySelectorAll(".chart")].filter(one => one.querySelector("svg")).length;
  const k3 = page.querySelector("#k3 .chart");
  k3.scrollIntoView();
  while (!k3.querySelector("svg")) await wait();
  const first = drawn();
  const lines = chart => [...chart.querySelectorAll("svg path")].filter(one => /--s1\\b/.test(one.outerHTML)).length;
  const labels = chart => chart.querySelector("svg .role-axis-label").textContent;
  page.querySelectorAll("details").forEach(one => one.open = true);
  frame.contentWindow.dispatchEvent(new Event("beforeprint"));
  while (drawn() < page.querySelectorAll(".chart").length) await wait();
  const place = k3.getBoundingClientRect();
  const steps = k3.closest("section").querySelectorAll(".zoom input");
  const pointer = (kind, share) => k3.dispatchEvent(new PointerEvent(kind, {bubbles: true, clientX:
    place.left + share * place.width, clientY: place.top + place.height / 2}));
  pointer("pointermove", 0.6);
  const tip = page.querySelector(".tip"), said = tip.hidden ? "" : tip.innerText, whole = labels(k3);
  const wide = [...page.body.querySelectorAll("*")].filter(one =>
    one.getBoundingClientRect().right > 376 && !one.closest(".scroll,details,pre,svg"));
  const small = [...page.querySelectorAll(".chart svg text")].filter(one => one.textContent &&
    parseFloat(one.getAttribute("font-size")) * one.getScreenCTM().a < 8.5);
  k3.scrollIntoView();
  await wait();
  const before = lines(k3), width = page.documentElement.scrollWidth;
  k3.closest("section").querySelector(".legend [aria-pressed]:nth-child(2)").click();
  Object.assign(steps[0], {value: 12}).dispatchEvent(new Event("change", {bubbles: true}));
  for (let tries = 0; tries < 400 && (lines(k3) || labels(k3) === whole); tries++) await wait();
  const seen = {width, figures: page.querySelectorAll("figure").length, first, drawn: drawn(), said, before,
    after: lines(k3), zoomed: labels(k3) !== whole, wide: wide.map(one => one.outerHTML.slice(0, 80)),
    small: small.length};
  document.title = "found" + JSON.stringify(seen) + "end";
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
        f"<!doctype html><meta charset=utf-8><title>wait</title><body style='margin:0'><script>{_MEASURE}</script>"
        f"<iframe style='width:375px;height:800px;border:0' srcdoc=\"{frame}\"></iframe></body>"
    )
    done = subprocess.run(
        [browser, *_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=400,
    )
    found = re.search(r"found(\{.*\})end", done.stdout)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(found.group(1).replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["wide"] == []
    assert seen["width"] <= 375
    assert seen["figures"] == seen["drawn"] == 43
    assert 0 < seen["first"] < 20
    assert seen["small"] == 0
    assert re.search(r"step 1\d\n.*fp16: [\d.e-]+\n.*bf16: [\d.e-]+", seen["said"])
    assert seen["before"] > 0 == seen["after"]
    assert seen["zoomed"]
    said = [line.partition("CONSOLE")[2] for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
