"""The engine simulation against cases that can be reckoned by hand.

Layer: pure. What a step costs on real machines is not tested here, nor anywhere without one.
"""

from dataclasses import replace

import pytest

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.plan.engines import EngineSpeed, simulate_rollout
from megatron_sod.plan.geometries import shipped_geometry
from megatron_sod.plan.hardware import HARDWARE
from megatron_sod.plan.job import PlannedModel
from megatron_sod.plan.trajectories import Draw

# Only the overhead costs anything: every decode step takes 0.1 s.
STEP_S = 0.1
FREE = HARDWARE["h100-80gb"].scaled(
    peak_flops=1e30, memory_bandwidth=1e30, decode_overhead_s=STEP_S, decode_sequence_s=0.0
)


def _speed(**changes) -> EngineSpeed:
    model = PlannedModel("", shipped_geometry("qwen3-0.6b"), ParallelConfig(), "bfloat16")
    speed = EngineSpeed(
        model=model,
        hardware=FREE,
        tensor_parallel_size=1,
        max_num_seqs=4,
        cache_tokens=1e9,
        weight_bytes=0,
        token_bytes=0.0,
    )
    return replace(speed, **changes)


def _draw(turn_tokens: int, *latencies: float) -> Draw:
    return Draw(10, len(latencies) + 1, turn_tokens, 5, tuple(latencies))


def test_one_sequence_takes_its_tokens_and_its_tools():
    result = simulate_rollout([_draw(30, 2.0, 1.5)], _speed(), num_engines=1)
    assert result.wall_s == pytest.approx(3 * 30 * STEP_S + 3.5)
    assert result.idle_share == pytest.approx(3.5 / result.wall_s)
    assert result.tool_share == pytest.approx(3.5 / result.wall_s)


def test_sequences_decoded_together_take_as_long_as_the_longest():
    result = simulate_rollout([_draw(n) for n in (10, 40, 25)], _speed(), num_engines=1)
    assert result.wall_s == pytest.approx(40 * STEP_S)
    # 10 steps of three, 15 of two, 15 of one
    assert result.mean_running == pytest.approx((30 + 30 + 15) / 40)


def test_a_full_engine_makes_the_next_sequence_wait():
    result = simulate_rollout([_draw(20)] * 5, _speed(max_num_seqs=2), num_engines=1)
    assert result.wall_s == pytest.approx(3 * 20 * STEP_S)


def test_a_full_cache_makes_the_next_sequence_wait():
    room_for_two = _speed(cache_tokens=2 * (10 + 20))
    assert simulate_rollout([_draw(20)] * 4, room_for_two, num_engines=1).wall_s == pytest.approx(
        2 * 20 * STEP_S
    )


def test_a_sequence_larger_than_the_cache_still_ends():
    result = simulate_rollout([_draw(20)] * 2, _speed(cache_tokens=5), num_engines=1)
    assert result.wall_s == pytest.approx(2 * 20 * STEP_S)


def test_tools_queue_when_there_are_few_slots():
    draws = [_draw(10, 4.0)] * 3
    free = simulate_rollout(draws, _speed(), num_engines=1)
    one = simulate_rollout(draws, _speed(), num_engines=1, tool_slots=1)
    assert free.wall_s == pytest.approx(2 * 10 * STEP_S + 4.0)
    assert one.wall_s == pytest.approx(2 * 10 * STEP_S + 12.0)


def test_trajectories_beyond_the_limit_start_when_others_end():
    draws = [_draw(10)] * 6
    limited = simulate_rollout(draws, _speed(), num_engines=2, max_in_flight=2)
    assert limited.wall_s == pytest.approx(3 * 10 * STEP_S)


def test_engines_share_the_trajectories():
    result = simulate_rollout([_draw(30), _draw(10)], _speed(), num_engines=2)
    assert result.wall_s == pytest.approx(30 * STEP_S)
    assert result.idle_share == pytest.approx(20 / 60)  # one engine idles after its 10 steps


def test_prefill_delays_decoding():
    slow = FREE.scaled(peak_flops=1e12, prefill_efficiency=1.0)
    speed = _speed(hardware=slow)
    result = simulate_rollout([_draw(10)], speed, num_engines=1)
    decode = 10 * speed.step_s(1, 10)
    assert result.wall_s == pytest.approx(decode + speed.prefill_s(10, 5), rel=1e-3)


def test_a_step_reads_the_weights_and_the_cache_once():
    hardware = HARDWARE["h100-80gb"].scaled(
        decode_overhead_s=0.0, decode_sequence_s=0.0, decode_efficiency=1.0
    )
    speed = _speed(hardware=hardware, weight_bytes=3_350_000_000, token_bytes=1000.0)
    # 3.35 GB of weights at 3.35 TB/s are 1 ms; 100 k tokens of 1 kB are 0.03 ms
    assert speed.step_s(8, 100_000) == pytest.approx(1e-3 + 1e8 / 3.35e12)


def test_a_small_batch_does_not_read_every_expert():
    model = PlannedModel("", shipped_geometry("qwen3-30b-a3b"), ParallelConfig(), "bfloat16")
    hardware = HARDWARE["h100-80gb"].scaled(
        decode_overhead_s=0.0, decode_sequence_s=0.0, decode_efficiency=1.0
    )
    speed = _speed(model=model, hardware=hardware, weight_bytes=61_000_000_000)
    assert speed.step_s(1, 1) == pytest.approx(61e9 * 8 / 128 / 3.35e12, rel=1e-3)
    assert speed.step_s(200, 1) == pytest.approx(61e9 / 3.35e12, rel=1e-3)
