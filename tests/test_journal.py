"""What a row of metrics.jsonl holds of the incidents since the row before it.

Layer: pure; the session is a stand-in. A real run's rows: tests/end_to_end.
"""

from collections import Counter
from types import SimpleNamespace

import pytest

from megatron_sod.journal import log

METRICS = {"time/total_s": 2.0, "rollout/total_tokens": 80.0}


@pytest.fixture
def session():
    rows = []
    return SimpleNamespace(
        is_main=True,
        progress=SimpleNamespace(iteration=3, num_prompts_drawn=12),
        config=SimpleNamespace(
            train=SimpleNamespace(train_batch_size=4), cluster=SimpleNamespace(world_size=2)
        ),
        prompts=[None] * 8,
        run_dir=SimpleNamespace(append=lambda name, row: rows.append((name, row))),
        loggers=[],
        controller=None,
        rows=rows,
    )


def _incidents(session):
    name, row = session.rows[-1]
    assert name == "metrics.jsonl"
    return {name: n for name, n in row.items() if name.endswith(("_restarts", "_retries"))}


def test_incidents_are_in_the_next_row_and_in_no_other(session):
    counts = [Counter(engine_restarts=1, sandbox_retries=3), Counter()]
    session.controller = SimpleNamespace(take_counts=lambda: counts.pop(0))
    log(session, METRICS)
    assert _incidents(session) == {"rollout/engine_restarts": 1.0, "rollout/sandbox_retries": 3.0}
    log(session, METRICS)
    assert _incidents(session) == {}


def test_a_replay_has_no_incidents(session):
    log(session, METRICS)
    assert _incidents(session) == {} and session.rows[-1][1]["perf/throughput"] == 20.0
