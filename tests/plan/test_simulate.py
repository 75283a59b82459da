"""What the simulator and the estimates must do whatever their constants: laws, not values.

Layer: pure. Times on real GPUs are not claimed; measured CPU runs are compared in docs/planning.md.
"""

import pytest

from megatron_sod.config.schema import SodConfig
from megatron_sod.plan.estimate import forward_flops, phase_times
from megatron_sod.plan.job import job_of
from megatron_sod.plan.scale import gpus_of, what_if
from megatron_sod.plan.simulate import simulate
from megatron_sod.plan.traffic import gradient_traffic, iteration_traffic, transfer_bytes
from megatron_sod.plan.trajectories import Limits, draw_trajectories


def _config(**sections) -> SodConfig:
    values = {
        "cluster": {"gpus_per_node": 4},
        "student": {"path": "models/Qwen3-0.6B", "dtype": "bfloat16"},
        "teacher": {"path": "models/Qwen3-4B", "dtype": "bfloat16"},
        "data": {"train": ["x.jsonl"]},
        "rollout": {"max_response_length": 2048, "engine": {"num_engines": 4}},
        "train": {"num_iterations": 1, "train_batch_size": 8, "ppo_mini_batch_size": 4},
        **sections,
    }
    return SodConfig.model_validate(values)


def test_the_same_seed_gives_the_same_numbers():
    assert simulate(_config()) == simulate(_config())
    assert simulate(_config(seed=1)) != simulate(_config())


def test_phases_add_up_to_the_step():
    times = simulate(_config())
    phases = times.rollout_s + times.score_s + times.train_s + times.transfer_s
    assert times.step_s == pytest.approx(phases)
    assert sum(times.phase_shares.values()) == pytest.approx(1)
    # colocated GPUs idle only where engines do
    assert times.idle_share == pytest.approx(
        times.engine_idle_share * times.rollout_s / times.step_s, rel=0.05
    )


def test_staleness_hides_the_shorter_side_behind_the_longer():
    config = _config(rollout={"placement": "disaggregated", "engine": {"num_engines": 4}})
    strict, late = simulate(config, staleness=0), simulate(config, staleness=1)
    longer = max(late.rollout_s, late.score_s + late.train_s)
    assert late.step_s == pytest.approx(longer + late.transfer_s, rel=0.05)
    assert late.step_s < strict.step_s and late.idle_share < strict.idle_share
    assert late.num_gpus == gpus_of(config) == 8


def test_slow_tools_lengthen_the_rollout_and_nothing_else():
    fast, slow = (simulate(_config(plan={"tool_latency_s": s})) for s in (0.0, 60.0))
    assert slow.rollout_s > fast.rollout_s + 60
    assert slow.train_s == pytest.approx(fast.train_s)
    assert slow.tool_share > 0.5 > fast.tool_share == 0


def test_long_tails_leave_engines_idle():
    plans = ({"response_spread": s, "tool_latency_s": 0.0} for s in (0.0, 1.2))
    even, spread = (simulate(_config(plan=plan)) for plan in plans)
    assert spread.engine_idle_share > even.engine_idle_share


def test_drawn_lengths_keep_their_mean_and_their_limits():
    plan = _config(plan={"mean_response_share": 0.25, "mean_turns": 3.0}).plan
    draws = draw_trajectories(plan, Limits(100, 8000, 16), count=4000, seed=0)
    responses = [draw.tokens - 100 for draw in draws]
    assert sum(responses) / 4000 == pytest.approx(2000, rel=0.06)  # the cut takes a little
    assert max(responses) <= 8000 * 1.01  # rounded per turn
    assert sum(draw.num_turns for draw in draws) / 4000 == pytest.approx(3.0, rel=0.05)


def test_flops_are_two_for_each_parameter_a_token_meets():
    # 8B: (8.19 - 2 x 0.622) B parameters in layers, the head once for rows with loss
    job = job_of(_config(student={"path": "models/Qwen3-8B", "dtype": "bfloat16"}))
    flops = forward_flops(job.student, tokens=1.0, rows=1.0, context=0.0)
    assert flops / 2 == pytest.approx(8.19e9 - 151_936 * 4096, rel=2e-3)


def test_attention_is_counted_over_half_the_context():
    student = job_of(_config()).student
    more = forward_flops(student, 1.0, 0.0, 1000.0) - forward_flops(student, 1.0, 0.0, 0.0)
    # 28 layers, 16 heads of 128: two products of 2 x 2048 x 500 each
    assert more == 28 * 2 * 2 * 2048 * 500


def test_twice_the_gpus_take_half_the_time_without_communication():
    single = phase_times(job_of(_config(cluster={"gpus_per_node": 1})))
    eight = job_of(_config(cluster={"gpus_per_node": 8}))
    compute = phase_times(eight).train_s - gradient_traffic(eight) / (450e9 * 0.7)
    assert compute == pytest.approx(single.train_s / 8)


def test_gradient_traffic_is_a_ring_over_data_parallel_ranks():
    job = job_of(_config())
    parameters = 596_049_920  # Qwen3-0.6B
    # 2 optimizer steps; float32 gradients reduced, bfloat16 weights gathered; 3/4 of each sent
    assert gradient_traffic(job) == pytest.approx(2 * parameters * (4 + 2) * 3 / 4, rel=1e-3)


def test_every_engine_receives_one_student():
    assert transfer_bytes(job_of(_config())) == 4 * 2 * 596_049_920


def test_one_rank_without_engines_elsewhere_sends_nothing_but_weights():
    assert set(iteration_traffic(job_of(_config(cluster={"gpus_per_node": 1})))) == {"weights"}


def test_what_if_covers_every_variant_at_every_size():
    rows = list(what_if(_config(), [4, 8], grow_batch=True))
    assert [(r.num_gpus, r.placement, r.staleness) for r in rows] == [
        (gpus, placement, staleness)
        for gpus in (4, 8)
        for placement, staleness in (("colocated", 0), ("disaggregated", 0), ("disaggregated", 1))
    ]
    # a batch that grows with the GPUs keeps the work of each
    assert rows[3].tokens == pytest.approx(2 * rows[0].tokens, rel=0.1)
