"""The groups of one rollout: which wait, which run, which are done. Pure; no actor is known here.

A group is all trajectories of one prompt. Every group that is asked for ends exactly once: done, or
carried into the next rollout.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_sod.errors import RolloutError
from megatron_sod.rollout.waiting import Took
from megatron_sod.types import Prompt, Trajectory


@dataclass(frozen=True)
class GroupRequest:
    """Trajectories of one prompt, to be started or continued."""

    prompt: Prompt
    # Makes trajectory ids unique: the iteration the group was drawn in, "6"; "6+" after what it had
    # was thrown away, as the next epoch's group of this prompt may be one of iteration 6 too.
    tag: str
    num_generations: int
    begun: tuple[Trajectory, ...] = ()  # of an interrupted group: all of them, in sample order

    def trajectory_id(self, sample: int) -> str:
        return f"{self.prompt.prompt_id}/{self.tag}/{sample}"


@dataclass(frozen=True)
class GroupResult:
    """What a worker returns for a group."""

    trajectories: list[Trajectory]  # in sample order; "interrupted" ones are not finished
    counts: Counter[str] = field(default_factory=Counter)  # turns_resubmitted, sandbox_retries, ...
    notes: list[str] = field(default_factory=list)  # for the log
    took: list[Took] = field(default_factory=list)  # of the trajectories that ran

    @property
    def is_complete(self) -> bool:
        return all(t.finish_reason != "interrupted" for t in self.trajectories)


@dataclass(frozen=True)
class RolloutResult:
    """Everything one rollout gave."""

    trajectories: list[Trajectory]  # of complete groups, in the order they were asked for
    carried: list[GroupRequest]  # to be continued
    wall_s: float = 0.0
    took: list[Took] = field(default_factory=list)


class GroupBoard:
    """Book-keeping of one rollout."""

    def __init__(
        self,
        groups: Sequence[GroupRequest],
        *,
        max_in_flight: int,
        num_needed: int | None = None,
    ):
        """
        Args:
            max_in_flight: trajectories at a time; one group always fits.
            num_needed: complete groups that are enough; None: all. Groups begun in an earlier
                rollout are needed in any case, so none is carried twice.
        """
        self._groups = list(groups)
        self._max_in_flight = max_in_flight
        self._num_needed = len(self._groups) if num_needed is None else num_needed
        self._waiting = deque(range(len(self._groups)))
        self._running: set[int] = set()
        self._results: dict[int, GroupResult] = {}
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self._took: list[Took] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    def group(self, index: int) -> GroupRequest:
        return self._groups[index]

    def start_next(self) -> int | None:
        """The next group to run, now counted as running; None when there is none or no room."""
        if not self._waiting or self.is_enough:
            return None
        in_flight = sum(self._groups[i].num_generations for i in self._running)
        room = self._max_in_flight - in_flight
        if self._running and room < self._groups[self._waiting[0]].num_generations:
            return None
        index = self._waiting.popleft()
        self._running.add(index)
        return index

    def finish(self, index: int, result: GroupResult) -> None:
        """A worker returned the group, complete or interrupted."""
        self._running.remove(index)
        self._check(self._groups[index], result)
        assert index not in self._results, f"group {index} ended twice"
        self._results[index] = result
        self.counts += result.counts
        self.notes += result.notes
        self._took += result.took

    def requeue(self, index: int) -> None:
        """The worker that ran the group is gone, and what it had with it."""
        self._running.remove(index)
        self._waiting.appendleft(index)
        self.counts["groups_requeued"] += 1

    @property
    def is_enough(self) -> bool:
        """Whether what is complete suffices."""
        complete = {i for i, result in self._results.items() if result.is_complete}
        carried_once = {i for i, group in enumerate(self._groups) if group.begun}
        return len(complete) >= self._num_needed and carried_once <= complete

    def result(self) -> RolloutResult:
        """The first `num_needed` complete groups in request order, begun ones among them; the
        rest is carried, finished or not."""
        assert not self._running, f"{len(self._running)} groups are still running"
        complete = [i for i in sorted(self._results) if self._results[i].is_complete]
        complete.sort(key=lambda i: not self._groups[i].begun)
        taken = set(complete[: self._num_needed])
        trajectories = [t for i in sorted(taken) for t in self._results[i].trajectories]
        carried = self._carried(taken)
        return RolloutResult(trajectories, carried, took=self._took)

    def _carried(self, taken: Iterable[int]) -> list[GroupRequest]:
        carried = []
        for index, group in enumerate(self._groups):
            if index in taken:
                continue
            begun = group.begun
            if index in self._results:
                begun = tuple(self._results[index].trajectories)
            carried.append(GroupRequest(group.prompt, group.tag, group.num_generations, begun))
        return carried

    def _check(self, group: GroupRequest, result: GroupResult) -> None:
        expected = [group.trajectory_id(sample) for sample in range(group.num_generations)]
        found = [t.trajectory_id for t in result.trajectories]
        if found != expected:
            raise RolloutError(
                f"group {group.prompt.prompt_id}/{group.tag}: expected trajectories "
                f"{expected[0]} to {expected[-1]}, each once, a worker returned {found}"
            )
