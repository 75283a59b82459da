"""The worked examples of CONTRIBUTING.md run. Layer: pure."""

import re

import pytest

from megatron_sod.algorithm.step_weights import STEP_WEIGHTS
from megatron_sod.model.geometry import SUPPORTED
from tests.docs.pages import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(
    zip(
        re.findall(r"^## (Add .+)$", TEXT, re.MULTILINE),
        re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL),
        strict=True,
    )
)


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_does_what_its_assertions_say(title):
    registries = STEP_WEIGHTS, SUPPORTED
    before = [dict(registry) for registry in registries]
    assert "assert " in EXAMPLES[title]
    try:
        exec(compile(EXAMPLES[title], title, "exec"), {})
    finally:  # an example may register what the other tests must not see
        for registry, kept in zip(registries, before, strict=True):
            registry.clear()
            registry.update(kept)


def test_every_kind_of_contribution_has_an_example():
    kinds = {"Add a method", "Add a model", "Add a kernel", "Add a benchmark"}
    assert kinds == set(EXAMPLES)
