"""How the samples of a prompt vote. Right answers are one answer, as graded; wrong ones are one
where the grader's comparison says so, not where they are spelled alike."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sod.errors import GraderUnavailable

RIGHT = 1.0  # the score of a right answer


@dataclass(frozen=True)
class Votes:
    """The graded samples of one prompt."""

    num_correct: int
    wrong: tuple[int, ...]  # votes of each wrong answer, ascending: (1, 5)
    num_empty: int  # samples without an answer, which do not vote


class BallotBox:
    """Counts the votes of many prompts within a time limit."""

    def __init__(
        self,
        is_same: Callable[[str, str], bool],
        *,
        prompt_limit_s: float = 2.0,
        limit_s: float = 300.0,
    ):
        """`is_same`: whether two answers are equal. Once a prompt, or all, took as long as this,
        what is left is told apart by its spelling."""
        self._is_same, self._prompt_limit_s = is_same, prompt_limit_s
        self._left_s = limit_s
        self.num_by_spelling = 0  # prompts not wholly compared

    def count(self, records: list[dict]) -> Votes | None:
        """The votes of one prompt's graded samples; None for programs, which cannot vote."""
        if any(r["prediction"] is None for r in records):
            return None
        wrong = Counter(r["prediction"] for r in records if r["score"] < RIGHT)
        num_empty = wrong.pop("", 0)
        counts = self._clusters(sorted(wrong.items(), key=lambda item: (-item[1], item[0])))
        num_correct = len(records) - num_empty - sum(counts)
        return Votes(num_correct, tuple(sorted(counts)), num_empty)

    def _clusters(self, answers: list[tuple[str, int]]) -> list[int]:
        """Votes of each cluster; an answer joins the first whose first member it equals."""
        started = time.monotonic()
        end = started + min(self._prompt_limit_s, self._left_s)
        clusters: dict[str, int] = {}
        is_compared = True
        for text, count in answers:
            name: str | None = text
            if is_compared:
                name = self._cluster_of(text, clusters, end)
                is_compared = name is not None
            name = name or text
            clusters[name] = clusters.get(name, 0) + count
        self._left_s -= time.monotonic() - started
        self.num_by_spelling += not is_compared
        return list(clusters.values())

    def _cluster_of(self, text: str, clusters: dict[str, int], end: float) -> str | None:
        """The cluster it joins, itself where it equals none; None when that was not found out."""
        for name in clusters:
            if time.monotonic() >= end:
                return None
            try:
                if self._is_same(name, text):
                    return name
            except GraderUnavailable:
                return None
        return text
