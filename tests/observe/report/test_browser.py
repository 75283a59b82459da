"""The page in a real browser: clicked through, read back, at a phone's width, in light and dark.

Layer: headless Chromium (Debian: apt-get install chromium). Skipped where none is installed; what
needs no browser is tested beside this file.
"""

import json
import math

import numpy as np
import pytest

from megatron_sod.observe.report import write_report
from tests.helpers.browser import Page, chromium
from tests.helpers.tokenizers import tiny_tokenizer
from tests.observe.report import runs
from tests.observe.report.test_weights_js import RUN_CASES
from tests.observe.report.weight_cases import CASES, assert_same_weights, case_inputs, expected

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,  # its waits are bounded, and a busy machine passes them
    pytest.mark.skipif(chromium() is None, reason="no Chromium on PATH (apt-get install chromium)"),
]

NUM_TRAJECTORIES = 10_000
TABS = ("overview", "curves", "steps", "trajectories", "whatif", "run")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three pages: a small run, two runs side by side, and one of 10,000 trajectories."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = tiny_tokenizer()
    small = runs.small_run(folder / "small")
    other = runs.small_run(folder / "other", policy="uniform")
    large = runs.large_run(folder / "large", NUM_TRAJECTORIES, per_iteration=200, text_every=2)
    return {
        "small": write_report(small, tokenizer),
        "both": write_report(small, tokenizer, compare=other, out=folder / "both.html"),
        "large": write_report(large, tokenizer),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def open_page(browser, files):
    """Opens one of the pages; afterwards there must be no error and no request but its own file."""
    browser.resize(1280, 900)
    browser.prefer("light")
    browser.errors.clear()
    browser.requests.clear()

    def open_page(name: str) -> Page:
        browser.call("Page.navigate", url="about:blank")
        browser.requests.clear()
        browser.open(files[name])
        browser.until("!!globalThis.app && !!document.querySelector('main > *')")
        return browser

    yield open_page
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)
    assert sum(url.startswith("file:") for url in browser.requests) == 1


def _text(page: Page, selector: str = "main") -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).innerText")


def _tab(page: Page, name: str) -> None:
    page.click(f"[data-tab={name}]")
    page.until(f"document.querySelector('[data-tab={name}]').ariaSelected === 'true'")


def _choose(page: Page, label: str, value: str) -> None:
    """Set a select by its label, as a change by the reader."""
    assert page.run(
        "(() => { const field = [...document.querySelectorAll('.field')]"
        f".find((f) => f.firstChild.textContent === {json.dumps(label)});"
        f"const s = field.querySelector('select'); s.value = {json.dumps(value)};"
        "s.dispatchEvent(new Event('change')); return s.value; })()"
    ) == value  # fmt: skip


def test_every_tab_shows_what_it_promises(open_page):
    page = open_page("small")
    assert "75.0" in _text(page) and "Success on held-out tasks" in _text(page)
    for tab, words in {
        "curves": "Seconds per iteration",
        "steps": "How trust moves within a trajectory",
        "trajectories": "3 of 3 trajectories",
        "whatif": "Where the signal sits",
        "run": "distill.step_weight.policy",
    }.items():
        _tab(page, tab)
        assert words in _text(page)
    _tab(page, "curves")
    page.until("document.querySelectorAll('main svg path.line').length > 3")
    for title in ("Memory", "Tool outcomes", "Reward of rollouts", "Success by benchmark"):
        assert title in _text(page)


def test_a_trajectory_is_read_step_by_step(open_page):
    page = open_page("small")
    _tab(page, "trajectories")
    page.click(".row")
    page.until("!!document.querySelector('.detail .step')")
    detail = _text(page, ".detail")
    for words in ("Step 1", "user error", "d 0.3", "w 0.25", "print(1)", runs.EVIL, "erroneous"):
        assert words in detail
    # -2.5 nats is 0.12 + 0.6 * 2.5 / 3 = 62 % of the orange, +0.75 is 27 % of the blue
    styles = page.run("[...document.querySelectorAll('.tokens span')].map((s) => s.style.cssText)")
    assert "--low) 62%" in styles[0] and "--high) 27%" in styles[1]
    page.click(".tokens span")
    tip = _text(page, ".tip")
    assert "-2.5" in tip and "student p 0.607, teacher p 0.0498" in tip  # e^-0.5, e^-3
    assert page.run("location.hash").startswith("#trajectory=")


def test_hostile_text_is_shown_and_never_run(open_page):
    page = open_page("small")
    for tab in TABS:
        _tab(page, tab)
    assert page.run("typeof hacked") == "undefined"
    assert page.run("document.querySelectorAll('img, iframe').length") == 0


def test_ten_thousand_trajectories_are_listed_a_screen_at_a_time(open_page):
    page = open_page("large")
    _tab(page, "trajectories")
    assert "of 10\u202f000 trajectories" in _text(page)
    assert 5 < page.run("document.querySelectorAll('.row').length") < 60
    page.run("document.querySelector('.list').scrollTop = 1e9")
    page.until(f"!!document.querySelector('.row[data-index=\"{200 - 1}\"]')")  # oldest come last
    assert page.run("document.querySelectorAll('.row').length") < 60
    last = page.run("[...document.querySelectorAll('.row')].at(-1).dataset.index")
    page.click(f".row[data-index='{last}']")
    page.until("document.querySelector('.detail').innerText.includes('iteration 1')")


