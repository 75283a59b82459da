"""The three shapes a trajectory's trust takes (arXiv 2605.07725, figures 5 and 6), told by rule.

Read from the divergences alone, so that runs under any weight policy can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

PATTERNS = ("stable", "erroneous", "recovery", "mixed", "short")
LOW, HIGH = 0.5, 0.8
RULES = {
    "stable": f"trust never falls below {HIGH}",
    "erroneous": f"trust ends below {LOW}",
    "recovery": f"trust fell below {LOW} and ends at {HIGH} or more",
    "mixed": "none of the three",
    "short": "fewer than two scored steps",
}


def pattern_of(divergences: Sequence[float | None], *, epsilon: float) -> str:
    """One of PATTERNS. The trust of step k is (d_1 + epsilon) / (d_k + epsilon).

    Args:
        divergences: d_k of each step in nats, None where the step was not scored.
        epsilon: the run's distill.step_weight.epsilon.
    """
    scored = [d for d in divergences if d is not None]
    if len(scored) < 2:
        return "short"
    trust = [(scored[0] + epsilon) / (d + epsilon) for d in scored]
    if min(trust) >= HIGH:
        return "stable"
    if trust[-1] < LOW:
        return "erroneous"
    return "recovery" if min(trust) < LOW and trust[-1] >= HIGH else "mixed"
