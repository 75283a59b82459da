"""docs/configuration.md is the schema, in words. Layer: pure."""

from pathlib import Path

import pytest

from megatron_sod.config.reference import keys, reference
from megatron_sod.config.schema import SftConfig, SodConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_current():
    remedy = "python -m megatron_sod.config.reference > docs/configuration.md"
    assert PAGE.read_text() == reference(), remedy


@pytest.mark.parametrize("schema", [SodConfig, SftConfig])
def test_every_key_says_what_it_means(schema):
    found = list(keys(schema))
    assert len(found) > 20 and [key.path for key in found if not key.meaning] == []


def test_ranges_defaults_and_types_are_the_schemas():
    by_path = {key.path: key for key in keys(SodConfig)}
    delta = by_path["distill.step_weight.delta"]
    assert (delta.kind, delta.default, delta.bounds) == ("float", "0.2", ">= 0")
    assert by_path["train.num_iterations"].default == "required"
    assert by_path["distill.log_ratio_clip"].kind == "float or null"
    assert "sampled_advantage / sampled_separate" in by_path["distill.loss"].kind
