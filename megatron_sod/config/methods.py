"""What each method's name presets. A key the user gives wins over the preset."""

from __future__ import annotations

_SELF = {"source": "self"}


def _weighted(policy: str) -> dict:
    return {"distill": {"step_weight": {"policy": policy}}}


_NO_GRPO = {"grpo": {"coef": 0.0}}

PRESETS: dict[str, dict] = {
    "sod": _weighted("sod"),
    "sod_no_grpo": _weighted("sod") | _NO_GRPO,
    # the paper's ablations of w_k
    "sod_no_cap": _weighted("no_cap"),
    "sod_running_clip": _weighted("running_clip"),
    "sod_heuristic": _weighted("heuristic"),
    "sod_mask_after_wrong": _weighted("mask_after_wrong"),
    # plain on-policy distillation: every step weighs the same
    "opd": _weighted("uniform"),
    "opd_naive": _weighted("uniform") | _NO_GRPO,
    # the student's own initial weights as teacher, told the answer or a hint
    "opsd_gt": _weighted("uniform") | {"teacher": _SELF | {"privileged": "answer"}},
    "opsd_hint": _weighted("uniform") | {"teacher": _SELF | {"privileged": "hint"}},
    "grpo": {"distill": {"coef": 0.0}},
}

# The reference clips no log-ratio. Where it computes something by mistake (a token mean per
# micro-batch, group advantages of constant rewards) this project does not follow it.
REF_COMPAT: dict = {"distill": {"log_ratio_clip": None}}
