"""The training benchmark counts what it says, and runs the real loop where there is no engine.

Layers: synthetic rollouts and arithmetic; one real start of torchrun with a tiny model (slow).
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import yaml

from megatron_sod.data.synthetic import long_trajectories
from megatron_sod.errors import DataError
from megatron_sod.plan import throughput

ROOT = Path(__file__).resolve().parents[2]
WORK = throughput.Work("tiny", "tiny", 1, 3, 2, 4, 7, 40)


def test_rollouts_have_the_proportions_of_real_ones():
    found = long_trajectories(
        40, 16, prompt_length=7, mean_response_length=500, vocab_size=300, seed=0
    )
    lengths = [len(t.response_token_ids) for t in found]
    taught = sum(sum(t.loss_mask) for t in found) / sum(lengths)
    assert statistics.mean(lengths) == pytest.approx(500, rel=0.1)
    assert taught == pytest.approx(0.9, abs=0.01)
    assert {len(t.prompt_token_ids) for t in found} == {7}
    assert all(t.is_valid and len(t.steps) == 4 for t in found)
    for trajectory in found[:20]:
        for step in trajectory.steps:
            assert trajectory.step_ids.count(step.step_id) == step.num_tokens


def test_the_first_iteration_is_not_timed_and_memory_is_the_highest():
    rows = [
        {
            "time/score_s": score,
            "time/train_s": 2 * score,
            "rollout/tokens": 244.0,
            "memory/host_rss_gb": 3.0 - score,
            "memory/cuda_allocated_peak_gb": 9.0 - score,
        }
        for score in (1.5, 0.5, 1.0, 0.5)
    ]
    cells = throughput.cells(WORK, rows, ["distill.loss=jsd"])
    assert cells[3] == "distill.loss=jsd"
    # 244 response and 2 * 4 * 7 prompt tokens in 1.5, 3 and 1.5 seconds
    assert cells[4:] == ["300", "0.50", "1.00", "200", "8.5", "2.5"]
    assert throughput.page([cells], "x").count("| 8.5 |") == 1


def test_one_iteration_is_no_measurement():
    with pytest.raises(DataError, match="at least 2"):
        throughput.cells(WORK, [{}], [])


@pytest.mark.slow
def test_the_real_loop_runs_without_an_engine(tmp_path, monkeypatch):
    sizes = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 600,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sizes))
    monkeypatch.setattr(throughput, "MODELS", tmp_path)
    cells = throughput.measure(ROOT, tmp_path, WORK, ["teacher.param_offload=true"])
    tokens = []
    for iteration in (2, 3):
        found = long_trajectories(
            2, 4, prompt_length=7, mean_response_length=40, vocab_size=384, seed=iteration
        )
        tokens.append(sum(t.num_tokens for t in found))
    assert float(cells[4]) == round(statistics.median(tokens))
    assert float(cells[7]) > 0
