"""Differences between two configurations, by dotted key.

Layer: pure.
"""

from megatron_sod.config.compare import changes


def test_changed_added_and_missing_values_are_named_by_their_dotted_key():
    before = {"train": {"lr": 1e-6, "steps": 4}, "data": {"train": ["a"]}, "seed": 0}
    now = {"train": {"lr": 2e-6, "steps": 4}, "data": {"train": ["a", "b"]}, "name": "x", "seed": 0}
    assert changes(before, now) == [
        "data.train: ['a'] before, ['a', 'b'] now",
        "name: absent before, x now",
        "train.lr: 1e-06 before, 2e-06 now",
    ]


def test_equal_mappings_have_no_changes():
    assert changes({"a": {"b": None}}, {"a": {"b": None}}) == []


def test_a_section_that_became_null_is_one_line_per_key():
    assert changes({"teacher": {"path": "t"}}, {"teacher": None}) == [
        "teacher: absent before, None now",
        "teacher.path: t before, absent now",
    ]
