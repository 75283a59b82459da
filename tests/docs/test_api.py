"""docs/api.md is what the docstrings say. Layer: pure."""

import runpy

from tests.docs.pages import ROOT

API = runpy.run_path(str(ROOT / "docs" / "make_api.py"))


def test_the_page_is_current():
    remedy = "python docs/make_api.py > docs/api.md"
    assert (ROOT / "docs" / "api.md").read_text() == API["page"](), remedy


def test_the_promised_names_are_there_and_documented():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in (
        "step_divergence",
        "step_weights",
        "vocab_parallel_divergence",
        "step_weighted_kl",
    ):
        assert f"### {name}\n" in text
    for module in API["MODULES"]:
        for name, found in API["_members"](module):
            assert found.__doc__, f"{module}.{name} has no docstring"
