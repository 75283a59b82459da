"""Random steps and every policy, for comparing the page's arithmetic with the trainer's."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

from megatron_sod.algorithm import step_weights

_POLICIES = ("sod", "uniform", "no_cap", "running_clip", "heuristic", "mask_after_wrong")
CASES = [
    {"policy": policy, "delta": delta, "epsilon": epsilon, "dFloor": floor, "wMin": w_min}
    for policy in _POLICIES
    for delta, epsilon, floor, w_min in (
        (0.2, 1e-6, None, None),
        (0.0, 0.05, None, 0.1),
        (1.5, 1e-3, 0.3, None),
    )
]
WRONG = [False, True, True, False]  # ok, user_error, timeout, infra_error


def case_inputs(num_trajectories: int = 60) -> dict:
    """Flat columns of trajectories of 1 to 7 steps over 3 iterations; some steps not scored."""
    rng = random.Random(7)
    run: dict = {"start": [0], "iteration": [], "d": [], "outcome": [], "wrong": WRONG}
    for i in range(num_trajectories):
        num_steps = rng.randint(1, 7)
        for _ in range(num_steps):
            is_scored, is_zero = rng.random() > 0.1, rng.random() < 0.1
            d = 0.0 if is_zero else float(np.float32(rng.expovariate(3)))
            run["d"].append(d if is_scored else None)
            run["outcome"].append(rng.randrange(len(WRONG)))
        run["start"].append(len(run["d"]))
        run["iteration"].append(1 + i % 3)
    return run


def expected(run: dict, options: dict) -> np.ndarray:
    """[M] the trainer's weights, NaN where a step is not scored; iterations are its batches."""
    flat = np.full(len(run["d"]), math.nan)
    for iteration in sorted(set(run["iteration"])):
        members = [i for i, at in enumerate(run["iteration"]) if at == iteration]
        spans = [(run["start"][i], run["start"][i + 1]) for i in members]
        width = max(end - begin for begin, end in spans)
        d, valid = torch.zeros(len(spans), width), torch.zeros(len(spans), width).bool()
        wrong = torch.zeros(len(spans), width).bool()
        for row, (begin, end) in enumerate(spans):
            for k, m in enumerate(range(begin, end)):
                valid[row, k] = run["d"][m] is not None
                d[row, k] = run["d"][m] or 0.0
                wrong[row, k] = WRONG[run["outcome"][m]]
        weights = step_weights(
            d,
            valid,
            policy=options["policy"],
            delta=options["delta"],
            epsilon=options["epsilon"],
            wrong_BK=wrong,
            d_floor=options["dFloor"],
            w_min=options["wMin"],
        )
        for row, (begin, end) in enumerate(spans):
            found = torch.where(valid[row], weights[row], math.nan)
            flat[begin:end] = found[: end - begin].numpy()
    return flat


def assert_same_weights(found: np.ndarray, wanted: np.ndarray, options: dict) -> None:
    assert np.isfinite(wanted).sum() > 100
    np.testing.assert_allclose(found, wanted, rtol=2e-7, atol=0, err_msg=str(options))
