"""The pages in a real Chromium, if installed: figures, values on hover, switches, zoom, and a phone's width."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.report.chromium import Chromium
from tests.unit.report.studies import add_mismatch, doctor_json, fill_study, probe_json

from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# In one name, since the libraries are loaded into the same global scope as what the browser is told to run.
_HELPERS = """window.tested = (() => {
const k3 = document.querySelector("#k3 .chart");
const steps = () => [...k3.closest("section").querySelectorAll(".zoom input")];
const until = async found => { while (!found()) await new Promise(done => setTimeout(done, 20)); };
const drawn = () => [...document.querySelectorAll(".chart")].filter(one => one.querySelector("svg")).length;
const paths = () => [...k3.querySelectorAll("svg path")].filter(one => /--s1\\b/.test(one.outerHTML)).length;
const labels = () => k3.querySelector("svg .role-axis-label").textContent;
return {k3, steps, until, drawn, paths, labels};
})()"""
_CALL = "(async ({{k3, steps, until, drawn, paths, labels}}) => {})(window.tested)"

# Elements beyond the screen that are not in a scrolling box, with all details unfolded, and text too small to read.
_BEYOND = """[...document.body.querySelectorAll("*")].filter(one =>
  one.getBoundingClientRect().right > 376 && !one.closest(".scroll,details,pre,svg")).map(one => one.outerHTML)"""
_SMALL = """[...document.querySelectorAll(".chart svg text")].filter(one => one.textContent &&
  parseFloat(one.getAttribute("font-size")) * one.getScreenCTM().a < 8.5).map(one => one.textContent)"""


def run(browser: Chromium, script: str) -> Any:
    """Return the value of an expression of the helpers."""
    return browser.run(_CALL.format(script if script.startswith("{") else f"({script})"))


@pytest.fixture
def phone(tmp_path: Path, make_sanity: Callable[..., RunDir]) -> Iterator[Chromium]:
    """A browser as narrow as a phone, with the page of a run, a probe and a doctor, in which k3 is drawn."""
    binary = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium is installed")
    sanity = make_sanity(steps=20)
    add_mismatch(sanity.arm("bf16"), "bf16", 20)
    probe = fill_study(tmp_path / "probe", "probe.json", probe_json())
    doctor = fill_study(tmp_path / "doctor", "doctor.json", doctor_json(unsafe=True))
    page = write_report([sanity, probe, doctor], tmp_path / "report.html")
    browser = Chromium(binary, tmp_path / "profile", 375, 800)
    try:
        browser.call("Page.navigate", url=page.as_uri())
        browser.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        browser.run(_HELPERS)
        run(browser, "k3.scrollIntoView()")
        run(browser, "until(() => k3.querySelector('svg'))")
        yield browser
    finally:
        browser.close()


def test_pages_fit_a_phone_and_every_figure_is_drawn_before_print(phone: Chromium) -> None:
    assert 0 < run(phone, "drawn()") < 20
    run(phone, "document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert run(phone, "document.documentElement.scrollWidth") <= 375
    # A browser prints once the listeners and their promises are done; a timer comes after them.
    run(phone, "{ dispatchEvent(new Event('beforeprint')); await new Promise(done => setTimeout(done)); }")
    assert run(phone, "drawn()") == run(phone, "document.querySelectorAll('figure').length") == 43
    assert run(phone, _BEYOND) == []
    assert run(phone, _SMALL) == []
    assert run(phone, "document.getElementById('undrawn')") is None
    assert phone.console == []


def test_figures_answer_to_the_mouse(phone: Chromium) -> None:
    run(phone, "k3.scrollIntoView({block: 'center'})")
    left, top, width, height = run(
        phone, "(({x, y, width, height}) => [x, y, width, height])(k3.getBoundingClientRect())"
    )
    middle, whole = top + height / 2, run(phone, "labels()")
    phone.mouse("mouseMoved", left + 0.6 * width, middle)
    said = run(phone, "document.querySelector('.tip').innerText")
    assert re.search(r"step 1\d\n.*fp16: [\d.e-]+\n.*bf16: [\d.e-]+", said)
    assert (
        run(phone, "document.querySelectorAll('#reward .cursor:not([hidden]), #k3 .cursor:not([hidden])').length") == 2
    )
    phone.mouse("mousePressed", left + 0.5 * width, middle, 1)
    phone.mouse("mouseMoved", left + 0.7 * width, middle, 1)
    phone.mouse("mouseReleased", left + 0.7 * width, middle)
    run(phone, f"until(() => labels() !== '{whole}')")
    first, last = run(phone, "steps().map(one => +one.value)")
    assert 1 < first < last < 20
    run(phone, f"{{ steps()[0].form.reset(); return until(() => labels() === '{whole}'); }}")
    assert run(phone, "steps().map(one => one.value)") == ["", ""]
    run(phone, "Object.assign(steps()[0], {value: 12}).dispatchEvent(new Event('change', {bubbles: true}))")
    run(phone, f"until(() => labels() !== '{whole}')")
    assert phone.console == []


def test_a_legend_switches_an_arm_off_and_on(phone: Chromium) -> None:
    entry = "k3.closest('section').querySelector('.legend [aria-pressed]:nth-child(2)')"
    assert run(phone, "paths()") > 0
    run(phone, f"{{ {entry}.click(); return until(() => !paths()); }}")
    assert run(phone, f"{entry}.ariaPressed") == "false"
    run(phone, f"{entry}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter'}}))")
    run(phone, "until(paths)")
    assert run(phone, f"{entry}.ariaPressed") == "true"
    assert phone.console == []
