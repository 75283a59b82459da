"""Evaluate a model directory: sample, grade, report. What is done is kept, so a run can resume.

OUT/protocol.json   what decides the numbers, with its hash; another protocol needs another folder
OUT/samples.jsonl   one record per sample, appended as prompts finish
OUT/report.json     the numbers
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sod.config.schema import SodConfig
from megatron_sod.convert.megatron_files import is_megatron_checkpoint
from megatron_sod.data.sources import load_prompts
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.errors import DataError, ModelError
from megatron_sod.eval.protocol import model_fingerprint, protocol, protocol_hash
from megatron_sod.eval.report import summarise_samples, table_lines
from megatron_sod.eval.samples import sample_record
from megatron_sod.observe.loggers import open_loggers
from megatron_sod.observe.progress import progress, say
from megatron_sod.observe.reference_names import validation_scalars
from megatron_sod.observe.run_dir import read_rows
from megatron_sod.rollout.worker import make_chat
from megatron_sod.types import Prompt, Trajectory

# (prompts, tag, number of samples) -> trajectories, in prompt order
Sample = Callable[[list[Prompt], str, int], list[Trajectory]]


def evaluate_model(config: SodConfig, out: str | Path) -> dict[str, Any]:
    """Start engines and sandbox, evaluate `config.student`, write and return the report.

    Raises:
        ModelError: the model is a Megatron checkpoint, which engines cannot load.
    """
    if is_megatron_checkpoint(model := config.student.path):
        raise ModelError(
            f"{model}: a Megatron checkpoint; engines load Hugging Face directories: convert it "
            f"with tools/convert_megatron_to_hf.py --checkpoint {model} --out DIR"
        )
    from megatron_sod.rollout.controller import RolloutController
    from megatron_sod.rollout.ray_instance import stop_ray

    prompts = eval_prompts(config)
    folder = Folder(out, config, prompts)
    loggers = open_loggers(config, folder.path)
    todo = folder.todo()
    if todo:
        controller = RolloutController(config, config.student, load_weights=True)
        try:
            controller.wait_until_ready("engines")

            def sample(some: list[Prompt], tag: str, num_samples: int) -> list[Trajectory]:
                return controller.rollout(
                    some,
                    tag=tag,
                    num_generations=num_samples,
                    temperature=config.eval.temperature,
                    top_p=config.eval.top_p,
                )

            run_samples(folder, todo, sample)
        finally:
            controller.close()
            stop_ray()
    report = folder.finish()
    for logger in loggers:
        logger.log(0, report["scalars"])
        logger.close()
    return report


def eval_prompts(config: SodConfig) -> list[Prompt]:
    """The prompts of data.eval, at most eval.limit of them."""
    data = config.data
    prompts = load_prompts(
        data.eval,
        make_chat(config, config.student.path),
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        max_length=config.rollout.max_prompt_length,
    )
    return prompts[: config.eval.limit]


class Folder:
    """The output of one evaluation."""

    def __init__(self, out: str | Path, config: SodConfig, prompts: list[Prompt]):
        """
        Raises:
            DataError: the folder holds samples of another protocol or model.
        """
        self.path, self.config, self.prompts = Path(out), config, prompts
        self.tokenizer = load_tokenizer(config.student.path)
        about = protocol(config, prompts)
        self._about = {
            "model": config.student.path,
            "model_fingerprint": model_fingerprint(config.student.path),
            "protocol_hash": protocol_hash(about),
            "protocol": about,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_same()
        self._write("protocol.json", self._about)

    def _check_same(self) -> None:
        stored = self.path / "protocol.json"
        if not stored.is_file() or not (self.path / "samples.jsonl").is_file():
            return
        before = json.loads(stored.read_text())
        for key in ("protocol_hash", "model_fingerprint"):
            if before[key] != self._about[key]:
                raise DataError(
                    f"{self.path}: holds samples of {key} {before[key]}, this evaluation has "
                    f"{self._about[key]}; give another --out, or compare protocol.json"
                )

    def todo(self) -> list[tuple[int, Prompt]]:
        """(seed, prompt) whose samples are not all there."""
        rows = self.rows()
        done = Counter((row["seed"], row["prompt_id"]) for row in rows)
        wanted = self.config.eval.num_samples
        left = [
            (seed, prompt)
            for seed in self.config.eval.seeds
            for prompt in self.prompts
            if done[seed, prompt.prompt_id] < wanted
        ]
        if rows:
            say(f"{len(rows)} samples are there already; {len(left)} groups to go")
        return left

    def add(self, seed: int, prompt: Prompt, trajectories: list[Trajectory]) -> None:
        """Append the samples of one prompt with one write."""
        lines = [
            json.dumps(sample_record(prompt, t, self.tokenizer, seed=seed, sample=number))
            for number, t in enumerate(trajectories)
        ]
        with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def rows(self) -> list[dict]:
        """Records of whole groups; a group a kill cut short is forgotten, and sampled again."""
        rows = read_rows(self.path / "samples.jsonl")
        counts = Counter((row["seed"], row["prompt_id"]) for row in rows)
        wanted = self.config.eval.num_samples
        kept = [row for row in rows if counts[row["seed"], row["prompt_id"]] == wanted]
        if len(kept) < len(rows):
            text = "".join(json.dumps(row) + "\n" for row in kept)
            (self.path / "samples.jsonl").write_text(text, encoding="utf-8")
        return kept

    def finish(self) -> dict[str, Any]:
        """Write report.json; print the table."""
        numbers = summarise_samples(self.rows(), num_samples=self.config.eval.num_samples)
        report = {**self._about, **numbers}
        report["table"] = table_lines(report)
        report["scalars"] = validation_scalars(report["sources"])
        self._write("report.json", report)
        say(f"{report['model']}: protocol {report['protocol_hash']}")
        for line in report["table"]:
            say(line)
        return report

    def _write(self, name: str, value: Any) -> None:
        partial = self.path / (name + ".partial")
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.rename(self.path / name)


def run_samples(folder: Folder, todo: list[tuple[int, Prompt]], sample: Sample) -> None:
    """Sample all groups of `todo`, some at a time; each round is on disk before the next."""
    evaluation = folder.config.eval
    done = 0
    with progress("evaluation", len(todo), unit="prompt") as bar:
        for seed in evaluation.seeds:
            mine = [prompt for s, prompt in todo if s == seed]
            for start in range(0, len(mine), evaluation.prompts_per_round):
                some = mine[start : start + evaluation.prompts_per_round]
                found = sample(some, f"eval-seed{seed}", evaluation.num_samples)
                rewards = [t.reward for t in found if t.is_valid]
                for number, prompt in enumerate(some):
                    begin = number * evaluation.num_samples
                    folder.add(seed, prompt, found[begin : begin + evaluation.num_samples])
                done += len(some)
                bar.update(done, score=sum(rewards) / max(len(rewards), 1))
