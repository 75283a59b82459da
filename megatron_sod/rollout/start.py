"""The engines of a run: started by rank 0, waited for by all.

On a GPU vLLM takes what memory goes while it starts for its own, and gives up when some comes free:
nothing else may come or go there meanwhile, neither a trainer's model nor another engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_sod.config.schema import SodConfig
from megatron_sod.parallel.share import from_rank0

if TYPE_CHECKING:
    from megatron_sod.rollout.controller import RolloutController

STUDENT, TEACHER = "student engines", "teacher engines"


def start_engines(
    config: SodConfig, *, vocab_size: int, machines: Sequence[str], with_teacher: bool
) -> tuple[RolloutController, RolloutController | None]:
    """The student's engines and, `with_teacher`, the teacher's; they start meanwhile. Rank 0."""
    from megatron_sod.rollout.controller import RolloutController  # ranks without one need no Ray

    student = RolloutController(
        config, config.student, load_weights=False, vocab_size=vocab_size, machines=machines
    )
    if not with_teacher or config.teacher is None:
        return student, None
    if torch.cuda.is_available():
        student.wait_until_ready(STUDENT)  # both use the same GPUs
    teacher = RolloutController(
        config, config.teacher, load_weights=True, machines=machines, counts=student.counts
    )
    return student, teacher


def wait_before_models(
    config: SodConfig, student: RolloutController | None, teacher: RolloutController | None
) -> None:
    """Before the trainers load their models: until all engines on their GPUs are ready. A
    collective."""
    if torch.cuda.is_available() and config.rollout.placement == "colocated":
        wait_until_ready(config, student, teacher)


def wait_until_ready(
    config: SodConfig, student: RolloutController | None, teacher: RolloutController | None = None
) -> None:
    """Until these engines answer. A collective; the controllers are on rank 0, and the other ranks
    wait on the store: their GPUs belong to the engines now.

    Raises:
        RolloutError: on rank 0, they do not start, or not in time; PeerFailed on the others.
    """

    def work() -> None:
        for what, controller in ((STUDENT, student), (TEACHER, teacher)):
            if controller is not None:
                controller.wait_until_ready(what)

    if config.rollout.replay is None:
        # Rank 0 may have waited for the student's before it started the teacher's.
        from_rank0(work, timeout_s=3 * config.rollout.engine.start_timeout_s)
