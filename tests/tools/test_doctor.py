"""tools/doctor.py on this machine, for real."""

from __future__ import annotations

import subprocess
import sys

from megatron_sod.observe.doctor import Row, examine
from tests.helpers.launch import ROOT


def test_every_row_that_is_not_ok_has_a_remedy():
    rows = examine(selfcheck_sandbox=False)
    assert {row.state for row in rows} <= {"ok", "missing", "problem"}
    assert all(row.remedy for row in rows if row.state != "ok")
    assert Row("torch", "ok", rows[1].found, is_required=True) == rows[1]


def test_the_command_prints_a_table_and_passes_where_the_suite_runs():
    done = subprocess.run(
        [sys.executable, "tools/doctor.py"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "megatron-core" in done.stdout and "sandbox" in done.stdout
