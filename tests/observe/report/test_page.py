"""The page is one file, needs no network, and carries hostile text without showing it as markup.

Layer: pure, with files in a temporary folder. What it shows: test_browser.py.
"""

import re
from html.parser import HTMLParser

import pytest

from megatron_sod.errors import DataError
from megatron_sod.observe.report import write_report
from megatron_sod.observe.report.page import HERE, SCRIPTS
from megatron_sod.observe.report.payload import unpack
from tests.helpers.tokenizers import tiny_tokenizer
from tests.observe.report import runs


class Markup(HTMLParser):
    """Tags, attributes and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.payloads: list[str] = []
        self._in_payload = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._in_payload = ("data-run-payload", None) in attrs

    def handle_data(self, data):
        if self._in_payload and data.strip():
            self.payloads.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.small_run(tmp_path_factory.mktemp("run") / "demo")


@pytest.fixture(scope="module")
def page(run):
    path = write_report(run, tiny_tokenizer())
    assert path == run / "report.html"
    return Markup(path.read_text())


def test_the_page_carries_the_run(page):
    assert len(page.payloads) == 1
    meta, columns = unpack(page.payloads[0])
    assert meta["name"] == "demo" and len(meta["ids"]) == 3
    assert "".join(meta["pieces"]).count("tool_call") and columns["piece"].size > 50


def test_hostile_text_is_no_markup(page, run):
    assert not {"img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == 2  # the payload and the page's own
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "hacked" not in (run / "report.html").read_text()


def test_a_hostile_run_name_is_escaped(tmp_path):
    path = write_report(runs.small_run(tmp_path / "<b>x"), tiny_tokenizer())
    assert "<b>x" not in path.read_text() and "b" not in Markup(path.read_text()).tags


def test_the_page_needs_no_network(page, run):
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value == "data:,"
    text = (run / "report.html").read_text()
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, never loaded


def test_text_from_runs_never_becomes_markup_in_the_scripts():
    source = "".join((HERE / f"{name}.js").read_text() for name in SCRIPTS)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in source


def test_two_runs_are_two_payloads(run, tmp_path):
    other = runs.small_run(tmp_path / "other", policy="uniform")
    path = write_report(run, tiny_tokenizer(), compare=other, out=tmp_path / "new/both.html")
    names = [unpack(payload)[0]["name"] for payload in Markup(path.read_text()).payloads]
    assert names == ["demo", "other"]
    assert [p.name for p in path.parent.iterdir()] == ["both.html"]  # nothing partial is left


def test_a_second_run_that_is_none_is_refused(run, tmp_path):
    with pytest.raises(DataError, match="no run here"):
        write_report(run, tiny_tokenizer(), compare=tmp_path / "nothing")
