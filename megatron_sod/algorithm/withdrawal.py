"""How much of the teacher is left: a linear fall of the distillation coefficient."""

from __future__ import annotations


def withdrawn(
    coef: float, iteration: int, *, start_iteration: int, end_iteration: int, final_coef: float
) -> float:
    """The distillation coefficient of an iteration.

    coef up to start_iteration, final_coef from end_iteration on, linear between. A teacher weaker
    than the student it has trained holds it back; this lets go of it.

    Args:
        coef, final_coef: dimensionless, >= 0.
        iteration: 1, 2, ...
    """
    done = (iteration - start_iteration) / (end_iteration - start_iteration)
    return coef + (final_coef - coef) * min(max(done, 0.0), 1.0)
