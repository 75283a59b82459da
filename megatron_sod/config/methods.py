"""What each method's name presets. A key the user gives wins over the preset."""

from __future__ import annotations

PRESETS: dict[str, dict] = {
    "sod": {"distill": {"step_weight": {"policy": "sod"}}},
    "sod_no_grpo": {"grpo": {"coef": 0.0}, "distill": {"step_weight": {"policy": "sod"}}},
    "opd": {"distill": {"step_weight": {"policy": "uniform"}}},
    "opd_naive": {"grpo": {"coef": 0.0}, "distill": {"step_weight": {"policy": "uniform"}}},
    "grpo": {"distill": {"coef": 0.0}},
}
