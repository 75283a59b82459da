"""The output of one evaluation. What is done is kept, so that it can go on where it stood.

OUT/protocol.json   what decides the numbers, with its hash; another protocol needs another folder
OUT/samples.jsonl   one record per sample, appended as prompts finish; never rewritten
OUT/report.json     the numbers

A sample lost to infrastructure stays in samples.jsonl and is sampled again by the same command;
the graded record that follows takes its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sod.config.schema import SodConfig
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.errors import DataError
from megatron_sod.eval.protocol import model_fingerprint, protocol, protocol_hash
from megatron_sod.eval.report import summarise_samples, table_lines
from megatron_sod.eval.samples import sample_record
from megatron_sod.eval.tasks import EvalTasks
from megatron_sod.observe.progress import say
from megatron_sod.observe.reference_names import validation_scalars
from megatron_sod.observe.run_dir import read_rows
from megatron_sod.types import Prompt, Trajectory

_Key = tuple[int, str, int]  # seed, prompt_id, sample


class Folder:
    """The records of an evaluation, in memory and on disk."""

    def __init__(self, out: str | Path, config: SodConfig, tasks: EvalTasks):
        """
        Raises:
            DataError: the folder holds samples of another protocol or model.
        """
        self.path, self.config, self.tasks = Path(out), config, tasks
        self.tokenizer = load_tokenizer(config.student.path)
        about = protocol(config, tasks.prompts)
        self._about: dict[str, Any] = {
            "model": config.student.path,
            "model_fingerprint": model_fingerprint(config.student.path),
            "protocol_hash": protocol_hash(about),
            "protocol": about,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        self._samples = self.path / "samples.jsonl"
        self._check_same()
        self._write("protocol.json", self._about)
        self._wanted = dict.fromkeys(
            (seed, prompt.prompt_id, sample)
            for seed in config.eval.seeds
            for prompt in tasks.prompts
            for sample in range(config.eval.num_samples)
        )
        self._records: dict[_Key, dict] = {}
        self._read()

    @property
    def sandbox_level(self) -> str:
        """The isolation level the protocol counts on."""
        return self._about["protocol"]["sandbox"]["level"]

    @property
    def num_graded(self) -> int:
        return sum(record["is_valid"] for record in self._records.values())

    def todo(self) -> list[tuple[int, Prompt]]:
        """(seed, prompt) of which a sample is missing or was lost to infrastructure."""
        left = [
            (seed, prompt)
            for seed in self.config.eval.seeds
            for prompt in self.tasks.prompts
            if not all(
                self._is_graded((seed, prompt.prompt_id, sample))
                for sample in range(self.config.eval.num_samples)
            )
        ]
        if self._records:
            lost = len(self._records) - self.num_graded
            say(
                f"{self.num_graded} samples are there already, {lost} were lost to infrastructure; "
                f"{len(left)} groups to go"
            )
        return left

    def add(self, seed: int, prompt: Prompt, trajectories: list[Trajectory]) -> None:
        """Append the samples of one prompt that are not there yet, with one write."""
        row = {"row": self.tasks.rows[prompt.prompt_id]}
        found = [
            sample_record(prompt, t, self.tokenizer, seed=seed, sample=number) | row
            for number, t in enumerate(trajectories)
        ]
        new = [record for record in found if self._keep(record)]
        with self._samples.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in new))

    def rows(self) -> list[dict]:
        """One record per sample of this evaluation, in the order of its prompts."""
        return [self._records[key] for key in self._wanted if key in self._records]

    def finish(self) -> dict[str, Any]:
        """Write report.json; print the table and what there is to know about it."""
        numbers = summarise_samples(self.rows(), num_samples=self.config.eval.num_samples)
        report = {
            **self._about,
            **numbers,
            "num_prompts_too_long": self.tasks.num_too_long,
            "num_repeated_rows": self.tasks.num_repeated,
        }
        report["table"] = table_lines(report)
        report["notes"] = self._notes(numbers["overall"]["num_infra_errors"])
        report["scalars"] = validation_scalars(report["sources"])
        self._write("report.json", report)
        say(f"{report['model']}: protocol {report['protocol_hash']}")
        for line in [*report["table"], *report["notes"]]:
            say(line)
        return report

    def _notes(self, num_lost: int) -> list[str]:
        tasks, limit = self.tasks, self.config.rollout.max_prompt_length
        notes = [
            (num_lost, f"of {len(self._records)} samples were lost to infrastructure and are left "
             "out, so the rest may be a biased choice; the same command samples them again"),
            (tasks.num_too_long, f"prompts are left out: longer than rollout.max_prompt_length "
             f"{limit} tokens"),
            (tasks.num_repeated, "rows are left out: each repeats an earlier one"),
        ]  # fmt: skip
        return [f"{count} {note}" for count, note in notes if count]

    def _is_graded(self, key: _Key) -> bool:
        return key in self._records and self._records[key]["is_valid"]

    def _keep(self, record: dict) -> bool:
        """Whether the record says something new: the first graded one of a sample stays."""
        key = (record["seed"], record["prompt_id"], record["sample"])
        if key not in self._wanted or self._is_graded(key):
            return False
        self._records[key] = record
        return True

    def _read(self) -> None:
        _drop_torn_end(self._samples)
        for record in read_rows(self._samples):
            self._keep(record)

    def _check_same(self) -> None:
        stored = self.path / "protocol.json"
        if not stored.is_file() or not self._samples.is_file():
            return
        before = json.loads(stored.read_text())
        for key in ("protocol_hash", "model_fingerprint"):
            if before[key] != self._about[key]:
                raise DataError(
                    f"{self.path}: holds samples of {key} {before[key]}, this evaluation has "
                    f"{self._about[key]}; give another --out{self._difference(before)}"
                )

    def _difference(self, before: dict) -> str:
        """ ", or undo what differs: seed, limits"; nothing when it is the model."""
        old, new = before["protocol"], self._about["protocol"]
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return f", or undo what differs in protocol.json: {', '.join(names)}" if names else ""

    def _write(self, name: str, value: Any) -> None:
        partial = self.path / (name + ".partial")
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.rename(self.path / name)


def _drop_torn_end(path: Path) -> None:
    """Cut off a last line that a kill has cut short, or the next record would be glued to it."""
    if not path.is_file():
        return
    written = path.read_bytes()
    end = written.rfind(b"\n") + 1
    if end < len(written):
        with path.open("r+b") as file:
            file.truncate(end)