def test_the_list_follows_filters_search_and_keys(open_page):
    page = open_page("large")
    page.run("app.browse({pattern: 'recovery'})")
    shown = page.run("filtered(app.run, app.filter).length")
    meta = "app.run.meta.patterns.indexOf('recovery')"
    assert 0 < shown == page.run(f"[...app.run.pattern].filter((p) => p === {meta}).length")
    _choose(page, "tool outcome", "timeout")
    assert 0 < page.run("filtered(app.run, app.filter).length") < shown
    page.run("app.browse({words: 'it:7'})")
    assert "200 of" in _text(page)
    page.run("document.querySelector('.list').focus()")
    page.click(".row")
    chosen = page.run("app.selected")
    page.run("document.querySelector('.list').focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown", code="ArrowDown")
    assert page.run("app.selected") == chosen + 1


def test_patterns_lead_to_their_trajectories(open_page):
    page = open_page("small")
    _tab(page, "steps")
    page.click(".examples .row-link")
    page.until("!!document.querySelector('.detail .step')")
    _tab(page, "overview")
    page.click(".pressable:not(:disabled)")
    page.until("document.querySelector('main').innerText.includes('3 of 3 trajectories')")


@pytest.mark.parametrize("policy", ["sod", "running_clip", "heuristic"])
def test_what_if_shows_the_trainers_weights(open_page, policy):
    page = open_page("large")
    _tab(page, "whatif")
    _choose(page, "policy", policy)
    columns = page.run(
        "({start: [...app.run.step_start],"
        "d: Array.from(app.run.d, (d) => Number.isNaN(d) ? null : d),"
        "outcome: Array.from(app.run.outcome, (o) => app.run.wrong[o] ? 1 : 0),"
        "iteration: [...app.run.iteration],"
        "w: Array.from(app.whatIf().w, (w) => Number.isNaN(w) ? null : w)})"
    )
    options = {"policy": policy, "delta": 0.2, "epsilon": 1e-6, "dFloor": None, "wMin": None}
    found = np.array([math.nan if w is None else w for w in columns.pop("w")])
    wanted = expected(columns, options)
    assert_same_weights(found, wanted, options)
    # the table by step: its last column is the mean of those weights
    first = [m for m in columns["start"][:-1] if not math.isnan(wanted[m])]
    shown = page.run("document.querySelectorAll('main table')[1].rows[1].cells[4].innerText")
    assert float(shown) == pytest.approx(np.mean(wanted[first]), abs=6e-4)


def test_the_browser_weighs_random_steps_as_the_trainer_does(open_page):
    page, run = open_page("small"), case_inputs()
    fake = RUN_CASES[RUN_CASES.index("function fake") :]
    script = (
        f"(() => {{ {fake} const run = fake({json.dumps(run)});"
        f"return {json.dumps(CASES)}.map((options) => Array.from(reweigh(run, options),"
        "(w) => (Number.isNaN(w) ? null : w))); })()"
    )
    for options, answer in zip(CASES, page.run(script), strict=True):
        weights = np.array([math.nan if w is None else w for w in answer])
        assert_same_weights(weights, expected(run, options), options)


def test_a_number_out_of_range_is_refused(open_page):
    page = open_page("small")
    _tab(page, "whatif")
    page.run(
        "(() => { const e = document.querySelector('[name=delta]'); e.value = -1;"
        "e.dispatchEvent(new Event('input')); })()"
    )
    assert page.run("document.querySelector('[name=delta]').validationMessage") == "from 0"
    assert page.run("app.options.delta") == 0.2


def test_two_runs_are_compared(open_page):
    page = open_page("both")
    assert "B − A" in _text(page) and "A: small" in _text(page)
    page.until("document.querySelectorAll('path.line.dashed').length > 0")
    _tab(page, "run")
    assert "What differs" in _text(page) and "distill.step_weight.policy" in _text(page)
    page.click("[data-run='1']")
    page.until("app.run.name === 'other'")
    _tab(page, "trajectories")
    page.click(".row")
    page.until("!!document.querySelector('.detail .link:not(.back)')")
    page.click(".detail .link:not(.back)")
    page.until("app.run.name === 'small' && !!document.querySelector('.detail .step')")


def test_a_phone_shows_everything_without_scrolling_sideways(open_page):
    page = open_page("both")
    page.resize(390, 844)
    for tab in TABS:
        _tab(page, tab)
        page.until("document.documentElement.scrollWidth === 390")
    _tab(page, "trajectories")
    page.click(".row")
    page.until("getComputedStyle(document.querySelector('.side')).display === 'none'")
    assert "Step 1" in _text(page, ".detail")
    page.click(".back")
    page.until("getComputedStyle(document.querySelector('.side')).display !== 'none'")


CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d');
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const style = getComputedStyle(document.documentElement);
  const of = (name) => light(style.getPropertyValue(name));
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return Object.fromEntries(NAMES.map((name) =>
    [name, Math.min(ratio(of(name), of('--surface')), ratio(of(name), of('--paper')))]));
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_light_and_dark(open_page, scheme):
    page = open_page("small")
    page.prefer(scheme)
    dark = page.run("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    names = ["--ink", "--soft", "--accent", *(f"--c{i}" for i in range(1, 8))]
    ratios = page.run(CONTRAST.replace("NAMES", json.dumps(names)))
    low = {name: ratio for name, ratio in ratios.items() if ratio < 4.5}
    assert low == {}  # WCAG AA for text; lines would need 3
