"""An evaluation without engines: samples that answer by script, kept in a real folder."""

from __future__ import annotations

from pathlib import Path

from megatron_sod.config.load import load_eval_config
from megatron_sod.config.schema import SodConfig
from megatron_sod.eval.evaluation import run_samples
from megatron_sod.eval.folder import Folder
from megatron_sod.eval.tasks import eval_tasks
from megatron_sod.types import Prompt, Step, Trajectory
from tests.helpers.tokenizers import tiny_tokenizer

NUM_SAMPLES = 3


def eval_config(model: str, *overrides: str, data=("tiny_world:heldout:5",)) -> SodConfig:
    """Five tasks, three samples each, unless the overrides say otherwise."""
    return load_eval_config(
        None, ["data.tools_in_prompt=false", *overrides], model=model,
        data=list(data), num_samples=NUM_SAMPLES,
    )  # fmt: skip


def evaluate(config: SodConfig, out: Path, sampler: Sampler) -> dict:
    """The report of a folder that `sampler` fills."""
    folder = Folder(out, config, eval_tasks(config))
    run_samples(folder, folder.todo(), sampler)
    return folder.finish()


class Sampler:
    """Answers every prompt rightly in its first sample and with 0 in the others.

    `lost` maps (place of the prompt among those asked, sample) to the finish reason of a sample
    that infrastructure spoils.
    """

    def __init__(
        self, fail_after: int | None = None, lost: dict[tuple[int, int], str] | None = None
    ):
        self.asked: list[tuple[str, str]] = []
        self._fail_after, self._lost = fail_after, lost or {}

    def __call__(self, prompts: list[Prompt], tag: str, num_samples: int) -> list[Trajectory]:
        found = []
        for prompt in prompts:
            if self._fail_after is not None and len(self.asked) == self._fail_after:
                raise KeyboardInterrupt
            place = len(self.asked)
            self.asked.append((tag, prompt.prompt_id))
            for number in range(num_samples):
                text = prompt.answer if number == 0 else "0"
                reason = self._lost.get((place, number), "answer")
                found.append(_answered(prompt, tag, number, text, reason))
        return found


def _answered(prompt: Prompt, tag: str, number: int, text: str, reason: str) -> Trajectory:
    ids = tiny_tokenizer()(f"\\boxed{{{text}}}<|im_end|>")["input_ids"]
    return Trajectory(
        trajectory_id=f"{prompt.prompt_id}/{tag}/{number}",
        prompt_id=prompt.prompt_id,
        prompt_token_ids=prompt.token_ids,
        response_token_ids=ids,
        loss_mask=[True] * len(ids),
        step_ids=[1] * len(ids),
        rollout_logprobs=[0.0] * len(ids),
        policy_versions=[0] * len(ids),
        steps=(Step(1, "none", len(ids)),),
        finish_reason=reason,
        reward=float(text == prompt.answer) if reason == "answer" else float("nan"),
        policy_version=0,
    )
