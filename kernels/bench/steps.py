"""Step weights of a whole rollout batch: time, and the ratio to the equations' literal loop."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_sod.ops import packed_step_weights  # noqa: E402
from tests.helpers.paper_forms import step_divergence_loop, step_weights_loop  # noqa: E402


def batch(trajectories: int = 1024, steps: int = 16, tokens: int = 7_000_000):
    """Packed logprobs and int32 ids; step lengths vary threefold, every token counts."""
    generator = torch.Generator().manual_seed(0)
    mean = tokens // (trajectories * steps)
    lengths = torch.randint(
        mean // 2, mean * 3 // 2 + 1, (trajectories * steps,), generator=generator
    )
    keys = torch.arange(trajectories * steps).repeat_interleave(lengths)
    student = -torch.rand(len(keys), generator=generator)
    teacher = student + torch.randn(len(keys), generator=generator) * 0.3
    return student, teacher, (keys % steps + 1).int(), (keys // steps).int()


def literal(student, teacher, steps, rows, trajectories: int) -> list[list[float]]:
    """Eq. 6-7 token by token for the first `trajectories` trajectories."""
    weights = []
    for n in range(trajectories):
        mine = rows == n
        d = step_divergence_loop(
            student[mine].tolist(), teacher[mine].tolist(), steps[mine].tolist()
        )
        weights.append(step_weights_loop(d, 0.2, 1e-6))
    return weights


def measure(repetitions: int = 9, sampled_trajectories: int = 16) -> dict[str, float]:
    """Milliseconds of both, largest difference of the weights. The loop runs on a sample."""
    trajectories, num_steps = 1024, 16
    case = batch(trajectories, num_steps)
    times = []
    for _ in range(repetitions + 1):
        begin = time.process_time()
        _, w, _, _ = packed_step_weights(*case, trajectories, num_steps)
        times.append(time.process_time() - begin)
    begin = time.process_time()
    loop = literal(*case, sampled_trajectories)
    loop_s = (time.process_time() - begin) * trajectories / sampled_trajectories
    error = max(
        abs(float(w[n, k]) - weight) for n, row in enumerate(loop) for k, weight in enumerate(row)
    )
    ours_s = statistics.median(times[1:])
    return {
        "tokens": len(case[0]),
        "ours_ms": ours_s * 1e3,
        "loop_ms": loop_s * 1e3,
        "ratio": loop_s / ours_s,
        "largest_difference": error,
    }
