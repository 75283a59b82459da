"""Overrides are read out of shell text without running it.

Layer: pure.
"""

import re

import pytest

from megatron_sod.config.verl_script import read_script
from tests.config.launch_scripts import SOD


def _read(text: str, **variables: str) -> list[str]:
    return read_script(text, variables).overrides


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("python -m x a.b=1 \\\n   +c.d=2 \\\n  ++e=3", ["a.b=1", "+c.d=2", "++e=3"]),
        ("N=4\npython x a.n=$N a.m=${N}5", ["a.n=4", "a.m=45"]),
        ("python x a.n=${N:-7}", ["a.n=7"]),
        ("N=1; M=${N:-7}; python x a.m=$M", ["a.m=1"]),
        ("A=${B:-${C:-deep}}\npython x a.a=$A", ["a.a=deep"]),
        ("export A=1 B=2\npython x a.a=$A a.b=$B", ["a.a=1", "a.b=2"]),
        ('python x a.a=\'["x","$y"]\' a.b="it\'s"', ['a.a=["x","$y"]', "a.b=it's"]),
        ("N=3\npython x a.n=$((N * 2 + (1 - 4) / 2)) a.m=$(( $N % 2 ))", ["a.n=4", "a.m=1"]),
        ("python x a=1 # b=2\n# c=3\npython x d=4", ["a=1", "d=4"]),
        ("a.b=1\nc.d=2", ["a.b=1", "c.d=2"]),
        ('python x --a.b=1 --flag "$@"', ["a.b=1"]),
        ("python x a.path=dir\\ with\\ space", ["a.path=dir with space"]),
        ("", []),
        ("python x a='unclosed", ["a=unclosed"]),
    ],
)
def test_overrides(text, overrides):
    assert _read(text) == overrides


def test_variables_of_the_environment_win_over_defaults_only():
    text = "N=${N:-1}\nM=2\npython x a.n=$N a.m=$M"
    assert _read(text, N="5", M="5") == ["a.n=5", "a.m=2"]


@pytest.mark.parametrize("value", ["$(date +%s)", "${UNSET}", "$UNSET", "$((X * 2 ** 9))", "`id`"])
def test_what_cannot_be_known_is_kept_as_written_and_reported(value):
    script = read_script(f"python x a.b={value} c.d=1")
    assert any(word.startswith("a.b=") for word in script.unresolved)
    assert script.overrides[-1] == "c.d=1"


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "made"
    _read(f"python x a=$(touch {target}) b=`touch {target}` c=$(( __import__('os') ))")
    assert not target.exists()


def test_a_whole_script():
    overrides = _read(SOD)
    assert len(overrides) == len(re.findall(r"[\s+][a-z_]+(?:\.[a-z_]+)+=", SOD)) > 50
    assert overrides[0] == "algorithm.adv_estimator=grpo"
    assert "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=92160" in overrides
    assert "trainer.default_local_dir=./ckpt/sod_small" in overrides
    assert read_script(SOD).unresolved == []
