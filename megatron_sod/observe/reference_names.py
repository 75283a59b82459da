"""The reference's names beside ours, so that dashboards made for it go on working.

Where the same quantity exists there, it is logged under both names. Where the reference computes
something else under a name, the value here is what the name says: best@k is the unbiased pass@k,
maj@k is exact, and actor/token_kl is teacher - student, minus the k1 estimate of the KL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# reference: ours
_SAME = {
    "actor/entropy": "actor/student_entropy",
    "actor/token_kl/max": "sod/r_max",
    "actor/token_kl/min": "sod/r_min",
    "actor/token_kl/std": "sod/r_std",
    "response_length/clip_ratio": "rollout/truncated_rate",
    "rollout/tool_success_rate": "tool/ok_rate",
    "global_seqlen/mean": "rollout/rank_tokens",
    "global_seqlen/balanced_max": "rollout/rank_tokens_max",
    "global_seqlen/balanced_min": "rollout/rank_tokens_min",
    "perf/total_num_tokens": "rollout/total_tokens",
    "perf/time_per_step": "time/total_s",
    "timing_s/gen": "time/rollout_s",
    "timing_s/ref": "time/score_s",
    "timing_s/update_actor": "time/train_s",
    "timing_s/save_checkpoint": "time/save_s",
    "timing_s/testing": "time/eval_s",
    "timing_s/step": "time/total_s",
    **{
        f"timing_s/agent_loop/slowest/{theirs}": f"time/slowest_{ours}"
        for theirs, ours in (
            ("generate_sequences", "generate_s"),
            ("tool_calls", "tools_s"),
            ("prompt_length", "prompt_length"),
            ("response_length", "response_length"),
        )
    },
    "training/global_step": "iteration",
    "training/epoch": "rollout/epoch",
}
# reference, with /mean, /max and /min: (ours, what our mean is called), with _max and _min
_SPREAD = {
    "critic/score": ("rollout/score", "_mean"),
    "critic/rewards": ("rollout/reward", "_mean"),
    "critic/advantages": ("actor/advantage", ""),
    "critic/returns": ("actor/group_advantage", ""),
    "response_length": ("rollout/response_length", ""),
    "prompt_length": ("rollout/prompt_length", ""),
    "tool_call_counts": ("rollout/tool_calls", "_avg"),
    "timing_s/agent_loop/generate_sequences": ("time/generate_s", ""),
    "timing_s/agent_loop/tool_calls": ("time/tools_s", ""),
}
REFERENCE_NAMES = _SAME | {
    f"{theirs}/{end}": f"{ours}{mean if end == 'mean' else '_' + end}"
    for theirs, (ours, mean) in _SPREAD.items()
    for end in ("mean", "max", "min")
}
_PER_TOKEN = {
    "gen": ("time/rollout_s", "rollout/tokens"),
    "ref": ("time/score_s", "rollout/total_tokens"),
    "update_actor": ("time/train_s", "rollout/total_tokens"),
}


def with_reference_names(scalars: Mapping[str, float]) -> dict[str, float]:
    """The scalars of an iteration, and those the reference knows under its names."""
    extra = {name: scalars[ours] for name, ours in REFERENCE_NAMES.items() if ours in scalars}
    if "actor/kl_k1" in scalars:
        extra["actor/token_kl/mean"] = -scalars["actor/kl_k1"]
    for ours, end in (("", "mean"), ("_max", "max"), ("_min", "min")):
        if f"rollout/num_turns{ours}" in scalars:
            extra[f"num_turns/{end}"] = _with_user_turns(scalars[f"rollout/num_turns{ours}"])
    for name, (seconds, tokens) in _PER_TOKEN.items():
        if scalars.get(tokens) and seconds in scalars:
            extra[f"timing_per_token_ms/{name}"] = 1000 * scalars[seconds] / scalars[tokens]
    return {**scalars, **extra}


def validation_scalars(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Evaluation numbers of each data source under the reference's names.

    val-core/SOURCE/acc/{mean@n, best@n/mean, maj@n/mean} for all n samples of a prompt, and
    val-aux/SOURCE/acc/{best@k/mean, maj@k/mean} for fewer; val-aux/num_turns/* over all. Nothing
    for a source without a graded sample.

    Args:
        sources: as megatron_sod.eval.report.summarise_samples gives them.
    """
    found: dict[str, float] = {}
    for source, numbers in sources.items():
        n = numbers["num_samples"]
        if not numbers["num_graded"]:
            continue
        found[f"val-core/{source}/acc/mean@{n}"] = numbers[f"avg@{n}"]
        for theirs, ours in (("best", "pass"), ("maj", "maj")):
            for k, value in numbers[ours].items():
                section = "core" if int(k) == n else "aux"
                if value is not None and int(k) > 1:
                    found[f"val-{section}/{source}/acc/{theirs}@{k}/mean"] = value
    graded = [s for s in sources.values() if s["num_graded"]]
    if graded:
        total = sum(s["num_graded"] for s in graded)
        turns = sum(s["num_turns"] * s["num_graded"] for s in graded) / total
        found |= {
            "val-aux/num_turns/mean": _with_user_turns(turns),
            "val-aux/num_turns/max": _with_user_turns(max(s["num_turns_max"] for s in graded)),
            "val-aux/num_turns/min": _with_user_turns(min(s["num_turns_min"] for s in graded)),
        }
    return found


def _with_user_turns(num_turns: float) -> float:
    """The reference counts assistant turns, the tool results between them, and one more."""
    return 2 * num_turns
