"""Every configuration shipped for a cluster fits it, and its plan is the recorded one.

Layer: pure. After a change that is meant: python -m tests.plan.golden, and read the difference.
"""

import json

import pytest

from tests.plan.golden import FILE, ROOT, numbers, plan_of, shipped

GOLDEN = json.loads(FILE.read_text())


def test_the_paper_and_larger_models_are_shipped():
    names = " ".join(file.name for file in shipped())
    for models in (
        "qwen3-0.6b_qwen3-4b_1n8g",
        "qwen3-1.7b_qwen3-4b_1n8g",
        "qwen3-8b_qwen3-32b_2n8g",
        "qwen3-30b-a3b_1n8g",
        "qwen3-235b-a22b_8n8g",
    ):
        assert models in names


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.name)
def test_a_shipped_configuration_fits_its_cluster(file):
    assert plan_of(file).problems == []


@pytest.mark.parametrize("name", GOLDEN)
def test_a_plan_is_the_recorded_one(name):
    assert numbers(plan_of(ROOT / "configs" / name)) == GOLDEN[name]


def test_recorded_totals_by_hand():
    """Qwen3-8B under TP8 on 16 GPUs: 1.024 B parameters of a rank, twice data parallel."""
    train = GOLDEN["sod_qwen3-8b_qwen3-32b_2n8g_tp8.yaml"]["memory_mib"]["stage 0/0, engine True"][
        "train"
    ]
    held = 8.19e9 / 8 / 2**20  # padded vocabulary and replicated norms add 0.2 %
    assert train["weights"] == pytest.approx(2 * held, rel=5e-3)
    assert train["gradients"] == pytest.approx(4 * held, rel=5e-3)
    assert train["optimizer"] == pytest.approx(12 * held / 2, rel=5e-3)
    # 23,040 rows x 152,576 padded columns / 8 x 2 bytes
    assert train["logits"] == round(23_040 * 152_576 / 8 * 2 / 2**20)
