"""What an evaluation asks: every task once, named by what it says and not by where it stands."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from megatron_sod.config.schema import SodConfig
from megatron_sod.data.sources import read_prompts
from megatron_sod.observe.progress import say
from megatron_sod.rollout.worker import make_chat
from megatron_sod.types import Prompt


@dataclass(frozen=True)
class EvalTasks:
    """The prompts of an evaluation, and how many were left out."""

    prompts: list[Prompt]  # prompt_id: a digest of tokens, answer and source: "9f86d081884c7d65"
    rows: dict[str, str]  # prompt_id -> the row it was read from: "gsm8k.jsonl:17"
    num_too_long: int  # longer than rollout.max_prompt_length
    num_repeated: int  # rows that say the same as an earlier one


def eval_tasks(config: SodConfig) -> EvalTasks:
    """The tasks of data.eval, at most eval.limit of them.

    A task that stands there twice, in one file or under two paths, would be counted as two
    measurements. Named by content, it is one, and its samples are drawn with the same seeds
    wherever the file lies.
    """
    data = config.data
    found, num_too_long = read_prompts(
        data.eval,
        make_chat(config, config.student.path),
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        max_length=config.rollout.max_prompt_length,
    )
    prompts, rows = dict[str, Prompt](), dict[str, str]()
    for prompt in found:
        name = _digest(prompt)
        prompts.setdefault(name, replace(prompt, prompt_id=name))
        rows.setdefault(name, prompt.prompt_id)
    num_repeated = len(found) - len(prompts)
    if num_repeated:
        say(f"data: {num_repeated} rows repeat an earlier one; each task is asked once")
    chosen = list(prompts.values())[: config.eval.limit]
    return EvalTasks(chosen, rows, num_too_long, num_repeated)


def _digest(prompt: Prompt) -> str:
    text = json.dumps([prompt.token_ids, prompt.answer, prompt.data_source])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
