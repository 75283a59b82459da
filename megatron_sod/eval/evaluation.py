"""Evaluate a model directory: sample, grade, report; eval/folder.py keeps what is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sod.config.schema import SodConfig
from megatron_sod.convert.megatron_files import is_megatron_checkpoint
from megatron_sod.errors import ModelError, SandboxError
from megatron_sod.eval.folder import Folder
from megatron_sod.eval.tasks import eval_tasks
from megatron_sod.observe.loggers import open_loggers
from megatron_sod.observe.progress import progress
from megatron_sod.rollout.breaker import check_losses
from megatron_sod.types import Prompt, Trajectory

if TYPE_CHECKING:
    from megatron_sod.rollout.controller import RolloutController

# (prompts, tag, number of samples) -> trajectories, in prompt order
Sample = Callable[[list[Prompt], str, int], list[Trajectory]]


def evaluate_model(config: SodConfig, out: str | Path) -> dict[str, Any]:
    """Start engines and sandbox, evaluate `config.student`, write and return the report.

    Raises:
        ModelError: the model is a Megatron checkpoint, which engines cannot load.
        RolloutError: too many samples were lost to infrastructure.
    """
    if is_megatron_checkpoint(model := config.student.path):
        raise ModelError(
            f"{model}: a Megatron checkpoint; engines load Hugging Face directories: convert it "
            f"with tools/convert_megatron_to_hf.py --checkpoint {model} --out DIR"
        )
    from megatron_sod.rollout.controller import RolloutController
    from megatron_sod.rollout.ray_instance import stop_ray

    folder = Folder(out, config, eval_tasks(config))
    loggers = open_loggers(config, folder.path)
    todo = folder.todo()
    if todo:
        controller = RolloutController(config, config.student, load_weights=True)
        try:
            controller.wait_until_ready("engines")
            _check_level(controller.fleet.sandbox_level, folder.sandbox_level)
            run_samples(folder, todo, _sampler(controller, config))
        finally:
            controller.close()
            stop_ray()
    report = folder.finish()
    for logger in loggers:
        logger.log(0, report["scalars"])
        logger.close()
    return report


def _sampler(controller: RolloutController, config: SodConfig) -> Sample:
    def sample(prompts: list[Prompt], tag: str, num_samples: int) -> list[Trajectory]:
        return controller.rollout(
            prompts,
            tag=tag,
            num_generations=num_samples,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
        )

    return sample


def _check_level(found: str, expected: str) -> None:
    """The protocol names the level of this machine; workers may run on another one."""
    if found != expected:
        raise SandboxError(
            f"the workers' sandbox has isolation level {found}, the protocol {expected}, which "
            f"this machine allows; set sandbox.level={found}, or evaluate where the workers run"
        )


def run_samples(folder: Folder, todo: list[tuple[int, Prompt]], sample: Sample) -> None:
    """Sample all groups of `todo`, some at a time; each round is on disk before the next.

    Raises:
        RolloutError: of all samples there are, more than watchdog.max_infra_error_rate were lost
            by this call. What was lost before is sampled again and no longer counts.
    """
    evaluation = folder.config.eval
    done, lost = 0, Counter[str]()
    with progress("evaluation", len(todo), unit="prompt") as bar:
        for seed in evaluation.seeds:
            mine = [prompt for s, prompt in todo if s == seed]
            for start in range(0, len(mine), evaluation.prompts_per_round):
                some = mine[start : start + evaluation.prompts_per_round]
                found = sample(some, f"eval-seed{seed}", evaluation.num_samples)
                for number, prompt in enumerate(some):
                    begin = number * evaluation.num_samples
                    folder.add(seed, prompt, found[begin : begin + evaluation.num_samples])
                lost += Counter(t.finish_reason for t in found if not t.is_valid)
                check_losses(
                    lost,
                    folder.num_graded + lost.total(),
                    folder.config.watchdog,
                    meanwhile=f"what was graded is in {folder.path}, no report was written",
                    resume="the same command goes on with what is missing",
                )
                rewards = [t.reward for t in found if t.is_valid]
                done += len(some)
                bar.update(done, score=sum(rewards) / max(len(rewards), 1))
